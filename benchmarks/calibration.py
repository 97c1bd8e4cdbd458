"""What is a calibration worth? On a real log: what it shows, its size, transfer, its parts.

    python benchmarks/calibration.py                  # the shipped trace, some minutes on one core
    python benchmarks/calibration.py --trace other.npz

The log is that of a greedy decode of the trace's texts with the whole pool drafted and every layer
verified at each step. What is judged by replay is judged on texts that it was not calibrated on:
one half of the texts calibrates, the other is served, and the other way round. Intervals are of
95%, from a bootstrap over texts. Writes benchmarks/results/calibration.json and pictures into
docs/images.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import echo
from common.replays import WarmUp, arguments, shapes, split, warm_up, write
from echo import plot
from echo.gating import Objective, throughput_optimal
from echo.testing import Record, Trace, replay

PAPER, ELASTIC = plot.of("ECHO"), plot.of("throughput-optimal")
KNEE = shapes()["dense, knee at 256 tokens"]
RESAMPLES = 400


def halves(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Texts 0, 2, 4, ... of each kind, and the others."""
    first, others = split(trace)
    return np.sort(first), others


@dataclass(frozen=True)
class Served:
    """Sums by text over a replay: tokens emitted, steps, and its share of modelled seconds."""

    tokens: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray

    def __add__(self, other: Served) -> Served:
        return Served(
            self.tokens + other.tokens, self.steps + other.steps, self.seconds + other.seconds
        )

    def per(self, unit: str, weight: np.ndarray | None = None) -> float:
        """Tokens a step, or a second."""
        w = np.ones(len(self.tokens)) if weight is None else weight
        return float((w * self.tokens).sum() / (w * getattr(self, unit)).sum())


def serve(
    trace: Trace,
    texts: np.ndarray,
    scheduler: echo.ElasticBudgetScheduler,
    batch: int,
    steps: int,
    unpadded: bool = False,
) -> Served:
    """Replays some texts in random order, again and again; ``unpadded`` charges no pad rows."""
    part = trace.texts(texts.tolist())
    found = Served(*np.zeros((3, len(trace.kind))))

    def observe(record: Record) -> None:
        text = texts[record.requests]
        tier, packed = record.tier, record.packed
        count = int(packed.indptr[-1]) if unpadded else packed.num_rows
        beam = tier.beam or scheduler.rule.beam
        seconds = float(KNEE(count) + KNEE.draft_seconds(tier.depth, batch, beam))
        np.add.at(found.tokens, text, record.emitted)
        np.add.at(found.steps, text, 1)
        np.add.at(found.seconds, text, seconds / len(text))

    order = np.random.default_rng(1).permutation(len(texts))
    report = replay(part, scheduler, KNEE, batch=batch, steps=steps, order=order, observe=observe)
    assert report.misses == 0, f"{report.misses} nodes without a record"
    return found


def against(one: Served, base: Served, unit: str) -> dict[str, float]:
    """The change in tokens a step or second from ``base`` to ``one``, paired by text."""
    random, count = np.random.default_rng(0), len(one.tokens)
    chosen = np.flatnonzero((one.steps > 0) & (base.steps > 0))
    draws = [np.bincount(chosen, minlength=count)]
    draws += [
        np.bincount(random.choice(chosen, len(chosen)), minlength=count) for _ in range(RESAMPLES)
    ]
    change = np.array([one.per(unit, w) / base.per(unit, w) - 1.0 for w in draws])
    low, high = np.percentile(change[1:], [2.5, 97.5])
    return {"change": float(change[0]), "low": float(low), "high": float(high)}


def overview(trace: Trace, warm: WarmUp, images: Path) -> dict[str, Any]:
    """The table, the picture, what the gates do, and the calibration error on held-out texts."""
    calibration = echo.calibrate(warm.log)
    print(calibration)
    calibration.plot().savefig(images / "calibration.png", dpi=100)
    one, two = halves(trace)
    made, others = echo.calibrate(warm.of(one)), warm.of(two)
    return {
        "table": str(calibration).splitlines(),
        "rows": len(warm.log),
        "steps": len(np.unique(warm.log.step)),
        "gates": [asdict(gate) for gate in calibration.report(warm.log)],
        "held_out_error": asdict(made.error(others)),
    }


def warm_up_size(trace: Trace, warm: WarmUp, resamples: int = 200) -> list[dict[str, Any]]:
    """How often logs of n texts, drawn with replacement, lead to one choice of gates."""
    path, text = warm.log.rank == 0, warm.text[warm.log.step]
    columns = [warm.log.depth, warm.log.confidence, warm.log.accepted]
    empty = echo.gating.ConfidenceHistograms.empty(trace.depth)
    masses = np.stack(
        [
            empty.add(echo.WarmupLog.from_arrays(*(c[path & (text == i)] for c in columns))).mass
            for i in range(len(trace.kind))
        ]
    )
    used = np.flatnonzero(masses.any(axis=(0, 1, 2, 3, 4)))
    flat = masses[..., used].reshape(len(masses), -1).astype(np.float64)
    random, result = np.random.default_rng(0), []
    for texts in (8, 16, 32, 64, 128, 256, 512):
        found: dict[int, list[echo.Calibration]] = {3: [], 4: []}
        for _ in range(resamples):
            draw_ = np.bincount(random.integers(0, len(masses), texts), minlength=len(masses))
            mass = np.zeros(masses.shape[1:], dtype=np.int64)
            mass[..., used] = (draw_ @ flat).reshape(*mass.shape[:-1], len(used))
            for gates, kept in found.items():
                kept.append(echo.calibrate(echo.gating.ConfidenceHistograms(mass), max_gates=gates))
        common = {
            gates: Counter(c.gate_depths for c in kept).most_common(1)[0]
            for gates, kept in found.items()
        }
        result.append(
            {
                "texts": texts,
                "steps": int(texts * len(np.unique(warm.log.step)) / len(masses)),
                "path_rows": int(texts * path.sum() / len(masses)),
                "most_common": {
                    f"at most {gates}": {"gates": depths, "share": n / resamples}
                    for gates, (depths, n) in common.items()
                },
            }
        )
        print(result[-1])
    return result


def worth_of_size(trace: Trace, warm: WarmUp, draws: int = 8) -> list[dict[str, Any]]:
    """What calibrations from n texts of one half lose on the other, against one from all of it."""
    random, (one, two) = np.random.default_rng(0), halves(trace)
    rule, batch, result = echo.TwoLevel(1, 0), 64, []

    def speed(log: echo.WarmupLog, test: np.ndarray) -> float:
        gate = echo.SparseGate(echo.calibrate(log))
        policy = echo.ElasticBudgetScheduler(rule, gate, (1 + trace.depth) * batch, trace.depth)
        return serve(trace, test, policy, batch, 50, unpadded=True).per("seconds")

    base = {
        i: speed(warm.of(half), test) for i, (half, test) in enumerate(((one, two), (two, one)))
    }
    for texts in (1, 2, 4, 8, 16):
        found = []
        for i in range(draws):
            half, test = ((one, two), (two, one))[i % 2]
            found.append(
                speed(warm.of(random.choice(half, texts, replace=False)), test) / base[i % 2] - 1.0
            )
        result.append(
            {
                "texts": texts,
                "change": float(np.mean(found)),
                "worst": float(np.min(found)),
                "best": float(np.max(found)),
            }
        )
        print(result[-1])
    return result


def transfer(trace: Trace, warm: WarmUp) -> dict[str, Any]:
    """Calibrated on one kind of prompts, serving another: the change against that kind's own."""
    kinds = [str(kind) for kind in np.unique(trace.kind)]
    sources = [*kinds, "two of each"]
    one, two = halves(trace)
    policies: dict[str, tuple[int, Callable[[echo.Calibration], echo.ElasticBudgetScheduler]]] = {
        "gates of the paper": (
            16,
            lambda c: echo.ElasticBudgetScheduler(
                echo.TwoLevel(2, 8), echo.SparseGate(c), 3 * 16, trace.depth
            ),
        ),
        "throughput-optimal": (
            96,
            lambda c: echo.ElasticBudgetScheduler(
                echo.GlobalRank(trace.beam, c), None, KNEE, trace.depth
            ),
        ),
    }

    def texts(kind: str, half: np.ndarray) -> np.ndarray:
        if kind in kinds:
            return half[trace.kind[half] == kind]
        per = len(half) // len(kinds) ** 2  # as many texts as of one kind
        return np.concatenate([half[trace.kind[half] == k][:per] for k in kinds])

    made = {
        (source, i): echo.calibrate(warm.of(texts(source, half)))
        for source in sources
        for i, half in enumerate((one, two))
    }
    result: dict[str, Any] = {
        "kinds": kinds,
        "sources": sources,
        "gates": {s: made[s, 0].gate_depths for s in sources},
    }
    for name, (batch, policy) in policies.items():
        served: dict[tuple[str, str], Served] = {}
        for source in sources:
            for kind in kinds:
                parts = [
                    serve(trace, texts(kind, test), policy(made[source, i]), batch, 80)
                    for i, test in enumerate((two, one))
                ]
                served[source, kind] = parts[0] + parts[1]
        cells = {
            s: {k: against(served[s, k], served[k, k], "seconds") for k in kinds} for s in sources
        }
        result[name] = cells
        for source in sources:
            print(
                name,
                source,
                *(
                    f"{100 * c['change']:+.1f} [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]"
                    for c in cells[source].values()
                ),
            )
    return result


def make_gate(
    warm: WarmUp, half: np.ndarray, rule: str, count: int, batch: int, depth: int
) -> echo.SparseGate:
    """A gate at the first depth alone, at ``count`` depths, or at all."""
    log = warm.of(half)
    if 1 < count < depth:
        return echo.SparseGate(
            echo.calibrate(log, max_gates=count, thresholds=rule, cost=KNEE, batch=batch)
        )  # type: ignore[arg-type]
    depths = range(1, 1 + count)
    if rule == "throughput":
        return echo.SparseGate(throughput_optimal(log, depths, depth, Objective(KNEE, batch, 1))[0])
    youden = echo.calibrate(log)
    return echo.SparseGate({d: youden.depths[d - 1].threshold for d in depths})


def served_behind(
    trace: Trace, gates: list[echo.SparseGate | None], pooled: bool, batch: int = 64
) -> Served:
    """Both halves served behind the other's gate, beam 1: 3 tokens a request, or each charged."""
    rule, k_max = echo.TwoLevel(1, 8 if pooled else 0), (3 if pooled else 1 + trace.depth) * batch
    policies = [echo.ElasticBudgetScheduler(rule, gate, k_max, trace.depth) for gate in gates]
    one, two = (
        serve(trace, test, policy, batch, 80, unpadded=not pooled)
        for test, policy in zip(halves(trace)[::-1], policies, strict=True)
    )
    return one + two


def gates_and_rules(trace: Trace, warm: WarmUp, batch: int = 64) -> list[dict[str, Any]]:
    """What threshold rules and numbers of gates are worth, for a fixed budget, at a cost each."""
    base = {pooled: served_behind(trace, [None, None], pooled) for pooled in (True, False)}
    plain = batch / float(KNEE(batch))
    result: list[dict[str, Any]] = []
    for rule, count in [("none", 0)] + [
        (rule, n) for rule in ("youden", "throughput") for n in (1, 2, 3, 4, trace.depth)
    ]:
        gates = [
            make_gate(warm, half, rule, count, batch, trace.depth) if count else None
            for half in halves(trace)
        ]
        pool, costly = served_behind(trace, gates, True), served_behind(trace, gates, False)
        entry = {
            "rule": rule,
            "gates": count,
            "depths": [gate.depths for gate in gates if gate],
            "fixed_rows": {"tokens_a_step": pool.per("steps")} | against(pool, base[True], "steps"),
            "each_row_costs": {"over_plain": costly.per("seconds") / plain}
            | against(costly, base[False], "seconds"),
        }
        result.append(entry)
        print(entry)
    return result


def inner_pairs(trace: Trace, warm: WarmUp, batch: int = 64) -> list[dict[str, Any]]:
    """Youden gates at the first and the last depth and at each pair between."""
    made = [echo.calibrate(warm.of(half)) for half in halves(trace)]
    plain, result = batch / float(KNEE(batch)), []
    for pair in itertools.combinations(range(2, trace.depth), 2):
        gates: list[echo.SparseGate | None] = [
            echo.SparseGate({d: c.depths[d - 1].threshold for d in (1, *pair, trace.depth)})
            for c in made
        ]
        pool, costly = served_behind(trace, gates, True), served_behind(trace, gates, False)
        result.append(
            {
                "pair": pair,
                "tokens_a_step": pool.per("steps"),
                "over_plain": costly.per("seconds") / plain,
            }
        )
        print(result[-1])
    return result


def draw(result: dict[str, Any], images: Path) -> None:
    """Three pictures: warm_up_size, transfer, gates_and_rules (.png)."""
    for name, panel, size in (
        ("warm_up_size", _size, (9, 3.2)),
        ("transfer", _transfer, (9.5, 3.6)),
        ("gates_and_rules", _gates, (9, 3.2)),
    ):
        with plot.figure(*size) as figure:
            panel(figure.subplots(1, 2), result)
            figure.savefig(images / f"{name}.png", dpi=110)


def _size(axes: Any, result: dict[str, Any]) -> None:
    rows = result["warm_up_size"]
    texts = [row["texts"] for row in rows]
    for gates, other, colour in (
        ("at most 3", "at most 4", plot.QUIET),
        ("at most 4", "at most 3", PAPER),
    ):
        axes[0].plot(
            texts,
            [row["most_common"][gates]["share"] for row in rows],
            "o-",
            color=colour,
            label=f"{gates} gates",
        )
        for x, row in zip(texts, rows, strict=True):
            mine, label = (
                row["most_common"][gates],
                "·".join(map(str, row["most_common"][gates]["gates"])),
            )
            above = mine["share"] > row["most_common"][other]["share"]
            axes[0].annotate(
                label,
                (x, mine["share"] + (0.03 if above else -0.08)),
                color=colour,
                fontsize=7,
                ha="center",
            )
    axes[0].axhline(0.95, color=plot.INK, lw=0.8, ls=":")
    axes[0].set(
        xscale="log",
        ylim=(0, 1.1),
        xlabel="texts in the log",
        ylabel="share of the most common choice",
        title="which gates",
    )
    axes[0].set_xticks(texts, [str(n) for n in texts])
    axes[0].legend(loc="lower right")
    worth = result["worth_of_size"]
    texts = [row["texts"] for row in worth]
    axes[1].plot(texts, [100 * row["change"] for row in worth], "o-", color=PAPER)
    axes[1].fill_between(
        texts,
        [100 * row["worst"] for row in worth],
        [100 * row["best"] for row in worth],
        color=PAPER,
        alpha=0.15,
        lw=0,
    )
    axes[1].axhline(0, color=plot.INK, lw=0.8)
    axes[1].set(
        xscale="log",
        xlabel="texts in the log",
        ylabel="tokens a second, % of 32 texts'",
        title="what they are worth on other texts",
    )
    axes[1].set_xticks(texts, [str(n) for n in texts])


def _transfer(axes: Any, result: dict[str, Any]) -> None:
    kinds, sources = result["transfer"]["kinds"], result["transfer"]["sources"]
    for axis, name in zip(axes, ("gates of the paper", "throughput-optimal"), strict=True):
        cells = result["transfer"][name]
        values = np.array([[100 * cells[s][k]["change"] for k in kinds] for s in sources])
        axis.imshow(values, cmap="RdYlGn", vmin=-6, vmax=6, aspect="auto")
        for i, j in np.ndindex(*values.shape):
            cell = cells[sources[i]][kinds[j]]
            text = (
                ""
                if sources[i] == kinds[j]
                else f"\n[{100 * cell['low']:+.1f}, {100 * cell['high']:+.1f}]"
            )
            axis.text(j, i, f"{values[i, j]:+.1f}{text}", ha="center", va="center", fontsize=7.5)
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set_yticks(range(len(sources)), sources)
        axis.set(xlabel="served", ylabel="calibrated on", title=f"{name}: tokens a second, %")


def _gates(axes: Any, result: dict[str, Any]) -> None:
    rows = result["gates_and_rules"]
    counts = [row["gates"] for row in rows if row["rule"] == "youden"]
    panels = (
        ("fixed_rows", "tokens_a_step", "tokens a step at equal verify tokens"),
        ("each_row_costs", "over_plain", "throughput over plain decoding"),
    )
    for axis, (what, value, label) in zip(axes, panels, strict=True):
        for rule, colour in (("youden", PAPER), ("throughput", ELASTIC)):
            entries = [row[what] for row in rows if row["rule"] == rule]
            axis.plot(
                range(len(counts)), [e[value] for e in entries], "o-", color=colour, label=rule
            )
        axis.axhline(rows[0][what][value], color=plot.INK, lw=0.8, ls=":", label="no gate")
        axis.set_xticks(range(len(counts)), [str(n) for n in counts[:-1]] + ["all"])
        axis.set(xlabel="gates", ylabel=label)
    axes[0].legend()


def main() -> None:
    """All of it."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, trace = time.perf_counter(), Trace.load(args.trace)
    warm = warm_up(trace)
    result: dict[str, Any] = {"trace": args.trace.name, "texts": len(trace.kind)}
    for name, study in {
        "overview": lambda: overview(trace, warm, args.images),
        "warm_up_size": lambda: warm_up_size(trace, warm),
        "worth_of_size": lambda: worth_of_size(trace, warm),
        "transfer": lambda: transfer(trace, warm),
        "gates_and_rules": lambda: gates_and_rules(trace, warm),
        "inner_pairs": lambda: inner_pairs(trace, warm),
    }.items():
        result[name] = study()
        print(f"{name}: {time.perf_counter() - start:.0f} s")
    write(args.out / "calibration.json", result)
    draw(result, args.images)


if __name__ == "__main__":
    main()
