"""The throughput rule against brute force, and what gates do to whole requests."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import echo
from echo.gating import Objective, report, throughput_optimal

COST = echo.CostModel(
    (1, 64, 128, 256, 1024), (1.0, 1.0, 1.3, 2.2, 8.0), tiers=(64, 96, 128, 192, 256, 512, 1024)
)


def steps(n, depths, seed, *, coarse=None, ranks=1):
    """Whole request-steps: confidences fall along a path, acceptance depends on them."""
    random = np.random.default_rng(seed)
    c = np.cumprod(random.beta(3, 1.2, (n, depths)), axis=1)
    c = c if coarse is None else np.round(c * coarse) / coarse
    taken = np.logical_and.accumulate(random.random((n, depths)) < 0.15 + 0.8 * c, axis=1)
    choice = np.where(
        random.random((n, depths)) < 0.8, 0, random.integers(0, ranks, (n, depths))
    )  # rank of the accepted node
    step, depth, rank = np.meshgrid(
        np.arange(n), np.arange(1, depths + 1), np.arange(ranks), indexing="ij"
    )
    accepted = taken[..., None] & (choice[..., None] == rank)
    confidence = c[..., None] * 0.5**rank
    columns = (x.flatten() for x in (depth, confidence, accepted))
    return echo.WarmupLog.from_arrays(*columns, rank=rank.flatten(), step=step.flatten())


def run(log, thresholds, depths, objective):
    """The objective, one step after another, as one would explain it."""
    tokens = layers = 0
    for step in np.unique(log.step):
        here = log.step == step
        drafted = depths
        for depth in sorted(thresholds):
            if (
                log.confidence[here & (log.depth == depth) & (log.rank == 0)][0]
                <= thresholds[depth]
            ):
                drafted = depth - 1
                break
        layers += drafted
        for depth in range(1, drafted + 1):
            if not log.accepted[here & (log.depth == depth) & (log.rank < objective.beam)].any():
                break
            tokens += 1
    n = len(np.unique(log.step))
    tokens_verified = objective.batch * (1 + objective.beam * layers / n)
    return objective.batch * (1 + tokens / n) / objective.cost(tokens_verified)


def brute(log, gates, depths, objective):
    options = []
    for gate in gates:
        values = np.unique(log.confidence[(log.depth == gate) & (log.rank == 0)]).astype(float)
        options.append([0.0, *((values[:-1] + values[1:]) / 2), 1.0])
    return max(
        run(log, dict(zip(gates, taus, strict=True)), depths, objective)
        for taus in itertools.product(*options)
    )


@given(
    st.integers(0, 10_000),
    st.sampled_from([(1,), (2,), (1, 3), (2, 3), (1, 2, 3)]),
    st.sampled_from([4, 40, 64, 200]),
    st.integers(1, 2),
)
def test_up_to_three_gates_equal_brute_force(seed, gates, batch, beam):
    log = steps(8, 3, seed, coarse=6, ranks=2)
    objective = Objective(COST, batch, beam)
    thresholds, value = throughput_optimal(log, gates, 3, objective)
    assert tuple(thresholds) == gates
    assert value == pytest.approx(run(log, thresholds, 3, objective), rel=1e-12)
    assert value == pytest.approx(brute(log, gates, 3, objective), rel=1e-12)


def test_coordinate_ascent_on_four_gates_is_within_a_percent_of_brute_force():
    """It may end in a local optimum, but does so on none of 25 small logs with a stepped cost."""
    ratios = []
    for seed in range(25):
        log = steps(12, 4, seed, coarse=5)
        objective = Objective(COST, 64, 1)
        thresholds, value = throughput_optimal(log, (1, 2, 3, 4), 4, objective)
        assert value == pytest.approx(run(log, thresholds, 4, objective), rel=1e-12)
        ratios.append(value / brute(log, (1, 2, 3, 4), 4, objective))
    assert (
        max(ratios) <= 1 + 1e-12 and min(ratios) >= 0.99 and np.mean(np.isclose(ratios, 1)) >= 0.95
    ), ratios


def test_free_tokens_close_no_gate_and_costly_tokens_close_all():
    log = steps(300, 3, 1)
    free = echo.CostModel((1,), (1.0,))
    costly = echo.CostModel((1, 2), (1.0, 2.0))
    assert set(throughput_optimal(log, (1, 2, 3), 3, Objective(free, 64, 1))[0].values()) == {0.0}
    thresholds, value = throughput_optimal(log, (1, 2, 3), 3, Objective(costly, 64, 1))
    assert 1.0 <= value < 1.2
    assert report(log, thresholds)[0].stopped > 0.5 * 300


def test_throughput_calibration_beats_youden_on_its_own_log_and_says_what_it_is_worth():
    log = steps(3000, 5, 2, ranks=2)
    youden = echo.calibrate(log)
    best = echo.calibrate(log, thresholds="throughput", cost=COST, batch=64)
    objective = Objective(COST, 64, 1)
    assert best.rule == "throughput" and best.gate_depths == youden.gate_depths
    assert best.throughput == pytest.approx(
        throughput_optimal(log, best.gate_depths, 5, objective, youden.thresholds)[1], rel=1e-12
    )
    small = np.isin(log.step, np.arange(400))
    part = echo.WarmupLog(
        *(
            getattr(log, f)[small]
            for f in ("depth", "confidence", "accepted", "rank", "weight", "step")
        )
    )
    assert best.throughput > run(part, youden.thresholds, 5, objective) * 0.98
    assert best.throughput >= throughput_optimal(log, best.gate_depths, 5, objective)[1] * (
        1 - 1e-12
    )
    assert "thresholds by throughput" in str(best)
    assert echo.Calibration.from_json(best.to_json()) == best
    with pytest.raises(echo.EchoError, match="histograms do not keep steps together"):
        best.refit(echo.gating.ConfidenceHistograms.of(log))


def test_report_by_hand():
    """Four steps, gates at 1 (0.5) and 2 (0.4)."""
    log = echo.WarmupLog.from_arrays(
        depth=[1, 2, 1, 2, 1, 2, 1],
        confidence=[0.9, 0.8, 0.6, 0.3, 0.5, 0.45, 0.2],
        accepted=[1, 1, 1, 1, 1, 0, 0],
        step=[0, 0, 1, 1, 2, 2, 3],
    )
    one, two = report(log, {2: 0.4, 1: 0.5})
    assert (one.depth, one.asked, one.stopped, one.lost) == (
        1,
        4,
        2,
        1,
    )  # steps 2 and 3; step 2 would have been accepted
    assert (two.depth, two.asked, two.stopped, two.lost) == (2, 2, 1, 1)  # step 1, wrongly
    assert echo.calibrate(log, min_rows=1).report(log)[0].asked == 4
    assert report(log, {}) == ()


def test_weighted_steps_may_be_cut_short_by_the_gate():
    """Exploring logs: steps that ended at a gate are skipped, others stand for them."""
    log = steps(2000, 3, 5)
    c1 = log.confidence[log.depth == 1]
    passed, explores = (
        (c1 > 0.6)[log.step],
        (np.random.default_rng(0).random(2000) < 0.25)[log.step],
    )
    seen = passed | explores | (log.depth == 1)
    weight = np.where(passed | (log.depth == 1), 1.0, 4.0)
    columns = {
        name: getattr(log, name)[seen] for name in ("depth", "confidence", "accepted", "step")
    }
    objective = Objective(COST, 96, 1)
    _, value = throughput_optimal(
        echo.WarmupLog.from_arrays(**columns, weight=weight[seen]), (1, 3), 3, objective
    )
    assert value == pytest.approx(throughput_optimal(log, (1, 3), 3, objective)[1], rel=0.03)
    with pytest.raises(echo.EchoError, match="what was not verified is missing, not rejected"):
        throughput_optimal(echo.WarmupLog.from_arrays(**columns), (1, 3), 3, objective)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda log: echo.calibrate(log, thresholds="best"),
            "thresholds: expected 'youden' or 'throughput', got 'best'",
        ),
        (
            lambda log: echo.calibrate(log, thresholds="throughput"),
            "cost: expected a CostModel, got NoneType",
        ),
        (
            lambda log: echo.calibrate(log, thresholds="throughput", cost=COST, batch=0),
            "batch: expected an int >= 1, got 0",
        ),
        (
            lambda log: echo.calibrate(
                echo.gating.ConfidenceHistograms.of(log), thresholds="throughput", cost=COST
            ),
            "thresholds: expected 'youden' for histograms, got 'throughput'",
        ),
        (
            lambda log: throughput_optimal(log, (), 3, Objective(COST, 1, 1)),
            "gates: expected at least one depth, got none",
        ),
        (
            lambda log: throughput_optimal(log, (4,), 3, Objective(COST, 1, 1)),
            "gates: expected an int from 1 to 3, got 4",
        ),
        (
            lambda log: report(
                echo.WarmupLog.from_arrays([1, 1], [0.5, 0.4], [1, 0], step=[7, 7]), {1: 0.5}
            ),
            "one row of rank 0 for each depth of a step, got more in step 7 at depth 1",
        ),
        (
            lambda log: report(
                echo.WarmupLog.from_arrays(log.depth, log.confidence, log.accepted),
                {1: 0.5, 2: 0.1},
            ),
            "ids that join the rows of a step, got each row in a step of its own",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call(steps(50, 3, 0))
