"""Calibration on a real warm-up log: what it shows, how much of it is needed, whether it transfers, and what its parts are worth.

    python benchmarks/real_data.py                  # the shipped trace, about six minutes on one core
    python benchmarks/real_data.py --trace other.npz

The log is that of a greedy decode of the trace's texts with the whole pool drafted and every layer verified at each step. What is
judged by replay is judged on texts that it was not calibrated on: one half of the texts calibrates, the other is served, and the other
way round. Intervals are of 95%, from a bootstrap over texts. Writes benchmarks/results/real_data.json and pictures into docs/images.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import echo
import predictors
from echo.budget.rules import GlobalRank
from echo.gating import Objective, goodput
from echo.testing import Trace
from real_data_picture import draw
from replay import WarmUp, arguments, warm_up
from served import KNEE, Served, against, halves, serve


def overview(trace: Trace, warm: WarmUp, images: Path) -> dict[str, Any]:
    """The table, the picture, what the gates do, and the calibration error on held-out texts."""
    calibration = echo.calibrate(warm.log)
    print(calibration)
    calibration.plot().savefig(images / "calibration.png", dpi=100)
    one, two = halves(trace)
    made, held = echo.calibrate(warm.of(one)), warm.of(two)
    return {
        "table": str(calibration).splitlines(),
        "rows": len(warm.log),
        "steps": len(np.unique(warm.log.step)),
        "gates": [asdict(gate) for gate in calibration.report(warm.log)],
        "held_out_error": {"by depth": asdict(made.error(held))},
    }


def warm_up_size(trace: Trace, warm: WarmUp, resamples: int = 200) -> list[dict[str, Any]]:
    """How often logs of n texts, drawn with replacement, lead to one choice of gates; and how far their thresholds vary."""
    path, text = warm.log.rank == 0, warm.text[warm.log.step]
    columns = [warm.log.depth, warm.log.confidence, warm.log.accepted]
    empty = echo.ConfidenceHistograms.empty(trace.depth)
    masses = np.stack(
        [empty.add(echo.WarmupLog.from_arrays(*(c[path & (text == i)] for c in columns))).mass for i in range(len(trace.kind))]
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
                kept.append(echo.calibrate(echo.ConfidenceHistograms(mass), max_gates=gates))
        common = {gates: Counter(c.gate_depths for c in kept).most_common(1)[0] for gates, kept in found.items()}
        result.append(
            {
                "texts": texts,
                "steps": int(texts * len(np.unique(warm.log.step)) / len(masses)),
                "path_rows": int(texts * path.sum() / len(masses)),
                "most_common": {f"at most {gates}": {"gates": depths, "share": n / resamples} for gates, (depths, n) in common.items()},
                "threshold_spread": np.std([[d.threshold for d in c.depths] for c in found[4]], axis=0).round(4).tolist(),
            }
        )
        print(result[-1])
    return result


def worth_of_size(trace: Trace, warm: WarmUp, draws: int = 8) -> list[dict[str, Any]]:
    """What calibrations from n texts, drawn from one half, lose on the other half against one from the whole half."""
    random, (one, two) = np.random.default_rng(0), halves(trace)
    rule, batch, result = echo.TwoLevel(1, 0), 64, []

    def speed(log: echo.WarmupLog, test: np.ndarray) -> float:
        gate = echo.SparseGate(echo.calibrate(log))
        policy = echo.ElasticBudgetScheduler(rule, gate, (1 + trace.depth) * batch, trace.depth)
        return serve(trace, test, policy, batch, 50, real_rows=True).per("seconds")

    base = {i: speed(warm.of(half), test) for i, (half, test) in enumerate(((one, two), (two, one)))}
    for texts in (1, 2, 4, 8, 16):
        found = []
        for i in range(draws):
            half, test = ((one, two), (two, one))[i % 2]
            found.append(speed(warm.of(random.choice(half, texts, replace=False)), test) / base[i % 2] - 1.0)
        result.append({"texts": texts, "change": float(np.mean(found)), "worst": float(np.min(found)), "best": float(np.max(found))})
        print(result[-1])
    return result


def transfer(trace: Trace, warm: WarmUp) -> dict[str, Any]:
    """Calibrated on one kind of prompts, serving another: the change against a calibration on as many texts of that kind."""
    kinds = [str(kind) for kind in np.unique(trace.kind)]
    sources = [*kinds, "two of each"]
    one, two = halves(trace)
    policies: dict[str, tuple[int, Callable[[echo.Calibration], echo.ElasticBudgetScheduler]]] = {
        "gates of the paper": (
            16,
            lambda c: echo.ElasticBudgetScheduler(echo.TwoLevel(2, 8), echo.SparseGate(c), 3 * 16, trace.depth),
        ),
        "goodput": (96, lambda c: echo.ElasticBudgetScheduler(GlobalRank(trace.beam, c), None, KNEE, trace.depth)),
    }

    def texts(kind: str, half: np.ndarray) -> np.ndarray:
        if kind in kinds:
            return half[trace.kind[half] == kind]
        per = len(half) // len(kinds) ** 2  # as many texts as of one kind
        return np.concatenate([half[trace.kind[half] == k][:per] for k in kinds])

    made = {(source, i): echo.calibrate(warm.of(texts(source, half))) for source in sources for i, half in enumerate((one, two))}
    result: dict[str, Any] = {"kinds": kinds, "sources": sources, "gates": {s: made[s, 0].gate_depths for s in sources}}
    for name, (batch, policy) in policies.items():
        served: dict[tuple[str, str], Served] = {}
        for source in sources:
            for kind in kinds:
                parts = [serve(trace, texts(kind, test), policy(made[source, i]), batch, 80) for i, test in enumerate((two, one))]
                served[source, kind] = parts[0] + parts[1]
        cells = {s: {k: against(served[s, k], served[k, k], "seconds") for k in kinds} for s in sources}
        result[name] = cells
        for source in sources:
            print(
                name, source, *(f"{100 * c['change']:+.1f} [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]" for c in cells[source].values())
            )
    return result


def make_gate(warm: WarmUp, half: np.ndarray, rule: str, count: int, batch: int, depth: int) -> echo.SparseGate:
    """A gate at the first depth alone, at ``count`` depths, or at all."""
    log = warm.of(half)
    if 1 < count < depth:
        return echo.SparseGate(echo.calibrate(log, max_gates=count, thresholds=rule, cost=KNEE, batch=batch))  # type: ignore[arg-type]
    depths = range(1, 1 + count)
    if rule == "goodput":
        return echo.SparseGate(goodput(log, depths, depth, Objective(KNEE, batch, 1))[0])
    youden = echo.calibrate(log)
    return echo.SparseGate({d: youden.depths[d - 1].threshold for d in depths})


def served_behind(trace: Trace, gates: list[echo.SparseGate | None], pooled: bool, batch: int = 64) -> Served:
    """Both halves served behind the other's gate, a layer one row wide: a fixed pool of 3 rows a request, or each row charged."""
    rule, rows = echo.TwoLevel(1, 8 if pooled else 0), (3 if pooled else 1 + trace.depth) * batch
    policies = [echo.ElasticBudgetScheduler(rule, gate, rows, trace.depth) for gate in gates]
    one, two = (
        serve(trace, test, policy, batch, 80, real_rows=not pooled) for test, policy in zip(halves(trace)[::-1], policies, strict=True)
    )
    return one + two


def gates_and_rules(trace: Trace, warm: WarmUp, batch: int = 64) -> list[dict[str, Any]]:
    """What each threshold rule and the number of gates is worth, against no gate, where rows are a fixed pool and where each costs."""
    base = {pooled: served_behind(trace, [None, None], pooled) for pooled in (True, False)}
    plain = batch / float(KNEE(batch))
    result: list[dict[str, Any]] = []
    for rule, count in [("none", 0)] + [(rule, n) for rule in ("youden", "goodput") for n in (1, 2, 3, 4, trace.depth)]:
        gates = [make_gate(warm, half, rule, count, batch, trace.depth) if count else None for half in halves(trace)]
        pool, costly = served_behind(trace, gates, True), served_behind(trace, gates, False)
        entry = {
            "rule": rule,
            "gates": count,
            "depths": [gate.depths for gate in gates if gate],
            "fixed_rows": {"tokens_a_step": pool.per("steps")} | against(pool, base[True], "steps"),
            "each_row_costs": {"over_plain": costly.per("seconds") / plain} | against(costly, base[False], "seconds"),
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
            echo.SparseGate({d: c.depths[d - 1].threshold for d in (1, *pair, trace.depth)}) for c in made
        ]
        pool, costly = served_behind(trace, gates, True), served_behind(trace, gates, False)
        result.append({"pair": pair, "tokens_a_step": pool.per("steps"), "over_plain": costly.per("seconds") / plain})
        print(result[-1])
    return result


def main() -> None:
    """All of it."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, trace = time.perf_counter(), Trace.load(args.trace)
    warm, pool = warm_up(trace), predictors.pool(trace)
    half = np.isin(pool.text, halves(trace)[0])
    result: dict[str, Any] = {"trace": args.trace.name, "texts": len(trace.kind)}
    for name, study in {
        "overview": lambda: overview(trace, warm, args.images),
        "warm_up_size": lambda: warm_up_size(trace, warm),
        "worth_of_size": lambda: worth_of_size(trace, warm),
        "transfer": lambda: transfer(trace, warm),
        "gates_and_rules": lambda: gates_and_rules(trace, warm),
        "inner_pairs": lambda: inner_pairs(trace, warm),
        "predictors": lambda: predictors.judge(pool, (half, ~half)),
    }.items():
        result[name] = study()
        print(f"{name}: {time.perf_counter() - start:.0f} s")
    (args.out / "real_data.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.images)


if __name__ == "__main__":
    main()
