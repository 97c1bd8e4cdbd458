"""How does every policy do on the same recorded drafts? Throughput over plain decoding, by batch size and cost shape.

    make replay                                        # the shipped trace, under 3 minutes on two cores
    python benchmarks/replay.py --trace other.npz      # a larger one, made by examples/smollm2/record.py

Calibration and tuning use one half of the texts, the figures the other half, with 95% intervals from a block bootstrap over
steps. Plain decoding of B requests costs T(B) a step. The oracle verifies what will be accepted and nothing else, at its best
depth. Writes benchmarks/results/replay.json and replay.png.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import echo
from common.policies import BASELINES, CHAINS, POLICIES, Setting, chain_trace, oracle_trace
from common.replays import (
    FREE,
    HERE,
    LAG,
    Steps,
    arguments,
    by_batch,
    calibrate,
    describe,
    fold,
    halves,
    ratio_interval,
    run,
    shapes,
    warm_up,
    write,
)
from echo import plot
from echo.testing import Trace

BATCHES = (1, 8, 32, 64, 128, 256)
STEPS = {1: 320, 8: 160, 32: 80, 64: 60, 128: 40, 256: 32}
Scheduler = echo.ElasticBudgetScheduler
LONG = 400
"""Steps of the runs of goodput and the best baseline that show what probes and the drafter's reading up cost where nothing is won."""
PAIRED = {8: 600, 64: 240}
"""Steps by batch in which trees and chains are compared at equal rows."""


def column(path: Path, batch: int, costs: dict[str, echo.CostModel]) -> list[dict[str, object]]:
    """All policies and cost shapes at one batch size."""
    torch.set_num_threads(1)
    tune, test = halves(Trace.load(path))
    calibration, log = calibrate(tune), warm_up(tune).log
    drafts = {
        name: (chain_trace(tune), chain_trace(test)) if name in CHAINS else (tune, test)
        for name in POLICIES
    }
    cells: list[dict[str, object]] = []
    cache: dict[tuple[bool, int, str], Steps] = {}

    def steps(
        name: str, half: int, scheduler: echo.ElasticBudgetScheduler, cost: echo.CostModel
    ) -> Steps:
        if isinstance(scheduler.budget, echo.CostModel):
            return run(drafts[name][half], scheduler, cost, batch, STEPS[batch], lag=LAG)
        key = name in CHAINS, half, describe(scheduler)
        if key not in cache:
            cache[key] = run(
                drafts[name][half],
                scheduler,
                cost,
                batch,
                STEPS[batch] if half else STEPS[batch] // 2,
                lag=LAG,
            )
        return cache[key]

    for shape, cost in costs.items():
        tuned: dict[str, Scheduler] = {}
        for name, policy in POLICIES.items():
            candidates = list(policy(Setting(calibration, cost, batch, tune.depth, tune.beam, log)))
            best = (
                max(candidates, key=lambda s: steps(name, 0, s, cost).ratio(cost))
                if len(candidates) > 1
                else candidates[0]
            )
            found, tuned[name] = steps(name, 1, best, cost), best
            low, high = found.interval(cost)
            cells.append(
                {
                    "shape": shape,
                    "batch": batch,
                    "policy": name,
                    "ratio": found.ratio(cost),
                    "low": low,
                    "high": high,
                }
            )
        assert cells[-1]["policy"] == "goodput tree"
        rival = max(BASELINES, key=lambda name: steps(name, 1, tuned[name], cost).ratio(cost))
        for key, name in (("long", "goodput tree"), ("long_baseline", rival)):
            cells[-1][key] = run(drafts[name][1], tuned[name], cost, batch, LONG, lag=LAG).ratio(
                cost
            )
    seen = oracle_trace(test)
    found_at = [
        run(
            seen,
            Scheduler(echo.GlobalRank(test.beam), None, (1 + d) * batch, d),
            cost,
            batch,
            STEPS[batch],
            exact=True,
        )
        for d in (1, 2, 3, 4, 6, test.depth)
    ]
    for shape, cost in costs.items():
        best_found = max(found_at, key=lambda found: found.ratio(cost))
        ratio, (low, high) = best_found.ratio(cost), best_found.interval(cost)
        if ratio < 1:  # an oracle may also not speculate
            ratio = low = high = 1.0
        cells.append(
            {
                "shape": shape,
                "batch": batch,
                "policy": "oracle",
                "ratio": ratio,
                "low": low,
                "high": high,
            }
        )
    return cells


def trees_and_chains(path: Path, batch: int) -> list[dict[str, float]]:
    """What trees emit over what chains emit, as many rows dealt by one ranking to both, without regard to cost."""
    torch.set_num_threads(1)
    tune, test = halves(Trace.load(path))
    calibration = calibrate(tune)
    found = []
    for each in (1.5, 2, 3, 4, 6, 8, 12, 16):
        rows, tokens = int(each * batch), []
        for trace, beam in ((test, test.beam), (chain_trace(test), 1)):
            scheduler = Scheduler(echo.GlobalRank(beam, calibration), None, rows, test.depth)
            tokens.append(run(trace, scheduler, FREE, batch, PAIRED[batch]).tokens)
        low, high = ratio_interval(*tokens)
        found.append(
            {
                "batch": batch,
                "rows_each": each,
                "ratio": float(tokens[0].sum() / tokens[1].sum()),
                "low": low,
                "high": high,
            }
        )
    return found


def show(console: Console, cells: list[dict[str, object]]) -> None:
    """One table a cost shape: policies down, batch sizes across."""
    for shape in dict.fromkeys(str(c["shape"]) for c in cells):
        table = Table(title=f"throughput / plain decoding: {shape}", header_style="bold")
        table.add_column("policy")
        for batch in BATCHES:
            table.add_column(f"batch {batch}", justify="right")
        for name in [*POLICIES, "oracle"]:
            row = {c["batch"]: c for c in cells if c["shape"] == shape and c["policy"] == name}
            texts = [
                f"{row[b]['ratio']:.2f} ±{(float(row[b]['high']) - float(row[b]['low'])) / 2:.2f}"
                for b in BATCHES
            ]
            table.add_row(
                name,
                *texts,
                style="bold" if name == "goodput tree" else "dim" if name == "oracle" else None,
            )
        console.print(table)


def draw(cells: list[dict[str, object]], path: Path) -> None:
    """One panel a cost shape."""
    shown = (
        "EAGLE tree",
        "ECHO (paper)",
        "ECHO, goodput gates",
        "global top-K",
        "goodput tree",
        "oracle",
    )
    names = list(dict.fromkeys(str(c["shape"]) for c in cells))
    with plot.figure(3.1 * len(names), 3.4) as figure:
        axes = figure.subplots(1, len(names), sharey=True)
        for axis, shape in zip(axes, names, strict=True):
            for name in shown:
                row = {
                    int(str(c["batch"])): c
                    for c in cells
                    if c["shape"] == shape and c["policy"] == name
                }
                ratio, low, high = (
                    [float(str(row[b][key])) for b in BATCHES] for key in ("ratio", "low", "high")
                )
                line = "o--" if name == "ECHO, goodput gates" else "o-"
                axis.plot(
                    BATCHES,
                    ratio,
                    line,
                    ms=3,
                    color=plot.of(name),
                    label=name,
                    lw=1 if name == "oracle" else 1.8,
                )
                axis.fill_between(BATCHES, low, high, color=plot.of(name), alpha=0.15, lw=0)
            by_batch(axis, BATCHES)
            axis.set_title(shape)
            axis.set_xlabel("batch")
        axes[0].set_ylabel("throughput / plain decoding")
        axes[0].set_ylim(0)
        axes[-1].legend()
        figure.savefig(path, dpi=100)


def main() -> None:
    """Runs all cells."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--cost",
        type=Path,
        default=HERE / "results" / "cost.json",
        help="this machine's measured curve",
    )
    args = parser.parse_args()
    console, start = Console(), time.perf_counter()
    costs = shapes(args.cost)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        order = sorted(BATCHES, reverse=True)
        cells = [
            cell
            for part in pool.map(column, [args.trace] * len(order), order, [costs] * len(order))
            for cell in part
        ]
        chains = [
            row
            for part in pool.map(trees_and_chains, [args.trace] * len(PAIRED), PAIRED)
            for row in part
        ]
    show(console, cells)
    table = Table(title="tokens of trees / tokens of chains, at equal rows", header_style="bold")
    for name in (
        "rows a request",
        *(f"{row['rows_each']:g}" for row in chains if row["batch"] == 8),
    ):
        table.add_column(name, justify="right")
    for batch in PAIRED:
        table.add_row(
            f"batch {batch}", *(f"{row['ratio']:.3f}" for row in chains if row["batch"] == batch)
        )
    console.print(table)
    long = np.array(
        [
            [cell["long"], cell["long"] / max(1.0, cell["long_baseline"])]
            for cell in cells
            if "long" in cell
        ]
    ).min(axis=0)
    console.print(
        f"goodput over {LONG} steps: at least {long[0]:.3f} of plain decoding, {long[1]:.3f} of the best tuned baseline"
    )
    write(
        args.out / "replay.json",
        {
            "trace": args.trace.name,
            "cells": fold(cells, "shape", "policy"),
            "trees_over_chains": fold(chains),
        },
    )
    draw(cells, args.out / "replay.png")
    console.print(
        f"{args.out / 'replay.json'} and replay.png written; {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
