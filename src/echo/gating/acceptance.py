"""Which drafts the target accepts, by depth and budget, counted on a log or by an engine.

A request-step is one request in one step. D depths; B requests decoded together; n budgets, in
draft tokens of the whole batch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.calibration import Calibration
from echo.gating.logs import WarmupLog
from echo.gating.statistics import predicted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
GRID = 24
"""Budgets tried for a number of requests, evenly spaced in the logarithm."""
GROUPS = 64
"""Minimum number of batches of log steps that a budget is tried on."""
BLOCKS = 400
"""Blocks of consecutive steps that the bootstrap draws: steps of one answer are not independent."""
Z = 1.96
"""Standard deviations of a 95% interval."""
HISTOGRAMS = "spec_accept_histogram", "spec_correct_drafts_histogram"
VLLM = "num_drafts", "num_accepted_tokens_per_pos"
LINE = re.compile(
    r"Accepted: (\d+) tokens, Drafted: (\d+) tokens, Per-position acceptance rate: ([\d., ]*\d)"
)
METRIC = re.compile(
    r"^vllm:spec_decode_(num_drafts|num_draft_tokens|num_accepted_tokens_per_pos)(?:_total)?"
    r"(?:\{(.*)\})? (\S+)$",
    re.MULTILINE,
)
KINDS = (
    "a WarmupLog; vLLM's num_drafts and num_accepted_tokens_per_pos, its metrics page or its log;"
    " or SGLang's spec_accept_histogram, of all requests or of each"
)


def wilson(accepted: Floats, steps: Floats) -> tuple[Floats, Floats, Floats]:
    """Return rates and 95% Wilson intervals, float64 [D] each; NaN for no steps."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = accepted / steps
        z = Z**2 / steps
        middle = rate + z / 2
        half = np.sqrt(z * (rate * (1 - rate) + z / 4))
        return rate, (middle - half) / (1 + z), (middle + half) / (1 + z)


class Outcomes(NamedTuple):
    """Accepted drafts of B requests, by depth and budget.

    Attributes:
        budgets: int64 [D, n].
        accepted: float64 [D, n], mean accepted drafts per request and step.
        resample: (depth, budget) -> float64 [resamples], the same for resampled logs.
    """

    budgets: Ints
    accepted: Floats
    resample: Callable[[int, int], Floats]


class LoggedDrafts:
    """The drafts of a log, one row per request-step, likeliest first.

    Attributes:
        steps, max_depth: number of request-steps; D.
        drafted, accepted: float64 [D], number of tokens by depth.
        num_draft_tokens: at all depths.
        mean_rate: mean of the steps' acceptance rates.
    """

    unit = "steps"

    def __init__(
        self,
        log: WarmupLog,
        calibration: Calibration | None,
        limit: int,
        random: np.random.Generator,
        resamples: int,
    ) -> None:
        if not len(log):
            raise EchoError("seen: expected rows of a warm-up log, got none")
        if (log.weight != 1).any():
            raise EchoError("seen: expected a log of steps drafted without a gate, got weights")
        step, place, size = np.unique(log.step, return_inverse=True, return_counts=True)
        if len(step) == len(log) and (log.depth > 1).any():
            raise EchoError("seen: expected rows joined by step ids, got one step for every row")
        f = log.confidence.astype(np.float64)
        if calibration is not None:
            f = predicted(calibration.reliability_table(), log.confidence, log.depth)
        order = np.lexsort((log.depth, -f, place))
        where = place[order], np.arange(len(log)) - np.repeat(size.cumsum() - size, size)

        def spread(values: NDArray[Any], none: Any) -> NDArray[Any]:
            """Pad to [request-steps, drafts of the largest step, at most ``limit``]."""
            wide = np.full((len(step), int(size.max())), none, values.dtype)
            wide[where] = values[order]
            return wide[:, :limit]

        self._f = spread(f, -1.0)
        self._good = spread(log.accepted, False)
        self._depth = spread(log.depth, 1)
        self.steps = len(step)
        self.max_depth = int(log.depth.max())
        self.drafted, self.accepted = (
            np.bincount(log.depth, weight, self.max_depth + 1)[1:].astype(np.float64)
            for weight in (None, log.accepted)
        )
        self.num_draft_tokens = float(len(log))
        self.mean_rate = float((np.bincount(place, log.accepted) / size).mean())
        self._random = random
        self._resamples = resamples

    def outcomes(self, b: int) -> Outcomes:
        """Verify the likeliest drafts of each of many batches of random steps."""
        turns = -(-max(GROUPS * b, self.steps) // self.steps)
        drawn = np.concatenate([self._random.permutation(self.steps) for _ in range(turns)])
        together = drawn[: len(drawn) // b * b].reshape(-1, b)
        most = b * self._f.shape[1]
        budgets = np.unique(np.geomspace(1, most, GRID).round().astype(np.int64))
        found = []
        for depth in range(1, self.max_depth + 1):
            rank = self._ranks(depth, together)
            total = np.bincount(rank[rank < most], minlength=most).cumsum()
            found.append(total[budgets - 1] / together.size)
        wide = np.broadcast_to(budgets, (self.max_depth, len(budgets)))
        return Outcomes(wide, np.stack(found), lambda d, n: self._resample(d, n, together))

    def _ranks(self, depth: int, together: Ints) -> Ints:
        """Rank accepted drafts among their batch's drafts down to ``depth``, [groups, b, drafts].

        Drafts that are deeper or not accepted rank after all others.
        """
        inside = self._depth <= depth
        f = np.where(inside, self._f, -1.0)[together]
        order = np.argsort(-f.reshape(len(together), -1), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
        good = (self._good & inside)[together]
        return np.where(good, rank.reshape(f.shape), order.shape[1])

    def _resample(self, depth: int, budget: int, together: Ints) -> Floats:
        """Weight blocks of consecutive steps at random: the Bayesian bootstrap.

        As a prior (Jeffreys'), half a step accepts all it can and half a step accepts nothing, so
        that a few identical steps are not certain.
        """
        per = (self._ranks(depth, together) < budget).sum(axis=2)
        uses = np.bincount(together.ravel(), minlength=self.steps)
        mean = np.bincount(together.ravel(), per.ravel(), self.steps)
        blocks = min(BLOCKS, self.steps)
        block = np.arange(self.steps) * blocks // self.steps
        each = together.size / self.steps
        most = min(depth, budget / together.shape[1])
        sums = np.append(np.bincount(block, mean, blocks), [each * most, 0.0])
        counts = np.append(np.bincount(block, uses, blocks), [each, each])
        shape = np.append(np.ones(blocks), [0.5, 0.5])
        weights = self._random.standard_gamma(shape, (self._resamples, blocks + 2))
        result: Floats = (weights @ sums) / (weights @ counts)
        return result


class CountedChains:
    """An engine's counters of chains; if chains differ in length, rates by depth are too low.

    Attributes as :class:`LoggedDrafts`; ``mean_rate`` is over requests or intervals, as ``unit``
    says, or NaN.
    """

    def __init__(
        self, seen: object, limit: int, random: np.random.Generator, resamples: int
    ) -> None:
        self.unit, parts = _parts(seen)
        depth = max(len(accepted) for _, accepted, _ in parts)
        if not depth or not sum(steps for steps, *_ in parts):
            raise EchoError("seen: expected counters of steps that drafted, got none")
        for steps, accepted, _ in parts:
            if (np.diff(accepted, prepend=steps) > 0).any():
                raise EchoError(f"{VLLM[1]}: expected counts that never rise, got {accepted}")
        each = np.stack([np.pad(accepted, (0, depth - len(accepted))) for _, accepted, _ in parts])
        self.accepted = each.sum(axis=0)
        self.max_depth = depth
        self.steps = sum(steps for steps, *_ in parts)
        self.drafted = np.full(depth, float(self.steps))
        tokens = np.array([drafted or steps * depth for steps, _, drafted in parts])
        self.num_draft_tokens = float(tokens.sum())
        rates = each.sum(axis=1) / tokens
        self.mean_rate = float(rates.mean()) if len(parts) > 1 else math.nan
        lost = -np.diff(self.accepted, prepend=self.steps)
        rates = random.beta(self.accepted + 0.5, lost + 0.5, (resamples, depth))  # Jeffreys' prior
        self._limit = limit
        self._drawn = rates.cumprod(axis=1).cumsum(axis=1).T

    def outcomes(self, b: int) -> Outcomes:
        """Verify every request's chain down to each depth."""
        budgets = b * np.minimum(np.arange(1, self.max_depth + 1), self._limit)[:, None]
        mean = self.accepted.cumsum()[:, None] / self.steps
        return Outcomes(budgets, mean, lambda depth, _: self._drawn[depth - 1])


Part = tuple[int, Floats, float | None]
"""Request-steps, how many of them accepted each position, and draft tokens if known."""


def _parts(seen: object) -> tuple[str, list[Part]]:
    if isinstance(seen, str):
        totals: Counter[str] = Counter()
        with checks.reading(f"seen: expected {KINDS}"):
            if lines := LINE.findall(seen):
                return "intervals", [_interval(*line) for line in lines]
            for name, labels, value in METRIC.findall(seen):
                position = re.search(r'position="(\d+)"', labels)
                totals[f"{name} {position[1]}" if position else name] += round(float(value))
        count = sum(" " in name for name in totals)
        positions = [totals[f"{VLLM[1]} {i}"] for i in range(count)]
        seen = {**totals, VLLM[1]: positions} if totals else seen
    each = [seen] if isinstance(seen, Mapping) else seen
    if isinstance(each, Sequence) and each and not isinstance(each, str):
        parts = [_counters(part) for part in each]
        return "requests", [part for part in parts if part[0]] or parts
    raise EchoError(f"seen: expected {KINDS}, got {type(seen).__name__}")


def _interval(accepted: str, drafted: str, rates: str) -> Part:
    """Parse a line of vLLM's log. The number of steps is not in it, but implied by its rates."""
    each = np.array([float(rate) for rate in rates.split(",")])
    steps = int(accepted) / each.sum() if each.sum() else int(drafted) / len(each)
    return max(1, round(steps)), (each * steps).round(), float(drafted)


def _counters(counters: Any) -> Part:
    """Parse SGLang's or vLLM's counters, or a request's ``meta_info`` that has them."""
    if isinstance(counters, Mapping):
        counters = counters.get("meta_info", counters)
    if not isinstance(counters, Mapping):
        raise EchoError(f"seen: expected {KINDS}, got {type(counters).__name__}")
    for name in HISTOGRAMS:
        if name in counters:
            histogram = np.array(checks.ints(name, counters[name], 0), dtype=np.float64)
            return int(histogram.sum()), histogram[::-1].cumsum()[::-1][1:], None
    if not all(name in counters for name in VLLM):
        raise EchoError(f"seen: expected {KINDS}, got {sorted(map(str, counters))}")
    drafts = checks.integer(VLLM[0], counters[VLLM[0]], 1)
    accepted = checks.ints(VLLM[1], counters[VLLM[1]], 0, drafts)
    if not accepted:
        raise EchoError(f"{VLLM[1]}: expected a count for each position, got none")
    tokens = counters.get("num_draft_tokens")
    most = drafts * len(accepted)
    known = tokens if tokens is None else checks.integer("num_draft_tokens", tokens, 1, most)
    return drafts, np.array(accepted, dtype=np.float64), known
