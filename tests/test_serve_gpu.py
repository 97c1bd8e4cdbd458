"""The serving benchmark runs whole on the CPU, keeps its file whole, and counts as it says."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


POLICIES = (
    "plain",
    "EAGLE tree, 8 rows",
    "EAGLE tree, 32 rows",
    "ECHO",
    "global ranking",
    "throughput-optimal",
    "throughput-optimal, trimmed",
)


@pytest.fixture
def serve_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_gpu

    return serve_gpu


@pytest.fixture
def run(serve_gpu, monkeypatch, capsys):
    """The command's exit status and what it wrote."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["serve_gpu.py", *arguments])
        return serve_gpu.main(), *capsys.readouterr()

    return main


@pytest.mark.filterwarnings("ignore")
def test_dry_run(run, tmp_path):
    """All policies at two loads, random models: plain decoding's text, both panels in the file."""
    sizes = ["--lanes", "1", "2", "--quick", "1", "--new", "5", "--runs", "1"]
    sizes += ["--dtypes", "float32"]
    status, printed, _ = run("--device", "cpu", "--tiny", *sizes, "--out", str(tmp_path))
    assert status == 0
    found = json.loads((tmp_path / "serve-cpu.json").read_text())
    cells = {(cell["lanes"], cell["policy"]): cell for cell in found["cells"]}
    assert cells.keys() == set(itertools.product((1, 2), POLICIES))
    for (_, policy), cell in cells.items():
        assert cell["text"]["different"] == 0 and cell["tokens_per_s"] > 0
        if policy == "plain":
            assert cell["tokens_per_step"] == 1 and cell["library_over_bare"] > 0
    assert len(found["quick"]) == 2 and len(found["shape"]) == 2 * len(POLICIES)
    assert "ratio" in printed and not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run in full")
def test_without_a_device_it_says_so(run):
    status, printed, errors = run()
    assert status == 2 and "no CUDA device" in printed and not errors


def test_times_of_parts(serve_gpu):
    """Two steps of 10 ms, without a part for two milliseconds of the first, one of the second."""

    class Event(float):
        def elapsed_time(self, other):
            return other - self

    event = lambda *times: [(Event(a), Event(b)) for a, b in times]
    times = {
        "verify": event((103, 108), (112, 119)),
        "draft": event((100, 102), (109, 111)),
        "accept": event((108, 109), (119, 120)),
    }
    found = serve_gpu.parts(SimpleNamespace(times=times, device=torch.device("cpu")))
    assert found["ms"] == {"verify": 6.0, "draft": 2.0, "accept": 1.0, "rest": 1.0, "step": 10.0}
    assert found["waits"] == pytest.approx(0.1) and found["steps"] == 2


def test_one_cost_model_of_all_loads(serve_gpu):
    """Made of costs that follow the model, it is that model."""
    loads = [
        {
            "lanes": n,
            "verify": {n * each: 1e-3 + 1e-6 * n * each + 2e-6 * n for each in (1, 2, 4)},
            "draft_layer": 1e-4 + 4e-6 * n,
            "beside": 0.0,
        }
        for n in (1, 4, 16)
    ]
    cost = serve_gpu.one_cost(loads)
    assert cost(32, num_reqs=16) == pytest.approx(1e-3 + 32e-6 + 32e-6, rel=0.05)
    assert cost.draft_layer == pytest.approx(1e-4, rel=0.01)
    assert cost.draft_token == pytest.approx(1e-6, rel=0.01)


def test_trees_that_ask_for_too_many_rows_are_left_out(serve_gpu):
    from conftest import CALIBRATION
    from echo import CostModel

    cost = CostModel((1, 256, 2048), (1.0, 1.0, 8.0))
    assert tuple(serve_gpu.policies(1, CALIBRATION, cost)) == POLICIES
    many = serve_gpu.policies(256, CALIBRATION, cost)
    assert set(POLICIES) - set(many) == {"EAGLE tree, 32 rows"}
    for lanes in (1, 4, 16, 64, 256):
        tiers = serve_gpu.tiers(lanes)
        assert tiers[0] == lanes and tiers[-1] <= serve_gpu.cap(lanes) <= max(2048, 2 * lanes)


def test_the_figure(serve_gpu, tmp_path):
    pytest.importorskip("matplotlib")
    cells = [
        {"dtype": "float32", "lanes": n, "policy": name, "user": 100.0, "tokens_per_s": 100.0 * n}
        | {"rates": [90.0 * n, 110.0 * n]}
        for n in (1, 4)
        for name in POLICIES
    ]
    found = {"dtypes": ["float32", "bfloat16"], "cells": cells, "shape": cells}
    serve_gpu.draw(found, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 5000
    serve_gpu.draw({"dtypes": ["float32"]}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
