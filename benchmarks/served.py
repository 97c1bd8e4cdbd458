"""A real warm-up log out of a trace, and what a policy makes of each text: the tools of real_data.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import echo
from echo.testing import Record, Trace, replay
from replay import shapes, split

KNEE = shapes()["dense, knee at 256 rows"]
RESAMPLES = 400


def halves(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Texts 0, 2, 4, ... of each kind, and the others."""
    first, others = split(trace)
    return np.sort(first), others


@dataclass(frozen=True)
class Served:
    """Sums by text over a replay: tokens emitted, and steps and modelled seconds that it took part in (a share of each step)."""

    tokens: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray

    def __add__(self, other: Served) -> Served:
        return Served(self.tokens + other.tokens, self.steps + other.steps, self.seconds + other.seconds)

    def per(self, unit: str, weight: np.ndarray | None = None) -> float:
        """Tokens a step, or a second."""
        w = np.ones(len(self.tokens)) if weight is None else weight
        return float((w * self.tokens).sum() / (w * getattr(self, unit)).sum())


def serve(
    trace: Trace, texts: np.ndarray, scheduler: echo.ElasticBudgetScheduler, batch: int, steps: int, real_rows: bool = False
) -> Served:
    """Replays some texts in random order, again and again; ``real_rows`` charges the rows that the trees have, not those launched."""
    part = trace.texts(texts.tolist())
    found = Served(*np.zeros((3, len(trace.kind))))

    def observe(record: Record) -> None:
        who = texts[record.requests]
        rows = int(record.packed.indptr[-1]) if real_rows else record.forecast.rows
        seconds = float(KNEE(rows) + KNEE.draft(record.forecast.depth, batch, scheduler.rule.width))
        np.add.at(found.tokens, who, record.emitted)
        np.add.at(found.steps, who, 1)
        np.add.at(found.seconds, who, seconds / len(who))

    order = np.random.default_rng(1).permutation(len(texts))
    report = replay(part, scheduler, KNEE, batch=batch, steps=steps, order=order, observe=observe)
    assert report.misses == 0, f"{report.misses} nodes without a record"
    return found


def against(one: Served, base: Served, unit: str) -> dict[str, float]:
    """The change in tokens a step or second from ``base`` to ``one``, paired by text."""
    random, count = np.random.default_rng(0), len(one.tokens)
    chosen = np.flatnonzero((one.steps > 0) & (base.steps > 0))
    draws = [np.bincount(chosen, minlength=count)]
    draws += [np.bincount(random.choice(chosen, len(chosen)), minlength=count) for _ in range(RESAMPLES)]
    change = np.array([one.per(unit, w) / base.per(unit, w) - 1.0 for w in draws])
    low, high = np.percentile(change[1:], [2.5, 97.5])
    return {"change": float(change[0]), "low": float(low), "high": float(high)}
