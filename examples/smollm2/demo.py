"""The whole method on a real model: warm up, calibrate, measure the machine, decode, compare.

    make demo                 # about 5 minutes on two cores
    make demo ARGS="--full"   # all prompts at all batch sizes, longer answers, more rounds

Writes out/demo.json and out/demo.png, and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import echo

Scheduler = echo.ElasticBudgetScheduler
BEAM, DEPTH, LENGTH = 4, 6, 448
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
PLAIN = "plain decoding"


@dataclass
class Run:
    """Sums over one policy at one batch size."""

    policy: str
    batch: int
    tokens: int = 0
    seconds: float = 0.0
    draft: float = 0.0
    scheduling: float = 0.0
    verify: float = 0.0
    steps: int = 0
    request_steps: int = 0
    rows: int = 0
    accepted: int = 0
    layers: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)

    def add(self, step: echo.loop.Step) -> None:
        """Counts one step."""
        self.steps += 1
        self.request_steps += len(step.requests)
        self.rows += int(step.packed.indptr[-1])
        self.accepted += int((step.accepted.num_emitted - 1).clamp(min=0).sum())
        self.layers += step.tree.depth
        self.draft += step.seconds.draft
        self.scheduling += step.seconds.scheduling
        self.verify += step.seconds.verify
        for request, tokens in zip(step.requests, step.emitted, strict=True):
            self.tokens += len(tokens)
            self.answers.setdefault(request, []).extend(tokens)

    def figures(self) -> dict[str, float]:
        """What the table and the JSON show."""
        drafts = self.rows - self.request_steps
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_step": 1 + self.accepted / self.request_steps,
            "rows_per_step": self.rows / self.steps,
            "layers_per_step": self.layers / self.steps,
            "acceptance_rate": self.accepted / drafts if drafts else math.nan,
            "draft_seconds": self.draft,
            "scheduling_seconds": self.scheduling,
            "verify_seconds": self.verify,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


class Demo:
    """The models, loaded once, and what is measured with them."""

    def __init__(self, console: Console) -> None:
        from model import encode, load
        from prompts import EVALUATION, KINDS, WARMUP

        self.console = console
        with console.status("loading SmolLM2-135M-Instruct (20 seconds)"):
            self.model, self.tokenizer = load()
        warmup, self.texts = (
            [*itertools.chain(*zip(*(rows[kind] for kind in KINDS), strict=True))]
            for rows in (WARMUP, EVALUATION)
        )
        self.warmup = encode(self.tokenizer, warmup)
        self.evaluation = encode(self.tokenizer, self.texts)

    def steps(self, scheduler: Scheduler, prompts, batch: int, new: int, **drafter_options):
        """Decodes the prompts; yields steps."""
        from drafters import pooled
        from model import SmolLM2

        target, drafter = SmolLM2(self.model, batch, LENGTH), None
        if scheduler.max_depth:
            drafter = pooled(target, batch, LENGTH, k=BEAM, **drafter_options)
        return echo.decode(
            scheduler, target, drafter, prompts, max_num_reqs=batch, max_new_tokens=new,
            eos_token=self.tokenizer.eos_token_id, max_verify_tokens_per_req=64,
        )  # fmt: skip

    def record(self, prompts: int, new: int) -> echo.WarmupLog:
        """A warm-up log: nothing is gated, and the best nodes of every layer are verified."""
        scheduler, logs = Scheduler(echo.TwoLevel(BEAM, 0), budget=8 * 64, max_depth=DEPTH), []
        with self._progress() as bar:
            task = bar.add_task("warm-up: drafting without a gate", total=prompts)
            for step in self.steps(scheduler, self.warmup[:prompts], 8, new, floor=-math.inf):
                logs.append(step.log())
                bar.advance(task, len(step.finished))
        return echo.WarmupLog.concat(logs)

    def cost(self, repeats: int) -> echo.CostModel:
        """Seconds of a forward pass by rows, at 150 tokens of prefix, and of a drafted layer."""
        from model import SmolLM2

        target = SmolLM2(self.model, max(ROWS), LENGTH)
        target.cache.used[:] = 150
        plain = Scheduler.autoregressive()
        with self._progress() as bar:
            task = bar.add_task("cost curve: rows -> seconds", total=len(ROWS) * (repeats + 1) + 2)

            def step(rows: int) -> None:
                target.verify(torch.arange(rows), plain.pack(plain.begin(torch.full((rows,), 100))))
                bar.advance(task)

            rows, seconds = echo.cost.profile(step, ROWS, repeats=repeats)
            layer = []  # seconds of a drafted layer, scheduling included, at batch 1 and 16
            for batch in (1, 16):
                scheduler = Scheduler.eagle(max_verify_tokens_per_req=4, beam=BEAM, max_depth=4)
                done = list(self.steps(scheduler, self.warmup[:batch], batch, 16))[1:]
                spent = sum(s.seconds.draft + s.seconds.scheduling for s in done)
                layer.append(spent / sum(s.tree.depth for s in done))
                bar.advance(task)
        nodes = (1 + 3 * BEAM) / 4  # that a request expands in one of four layers
        each = max(0.0, (layer[1] - layer[0]) / (15 * nodes))
        first = max(0.0, layer[0] - nodes * each)
        return echo.CostModel.from_samples(rows, seconds, draft_layer=first, draft_token=each)

    def compare(
        self, policies: dict[str, Scheduler], batches: dict[int, int], new: int, rounds: int
    ) -> list[Run]:
        """Every policy at every batch size, the fastest of its rounds.

        What else the machine does only adds time; rounds alternate the order of the policies, so
        that a slow moment hits none of them alone.
        """
        runs: dict[tuple[int, str], Run] = {}
        cells = [(n, batch) for n in range(rounds) for batch in batches]
        with self._progress() as bar:
            task = bar.add_task("decoding", total=len(cells) * len(policies))
            for number, batch in cells:
                for name in list(policies)[:: -1 if number % 2 else 1]:
                    bar.update(task, description=f"decoding: batch {batch}, {name}")
                    run, start = Run(name, batch), time.perf_counter()
                    prompts = self.evaluation[: batches[batch]]
                    for step in self.steps(policies[name], prompts, batch, new):
                        run.add(step)
                    run.seconds = time.perf_counter() - start
                    best = runs.get((batch, name), run)
                    runs[batch, name] = min(best, run, key=lambda r: r.seconds)
                    bar.advance(task)
        return list(runs.values())

    def _progress(self) -> Progress:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        return Progress(TextColumn("{task.description:<52}"), *columns, console=self.console)


def budget(cost: echo.CostModel) -> int:
    """K_max: the knee, or the rows of 1.5 times a row's seconds if the curve is hardly flat."""
    return max(cost.knee.k_max, cost.tokens_within(1.5))


def policies(calibration: echo.Calibration, cost: echo.CostModel) -> dict[str, Scheduler]:
    """The compared policies."""
    k_max, ranking = budget(cost), echo.GlobalRank(BEAM, calibration)
    best = Scheduler.throughput_optimal(calibration, cost, beam=BEAM)
    return {
        PLAIN: Scheduler.autoregressive(),
        "EAGLE tree, 8 rows each": Scheduler.eagle(
            max_verify_tokens_per_req=8, beam=BEAM, max_depth=4
        ),
        "ECHO, the paper": Scheduler.paper(calibration, k_max=k_max, beam=2),
        "global ranking": Scheduler(ranking, budget=k_max, max_depth=DEPTH),
        # Draft extend and scheduling beyond the layers, 3 to 8% of a step at batch 16, are not in
        # this cost model.
        "throughput-optimal": replace(best, margin=0.05),
    }


def show(console: Console, runs: list[Run]) -> None:
    """Prints the table."""
    table = Table(title="SmolLM2-135M-Instruct, greedy, float32", header_style="bold")
    names = "batch", "policy", "tokens/s", "vs plain", "tokens/step", "rows/step", "layers"
    for name in (*names, "drafts\naccepted", "draft s", "scheduling s", "verify s"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    base = {run.batch: run.figures()["tokens_per_second"] for run in runs if run.policy == PLAIN}
    for run in runs:
        f = run.figures()
        rate, accepted = f["tokens_per_second"], f["acceptance_rate"]
        table.add_row(
            str(run.batch), run.policy, f"{rate:.0f}", f"{rate / base[run.batch]:.2f}x",
            f"{f['tokens_per_step']:.2f}", f"{f['rows_per_step']:.1f}",
            f"{f['layers_per_step']:.1f}",
            "-" if math.isnan(accepted) else f"{accepted:.0%}", f"{run.draft:.1f}",
            f"{run.scheduling:.1f}", f"{run.verify:.1f}", end_section=run.policy == runs[-1].policy,
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Runs the demo."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument(
        "--full", action="store_true", help="all prompts, longer answers, more rounds"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of JSON and picture")
    args = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    start, full = time.perf_counter(), args.full
    demo = Demo(console)
    log = demo.record(32, 96 if full else 64)
    calibration = echo.calibrate(log)
    for d in calibration.depths:
        gate = f"gate above {d.threshold:.2f}" if d.gate else "no gate        "
        console.print(f"  depth {d.depth}: {gate}  {d.reason}")
    cost = demo.cost(9 if full else 5)
    knee, k_max = cost.knee, budget(cost)
    beyond = f"then {knee.gamma:.1%} of a step for each row more"
    console.print(f"  one row {1e3 * cost(1):.0f} ms; the knee is at {knee.k_max}, {beyond}")
    console.print(f"  K_max = {k_max} rows")
    layer, node = 1e3 * cost.draft_layer, 1e3 * cost.draft_token
    console.print(f"  a drafted layer {layer:.1f} ms and {node:.2f} ms a node")
    batches = {1: 32, 4: 32, 16: 32} if full else {1: 4, 4: 8, 16: 32}
    sizes = (128, 3) if full else (64, 2)
    runs = demo.compare(policies(calibration, cost), batches, *sizes)
    show(console, runs)
    plain = {run.batch: run.answers for run in runs if run.policy == PLAIN}
    same = f"{sum(run.answers == plain[run.batch] for run in runs)} of {len(runs)} runs"
    ties = "near ties of the two best logits may differ"
    console.print(f"same text as plain decoding: {same} (float32; {ties})")

    from picture import draw

    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "k_max": k_max,
        "knee": knee.k_max,
        "gamma": knee.gamma,
        "cost": json.loads(cost.to_json()),
        "calibration": json.loads(calibration.to_json()),
        "warmup_rows": len(log),
        "runs": [{"policy": run.policy, "batch": run.batch, **run.figures()} for run in runs],
        "seconds": time.perf_counter() - start,
    }
    files = args.out / "demo.png", args.out / "demo.json"
    files[1].write_text(json.dumps(result, indent=1))
    draw(log, calibration, cost, k_max, runs, files[0], PLAIN)
    fast = min(
        (run for run in runs if run.batch == max(batches) and run.policy != PLAIN),
        key=lambda run: run.seconds,
    )
    console.print(f"\nWhat the model wrote ({fast.policy}, batch {fast.batch}):")
    for number in (0, 3):
        text = demo.tokenizer.decode(fast.answers[number], skip_special_tokens=True)
        console.print(f"[bold]{demo.texts[number]}[/bold]\n{text}\n", highlight=False)
    took = time.perf_counter() - start
    console.print(f"{files[0]} and {files[1]} written; {took:.0f} s in all")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
