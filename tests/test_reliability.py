"""Monotone maps by depth, their look-up on the device, and the error that they remove."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from echo.gating import look_up
from echo.gating.histograms import MIDDLE, ROWS
from echo.kernels.codes import BINS_PER_NAT, ONE
from echo.testing import RefuseSyncs


def rows_of(n, seed, *, depths=2, ranks=4):
    """Acceptance is c^2 at rank 0, and less at greater ranks."""
    random = np.random.default_rng(seed)
    depth, rank = random.integers(1, depths + 1, n), random.integers(0, ranks, n)
    confidence = np.exp(-random.exponential(1.0, n) * depth)
    accepted = random.random(n) < confidence**2 / (1 + rank)
    return echo.WarmupLog.from_arrays(
        depth, confidence, accepted, rank=rank, step=np.arange(n) // 4
    )


LOG = rows_of(40_000, 0)
CALIBRATION = echo.calibrate(LOG)


def test_isotonic_regression_equals_scikit_learn_on_the_binned_rows_and_is_close_on_the_raw_ones():
    isotonic = pytest.importorskip("sklearn.isotonic")
    log = rows_of(30_000, 3, depths=1, ranks=1)
    rejected, accepted = echo.gating.ConfidenceHistograms.of(log).mass[ROWS, 0].sum(axis=0)
    filled = np.flatnonzero(rejected + accepted)
    weight, hits = (rejected + accepted)[filled], accepted[filled]
    fitted = (
        isotonic.IsotonicRegression()
        .fit(MIDDLE[filled], hits / weight, sample_weight=weight)
        .predict(MIDDLE[filled])
    )
    first = np.flatnonzero(np.diff(fitted, prepend=-1) > 1e-12)
    blocks = np.add.reduceat(weight, first)
    ours = echo.calibrate(log).depths[0].reliability
    centre = np.add.reduceat(weight * MIDDLE[filled], first) / blocks
    shrunk = (fitted[first] * blocks + 2 * np.exp(centre)) / (blocks + 2)
    assert np.array(ours)[:, 1] == pytest.approx(
        np.maximum.accumulate(shrunk), abs=2e-4
    )  # the prior is tabulated
    raw = isotonic.IsotonicRegression().fit(np.log(log.confidence.astype(np.float64)), log.accepted)
    grid = np.linspace(-3, -0.05, 60)
    assert np.abs(raw.predict(grid) - np.interp(grid, *np.array(ours).T)).mean() < 0.01


def test_without_evidence_the_draft_is_taken_at_its_word():
    """Depth 2 has no rows, depth 3 has three."""
    rows = rows_of(500, 0, depths=1, ranks=1)
    few = echo.WarmupLog.from_arrays([3] * 3, [0.4, 0.5, 0.6], [1, 1, 1])
    table = echo.calibrate(echo.WarmupLog.concat([rows, few])).reliability_table() / ONE
    for c in (0.9, 0.5, 0.05, 0.001):
        assert table[2][int(-np.log(c) * BINS_PER_NAT)] == pytest.approx(c, rel=0.05)
    assert table[3][int(-np.log(0.5) * BINS_PER_NAT)] == pytest.approx((3 + 2 * 0.5) / 5, abs=0.05)


def test_calibration_removes_the_error_on_held_out_rows():
    held_out = rows_of(20_000, 9)
    pooled = CALIBRATION.error(held_out)
    assert pooled.before[0] > 0.15 and pooled.after[0] < 0.02
    assert pooled.after[2] < pooled.before[1]  # intervals apart
    assert pooled.brier_after[0] < pooled.brier_before[0]
    for value, low, high in (pooled.before, pooled.brier_before, pooled.brier_after):
        assert low <= value <= high
    assert CALIBRATION.error(held_out) == pooled  # the seed is an argument


@given(
    st.lists(
        st.floats(-40, 0, width=32) | st.just(-np.inf) | st.just(np.nan), min_size=1, max_size=20
    ),
    st.integers(0, 5),
)
def test_look_up_reads_the_table_entry(scores, depth):
    score = torch.tensor(scores, dtype=torch.float32)
    table = torch.from_numpy(CALIBRATION.reliability_table())
    column = [
        511 if not np.isfinite(s) else min(int(np.floor(-32 * s)), 511) for s in score.tolist()
    ]
    with RefuseSyncs():
        plain = look_up(table, score, depth)
        many = look_up(table, score, torch.full_like(score, depth, dtype=torch.int32))
        capped = look_up(table, score, depth, parent=torch.full_like(plain, 12345))
    assert plain.dtype == torch.int32
    assert plain.tolist() == many.tolist() == table[min(depth, 2)][column].tolist()
    assert capped.tolist() == plain.clamp(max=12345).tolist()


def test_look_up_is_what_the_rules_use():
    tree = echo.ElasticBudgetScheduler(echo.GlobalRank(2, CALIBRATION), None, 10, 2).begin(
        torch.tensor([1, 2])
    )
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2, CALIBRATION), None, 10, 2)
    for _ in range(2):
        shape = (*tree.frontier.token.shape, 3)
        tree = scheduler.grow(tree, torch.randint(0, 9, shape), torch.randn(shape).log_softmax(-1))
    cost = echo.GlobalRank(2, CALIBRATION).cost(tree)
    table, f, expected = torch.from_numpy(CALIBRATION.reliability_table()), None, []
    for layer in tree.layers:
        f = look_up(
            table, layer.score, layer.depth, parent=None if f is None else f.gather(1, layer.parent)
        )
        expected.append(
            torch.where(torch.isfinite(layer.score), ONE - f, torch.iinfo(torch.int32).max)
        )
    assert torch.equal(cost, torch.cat(expected, dim=1))


def test_picture_and_table():
    pytest.importorskip("matplotlib")
    figure = CALIBRATION.plot()
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert titles[:2] == ["depth 1, gate", "depth 2, gate"] and "reliability" in titles
    bare = echo.calibrate(echo.WarmupLog.from_arrays([1, 1, 3], [0.5, 0.1, 0.4], [1, 0, 0]))
    bare.plot().canvas.draw()
    lines = str(CALIBRATION).splitlines()
    assert len(lines) == 2 + CALIBRATION.max_depth
    assert lines[0] == "2 depths, gates at 1, 2; thresholds by youden"
    assert "root gate; AUC" in lines[2] and len({line.find("  AUC") for line in lines[2:]}) == 1
    assert "nan" not in str(bare)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: look_up(torch.zeros(3, 5, dtype=torch.int32), torch.zeros(2), 1),
            r"table: expected int32 \[depths, 512\], got int32 \[3, 5\]",
        ),
        (lambda: CALIBRATION.error(LOG, bins=1), "bins: expected an int >= 2, got 1"),
        (
            lambda: CALIBRATION.error(echo.WarmupLog.from_arrays([9], [0.5], [1])),
            "log: expected rows of depth 1 to 2, got none",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()
