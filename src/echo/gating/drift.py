"""Detect that traffic has drifted from what a calibration was made on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.calibration import Calibration, DepthCalibration
from echo.gating.histograms import SQUARE, UNIT, UPPER, WEIGHT, ConfidenceHistograms

TESTS = 3
"""Tests of each depth: psi, ks, gap."""
ENOUGH = 100.0
"""Effective rows, both calibrated and live, below which a depth is not judged: five in each of 20
bins (rule of thumb for chi-squared)."""


@dataclass(frozen=True)
class DepthDrift:
    """One depth of a :class:`DriftReport`. A statistic above its limit is drift.

    Attributes:
        depth: 1 for the first draft layer.
        rows: effective number of live rows of rank 0.
        psi, psi_limit: population stability index of the confidence.
        ks, ks_limit: Kolmogorov-Smirnov distance of the confidence.
        gap, gap_limit: live minus calibrated acceptance rate at equal confidence.
        drifted, reason: whether any statistic is above its limit, and in words.
    """

    depth: int
    rows: float
    psi: float
    psi_limit: float
    ks: float
    ks_limit: float
    gap: float
    gap_limit: float
    drifted: bool
    reason: str


@dataclass(frozen=True)
class DriftReport:
    """Result of :meth:`DriftMonitor.check`; ``str`` renders one line per depth.

    Attributes:
        depths: one entry per calibrated depth.
    """

    depths: tuple[DepthDrift, ...]

    @property
    def drifted(self) -> bool:
        """Whether any depth has drifted."""
        return any(d.drifted for d in self.depths)

    def __str__(self) -> str:
        return "\n".join(f"depth {d.depth}: {d.reason}" for d in self.depths)


@dataclass(frozen=True)
class DriftMonitor:
    """Compare live histograms with a calibration, in constant memory.

    Three statistics per depth, over the calibration's bins of rank 0, with n and m effective rows:

    - PSI = sum (p - q) log(p / q): without drift, (1/n + 1/m) times chi-squared with bins - 1
      degrees of freedom (Yurdakul and Naranjo 2020).
    - KS, the greatest distance of the distribution functions; its limit is sqrt(-log(a / 2) / 2 *
      (1/n + 1/m)).
    - The gap of acceptance at equal confidence, which reveals a changed target under equal drafts;
      its limit is normal.

    Drift is *both* significant (level ``alpha``, Bonferroni-corrected for a check's tests) *and*
    large enough to matter (``min_psi``, ...). Successive steps of a request are correlated, so let
    a window span some hundred requests. Rows deeper than a gate are a selection and look like
    drift: weight them (:class:`ExploringGate`), or watch only the first gate's depth.

    Args:
        calibration: the reference.
        alpha: maximum false-alarm rate of a check, for independent rows.
        min_psi: 0.1 is the customary bound of "no change" (0.25: "large").
        min_ks, min_gap: smallest difference of probabilities that matters.

    Raises:
        EchoError: an argument out of range, or a calibration without a profile.

    Example:
        >>> from echo.gating import WarmupLog, calibrate
        >>> log = WarmupLog.from_arrays([1] * 200, [0.9, 0.2] * 100, [1, 0] * 100)
        >>> DriftMonitor(calibrate(log)).check(ConfidenceHistograms.of(log)).drifted
        False
    """

    calibration: Calibration
    alpha: float = 0.01
    min_psi: float = 0.1
    min_ks: float = 0.1
    min_gap: float = 0.05

    def __post_init__(self) -> None:
        checks.instance("calibration", self.calibration, Calibration)
        checks.real_field(self, "alpha", 1e-9, 0.5)
        for name in ("min_psi", "min_ks", "min_gap"):
            checks.real_field(self, name, 0.0)
        if not any(d.profile for d in self.calibration.depths):
            expected = "calibration: expected one with confidence profiles"
            raise EchoError(f"{expected}, got one without: calibrate again")

    def check(self, live: ConfidenceHistograms) -> DriftReport:
        """Judge ``live``, a window such as ``now.since(earlier)``; EchoError: another type."""
        checks.instance("live", live, ConfidenceHistograms)
        return DriftReport(tuple(self._check(d, live) for d in self.calibration.depths))

    def _check(self, d: DepthCalibration, live: ConfidenceHistograms) -> DepthDrift:
        mass = live.mass[:, d.depth - 1, 0] if d.depth <= live.max_depth else 0 * live.mass[:, 0, 0]
        square = float(mass[SQUARE].sum()) / UNIT
        now = _by_bin(mass[WEIGHT], d)
        n = now.sum() ** 2 / square if square else 0.0
        m = d.effective
        if min(n, m) < ENOUGH or len(d.profile) < 2:
            needed = f"{m:.0f} of the calibration, {ENOUGH:.0f} of each needed"
            reason = f"not judged: {n:.0f} live rows, {needed}"
            none = 0.0, math.inf
            return DepthDrift(d.depth, n, *none, *none, *none, False, reason)
        then = np.array([entry[1:] for entry in d.profile]).T
        level = self.alpha / (TESTS * len(self.calibration.depths))
        of = now * (n / now.sum()), then * (m / then.sum()), level  # effective rows
        found = {"psi": self._psi(*of), "ks": self._ks(*of), "gap": self._gap(*of)}
        above = [name for name, (value, limit) in found.items() if abs(value) > limit]
        words = [
            f"{name} {value:.3f} (limit {limit:.3f})" for name, (value, limit) in found.items()
        ]
        verdict = "drift in " + " and ".join(above) if above else "no drift"
        reason = f"{verdict}: {', '.join(words)}, {n:.0f} live rows"
        psi, ks, gap = found.values()
        return DepthDrift(d.depth, n, *psi, *ks, *gap, bool(above), reason)

    def _psi(self, now: NDArray[Any], then: NDArray[Any], level: float) -> tuple[float, float]:
        from scipy.special import chdtri

        # Add half a row to each, so that an empty bin has a logarithm.
        a = now.sum(axis=0) + 0.5
        b = then.sum(axis=0) + 0.5
        p = a / a.sum()
        q = b / b.sum()
        noise = 1.0 / now.sum() + 1.0 / then.sum()
        degrees = len(p) - 1
        psi = float(((p - q) * np.log(p / q)).sum())
        return psi, max(noise * float(chdtri(degrees, level)), self.min_psi + noise * degrees)

    def _ks(self, now: NDArray[Any], then: NDArray[Any], level: float) -> tuple[float, float]:
        steps = [np.cumsum(side.sum(axis=0)) / side.sum() for side in (now, then)]
        noise = math.sqrt(-math.log(level / 2.0) / 2.0 * (1.0 / now.sum() + 1.0 / then.sum()))
        return float(np.abs(steps[0] - steps[1]).max()), max(noise, self.min_ks)

    def _gap(self, now: NDArray[Any], then: NDArray[Any], level: float) -> tuple[float, float]:
        from scipy.special import ndtri

        both = now.any(axis=0) & then.any(axis=0)
        if not both.any():
            return 0.0, math.inf
        now = now[:, both]
        then = then[:, both]
        rows = now.sum(axis=0)
        before = then.sum(axis=0)
        share = rows / rows.sum()
        pooled = (now[0] + then[0] + 0.5) / (rows + before + 1.0)
        variance = share**2 * pooled * (1.0 - pooled) * (1.0 / rows + 1.0 / before)
        gap = float((share * (now[0] / rows - then[0] / before)).sum())
        noise = -float(ndtri(level / 2.0)) * math.sqrt(float(variance.sum()))
        return gap, max(noise, self.min_gap)


def _by_bin(weight: NDArray[np.int64], d: DepthCalibration) -> NDArray[np.float64]:
    """Return accepted and rejected weight, float64 [2, k], in the calibration's bins."""
    if not d.profile:
        return np.zeros((2, 1))
    ends = np.array([entry[0] for entry in d.profile], dtype=np.float32)
    place = np.searchsorted(ends, UPPER)
    sums = [np.bincount(place, weights=row, minlength=len(ends)) / UNIT for row in weight[::-1]]
    return np.stack(sums)
