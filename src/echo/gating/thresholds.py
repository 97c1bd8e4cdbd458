"""What a set of gates does to whole requests, and the best thresholds for a measured cost.

S request-steps, D depths.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating.histograms import MAX_DEPTH, ROWS, UNIT, WEIGHT, ConfidenceHistograms
from echo.gating.logs import WarmupLog
from echo.gating.statistics import separability

Floats = NDArray[np.float64]

GRID = {1: 1024, 2: 256, 3: 64}
"""Candidate thresholds per gate in an exhaustive search, by the number of gates searched."""
SAMPLE = 200_000
MARK = 20
MIX = 0x9E3779B97F4A7C15
"""Rows searched for signs of a gate; steps needed on either side of it; Knuth's hash multiplier."""


@dataclass(frozen=True)
class GateReport:
    """What one gate does to the requests of a log that pass the gates above it.

    Attributes:
        depth, threshold: of the gate.
        asked: weighted request-steps that reach it.
        stopped: those of them whose confidence is not above the threshold.
        lost: stopped ones whose path the target would have accepted through this depth.
    """

    depth: int
    threshold: float
    asked: float
    stopped: float
    lost: float


@dataclass(frozen=True)
class Objective:
    """Tokens per second of verification, batch * (1 + A) / T(batch * (1 + beam * L)).

    A and L are a request's mean accepted tokens and draft layers; the 1 is the bonus token and the
    root. The cost of the mean stands for the mean cost: in a large batch tokens hardly vary.

    Attributes:
        cost: seconds by verify tokens.
        batch: number of requests decoded together.
        beam: verify tokens per layer; a layer is accepted if one of its ``beam`` best nodes is.

    Raises:
        EchoError: an argument of the wrong kind or out of range.

    Example:
        >>> float(Objective(CostModel((1, 8), (1.0, 2.0)), batch=4, beam=1)(0.5, 1.0))
        3.0
    """

    cost: CostModel
    batch: int
    beam: int

    def __post_init__(self) -> None:
        checks.instance("cost", self.cost, CostModel)
        checks.integer_field(self, "batch", 1)
        checks.integer_field(self, "beam", 1)

    def __call__(self, accepted: NDArray[Any] | float, layers: NDArray[Any] | float) -> Floats:
        """Tokens per second for mean ``accepted`` tokens and mean ``layers``, elementwise."""
        num_tokens = self.batch * (1.0 + self.beam * np.asarray(layers, dtype=np.float64))
        tokens = self.batch * (1.0 + np.asarray(accepted))
        return np.asarray(tokens / self.cost(num_tokens), dtype=np.float64)


class Chains(NamedTuple):
    """Rows joined by step.

    Attributes:
        confidence: float32 [S, D] of rank 0; NaN where the log has no row.
        accepted: bool [S, D], whether the target accepted the path of rank 0 through that depth.
        gain: int64 [S, D + 1], accepted tokens if layers 1..d are drafted.
        weight: float64 [S].
    """

    confidence: NDArray[np.float32]
    accepted: NDArray[np.bool_]
    gain: NDArray[np.int64]
    weight: Floats


def join(log: WarmupLog, max_depth: int, beam: int = 1) -> Chains:
    """Join the rows of each step, which gets the weight of its deepest row.

    EchoError: no row of rank 0, two at one depth of a step, or no step with two depths.
    """
    path = (log.rank == 0) & (log.depth <= max_depth) & (log.weight > 0)
    if not path.any():
        raise EchoError(f"log: expected rows of rank 0 down to depth {max_depth}, got none")
    steps, place = np.unique(log.step[path], return_inverse=True)
    column = log.depth[path] - 1
    shape = len(steps), max_depth
    counts = np.bincount(np.ravel_multi_index((place, column), shape))
    if counts.max() > 1:
        step, depth = np.unravel_index(int((counts > 1).argmax()), shape)
        expected = "log.step: expected one row of rank 0 for each depth of a step"
        raise EchoError(f"{expected}, got more in step {steps[step]} at depth {depth + 1}")
    if len(steps) == len(place) and column.min() < column.max():
        expected = "log.step: expected ids that join the rows of a step"
        raise EchoError(f"{expected}, got each row in a step of its own")
    confidence = np.full(shape, np.nan, dtype=np.float32)
    confidence[place, column] = log.confidence[path]
    accepted = np.zeros(shape, np.bool_)
    accepted[place, column] = log.accepted[path]
    weight = np.zeros(len(steps))
    order = np.argsort(column, kind="stable")
    weight[place[order]] = log.weight[path][order]  # the deepest row, written last, wins
    near = (log.rank < beam) & (log.depth <= max_depth) & log.accepted & np.isin(log.step, steps)
    hit = np.zeros(shape, np.bool_)
    hit[np.searchsorted(steps, log.step[near]), log.depth[near] - 1] = True
    gain = np.logical_and.accumulate(hit, axis=1).cumsum(axis=1)
    return Chains(confidence, accepted, np.pad(gain, ((0, 0), (1, 0))), weight)


def refuse_gated(log: WarmupLog) -> bool:
    """Refuse a log without weights in which a confidence threshold decides which steps continue.

    That is, at some depth at least 20 steps end and 20 continue, and the continuing one is more
    confident in 99.9% of all pairs: neither rejections nor ends of requests are so sharp. Above
    200,000 rows, steps are sampled. Return whether a gate would be visible: by weights or step ids.
    """
    if not (log.weight == 1).all():
        return True
    path = (log.rank == 0) & (log.depth <= MAX_DEPTH)
    if len(log) > SAMPLE:
        hashed = log.step.astype(np.uint64) * np.uint64(MIX) >> np.uint64(32)
        path &= hashed % np.uint64(-(-len(log) // SAMPLE)) == 0
    rows = np.flatnonzero(path)
    rows = rows[np.lexsort((log.depth[rows], log.step[rows]))]
    step = log.step[rows]
    depth = log.depth[rows]
    confidence = log.confidence[rows]
    follows = np.zeros(len(rows), dtype=np.bool_)
    follows[:-1] = (np.diff(step) == 0) & (np.diff(depth) == 1)
    for d in range(1, int(depth.max(initial=0))):
        here = depth == d
        goes = int(follows[here].sum())
        ends = int(here.sum()) - goes
        sharp = min(goes, ends) >= MARK
        if sharp and separability(confidence[here], follows[here]).auc > 0.999:
            raise EchoError(
                f"log: expected steps drafted without a gate, or weights, got {ends} steps that "
                f"end at depth {d} and are less confident there than all {goes} that go on: "
                "what a gate or budget stopped is missing (ExploringGate)"
            )
    return int((depth > 1).sum() - follows.sum()) < MARK


def warn_of_missing(histograms: ConfidenceHistograms) -> None:
    """Warn if unweighted rows become fewer with depth, by at least a tenth and 20."""
    rows = histograms.mass[ROWS, :, 0].sum(axis=(1, 2))
    fewer = (rows[:-1] - rows[1:] >= np.maximum(rows[:-1] // 10, MARK)) & (rows[1:] >= MARK)
    if fewer.any() and (histograms.mass[WEIGHT] == UNIT * histograms.mass[ROWS]).all():
        d = int(fewer.argmax()) + 1
        warnings.warn(
            "log: expected step ids, or weights, where fewer rows are deeper, "
            f"got {rows[d]} rows of depth {d + 1} and {rows[d - 1]} of depth {d}: if a gate or "
            "budget kept the others from verification, this calibration is biased unnoticed",
            stacklevel=3,
        )


def report(log: WarmupLog, thresholds: Mapping[int, float]) -> tuple[GateReport, ...]:
    """Report what these gates do to the log's requests, each after the gates above it.

    Args:
        log: rows of rank 0 with step ids.
        thresholds: tau by depth.

    Raises:
        EchoError: a threshold outside [0, 1], or rows that cannot be joined by step.

    Example:
        >>> log = WarmupLog.from_arrays([1, 1], [0.9, 0.2], [1, 0], step=[0, 1])
        >>> [(gate.asked, gate.stopped, gate.lost) for gate in report(log, {1: 0.5})]
        [(2.0, 1.0, 0.0)]
    """
    thresholds = check_thresholds("thresholds", thresholds)
    if not thresholds:
        return ()
    chains = join(log, max(thresholds))
    alive = np.ones(len(chains.weight), dtype=np.bool_)
    result = []
    for depth, tau in sorted(thresholds.items()):
        c = chains.confidence[:, depth - 1]
        asked = alive & ~np.isnan(c)
        stopped = asked & (c <= tau)
        kinds = (asked, stopped, stopped & chains.accepted[:, depth - 1])
        result.append(GateReport(depth, tau, *(float(chains.weight[k].sum()) for k in kinds)))
        alive = asked & ~stopped
    return tuple(result)


def throughput_optimal(
    log: WarmupLog,
    gates: Sequence[int],
    max_depth: int,
    objective: Objective,
    start: Mapping[int, float] | None = None,
) -> tuple[dict[int, float], float]:
    """Find the thresholds that maximize the objective on a log; return them and its value.

    What a shallow gate stops never reaches a deeper one, so gates cannot be optimized one by one.
    Up to three gates are searched exhaustively over candidates midway between the log's confidences
    (quantiles of them, if there are more than 64, 256, 1024 for 3, 2, 1 gates), then refined one by
    one. More gates are searched by ascent over each gate and each block of three (two from seven
    gates on): nearly always the global optimum on small logs, not provably.

    Args:
        log: rows of every step and depth down to ``max_depth``, of ranks below ``objective.beam``,
            recorded with that beam or a little more.
        gates: gate depths.
        max_depth: layers drafted for a request that passes all gates.
        objective: tokens per second.
        start: an additional start of the ascent. Defaults to none.

    Raises:
        EchoError: steps whose rows do not reach ``max_depth`` (in a log with weights they are left
            out), or an argument out of range.

    Example:
        >>> log = WarmupLog.from_arrays([1, 1], [0.9, 0.2], [1, 0], step=[0, 1])
        >>> steep = Objective(CostModel((1, 2), (1.0, 1.9)), batch=1, beam=1)
        >>> round(throughput_optimal(log, (1,), 1, steep)[0][1], 3)
        0.55
    """
    start = check_thresholds("start", start or {})
    depths = sorted({checks.integer("gates", gate, 1, max_depth) for gate in gates})
    if not depths:
        raise EchoError("gates: expected at least one depth, got none")
    chains = join(log, max_depth, objective.beam)
    whole: NDArray[np.bool_] = np.logical_not(np.isnan(chains.confidence).any(axis=1))
    where = f"rows of rank 0 at depths 1 to {max_depth}"
    if not whole.all() and (log.weight == 1).all():
        got = f"{(~whole).sum()} of {len(whole)} steps without"
        hint = "what was not verified is missing, not rejected; lower max_depth, or log whole paths"
        raise EchoError(f"log: expected {where} in every step, got {got}: {hint}")
    if not whole.any():
        raise EchoError(f"log: expected steps with {where}, got none")
    search = _Search(chains, whole, depths, objective)
    starts = [np.zeros(len(depths))]
    if start:
        starts.append(np.array([start.get(depth, 0.0) for depth in depths]))
    sizes = [1] if len(depths) <= 3 else [1, 3 if len(depths) <= 6 else 2]
    if len(depths) <= 3:
        starts.append(search.best(starts[0], range(len(depths)), GRID[len(depths)]))
    found = [search.ascend(taus, sizes) for taus in starts]
    taus, value = max(found, key=lambda pair: pair[1])
    return dict(zip(depths, taus.tolist(), strict=True)), float(value)


def check_thresholds(name: str, thresholds: Mapping[int, float]) -> dict[int, float]:
    """Return tau by depth as Python numbers; EchoError: a depth below 1 or a tau outside [0, 1]."""
    return {
        checks.integer(f"{name}.depth", d, 1): checks.real(f"{name}[{d}]", tau, 0.0, 1.0)
        for d, tau in thresholds.items()
    }


class _Search:
    def __init__(
        self, chains: Chains, whole: NDArray[np.bool_], depths: list[int], objective: Objective
    ) -> None:
        self.confidence = chains.confidence[whole][:, [d - 1 for d in depths]].astype(np.float64)
        self.weight = chains.weight[whole] / chains.weight[whole].sum()
        # Layers drafted and tokens accepted of a step that stops at gate 0, 1, ..., or at none.
        layers = [d - 1 for d in depths] + [chains.confidence.shape[1]]
        self.layers = np.array(layers, dtype=np.float64)
        self.gain = chains.gain[whole][:, layers].astype(np.float64)
        self.objective = objective

    def candidates(self, gate: int, count: int) -> Floats:
        values = np.unique(self.confidence[:, gate])
        if len(values) + 1 > count:
            shares = np.linspace(0, 1, count - 1)
            values = np.unique(np.quantile(self.confidence[:, gate], shares, method="nearest"))
        return np.concatenate([[0.0], (values[:-1] + values[1:]) / 2, [1.0]])

    def best(self, taus: Floats, block: Sequence[int], count: int) -> Floats:
        """Optimize one block of thresholds exhaustively over ``count`` each, the others fixed.

        Sums over steps that pass the block's first k gates are tail sums of k-dimensional
        histograms: O(S + count^gates).
        """
        options = [self.candidates(gate, count) for gate in block]
        sizes = [len(grid) for grid in options]
        passing = self.confidence[:, list(block)].T
        cells = [np.searchsorted(*pair) for pair in zip(options, passing, strict=True)]
        end = self.ends(taus, block)
        stops = [np.minimum(end, gate) for gate in block] + [end]
        rows = np.arange(len(end))
        totals = []
        for gain in (self.gain, np.broadcast_to(self.layers, self.gain.shape)):
            total = np.full(sizes, float((self.weight * gain[rows, stops[0]]).sum()))
            for k in range(1, len(block) + 1):
                shape = [s + 1 for s in sizes[:k]]
                more = self.weight * (gain[rows, stops[k]] - gain[rows, stops[k - 1]])
                tail = self._tail(np.ravel_multi_index(cells[:k], shape), shape, more)
                total += tail.reshape(*sizes[:k], *([1] * (len(block) - k)))
            totals.append(total)
        place = np.unravel_index(int(np.argmax(self.objective(*totals))), sizes)
        result = taus.copy()
        result[list(block)] = [grid[i] for grid, i in zip(options, place, strict=True)]
        return result

    @staticmethod
    def _tail(cell: NDArray[Any], shape: list[int], weight: NDArray[Any]) -> NDArray[Any]:
        """Return the weight of steps above each combination of candidates."""
        tail = np.bincount(cell, weights=weight, minlength=int(np.prod(shape))).reshape(shape)
        for axis in range(len(shape)):
            tail = np.flip(np.flip(tail, axis).cumsum(axis), axis)
        return tail[tuple(slice(1, None) for _ in shape)]

    def ends(self, taus: Floats, free: Sequence[int] = ()) -> NDArray[np.intp]:
        """int [S]: the gate that stops each step, those of ``free`` open; past the last: none."""
        passed = self.confidence > taus
        passed[:, list(free)] = True
        return np.where(passed.all(axis=1), len(taus), np.argmin(passed, axis=1))

    def value(self, taus: Floats) -> float:
        """Evaluate the objective, step by step."""
        end = self.ends(taus)
        gain = self.gain[np.arange(len(end)), end]
        total = (self.weight * gain).sum(), (self.weight * self.layers[end]).sum()
        return float(self.objective(*total))

    def ascend(self, taus: Floats, sizes: Sequence[int]) -> tuple[Floats, float]:
        """Ascend over all blocks of these sizes; each move strictly improves, so it terminates."""
        gates = range(len(taus))
        blocks = [block for size in sizes for block in itertools.combinations(gates, size)]
        value = self.value(taus)
        improved = True
        while improved:
            improved = False
            for block in blocks:
                option = self.best(taus, block, GRID[len(block)])
                now = self.value(option)
                if now > value * (1 + 1e-12):
                    taus = option
                    value = now
                    improved = True
        return taus, value
