"""How many GPUs does elastic speculation save a service, and what can it cost? A simulation.

    python benchmarks/service.py               # under two minutes on one core
    python benchmarks/service.py --share 0.1   # a glance

Replicas (LLaMA-3.3-70B on 4 x H100 each, by the roofline) behind a router that sends each request
to the replica with fewest: continuous batching, chunked prefill in the same forward pass, a limit
on cached tokens. What a step emits, launches and drafts is drawn from exact replays of the policy
at about that batch size, with and without a chunk of prefill beside it, of the text that each
request writes. Then the worst ratio to speculation off under churn, lag and drift, by exact replay.
All draws come from one seed.

Writes benchmarks/results/service.json, service.md and service.png.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import simpy
import torch

import echo
from common import roofline
from common.raised import raised, raised_to
from common.replays import FREE, arguments, calibrate, fold, halves, unfold, write
from echo import plot
from echo.testing import Record, Trace, replay

MODEL = "LLaMA-3.3-70B"
MODELS = ("LLaMA-3.1-8B", MODEL, "Qwen3-235B-A22B")
CONTEXT = 800
"""Tokens of context of a request."""
WORST = {8: 160, 64: 120, 256: 120}
"""Steps by batch of the replays for the worst ratio."""
Scheduler = echo.ElasticBudgetScheduler
GPUS = 4
STEPS = {1: 100, 4: 50, 16: 36, 32: 30, 64: 26, 96: 24, 128: 22, 192: 22, 256: 22}
WARM = 8
"""Batch sizes replayed, steps of each, the first few left out; other sizes use the next larger."""
CHUNK = 512
"""Prefill tokens in one step at most."""
MAX_NUM_REQS = 256
CACHE = 440_000
"""Tokens of KV cache of a replica: what 4 x 80 GB leave beside the weights, at 328 kB each."""
NAMES = ("as recorded", "raised")
LEVELS, TTFT, ATTAINED = (20, 40), 2.0, 0.95
"""Service levels: milliseconds a token, seconds to the first, of that share of the requests."""
SECONDS, SETTLE = 45.0, 12.0
"""Simulated, and of those left out at the start."""


@dataclass(frozen=True)
class Beside(Scheduler):
    """A scheduler whose forward passes always take some prefill tokens too."""

    prefill: int = 0

    def choose_tier(
        self, history: echo.History, req_indices: torch.Tensor, num_other_tokens: int = 0
    ) -> echo.budget.Tier:
        return super().choose_tier(history, req_indices, num_other_tokens + self.prefill)


@dataclass(frozen=True)
class Steps:
    """Replayed steps of a policy at one batch size.

    Attributes:
        num_verify_tokens: float64 [steps], launched for each request.
        layers, beam: int64 [steps], drafted, and nodes of a layer that each request expands.
        emitted: int64 [texts, most], tokens of each text in each step that drafted.
        counts: int64 [texts], how many steps those are.
    """

    num_verify_tokens: np.ndarray
    layers: np.ndarray
    beam: np.ndarray
    emitted: np.ndarray
    counts: np.ndarray


def replayed(trace: Trace, scheduler: Scheduler, batch: int, prefill: int, share: float) -> Steps:
    """Steps of the policy on the trace, beside ``prefill`` tokens of prefill."""
    own = {
        name: getattr(scheduler, name)
        for name in (
            "rule",
            "gate",
            "budget",
            "max_depth",
            "max_verify_tokens_per_req",
            "probe_interval",
            "margin",
        )
    }
    seen: list[tuple[float, int, int]] = []
    emitted: list[list[int]] = [[] for _ in trace.kind]

    def observe(record: Record) -> None:
        tier = record.tier
        beam = tier.beam or scheduler.rule.beam
        seen.append((tier.num_verify_tokens / batch, tier.depth, beam))
        if record.tier.depth:
            for text, tokens in zip(record.requests, record.emitted, strict=True):
                emitted[text].append(int(tokens))

    order, steps = (
        np.random.default_rng(2).permutation(len(trace.kind)),
        WARM + max(6, int(share * STEPS[batch])),
    )
    prefill = 0 if scheduler.budget is None else prefill  # a static tree knows of no prefill
    replay(
        trace,
        Beside(**own, prefill=prefill),
        FREE,
        batch=batch,
        steps=steps,
        order=order,
        observe=observe,
    )
    verified, layers, beam = np.array(seen[WARM:]).T
    pool = [token for tokens in emitted for token in tokens] or [1]
    emitted = [tokens or pool for tokens in emitted]
    table = np.zeros((len(emitted), max(map(len, emitted))), dtype=int)
    for row, tokens in zip(table, emitted, strict=True):
        row[: len(tokens)] = tokens
    return Steps(
        verified,
        layers.astype(int),
        beam.astype(int),
        table,
        np.array([len(tokens) for tokens in emitted]),
    )


@dataclass(frozen=True)
class Load:
    """Requests a second at all replicas: "poisson", or "bursty" (gamma gaps, variation 3)."""

    rate: float
    kind: str

    def requests(self, rng: np.random.Generator, seconds: float, texts: int) -> Requests:
        """Log-normal prompts and answers: medians 150 and 250 tokens, at most 4,096 and 1,024."""
        shape = 1.0 if self.kind == "poisson" else 1 / 9
        count = int(self.rate * seconds * 1.3) + 100
        arrival = rng.gamma(shape, 1 / (shape * self.rate), count).cumsum()
        prompt = np.clip(rng.lognormal(np.log(150), 1.1, count), 16, 4096).astype(int)
        output = np.clip(rng.lognormal(np.log(250), 0.8, count), 8, 1024).astype(int)
        text, inside = rng.integers(0, texts, count), arrival < seconds
        return Requests(*(column[inside] for column in (arrival, prompt, output, text)))


class Requests:
    """All requests of a run as columns: arrival, lengths, progress, first and last token."""

    def __init__(
        self, arrival: np.ndarray, prompt: np.ndarray, output: np.ndarray, text: np.ndarray
    ) -> None:
        self.arrival, self.prompt, self.output, self.text = arrival, prompt, output, text
        self.prefilled, self.written, self.unprocessed = (np.zeros_like(prompt) for _ in range(3))
        self.first, self.end = np.full(len(arrival), np.inf), np.full(len(arrival), np.inf)


@dataclass
class Replica:
    """One copy of the model: continuous batching, chunked prefill, a limited KV cache."""

    env: simpy.Environment
    requests: Requests
    steps: dict[tuple[int, bool], Steps]
    cost: echo.CostModel
    rng: np.random.Generator
    waiting: deque[int] = field(default_factory=deque)
    running: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    cached: int = 0

    def __post_init__(self) -> None:
        self.wake = self.env.event()
        self.env.process(self.run())

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, request: int) -> None:
        self.waiting.append(request)
        if not self.wake.triggered:
            self.wake.succeed()

    def run(self) -> Iterator[simpy.Event]:
        every = self.requests
        while True:
            if not self.load:
                self.wake = self.env.event()
                yield self.wake
            while self.waiting and len(self.running) < MAX_NUM_REQS:
                need = int(every.prompt[self.waiting[0]] + every.output[self.waiting[0]])
                if self.cached + need > CACHE:
                    break
                self.cached += need
                self.running = np.append(self.running, self.waiting.popleft())
            yield self.env.timeout(self.step())
            self.leave()

    def step(self) -> float:
        """Prefill and decode, first come first served; the seconds that it takes."""
        every, running = self.requests, self.running
        missing = every.prompt[running] - every.prefilled[running]
        part = np.clip(CHUNK - (missing.cumsum() - missing), 0, missing)
        writing, prefill = running[missing == 0], int(part.sum())
        context = float((every.prefilled[writing] + every.written[writing]).sum())
        verified, drafting, emitted = self.decide(writing, prefill)
        every.prefilled[running] += part
        every.written[writing] += emitted
        every.written[running[(missing > 0) & (part == missing)]] = (
            1  # the last row of the prompt gives the first token
        )
        return (
            float(
                self.cost(verified + prefill, num_reqs=max(1, len(writing)), context_tokens=context)
            )
            + drafting
        )

    def leave(self) -> None:
        """After the step: first tokens, and requests that are done."""
        every, running = self.requests, self.running
        begun, done = every.written[running] >= 1, every.written[running] >= every.output[running]
        every.first[running[begun]] = np.minimum(every.first[running[begun]], self.env.now)
        every.end[running[done]] = self.env.now
        self.cached -= int((every.prompt + every.output)[running[done]].sum())
        self.running = running[~done]

    def decide(self, writing: np.ndarray, prefill: int) -> tuple[float, float, np.ndarray | int]:
        """Verify tokens, seconds of drafting and emitted tokens, of one replayed step."""
        batch = len(writing)
        if not batch:
            return 0.0, 0.0, 0
        size = next(b for b in STEPS if b >= batch)
        steps = self.steps[size, prefill > CHUNK // 2]
        pick = int(self.rng.integers(len(steps.num_verify_tokens)))
        verified, layers = float(steps.num_verify_tokens[pick]) * batch, int(steps.layers[pick])
        unprocessed = self.requests.unprocessed
        if layers == 0:
            unprocessed[writing] += 1
            return verified, 0.0, 1
        drafting = float(
            self.cost.draft_seconds(layers, batch, int(steps.beam[pick]))
            + self.cost.extend_seconds(int(unprocessed[writing].sum()))
        )
        unprocessed[writing] = 0
        text = self.requests.text[writing]
        place = (self.rng.random(batch) * steps.counts[text]).astype(int)
        return verified, drafting, steps.emitted[text, place]


def simulate(
    steps: dict[tuple[int, bool], Steps],
    cost: echo.CostModel,
    load: Load,
    replicas: int,
    seed: int = 0,
) -> dict[str, float]:
    """One run: throughput, seconds a token at 50, 95 and 99%, requests within the service level.

    A request that is not answered within the simulated time is judged only where it has broken the
    level already.
    """
    env, rng = simpy.Environment(), np.random.default_rng(seed)
    every = load.requests(rng, SECONDS, len(steps[1, False].counts))
    fleet = [
        Replica(env, every, steps, cost, np.random.default_rng((seed, i))) for i in range(replicas)
    ]

    def arrive() -> Iterator[simpy.Event]:
        for request, arrival in enumerate(every.arrival):
            yield env.timeout(arrival - env.now)
            min(fleet, key=lambda r: r.load).submit(request)

    env.process(arrive())
    env.run(until=SECONDS)
    counted, done = every.arrival >= SETTLE, np.isfinite(every.end)
    wait = np.minimum(every.first, SECONDS) - every.arrival
    last = np.minimum(every.end, SECONDS)
    pace = (last - np.minimum(every.first, last)) / np.maximum(
        np.minimum(every.written, every.output) - 1, 1
    )
    own = pace[counted & done]
    result = {
        "tokens_per_second": float(
            every.output[done & (every.end >= SETTLE)].sum() / (SECONDS - SETTLE)
        ),
        **{
            f"tpot_{q}": float(np.percentile(own, q)) if len(own) else float("nan")
            for q in (50, 95, 99)
        },
    }
    for level in LEVELS:
        broken = (wait > TTFT) | ((pace > level / 1e3) & (done | (every.written > 20)))
        judged = counted & (done | broken)
        result |= {
            f"attained_{level}": float(1.0 - broken[judged].mean())
            if judged.any()
            else float("nan")
        }
    return result


def capacity(
    steps: dict[tuple[int, bool], Steps], cost: echo.CostModel, kind: str, level: int
) -> float:
    """Requests a second, for each of two replicas, that the service level bears, by bisection."""
    low, high = 0.0, 24.0
    for _ in range(6):
        middle = (low + high) / 2
        kept = simulate(steps, cost, Load(2 * middle, kind), 2)[f"attained_{level}"] >= ATTAINED
        low, high = (middle, high) if kept else (low, middle)
    return low


def fleet(
    steps: dict[str, dict[tuple[int, bool], Steps]], cost: echo.CostModel, replicas: int
) -> dict[str, list[dict[str, object]]]:
    """What a replica can carry, and fleets of 1 to 64 at a fifth more than "off" carries."""
    carried = [
        {
            "policy": policy,
            "arrivals": kind,
            "level": level,
            "rate": capacity(own, cost, kind, level),
        }
        for policy, own in steps.items()
        for kind, level in (("poisson", LEVELS[0]), ("bursty", LEVELS[0]), ("bursty", LEVELS[1]))
    ]
    load = 1.2 * float(str(carried[1]["rate"]))
    runs = [
        {
            "policy": policy,
            "replicas": count,
            **simulate(steps[policy], cost, Load(load * count, "bursty"), count),
        }
        for policy in ("off", "throughput-optimal")
        for count in (1, 8, 64)
        if count <= replicas
    ]
    return {"capacity": carried, "runs": runs}


def curve(
    steps: dict[str, dict[tuple[int, bool], Steps]], cost: echo.CostModel
) -> list[dict[str, object]]:
    """Two replicas under rising load, bursty."""
    return [
        {"policy": policy, "rate": rate, **simulate(own, cost, Load(2 * rate, "bursty"), 2)}
        for policy, own in steps.items()
        for rate in (1.0, 3.0, 6.0, 9.0, 12.0, 16.0)
    ]


def served(trace: Trace, better: bool, share: float, replicas: int) -> dict[str, Any]:
    """The service on the trace as recorded, or raised."""
    torch.set_num_threads(1)
    tune, test = halves(trace)
    odds = raised_to(tune, 7.0, (60, 6, 8)) if better else 1.0
    tune, test = raised(tune, odds), raised(test, odds)
    cost, calibration = roofline.plan(MODEL, tensor=GPUS, most_rows=16384), calibrate(tune)
    steps = {
        policy: {
            (batch, beside): replayed(
                test,
                policies(calibration, cost, batch, test.beam)[policy],
                batch,
                CHUNK * beside,
                share,
            )
            for batch in STEPS
            for beside in (False, True)
        }
        for policy in policies(calibration, cost, 1, test.beam)
    }
    return {"odds": odds, "curve": curve(steps, cost), **fleet(steps, cost, replicas)}


def policies(
    calibration: echo.Calibration, cost: echo.CostModel, batch: int, beam: int
) -> dict[str, Scheduler]:
    """Untuned: off, SGLang's default tree, the paper's rule within the knee, throughput-optimal."""
    at = cost.at(batch, CONTEXT * batch)
    k_max = min(at.knee.k_max, 60 * batch)
    return {
        "off": Scheduler.autoregressive(),
        "EAGLE-3": Scheduler.eagle(max_verify_tokens_per_req=8, beam=4, max_depth=5),
        "ECHO": Scheduler(
            echo.TwoLevel(3, 8), echo.SparseGate(calibration), k_max, calibration.max_depth
        ),
        "throughput-optimal": Scheduler.throughput_optimal(calibration, at, beam=beam),
    }


def conditions(tune: Trace, test: Trace) -> dict[str, tuple[Trace, echo.Calibration, int]]:
    """Trace, calibration and lag. Drift: calibrated on code alone. Churn: texts of 12 tokens."""
    known, only_code = (
        calibrate(tune),
        calibrate(tune.texts(np.flatnonzero(tune.kind == "code").tolist())),
    )
    other = test.texts(np.flatnonzero(test.kind != "code").tolist())
    return {
        "none": (test, known, 0),
        "lag 2": (test, known, 2),
        "drift": (other, only_code, 0),
        "churn": (cut(test, 12), known, 0),
        "all": (cut(other, 12), only_code, 2),
    }


def cut(trace: Trace, tokens: int) -> Trace:
    """The trace with every text cut into texts of that many tokens, the rest left out."""
    starts = [
        np.arange(a, b - tokens + 1, tokens)
        for a, b in zip(trace.indptr[:-1], trace.indptr[1:], strict=True)
    ]
    at = (np.concatenate(starts)[:, None] + np.arange(tokens)).flatten()
    count, kind = len(at) // tokens, np.repeat(trace.kind, [len(s) for s in starts])
    columns = {name: getattr(trace, name)[at] for name in ("text", "token", "log_prob", "expanded")}
    return replace(
        trace,
        **columns,
        kind=kind,
        limit=np.full(count, tokens, np.int32),
        indptr=np.arange(count + 1) * tokens,
    )


def worst(tune: Trace, test: Trace, share: float) -> list[dict[str, object]]:
    """Exact replay of both elastic policies in every adversity: throughput over plain decoding."""
    torch.set_num_threads(1)
    cells: list[dict[str, object]] = []
    for name, (trace, calibration, lag) in conditions(tune, test).items():
        order = np.random.default_rng(3).permutation(len(trace.kind))
        for model in MODELS:
            for batch, count in WORST.items():
                cost = roofline.plan(model, most_rows=16384)
                at = cost.at(batch, CONTEXT * batch)
                for policy in ("ECHO", "throughput-optimal"):
                    scheduler = policies(calibration, cost, batch, trace.beam)[policy]
                    steps = max(8, int(share * count))
                    report = replay(
                        trace, scheduler, at, batch=batch, steps=steps, order=order, lag=lag
                    )
                    ratio = report.throughput / (batch / at(batch))
                    cells.append(
                        {
                            "adversity": name,
                            "model": model,
                            "batch": batch,
                            "policy": policy,
                            "ratio": ratio,
                        }
                    )
    return cells


def measure(
    trace: Trace, share: float, replicas: int, workers: int | None = None
) -> dict[str, Any]:
    """Everything, on both traces, each part in its own process."""
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        recorded, better = (
            pool.submit(served, trace, False, share, replicas),
            pool.submit(served, trace, True, share, 1),
        )
        ratios = pool.submit(worst, *halves(trace), share)
        found = dict(zip(NAMES, (recorded.result(), better.result()), strict=True))
        return {"model": MODEL, "gpus": GPUS, **found, "worst": ratios.result()}


def read(kept: dict[str, Any]) -> dict[str, Any]:
    """What :func:`measure` gave, from the file."""
    parts = {
        name: {part: unfold(cells, "policy") for part, cells in kept[name].items()}
        for name in NAMES
    }
    return parts | {"worst": unfold(kept["worst"], "adversity", "model", "policy")}


def markdown(result: dict[str, Any]) -> str:
    """Three tables: capacity and GPUs, fleets, and the worst ratios."""
    lines: list[str] = []
    for name in NAMES:
        rate = {
            (c["policy"], c["arrivals"], c["level"]): float(c["rate"])
            for c in result[name]["capacity"]
        }
        columns = (("poisson", LEVELS[0]), ("bursty", LEVELS[0]), ("bursty", LEVELS[1]))
        lines += [
            f"Trace {name}: requests a second that a replica carries, "
            "and GPUs for 100 and 1,000 a second (Poisson):",
            "",
        ]
        lines += [
            "| policy | "
            + " | ".join(f"{kind}, {level} ms" for kind, level in columns)
            + " | 100/s | 1,000/s |",
            "|---|---|---|---|---|---|",
        ]
        for policy in dict.fromkeys(c["policy"] for c in result[name]["capacity"]):
            own = rate[policy, "poisson", LEVELS[0]]
            need = " | ".join(
                f"{GPUS * int(np.ceil(load / own)):,}" if own else "-" for load in (100, 1000)
            )
            lines.append(
                f"| {policy} | "
                + " | ".join(f"{rate[(policy, *column)]:.1f}" for column in columns)
                + f" | {need} |"
            )
        lines.append("")
    lines += [
        f"Fleets at 1.2 times what off carries at {LEVELS[0]} ms, bursty, trace as recorded:",
        "",
    ]
    lines += [
        "| policy | replicas | tokens/s | ms a token at 50% | 95% | 99% | within the level |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result[NAMES[0]]["runs"]:
        pace = " | ".join(f"{1e3 * run[f'tpot_{q}']:.1f}" for q in (50, 95, 99))
        rate, kept = f"{run['tokens_per_second']:,.0f}", f"{run[f'attained_{LEVELS[0]}']:.1%}"
        lines.append(f"| {run['policy']} | {run['replicas']} | {rate} | {pace} | {kept} |")
    lines += [
        "",
        "Throughput over speculation off, the worst of batches 8, 64 and 256 "
        "(exact replay, trace as recorded):",
        "",
    ]
    cells = result["worst"]
    models, adversities = (
        list(dict.fromkeys(c[key] for c in cells)) for key in ("model", "adversity")
    )
    lines += [
        "| policy | model | " + " | ".join(adversities) + " |",
        "|---|---|" + "---|" * len(adversities),
    ]
    for policy in ("ECHO", "throughput-optimal"):
        for model in models:
            found = {
                a: min(
                    c["ratio"]
                    for c in cells
                    if (c["policy"], c["model"], c["adversity"]) == (policy, model, a)
                )
                for a in adversities
            }
            lines.append(
                f"| {policy} | {model} | "
                + " | ".join(f"{found[a]:.3f}" for a in adversities)
                + " |"
            )
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """For each trace seconds a token and the level attained by load, bursty; the worst ratios."""
    with plot.figure(15, 6.2) as figure:
        axes = figure.subplots(2, 4)
        for row, name in zip(axes, NAMES, strict=True):
            for policy in ("off", "EAGLE-3", "ECHO", "throughput-optimal"):
                runs = [c for c in result[name]["curve"] if c["policy"] == policy]
                rate = [r["rate"] for r in runs]
                for axis, key, scale in zip(
                    row,
                    ("tpot_50", "tpot_99", f"attained_{LEVELS[0]}"),
                    (1e3, 1e3, 1.0),
                    strict=False,
                ):
                    axis.plot(
                        rate,
                        [scale * r[key] for r in runs],
                        "o-",
                        ms=3,
                        color=plot.of(policy),
                        label=policy,
                    )
            for axis, title in zip(
                row,
                ("ms a token, median", "ms a token, 99%", f"share within {LEVELS[0]} ms"),
                strict=False,
            ):
                axis.set(
                    title=f"{title}: {name}",
                    xlabel="requests a second for each replica",
                    ylim=(0, None),
                )
            for axis, limit in zip(row, (LEVELS[0], LEVELS[0], ATTAINED), strict=False):
                axis.axhline(limit, color=plot.BAD, lw=0.8, ls="--")
        axes[0, 0].legend()
        for axis, policy in zip(axes[:, 3], ("ECHO", "throughput-optimal"), strict=True):
            cells = [c for c in result["worst"] if c["policy"] == policy]
            places = list(dict.fromkeys(c["adversity"] for c in cells))
            for cell in cells:
                shade = {8: "#9ecae1", 64: "#4292c6", 256: "#084594"}[cell["batch"]]
                axis.plot(places.index(cell["adversity"]), cell["ratio"], "o", ms=5, color=shade)
            axis.axhline(1, color=plot.INK, lw=0.8)
            axis.set_xticks(range(len(places)), places)
            axis.set(title=f"{policy} over off (dark: 256)", ylim=(0, None))
        figure.savefig(path, dpi=80)


def main() -> None:
    """Runs all of it."""
    parser = arguments(__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the replayed steps")
    parser.add_argument("--replicas", type=int, default=64, help="of the largest fleet")
    parser.add_argument(
        "--workers", type=int, help="processes; by default as many as there are cores"
    )
    args = parser.parse_args()
    start, trace = time.perf_counter(), Trace.load(args.trace)
    result = measure(trace, args.share, args.replicas, args.workers)
    text = markdown(result)
    parts = {
        name: {
            part: fold(cells, "policy") for part, cells in result[name].items() if part != "odds"
        }
        for name in NAMES
    }
    write(
        args.out / "service.json",
        parts | {"worst": fold(result["worst"], "adversity", "model", "policy")},
    )
    (args.out / "service.md").write_text(text)
    draw(result, args.out / "service.png")
    print(f"{text}\nwritten to {args.out}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
