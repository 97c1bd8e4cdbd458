"""How fast are the kernels on a GPU, beside what engines use and what the machine allows?

    python benchmarks/gpu.py                 on CUDA, into benchmarks/results/gpu-<card>.json
    python benchmarks/gpu.py --dry-run       tiny shapes in the interpreter; nothing written

Every contender is first compared with attention in float64 on sampled rows: one that is wrong is
reported and not timed; if it is ours, nothing is timed and the exit status is 1. Times are medians
of CUDA-graph replays over rotated inputs that together exceed the L2 cache. ``share`` is the
larger of two floors over the time: the bytes that must move over the measured copy bandwidth, and
the operations over the measured rate of a large matrix product. FlashAttention runs on chains of
rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

import echo
from common import peers
from common.cases import Case, cases, drafted, inputs
from echo import kernels
from echo.tree import compact

RESULTS = Path(__file__).parent / "results"
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


def floors(device: torch.device) -> tuple[float, float]:
    """Measured bytes a second of a large copy, and operations of a large 16-bit matrix product."""
    n = 8192 if device.type == "cuda" else 128
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source = torch.empty(n * n * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed([lambda: target.copy_(source)])[0], 2 * n**3 / timed(
        [lambda: a @ b]
    )[0]


def timed(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Median and 99th percentile of a call's seconds; the calls are captured together."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        seconds = (time.perf_counter() - start) / len(calls)
        return seconds, seconds
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for replay in range(60):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 10:
            samples.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(samples), sorted(samples)[int(0.99 * len(samples))]


def attention(case: Case, device: torch.device, copy: float, rate: float) -> dict[str, Any]:
    """Every contender on one case: checked, then timed."""
    first = inputs(case, device, 0)
    heads, dim = first["q"].shape[1:]
    rows, context = first["indptr"].diff().long(), first["prefix_lens"].long()
    kv = first["key_cache"].shape[2] * dim
    moved = int(context[rows > 0].sum()) * 2 * kv * first["key_cache"].element_size()
    moved += len(first["q"]) * (2 * heads * dim + 2 * kv) * first["q"].element_size()
    pairs = int((rows * (context + rows)).sum())
    floor = max(moved / copy, 4 * heads * dim * pairs / rate)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    trees = [first] + [
        inputs(case, device, seed) for seed in range(1, min(8, 1 + 2 * l2 // max(moved, 1)))
    ]
    chains = [peers.chained(args) for args in trees]
    entry: dict[str, Any] = asdict(case) | {
        "packed_rows": len(first["q"]),
        "bytes": moved,
        "floor_us": round(1e6 * floor, 2),
    }
    for name, build in {
        "echo": ours,
        "echo, planned": planned,
        **peers.PEERS,
        **peers.CAUSAL,
    }.items():
        copies = chains if name in peers.CAUSAL else trees
        try:
            call = build(copies[0])
            with poisoned():
                result: dict[str, Any] = {"error": wrong(copies[0], call())}
            if not result["error"] < (
                1e-5 if case.model == "tiny" else LIMIT * (3 if case.cache != "bfloat16" else 1)
            ):
                result["wrong"] = True
            else:
                seconds, slow = timed([build(args) for args in copies])
                result |= {
                    "us": round(1e6 * seconds, 2),
                    "p99_us": round(1e6 * slow, 2),
                    "share": round(floor / seconds, 4),
                }
        except (ImportError, peers.UnfitError) as reason:
            result = {"absent": str(reason)}
        except Exception as reason:  # a peer's failure is a finding, ours is an error
            if name.startswith("echo"):
                raise
            result = {"failed": f"{type(reason).__name__}: {reason}"[:300]}
        entry[name] = result
    return entry


def acceptance(device: torch.device, copy: float, dry: bool) -> list[dict[str, Any]]:
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
            read = logits.numel() * logits.element_size() / copy
            seconds, slow = timed([lambda a=args: kernels.accept(*a, backend="triton")])
            plain, _ = timed([lambda x=logits: x.argmax(-1)])
            times = {
                "us": round(1e6 * seconds, 2),
                "p99_us": round(1e6 * slow, 2),
                "torch_argmax_us": round(1e6 * plain, 2),
            }
            shape = {"rows": rows, "vocabulary": vocabulary, "dtype": str(dtype)[6:]}
            entries.append(
                shape | times | {"read_us": round(1e6 * read, 2), "share": round(read / seconds, 4)}
            )
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
            seconds, slow = timed([call])
            report[name] = {"us": round(1e6 * seconds, 2), "p99_us": round(1e6 * slow, 2)}
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


def main() -> int:
    """Checks, times, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; times mean nothing"
    )
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="start no further attention case after that"
    )
    options = parser.parse_args()
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--dry-run walks the same path on the CPU)")
        return 2
    device = torch.device("cpu" if dry else "cuda")
    start = time.perf_counter()
    copy, rate = floors(device)
    card = "cpu, dry run" if dry else torch.cuda.get_device_name(device)
    report: dict[str, Any] = {
        "card": card,
        "versions": versions(),
        "copy_bytes_per_s": copy,
        "matrix_flop_per_s": rate,
    }
    report["accept"] = acceptance(device, copy, dry)
    report["attention"] = []
    for case in cases(dry):
        if time.perf_counter() - start > 60 * options.minutes:
            print("time is up: the remaining cases are skipped")
            report["cut"] = True
            break
        report["attention"].append(attention(case, device, copy, rate))
        print(json.dumps(report["attention"][-1]), flush=True)
        if any("wrong" in report["attention"][-1][name] for name in ("echo", "echo, planned")):
            print("our kernel is wrong on this case: nothing more is timed")
            return 1
    report["step"] = step(device, dry)  # last: compiling it takes a while
    report["seconds"] = round(time.perf_counter() - start, 1)
    if dry:
        print(json.dumps(report))
    else:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"gpu-{card.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: benchmarks/results/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
