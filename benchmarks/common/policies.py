"""Every policy of the literature as a gate, a rule and a budget. Reads like the table in the README."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

import echo
from echo.testing import Trace


@dataclass(frozen=True)
class Setting:
    """What a policy may know before it serves: the calibration, the machine, the batch; the deepest layer on record; the warm-up log."""

    calibration: echo.Calibration
    cost: echo.CostModel
    batch: int
    depth: int
    beam: int
    log: echo.WarmupLog | None = None

    @property
    def k_max(self) -> int:
        """The knee, but no less than one drafted row a request."""
        return max(self.cost.knee.k_max, 2 * self.batch)


Policy = Callable[[Setting], Iterator[echo.ElasticBudgetScheduler]]
"""The candidates that are tuned over, on other texts than those of the figures."""


def chain(s: Setting):
    for depth in (1, 2, 3, 4, 6):
        yield echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=depth + 1, beam=1, max_depth=depth
        )


SHAPES = (
    (2, 1, 1),
    (3, 2, 2),
    (4, 2, 2),
    (5, 3, 3),
    (6, 2, 3),
    (8, 3, 4),
    (12, 4, 4),
    (16, 4, 5),
    (24, 6, 6),
    (32, 6, 8),
    (60, 6, 8),
)
"""EAGLE trees: rows, beam, depth."""


def eagle(s: Setting):
    for n, beam, depth in SHAPES:
        yield echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=n, beam=beam, max_depth=depth
        )


def ddd(s: Setting):
    for n, log_tau in ((8, -1.0), (16, -1.0), (16, -2.0), (32, -2.0)):
        yield echo.ElasticBudgetScheduler(
            echo.PerRequest(n, s.beam), echo.BeamMassGate((3, 5, 7), log_tau, s.beam), None, s.depth
        )


def opt_tree(s: Setting):
    for n, delta in ((4, 0.4), (8, 0.2), (16, 0.2), (32, 0.1)):
        gate = echo.BeamMassGate(tuple(range(1, s.depth)), float(np.log(delta)), s.beam)
        yield echo.ElasticBudgetScheduler(echo.PerRequest(n, s.beam), gate, None, s.depth)


def two_level(s: Setting, gate: echo.gating.Gate) -> Iterator[echo.ElasticBudgetScheduler]:
    for width, rows, depth in itertools.product(
        (1, 2, 3), sorted({s.k_max, 3 * s.batch}), (3, s.depth)
    ):
        yield echo.ElasticBudgetScheduler(echo.TwoLevel(width, 8), gate, rows, depth)


def paper(s: Setting):
    yield from two_level(s, echo.SparseGate(s.calibration))


def dense(s: Setting):
    yield from two_level(s, echo.SparseGate.dense(s.calibration))


def one_threshold(calibration: echo.Calibration) -> echo.SparseGate:
    """The mean threshold at all sweet spots."""
    return echo.SparseGate.fixed(
        float(np.mean([d.threshold for d in calibration.depths if d.gate])), calibration.gate_depths
    )


def fixed(s: Setting):
    yield from two_level(s, one_threshold(s.calibration))


def goodput_gate(
    log: echo.WarmupLog, cost: echo.CostModel, batch: int, depth: int, width: int
) -> echo.SparseGate:
    """Gates whose thresholds maximise tokens a second on the ``log`` instead of separating, for layers of ``width`` rows."""
    return echo.SparseGate(
        echo.calibrate(
            log, max_depth=depth, thresholds="goodput", cost=cost, batch=batch, beam=width
        )
    )


def goodput_gates(s: Setting):
    """ECHO's rule behind :func:`goodput_gate`; wider, or with rows for half a step more."""
    assert s.log is not None
    for depth, (width, more) in itertools.product((3, s.depth), ((1, 8), (3, 8), (s.beam, 60))):
        gate = goodput_gate(s.log, s.cost, s.batch, depth, width)
        for rows in sorted({s.k_max, max(2 * s.batch, s.cost.tokens_within(1.5))}):
            yield echo.ElasticBudgetScheduler(echo.TwoLevel(width, more), gate, rows, depth)


def top_k(s: Setting):
    for rows, depth in itertools.product(
        sorted({s.k_max, 2 * s.batch, 4 * s.batch, 12 * s.batch}), (3, s.depth)
    ):
        yield echo.ElasticBudgetScheduler(echo.GlobalRank(s.beam, s.calibration), None, rows, depth)


def goodput(s: Setting):
    yield echo.ElasticBudgetScheduler.throughput_optimal(s.calibration, s.cost, beam=s.beam)


def goodput_chain(s: Setting):
    yield echo.ElasticBudgetScheduler.throughput_optimal(s.calibration, s.cost, beam=1)


POLICIES: dict[str, Policy] = {
    "static chain": chain,
    "EAGLE tree": eagle,
    "DDD": ddd,
    "OPT-Tree": opt_tree,
    "ECHO (paper)": paper,
    "ECHO, dense gates": dense,
    "ECHO, one threshold": fixed,
    "ECHO, goodput gates": goodput_gates,
    "global top-K": top_k,
    "goodput chain": goodput_chain,
    "goodput tree": goodput,
}
"""In the order of the table; the oracle, which is no policy, is :func:`oracle_trace` under any global ranking."""

BASELINES = tuple(name for name in POLICIES if not name.startswith("goodput"))
"""What goodput is judged against, each tuned."""

CHAINS = ("static chain", "goodput chain")
"""Policies whose drafter proposes one token at a time: replayed on :func:`chain_trace`."""


def chain_trace(trace: Trace) -> Trace:
    """The trace as a drafter of chains has it: the first choice after each node, and no other."""
    best = trace.log_prob.argmax(axis=3)[..., None]
    first = np.arange(trace.token.shape[3]) == best
    return replace(trace, log_prob=np.where(first, trace.log_prob, np.float16(-np.inf)))


def oracle_trace(trace: Trace) -> Trace:
    """The trace as an oracle drafts it: the target's next token for sure wherever it was drafted, and nothing else."""
    following = trace.following[:, : trace.depth]
    right = (trace.token == following[:, :, None, None]) & np.isfinite(trace.log_prob)
    return replace(trace, log_prob=np.where(right, np.float16(0), np.float16(-np.inf)))
