"""A recorded trace as a better drafter would have left it: acceptance raised, by one number.

The drafter is made surer: at every node the odds of its most probable child are multiplied, and its
other children share the rest as before. And it is made right as often as it says: walking down the
text's path in the tree recorded at a position, the first layer whose most probable child is not the
text's next token is forgiven with probability (p - q) / (1 - q), q being that child's probability
before and p after: that token is given to that child. So where a most probable child was right with
probability q, it now is with p, and each other child is right less often in the proportion in which
it says so. Below a forgiven child hangs what the drafter drafted from that token on when the text
had come so far: the tree recorded (and raised likewise) at its position. Odds times 1 is the trace
itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import echo
from echo.testing import Trace, replay

from .replays import FREE


def raised(trace: Trace, odds: float, seed: int = 0) -> Trace:
    """The trace, surer and right more often.

    Args:
        trace: as recorded.
        odds: factor of the odds that a most probable child is right, at least 1.
        seed: of the draws, one for each position and depth.
    """
    if odds == 1:
        return trace
    out = replace(
        trace,
        token=trace.token.copy(),
        log_prob=_surer(trace.log_prob, odds),
        expanded=trace.expanded.copy(),
    )
    k, draws = (
        trace.token.shape[3],
        np.random.default_rng(seed).random((trace.positions, trace.depth)),
    )
    for first, end in zip(trace.indptr[:-1], trace.indptr[1:], strict=True):
        for t in range(
            int(end) - 2, int(first) - 1, -1
        ):  # from the back: what is grafted is raised already
            node = 0
            for d in range(min(trace.depth, int(end) - t - 1)):
                score = trace.log_prob[t, d, node].astype(np.float64)
                best, own = int(score.argmax()), out.token[t, d, node]
                hit = np.flatnonzero((own == trace.text[t + d + 1]) & np.isfinite(score))
                q = np.exp(score[best])
                if (
                    not (len(hit) and hit[0] == best)
                    and draws[t, d] * (1.0 - q + odds * q) < (odds - 1.0) * q
                ):
                    own[hit], own[best] = own[best], trace.text[t + d + 1]
                    _graft(out, t, d, node * k + best, t + d + 1)
                    break
                node = int(out.expanded[t, d, node * k + hit[0]]) if len(hit) else -1
                if node < 0:
                    break
    return replace(
        out, floor=0.0
    )  # where the recorded drafter stopped, this one does, surer or not


def _surer(log_prob: np.ndarray, odds: float) -> np.ndarray:
    """The odds of each most probable child multiplied; its siblings scaled to the rest."""
    score = log_prob.astype(np.float32)
    top = score.argmax(-1)[..., None]
    best = np.take_along_axis(score, top, -1)
    known = np.isfinite(best)
    q = np.where(known, np.exp(np.where(known, best, 0.0)), 0.5)
    shrink = -np.log1p((odds - 1.0) * q)  # (1 - p) / (1 - q), and p / q is odds times that
    score = score + shrink
    np.put_along_axis(
        score, top, np.where(known, np.minimum(best + np.log(odds) + shrink, 0.0), -np.inf), -1
    )
    return score.astype(np.float16)


def _graft(trace: Trace, t: int, d: int, child: int, source: int) -> None:
    """Put the tree of position ``source`` below that child of layer d at position t."""
    token, log_prob, expanded, k = trace.token, trace.log_prob, trace.expanded, trace.token.shape[3]
    nodes = token.shape[2]
    old = {int(expanded[t, d, child])} - {-1}
    new = {0: child}  # nodes of the source's layer -> children of the layer above, here
    expanded[t, d, child] = -1
    for layer, here in enumerate(range(d + 1, trace.depth)):
        kept = set(expanded[t, here - 1][expanded[t, here - 1] >= 0].tolist())
        below_old = {int(p) for node in old for p in expanded[t, here, node * k : node * k + k]} - {
            -1
        }
        free = [node for node in range(nodes) if node not in kept]
        for node in old:
            log_prob[t, here, node], expanded[t, here, node * k : node * k + k] = -np.inf, -1
        below: dict[int, int] = {}
        for (theirs, above), mine in zip(new.items(), free, strict=False):
            expanded[t, here - 1, above] = mine
            token[t, here, mine], log_prob[t, here, mine] = (
                token[source, layer, theirs],
                log_prob[source, layer, theirs],
            )
            expanded[t, here, mine * k : mine * k + k] = -1
            children = expanded[source, layer, theirs * k : theirs * k + k]
            below |= {int(p): mine * k + j for j, p in enumerate(children) if p >= 0}
        old, new = below_old, below


def raised_to(trace: Trace, tokens: float, tree: tuple[int, int, int]) -> float:
    """The odds at which that tree (verify tokens, beam, depth) reaches so many tokens a step."""
    # by bisection over an eighth of the texts
    sample = trace.texts(range(0, len(trace.kind), 8))
    scheduler = echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=tree[0], beam=tree[1], max_depth=tree[2]
    )
    low, high = 0.0, np.log(1e4)
    for _ in range(8):
        middle = (low + high) / 2
        report = replay(raised(sample, float(np.exp(middle))), scheduler, FREE, batch=4)
        low, high = (middle, high) if report.tokens_per_step < tokens else (low, middle)
    return float(np.exp(low))
