"""Cost curves, their knee, and profiling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import echo


def test_the_papers_law_is_found_again():
    rows = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    law = echo.Knee(k_max=16, t_ar=0.03, gamma=0.05)
    model = echo.CostModel.from_samples(rows, [law(k) for k in rows])
    assert model.knee.k_max == 16
    assert model.knee.t_ar == pytest.approx(0.03)
    assert model.knee.gamma == pytest.approx(0.05)
    assert model(40) == pytest.approx(law(40))
    assert model(256) == pytest.approx(law(256))


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_any_samples_give_a_monotone_model(samples):
    rows, seconds = zip(*samples, strict=True)
    model = echo.CostModel.from_samples(rows, seconds)
    assert (np.diff(model(np.arange(1, 400))) >= -1e-9).all()
    assert model.knee.k_max in model.rows
    assert model.knee.gamma >= 0
    assert echo.CostModel.from_json(model.to_json()) == model


def test_noise_is_smoothed_away():
    rng = np.random.default_rng(0)
    law = echo.Knee(16, 0.03, 0.05)
    rows = np.tile([1, 2, 4, 8, 12, 16, 24, 32, 64, 128], 15)
    seconds = [law(k) * (1 + 0.05 * abs(rng.normal())) for k in rows]
    assert echo.CostModel.from_samples(rows, seconds).knee.k_max in (12, 16, 24)


def test_flat_and_steep_curves():
    assert echo.CostModel.from_samples([1, 8, 64], [1.0, 1.0, 1.0]).knee == echo.Knee(64, pytest.approx(1.0), 0.0)
    assert echo.CostModel.from_samples([1, 2, 4], [1.0, 2.0, 4.0]).knee.k_max == 1
    assert echo.CostModel.from_samples([5], [1.0]).knee.k_max == 5


def test_tiers_are_paid_in_full():
    model = echo.CostModel.from_samples([1, 100], [1.0, 100.0], tiers=[8, 16, 64])
    assert model.tier(9) == 16
    assert model(9) == model(16) == 16.0
    assert model.tier(np.array([1, 16, 17, 70])).tolist() == [8, 16, 64, 70]


def test_rows_within_a_cost():
    model = echo.CostModel.from_samples([1, 16, 64], [1.0, 1.0, 4.0])
    assert model.rows_within(1.0) == 16
    assert model.rows_within(2.0) == 32
    assert model.rows_within(99) == 64
    with pytest.raises(echo.EchoError, match=r"factor: expected a number >= 1.0, got 0.5"):
        model.rows_within(0.5)


def test_draft_cost():
    model = echo.CostModel((1,), (1.0,), draft_layer=0.2, draft_row=0.01)
    assert model.draft(3, 8) == pytest.approx(3 * 0.28)


def test_profile_times_every_row_count_after_a_warm_up():
    calls = []
    rows, seconds = echo.profile(calls.append, [1, 4], repeats=3)
    assert calls == [1, 4] * 4
    assert rows.tolist() == [1, 4] * 3
    assert (seconds > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: echo.CostModel.from_samples([], []), r"seconds: expected as many as rows \(0, at least 1\), got 0"),
        (lambda: echo.CostModel.from_samples([1, 2], [1.0]), r"seconds: expected as many as rows"),
        (lambda: echo.CostModel.from_samples([0], [1.0]), "expected rows >= 1 and positive seconds"),
        (lambda: echo.CostModel.from_samples([1], [float("nan")]), "expected rows >= 1 and positive seconds"),
        (lambda: echo.CostModel((2, 1), (1.0, 1.0)), "rows: expected increasing ints"),
        (lambda: echo.CostModel((1, 2), (2.0, 1.0)), "seconds: expected positive, non-decreasing"),
        (lambda: echo.CostModel((1,), (1.0,), tiers=(4, 2)), "tiers: expected increasing"),
        (lambda: echo.CostModel((1,), (1.0,), draft_layer=-1), "draft_layer: expected a number >= 0"),
        (lambda: echo.CostModel.from_json("{"), "cost: expected the JSON of a CostModel"),
        (lambda: echo.CostModel.from_json('{"format": "x", "version": 1}'), "cost: expected the JSON of a CostModel"),
        (lambda: echo.profile(print, []), "rows: expected at least one row count"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()
