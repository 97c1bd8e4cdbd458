"""From a draft's path probability to the probability that the target accepts the path: monotone maps, and their look-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.histograms import UNIT, WEIGHT, middle_scores
from echo.gating.logs import WarmupLog
from echo.kernels.codes import BINS_PER_NAT, ONE, TABLE_BINS

Knots = tuple[tuple[float, float], ...]

DRAFT: Knots = tuple((score, math.exp(score)) for score in (i / 4 for i in range(-66, 1)))
"""The map that takes the draft at its word."""
DRAFT_ROWS = 2.0
"""Rows that the draft's own probability counts for in each block of a map."""


def fit(mass: NDArray[np.int64], prior: Knots = DRAFT, strength: float = DRAFT_ROWS) -> Knots:
    """Isotonic regression of acceptance on the path log-probability: (mean log-probability, probability) of each block.

    Each block's probability is shrunk toward the prior, so that none is certain and a block of few rows is near what the draft says.

    Args:
        mass: int64 [3, 2, 3074], one depth of :class:`ConfidenceHistograms`, all ranks together.
        prior: the map to shrink toward.
        strength: rows that it counts for in each block.

    Returns:
        Knots, both columns rising; the prior, without rows.
    """
    from scipy.optimize import isotonic_regression

    filled = np.flatnonzero(mass[WEIGHT].any(axis=0))
    if not len(filled):
        return prior
    sums = mass[WEIGHT][:, filled] / UNIT
    total = sums.sum(axis=0)
    regression = isotonic_regression(sums[1] / total, weights=total)
    starts = np.asarray(regression.blocks[:-1])
    weight = np.add.reduceat(total, starts)
    score = np.add.reduceat(total * middle_scores()[filled], starts) / weight
    chance = (
        np.add.reduceat(sums[1], starts) + strength * np.interp(score, *np.array(prior).T)
    ) / (weight + strength)
    chance = np.minimum(np.maximum.accumulate(chance), 1.0)
    return tuple((float(s), float(p)) for s, p in zip(score, chance, strict=True))


def table(maps: Sequence[Knots]) -> NDArray[np.int32]:
    """The maps of depths 1, 2, ... as 24-bit fixed point at the centres of the bins: int32 [depths + 1, 512]; row 0 is 1.0."""
    centre = -(np.arange(TABLE_BINS) + 0.5) / BINS_PER_NAT
    result = np.full((len(maps) + 1, TABLE_BINS), ONE, dtype=np.int32)
    for row, knots in zip(result[1:], maps, strict=True):
        score, chance = np.array(knots).T
        row[:] = np.clip(np.rint(np.interp(centre, score, chance) * ONE), 1, ONE)
    return result


def on_device(
    tables: dict[torch.device, Tensor], device: torch.device, make: Callable[[], NDArray[np.int32]]
) -> Tensor:
    """The table that ``make`` gives, on ``device``: made and copied at the first call there, kept in ``tables``."""
    if device not in tables:
        tables[device] = torch.from_numpy(make()).to(device)
    return tables[device]


def look_up(
    table: Tensor, score: Tensor, depth: Tensor | int, parent: Tensor | None = None
) -> Tensor:
    """f(v) = min(m_d(S(v)), f(parent)): a multiplication by 32, a truncation and a gather, the same bits on every device.

    Args:
        table: int32 [depths + 1, 512] (:meth:`Calibration.reliability_table`).
        score: float32 [...], path log-probability; one that is not finite counts as the last bin.
        depth: ints of the same shape, or one; deeper than the table counts as its deepest.
        parent: int32 of the same shape, f of each node's parent.

    Returns:
        int32 [...], 24-bit fixed point.

    Raises:
        EchoError: a table of another shape or dtype.
    """
    checks.tensor("table", table, ["depths", TABLE_BINS], torch.int32, score.device)
    column = (
        (torch.where(torch.isfinite(score), score, -1e6) * -BINS_PER_NAT)
        .long()
        .clamp(0, TABLE_BINS - 1)
    )
    deepest = table.shape[0] - 1
    row = min(depth, deepest) if isinstance(depth, int) else depth.long().clamp(0, deepest)
    found = table[row, column]
    return found if parent is None else torch.minimum(found, parent)


@dataclass(frozen=True)
class CalibrationError:
    """How far a probability is from the rate of acceptance on held-out rows, before and after calibration.

    Each entry is (value, low, high): the value, and its 95% interval from a bootstrap over steps.

    Attributes:
        before, after: expected calibration error over equal-mass bins (Naeini 2015) of the draft's probability and of the
            calibrated one. Noise alone makes it about sqrt(bins / rows) / 2, so compare, and do not wait for 0.
        brier_before, brier_after: mean squared error, a proper score.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    brier_before: tuple[float, float, float]
    brier_after: tuple[float, float, float]


def calibration_error(
    table: NDArray[np.int32], log: WarmupLog, *, bins: int = 20, resamples: int = 200, seed: int = 0
) -> CalibrationError:
    """Calibration error of the draft's probability and of the table's, on rows that the table was not made from.

    The log does not hold parents, so the minimum with f(parent) is left out.

    Args:
        table: int32 [depths + 1, 512].
        log: held-out rows of all ranks; those deeper than the table do not count.
        bins: equal-mass bins.
        resamples: of the bootstrap; whole steps are drawn, since rows of one step are not independent.
        seed: of the bootstrap.

    Raises:
        EchoError: no row to judge, or an argument out of range.
    """
    if ((table < 0) | (table > ONE)).any():
        raise EchoError(
            f"table: expected 24-bit fixed point, from 0 to {ONE}, got {table.min()} to {table.max()}"
        )
    bins = checks.integer("bins", bins, 2)
    resamples = checks.integer("resamples", resamples, 20)
    deepest = table.shape[0] - 1
    keep = (log.depth <= deepest) & (log.weight > 0)
    if not keep.any():
        raise EchoError(f"log: expected rows of depth 1 to {deepest}, got none")
    with np.errstate(divide="ignore"):
        score = torch.from_numpy(np.log(log.confidence[keep]))
    after = look_up(torch.from_numpy(table), score, torch.from_numpy(log.depth[keep])).numpy() / ONE
    before = log.confidence[keep].astype(np.float64)
    label, weight = log.accepted[keep].astype(np.float64), log.weight[keep].astype(np.float64)
    step, place = np.unique(log.step[keep], return_inverse=True)
    random = np.random.default_rng(seed)
    groups = [_equal_mass(p, bins) for p in (before, after)]
    draws = []
    for turn in range(resamples + 1):
        w = weight if turn == 0 else weight * random.poisson(1.0, len(step))[place]
        if w.sum() > 0:
            errors = [
                _ece(p, label, w, g, bins) for p, g in zip((before, after), groups, strict=True)
            ]
            draws.append(
                errors + [float((w * (p - label) ** 2).sum() / w.sum()) for p in (before, after)]
            )
    low, high = np.percentile(draws[1:], [2.5, 97.5], axis=0)
    entries = [(draws[0][i], float(low[i]), float(high[i])) for i in range(4)]
    return CalibrationError(*entries)


def _equal_mass(chance: NDArray[Any], bins: int) -> NDArray[np.int64]:
    edges = np.quantile(chance, np.arange(1, bins) / bins)
    return np.searchsorted(edges, chance, side="right")


def _ece(
    chance: NDArray[Any],
    label: NDArray[Any],
    weight: NDArray[Any],
    group: NDArray[np.int64],
    bins: int,
) -> float:
    gap = np.bincount(group, weights=weight * (label - chance), minlength=bins)
    return float(np.abs(gap).sum() / weight.sum())
