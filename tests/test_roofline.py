"""The roofline by which the benchmarks plan: what physics allows, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import echo

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from common import roofline


@pytest.mark.parametrize("name", roofline.MODELS)
def test_rooflines_keep_to_physics(name):
    shape, model = roofline.MODELS[name], roofline.plan(name)
    single = roofline.plan(name, tensor=1)
    peak = roofline.H100
    read = 2 * (shape.weights - shape.vocab * shape.hidden) / peak.bandwidth / 8
    if not shape.experts:
        assert model(1) > read  # all weights but the embedding are read once
        assert model(64) / model(1) < 1.2  # flat below the knee
    assert (
        model(4096)
        > 2
        * 4096
        * shape.layers
        * (shape.attention_weights + max(1, shape.active) * shape.ffn_weights)
        / peak.flops
        / 8
    )
    assert single(512) > model(512)
    assert model.draft_seconds(1, 1) < model(1) / 10
    assert shape.weights / 1e9 == pytest.approx(
        float(name.split("-")[1 if "Qwen" in name else -1].rstrip("B")), rel=0.08
    )


def test_experts_are_read_as_tokens_reach_them():
    sparse = roofline.plan("Qwen3-235B-A22B")
    assert sparse(16) > 1.5 * sparse(1)  # more tokens, more experts
    assert sparse(256) < 1.15 * sparse(64)  # all are read by then
    grouped = roofline.plan("Qwen3-235B-A22B", expert=8)
    assert (grouped(np.arange(1, 4097)) >= sparse(np.arange(1, 4097)) * (1 - 1e-9)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roofline.plan("GPT-2"), "model: expected an Architecture or one of LLaMA"),
        (
            lambda: roofline.plan("Qwen3-8B", tensor=8, expert=3),
            "expert: expected a divisor of tensor",
        ),
        (lambda: roofline.plan("Qwen3-8B", most_rows=1), "most_rows: expected an int >= 2, got 1"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()
