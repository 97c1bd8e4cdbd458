"""How does every policy do on the same recorded drafts? Throughput over plain decoding.

    make replay                                   # the shipped trace, about 15 minutes of one core
    python benchmarks/replay.py --share 0.1       # a glance
    python benchmarks/replay.py --trace other.npz # a larger one, made by examples/smollm2/record.py

Steps are charged what they took on one H100's share of four of the paper's models and on two cores
(common/machines.py); then by invented curves. Calibration and tuning use one half of the texts, the
figures the other half, with 95% intervals from a block bootstrap over steps. Plain decoding of B
requests costs T(B) a step. The oracle verifies what will be accepted and nothing else, at its best
depth; the row before it drafts all for nothing, and knows no more than each node's probability.
Last a day of a load that rises and falls, under one setting for the whole day. Writes
benchmarks/results/replay.json, replay.md and replay.png.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import echo
from common.machines import Machine, measured
from common.policies import (
    BASELINES,
    DEFAULT,
    POLICIES,
    SHAPES,
    Grove,
    Setting,
    chain_trace,
    known,
    oracle_trace,
    tree,
)
from common.replays import (
    FREE,
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
    short,
    staggered,
    warm_up,
    write,
)
from echo import plot
from echo.testing import Record, Trace, replay

BATCHES = (1, 8, 32, 64, 128, 256)
STEPS = {1: 800, 8: 250, 32: 100, 64: 80, 128: 70, 256: 60}
Scheduler = echo.ElasticBudgetScheduler
OURS, TRIMMED = "throughput-optimal tree", "throughput-optimal, trimmed"
BOUND = "drafts free, rows by their probabilities"
TUNED = 150
"""Steps on which a policy is tuned, at most; half as many as those of the figures otherwise."""
LONG = 200
"""Steps of the runs that show what probes and the drafter's extend cost if nothing is won."""
PAIRED = {8: 600, 64: 240}
"""Steps by batch in which trees and chains are compared at equal verify tokens."""
DAY, PEAK, PIECES = 16.0, 200.0, 240
"""A day in modelled seconds; the most requests of its mean; pieces in which their number stays."""


def column(
    path: Path, batch: int, costs: dict[str, echo.CostModel], share: float = 1.0
) -> list[dict[str, object]]:
    """All policies and cost models at one batch size."""
    torch.set_num_threads(1)
    tune, test = halves(Trace.load(path))
    calibration, log = calibrate(tune), warm_up(tune).log
    drafts = tune, staggered(test)
    count = max(20, int(share * STEPS[batch]))
    cells: list[dict[str, object]] = []
    cache: dict[tuple[int, str], Steps] = {}

    def steps(half: int, scheduler: Scheduler, cost: echo.CostModel) -> Steps:
        most = count if half else min(TUNED, max(16, count // 2))
        if isinstance(scheduler.budget, echo.CostModel):
            return run(drafts[half], scheduler, cost, batch, most, lag=LAG)
        key, exact = (half, describe(scheduler)), isinstance(scheduler.rule, Grove)
        if key not in cache:
            cache[key] = run(drafts[half], scheduler, FREE, batch, most, lag=LAG, exact=exact)
        return cache[key]

    def cell(name: str, shape: str, found: Steps, cost: echo.CostModel) -> dict[str, object]:
        low, high = found.interval(cost)
        ends = {"ratio": found.ratio(cost), "low": low, "high": high}
        return {"shape": shape, "batch": batch, "policy": name} | ends

    for shape, cost in costs.items():
        tuned: dict[str, Scheduler] = {}
        for name, policy in POLICIES.items():
            setting = Setting(calibration, cost, batch, tune.depth, tune.beam, log)
            candidates = list(policy(setting))
            if len(candidates) > 1:
                candidates.sort(key=lambda s: -steps(0, s, cost).ratio(cost))
            tuned[name] = candidates[0]
            cells.append(cell(name, shape, steps(1, tuned[name], cost), cost))
        rival = max(BASELINES, key=lambda name: steps(1, tuned[name], cost).ratio(cost))
        ours = next(c for c in reversed(cells) if c["policy"] == OURS)
        for key, name in (("long", OURS), ("long_baseline", rival)) if shape in measured() else ():
            exact = isinstance(tuned[name].rule, Grove)
            long = run(drafts[1], tuned[name], cost, batch, LONG, lag=LAG, exact=exact)
            ours[key] = long.ratio(cost)
        if shape in measured():
            bound = known(Setting(calibration, cost, batch, tune.depth, tune.beam))
            cells.append(cell(BOUND, shape, steps(1, bound, bound.budget), bound.budget))
    seen = oracle_trace(drafts[1])
    found_at = [
        run(
            seen,
            Scheduler(echo.GlobalRank(test.beam), None, (1 + d) * batch, d),
            FREE,
            batch,
            count,
            exact=True,
        )
        for d in (1, 2, 3, 4, 6, test.depth)
    ]
    for shape, cost in costs.items():
        # an oracle drafts one node a layer, and may also not speculate
        alone = [replace(found, beam=np.ones_like(found.beam)) for found in found_at]
        best = cell("oracle", shape, max(alone, key=lambda found: found.ratio(cost)), cost)
        cells.append(best if best["ratio"] > 1 else best | {"ratio": 1.0, "low": 1.0, "high": 1.0})
    return cells


def trees_and_chains(path: Path, batch: int) -> list[dict[str, float]]:
    """Tokens of trees over tokens of chains: one ranking, equal verify tokens, cost left out."""
    torch.set_num_threads(1)
    tune, test = halves(Trace.load(path))
    calibration = calibrate(tune)
    found = []
    for each in (1.5, 2, 3, 4, 6, 8, 12, 16):
        budget, tokens = int(each * batch), []
        for trace, beam in ((test, test.beam), (chain_trace(test), 1)):
            scheduler = Scheduler(echo.GlobalRank(beam, calibration), None, budget, test.depth)
            tokens.append(run(trace, scheduler, FREE, batch, PAIRED[batch]).tokens)
        low, high = ratio_interval(*tokens)
        ratio = float(tokens[0].sum() / tokens[1].sum())
        found.append({"batch": batch, "rows_each": each, "ratio": ratio, "low": low, "high": high})
    return found


@dataclass(frozen=True)
class ByLoad(Scheduler):
    """Throughput-optimal on a machine: the cost model is that of the step's requests."""

    costs: Callable[[int], echo.CostModel] | None = None

    def at(self, requests):
        return super(ByLoad, replace(self, budget=self.costs(requests)))

    def choose_tier(self, history, req_indices, num_other_tokens=0):
        return self.at(len(req_indices)).choose_tier(history, req_indices, num_other_tokens)

    def deeper(self, tree, tier):
        return self.at(tree.batch).deeper(tree, tier)

    def trim(self, tree, tier, num_other_tokens=0):
        return self.at(tree.batch).trim(tree, tier, num_other_tokens)


def day(path: Path, machine: Machine, share: float = 1.0) -> list[dict[str, object]]:
    """Tokens that each policy writes in a day, over those of plain decoding.

    The number of requests is that of a service whose arrivals follow the hour as a sinusoid, with
    servers for all: Poisson around a sinusoid (the M(t)/G/infinity queue of Eick, Massey and Whitt,
    Management Science 39(2), 1993), from a few at night to about ``PEAK``. Each policy keeps one
    setting, tuned on the other half of the texts.
    """
    torch.set_num_threads(1)
    tune, test = halves(Trace.load(path))
    calibration, beam, deepest = calibrate(tune), tune.beam, tune.depth
    at = lru_cache(maxsize=None)(lambda requests: machine.at(requests, beam))
    hours = (np.arange(PIECES) + 0.5) / PIECES
    mean = PEAK / 2 * (1 - 0.98 * np.cos(2 * np.pi * hours))
    levels = np.random.default_rng(5).poisson(mean).clip(1, 256)

    def written(trace: Trace, scheduler: Scheduler, length: float) -> int:
        clock, tokens = 0.0, 0

        def load() -> int:
            place = int(clock / length * PIECES)
            return int(levels[place]) if place < PIECES else 0

        def observe(record: Record) -> None:
            nonlocal clock, tokens
            requests, tier = len(record.requests), record.tier
            cost, wide = at(requests), tier.beam or scheduler.rule.beam
            clock += cost(record.packed.num_rows) + cost.extend_seconds(
                record.num_unprocessed_tokens
            )
            clock += float(cost.draft_seconds(tier.depth, requests, wide))
            tokens += int(record.emitted.sum()) if clock < length else 0

        order = np.random.default_rng(1).permutation(len(trace.kind))
        options = {"order": order, "lag": LAG, "load": load, "observe": observe}
        replay(trace, scheduler, FREE, batch=256, steps=1 << 30, **options)
        return tokens

    middle, peak = int(PEAK / 2), int(PEAK)
    at_load = lambda batch: max(
        SHAPES,
        key=lambda s: run(tune, tree(*s), FREE, batch, max(16, int(share * 40))).ratio(at(batch)),
    )
    best = max(SHAPES, key=lambda s: written(tune, tree(*s), share * DAY / 6))
    echos = [
        Scheduler(echo.TwoLevel(width, 8), echo.SparseGate(calibration), k_max, layers)
        for k_max in (256, 384, 512, 768)
        for width, layers in ((1, deepest), (3, 3))
    ]
    ours = ByLoad(echo.GlobalRank(beam, calibration), None, at(middle), deepest, costs=at)
    policies = {
        "EAGLE, shipped default": tree(*DEFAULT),
        "EAGLE, tuned at the middle load": tree(*at_load(middle)),
        "EAGLE, tuned at the peak": tree(*at_load(peak)),
        "EAGLE, one tree tuned over the day": tree(*best),
        "ECHO (paper), tuned over the day": max(
            echos, key=lambda s: written(tune, s, share * DAY / 6)
        ),
        OURS: ours,
        TRIMMED: replace(ours, trims=True),
    }
    plain = written(test, Scheduler.autoregressive(), share * DAY)
    return [
        {
            "machine": machine.name,
            "policy": name,
            "ratio": written(test, scheduler, share * DAY) / plain,
        }
        for name, scheduler in policies.items()
    ]


def markdown(cells: list[dict[str, object]], days: list[dict[str, object]]) -> str:
    """A table for each measured machine, one for the invented shapes, one for the day."""
    at = {(c["shape"], c["policy"], c["batch"]): float(str(c["ratio"])) for c in cells}
    names = list(dict.fromkeys(str(c["shape"]) for c in cells))
    machines = [name for name in names if name not in shapes() or "measured" in name]
    row = lambda label, values: f"| {label} | " + " | ".join(f"{v:.2f}" for v in values) + " |"
    lines = []
    for name in machines:
        lines += [f"| {name} | " + " | ".join(map(str, BATCHES)) + " |", "|---|" + "---|" * 6]
        for policy in [*POLICIES, BOUND, "oracle"]:
            if (name, policy, BATCHES[0]) in at:
                lines.append(row(policy, (at[name, policy, b] for b in BATCHES)))
        lines.append("")
    lines += [
        "| best tuned baseline / throughput-optimal | " + " | ".join(map(str, BATCHES)) + " |"
    ]
    lines.append("|---|" + "---|" * 6)
    for name in (n for n in names if n not in machines):
        pairs = (
            f"{max(at[name, p, b] for p in BASELINES):.2f} / {at[name, OURS, b]:.2f}"
            for b in BATCHES
        )
        lines.append(f"| {name} | " + " | ".join(pairs) + " |")
    served = list(dict.fromkeys(str(d["machine"]) for d in days))
    lines += ["", "| a day | " + " | ".join(served) + " |", "|---|" + "---|" * len(served)]
    for policy in dict.fromkeys(str(d["policy"]) for d in days):
        lines.append(row(policy, (float(str(d["ratio"])) for d in days if d["policy"] == policy)))
    return "\n".join(lines) + "\n"


def summary(cells: list[dict[str, object]], names: list[str], own: str) -> str:
    """One of our policies over these machines: at worst, and in the mean."""
    at = {(c["shape"], c["policy"], c["batch"]): float(str(c["ratio"])) for c in cells}
    places = [(name, b) for name in names for b in BATCHES]
    ours = np.array([at[name, own, b] for name, b in places])
    over = {
        p: np.array([at[n, own, b] / max(1.0, at[n, p, b]) for n, b in places]) for p in BASELINES
    }
    best = np.min(list(over.values()), axis=0)
    long = [
        (float(str(c["long"])), float(str(c["long"])) / max(1.0, float(str(c["long_baseline"]))))
        for c in cells
        if "long" in c and c["shape"] in names and own == OURS
    ]
    lowest = [f"{value:.3f}" for value in np.min(long, axis=0)] if long else ["not run"]
    means = ", ".join(f"{p} {found.mean():.3f}" for p, found in over.items())
    return (
        f"{own}, {len(places)} cells: at least {ours.min():.3f} of plain decoding, "
        f"{best.min():.3f} of the best tuned baseline ({best.mean():.3f} in the mean); "
        f"over each in the mean: {means}; over {LONG} steps at least {' and '.join(lowest)}"
    )


def draw(cells: list[dict[str, object]], days: list[dict[str, object]], path: Path) -> None:
    """One panel a measured machine, and one for the day."""
    shown = {
        "EAGLE, shipped default": ("EAGLE, shipped default", ":"),
        "EAGLE tree": ("EAGLE, tuned at each batch", "-"),
        "ECHO (paper)": ("ECHO (paper), tuned", "-"),
        "SpecGrove": ("SpecGrove-like", "-"),
        OURS: ("throughput-optimal, nothing tuned", "-"),
        TRIMMED: ("the same, trimmed", ":"),
        "oracle": ("oracle", "--"),
    }
    known = shapes()
    names = [n for n in dict.fromkeys(str(c["shape"]) for c in cells) if n not in known]
    with plot.figure(3.1 * (len(names) + 1), 3.8) as figure:
        axes = figure.subplots(1, len(names) + 1)
        for axis, shape in zip(axes, names, strict=False):
            for name, (label, style) in shown.items():
                own = {c["batch"]: c for c in cells if (c["shape"], c["policy"]) == (shape, name)}
                ratio, low, high = (
                    [float(str(own[b][key])) for b in BATCHES] for key in ("ratio", "low", "high")
                )
                color = plot.of("global" if name == "SpecGrove" else name)
                axis.plot(BATCHES, ratio, f"o{style}", ms=3, color=color, label=label, lw=1.6)
                axis.fill_between(BATCHES, low, high, color=color, alpha=0.15, lw=0)
            by_batch(axis, BATCHES)
            axis.set_title(shape)
            axis.set_xlabel("batch")
            axis.set_ylim(0, 3.6)
        axes[0].set_ylabel("throughput / plain decoding")
        axes[len(names) - 1].legend(loc="lower right", fontsize=6)
        served = list(dict.fromkeys(str(d["machine"]) for d in days))
        policies = list(dict.fromkeys(str(d["policy"]) for d in days))
        for i, policy in enumerate(policies):
            values = [float(str(d["ratio"])) for d in days if d["policy"] == policy]
            place = np.arange(len(served)) + (i - len(policies) / 2 + 0.5) * 0.14
            color, alpha = plot.of(policy), 0.4 + 0.15 * i if policy.startswith("EAGLE") else 1
            alpha = 0.6 if policy == TRIMMED else alpha
            axes[-1].bar(place, values, 0.13, color=color, alpha=alpha, label=policy)
        axes[-1].axhline(1, color=plot.INK, lw=0.8)
        short = [name.split(" /")[0].rsplit("-", 1)[-1] for name in served]
        axes[-1].set_xticks(range(len(served)), short)
        axes[-1].set_title("a day, one setting")
        axes[-1].set_ylim(0, 3.2)
        axes[-1].legend(loc="upper left", fontsize=6.5)
        figure.savefig(path, dpi=100)


def main() -> None:
    """Runs all cells."""
    parser = arguments(__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    console, start, beam = Console(), time.perf_counter(), Trace.load(args.trace).beam
    machines, order = measured(), sorted(BATCHES, reverse=True)
    costs = [
        {name: machine.at(batch, beam) for name, machine in machines.items()} | shapes()
        for batch in order
    ]
    with ProcessPoolExecutor(max_workers=args.workers) as pool:
        paths, shares = [args.trace] * len(order), [args.share] * len(order)
        cells = list(spread(pool.map(column, paths, order, costs, shares)))
        days = list(spread(pool.map(day, paths, machines.values(), shares)))
        chains = list(spread(pool.map(trees_and_chains, paths, PAIRED)))
    folded = {"cells": fold(cells, "shape", "policy"), "day": fold(days, "machine")}
    result = {"trace": args.trace.name, **folded, "trees_over_chains": fold(chains)}
    write(args.out / "replay.json", result)
    table = markdown(short(cells), short(days))  # as in the file
    (args.out / "replay.md").write_text(table)
    console.print(table)
    for names in (list(machines), list(shapes())):
        for own in (OURS, TRIMMED):
            console.print(summary(cells, names, own))
    draw(cells, days, args.out / "replay.png")
    seconds = time.perf_counter() - start
    console.print(f"replay.json, .md and .png written to {args.out}; {seconds:.0f} s in all")


def spread(parts) -> Iterator[dict[str, object]]:
    """The rows of all parts, the time of each told."""
    start = time.perf_counter()
    for part in parts:
        print(f"{dict(part[-1])} after {time.perf_counter() - start:.0f} s", flush=True)
        yield from part


if __name__ == "__main__":
    main()
