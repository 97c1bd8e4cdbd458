"""From a step that a policy plans wrongly to the smallest and roundest one that it still plans wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from echo.testing.scenarios import Scenario

ROUND = (0.5, 0.9)
"""Shares that are easily read."""


def shrink(step: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Takes away requests, layers, candidates, rows and weights, and rounds scores, for as long as it still fails."""
    before = None
    while before is not step:
        before = step
        while (smaller := next(filter(fails, _smaller(step)), None)) is not None:
            step = smaller
        for entry in range(step.log_probs.numel()):
            step = next(filter(fails, _rounder(step, entry)), step)
    return step


def _smaller(step: Scenario) -> Iterator[Scenario]:
    """Steps with one thing less, those that take most away first."""
    table, batch = step.log_probs, step.batch
    for request in range(batch) if batch > 1 else ():
        taken = step.take([b for b in range(batch) if b != request])
        yield taken if step.rows is None else replace(taken, rows=step.rows - 1)
        if step.rows is not None:
            yield taken
    for less in (table[:-1], table[..., :-1] if table.shape[2] > 1 else table[:0]):
        if table.shape[0] > 1 or less.shape[0]:
            yield replace(step, log_probs=less)
    if step.rows is not None and step.rows > batch:
        yield replace(step, rows=step.rows - 1)
    if step.weights is not None:
        yield replace(step, weights=None)
    for name, plain in (("capacity", 12), ("live", True), ("root_tokens", 0)):
        value = getattr(step, name)
        for request in (value != plain).nonzero()[:, 0].tolist():
            simpler = value.clone()
            simpler[request] = plain
            yield replace(step, **{name: simpler})


def _rounder(step: Scenario, entry: int) -> Iterator[Scenario]:
    """Steps whose score at that place is rounder."""
    now = float(step.log_probs.flatten()[entry].exp())
    for share in ROUND:
        score = torch.tensor(share, dtype=torch.float32).log()
        if now == float(score.exp()):
            return
        table = step.log_probs.clone()
        table.view(-1)[entry] = score
        yield replace(step, log_probs=table)
