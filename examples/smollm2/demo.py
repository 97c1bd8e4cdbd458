"""The main job, end to end, on a real language model: warm up, calibrate, measure the machine, decode, compare.

    make demo                 # about 5 minutes on two cores
    make demo ARGS="--full"   # every evaluation prompt at every batch size, longer answers, more rounds

Writes out/demo.json and out/demo.png, and prints a table.
"""

from __future__ import annotations

import argparse
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
    control: float = 0.0
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
        self.control += step.seconds.scheduling
        self.verify += step.seconds.verify
        for request, tokens in zip(step.requests, step.emitted, strict=True):
            self.tokens += len(tokens)
            self.answers.setdefault(request, []).extend(tokens)

    def figures(self) -> dict[str, float]:
        """What the table and the JSON show."""
        drafted = self.rows - self.request_steps
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_step": 1 + self.accepted / self.request_steps,
            "rows_per_step": self.rows / self.steps,
            "layers_per_step": self.layers / self.steps,
            "drafted_accepted": self.accepted / drafted if drafted else float("nan"),
            "draft_seconds": self.draft,
            "control_seconds": self.control,
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
        interleaved = lambda rows: [
            prompt
            for group in zip(*(rows[kind] for kind in KINDS), strict=True)
            for prompt in group
        ]
        self.warmup = encode(self.tokenizer, interleaved(WARMUP))
        self.texts = interleaved(EVALUATION)
        self.evaluation = encode(self.tokenizer, self.texts)

    def steps(
        self,
        scheduler: echo.ElasticBudgetScheduler,
        prompts,
        batch: int,
        new: int,
        **drafter_options,
    ):
        """Decodes the prompts; yields steps."""
        from drafters import pooled
        from model import SmolLM2

        target = SmolLM2(self.model, batch, LENGTH)
        drafter = (
            pooled(target, batch, LENGTH, k=BEAM, **drafter_options)
            if scheduler.max_depth
            else None
        )
        return echo.decode(
            scheduler,
            target,
            drafter,
            prompts,
            max_num_reqs=batch,
            max_new_tokens=new,
            eos_token=self.tokenizer.eos_token_id,
            max_verify_tokens_per_req=64,
        )

    def record(self, prompts: int, new: int) -> echo.WarmupLog:
        """Warm-up rows of an ungated run that verifies the best nodes of every layer."""
        scheduler = echo.ElasticBudgetScheduler(
            echo.TwoLevel(BEAM, 0), budget=8 * 64, max_depth=DEPTH
        )
        logs, done = [], 0
        with self._progress() as bar:
            task = bar.add_task("warm-up: drafting without a gate", total=prompts)
            for step in self.steps(scheduler, self.warmup[:prompts], 8, new, floor=-math.inf):
                logs.append(step.log())
                done += len(step.finished)
                bar.update(task, completed=done)
        return echo.WarmupLog.concat(logs)

    def cost(self, repeats: int) -> echo.CostModel:
        """This machine's curve: seconds of a forward pass by rows, at a context of 150 tokens, and of a drafted layer."""
        from model import SmolLM2

        target = SmolLM2(self.model, max(ROWS), LENGTH)
        target.cache.used[:] = 150
        plain = echo.ElasticBudgetScheduler.autoregressive()
        with self._progress() as bar:
            task = bar.add_task("cost curve: rows -> seconds", total=len(ROWS) * (repeats + 1) + 2)

            def step(rows: int) -> None:
                target.verify(torch.arange(rows), plain.pack(plain.begin(torch.full((rows,), 100))))
                bar.advance(task)

            rows, seconds = echo.cost.profile(step, ROWS, repeats=repeats)
            layer = []  # seconds of a drafted layer, control included, at batch 1 and 16
            for batch in (1, 16):
                scheduler = echo.ElasticBudgetScheduler.eagle(
                    max_verify_tokens_per_req=4, beam=BEAM, max_depth=4
                )
                done = list(self.steps(scheduler, self.warmup[:batch], batch, 16))[1:]
                layer.append(
                    sum(s.seconds.draft + s.seconds.scheduling for s in done)
                    / sum(s.tree.depth for s in done)
                )
                bar.advance(task)
        nodes = (1 + 3 * BEAM) / 4  # that each request drafts on in one of four layers
        each = max(0.0, (layer[1] - layer[0]) / (15 * nodes))
        return echo.CostModel.from_samples(
            rows, seconds, draft_layer=max(0.0, layer[0] - nodes * each), draft_token=each
        )

    def compare(
        self,
        policies: dict[str, echo.ElasticBudgetScheduler],
        batches: dict[int, int],
        new: int,
        rounds: int,
    ) -> list[Run]:
        """Every policy at every batch size, the fastest of its rounds: what else the machine does only ever adds time.

        Rounds alternate the order of the policies, so that a slow moment hits none of them alone.
        """
        runs: dict[tuple[int, str], Run] = {}
        with self._progress() as bar:
            task = bar.add_task("decoding", total=rounds * len(batches) * len(policies))
            for number in range(rounds):
                for batch, prompts in batches.items():
                    for name in list(policies)[:: 1 if number % 2 == 0 else -1]:
                        bar.update(task, description=f"decoding: batch {batch}, {name}")
                        run, start = Run(name, batch), time.perf_counter()
                        for step in self.steps(
                            policies[name], self.evaluation[:prompts], batch, new
                        ):
                            run.add(step)
                        run.seconds = time.perf_counter() - start
                        runs[batch, name] = min(
                            runs.get((batch, name), run), run, key=lambda r: r.seconds
                        )
                        bar.advance(task)
        return list(runs.values())

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description:<52}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self.console)


def budget(cost: echo.CostModel) -> int:
    """K_max: the knee, or the rows that cost half a step more than one row does, where the curve hardly has a flat part."""
    return max(cost.knee.k_max, cost.tokens_within(1.5))


def policies(
    calibration: echo.Calibration, cost: echo.CostModel
) -> dict[str, echo.ElasticBudgetScheduler]:
    """The compared policies: one row each of the library's table."""
    k_max = budget(cost)
    return {
        PLAIN: echo.ElasticBudgetScheduler.autoregressive(),
        "EAGLE tree, 8 rows each": echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=8, beam=BEAM, max_depth=4
        ),
        "ECHO, the paper": echo.ElasticBudgetScheduler.paper(calibration, k_max=k_max, beam=2),
        "global ranking": echo.ElasticBudgetScheduler(
            echo.GlobalRank(BEAM, calibration), budget=k_max, max_depth=DEPTH
        ),
        # Catch-up of the drafter and control beyond the layers are not in this cost model: they were worth 3 to 8% of a step at batch 16.
        "throughput-optimal": replace(
            echo.ElasticBudgetScheduler.throughput_optimal(calibration, cost, beam=BEAM),
            margin=0.05,
        ),
    }


def show(console: Console, runs: list[Run]) -> None:
    """The closing table."""
    table = Table(title="SmolLM2-135M-Instruct, greedy, float32", header_style="bold")
    for name in (
        "batch",
        "policy",
        "tokens/s",
        "vs plain",
        "tokens/step",
        "rows/step",
        "layers",
        "drafted rows\naccepted",
        "draft s",
        "control s",
        "verify s",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    base = {run.batch: run.figures()["tokens_per_second"] for run in runs if run.policy == PLAIN}
    for run in runs:
        f = run.figures()
        ratio = f["tokens_per_second"] / base[run.batch]
        share = (
            "-"
            if f["drafted_accepted"] != f["drafted_accepted"]
            else f"{f['drafted_accepted']:.0%}"
        )
        table.add_row(
            str(run.batch), run.policy, f"{f['tokens_per_second']:.0f}", f"{ratio:.2f}x", f"{f['tokens_per_step']:.2f}",
            f"{f['rows_per_step']:.1f}", f"{f['layers_per_step']:.1f}", share,
            f"{run.draft:.1f}", f"{run.control:.1f}", f"{run.verify:.1f}", end_section=run.policy == runs[-1].policy,
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all prompts at all batch sizes, longer answers, more rounds",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of the JSON and the picture"
    )
    args = parser.parse_args()
    console = Console(width=150) if not sys.stdout.isatty() else Console()
    start = time.perf_counter()
    demo = Demo(console)
    log = demo.record(32, 96 if args.full else 64)
    calibration = echo.calibrate(log)
    for d in calibration.depths:
        console.print(
            f"  depth {d.depth}: {'gate above ' + format(d.threshold, '.2f') if d.gate else 'no gate        '}  {d.reason}"
        )
    cost = demo.cost(9 if args.full else 5)
    knee = cost.knee
    console.print(
        f"  one row {1e3 * cost(1):.0f} ms; the knee is at {knee.k_max}, then {knee.gamma:.1%} of a step for each row more"
    )
    console.print(f"  K_max = {budget(cost)} rows")
    console.print(
        f"  a drafted layer {1e3 * cost.draft_layer:.1f} ms and {1e3 * cost.draft_token:.2f} ms a row"
    )
    batches = {1: 32, 4: 32, 16: 32} if args.full else {1: 4, 4: 8, 16: 32}
    runs = demo.compare(
        policies(calibration, cost), batches, 128 if args.full else 64, 3 if args.full else 2
    )
    show(console, runs)
    agree = sum(
        run.answers == other.answers
        for other in runs
        if other.policy == PLAIN
        for run in runs
        if run.batch == other.batch
    )
    console.print(
        f"same text as plain decoding: {agree} of {len(runs)} runs (float32; near ties of the two best logits may differ)"
    )

    from picture import draw

    args.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    result = {
        "machine": machine,
        "k_max": budget(cost),
        "knee": knee.k_max,
        "gamma": knee.gamma,
        "cost": json.loads(cost.to_json()),
        "calibration": json.loads(calibration.to_json()),
        "warmup_rows": len(log),
        "runs": [{"policy": run.policy, "batch": run.batch, **run.figures()} for run in runs],
        "seconds": time.perf_counter() - start,
    }
    (args.out / "demo.json").write_text(json.dumps(result, indent=1))
    draw(log, calibration, cost, budget(cost), runs, args.out / "demo.png", PLAIN)
    shortest = min(
        (run for run in runs if run.batch == max(batches) and run.policy != PLAIN),
        key=lambda run: run.seconds,
    )
    console.print(f"\nWhat the model wrote ({shortest.policy}, batch {shortest.batch}):")
    for number in (0, 3):
        text = demo.tokenizer.decode(shortest.answers[number], skip_special_tokens=True)
        console.print(f"[bold]{demo.texts[number]}[/bold]\n{text}\n", highlight=False)
    console.print(
        f"{args.out / 'demo.png'} and {args.out / 'demo.json'} written; {time.perf_counter() - start:.0f} s in all"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
