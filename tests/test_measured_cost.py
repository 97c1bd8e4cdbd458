"""Step times measured on an H100: predicted from a half of them, rising, bounded, and doubted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import echo
import measured

MACHINES = measured.machines()
EXPERTS, BOTH = "qwen3-235b, context 960", "llama-3.1-8b"


@pytest.mark.parametrize("name", MACHINES)
def test_half_of_a_measured_machines_samples_predict_the_other_half(name):
    columns, found = MACHINES[name], []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(columns["seconds"]))
        half, rest = (measured.part(columns, own) for own in np.array_split(order, 2))
        model = echo.CostModel.from_samples(**half)
        found.append(abs(model(**measured.load(rest)) / rest["seconds"] - 1))
    assert np.median([np.median(error) for error in found]) < 0.03


@pytest.mark.parametrize("name", MACHINES)
def test_a_measured_machine_rises_in_requests_tokens_and_context(name):
    model = echo.CostModel.from_samples(**MACHINES[name])
    reqs, tokens, context = np.meshgrid(
        np.geomspace(1, 400, 20).round(), np.geomspace(1, 4000, 40).round(), [0, 500, 1000, 9000]
    )
    seconds = model(tokens, num_reqs=reqs, context_tokens=reqs * context)
    for axis in range(3):
        assert (np.diff(seconds, axis=axis) >= -1e-12).all()


loads = st.tuples(st.integers(1, 64), st.integers(1, 32), st.floats(0, 9000), st.floats(1e-3, 1))


@pytest.mark.filterwarnings("ignore:CostModel")
@given(st.lists(loads, min_size=1, max_size=40))
def test_any_scattered_samples_give_a_model_that_rises_in_each(samples):
    reqs, each, context, seconds = np.array(samples).T
    model = echo.CostModel.from_samples(
        reqs * each, seconds, num_reqs=reqs, context_tokens=reqs * context
    )
    grid = np.meshgrid([1, 2, 7, 30, 90], [1, 5, 40, 300, 4000], [0, 800, 20_000])
    found = model(grid[1], num_reqs=grid[0], context_tokens=grid[0] * grid[2])
    assert found.min() > 0
    for axis in range(3):
        assert (np.diff(found, axis=axis) >= -1e-9 * found.max()).all()
    assert echo.CostModel.from_json(model.to_json()) == model


def test_tokens_are_free_only_while_their_context_is_read_once():
    flat = {"num_tokens": (1, 512), "seconds": (1.0, 1.0), "context_token": 1e-5}
    assert echo.CostModel(**flat).free_tokens(8, 4) == 512
    curve = {"tokens_per_req": (1, 4, 8, 16), "context_factors": (1.0, 1.0, 1.5, 3.0)}
    model = echo.CostModel(**flat, **curve)
    assert [model.free_tokens(8, reqs) for reqs in (1, 4, 64, 256)] == [8, 16, 256, 512]
    load = {"num_reqs": 4, "context_tokens": 4000}
    assert model(16, **load) == model(4, **load) < model(17, **load)


def test_experts_are_steepest_with_the_fewest_requests_and_have_no_knee_there():
    """As measured: 32 tokens cost 3.4 steps of one request, 1,024 cost 1.24 of 256."""
    model = echo.CostModel.from_samples(**MACHINES[EXPERTS])
    assert model(32) / model(1) == pytest.approx(3.4, abs=0.1)
    assert model(1024, num_reqs=256) / model(256, num_reqs=256) == pytest.approx(1.24, abs=0.03)
    assert not model.at(1).knee.bends and model.at(256).knee.bends
    dense = echo.CostModel.from_samples(**MACHINES["llama-3.3-70b, context 960"])
    assert dense.at(1).knee.bends and dense.at(256).knee.k_max > dense.at(1).knee.k_max > 100


def test_context_costs_more_where_a_request_has_more_tokens():
    """Attention reads context once for several tokens and computes for each."""
    model = echo.CostModel.from_samples(**MACHINES[BOTH])
    read = model(256, num_reqs=256, context_tokens=256 * 4000) - model(
        256, num_reqs=256, context_tokens=256 * 1000
    )
    computed = model(256, num_reqs=8, context_tokens=256 * 4000) - model(
        256, num_reqs=8, context_tokens=256 * 1000
    )
    assert computed > 1.3 * read > 0
    curve = model.at(8, 8 * 4000)
    for tokens in (8, 20, 100, 333, 2000):
        assert curve(tokens) == pytest.approx(model(tokens, num_reqs=8, context_tokens=8 * 4000))


def test_without_requests_context_is_a_slope():
    """How many tokens a request has is not known then."""
    rng = np.random.default_rng(0)
    tokens, context = rng.integers(1, 200, 99), rng.integers(0, 40_000, 99)
    seconds = 0.01 + 1e-4 * tokens + 2e-7 * context
    model = echo.CostModel.from_samples(tokens, seconds, context_tokens=context)
    assert model.context_token == pytest.approx(2e-7, rel=1e-3) and not model.context_factors
    assert model(100, num_reqs=4, context_tokens=3e4) == pytest.approx(0.026, rel=0.01)
    middle = float(np.median(context))  # of all requests together, where none is said
    assert model.context_len == middle
    for reqs in (1, 64):
        assert model(100, num_reqs=reqs) == model(100, context_tokens=middle)
        assert not model.extrapolated(100, num_reqs=reqs)
        assert model.extrapolated(100, num_reqs=reqs, context_tokens=1e9)


def test_intervals_hold_what_was_not_measured():
    inside = []
    for columns in MACHINES.values():
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(len(columns["seconds"]))
            half, rest = (measured.part(columns, own) for own in np.array_split(order, 2))
            model = echo.CostModel.from_samples(**half)
            for *load, seconds in zip(*measured.load(rest).values(), rest["seconds"], strict=True):
                tokens, reqs, context = map(float, load)
                given = {"num_reqs": reqs, "context_tokens": context}
                low, high = model.interval(tokens, **given)
                assert np.isnan(low) == model.extrapolated(tokens, **given)
                if not np.isnan(low):
                    inside.append(low <= seconds <= high)
    assert len(inside) > 250 and np.mean(inside) >= 0.9


def test_what_was_not_measured_is_extrapolated():
    model = echo.CostModel.from_samples(**MACHINES[BOTH])
    far, load = model.extrapolated, {"num_reqs": 32, "context_tokens": 32 * 2000}
    assert not far(256, **load) and not far(40, num_reqs=40, context_tokens=40 * 1500)
    assert far(4096, **load)  # more tokens than any sample of 32 requests
    assert far(256, num_reqs=32, context_tokens=32 * 9000)
    assert far(256, num_reqs=32, context_tokens=32 * 100)
    assert far(1024, num_reqs=512, context_tokens=512 * 1000)
    assert far(256, num_reqs=256, context_tokens=256 * 4000)  # measured with 128 at most
    assert np.isnan(model.interval(4096, **load)).all()
    bare = echo.CostModel((1, 64), (1.0, 1.0), num_reqs=(1, 8), request_seconds=(0.0, 0.1))
    assert not bare.extrapolated(64, num_reqs=8)
    assert bare.extrapolated(65) and bare.extrapolated(8, num_reqs=9)
    assert np.isnan(bare.interval(64)).all()  # no samples tell of its noise


def test_fewer_tokens_than_were_measured_are_extrapolated():
    rng = np.random.default_rng(0)
    reqs, tokens = rng.choice([1, 2, 4, 8, 16, 32], 200), rng.integers(512, 1025, 200)
    seconds = 0.01 + 1e-5 * tokens
    model = echo.CostModel.from_samples(tokens, seconds, num_reqs=reqs)
    assert not model.extrapolated(480, num_reqs=8) and model.extrapolated(1, num_reqs=1)
    assert np.isnan(model.interval(1)).all() and not np.isnan(model.interval(600)).any()
    plain = echo.CostModel.from_samples(tokens, seconds)
    assert not plain.extrapolated(600, num_reqs=9) and plain.extrapolated(400)
    bare = echo.CostModel((8, 64), (1.0, 1.0))
    assert not bare.extrapolated(8) and bare.extrapolated(7)


def test_a_context_of_which_nothing_is_known_is_extrapolated():
    columns = {"num_tokens": [1, 64, 256], "seconds": [1.0, 1.0, 2.0]}
    for model in (echo.CostModel(**columns), echo.CostModel.from_samples(**columns)):
        assert not model.extrapolated(64) and not model.extrapolated(64, context_tokens=0)
        assert model.extrapolated(64, context_tokens=1024)
    law = echo.CostModel(**columns, context_token=1e-6)
    assert not law.extrapolated(64, context_tokens=1024)


@pytest.mark.parametrize(
    ("contexts", "middle"),
    [([100] * 9 + [100_000], 100), ([512, 2048, 4096, 32_768], 2048), ([7], 7)],
)
def test_the_context_that_is_assumed_is_the_samples_median(contexts, middle):
    n = len(contexts)
    with pytest.warns(UserWarning, match="only"):
        model = echo.CostModel.from_samples(
            [8] * n, [0.01] * n, num_reqs=[4] * n, context_tokens=np.multiply(contexts, 4)
        )
    assert model.context_len == middle
    assert echo.CostModel.from_json(model.to_json()).context_len == middle


def test_the_context_that_was_measured_is_assumed():
    model = echo.CostModel.from_samples(**MACHINES[EXPERTS])
    assert model.context_len == 960
    assert model(64, num_reqs=8) == model(64, num_reqs=8, context_tokens=8 * 960)
    assert model.at(8)(64) == pytest.approx(model(64, num_reqs=8))


def test_a_measured_model_is_written_and_read():
    model = echo.CostModel.from_samples(**MACHINES[BOTH])
    assert echo.CostModel.from_json(model.to_json()) == model
    load = {"num_reqs": 64, "context_tokens": 64 * 4000}
    assert echo.CostModel.from_json(model.to_json()).extrapolated(9000, **load)
    # as the release before wrote it
    old = echo.CostModel((1, 8), (1.0, 2.0), num_reqs=(1,), request_seconds=(0.0,))
    text = json.loads(old.to_json()) | {"version": 2}
    for new in ("tokens_per_req", "context_factors", "measured", "error", "doubts"):
        del text[new]
    assert echo.CostModel.from_json(json.dumps(text)) == old


DOUBTFUL = {
    "samples fall: 1 tokens of 1 request.* took 4 s, 64 tokens .* took 1 s": {
        "num_tokens": [1, 8, 64],
        "seconds": [4.0, 2.0, 1.0],
    },
    "samples of 4 request.* only": {
        "num_tokens": [4, 8, 16],
        "seconds": [1.0, 1.0, 2.0],
        "num_reqs": [4, 4, 4],
    },
    "contexts up to 1000 and from 4000": {
        "num_tokens": [1, 8, 8, 16],
        "seconds": [1.0, 1.1, 2.0, 2.2],
        "num_reqs": [1, 1, 8, 8],
        "context_tokens": [1000, 1000, 8 * 4000, 8 * 4000],
    },
}


@pytest.mark.parametrize("doubt", DOUBTFUL)
def test_doubtful_samples_warn_and_mark_the_model(doubt):
    with pytest.warns(UserWarning, match=doubt):
        model = echo.CostModel.from_samples(**DOUBTFUL[doubt])
    assert len(model.doubts) == 1 and echo.CostModel.from_json(model.to_json()).doubts


def test_a_doubtful_model_says_where_it_guesses():
    with pytest.warns(UserWarning, match="only"):
        one = echo.CostModel.from_samples(**DOUBTFUL["samples of 4 request.* only"])
    assert not one.extrapolated(16, num_reqs=4) and one.extrapolated(16, num_reqs=8)
    with pytest.warns(UserWarning, match="told apart"):
        two = echo.CostModel.from_samples(**DOUBTFUL["contexts up to 1000 and from 4000"])
    assert not two.extrapolated(8, num_reqs=8, context_tokens=8 * 4000)
    assert all(two.extrapolated(4, num_reqs=4, context_tokens=4 * c) for c in (1000, 2000, 4000))


def test_good_samples_raise_no_doubt():
    for columns in MACHINES.values():
        assert echo.CostModel.from_samples(**columns).doubts == ()
