"""CPU time of a plan on one thread: ranking and dealing, growing a layer, the forecast; beside SGLang's chain planner in the same run.

    pip install --no-deps --target PEERS sglang==0.5.23                 # 40 MB; nothing that it depends on is needed
    PYTHONPATH=PEERS python benchmarks/plan.py [--seconds 60] [--out benchmarks/results/plan.json]

Ours ranks trees: it calibrates each node's probability along its path, ranks all nodes of all requests in one declared order, holds each
request to its own limit and deals exactly the rows that are left. Theirs, ``ScheduleVerifyLensTopk`` on its own torch path, plans
chains: it multiplies confidences along each request's chain, ranks all positions of all requests, and returns how far each chain is
verified; there are no parents, and no limit but the chain's length. Both see as many candidates and buy as many rows. They take turns,
every call gets other numbers than the one before, so that no branch predictor learns them, and all run under
``torch.inference_mode``, as engines do.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import echo
from echo import style

BATCH, ROWS = 256, 1024
SHAPES = {64: (4, (16, 4, 4, 4)), 512: (8, (64, *[8] * 7))}
"""Candidates of a request: nodes drafted on in a layer, and for each layer the candidates of each such node."""
POOLS, TURN = 8, 20
Call = Callable[[int], Any]


def calibration() -> echo.Calibration:
    """From drafts whose confidence says a little too much."""
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000).astype(np.float32)
    return echo.calibrate(echo.WarmupLog.from_arrays(rng.integers(1, 9, 20_000), confidence, rng.random(20_000) < confidence**1.3))


def drafts(tree: echo.SuperTree, k: int, generator: torch.Generator, sharpness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities for every node of the frontier, of requests that differ in how sure their draft is."""
    shape = (*tree.frontier.token.shape, k)
    return torch.randint(0, 32000, shape, generator=generator), (sharpness * torch.randn(shape, generator=generator)).log_softmax(-1)


def steps(
    scheduler: echo.ElasticBudgetScheduler, batch: int, rows: int, layers: tuple[int, ...], pools: int = POOLS
) -> list[tuple[Any, ...]]:
    """Forests ready to be planned, each with the forest a layer before and the drafts of that layer."""
    made = []
    for seed in range(pools):
        generator = torch.Generator().manual_seed(seed)
        sharpness = 0.3 + 4 * torch.rand(batch, 1, 1, generator=generator)
        tree = scheduler.plant(torch.arange(batch), rows=rows)
        for k in layers:
            before, drafted = tree, drafts(tree, k, generator, sharpness)
            tree = scheduler.grow(tree, *drafted)
        made.append((tree, before, *drafted))
    return made


def peer() -> Any:
    """``ScheduleVerifyLensTopk`` of the installed wheel, imported without the engine around it; None where there is no wheel."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = next(iter(spec.submodule_search_locations))
    for name in ("", ".kernels", ".kernels.ops", ".kernels.ops.speculative", ".kernels.ops.speculative.dspark"):
        package = types.ModuleType(f"sglang{name}")
        package.__path__ = [folder + name.replace(".", "/")]
        sys.modules[package.__name__] = package
    return importlib.import_module("sglang.kernels.ops.speculative.dspark.dspark_schedule").ScheduleVerifyLensTopk


def chains(planner: Any, batch: int, candidates: int, extra: int) -> Call:
    """Their plan of ``extra`` rows among chains of that many candidates; the settings are its defaults."""
    settings = types.SimpleNamespace(min_verify_len=1, survival_eps=1e-6, resolved_max_verify_len=lambda: candidates + 1)
    generator = torch.Generator().manual_seed(0)
    confidence = 1 - 12 / candidates * torch.rand(POOLS, batch, candidates, generator=generator)  # nearly all reach its least survival
    return lambda i: planner.torch(confidence=confidence[i % POOLS], budget=extra, cfg=settings)


def timed(calls: dict[str, Call], seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of each call, in turns of twenty calls each, after one that compiles and one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 2:
        for name, call in calls.items():
            for i in range(TURN):
                start = time.perf_counter()
                call(turn * TURN + i)
                times[name].append(1e6 * (time.perf_counter() - start))
        turn += 1
    kept = {name: np.array(own[TURN:]) for name, own in times.items()}
    return {
        name: {"median_us": round(float(np.median(own)), 1), "p99_us": round(float(np.percentile(own, 99)), 1), "calls": len(own)}
        for name, own in kept.items()
    }


def plans(planner: Any, seconds: float, compiled: bool) -> dict[str, dict[str, float]]:
    """The whole table at 256 requests and 1,024 rows."""
    table: dict[str, dict[str, float]] = {}
    for candidates, (beam, layers) in SHAPES.items():
        calls: dict[str, Call] = {}
        for name, reliability in (("", None), (", calibrated", calibration())):
            rule = echo.GlobalRank(beam, reliability)
            scheduler = echo.ElasticBudgetScheduler(rule, budget=ROWS, max_depth=len(layers))
            made = steps(scheduler, BATCH, ROWS, layers)
            select = scheduler.select
            calls[f"select {candidates}{name}"] = lambda i, made=made, select=select: select(made[i % POOLS][0])
            if compiled:
                fast = torch.compile(scheduler.select, fullgraph=True)
                calls[f"select {candidates}{name}, compiled"] = lambda i, made=made, fast=fast: fast(made[i % POOLS][0])
            if reliability is None:
                grow = scheduler.grow
                calls[f"grow {candidates}"] = lambda i, made=made, grow=grow: grow(*made[i % POOLS][1:])
                if compiled:
                    fast_grow = torch.compile(scheduler.grow, fullgraph=True)
                    calls[f"grow {candidates}, compiled"] = lambda i, made=made, fast=fast_grow: fast(*made[i % POOLS][1:])
        if planner is not None:
            calls[f"sglang chains {candidates}"] = chains(planner, BATCH, candidates, ROWS - BATCH)
        table |= timed({name: call for name, call in calls.items() if "compiled" not in name}, seconds)
        if compiled:
            table |= timed({name: call for name, call in calls.items() if "compiled" in name}, seconds / 2)
    return table


def forecast() -> Call:
    """The host's decision from a history of twenty steps, of a scheduler with a cost model."""
    cost = echo.CostModel((1, 64, 256, 512, 1024, 2048), (1.0, 1.1, 1.4, 2.0, 3.5, 7.0), 0.05, 0.0001, (256, 384, 512, 768, 1024, 2048))
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(4, calibration()), None, cost, 4)
    histories = [scheduler.history(BATCH)]
    slots = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    for tree, *_ in steps(scheduler, BATCH, ROWS, SHAPES[64][1], pools=20):
        packed = scheduler.pack(tree)
        histories.append(histories[-1].observe(slots, packed, echo.verify(packed, packed.tokens.roll(-1))))
    return lambda i: scheduler.forecast(histories[-1 - i % POOLS], slots)


def growth(planner: Any, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Ranking and dealing of 64 candidates a request: by requests at four rows each, and by rows at 256 requests."""
    beam, layers = SHAPES[64]
    lines: dict[str, list[dict[str, float]]] = {"requests": [], "rows": []}
    sizes = [("requests", b, 4 * b) for b in (1, 4, 16, 64, 256, 1024, 4096)] + [("rows", BATCH, n * BATCH) for n in (2, 4, 8, 16, 32)]
    for line, batch, rows in sizes:
        scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(beam), budget=rows, max_depth=len(layers))
        made = steps(scheduler, batch, rows, layers)
        calls: dict[str, Call] = {"ours": lambda i, made=made, select=scheduler.select: select(made[i % POOLS][0])}
        if planner is not None:
            calls["sglang chains"] = chains(planner, batch, 64, rows - batch)
        row = {name: own["median_us"] for name, own in timed(calls, seconds / len(sizes)).items()}
        lines[line].append({"requests": batch, "rows": rows, **row})
    return lines


def plot(lines: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Both growth lines, on logarithmic axes, with the slope of what is linear."""
    with style.figure(9, 3.6) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (line, points) in zip(axes, lines.items(), strict=True):
            x = [point[line] for point in points]
            for name, colour in (("ours", style.GOOD), ("sglang chains", style.QUIET)):
                if name in points[0]:
                    label = "echo: trees" if name == "ours" else "SGLang 0.5.23: chains"
                    axis.loglog(x, [point[name] for point in points], "o-", color=colour, label=label)
            last = points[-1]["ours"]
            axis.loglog(x, [last * v / x[-1] for v in x], ":", color=style.INK, lw=0.8, label="linear")
            axis.set_xlabel("requests, 4 rows each" if line == "requests" else f"rows, {BATCH} requests")
            axis.set_xticks(x, [f"{v:,}" for v in x])
            axis.minorticks_off()
        axes[0].set_ylabel("microseconds, one thread")
        axes[0].set_ylim(bottom=min(points[0]["ours"] for points in lines.values()) / 2)
        axes[0].legend()
        figure.suptitle("Ranking and dealing, 64 candidates a request")
        figure.savefig(path, dpi=120)


@torch.inference_mode()
def main() -> None:
    """Times everything, prints a table, writes the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of timing, in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out, which takes a minute or two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    planner = peer()
    results = plans(planner, args.seconds / 6, not args.eager) | timed({"forecast": forecast()}, args.seconds / 20)
    lines = growth(planner, args.seconds * 9 / 20)
    facts = {
        "requests": BATCH, "rows": ROWS, "threads": 1, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "peer": "sglang 0.5.23" if planner is not None else None,
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": facts, "results": results, "growth": lines}, indent=1) + "\n")
    plot(lines, args.out.with_suffix(".png"))
    for name, row in results.items():
        print(f"{name:32} {row['median_us']:8.1f} us   p99 {row['p99_us']:8.1f}   {row['calls']:.0f} calls")


if __name__ == "__main__":
    main()
