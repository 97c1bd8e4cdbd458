"""What does the paper leave out? Measured by exact replay; docs/benchmarks.md sums it up.

    python benchmarks/gaps.py                       # all sections, about a minute on one quiet core
    python benchmarks/gaps.py --only fairness tail  # some of them

Calibration and tuning see one half of the texts, the figures the other. Unless a section says
otherwise: 64 requests, a dense model whose knee lies at 256 verify tokens, a drafted layer at 2% of
a step. Throughput is a multiple of plain decoding's under the same cost curve. Writes
benchmarks/results/gaps.json and docs/images/gaps-wrong-cost.png.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import echo
from common.policies import Setting, eagle, paper, top_k
from common.replays import (
    HERE,
    LAG,
    WARM,
    Steps,
    arguments,
    by_batch,
    calibrate,
    halves,
    run,
    shapes,
    warmup_log,
    write,
)
from echo import plot
from echo.testing import Record, Report, Trace
from echo.testing import replay as play

BATCH, STEPS, LAW = 64, 100, "dense, knee at 256 tokens"
Scheduler = echo.ElasticBudgetScheduler


@dataclass(frozen=True, eq=False)
class Study:
    """What all sections share: two halves of the texts, the cost, the first half's calibration."""

    tune: Trace
    test: Trace
    cost: echo.CostModel
    calibration: echo.Calibration

    def setting(self, batch: int = BATCH, cost: echo.CostModel | None = None) -> Setting:
        """What a policy may know."""
        return Setting(self.calibration, cost or self.cost, batch, self.tune.depth, self.tune.beam)

    def tuned(self, policy: Callable) -> Scheduler:
        """The candidate that is best on the first half."""
        return max(
            policy(self.setting()), key=lambda s: self.ratio(s, trace=self.tune, steps=STEPS // 4)
        )

    def throughput_optimal(
        self, cost: echo.CostModel | None = None, calibration: echo.Calibration | None = None
    ) -> Scheduler:
        """Nothing tuned."""
        return Scheduler.throughput_optimal(
            calibration or self.calibration, cost or self.cost, beam=self.tune.beam
        )

    def paper(
        self, k_max: int, calibration: echo.Calibration | None = None, beam: int = 2
    ) -> Scheduler:
        """ECHO's rule and gates."""
        return Scheduler.paper(calibration or self.calibration, k_max=k_max, beam=beam)

    @lru_cache  # noqa: B019
    def policies(self) -> dict[str, Scheduler]:
        """One tuned representative of each family."""
        tuned = {
            name: self.tuned(policy)
            for name, policy in {
                "EAGLE": eagle,
                "ECHO (paper)": paper,
                "global top-K": top_k,
            }.items()
        }
        return {**tuned, "throughput-optimal": self.throughput_optimal()}

    def run(
        self,
        scheduler: Scheduler,
        *,
        trace: Trace | None = None,
        batch: int = BATCH,
        steps: int = STEPS,
        **options,
    ) -> Steps:
        """Steps of a replay, the history one step late."""
        return run(
            trace or self.test, scheduler, self.cost, batch, steps, **{"lag": LAG, **options}
        )

    def ratio(self, scheduler: Scheduler, **options) -> float:
        """Throughput over plain decoding, both under the true cost."""
        return self.run(scheduler, **options).ratio(self.cost)


def budget(study: Study) -> dict[str, object]:
    """Throughput by K_max, where the curve has its knee and where it has another."""
    rows = (80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
    runs = {
        "ECHO (paper)": [study.run(study.paper(k)) for k in rows],
        "global top-K": [
            study.run(Scheduler(echo.GlobalRank(study.tune.beam, study.calibration), None, k, 6))
            for k in rows
        ],
    }
    laws = {"knee at 256": study.cost, "knee at 1024": shapes()["mixture of experts, knee at 1024"]}
    return {
        "rows": rows,
        "curves": {
            f"{name}, {law}": [r.ratio(cost) for r in found]
            for name, found in runs.items()
            for law, cost in laws.items()
        },
    }


def warmup(study: Study) -> dict[str, object]:
    """Throughput by the number of texts that were calibrated on; three draws of each size."""
    rng, sizes = np.random.default_rng(0), (1, 2, 4, 8, 16)
    curves: dict[str, list[list[float]]] = {"ECHO (paper)": [], "throughput-optimal": []}
    rows: list[int] = []
    for size in (*sizes, len(study.tune.kind)):
        draws = [
            rng.permutation(len(study.tune.kind))[:size] for _ in range(3 if size in sizes else 1)
        ]
        calibrations = [calibrate(study.tune.texts(draw)) for draw in draws]
        rows.append(int(np.mean([sum(np.diff(study.tune.indptr)[draw]) for draw in draws])))
        curves["ECHO (paper)"].append(
            [study.ratio(study.paper(256, c), steps=STEPS - WARM) for c in calibrations]
        )
        curves["throughput-optimal"].append(
            [
                study.ratio(study.throughput_optimal(calibration=c), steps=STEPS - WARM)
                for c in calibrations
            ]
        )
    return {"positions": rows, "curves": curves}


def gate_errors(study: Study) -> dict[str, object]:
    """How often a threshold stops what the target accepts, and passes what it rejects, by depth."""
    log = warmup_log(study.test)
    result: dict[str, list[float]] = {
        name: [] for name in ("depth", "gate", "false_stops", "false_extensions", "rows")
    }
    for d in study.calibration.depths:
        mine = (log.depth == d.depth) & (log.rank == 0)
        passed, accepted = log.confidence[mine] > d.threshold, log.accepted[mine]
        result["depth"].append(d.depth)
        result["gate"].append(bool(d.gate))
        result["rows"].append(int(mine.sum()))
        result["false_stops"].append(float((~passed & accepted).sum() / accepted.sum()))
        result["false_extensions"].append(float((passed & ~accepted).sum() / (~accepted).sum()))
    return result


def doubtful(trace: Trace) -> np.ndarray:
    """bool [R]: the quarter of the texts whose first draft is accepted least often."""
    rank, owner = trace.rank[:, 0], np.repeat(np.arange(len(trace.kind)), np.diff(trace.indptr))
    drafted = rank >= -1
    rate = np.bincount(owner, (rank == 0) & drafted) / np.bincount(owner, drafted).clip(1)
    return rate <= np.quantile(rate, 0.25)


def fairness(study: Study) -> dict[str, object]:
    """Shares of the doubtful quarter of the requests, and Jain's index."""
    weak = doubtful(study.test)
    return {name: served(study, scheduler, weak) for name, scheduler in study.policies().items()}


def served(study: Study, scheduler: Scheduler, weak: np.ndarray) -> dict[str, object]:
    """One policy's figures by request, and over time for the doubtful quarter."""
    rows, tokens, steps = (np.zeros(len(weak)) for _ in range(3))
    drafted = {True: [], False: []}

    def observe(record: Record) -> None:
        each = record.packed.indptr.diff().numpy()
        np.add.at(rows, record.requests, each - 1)
        np.add.at(tokens, record.requests, record.emitted)
        np.add.at(steps, record.requests, 1)
        for kind, found in drafted.items():
            mine = weak[record.requests] == kind
            found.append(float((each[mine] - 1).mean()) if mine.any() else float("nan"))

    found = study.run(scheduler, steps=2 * STEPS, observe=observe)
    rate, accepted = tokens / steps, tokens - steps
    return {
        "ratio": found.ratio(study.cost),
        "doubtful_steps": float(steps[weak].sum() / steps.sum()),
        "doubtful_rows": float(rows[weak].sum() / rows.sum()),
        "doubtful_accepted": float(accepted[weak].sum() / accepted.sum()),
        "doubtful_tokens_per_step": float(tokens[weak].sum() / steps[weak].sum()),
        "other_tokens_per_step": float(tokens[~weak].sum() / steps[~weak].sum()),
        "jain": float(rate.sum() ** 2 / (len(rate) * (rate**2).sum())),
        "over_time": {
            "doubtful": range_of_tens(drafted[True]),
            "others": range_of_tens(drafted[False]),
        },
    }


def range_of_tens(rows: list[float]) -> list[float]:
    """Least and greatest mean of ten consecutive steps."""
    means = [np.nanmean(rows[i : i + 10]) for i in range(len(rows) - 9)]
    return [float(min(means)), float(max(means))]


def tail(study: Study) -> dict[str, object]:
    """Tokens of one request in one step, and over a whole text: the middle and both ends."""
    result: dict[str, object] = {}
    for name, scheduler in study.policies().items():
        each: list[np.ndarray] = []
        study.run(scheduler, observe=lambda record, each=each: each.append(record.emitted.copy()))
        order = np.random.default_rng(1).permutation(len(study.test.kind))
        report: Report = play(study.test, scheduler, study.cost, batch=BATCH // 2, order=order)
        step = np.concatenate(each)
        text = [answer.tokens / answer.steps for answer in report.answers if answer.steps]
        slow = [answer.seconds / answer.tokens for answer in report.answers if answer.tokens]
        result[name] = {
            "step": {str(p): float(np.percentile(step, p)) for p in (50, 95, 99)},
            "share": [float((step >= n).mean()) for n in range(1, study.test.depth + 2)],
            "text": {str(p): float(np.percentile(text, p)) for p in (1, 5, 50, 95, 99)},
            "seconds_per_token": {str(p): float(np.percentile(slow, p)) for p in (50, 95, 99)},
        }
    return result


def wrong_cost(study: Study) -> dict[str, object]:
    """Throughput-optimal with a wrong cost model: the knee or the drafter's cost off by 2x."""
    law = lambda knee: tuple(1.0 + max(0.0, r - knee) / knee for r in study.cost.num_tokens)
    beliefs = {
        "true": study.cost,
        "knee at half": replace(study.cost, seconds=law(128)),
        "knee at twice": replace(study.cost, seconds=law(512)),
        "draft at half": replace(study.cost, draft_layer=study.cost.draft_layer / 2),
        "draft at twice": replace(study.cost, draft_layer=study.cost.draft_layer * 2),
    }
    batches = (8, 64, 128, 256)
    found = {
        name: [
            study.ratio(study.throughput_optimal(cost), batch=b, steps=min(STEPS, 4096 // b))
            for b in batches
        ]
        for name, cost in beliefs.items()
    }
    learnt = study.throughput_optimal(beliefs["knee at twice"])
    found["knee at twice, learning"] = [
        study.ratio(learnt, batch=b, steps=min(STEPS, 4096 // b), update_rate=0.3) for b in batches
    ]
    return {"batch": batches, "curves": found}


def temperature(study: Study, path: Path) -> dict[str, object]:
    """The same prompts at temperature 0.8, calibrated on greedy text and on themselves."""
    tune, test = halves(Trace.load(path))
    own = calibrate(tune)
    whole = study.test.texts(range(len(test.kind)))
    pieces = truncated(whole, int(test.limit.max()))
    greedy = pieces.texts(
        np.flatnonzero(np.isin(pieces.indptr[:-1], whole.indptr)).tolist()
    )  # the answers' beginnings
    batch = 16
    k_max = 6 * batch
    result: dict[str, object] = {"positions": int(test.positions)}
    cases = {
        "greedy": (greedy, study.calibration),
        "0.8": (test, study.calibration),
        "0.8, calibrated at 0.8": (test, own),
    }
    for name, (trace, calibration) in cases.items():
        chosen = {
            "EAGLE": Scheduler.eagle(max_verify_tokens_per_req=6, beam=2, max_depth=3),
            "ECHO (paper)": study.paper(k_max, calibration),
            "throughput-optimal": study.throughput_optimal(calibration=calibration),
        }
        found = {
            policy: study.run(s, trace=trace, batch=batch, steps=120)
            for policy, s in chosen.items()
        }
        result[name] = {
            policy: {
                "ratio": f.ratio(study.cost),
                "tokens_per_step": float(f.tokens.mean() / batch),
            }
            for policy, f in found.items()
        }
    return result


def lag(study: Study) -> dict[str, object]:
    """Throughput-optimal on a history of the step before, or of one or two earlier."""
    batches = (8, 64, 128)
    found = {
        str(late): [
            study.ratio(study.throughput_optimal(), batch=b, lag=late, steps=min(80, 6144 // b))
            for b in batches
        ]
        for late in (0, 1, 2)
    }
    return {"batch": batches, "curves": found}


def truncated(trace: Trace, tokens: int) -> Trace:
    """The texts cut into pieces of at most so many tokens, each a request of its own."""
    cuts = [
        np.append(np.arange(a, b - 1, tokens), b)
        for a, b in zip(trace.indptr, trace.indptr[1:], strict=False)
    ]
    lengths = np.concatenate([np.diff(cut) for cut in cuts])
    kind = np.concatenate(
        [np.full(len(cut) - 1, kind) for cut, kind in zip(cuts, trace.kind, strict=True)]
    )
    limit = np.full(len(lengths), tokens + 1, np.int32)
    return replace(trace, indptr=np.concatenate([[0], lengths.cumsum()]), kind=kind, limit=limit)


def churn(study: Study) -> dict[str, object]:
    """Requests of a few tokens, so that some leave and others join at every step."""
    lives = (4, 8, 16, 32, 64)
    policies = {
        name: scheduler for name, scheduler in study.policies().items() if name != "global top-K"
    }
    curves: dict[str, list[float]] = {name: [] for name in policies}
    joined: list[float] = []
    for life in lives:
        trace, fresh = truncated(study.test, life), list[float]()
        for name, scheduler in policies.items():
            see = lambda r, fresh=fresh: fresh.append(float((r.position == 0).mean()))
            curves[name].append(study.ratio(scheduler, trace=trace, observe=see))
        joined.append(float(np.mean(fresh[-STEPS:])))
    return {"tokens": lives, "joined": joined, "curves": curves}


SECTIONS: dict[str, Callable[[Study], dict[str, object]]] = {
    "budget": budget,
    "warmup": warmup,
    "gate_errors": gate_errors,
    "fairness": fairness,
    "tail": tail,
    "wrong_cost": wrong_cost,
    "lag": lag,
    "churn": churn,
}


POLICIES = ("EAGLE", "ECHO (paper)", "global top-K", "throughput-optimal")


def draw_wrong_cost(axis, r) -> None:
    """Throughput-optimal under wrong beliefs."""
    looks = (
        (plot.of("throughput-optimal"), "o-"),
        *((colour, line) for colour in (plot.BAD, plot.QUIET, plot.INK) for line in ("o-", "o--")),
    )
    for (name, ratio), (colour, line) in zip(r["curves"].items(), looks, strict=False):
        axis.plot(r["batch"], ratio, line, ms=3, color=colour, label=name)
    _batches(axis, r["batch"])


def draw(results: dict, folder: Path) -> None:
    """Writes gaps-wrong-cost.png."""
    if "wrong_cost" not in results:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with plot.figure(4.4, 3.2) as single:
        axis = single.subplots()
        draw_wrong_cost(axis, results["wrong_cost"])
        axis.set_title("cost model wrong by 2x")
        axis.legend(fontsize=6.5)
        single.savefig(folder / "gaps-wrong-cost.png", dpi=110)


def _batches(axis, batches) -> None:
    by_batch(axis, batches)
    axis.set_xlabel("batch")
    axis.set_ylabel("throughput / plain decoding")


def main() -> None:
    """Runs the sections and draws them."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[*SECTIONS, "temperature"])
    parser.add_argument("--sampled", type=Path, default=HERE / "traces" / "smollm2-sampled.npz")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, start = Console(), time.perf_counter()
    tune, test = halves(Trace.load(args.trace))
    study = Study(tune, test, shapes()[LAW], calibrate(tune))
    path = args.out / "gaps.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        begun = time.perf_counter()
        results[name] = (
            temperature(study, args.sampled) if name == "temperature" else SECTIONS[name](study)
        )
        console.print(f"{name}: {time.perf_counter() - begun:.0f} s")
        write(path, results)
    draw(results, args.images)
    console.print(
        f"{path} and {args.images}/gaps*.png written; {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
