"""How well a confidence tells accepted from rejected rows: AUC with its interval, and the Youden threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo._checks import EchoError
from echo.gating.histograms import SQUARE, UNIT, WEIGHT, lower_edges, upper_ends
from echo.gating.logs import check, check_weights, labels

Z95 = 1.959963984540054
"""97.5% point of the normal distribution."""


@dataclass(frozen=True)
class Separability:
    """Separation of accepted from rejected rows by their confidence.

    Attributes:
        auc: P(confidence of an accepted row > that of a rejected row), ties counted half; NaN without both kinds.
        low, high: 95% interval of the AUC: DeLong 1988 with squared weights, on the logit scale, so that it stays in [0, 1].
            Where all pairs agree its variance is 0; the interval then ends at 0.025^(1/k), k the rows of the rarer kind, because
            k disjoint pairs agree with probability AUC^k. Rows count as independent: successive steps of one request resemble each
            other, so with few, long requests the interval is too narrow.
        threshold: confidence that maximises Youden's J = P(c > t | accepted) - P(c > t | rejected); a row *passes* when it
            is above. Halfway between the two neighbouring confidences of the log; 0, everybody passes, if no J is positive.
        youden: that J.
        error: the most by which ``auc`` may differ from the AUC of the raw rows: half the share of pairs within one bin,
            sum of p_b * q_b / 2 over the bins; 0 for raw rows.
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
    """Exact separability of raw rows, in any order; O(n log n). Its AUC is scikit-learn's ``roc_auc_score``.

    Args:
        confidence: finite numbers [n].
        accepted: bools (or 0/1) [n].
        weight: floats [n], at least 0; None: all 1.

    Raises:
        EchoError: columns of different lengths, or the first row whose value is out of range.
    """
    score, label = np.atleast_1d(np.asarray(confidence)), labels(accepted)
    w = (
        np.broadcast_to(1.0, score.shape)
        if weight is None
        else np.atleast_1d(np.asarray(weight, dtype=np.float64))
    )
    if score.ndim != 1 or not score.shape == label.shape == w.shape:
        raise EchoError(
            f"confidence, accepted, weight: expected one length, got {score.size}, {label.size}, {w.size}"
        )
    if score.dtype.kind not in "biuf":
        raise EchoError(f"confidence: expected numbers, got {score.dtype}")
    check(np.isfinite(score), "confidence", "that are finite", score)
    check_weights(w)
    if weight is None and score.dtype == np.float32 and score.min(initial=0.0) >= 0:
        sums, values = _count(score, label)
        return _separate(sums, sums, values, values)
    values, place = np.unique(score.astype(np.float64), return_inverse=True)
    kinds = (~label, label)
    sums = np.stack(
        [
            np.bincount(place, weights=np.where(kind, w, 0.0), minlength=len(values))
            for kind in kinds
        ]
    )
    squares = np.stack(
        [
            np.bincount(place, weights=np.where(kind, w * w, 0.0), minlength=len(values))
            for kind in kinds
        ]
    )
    return _separate(sums, squares, values, values)


def _count(
    score: NDArray[np.float32], label: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Rejected and accepted rows [2, k] at k rising confidences.

    The bits of non-negative floats rise with their value, so one sort of integers, the label in the lowest bit, does for both.
    """
    key = (score + np.float32(0.0)).view(np.uint32)  # the sum makes -0.0 a 0.0
    key <<= np.uint32(1)
    key |= label
    key.sort()
    last = np.flatnonzero((key[1:] ^ key[:-1]) > 1)  # of each run of one confidence
    last = np.append(last, np.arange(len(key))[-1:])
    values = (key[last] >> np.uint32(1)).view(np.float32)
    key &= np.uint32(1)
    sums = np.empty((2, len(last)))
    sums[1] = np.diff(np.cumsum(key, dtype=np.int64)[last], prepend=0)
    sums[0] = np.diff(last, prepend=-1)
    sums[0] -= sums[1]
    return sums, values


def from_histogram(mass: NDArray[np.int64]) -> Separability:
    """Separability of one histogram, up to its ``error``.

    Args:
        mass: int64 [3, 2, 3074], one depth of :class:`ConfidenceHistograms`.
    """
    filled = np.flatnonzero(mass[WEIGHT].any(axis=0))
    sums, squares = mass[WEIGHT][:, filled] / UNIT, mass[SQUARE][:, filled] / UNIT
    bottom, top = lower_edges()[filled].astype(np.float64), upper_ends()[filled].astype(np.float64)
    result = _separate(sums, squares, bottom, top)
    totals = sums.sum(axis=1)
    if not (totals > 0).all():
        return result
    error = float((sums[0] * sums[1]).sum() / totals.prod() / 2)
    return replace(result, error=error)


def _separate(
    sums: NDArray[Any], squares: NDArray[Any], bottom: NDArray[Any], top: NDArray[Any]
) -> Separability:
    """From the rejected and accepted weight [2, k] at k rising confidences, each from ``bottom`` to ``top``."""
    totals = sums.sum(axis=1)
    if not (totals > 0).all():
        return Separability(float("nan"), 0.0, 1.0, 0.0, 0.0)
    below = np.cumsum(sums, axis=1)
    below /= totals[:, None]
    j = below[0] - below[1]
    below -= sums / (2 * totals[:, None])  # ties half
    auc = float((sums[1] * below[0]).sum() / totals[1])
    effective = totals**2 / squares.sum(axis=1)
    accepted = _variance(below[0], squares[1], totals[1], effective[1], auc)
    rejected = _variance(below[1], squares[0], totals[0], effective[0], 1.0 - auc)
    low, high = _interval(auc, accepted + rejected, float(effective.min()))
    best = int(np.argmax(j))
    if j[best] <= 0 or best + 1 == len(j):
        return Separability(auc, low, high, 0.0, 0.0)
    return Separability(
        auc, low, high, (float(top[best]) + float(bottom[best + 1])) / 2, float(j[best])
    )


def _variance(
    placement: NDArray[Any], square: NDArray[Any], total: float, effective: float, mean: float
) -> float:
    """Variance of the weighted mean of the placement values of one class, n / (n - 1) included."""
    n = max(effective, 2.0)
    return float((square * (placement - mean) ** 2).sum() / total**2 * n / (n - 1.0))


def _interval(auc: float, variance: float, rarer: float) -> tuple[float, float]:
    if auc <= 0.0 or auc >= 1.0:
        width = 1.0 - 0.025 ** (1.0 / max(rarer, 1.0))
        return (1.0 - width, 1.0) if auc >= 1.0 else (0.0, width)
    spread = Z95 * float(np.sqrt(variance))
    centre, width = np.log(auc / (1.0 - auc)), spread / (auc * (1.0 - auc))
    low, high = 1.0 / (1.0 + np.exp(-(centre + np.array([-width, width]))))
    return float(low), float(high)
