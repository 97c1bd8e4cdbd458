"""How well a confidence tells accepted from rejected rows: AUC with its interval, and the Youden threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""97.5% point of the normal distribution."""


@dataclass(frozen=True)
class Separability:
    """Separation of accepted from rejected rows by their confidence.

    Attributes:
        auc: P(confidence of an accepted row > that of a rejected row), ties counted half; NaN without both kinds.
        low, high: 95% interval of the AUC (DeLong 1988, on the logit scale, so that it stays in [0, 1]).
        threshold: confidence that maximises Youden's J = P(c > t | accepted) - P(c > t | rejected); a row *passes* when it
            is above. Halfway between the two neighbouring confidences of the log.
        youden: that J.
    """

    auc: float
    low: float
    high: float
    threshold: float
    youden: float


def separability(confidence: NDArray[Any], accepted: NDArray[np.bool_], weight: NDArray[Any]) -> Separability:
    """Exact separability of raw rows: columns of one length n, in any order. O(n log n)."""
    values, place = np.unique(confidence.astype(np.float64), return_inverse=True)
    w = weight.astype(np.float64)
    good = np.bincount(place, weights=np.where(accepted, w, 0.0), minlength=len(values))
    bad = np.bincount(place, weights=np.where(accepted, 0.0, w), minlength=len(values))
    total_good, total_bad = good.sum(), bad.sum()
    if total_good <= 0 or total_bad <= 0:
        return Separability(float("nan"), 0.0, 1.0, 0.0, 0.0)
    bad_below = (np.cumsum(bad) - 0.5 * bad) / total_bad
    good_above = 1.0 - (np.cumsum(good) - 0.5 * good) / total_good
    auc = float((good * bad_below).sum() / total_good)
    low, high = _interval(auc, *(_variance(a, b, auc) for a, b in ((bad_below, good), (good_above, bad))))
    passed_good = 1.0 - np.cumsum(good) / total_good
    passed_bad = 1.0 - np.cumsum(bad) / total_bad
    j = passed_good - passed_bad
    best = int(np.argmax(j))
    above = values[best + 1] if best + 1 < len(values) else values[best]
    return Separability(auc, low, high, float((values[best] + above) / 2), float(j[best]))


def _variance(placement: NDArray[Any], weight: NDArray[Any], mean: float) -> float:
    """Variance of the weighted mean of the placement values of one class."""
    total = weight.sum()
    effective = max(total, 2.0)
    return float((weight * (placement - mean) ** 2).sum() / total / (effective - 1.0))


def _interval(auc: float, *variances: float) -> tuple[float, float]:
    spread = Z95 * float(np.sqrt(sum(variances)))
    if not 0.0 < auc < 1.0:
        return max(0.0, auc - spread), min(1.0, auc + spread)
    centre, width = np.log(auc / (1.0 - auc)), spread / (auc * (1.0 - auc))
    low, high = 1.0 / (1.0 + np.exp(-(centre + np.array([-width, width]))))
    return float(low), float(high)
