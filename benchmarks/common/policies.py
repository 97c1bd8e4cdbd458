"""Every policy of the literature as a gate, a rule and a budget, as in the README's table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

import echo
from echo.testing import Trace


@dataclass(frozen=True)
class Setting:
    """What a policy may know before it serves; ``depth`` and ``beam`` as recorded."""

    calibration: echo.Calibration
    cost: echo.CostModel
    batch: int
    depth: int
    beam: int
    log: echo.WarmupLog | None = None

    @property
    def k_max(self) -> int:
        """The knee, but no less than one draft a request."""
        return max(self.cost.knee.k_max, 2 * self.batch)


Policy = Callable[[Setting], Iterator[echo.ElasticBudgetScheduler]]
"""The candidates that are tuned over, on other texts than those of the figures."""


DEFAULT = (8, 4, 5)
"""The tree that SGLang 0.5.23 sets for EAGLE where its user sets nothing, at every load."""
SHAPES = (
    (2, 1, 1),
    (3, 2, 2),
    (4, 2, 2),
    (5, 3, 3),
    (6, 2, 3),
    (8, 3, 4),
    DEFAULT,
    (12, 4, 4),
    (16, 4, 5),
    (24, 6, 6),
    (32, 6, 8),
    (60, 6, 8),
)
"""EAGLE trees: verify tokens, beam, depth."""


def tree(n: int, beam: int, depth: int) -> echo.ElasticBudgetScheduler:
    """EAGLE's, of those verify tokens, beam and depth."""
    return echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=n, beam=beam, max_depth=depth
    )


def default(s: Setting):
    yield tree(*DEFAULT)


def eagle(s: Setting):
    yield from itertools.starmap(tree, SHAPES)


def ddd(s: Setting):
    for n, log_tau in ((8, -1.0), (16, -1.0), (16, -2.0), (32, -2.0)):
        yield echo.ElasticBudgetScheduler(
            echo.PerRequest(n, s.beam), echo.BeamMassGate((3, 5, 7), log_tau, s.beam), None, s.depth
        )


def two_level(s: Setting, gate: echo.gating.Gate) -> Iterator[echo.ElasticBudgetScheduler]:
    for beam, k_max, depth in itertools.product(
        (1, 2, 3), sorted({s.k_max, 3 * s.batch}), (3, s.depth)
    ):
        yield echo.ElasticBudgetScheduler(echo.TwoLevel(beam, 8), gate, k_max, depth)


def paper(s: Setting):
    yield from two_level(s, echo.SparseGate(s.calibration))


def one_threshold(calibration: echo.Calibration) -> echo.SparseGate:
    """The mean threshold at all sweet spots."""
    return echo.SparseGate.fixed(
        float(np.mean([d.threshold for d in calibration.depths if d.gate])), calibration.gate_depths
    )


def throughput_gate(
    log: echo.WarmupLog, cost: echo.CostModel, batch: int, depth: int, beam: int
) -> echo.SparseGate:
    """Gates whose thresholds maximise tokens a second on the ``log``, at that ``beam``."""
    return echo.SparseGate(
        echo.calibrate(
            log, max_depth=depth, thresholds="throughput", cost=cost, batch=batch, beam=beam
        )
    )


def throughput_gates(s: Setting):
    """ECHO's rule behind :func:`throughput_gate`; wider, or with tokens for half a step more."""
    assert s.log is not None
    for depth, (beam, extra) in itertools.product((3, s.depth), ((1, 8), (3, 8), (s.beam, 60))):
        gate = throughput_gate(s.log, s.cost, s.batch, depth, beam)
        for k_max in sorted({s.k_max, max(2 * s.batch, s.cost.tokens_within(1.5))}):
            yield echo.ElasticBudgetScheduler(echo.TwoLevel(beam, extra), gate, k_max, depth)


def top_k(s: Setting):
    budgets = sorted({s.k_max, *(n * s.batch for n in (2, 4, 12))})
    for k_max, depth, beam in itertools.product(budgets, (3, s.depth), (2, s.beam)):
        yield echo.ElasticBudgetScheduler(echo.GlobalRank(beam, s.calibration), None, k_max, depth)


def throughput_optimal(s: Setting):
    yield echo.ElasticBudgetScheduler.throughput_optimal(s.calibration, s.cost, beam=s.beam)


def trimmed(s: Setting):
    """One read a step: the host sees what was drafted before it launches the pass."""
    yield from (replace(scheduler, trims=True) for scheduler in throughput_optimal(s))


@dataclass(frozen=True)
class Known(echo.ElasticBudgetScheduler):
    """A bound: everything is drafted, for nothing, and the rows that pay are launched.

    No policy of these drafts gets further that knows of each node what its calibrated probability
    tells, and nothing of the future.
    """

    def choose_tier(self, history, req_indices, num_other_tokens=0):
        tier = super().choose_tier(history, req_indices, num_other_tokens)
        rows = len(req_indices) * self.max_verify_tokens_per_req
        return replace(tier, depth=self.max_depth, num_verify_tokens=rows, beam=self.rule.beam)


def known(s: Setting) -> Known:
    """The bound, at the cost of ``s`` without drafting."""
    free = replace(s.cost, draft_layer=0.0, draft_token=0.0)
    return Known(echo.GlobalRank(s.beam, s.calibration), None, free, s.depth, trims=True)


@dataclass(frozen=True)
class Grove(echo.GlobalRank):
    """A size of tree for each request by a measured curve, after it was drafted: as SpecGrove does.

    Each request's best nodes make nested trees of ``SIZES`` nodes, worth the draft's probability
    that they cover. Chosen are the sizes that maximise (B + covered) / T(rows). Read from the
    description and the allocators of github.com/ink-polymer/specgrove (its code has no licence:
    nothing of it is here), whose drafter has one layer and whose exact allocation by dynamic
    programming is the greedy one here: what a larger tree adds falls with its size. The host
    decides after drafting, so exactly the chosen rows are launched; the wait is not charged.
    """

    SIZES: ClassVar[tuple[int, ...]] = (0, 1, 2, 4, 8, 16, 32, 60)
    curve: echo.CostModel | None = None

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        value = self.acceptance_probability(tree).masked_fill(tree.committed, 0.0)
        best, order = value.sort(dim=1, descending=True, stable=True)
        covered = F.pad(best.cumsum(dim=1), (1, 0))
        sizes = torch.tensor([n for n in self.SIZES if n < covered.shape[1]])
        added, rows = covered[:, sizes].diff(dim=1), sizes.diff().expand(len(value), -1)
        queue = (added / rows).flatten().argsort(descending=True, stable=True)
        total = F.pad(rows.flatten()[queue].cumsum(0), (1, 0))
        gain = F.pad(added.flatten()[queue].double().cumsum(0), (1, 0))
        batch = len(value)
        seconds = torch.from_numpy(self.curve(total.numpy() + batch, num_reqs=batch))
        rate = (batch + gain) / seconds
        rate[total > num_remaining] = 0
        taken = torch.zeros(added.numel(), dtype=torch.bool)
        taken[queue[: int(rate.argmax())]] = True
        count = torch.minimum((taken.view_as(rows) * rows).sum(dim=1), limits)
        inside = (torch.arange(value.shape[1]) < count[:, None]) & (best > 0)
        return torch.zeros_like(inside).scatter(1, order, inside)


def grove(s: Setting):
    for beam, depth in ((1, 1), (2, 2), (3, 3), (s.beam, 5), (s.beam, s.depth)):
        yield echo.ElasticBudgetScheduler(Grove(beam, curve=s.cost), None, 60 * s.batch, depth)


POLICIES: dict[str, Policy] = {
    "EAGLE, shipped default": default,
    "EAGLE tree": eagle,
    "DDD": ddd,
    "ECHO (paper)": paper,
    "ECHO, throughput-optimal gates": throughput_gates,
    "global top-K": top_k,
    "SpecGrove": grove,
    "throughput-optimal tree": throughput_optimal,
    "throughput-optimal, trimmed": trimmed,
}
"""In the order of the table; the oracle is :func:`oracle_trace` under any global ranking."""

BASELINES = tuple(name for name in POLICIES if not name.startswith("throughput"))
"""What throughput-optimal is judged against, each tuned."""


def chain_trace(trace: Trace) -> Trace:
    """The trace as a drafter of chains has it: the first choice after each node, and no other."""
    best = trace.log_prob.argmax(axis=3)[..., None]
    first = np.arange(trace.token.shape[3]) == best
    return replace(trace, log_prob=np.where(first, trace.log_prob, np.float16(-np.inf)))


def oracle_trace(trace: Trace) -> Trace:
    """The trace as an oracle drafts it: the target's next token if it was drafted, no other."""
    following = trace.following[:, : trace.depth]
    right = (trace.token == following[:, :, None, None]) & np.isfinite(trace.log_prob)
    return replace(trace, log_prob=np.where(right, np.float16(0), np.float16(-np.inf)))
