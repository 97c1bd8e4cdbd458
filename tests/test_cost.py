"""Cost curves, their knee, drafting and draft extend, SGLang's tables, and profiling."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
import measured

ONE = echo.CostModel.from_samples([1, 2], [1.0, 1.0])
EXPERTS = "qwen3-235b, context 960"


def test_the_papers_law_is_found_again():
    tokens = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    law = echo.cost.Knee(k_max=16, t_ar=0.03, gamma=0.05)
    model = echo.CostModel.from_samples(tokens, [law(k) for k in tokens])
    assert model.knee.k_max == 16
    assert model.knee.t_ar == pytest.approx(0.03)
    assert model.knee.gamma == pytest.approx(0.05)
    assert model(40) == pytest.approx(law(40))
    assert model(256) == pytest.approx(law(256))


@pytest.mark.filterwarnings("ignore:CostModel. samples fall")
@given(st.lists(st.tuples(st.integers(1, 200), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_any_samples_give_a_monotone_model(samples):
    tokens, seconds = zip(*samples, strict=True)
    model = echo.CostModel.from_samples(tokens, seconds)
    assert (np.diff(model(np.arange(1, 400))) >= -1e-9).all()
    assert model.num_tokens[0] <= model.knee.k_max <= model.num_tokens[-1]
    assert model.knee.gamma >= 0
    assert echo.CostModel.from_json(model.to_json()) == model


def test_noise_is_smoothed_away():
    rng = np.random.default_rng(0)
    law = echo.cost.Knee(16, 0.03, 0.05)
    tokens = np.tile([1, 2, 4, 8, 12, 16, 24, 32, 64, 128], 15)
    seconds = [law(k) * (1 + 0.05 * abs(rng.normal())) for k in tokens]
    knee = echo.CostModel.from_samples(tokens, seconds).knee
    assert 14 <= knee.k_max <= 18
    assert knee.k_max_interval[0] <= knee.k_max <= knee.k_max_interval[1]
    assert knee.gamma_interval[0] < knee.gamma < knee.gamma_interval[1]
    assert knee.gamma_interval[1] - knee.gamma_interval[0] < 0.02


def test_a_knee_between_measured_points_is_found():
    law = echo.cost.Knee(k_max=20, t_ar=0.01, gamma=0.1)
    tokens = [1, 4, 8, 16, 32, 64]
    assert echo.CostModel.from_samples(tokens, [law(k) for k in tokens]).knee.k_max == 20


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    law, tokens, hits = (
        echo.cost.Knee(16, 0.03, 0.05),
        np.tile([1, 4, 8, 12, 16, 20, 24, 32, 64], 9),
        0,
    )
    for seed in range(40):
        noise = np.exp(0.04 * np.random.default_rng(seed).normal(size=len(tokens)))
        low, high = echo.CostModel.from_samples(
            tokens, [law(k) for k in tokens] * noise
        ).knee.k_max_interval
        hits += low <= 16 <= high
    assert hits >= 34


def test_samples_without_repetition_give_no_interval():
    assert (
        echo.CostModel.from_samples([1, 2, 4, 8], [1.0, 1.0, 2.0, 4.0]).knee.k_max_interval is None
    )


def test_wild_samples_hardly_move_the_fit():
    rng, law = np.random.default_rng(0), echo.cost.Knee(16, 0.03, 0.05)
    tokens = np.tile([1, 8, 16, 32, 64], 9)
    seconds = np.array([law(k) * (1 + 0.01 * rng.normal()) for k in tokens])
    wild = seconds.copy()
    wild[rng.choice(len(tokens), 6, replace=False)] *= 20.0
    for k in (1, 16, 64):
        assert echo.CostModel.from_samples(tokens, wild)(k) == pytest.approx(law(k), rel=0.03)


def test_requests_context_and_prefill_are_told_apart():
    rng, law = np.random.default_rng(1), echo.cost.Knee(64, 0.02, 0.01)
    requests, context = rng.choice([1, 8, 32], 400), rng.integers(0, 40_000, 400)
    base, tokens = rng.choice([0, 0, 0, 100], 400), requests * rng.integers(1, 9, 400)
    seconds = [
        law(r + b) + 1e-4 * (q - 1) + 2e-7 * c
        for r, b, q, c in zip(tokens, base, requests, context, strict=True)
    ]
    model = echo.CostModel.from_samples(
        tokens, seconds, num_reqs=requests, context_tokens=context, num_other_tokens=base
    )
    assert model.context_token == pytest.approx(2e-7, rel=0.02)
    assert model.request_seconds == pytest.approx([0.0, 7e-4, 31e-4], rel=0.03)
    assert model(132, num_reqs=32, context_tokens=1e4) == pytest.approx(
        law(132) + 31e-4 + 2e-3, rel=0.01
    )
    fixed = model.at(8, 1e4)
    assert fixed.num_tokens[0] == 8 and fixed(100) == pytest.approx(
        model(100, num_reqs=8, context_tokens=1e4)
    )
    assert fixed.load(8, 1e4) == 0.0


def test_the_knee_of_a_batch_starts_at_its_roots():
    """A mixture of experts is flat only from where all experts are read."""
    model = echo.CostModel((1, 16, 64, 256, 512), (1.0, 4.0, 5.0, 5.0, 9.0))
    assert model.knee.k_max < 64
    assert model.at(64).knee.k_max == 256
    assert model.at(1024)(1024) == pytest.approx(model(1024))
    assert model.at(1024)(2000) == pytest.approx(model(2000))


def test_flat_and_steep_curves():
    assert echo.CostModel.from_samples([1, 8, 64], [1.0, 1.0, 1.0]).knee == echo.cost.Knee(
        64, pytest.approx(1.0), 0.0
    )
    assert echo.CostModel.from_samples([1, 2, 4], [1.0, 2.0, 4.0]).knee.k_max == 1
    assert echo.CostModel.from_samples([5], [1.0]).knee.k_max == 5


def test_tiers_are_paid_in_full():
    model = echo.CostModel.from_samples([1, 100], [1.0, 100.0], tiers=[8, 16, 64])
    assert model.round_up(9) == 16
    assert model(9) == model(16) == 16.0
    assert model.round_up(np.array([1, 16, 17, 70])).tolist() == [8, 16, 64, 70]


def test_tokens_within_a_cost():
    model = echo.CostModel.from_samples([1, 16, 64], [1.0, 1.0, 4.0])
    assert model.tokens_within(1.0) == 16
    assert model.tokens_within(2.0) == 32
    assert model.tokens_within(99) == 64
    with pytest.raises(echo.EchoError, match=r"factor: expected a number >= 1.0, got 0.5"):
        model.tokens_within(0.5)


def test_draft_cost():
    model = echo.CostModel((1,), (1.0,), draft_layer=0.2, draft_token=0.01)
    assert model.draft_seconds(3, 2, 4) == pytest.approx(
        3 * 0.2 + 0.01 * 2 * (1 + 4 + 4)
    )  # the first layer expands the roots only
    assert model.draft_seconds([0, 1], 8, 4) == pytest.approx([0.0, 0.28])


def test_draft_extend():
    model = echo.CostModel((1,), (1.0,), draft_layer=0.2, draft_token=0.01)
    assert model.extend_seconds(0) == 0.0
    assert model.extend_seconds(30) == pytest.approx(
        0.2 + 0.3
    )  # unmeasured: one layer over the tokens
    measured = echo.CostModel((1,), (1.0,), draft_layer=0.2, draft_token=0.01, extend_token=0.002)
    assert measured.extend_seconds(30) == pytest.approx(0.26)
    fixed, each = echo.cost.line([1, 10, 100, 100], [1.01, 1.1, 2.0, 50.0])
    assert (fixed, each) == pytest.approx((1.0, 0.01), rel=1e-3)


def sglang_seconds(table: str, requests: int, tokens: int) -> float:
    """The reader's formula: bias + alpha(requests) + theta(tokens), clamped at both ends."""
    t = json.loads(table)
    theta = np.interp(tokens, t["m_probes"], t["theta_seconds"])
    return t["bias_seconds"] + np.interp(requests, t["bs_probes"], t["alpha_seconds"]) + theta


@pytest.mark.parametrize("tiers", [(), (8, 16, 40)])
def test_sglangs_additive_table_says_the_same_seconds(tiers):
    model = echo.CostModel(
        (1, 8, 20, 40),
        (1.0, 1.1, 1.5, 3.0),
        tiers=tiers,
        num_reqs=(1, 4, 8),
        request_seconds=(0.0, 0.1, 0.3),
    )
    table = model.to_sglang()
    again = echo.CostModel.from_sglang(table)
    for tokens in range(1, 41):
        for requests in (1, 3, 8):
            assert sglang_seconds(table, requests, tokens) == pytest.approx(
                model(tokens, num_reqs=requests)
            )
            assert again(tokens, num_reqs=requests) == pytest.approx(
                model(tokens, num_reqs=requests)
            )


def test_sglangs_table_of_rates_is_a_step_function():
    table = {
        "sample_batch_tokens": [1, 8, 32],
        "sample_steps_per_sec": [10.0, 11.0, 2.0],
        "max_batch_tokens": 64,
    }
    model = echo.CostModel.from_sglang(json.dumps(table))
    first = (0.1 + 1 / 11) / 2  # its noise made 8 tokens quicker than 1
    assert [model(r) for r in (1, 7, 8, 31, 32, 500)] == pytest.approx([first] * 4 + [0.5] * 2)


@pytest.mark.parametrize(
    "model",
    [
        echo.CostModel((1, 64, 512), (1.0, 1.1, 4.0), tiers=(8, 64, 512)),
        echo.CostModel((5,), (1.0,)),
    ],
)
def test_plot_draws(model, tmp_path):
    pytest.importorskip("matplotlib")
    model.plot().savefig(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_profile_times_every_token_count_after_a_warm_up():
    calls = []
    tokens, seconds = echo.cost.profile(calls.append, [1, 4], repeats=3)
    assert calls == [1, 4] * 4
    assert tokens.tolist() == [1, 4] * 3
    assert (seconds > 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_reads_the_devices_clock():
    """The host returns at once; the device sleeps a million cycles a token."""
    tokens, seconds = echo.cost.profile(
        lambda r: torch.cuda._sleep(r * 1_000_000), [1, 4, 16], repeats=3, device="cuda"
    )
    model = echo.CostModel.from_samples(tokens, seconds)
    assert model(16) / model(4) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: echo.CostModel.from_samples([], []),
            r"seconds: expected as many as num_tokens \(0, at least 1\), got 0",
        ),
        (
            lambda: echo.CostModel.from_samples([1, 2], [1.0]),
            r"seconds: expected as many as num_tokens",
        ),
        (
            lambda: echo.CostModel.from_samples([0], [1.0]),
            "num_tokens: expected at least 1 in every sample, got 0",
        ),
        (
            lambda: echo.CostModel.from_samples([1], [1.0], context_tokens=[-1]),
            "context_tokens: expected at least 0 in every sample, got -1",
        ),
        (
            lambda: echo.CostModel.from_samples([1], [float("nan")]),
            "seconds: expected a positive number in every sample",
        ),
        (
            lambda: echo.CostModel.from_samples(None, [1.0]),
            "num_tokens: expected numbers, got ValueError: no samples",
        ),
        (lambda: echo.CostModel.from_samples(["a"], [1.0]), "num_tokens: expected numbers"),
        (lambda: echo.CostModel.from_samples([1], None), "seconds: expected numbers"),
        (lambda: echo.CostModel.from_samples([1], [1.0], tiers=5), "tiers: expected ints"),
        (lambda: echo.cost.line(None, [1.0]), "amount: expected numbers"),
        (lambda: echo.cost.profile(print, 5), "num_tokens: expected ints"),
        (lambda: ONE.extrapolated(1, num_reqs=0), "num_reqs: expected a number >= 1, got 0"),
        (lambda: ONE.interval(1, num_reqs=0), "num_reqs: expected a number >= 1, got 0"),
        (lambda: ONE.update(1, 1.0, num_reqs=0), "num_reqs: expected a number >= 1, got 0"),
        (lambda: ONE.update(1, 1.0, context_tokens=-1), "context_tokens: expected a number >= 0"),
        (
            lambda: echo.CostModel((1,), (1.0,), num_reqs=(1, 2)),
            "num_reqs: expected increasing ints >= 1, as many as request_seconds",
        ),
        (
            lambda: echo.CostModel((1,), (1.0,), num_reqs=(1,), request_seconds=(0.1,)),
            "request_seconds: expected 0 at the fewest",
        ),
        (lambda: echo.CostModel.from_sglang("{}"), "cost: expected one of SGLang's cost tables"),
        (lambda: echo.CostModel((2, 1), (1.0, 1.0)), "num_tokens: expected increasing ints"),
        (lambda: echo.CostModel((1, 2), (2.0, 1.0)), "seconds: expected positive, non-decreasing"),
        (lambda: echo.CostModel((1,), (1.0,), tiers=(4, 2)), "tiers: expected increasing"),
        (
            lambda: echo.CostModel((1,), (1.0,), draft_layer=-1),
            "draft_layer: expected a number >= 0",
        ),
        (
            lambda: echo.CostModel((1,), (1.0,), context_len=float("inf")),
            "context_len: expected a number >= 0.0, got inf",
        ),
        (
            lambda: echo.CostModel((1,), (1.0,), tokens_per_req=(1, 2), context_factors=(1.0, 2.5)),
            "context_factors: expected 1 at one token, rising at most in proportion",
        ),
        (
            lambda: echo.CostModel((1,), (1.0,), measured=((1, 2),)),
            "measured: expected five numbers",
        ),
        (lambda: echo.CostModel((1,), (1.0,), error=-0.1), "error: expected a number >= 0.0"),
        (lambda: echo.CostModel.from_json("{"), "cost: expected the JSON of a CostModel"),
        (
            lambda: echo.CostModel.from_json('{"format": "x", "version": 1}'),
            "cost: expected the JSON of a CostModel",
        ),
        (lambda: echo.cost.profile(print, []), "num_tokens: expected at least one token count"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()


def test_a_wrong_curve_learns_where_the_engine_goes():
    truth = echo.CostModel(
        (1, 256, 1024), (1.0, 1.0, 4.0), num_reqs=(1, 64), request_seconds=(0.0, 0.5)
    )
    belief = echo.CostModel(
        (1, 64, 512, 2048), (2.0, 2.0, 2.1, 9.0), num_reqs=(1, 64), request_seconds=(0.0, 0.5)
    )
    visited = np.random.default_rng(0).choice([8, 32, 100, 256, 300, 600, 900], 400)
    for tokens in visited.tolist():
        belief = belief.update(tokens, truth(tokens, num_reqs=32), num_reqs=32)
        assert (np.diff(belief.seconds) >= 0).all()
    for tokens in set(visited.tolist()):
        assert belief(tokens) == pytest.approx(truth(tokens), rel=0.1)
    assert len(belief.num_tokens) <= 4 + 7


def test_one_late_step_does_not_turn_the_curve():
    model = echo.CostModel((1, 64), (1.0, 1.0))
    assert model.update(64, 1000.0).seconds == pytest.approx((1.0, 1.3))
    assert model.update(64, 1.0).seconds == (1.0, 1.0)
    tiered = echo.CostModel((1, 64), (1.0, 1.0), tiers=(32, 64))
    assert tiered.update(5, 2.0, rate=1.0).num_tokens == (1, 32, 64)  # the tier that was launched
    with pytest.raises(echo.EchoError, match=r"rate: expected a number from 0\.0 to 1\.0, got 2"):
        model.update(64, 1.0, rate=2)


def test_what_a_step_shows_is_shared_by_relative_change():
    """Context believed ten times as dear is what is corrected, not the curve over tokens."""
    model = echo.CostModel((1, 64, 256), (1.0, 1.0, 2.0), context_token=1e-4)
    once = model.update(64, 1.2, context_tokens=100_000)
    assert once.seconds == pytest.approx((1.0, 1.0, 2.0), rel=0.02)
    assert once(64, context_tokens=100_000) == pytest.approx(11 - 0.1 * 9.8)
    for _ in range(300):
        model = model.update(64, 8.0, context_tokens=100_000)
    assert model(64, context_tokens=100_000) == pytest.approx(8.0)
    assert model.seconds[1] > 0.9 and model.context_token == pytest.approx(0.7e-4, rel=0.02)


def test_all_parts_of_a_wrong_model_are_learned():
    """A step of many loads tells them apart."""
    rng, reqs = np.random.default_rng(0), (1, 64)
    truth = echo.CostModel(
        (1, 256, 1024),
        (0.01, 0.01, 0.04),
        num_reqs=reqs,
        request_seconds=(0, 0.003),
        context_token=2e-7,
    )
    model = echo.CostModel(
        (1, 64, 2048),
        (0.02, 0.02, 0.09),
        num_reqs=reqs,
        request_seconds=(0, 0.001),
        context_token=1e-6,
    )
    errors = []
    for _ in range(1000):
        count = int(rng.choice([1, 8, 32, 64]))
        load = {"num_reqs": count, "context_tokens": count * float(rng.integers(100, 8000))}
        tokens = count * int(rng.choice([1, 2, 4, 8, 16]))
        seconds = truth(tokens, **load)
        errors.append(abs(model(tokens, **load) / seconds - 1))
        model = model.update(tokens, seconds * np.exp(0.05 * rng.normal()), **load)
    assert np.median(errors[:50]) > 0.1 and np.median(errors[-300:]) < 0.03
    assert model.context_token == pytest.approx(truth.context_token, rel=0.1)


update = {
    "num_tokens": st.integers(1, 400),
    "seconds": st.floats(1e-9, 1e6),
    "num_reqs": st.integers(1, 100),
    "context_tokens": st.floats(0, 1e6),
    "rate": st.floats(0, 1),
}


@given(st.lists(st.fixed_dictionaries(update), min_size=1, max_size=30))
def test_any_steps_leave_a_model(steps):
    model = echo.CostModel(
        (1, 64, 256),
        (1.0, 1.0, 2.0),
        num_reqs=(1, 8),
        request_seconds=(0.0, 3.0),
        context_token=1e-4,
    )
    for step in steps:
        load = {name: step[name] for name in ("num_tokens", "num_reqs", "context_tokens")}
        old, model = model(**load), model.update(**step)
        low, high = sorted((old, step["seconds"]))
        assert low * (1 - 1e-9) <= model(**load) <= high * (1 + 1e-9)


def test_sglangs_table_is_the_nearest_at_the_measured_context():
    model = echo.CostModel.from_samples(**measured.machines()[EXPERTS])
    table = model.to_sglang()
    for reqs, tokens in [(1, 8), (8, 64), (64, 256), (256, 1024)]:
        expected = model(tokens, num_reqs=reqs)
        assert sglang_seconds(table, reqs, tokens) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_a_model_of_numpy_numbers_is_written_compared_and_hashed_as_any(make):
    plain = echo.CostModel(
        (1, 8, 64),
        (1.0, 1.0, 2.0),
        0.5,
        tiers=(8, 64),
        num_reqs=(1, 4),
        request_seconds=(0.0, 0.25),
        k_max_interval=(3, 4),
    )
    tokens, seconds = make([1, 8, 64]), make([1.0, 1.0, 2.0])
    reqs = {
        "num_reqs": make([1, 4]),
        "request_seconds": make([0.0, 0.25]),
        "k_max_interval": make([3, 4]),
    }
    model = echo.CostModel(tokens, seconds, np.float64(0.5), tiers=make([8, 64]), **reqs)
    assert model == plain and hash(model) == hash(plain)
    assert model.to_json() == plain.to_json() and echo.CostModel.from_json(model.to_json()) == model
    assert (
        all(type(count) is int for count in (*model.num_tokens, *model.tiers))
        and type(model.draft_layer) is float
    )
    assert echo.BeamMassGate(make([1, 3]), -1.0, 2) == echo.BeamMassGate((1, 3), -1.0, 2)
    with pytest.raises(echo.EchoError, match="num_tokens: expected ints"):
        echo.CostModel(make([1.5, 2.0]), seconds[:2])
    with pytest.raises(echo.EchoError, match="tiers: expected ints"):
        echo.CostModel(tokens, seconds, tiers=make([float("nan")]))
