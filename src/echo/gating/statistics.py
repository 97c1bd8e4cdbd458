"""How confidence predicts acceptance: separability (AUC), reliability maps, calibration error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.histograms import LOWER, MIDDLE, SQUARE, UNIT, UPPER, WEIGHT
from echo.gating.logs import WarmupLog, check, check_weights, labels
from echo.kernels.codes import BINS_PER_NAT, ONE, TABLE_BINS

Knots = tuple[tuple[float, float], ...]
Estimate = tuple[float, float, float]

Z95 = 1.959963984540054
"""97.5% point of the normal distribution."""
DRAFT: Knots = tuple((score, math.exp(score)) for score in (i / 4 for i in range(-66, 1)))
"""The reliability map of a draft with perfectly calibrated probabilities."""
DRAFT_ROWS = 2.0
"""Pseudo-rows at the draft's own probability in each block of a map."""


@dataclass(frozen=True)
class Separability:
    """How well confidence separates accepted from rejected rows.

    Attributes:
        auc: P(confidence of an accepted row > that of a rejected row), ties half; NaN without both.
        low, high: 95% interval of the AUC (DeLong 1988, squared weights, logit scale). If all pairs
            agree it ends at 0.025^(1/k), with k rows of the rarer kind (k disjoint pairs agree with
            probability AUC^k). Rows count as independent: too narrow for few, long requests.
        threshold: confidence that maximizes Youden's J = P(c > t | accepted) - P(c > t | rejected);
            a row *passes* above it. Midway between two confidences of the log; 0 if no J > 0.
        youden: J at the threshold.
        error: bound on the difference of ``auc`` from that of raw rows: half the pairs of one bin.
    """

    auc: float
    low: float
    high: float
    threshold: float
    youden: float
    error: float = 0.0


def separability(
    confidence: ArrayLike, accepted: ArrayLike, weight: ArrayLike | None = None
) -> Separability:
    """Compute exact separability of raw rows; O(n log n). The AUC is that of ``roc_auc_score``.

    Args:
        confidence: finite numbers [n].
        accepted: bools (or 0/1) [n].
        weight: floats [n], at least 0. Defaults to 1.

    Raises:
        EchoError: columns of different lengths, or the first row whose value is out of range.

    Example:
        >>> separability([0.9, 0.8, 0.3], [True, False, False]).auc
        1.0
    """
    score = np.atleast_1d(np.asarray(confidence))
    label = labels(accepted)
    w = np.atleast_1d(np.ones(len(score)) if weight is None else np.asarray(weight, np.float64))
    if score.ndim != 1 or not score.shape == label.shape == w.shape:
        got = f"{score.size}, {label.size}, {w.size}"
        raise EchoError(f"confidence, accepted, weight: expected one length, got {got}")
    if score.dtype.kind not in "biuf":
        raise EchoError(f"confidence: expected numbers, got {score.dtype}")
    check(np.isfinite(score), "confidence", "that are finite", score)
    check_weights(w)
    if weight is None and score.dtype == np.float32 and score.min(initial=0.0) >= 0:
        sums, values = _count(score, label)
        return _separate(sums, sums, values, values)
    values, place = np.unique(score.astype(np.float64), return_inverse=True)

    def total(of: NDArray[Any]) -> NDArray[Any]:
        return np.stack([np.bincount(place, of * kind, len(values)) for kind in (~label, label)])

    return _separate(total(w), total(w * w), values, values)


def _count(
    score: NDArray[np.float32], label: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Count rejected and accepted rows [2, k] at k rising confidences.

    Bits of non-negative floats rise with their value, so one integer sort, with the label in the
    lowest bit, orders both.
    """
    key = (score + np.float32(0.0)).view(np.uint32)  # the addition makes -0.0 a 0.0
    key <<= np.uint32(1)
    key |= label
    key.sort()
    last = np.flatnonzero((key[1:] ^ key[:-1]) > 1)  # of each run of equal confidence
    last = np.append(last, np.arange(len(key))[-1:])
    values = (key[last] >> np.uint32(1)).view(np.float32)
    key &= np.uint32(1)
    sums = np.empty((2, len(last)))
    sums[1] = np.diff(np.cumsum(key, dtype=np.int64)[last], prepend=0)
    sums[0] = np.diff(last, prepend=-1)
    sums[0] -= sums[1]
    return sums, values


def from_histogram(mass: NDArray[np.int64]) -> Separability:
    """Separability of one depth's histogram, int64 [3, 2, 3074], up to its ``error``."""
    filled = np.flatnonzero(mass[WEIGHT].any(axis=0))
    sums = mass[WEIGHT][:, filled] / UNIT
    squares = mass[SQUARE][:, filled] / UNIT
    bottom = LOWER[filled].astype(np.float64)
    top = UPPER[filled].astype(np.float64)
    result = _separate(sums, squares, bottom, top)
    with np.errstate(invalid="ignore"):
        error = float((sums[0] * sums[1]).sum() / sums.sum(axis=1).prod() / 2)
    return result if math.isnan(result.auc) else replace(result, error=error)


def _separate(
    sums: NDArray[Any], squares: NDArray[Any], bottom: NDArray[Any], top: NDArray[Any]
) -> Separability:
    """Compute it from rejected and accepted weight [2, k] of k rising confidence intervals."""
    totals = sums.sum(axis=1)
    if not (totals > 0).all():
        return Separability(float("nan"), 0.0, 1.0, 0.0, 0.0)
    below = np.cumsum(sums, axis=1)
    below /= totals[:, None]
    j = below[0] - below[1]
    below -= sums / (2 * totals[:, None])  # ties count half
    auc = float((sums[1] * below[0]).sum() / totals[1])
    effective = totals**2 / squares.sum(axis=1)
    accepted = _variance(below[0], squares[1], totals[1], effective[1], auc)
    rejected = _variance(below[1], squares[0], totals[0], effective[0], 1.0 - auc)
    low, high = _interval(auc, accepted + rejected, float(effective.min()))
    best = int(np.argmax(j))
    if j[best] <= 0 or best + 1 == len(j):
        return Separability(auc, low, high, 0.0, 0.0)
    threshold = (float(top[best]) + float(bottom[best + 1])) / 2
    return Separability(auc, low, high, threshold, float(j[best]))


def _variance(
    placement: NDArray[Any], square: NDArray[Any], total: float, effective: float, mean: float
) -> float:
    """Variance of a class's weighted mean placement value, with the factor n / (n - 1)."""
    n = max(effective, 2.0)
    return float((square * (placement - mean) ** 2).sum() / total**2 * n / (n - 1.0))


def _interval(auc: float, variance: float, rarer: float) -> tuple[float, float]:
    if auc <= 0.0 or auc >= 1.0:
        width = 1.0 - 0.025 ** (1.0 / max(rarer, 1.0))
        return (1.0 - width, 1.0) if auc >= 1.0 else (0.0, width)
    spread = Z95 * float(np.sqrt(variance))
    centre = np.log(auc / (1.0 - auc))
    width = spread / (auc * (1.0 - auc))
    low, high = 1.0 / (1.0 + np.exp(-(centre + np.array([-width, width]))))
    return float(low), float(high)


def fit(mass: NDArray[np.int64]) -> Knots:
    """Fit acceptance to path log-probability by isotonic regression; knots rise in both.

    ``mass`` int64 [3, 2, 3074], ranks summed. Each block is shrunk toward the draft's probability,
    so that no block is certain and few rows change little; without rows the map is ``DRAFT``.
    """
    from scipy.optimize import isotonic_regression

    filled = np.flatnonzero(mass[WEIGHT].any(axis=0))
    if not len(filled):
        return DRAFT
    sums = mass[WEIGHT][:, filled] / UNIT
    total = sums.sum(axis=0)
    regression = isotonic_regression(sums[1] / total, weights=total)
    starts = np.asarray(regression.blocks[:-1])
    weight = np.add.reduceat(total, starts)
    score = np.add.reduceat(total * MIDDLE[filled], starts) / weight
    prior = DRAFT_ROWS * np.interp(score, *np.array(DRAFT).T)
    chance = (np.add.reduceat(sums[1], starts) + prior) / (weight + DRAFT_ROWS)
    chance = np.minimum(np.maximum.accumulate(chance), 1.0)
    return tuple(zip(score.tolist(), chance.tolist(), strict=True))


def table(maps: Sequence[Knots]) -> NDArray[np.int32]:
    """Tabulate the maps in 24-bit fixed point: int32 [depths + 1, 512]; row 0 (the root) is 1.0."""
    centre = -(np.arange(TABLE_BINS) + 0.5) / BINS_PER_NAT
    result = np.full((len(maps) + 1, TABLE_BINS), ONE, dtype=np.int32)
    for row, knots in zip(result[1:], maps, strict=True):
        score, chance = np.array(knots).T
        row[:] = np.clip(np.rint(np.interp(centre, score, chance) * ONE), 1, ONE)
    return result


def on_device(
    tables: dict[torch.device, Tensor], device: torch.device, make: Callable[[], NDArray[np.int32]]
) -> Tensor:
    """Return the table of ``make`` on ``device``, copied there once and cached in ``tables``."""
    if device not in tables:
        tables[device] = torch.from_numpy(make()).to(device)
    return tables[device]


def look_up(
    table: Tensor, score: Tensor, depth: Tensor | int, parent: Tensor | None = None
) -> Tensor:
    """Look up f(v) = min(m_d(S(v)), f(parent)): a multiplication, a truncation and a gather.

    Returns the same bits on every device.

    Args:
        table: int32 [depths + 1, 512] (:meth:`Calibration.reliability_table`).
        score: float32 [...], path log-probability S; non-finite values read the last bin.
        depth: ints [...], or one; depths past the table read its deepest row.
        parent: int32 [...], f of each node's parent. Defaults to no minimum.

    Returns:
        int32 [...], 24-bit fixed point.

    Raises:
        EchoError: a table of another shape or dtype.

    Example:
        >>> table = torch.full((2, 512), 1 << 23, dtype=torch.int32)
        >>> (look_up(table, torch.tensor([-0.7, -2.0]), 1) / (1 << 24)).tolist()
        [0.5, 0.5]
    """
    checks.tensor("table", table, ["depths", TABLE_BINS], torch.int32, score.device)
    finite = torch.where(torch.isfinite(score), score, -1e6)
    column = (finite * -BINS_PER_NAT).long().clamp(0, TABLE_BINS - 1)
    deepest = table.shape[0] - 1
    row = min(depth, deepest) if isinstance(depth, int) else depth.long().clamp(0, deepest)
    found = table[row, column]
    return found if parent is None else torch.minimum(found, parent)


def predicted(
    table: NDArray[np.int32], confidence: NDArray[np.float32], depth: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Look up P(path accepted) of logged rows [n], without the minimum over parents."""
    with np.errstate(divide="ignore"):
        columns = table, np.log(confidence), depth
    found = look_up(*(torch.from_numpy(column) for column in columns))
    return np.asarray(found.numpy() / ONE, dtype=np.float64)


@dataclass(frozen=True)
class CalibrationError:
    """Error of a probability against acceptance on held-out rows, before and after calibration.

    Each attribute is (value, low, high), with a 95% interval from a bootstrap over steps.

    Attributes:
        before, after: expected calibration error over equal-mass bins (Naeini 2015) of the draft's
            and of the calibrated probability; noise alone gives about sqrt(bins / rows) / 2.
        brier_before, brier_after: Brier score, the mean squared error.
    """

    before: Estimate
    after: Estimate
    brier_before: Estimate
    brier_after: Estimate


def calibration_error(
    table: NDArray[np.int32], log: WarmupLog, *, bins: int = 20, resamples: int = 200, seed: int = 0
) -> CalibrationError:
    """Compute the calibration error of the draft's and the table's probability on held-out rows.

    A log has no parents, so the minimum with f(parent) is left out.

    Args:
        table: int32 [depths + 1, 512].
        log: held-out rows of all ranks; those deeper than the table are skipped.
        bins: equal-mass bins.
        resamples, seed: of the bootstrap, which draws whole steps: their rows are correlated.

    Raises:
        EchoError: no row at the table's depths, or an argument out of range.

    Example:
        >>> log = WarmupLog.from_arrays([1, 1], [0.5, 0.5], [1, 0])
        >>> calibration_error(np.full((2, 512), 1 << 23, np.int32), log).after[0]
        0.0
    """
    if ((table < 0) | (table > ONE)).any():
        got = f"{table.min()} to {table.max()}"
        raise EchoError(f"table: expected 24-bit fixed point, from 0 to {ONE}, got {got}")
    bins = checks.integer("bins", bins, 2)
    resamples = checks.integer("resamples", resamples, 20)
    deepest = table.shape[0] - 1
    keep = (log.depth <= deepest) & (log.weight > 0)
    if not keep.any():
        raise EchoError(f"log: expected rows of depth 1 to {deepest}, got none")
    after = predicted(table, log.confidence[keep], log.depth[keep])
    both = log.confidence[keep].astype(np.float64), after
    label = log.accepted[keep].astype(np.float64)
    weight = log.weight[keep].astype(np.float64)
    step, place = np.unique(log.step[keep], return_inverse=True)
    quantiles = np.arange(1, bins) / bins
    groups = [np.searchsorted(np.quantile(p, quantiles), p, side="right") for p in both]
    random = np.random.default_rng(seed)
    draws = []
    for turn in range(resamples + 1):
        w = weight if turn == 0 else weight * random.poisson(1.0, len(step))[place]
        if (total := w.sum()) > 0:
            pairs = zip(both, groups, strict=True)
            gaps = [np.abs(np.bincount(g, w * (label - p), bins)).sum() for p, g in pairs]
            squares = [(w * (p - label) ** 2).sum() for p in both]
            draws.append([float(error / total) for error in gaps + squares])
    low, high = np.percentile(draws[1:], [2.5, 97.5], axis=0)
    return CalibrationError(*zip(draws[0], low.tolist(), high.tolist(), strict=True))
