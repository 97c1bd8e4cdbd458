"""What could rank drafts better than the path probability? Candidates for f(v), judged on a trace at equal rows.

Each candidate is one the device could compute: monotone maps of a log-probability, looked up by depth and by a bin of one more feature
(:meth:`echo.Calibration.reliability_table`), at most multiplied down the path. Every position of the text is a step of one large batch, so
that all recorded drafts count. Maps are fitted on one half of the texts and judged on the other, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import echo
from echo.budget.rules import GlobalRank, place
from echo.gating import look_up, reliability
from echo.kernels.launch import ONE
from echo.testing import Trace
from echo.testing.replay import _Source
from echo.tree.supertree import bits

ROWS = (1, 2, 4, 8, 16)
"""Drafted rows a request."""
BINS, POOLED_ROWS = 4, 20.0
"""Bins of a second feature, of equal mass: a map each, shrunk toward the map of all."""


@dataclass(frozen=True)
class Pool:
    """All drafts of a trace: P positions, T nodes each, the root first.

    Attributes:
        score, log_q: float32 [P, T], of the path and given the parent; -inf where there is no node.
        parent, depth, rank: ints [P, T]; rank is the place in the layer.
        accepted: bool [P, T], the text goes through the node.
        text, offset: ints [P], whose position, and its place in the answer.
    """

    score: np.ndarray
    log_q: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    accepted: np.ndarray
    text: np.ndarray
    offset: np.ndarray

    @property
    def drafted(self) -> np.ndarray:
        """bool [P, T]: what may be selected."""
        return np.isfinite(self.score) & (self.depth > 0)

    def above(self, values: np.ndarray) -> np.ndarray:
        """The parents' values."""
        return np.take_along_axis(values, self.parent, 1)

    def siblings(self, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A statistic of each node's family, [P, T]: ``measure`` gets probabilities [..., k], greatest first, and drops an axis."""
        values = np.zeros(self.score.shape)
        k = int((self.depth[0] == 1).sum())
        for d in range(1, int(self.depth.max()) + 1):
            here = self.depth[0] == d
            family = -np.sort(-np.exp(self.log_q[:, here]).reshape(len(values), -1, k), axis=2)
            values[:, here] = np.repeat(measure(family), k, axis=1)
        return values


def pool(trace: Trace) -> Pool:
    """The drafts at every position but the last of each text, on the widest beam."""
    source, following = _Source(trace), torch.from_numpy(trace.following).long()
    scheduler = echo.ElasticBudgetScheduler(GlobalRank(trace.beam), None, 1 << 20, trace.depth)
    at = np.delete(np.arange(trace.positions), trace.indptr[1:] - 1)
    parts = []
    for positions in np.array_split(at, max(1, len(at) // 512)):
        tree = scheduler.plant(source.text[positions])
        source.begin(positions)
        for _ in range(trace.depth):
            tree = scheduler.grow(tree, *source.draft(tree.frontier))
        forest = tree.forest
        right = forest.token == following[torch.from_numpy(positions)][:, (forest.depth - 1).clamp(min=0)]
        right &= torch.isfinite(forest.score)
        right[:, 0] = True
        for _ in range(trace.depth):
            right = right & right.gather(1, forest.parent)
        rank = torch.cat([place(bits(layer.score).long()) for layer in tree.layers], dim=1)
        log_q = torch.where(torch.isfinite(forest.score), forest.score - forest.score.gather(1, forest.parent), -torch.inf)
        parts.append([x.numpy() for x in (forest.score, log_q, forest.parent, forest.depth.expand_as(rank), rank, right)])
    text = np.searchsorted(trace.indptr, at, side="right") - 1
    return Pool(*(np.concatenate(column) for column in zip(*parts, strict=True)), text, at - trace.indptr[text])


def history(p: Pool, keep: float, prior: float = 8.0) -> np.ndarray:
    """[P]: accepted minus expected first drafts of the answer so far, a mean shrunk to 0 by ``prior`` rows of memory ``keep``.

    Judged at every position before, also those that a speculating server never drafts at: no server can know more of this kind.
    """
    first = np.flatnonzero(p.depth[0] == 1)
    best = first[p.score[:, first].argmax(axis=1)]
    surprise = p.accepted[np.arange(len(best)), best] - np.exp(p.score[np.arange(len(best)), best])
    found, total, count = np.zeros(len(best)), 0.0, 0.0
    for i, gap in enumerate(surprise):
        if p.offset[i] == 0:
            total = count = 0.0
        found[i] = total / (count + prior)
        total, count = keep * total + gap, keep * count + 1
    return found


def mapped(p: Pool, half: np.ndarray, feature: np.ndarray | None = None, conditional: bool = False) -> np.ndarray:
    """f [P, T] from maps of a log-probability by depth and a bin of ``feature``, fitted on the positions ``half``.

    Without ``conditional`` m_d(S), the least along the path; with it g_d(log q) given an accepted parent, multiplied along the path.
    A feature of ints is taken as it is, all from 3 on as one; others are cut into bins of equal mass.
    """
    x = p.log_q if conditional else p.score
    use = p.drafted & half[:, None]
    if conditional:
        use &= p.above(p.accepted)
    wide = np.zeros(p.score.shape, dtype=np.int64) if feature is None else feature
    wide = np.broadcast_to(wide if wide.ndim == 2 else wide[:, None], p.score.shape)
    whole = wide.dtype.kind == "i"
    bins = wide.clip(max=BINS - 1) if whole else np.searchsorted(np.quantile(wide[use], np.arange(1, BINS) / BINS), wide)
    log = echo.WarmupLog.from_arrays(p.depth[use], np.exp(x[use]), p.accepted[use], rank=bins[use])
    pooled = [d.reliability for d in echo.calibrate(echo.ConfidenceHistograms.of(log)).depths]
    tables = [reliability.table(pooled)]
    if feature is not None:
        parts = [echo.WarmupLog.from_arrays(*(c[use & (bins == n)] for c in (p.depth, np.exp(x), p.accepted))) for n in range(BINS)]
        masses = [echo.ConfidenceHistograms.empty(len(pooled)).add(part).mass.sum(axis=2) for part in parts]
        tables = [reliability.table([reliability.fit(mass[:, d], knots, POOLED_ROWS) for d, knots in enumerate(pooled)]) for mass in masses]
    score, depth = (torch.from_numpy(np.ascontiguousarray(c)) for c in (x, p.depth))
    own = np.choose(bins, [look_up(torch.from_numpy(t), score, depth).numpy() for t in tables]) / ONE
    return along(p, own, np.multiply if conditional else np.minimum)


def along(p: Pool, own: np.ndarray, join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """f [P, T]: each node's value joined with its parent's f; 0 where there is no node."""
    f = np.where(p.drafted, own, 0.0)
    f[:, 0] = 1.0
    for d in range(1, int(p.depth.max()) + 1):
        here = p.depth[0] == d
        f[:, here] = join(f[:, here], p.above(f)[:, here])
    return f


def boosted(p: Pool, half: np.ndarray, features: list[np.ndarray]) -> np.ndarray | None:
    """No candidate for a device: 150 boosted trees on all features, to see what a better learner would find. None: no scikit-learn."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        return None
    columns = [np.where(np.isfinite(c), c, -9.0) for c in (p.score, p.log_q, p.above(p.score), p.depth, p.rank)]
    columns += [np.broadcast_to(c if c.ndim == 2 else c[:, None], p.score.shape) for c in features]
    x = np.stack(columns, axis=-1)
    use = p.drafted & half[:, None]
    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.05, max_leaf_nodes=8, min_samples_leaf=100, l2_regularization=5.0, random_state=0
    )
    own = np.zeros(p.score.shape)
    own[p.drafted] = model.fit(x[use], p.accepted[use]).predict_proba(x[p.drafted])[:, 1]
    return along(p, own, np.minimum)


def candidates(p: Pool, half: np.ndarray) -> dict[str, np.ndarray | None]:
    """f of each candidate by its name, fitted on the positions ``half``; the first is what :class:`echo.GlobalRank` ships."""
    tail, margin = p.siblings(lambda q: 1.0 - q.sum(axis=-1)), p.siblings(lambda q: q[..., 0] - q[..., 1])
    first = int(np.flatnonzero(p.depth[0] == 1)[0])
    recent, whole = history(p, 0.9), history(p, 1.0)
    everything = [tail, margin, tail[:, first], margin[:, first], recent, whole, p.offset]
    return {
        "m_d(S), as shipped": mapped(p, half),
        "path probability of the draft": along(p, np.exp(p.score), np.minimum),
        "m_d(S) by rank": mapped(p, half, p.rank),
        "g_d(log q), multiplied down the path": mapped(p, half, conditional=True),
        "g_d(log q) by S(parent), multiplied": mapped(p, half, p.above(p.score), conditional=True),
        "m_d(S) by mass outside the family (entropy)": mapped(p, half, tail),
        "m_d(S) by margin of the family": mapped(p, half, margin),
        "m_d(S) by mass outside the first layer": mapped(p, half, tail[:, first]),
        "m_d(S) by the request's acceptance so far": mapped(p, half, whole),
        "m_d(S) by its last ten positions": mapped(p, half, recent),
        "m_d(S) by position in the answer": mapped(p, half, p.offset.astype(float)),
        "boosted trees on all of these": boosted(p, half, everything),
    }


def ranking(p: Pool, f: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The drafts of the positions ``chosen``, best first (ties: the shallower): whose they are, and whether accepted."""
    use = p.drafted & chosen[:, None]
    order = np.lexsort((p.depth[use], -f[use]))
    return np.broadcast_to(p.text[:, None], use.shape)[use][order], p.accepted[use][order]


def accepted(order: tuple[np.ndarray, np.ndarray], positions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Accepted drafts [len(ROWS)] when that many rows a position go to the best; texts count ``weight`` times."""
    w = weight[order[0]]
    rows, hits = np.cumsum(w), np.cumsum(w * order[1])
    places = np.searchsorted(rows, np.array(ROWS) * (weight * positions).sum())
    return hits[np.minimum(places, len(hits) - 1)]


def oracle(p: Pool, chosen: np.ndarray, positions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Accepted drafts [len(ROWS)] where rows go to nothing but what will be accepted."""
    path = (weight[p.text[chosen]] * p.accepted[chosen, 1:].sum(axis=1)).sum()
    return np.minimum(path, np.array(ROWS) * (weight * positions).sum())


def judge(p: Pool, halves: tuple[np.ndarray, np.ndarray], resamples: int = 200) -> list[dict[str, object]]:
    """Each candidate's accepted drafts a position at equal rows, its gain over the shipped one and its share of the way to the oracle.

    Intervals are of 95%, from a bootstrap over texts, the same for all candidates.
    """
    random = np.random.default_rng(0)
    texts = [np.unique(p.text[half]) for half in halves]
    weights = [np.bincount(np.concatenate(texts)).astype(float)]
    weights += [np.bincount(np.concatenate([random.choice(t, len(t)) for t in texts]), minlength=len(weights[0])) for _ in range(resamples)]
    found: dict[str, np.ndarray] = {}
    for fit, test in (halves, halves[::-1]):
        positions = np.bincount(p.text[test], minlength=len(weights[0]))
        found["oracle"] = found.get("oracle", 0.0) + np.array([oracle(p, test, positions, w) for w in weights])
        for name, f in candidates(p, fit).items():
            if f is not None:
                order = ranking(p, f, test)
                found[name] = found.get(name, 0.0) + np.array([accepted(order, positions, w) for w in weights])
    total = np.array([w[p.text].sum() for w in weights])[:, None]
    shipped = next(name for name in found if name != "oracle")
    return [_entry(name, values / total, found[shipped] / total, found["oracle"] / total) for name, values in found.items()]


def _entry(name: str, values: np.ndarray, base: np.ndarray, oracle: np.ndarray) -> dict[str, object]:
    gain = values / base - 1.0
    low, high = np.percentile(gain[1:], [2.5, 97.5], axis=0)
    closed = (values[0] - base[0]) / (oracle[0] - base[0])
    columns = {"accepted": values[0], "gain": gain[0], "low": low, "high": high, "share_of_way_to_oracle": closed}
    return {"f": name, "rows": list(ROWS)} | {key: np.round(column, 5).tolist() for key, column in columns.items()}
