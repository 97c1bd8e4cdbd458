"""Should I speculate? The page against counts by hand, against counters, and against replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import echo
from echo.report import speculation_report
from echo.testing import Trace, replay

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FLAT = echo.CostModel((1, 64, 128), (1.0, 1.0, 2.0), draft_layer=0.1)


def chains(accepted, depth, seed=0):
    """A log of chains whose first ``accepted[i]`` drafts the target accepted, equally confident."""
    steps = np.repeat(np.arange(len(accepted)), depth)
    depths = np.tile(np.arange(1, depth + 1), len(accepted))
    good = depths <= np.repeat(accepted, depth)
    return echo.WarmupLog.from_arrays(depths, 0.5**depths, good, step=steps)


def test_a_flat_cost_takes_all_drafts_and_counts_by_hand():
    accepted = [2, 1, 0, 3] * 50
    page = speculation_report(chains(accepted, 3), FLAT, num_reqs=[1, 8])
    assert [d.drafted for d in page.depths] == [200, 200, 200]
    assert [d.accepted for d in page.depths] == [150, 100, 50]
    assert [d.cumulative for d in page.depths] == [0.75, 0.5, 0.25]
    assert [d.conditional for d in page.depths] == pytest.approx([0.75, 2 / 3, 0.5])
    assert page.draft_acceptance_rate == 0.5 and page.acceptance_length == 2.5
    one, eight = page.advice
    # depth 2 brings 1 + 0.75 + 0.5 tokens for 1.2 plain steps, depth 3 a quarter more for 1.3
    assert (one.depth, one.num_verify_tokens, one.tokens_per_step) == (3, 4, 2.5)
    assert one.speedup == pytest.approx(2.5 / 1.3)
    assert one.low < one.speedup < one.high
    assert eight.depth == 3 and eight.num_verify_tokens == 32


def test_a_steep_cost_says_no():
    steep = echo.CostModel((1, 2), (1.0, 2.0), draft_layer=0.1)
    page = speculation_report(chains([1, 0, 0] * 40, 2), steep, num_reqs=[1, 4])
    assert [a.depth for a in page.advice] == [0, 0] and not page.speculate
    assert "No, at none of these loads" in str(page)


def test_engines_counters_say_what_their_log_says():
    accepted = [3, 1, 0, 2, 1, 0, 0, 3] * 40
    log = speculation_report(chains(accepted, 3), FLAT, num_reqs=[1, 4, 16])
    histogram = np.bincount(accepted, minlength=4).tolist()
    positions = [sum(a > i for a in accepted) for i in range(3)]
    for counters in (
        {"num_drafts": len(accepted), "num_accepted_tokens_per_pos": positions},
        {"spec_accept_histogram": histogram},
        {"spec_correct_drafts_histogram": histogram},
    ):
        page = speculation_report(counters, FLAT, num_reqs=[1, 4, 16])
        assert page.depths == log.depths
        for mine, its in zip(page.advice, log.advice, strict=True):
            assert (mine.depth, mine.num_verify_tokens) == (its.depth, its.num_verify_tokens)
            assert mine.speedup == pytest.approx(its.speedup)
            assert (mine.low, mine.high) == pytest.approx((its.low, its.high), rel=0.05)


def test_pooled_rates_and_means_of_steps_are_told_apart():
    # ten steps of one draft, all accepted, and ten of four, none accepted
    depth = [1] * 10 + [1, 2, 3, 4] * 10
    step = list(range(10)) + np.repeat(np.arange(10, 20), 4).tolist()
    log = echo.WarmupLog.from_arrays(depth, [0.5] * 50, [True] * 10 + [False] * 40, step=step)
    page = speculation_report(log, FLAT, num_reqs=[1])
    assert page.draft_acceptance_rate == 0.2 and page.mean_of_step_rates == 0.5


def test_the_page_promises_what_replay_gives(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from common.replays import warm_up

    trace = Trace.load(BENCHMARKS / "traces" / "smollm2-head.npz")
    trace = trace.texts(range(0, len(trace.kind), 4))
    log = warm_up(trace).log
    calibration = echo.calibrate(log, min_rows=10)
    tokens, seconds = (1, 64, 512, 1024), (1.0, 1.05, 2.0, 4.0)
    cost = echo.CostModel(tokens, seconds, draft_layer=0.03)
    page = speculation_report(log, cost, calibration=calibration, num_reqs=[1, 8])
    for advice in page.advice:
        rule = echo.GlobalRank(trace.beam, calibration)
        budget = advice.num_verify_tokens
        scheduler = echo.ElasticBudgetScheduler(rule, None, budget, advice.depth)
        got = replay(trace, scheduler, cost, batch=advice.num_reqs)
        assert got.tokens / got.request_steps == pytest.approx(advice.tokens_per_step, rel=0.04)


def test_a_mixture_of_experts_is_named_and_unobserved_depths_are_marked():
    experts = echo.CostModel((1, 8, 64, 512), (1.0, 3.0, 6.0, 7.0))
    page = speculation_report(chains([1, 0, 2] * 30, 4), experts, num_reqs=[1, 64])
    text = str(page)
    assert "a mixture of experts" in text and "too few to tell" in text
    assert any("depth 1, 2, 3, 4: fewer than 50" in note for note in page.notes)
    dense = speculation_report(chains([1, 0, 2] * 30, 4), FLAT, num_reqs=[1, 64])
    assert "experts" not in str(dense)
    assert dense.advice[1].depth == 0 and not dense.advice[1].extrapolated
    far = speculation_report(chains([1, 0, 2] * 30, 4), FLAT, num_reqs=[1, 200])
    assert far.advice[1].extrapolated and "* beyond what the cost model" in str(far)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: speculation_report({}, FLAT), "seen: expected a WarmupLog, vLLM's"),
        (lambda: speculation_report(3, FLAT), "seen: expected .* got int"),
        (lambda: speculation_report({"spec_accept_histogram": [4]}, FLAT), "spec_accept_histogram"),
        (
            lambda: speculation_report(
                {"num_drafts": 9, "num_accepted_tokens_per_pos": [3, 4]}, FLAT
            ),
            "never rise",
        ),
        (lambda: speculation_report(chains([1], 2), None), "cost: expected a CostModel"),
        (lambda: speculation_report(chains([1], 2), FLAT, num_reqs=[0]), "num_reqs"),
        (
            lambda: speculation_report(
                echo.WarmupLog.from_arrays([1, 2], [0.5, 0.2], [1, 0]), FLAT
            ),
            "seen: expected rows joined by step ids",
        ),
        (
            lambda: speculation_report(
                echo.WarmupLog.from_arrays([1], [0.5], [1], weight=[2.0]), FLAT
            ),
            "without a gate",
        ),
    ],
)
def test_bad_input_names_the_argument(call, says):
    with pytest.raises(echo.EchoError, match=says):
        call()
