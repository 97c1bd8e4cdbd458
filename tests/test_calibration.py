"""Logs, separability, sweet spots, reliability, and their files."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import echo
from echo.gating import Objective, calibration_error, report, separability, throughput_optimal
from echo.kernels.codes import BINS_PER_NAT, ONE


def simulate(n, *, sharpness, depth=1, seed=0, rank=0):
    """Rows whose confidence tells acceptance apart the better, the greater the sharpness."""
    rng = np.random.default_rng(seed)
    accepted = rng.random(n) < 0.5
    confidence = 1 / (1 + np.exp(-(rng.normal(size=n) + sharpness * (2 * accepted - 1))))
    return echo.WarmupLog.from_arrays(
        np.full(n, depth), confidence, accepted, rank=np.full(n, rank)
    )


LOG, COST = simulate(2, sharpness=1), echo.CostModel((1, 2), (1.0, 1.0))


def brute_auc(confidence, accepted, weight):
    good, bad = confidence[accepted], confidence[~accepted]
    wins = (good[:, None] > bad).astype(float) + 0.5 * (good[:, None] == bad)
    w = weight[accepted][:, None] * weight[~accepted]
    return (wins * w).sum() / w.sum()


def test_auc_counts_pairs_ties_half():
    rng = np.random.default_rng(0)
    for coarse in (1000, 5):
        confidence = np.round(rng.random(200) * coarse) / coarse
        accepted = rng.random(200) < confidence
        weight = rng.random(200)
        assert separability(confidence, accepted, weight).auc == pytest.approx(
            brute_auc(confidence, accepted, weight), abs=1e-12
        )


def test_youden_threshold_maximises_j():
    log = simulate(500, sharpness=1.0)
    s = separability(log.confidence, log.accepted, log.weight)
    taus = np.unique(log.confidence)
    j = [
        (log.confidence[log.accepted] > t).mean() - (log.confidence[~log.accepted] > t).mean()
        for t in taus
    ]
    assert s.youden == pytest.approx(max(j))
    above = log.confidence > s.threshold
    assert above[log.accepted].mean() - above[~log.accepted].mean() == pytest.approx(max(j))


def log_of(*sharpness, n=800):
    return echo.WarmupLog.concat(
        [simulate(n, sharpness=s, depth=d, seed=d) for d, s in enumerate(sharpness, 1)]
    )


def test_sweet_spots_are_the_separable_depths_and_say_why():
    calibration = echo.calibrate(log_of(0.4, 0.05, 1.2, 0.05, 0.9, 0.02))
    assert calibration.gate_depths == (1, 3, 5, 6)
    reasons = [d.reason for d in calibration.depths]
    assert reasons[0].startswith("root gate; AUC")
    assert "not above 0.70" in reasons[1]
    assert "above 0.70" in reasons[2]
    assert reasons[5].startswith("target depth; AUC")


def test_at_most_max_gates():
    calibration = echo.calibrate(log_of(1, 1, 1, 1, 1, 1), max_gates=3)
    assert len(calibration.gate_depths) == 3
    assert sum("3 gates at most" in d.reason for d in calibration.depths) == 3


def test_the_gates_kept_are_those_that_stop_most_rejected_rows():
    assert echo.calibrate(log_of(1, 0.6, 0.6, 2.0, 0.6, 1), max_gates=3).gate_depths == (1, 4, 6)


def test_a_deep_gate_saves_few_layers():
    """Deep layers separate better, and most of their rows are rejected: it saves little."""
    assert echo.calibrate(log_of(1, 0.8, 0.85, 0.9, 0.95, 1), max_gates=3).gate_depths == (1, 2, 6)


def test_too_few_rows_are_no_sweet_spot():
    log = echo.WarmupLog.concat(
        [
            simulate(400, sharpness=1),
            simulate(30, sharpness=3, depth=2),
            simulate(400, sharpness=1, depth=3),
        ]
    )
    with pytest.warns(
        UserWarning, match="where fewer rows are deeper, got 30 rows of depth 2 and 400 of depth 1"
    ):
        calibration = echo.calibrate(log)
    assert calibration.gate_depths == (1, 3)
    assert "50 needed" in calibration.depths[1].reason


def test_a_depth_with_one_kind_of_rows_only_is_not_a_fault():
    log = echo.WarmupLog.concat(
        [simulate(400, sharpness=1), echo.WarmupLog.from_arrays([2] * 60, [0.5] * 60, [0] * 60)]
    )
    with pytest.warns(
        UserWarning, match="where fewer rows are deeper, got 60 rows of depth 2 and 400 of depth 1"
    ):
        calibration = echo.calibrate(log)
    assert np.isnan(calibration.depths[1].auc)
    assert calibration.depths[1].threshold == 0.0  # nothing to tell apart: all requests pass
    assert echo.Calibration.from_json(calibration.to_json()).to_json() == calibration.to_json()
    assert json.loads(calibration.to_json())["depths"][1]["auc"] is None


def test_reliability_is_monotone_and_close_to_the_truth():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    log = echo.WarmupLog.from_arrays(
        np.ones(20_000), confidence, rng.random(20_000) < confidence**2
    )
    table = echo.calibrate(log).reliability_table()
    assert table.shape == (2, 512)
    assert (table[0] == ONE).all()
    assert (np.diff(table[1]) <= 0).all()
    for c in (0.3, 0.6, 0.9):
        assert table[1][int(-np.log(c) * BINS_PER_NAT)] / ONE == pytest.approx(c**2, abs=0.06)


def test_json_and_files(tmp_path):
    calibration = echo.calibrate(log_of(0.8, 0.4, 1.2))
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert echo.Calibration.load(path) == calibration
    text = calibration.to_json()
    for broken, message in [
        (text[: len(text) // 2], "expected JSON text"),
        ("hello", "expected JSON text"),
        ("[1]", "expected format 'echo-calibration' version 2, got list"),
        (
            text.replace('"version": 2', '"version": 99'),
            r"version 2, got \('echo-calibration', 99\)",
        ),
        (text.replace('"version": 2', '"version": 99'), "a newer ECHO wrote it, update this one"),
        (text.replace('"threshold"', '"tau"'), "expected the fields of version 2"),
        (text.replace('"profile"', '"histogram"'), "expected the fields of version 2"),
        (
            re.sub(r'"accepted": \d+', '"accepted": -3', text),
            "calibration.accepted: expected an int >= 0, got -3",
        ),
        (
            re.sub(r'"effective": [^,]+', '"effective": NaN', text),
            "calibration.effective: expected a number >= 0.0, got nan",
        ),
        (
            re.sub(r'"profile": \[\[[^,]+', '"profile": [[-1', text),
            "calibration.profile: expected a number >= 0.0, got -1",
        ),
        (
            re.sub(r'"reliability": \[\[[^,]+', '"reliability": [[NaN', text),
            "calibration.reliability: expected rising knots",
        ),
        (
            re.sub(r'"reliability": .*', '"reliability": [[-3, 0.1, -2], [0.2, -1, 0.3]],', text),
            "calibration: ",
        ),
        (text.replace('"depth": 2', '"depth": 7'), r"expected depths 1, 2, ..., got \[1, 7, 3\]"),
    ]:
        with pytest.raises(echo.EchoError, match=message):
            echo.Calibration.from_json(broken)


def test_json_has_stable_bytes_that_a_person_can_read():
    calibration = echo.calibrate(log_of(0.8, 0.4))
    text = calibration.to_json()
    assert (
        echo.calibrate(log_of(0.8, 0.4)).to_json()
        == text
        == echo.Calibration.from_json(text).to_json()
    )
    assert (
        '   "threshold": 0.' in text and len(text.splitlines()) == 47
    )  # one line for each value, a map is one
    assert list(json.loads(text))[:4] == ["format", "version", "depths", "min_auc"]


def test_a_useless_depth_stops_no_request():
    """Confidence below chance: no threshold has a positive J, so the gate is open."""
    log = simulate(500, sharpness=-2.0)
    d = echo.calibrate(log).depths[0]
    assert d.auc < 0.1 and d.threshold == 0.0 and d.stopped == 0
    same = separability([0.2, 0.8, 0.2, 0.8], [1, 1, 0, 0])
    assert (same.auc, same.threshold, same.youden) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: echo.calibrate(echo.WarmupLog.from_arrays([], [], [])),
            "log: expected rows, got an empty log",
        ),
        (
            lambda: echo.calibrate(echo.WarmupLog.from_arrays([1], [0.5], [1])),
            "got 1 accepted rows only",
        ),
        (
            lambda: echo.calibrate(echo.WarmupLog.from_arrays([1, 1], [0.5, 0.6], [0, 0])),
            "got 2 rejected rows only",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1, 1], [0.5, 1.5], [0, 1]),
            r"confidence: .* \[0, 1\] and not NaN, got 1.5 in row 1",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1, 1], [float("nan"), 0.5], [0, 1]),
            r"confidence: .* got nan in row 0",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1, 1], [0.5], [0, 1]),
            "log: expected columns of one length",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([0], [0.5], [1]),
            "depth: expected values >= 1, got 0 in row 0",
        ),
        (lambda: echo.WarmupLog.from_arrays([1.5], [0.5], [1]), "depth: expected integers"),
        (
            lambda: echo.WarmupLog.from_arrays([1], [0.5], [2]),
            "accepted: expected values 0 or 1, got 2 in row 0",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1, 1], [0.5] * 2, [1, np.nan]),
            "accepted: expected values 0 or 1, got nan in row 1",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1, 2**32 + 1], [0.5] * 2, [1, 0]),
            "depth: expected integers of int32, got int64",
        ),
        (
            lambda: echo.WarmupLog.from_arrays([1], [0.5], [1], rank=[1e300]),
            "rank: expected integers of int32, got float64",
        ),
        (
            lambda: replace(LOG, accepted=np.array([2, -1])),
            r"accepted: expected bool_? \[n\], as from_arrays makes it, got int64 \[2\]",
        ),
        (
            lambda: replace(LOG, confidence=np.array([0.5, 0.4])),
            r"confidence: expected float32 \[n\], as from_arrays .* got float64 \[2\]",
        ),
        (
            lambda: throughput_optimal(LOG, (1,), 1, Objective(COST, 0, 1)),
            "batch: expected an int >= 1, got 0",
        ),
        (
            lambda: throughput_optimal(LOG, (1,), 1, Objective(COST, 1, 1), {1: np.nan}),
            r"start\[1\]: expected a number from 0.0 to 1.0, got nan",
        ),
        (
            lambda: report(LOG, {1: np.nan}),
            r"thresholds\[1\]: expected a number from 0.0 to 1.0, got nan",
        ),
        (
            lambda: calibration_error(np.full((2, 512), -1, np.int32), LOG),
            "table: expected 24-bit fixed point, from 0 to 16777216, got -1",
        ),
        (
            lambda: echo.CostModel.from_samples([1, 2], [1.0, 1.0], num_reqs=[1, np.inf]),
            "num_reqs: expected a finite number .* got inf",
        ),
        (
            lambda: echo.CostModel.from_samples([1, 2], [1.0, 1.0], context_tokens=[1, np.nan]),
            "context_tokens: expected a finite number .* got nan",
        ),
        (
            lambda: echo.CostModel.from_samples([1, 2], [1.0, 1.0], num_other_tokens=[1, np.inf]),
            "num_other_tokens: expected a finite number .* got inf",
        ),
        (
            lambda: echo.CostModel.from_samples([1, np.inf], [1.0, 1.0]),
            "num_tokens: expected a finite number in every sample, got inf",
        ),
        (
            lambda: echo.cost.line([1, np.inf], [1.0, 1.0]),
            "amount: expected a finite number in every sample, got inf",
        ),
        (lambda: echo.WarmupLog.concat([]), "logs: expected at least one WarmupLog"),
        (
            lambda: echo.calibrate(log_of(1), min_auc=0.3),
            "min_auc: expected a number from 0.5 to 1.0, got 0.3",
        ),
        (
            lambda: echo.calibrate(log_of(1), max_depth=4),
            "max_depth: expected an int equal to 1, got 4",
        ),
        (lambda: echo.calibrate(log_of(1), max_gates=1), "max_gates: expected an int >= 2, got 1"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()
