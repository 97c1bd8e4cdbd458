"""The steps of a replay, kept so that any cost model can charge them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import echo
from echo.testing import Record, Trace, replay

WARM = 8
"""First steps of a replay that are left out of its figures: all texts begin at once there."""
FREE = echo.CostModel((1,), (1.0,))
"""Charges all steps alike: for replays of which the steps are asked, not the seconds."""


@dataclass(frozen=True)
class Steps:
    """What a replay's steps emitted, launched and drafted.

    Attributes:
        tokens: int64 [steps], emitted by the batch.
        rows: int64 [steps], of the target's forward pass.
        layers: int64 [steps], drafted.
        unread: int64 [steps], tokens that the drafter read up on after steps without a draft.
        requests: of the batch.
        width: nodes of a layer that each drafts on.
    """

    tokens: np.ndarray
    rows: np.ndarray
    layers: np.ndarray
    unread: np.ndarray
    requests: int
    width: int

    def seconds(self, cost: echo.CostModel) -> np.ndarray:
        """Of each step: the pass, the layers, and what the drafter reads up on after steps without a draft."""
        reading = np.array([cost.catch_up(tokens) for tokens in self.unread.tolist()])
        return np.asarray(cost(self.rows, requests=self.requests) + cost.draft(self.layers, self.requests, self.width) + reading)

    def rate(self, cost: echo.CostModel) -> float:
        """Tokens a second."""
        return float(self.tokens.sum() / self.seconds(cost).sum())

    def ratio(self, cost: echo.CostModel) -> float:
        """Throughput over plain decoding."""
        return self.rate(cost) / plain(cost, self.requests)

    def interval(self, cost: echo.CostModel) -> tuple[float, float]:
        """95% bootstrap interval of :meth:`ratio` over blocks of up to ten steps."""
        block = max(1, min(10, len(self.tokens) // 4))
        count = len(self.tokens) // block
        tokens, seconds = (x[: count * block].reshape(count, block).sum(1) for x in (self.tokens, self.seconds(cost)))
        pick = np.random.default_rng(0).integers(0, count, (400, count))
        low, high = np.percentile(tokens[pick].sum(1) / seconds[pick].sum(1), [2.5, 97.5]) / plain(cost, self.requests)
        return float(low), float(high)


def ratio_interval(mine: np.ndarray, theirs: np.ndarray, block: int = 10) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of two runs' sums over their steps, by blocks."""
    random = np.random.default_rng(0)
    sums = []
    for values in (mine, theirs):
        blocks = values[: len(values) // block * block].reshape(-1, block).sum(1)
        sums.append(blocks[random.integers(0, len(blocks), (400, len(blocks)))].mean(1))
    low, high = np.percentile(sums[0] / sums[1], [2.5, 97.5])
    return float(low), float(high)


def plain(cost: echo.CostModel, requests: int) -> float:
    """Tokens a second of plain decoding."""
    return requests / cost(requests, requests=requests)


def run(
    trace: Trace, scheduler: echo.ElasticBudgetScheduler, cost: echo.CostModel, batch: int, steps: int, *, exact: bool = False, **options
) -> Steps:
    """Replays texts in random order; ``exact`` keeps real rows and layers only (the oracle's); ``options`` are replay's."""
    seen: list[tuple[int, int, int, int]] = []
    more = options.pop("observe", None)

    def observe(record: Record) -> None:
        launched = (int(record.packed.indptr[-1]), record.tree.depth) if exact else (record.forecast.rows, record.forecast.depth)
        seen.append((int(record.emitted.sum()), *launched, record.unread))
        if more is not None:
            more(record)

    order = np.random.default_rng(1).permutation(len(trace.kind))
    report = replay(trace, scheduler, cost, batch=batch, steps=steps + WARM, order=order, observe=observe, **options)
    assert report.misses == 0 or exact, f"{report.misses} nodes without a record: the trace is too narrow for {scheduler}"
    return Steps(*np.array(seen[WARM:]).T, batch, scheduler.rule.width)
