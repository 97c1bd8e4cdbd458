"""Drift: found where traffic shifted, quiet where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import echo
from echo.gating import ConfidenceHistograms, DriftMonitor


def rows_of(n, seed, *, shift=0.0, harder=0.0, depths=4):
    """Confidences Beta(2 + shift, 1.5); acceptance probability lower by ``harder``."""
    random = np.random.default_rng(seed)
    confidence = (
        random.beta(2 + shift, 1.5, (depths, n)) ** np.arange(1, depths + 1)[:, None] ** 0.5
    )
    accepted = random.random((depths, n)) < 0.1 + 0.7 * confidence - harder
    return echo.WarmupLog.from_arrays(
        np.repeat(np.arange(1, depths + 1), n), confidence.flatten(), accepted.flatten()
    )


CALIBRATION = echo.calibrate(rows_of(4000, 0))


def histograms(*args, **kwargs):
    return ConfidenceHistograms.of(rows_of(*args, **kwargs))


def test_false_alarms_are_as_rare_as_promised():
    """300 windows of 500 rows a depth, each against another reference: at most alpha = 5% without
    the bounds of what matters, and at most alpha = 1% by default."""
    strict, usual = 0, 0
    for seed in range(300):
        calibration = echo.calibrate(rows_of(1500, 10_000 + seed))
        window = histograms(500, 20_000 + seed)
        strict += (
            DriftMonitor(calibration, alpha=0.05, min_psi=0, min_ks=0, min_gap=0)
            .check(window)
            .drifted
        )
        usual += DriftMonitor(calibration).check(window).drifted
    assert 1 <= strict <= 15 + 8  # 8: two standard deviations
    assert usual <= 3


@pytest.mark.parametrize(
    ("shift", "found"),
    [
        ({"shift": 1.5}, ("psi", "ks")),
        ({"harder": 0.15}, ("gap",)),
        ({"shift": -0.8, "harder": 0.2}, ("psi", "ks", "gap")),
    ],
)
def test_a_shift_is_found(shift, found):
    hits = 0
    for seed in range(20):
        report = DriftMonitor(CALIBRATION).check(histograms(1000, 500 + seed, **shift))
        first = report.depths[0]
        names = {
            "psi": first.psi > first.psi_limit,
            "ks": first.ks > first.ks_limit,
            "gap": abs(first.gap) > first.gap_limit,
        }
        hits += report.drifted and all(names[name] for name in found)
    assert hits >= 19


def test_a_trifling_shift_does_not_alarm_however_many_rows():
    window = histograms(300_000, 1, shift=0.05, harder=0.01)
    assert (
        DriftMonitor(echo.calibrate(rows_of(300_000, 2)), min_psi=0, min_ks=0, min_gap=0)
        .check(window)
        .drifted
    )
    assert not DriftMonitor(echo.calibrate(rows_of(300_000, 2))).check(window).drifted


def test_few_rows_are_not_judged_and_the_limit_falls_with_rows():
    report = DriftMonitor(CALIBRATION).check(histograms(60, 1, shift=3))
    assert not report.drifted
    assert "not judged: 60 live rows" in str(report)
    limits = [
        DriftMonitor(CALIBRATION).check(histograms(n, 1)).depths[0].psi_limit
        for n in (150, 1000, 100_000)
    ]
    assert limits[0] > limits[1] > limits[2] > 0.1


def test_a_window_is_a_difference_of_snapshots():
    before = histograms(2000, 1)
    now = before.add(rows_of(1000, 2, shift=1.5))
    monitor = DriftMonitor(CALIBRATION)
    assert monitor.check(now.since(before)) == monitor.check(histograms(1000, 2, shift=1.5))
    assert monitor.check(now.since(before)).drifted


def test_weighted_rows_count_by_their_effective_number():
    log = rows_of(2000, 3)
    weight = np.where(np.arange(len(log)) % 10 == 0, 10.0, 1.0)
    window = ConfidenceHistograms.of(
        echo.WarmupLog.from_arrays(log.depth, log.confidence, log.accepted, weight=weight)
    )
    first = DriftMonitor(CALIBRATION).check(window).depths[0]
    assert first.rows == pytest.approx(3800**2 / 21_800, rel=0.01)
    assert first.psi_limit == pytest.approx(0.1 + 19 * (1 / first.rows + 1 / 4000), rel=0.01)
    assert not first.drifted


def test_shallower_windows_and_files():
    monitor = DriftMonitor(echo.Calibration.from_json(CALIBRATION.to_json()))
    report = monitor.check(histograms(1000, 4, depths=2))
    assert not report.drifted and "0 live rows" in report.depths[3].reason


def test_bad_input_names_the_argument():
    with pytest.raises(
        echo.EchoError, match=r"alpha: expected a number from 1e-09 to 0\.5, got 0\.9"
    ):
        DriftMonitor(CALIBRATION, alpha=0.9)
    bare = replace(CALIBRATION, depths=tuple(replace(d, profile=()) for d in CALIBRATION.depths))
    with pytest.raises(echo.EchoError, match="calibration: expected one with confidence profiles"):
        DriftMonitor(bare)
