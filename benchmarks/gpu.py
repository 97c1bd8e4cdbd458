"""How fast are the kernels on a GPU, beside what engines use and what the machine allows?

    python benchmarks/gpu.py                 on CUDA, into benchmarks/results/gpu-<card>.json
    python benchmarks/gpu.py --check         what the card can run: the kernels' tests, side by side
    python benchmarks/gpu.py --tune FILE     tiles for this card and --heads, for ECHO_TILES
    python benchmarks/gpu.py --predict       a cost law fitted to results/h100/sweep.json, and the
                                             even split by it, into attention-law.json beside it
    python benchmarks/gpu.py --dry-run       tiny shapes in the interpreter; nothing written

Every contender is first compared with attention in float64 on sampled rows: one that is wrong is
reported and not timed; if it is ours, nothing is timed and the exit status is 1. Times are medians
of CUDA graphs over rotated inputs that together exceed the L2 cache twice, contenders in
alternation. ``share`` is the larger of two floors over the time: the bytes that must be read over
the measured rate of a large sum, and the operations over that of a large matrix product. Causal
FlashAttention runs on chains of rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if {"--dry-run", "--predict"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

import echo
from common import law, peers, timing, tuning
from common.cases import Case, cases, drafted, inputs
from echo import kernels
from echo.kernels import schedule, tiles
from echo.tree import compact

RESULTS = Path(__file__).parent / "results"
KERNEL_TESTS = (
    "kernels", "plan_kernels", "attention", "attention_schedule", "memory", "no_number", "presence",
    "kinds", "default_dtype", "device_loop", "device_rules", "workspace", "accept", "lookup",
)  # fmt: skip
"""What runs on a GPU, by the names of the test files."""
LIMIT = 1e-2
"""Relative error of 16-bit attention."""


def ours(args: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Our kernel."""
    return lambda: kernels.tree_attention(**args, backend="triton")[0]


def planned(args: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Ours with a work list, as in all layers but the first; peers' plans are not timed either."""
    named = {
        name: args[name]
        for name in ("q", "key_cache", "page_table", "prefix_lens", "tree_key", "indptr")
    }
    plan = kernels.plan_attention(**named, backend="triton")
    return lambda: kernels.tree_attention(**args, plan=plan, backend="triton")[0]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is not written holds NaN, never an earlier call's results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def wrong(args: dict[str, torch.Tensor], out: torch.Tensor, samples: int = 24) -> float:
    """Relative error of sampled rows against float64."""
    count = int(args["indptr"][-1])
    error, size = 0.0, 0.0
    for row in torch.linspace(0, count - 1, min(samples, count)).long().tolist():
        expected = peers.exact(args, row)
        error += float((out[row].double() - expected).square().sum())
        size += float(expected.square().sum())
    return (error / size) ** 0.5


def attention(case: Case, device: torch.device, read: float, rate: float) -> dict[str, Any]:
    """Every contender on one case: each checked, then all timed in alternation."""
    first = inputs(case, device, 0)
    heads, dim = first["q"].shape[1:]
    rows, context = first["indptr"].diff().long(), first["prefix_lens"].long()
    kv = first["key_cache"].shape[2] * dim
    moved = int(context[rows > 0].sum()) * 2 * kv * first["key_cache"].element_size()
    moved += len(first["q"]) * (2 * heads * dim + 2 * kv) * first["q"].element_size()
    pairs = int((rows * (context + rows)).sum())
    floor = max(moved / read, 4 * heads * dim * pairs / rate)
    trees = [first] + [
        inputs(case, device, seed) for seed in range(1, timing.copies(moved, device))
    ]
    chains = [peers.chained(args) for args in trees]
    entry: dict[str, Any] = asdict(case) | {
        "packed_rows": len(first["q"]),
        "bytes": moved,
        "floor_us": round(1e6 * floor, 2),
    }
    ready: dict[str, list[timing.Call]] = {}
    for name, build in {
        "echo": planned,
        "echo, unplanned": ours,
        **peers.PEERS,
        **peers.CAUSAL,
    }.items():
        own = chains if name in peers.CAUSAL else trees
        try:
            call = build(own[0])
            with poisoned():
                entry[name] = {"error": wrong(own[0], call())}
            limit = 1e-5 if case.model == "tiny" else LIMIT * (3 if case.cache != "bfloat16" else 1)
            if not entry[name]["error"] < limit:
                entry[name]["wrong"] = True
                continue
            calls = [call, *(build(args) for args in own[1:])]
            timing.graph(calls)()  # what cannot be captured is a finding
            ready[name] = calls
        except (ImportError, peers.UnfitError) as reason:
            entry[name] = {"absent": str(reason)}
        except Exception as reason:  # a peer's failure is a finding, ours is an error
            if name in ("echo", "echo, unplanned"):
                raise
            entry[name] = {"failed": f"{type(reason).__name__}: {reason}"[:300]}
    for name, samples in timing.alternating(ready).items():
        entry[name] |= timing.summary(samples, floor)
    return entry


def ratios(entries: list[dict[str, Any]]) -> list[str]:
    """A table of every contender's time over that of causal FlashAttention 3, ours first."""
    bar = "flash attention 3, causal"
    names = [bar, "echo", "echo, unplanned", *peers.PEERS]
    lines = ["case".ljust(44) + "floor, us".rjust(10) + "".join(n[:22].rjust(24) for n in names)]
    for entry in entries:
        shape = f"{entry['model'][:13]} {entry['batch']} x {entry['rows']}, {entry['context']}"
        shape += " elastic" * entry["elastic"] + f" {entry['cache'][:6]}"
        cells = []
        for name in names:
            us, over = entry.get(name, {}).get("us"), entry.get(bar, {}).get("us")
            text = "-" if us is None else f"{us:.1f} us"
            cells.append((text + f" {us / over:.2f}x" if us and over else text).rjust(24))
        lines.append(shape.ljust(44) + f"{entry['floor_us']:.1f}".rjust(10) + "".join(cells))
    return lines


def picture(entries: list[dict[str, Any]], path: Path) -> None:
    """Times over the floor by case, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = ["echo", *peers.PEERS, *peers.CAUSAL]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [
            (i, e["floor_us"], e[name]["us"]) for i, e in enumerate(entries) if "us" in e[name]
        ]
        if points:
            axes.plot(
                [i for i, *_ in points], [us / floor for _, floor, us in points], "o", label=name
            )
    labels = [f"{e['batch']} x {e['rows']}\n{e['context']}" for e in entries]
    axes.set_xticks(range(len(entries)), labels, fontsize=6)
    axes.set(yscale="log", ylabel="time / floor", title="Tree attention")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def acceptance(device: torch.device, read: float, dry: bool) -> list[dict[str, Any]]:
    """Acceptance from logits: equal bits to the reference, then timed against their read."""
    entries = []
    for rows, vocabulary in (
        ((12, 1000),) if dry else ((256, 128256), (1024, 128256), (512, 262144))
    ):
        packed = drafted(Case("tiny", rows // 4, 4, 0))
        tokens = packed.tokens.to(device)
        for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float32):
            logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)
            logits.scatter_(1, tokens.roll(-1)[:, None], 9.0)  # so that drafts are accepted
            args = (
                packed.parent.to(device),
                packed.indptr.to(device),
                tokens,
                logits,
                packed.max_depth,
            )
            same = zip(
                kernels.accept(*args, backend="triton"),
                kernels.reference.accept(*args),
                strict=True,
            )
            if not all(torch.equal(a, b) for a, b in same):
                raise SystemExit("acceptance differs from its reference: nothing more is timed")
            floor = logits.numel() * logits.element_size() / read
            times = timing.alternating(
                {
                    "ours": [lambda a=args: kernels.accept(*a, backend="triton")],
                    "torch": [lambda x=logits: x.argmax(-1)],
                }
            )
            shape = {"rows": rows, "vocabulary": vocabulary, "dtype": str(dtype)[6:]}
            plain = {"torch_argmax_us": timing.summary(times["torch"])["us"]}
            floors = {"read_us": round(1e6 * floor, 2)}
            entries.append(shape | timing.summary(times["ours"], floor) | plain | floors)
    return entries


def step(device: torch.device, dry: bool) -> dict[str, Any]:
    """A step, begin to observe, as one CUDA graph, with every synchronisation an error.

    By the kernels, once they give the bits of PyTorch's operations; by those; and compiled.
    """
    batch, depth, k = (4, 2, 3) if dry else (256, 6, 4)
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 4), echo.SparseGate({1: 0.1, 3: 0.05}), 4 * batch, depth
    )
    roots = torch.arange(batch, device=device)
    tree = scheduler.begin(roots)
    layers = []
    for _ in range(depth):
        shape = (*tree.frontier.token.shape, k)
        layers.append(
            (
                torch.randint(0, 1000, shape, device=device),
                torch.randn(shape, device=device).log_softmax(-1),
            )
        )
        tree = scheduler.grow(tree, *layers[-1])
    target = torch.randint(0, 1000, (scheduler.pack(tree).num_rows,), device=device)
    context = torch.randint(0, 1000, (batch,), device=device, dtype=torch.int32)
    table = torch.arange(32 * batch, device=device, dtype=torch.int32).view(batch, 32)
    history = scheduler.history(batch, device)

    def once() -> tuple[torch.Tensor, ...]:
        tree = scheduler.begin(roots)
        for layer in layers:
            tree = scheduler.grow(tree, *layer)
        packed = scheduler.pack(tree)
        accepted = echo.accept(packed, target)
        moved = compact(packed, accepted, context, page_table=table, page_size=64, pad_slot_id=0)
        return (
            packed.mask,
            moved.source,
            moved.target,
            history.observe(roots, packed, accepted).acceptance_histogram,
        )

    def by(backend: str) -> tuple[torch.Tensor, ...]:
        with kernels.using(backend):
            return once()

    if not all(torch.equal(one, two) for one, two in zip(by("triton"), by("torch"), strict=True)):
        raise SystemExit("the fused step differs from torch's operations: nothing more is timed")
    calls: dict[str, Callable[[], object]] = {
        "fused": lambda: by("triton"),
        "torch": lambda: by("torch"),
    }
    calls |= {} if dry else {"compiled": torch.compile(once, fullgraph=True)}
    report: dict[str, Any] = {"batch": batch, "depth": depth, "candidates": k}
    for name, call in calls.items():
        try:
            call()
            if not dry:
                torch.cuda.set_sync_debug_mode("error")
                call()
                torch.cuda.set_sync_debug_mode("default")
            report[name] = timing.summary(timing.alternating({name: [call]})[name])
        except Exception as reason:  # a step that synchronises or cannot be captured is a finding
            report[name] = {"failed": f"{type(reason).__name__}: {reason}"[:300]}
        finally:
            if not dry:
                torch.cuda.set_sync_debug_mode("default")
    return report


def versions() -> dict[str, str]:
    """Of what takes part, as far as installed."""
    names = ("torch", "triton", "flashinfer-python", "sglang", "flash-attn-3", "numpy")
    found = {
        package.name: package.version
        for package in importlib.metadata.distributions()
        if package.name in names
    }
    return found | {"echo": echo.__version__, "cuda": str(torch.version.cuda)}


def check(options: argparse.Namespace) -> int:
    """Says what the card can run, and runs the kernels' tests side by side, a share a process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        major, minor = facts.major, facts.minor
        print(f"{facts.name}, compute capability {major}.{minor}, {facts.total_memory >> 30} GiB")
        print("float8_e4m3fn caches:", "yes" if (major, minor) >= (8, 9) else "no, use float8_e5m2")
    else:
        print("no CUDA device: the tests run in Triton's interpreter")
    (heads, kv_heads, dim), generation = options.heads, tiles.generation(device)
    for cached, rows in itertools.product((2, 1), (1, 4, 16, 64)):
        kind = heads // kv_heads, dim, 2, cached, 64, rows, generation
        how = "by the clock" if schedule.measured(*kind) else "by its machine code, not timed"
        print(f"{8 * cached}-bit cache, {rows} rows a request: {schedule.tile(*kind)}, {how}")
    for name in ("flash_attn_interface", "sgl_kernel", "flashinfer", "sglang"):
        print(f"{name}:", "installed" if importlib.util.find_spec(name) else "not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", *options.check]
    shares = [
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"ECHO_SHARE": f"{i}/{options.processes}"},
        )
        for i in range(options.processes)
    ]  # fmt: skip
    failed = 0
    for share in shares:
        lines = share.communicate()[0].splitlines()
        failed += share.returncode not in (0, 5)  # 5: no test in this share
        print(
            *(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1], sep="\n"
        )
    print("all that was asked runs" if not failed else f"{failed} shares failed")
    return bool(failed)


def save(report: dict[str, Any], path: Path) -> None:
    """At once and whole, so that a run that is cut leaves what it had."""
    path.with_suffix(".part").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def measure(device: torch.device, minutes: float, dry: bool) -> int:
    """Checks, times, prints and writes."""
    start = time.perf_counter()
    read, rate = timing.floors(device)
    card = "cpu, dry run" if dry else torch.cuda.get_device_name(device)
    path = RESULTS / f"gpu-{card.lower().replace(' ', '-')}.json"
    report: dict[str, Any] = {
        "card": card,
        "versions": versions(),
        "read_bytes_per_s": read,
        "matrix_flop_per_s": rate,
        "attention": [],
    }
    entries = report["attention"]
    for case in cases(dry):
        if time.perf_counter() - start > 60 * minutes:
            print("time is up: the remaining cases are skipped")
            report["cut"] = True
            break
        entries.append(attention(case, device, read, rate))
        print(json.dumps(entries[-1]), flush=True)
        if any("wrong" in entries[-1][name] for name in ("echo", "echo, unplanned")):
            print("our kernel is wrong on this case: nothing more is timed")
            return 1
        if not dry:
            save(report, path)
    report["accept"] = acceptance(device, read, dry)
    report["step"] = step(device, dry)  # last: compiling it takes a while
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(*ratios(entries), sep="\n")
    if dry:
        print(json.dumps(report))
        return 0
    save(report, path)
    picture(entries, path.with_suffix(".png"))
    print(f"written: benchmarks/results/{path.name}")
    return 0


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; times mean nothing"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="start no further attention case after that"
    )
    parser.add_argument("--tune", type=Path, help="write a table of tiles here")
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(32, 8, 128), help="query heads, KV heads, dimension"
    )
    parser.add_argument("--check", nargs="*", help="run these tests, by default the kernels'")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of --check")
    parser.add_argument("--predict", action="store_true", help="write the cost law's times")
    options = parser.parse_args()
    if options.check is not None:
        folder = Path(__file__).parents[1] / "tests"
        options.check = options.check or [str(folder / f"test_{name}.py") for name in KERNEL_TESTS]
        return check(options)
    if options.predict:
        save(law.predict(), RESULTS / "h100" / "attention-law.json")
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--dry-run walks the same path on the CPU)")
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.tune:
        rows = tuning.tune(tuple(options.heads), device)
        tuning.write(options.tune, torch.cuda.get_device_name(device), rows)
        return 0
    return measure(device, options.minutes, options.dry_run)


if __name__ == "__main__":
    sys.exit(main())
