"""Should I speculate? The page against counts by hand, against counters, and against replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import echo
import measured
from echo.report import speculation_report
from echo.testing import Trace, replay

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MACHINES = measured.machines()
FLAT = echo.CostModel((1, 64, 128), (1.0, 1.0, 2.0), draft_layer=0.1)

METRICS = 'vllm:spec_decode_num_drafts_total{{engine="0"}} {}\n'
LINE = "Accepted: 150 tokens, Drafted: 200 tokens, Per-position acceptance rate: {}"


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
    assert [a.verdict for a in page.advice] == ["no", "unsure"]  # 4 tokens were not measured
    assert "no at 1 request; unsure at 4 requests." in str(page)


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
    assert page.draft_acceptance_rate == 0.2 and page.mean_of_rates == 0.5
    assert "draft acceptance rate 0.200, pooled" in str(page)
    assert "mean of means 0.500: each of the steps" in str(page)


def test_rates_of_requests_and_of_log_lines_are_means_of_means():
    # one request with 8 steps that accept 1 of 2 drafts, one with 2 that accept both
    meta = [{"meta_info": {"spec_accept_histogram": h}} for h in ([0, 8], [0, 0, 2], [0, 0, 0])]
    page = speculation_report(meta, FLAT, num_reqs=[1])
    assert page.unit == "requests" and page.mean_of_rates == 0.75
    assert page.draft_acceptance_rate == 0.6 and page.acceptance_length == 2.2
    line = "SpecDecoding metrics: Mean acceptance length: {}, Accepted throughput: 9.9 tokens/s, "
    line += "Drafted throughput: 9.9 tokens/s, Accepted: {} tokens, Drafted: {} tokens, "
    line += "Per-position acceptance rate: {}, Avg Draft acceptance rate: {}%"
    text = "\n".join(
        [
            "(APIServer) INFO 08-04 [metrics.py:120] "
            + line.format(2.5, 150, 200, "0.900, 0.600", 75),
            "(APIServer) INFO 08-04 [loggers.py:310] Engine 000: Running: 1 reqs",
            "(APIServer) INFO 08-04 [metrics.py:120] "
            + line.format(1.2, 4, 40, "0.150, 0.050", 10),
        ]
    )
    page = speculation_report(text, FLAT, num_reqs=[1])
    assert page.unit == "intervals" and page.mean_of_rates == pytest.approx((0.75 + 0.1) / 2)
    assert page.draft_acceptance_rate == pytest.approx(154 / 240)
    assert [d.accepted for d in page.depths] == [93, 61] and page.depths[0].drafted == 120


def test_vllms_metrics_page_is_read():
    """Of two engines, with what prometheus_client adds."""
    text = "# HELP vllm:spec_decode_num_drafts_total Number\n"
    for engine, (drafts, tokens, *accepted) in enumerate(
        ([50, 140, 40, 20, 5], [50, 150, 10, 8, 5])
    ):
        labels = f'engine="{engine}",model_name="m"'
        text += f"vllm:spec_decode_num_drafts_total{{{labels}}} {drafts:.1f}\n"
        text += f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e+09\n"
        text += f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {tokens:.1f}\n"
        for i, count in enumerate(accepted):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            text += f'{name}{{{labels},position="{i}"}} {count:.1f}\n'
    page = speculation_report(text, FLAT, num_reqs=[1])
    assert [d.accepted for d in page.depths] == [50, 28, 10]
    assert [d.cumulative for d in page.depths] == [0.5, 0.28, 0.1]
    assert page.draft_acceptance_rate == pytest.approx(88 / 290)
    assert any("not all chains were of full length" in note for note in page.notes)


def test_resampled_logs_scatter_around_the_log_itself():
    """At any depth and budget: both select the same drafts."""
    from echo.gating.acceptance import LoggedDrafts

    rng = np.random.default_rng(0)
    log = chains(rng.integers(0, 5, 900).tolist(), 4)
    counted = LoggedDrafts(log, None, 63, rng, 400)
    for b in (1, 4):
        budgets, accepted, resample = counted.outcomes(b)
        for depth in (1, 4):
            for j in (0, budgets.shape[1] // 2, -1):
                drawn = resample(depth, int(budgets[depth - 1, j]))
                mean = accepted[depth - 1, j]
                assert drawn.mean() == pytest.approx(mean, abs=0.03)
                assert mean in (0, b) or drawn.std() > 0


def test_it_answers_by_batch_and_context():
    cost = echo.CostModel.from_samples(**MACHINES["llama-3.1-8b"], draft_layer=2e-4)
    log = chains([3, 1, 0, 2, 1, 4, 0, 3] * 200, 4)
    page = speculation_report(log, cost, num_reqs=[1, 64, 256], context_lens=[960, 4032, 20_000])
    at = {(a.context_len, a.num_reqs): a for a in page.advice}
    assert len(at) == 9 and at[960, 1].verdict == "yes"
    # reading a longer context, a step of many requests has more to spare
    assert at[4032, 64].speedup > at[960, 64].speedup
    assert [at[c, 256].extrapolated for c in (960, 4032, 20_000)] == [False, True, True]
    assert all(at[20_000, b].verdict == "unsure" for b in (1, 64, 256))
    text = str(page)
    assert "With 960 tokens of context: yes at 1" in text
    assert "With 20000 tokens of context: unsure at 1 to 256 requests." in text
    assert any(
        "measure the cost at (requests x context) 256 x 4032, 1 x 20000" in n for n in page.notes
    )
    default = speculation_report(log, cost, num_reqs=[1]).advice[0]
    assert (default.context_len, default.speedup) == (960, at[960, 1].speedup)


@pytest.mark.parametrize("steps", [1, 9, 49, 50])
def test_few_steps_are_never_sure(steps):
    """Not even where all of them accept all and drafts are free."""
    free = echo.CostModel((1, 64), (1.0, 1.0))
    vllm = {"num_drafts": steps, "num_accepted_tokens_per_pos": [steps]}
    for seen in (vllm, {"spec_accept_histogram": [0, steps]}, chains([1] * steps, 1)):
        page = speculation_report(seen, free, num_reqs=[1, 4], resamples=2000)
        for advice in page.advice:
            assert advice.verdict == ("unsure" if steps < 50 else "yes")
            # about as far from 2 as Wilson's interval of the rate is from 1
            assert 2 - advice.low == pytest.approx(1 - page.depths[0].low, rel=0.5)
            assert advice.speedup == 2
        assert any("too few for a sure answer" in n for n in page.notes) == (steps < 50)
    none = speculation_report({"spec_accept_histogram": [steps, 0]}, FLAT, num_reqs=[1])
    assert none.advice[0].verdict == ("unsure" if steps < 50 else "no")
    if steps == 1:
        assert page.depths[0].low == pytest.approx(0.2065, abs=1e-3)


@pytest.mark.parametrize("made", [echo.CostModel, echo.CostModel.from_samples])
def test_contexts_of_which_the_cost_knows_nothing_are_marked(made):
    cost = made((1, 64, 256), (1.0, 1.0, 2.0))
    seen = {"num_drafts": 900, "num_accepted_tokens_per_pos": [700, 500, 300]}
    page = speculation_report(seen, cost, num_reqs=[1, 16], context_lens=[0, 1024, 131_072])
    assert [a.extrapolated for a in page.advice] == [False] * 2 + [True] * 4
    assert [a.verdict for a in page.advice] == ["yes"] * 2 + ["unsure"] * 4
    assert "1 x 1024" in str(page)


def test_the_page_is_reached_from_echo():
    """As docs/start.md calls it, in a process that has imported nothing else."""
    code = "import echo; print(echo.report.speculation_report.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "speculation_report"


def test_the_cost_models_error_widens_the_interval():
    log = chains([3, 1, 0, 2, 1, 4, 0, 3] * 200, 4)
    widths = []
    for error in (None, 0.05, 0.2):
        cost = echo.CostModel((1, 64, 128), (1.0, 1.0, 2.0), draft_layer=0.1, error=error)
        page = speculation_report(log, cost, num_reqs=[1])
        widths.append(page.advice[0].high - page.advice[0].low)
        unknown = any("own error is not known" in note for note in page.notes)
        assert unknown == (error is None)
    assert widths[0] < widths[1] < widths[2]
    assert widths[2] == pytest.approx(2 * 2**0.5 * 0.2 * page.advice[0].speedup, rel=0.3)


def test_doubts_about_the_cost_are_on_the_page():
    with pytest.warns(UserWarning, match="only"):
        cost = echo.CostModel.from_samples([4, 8, 16], [1.0, 1.0, 2.0], num_reqs=[4, 4, 4])
    page = speculation_report(chains([1, 2] * 99, 2), cost, num_reqs=[4, 32])
    assert any("cost model: samples of 4 request(s) only" in note for note in page.notes)
    assert page.advice[0].verdict != "unsure" and page.advice[1].verdict == "unsure"


def test_depths_have_intervals_that_hold():
    """Wilson's, at 95%: of repeated logs about as many hold the true rate."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(100):
        first = rng.random(80) < 0.7
        second = first & (rng.random(80) < 0.5)
        page = speculation_report(chains(first.astype(int) + second, 2), FLAT, num_reqs=[1])
        one, two = page.depths
        inside += [one.low <= 0.7 <= one.high, two.low <= 0.5 <= two.high]
    assert 0.9 <= np.mean(inside) <= 0.99


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
    experts = echo.CostModel.from_samples(**MACHINES["qwen3-235b, context 960"])
    page = speculation_report(chains([1, 0, 2] * 30, 4), experts, num_reqs=[1, 64])
    text = str(page)
    assert page.advice[0].k_max is None and page.advice[1].k_max > 64  # as measured
    assert page.advice[0].speedup < page.advice[1].speedup
    assert "8 tokens a request cost 2.2 plain steps at 1 request(s) and 1.1 at 64" in text
    assert "a mixture of experts" in text and "too few to tell" in text
    assert any("depth 1, 2, 3, 4: fewer than 50" in note for note in page.notes)
    assert any("sweet spots need a calibration" in note for note in page.notes)
    dense = speculation_report(chains([1, 0, 2] * 30, 4), FLAT, num_reqs=[1, 64])
    assert "experts" not in str(dense)
    assert dense.advice[1].depth == 0 and not dense.advice[1].extrapolated
    far = speculation_report(chains([1, 0, 2] * 30, 4), FLAT, num_reqs=[1, 200])
    assert far.advice[1].extrapolated and "* beyond what the cost model" in str(far)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: speculation_report({}, FLAT), "seen: expected a WarmupLog; vLLM's"),
        (lambda: speculation_report(3, FLAT), "seen: expected .* got int"),
        (lambda: speculation_report({"spec_accept_histogram": [4]}, FLAT), "steps that drafted"),
        (lambda: speculation_report("no such lines", FLAT), "seen: expected .* got str"),
        (lambda: speculation_report([{}, 3], FLAT), "seen: expected"),
        (lambda: speculation_report(chains([1], 2), FLAT, context_lens=[-1]), "context_lens"),
        (lambda: speculation_report(chains([1], 2), FLAT, context_lens=[]), "context_lens: .* one"),
        (lambda: speculation_report(chains([1], 2), FLAT, context_lens=5), "context_lens"),
        (lambda: speculation_report(chains([1], 2), FLAT, num_reqs=[]), "num_reqs: .* least one"),
        (lambda: speculation_report(chains([1], 2), FLAT, seed=-1), "seed: expected an int >= 0"),
        (lambda: speculation_report(chains([1], 2), FLAT, calibration=3), "calibration: expected"),
        (lambda: speculation_report(METRICS.format("NaN"), FLAT), "seen: .* got ValueError"),
        (lambda: speculation_report(METRICS.format("+Inf"), FLAT), "seen: .* got OverflowError"),
        (lambda: speculation_report(LINE.format("0.5, 0.9"), FLAT), "never rise"),
        (lambda: speculation_report(LINE.format("1.5, 0.5"), FLAT), "never rise"),
        (lambda: speculation_report(LINE.format("0.5.2"), FLAT), "seen: .* got ValueError"),
        (lambda: speculation_report([{"meta_info": 3}], FLAT), "seen: expected .* got int"),
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
