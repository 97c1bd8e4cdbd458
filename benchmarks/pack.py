"""CPU time of Flatten & Pack and of every exporter: 256 requests, 1,024 rows, one thread, median of many runs.

    python benchmarks/pack.py [--repeat 200] [--max-tree-rows 16] [--out benchmarks/results/pack.json]

Where sglang's wheel is importable (no dependency of it is needed), its ``organize_draft_results`` runs in the same process on a
uniform tree of the same mean size. Its tree builder is a GPU kernel, and its interpreter on a CPU says nothing about speed: not timed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import echo
from echo.tree import compact, layouts
from echo.tree.packed import pack

BATCH, ROWS, DEPTH, K, CONTEXT = 256, 1024, 4, 4, 512


def grown(scheduler: echo.ElasticBudgetScheduler, seed: int = 0) -> echo.SuperTree:
    """A step of random draft scores whose sharpness differs from request to request, so that trees are ragged."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 0.3 + 4 * torch.rand(BATCH, 1, 1, generator=generator)
    tree = scheduler.plant(torch.randint(0, 32000, (BATCH,), generator=generator))
    for _ in range(DEPTH):
        shape = (*tree.frontier.token.shape, K)
        log_probs = (sharpness * torch.randn(*shape, generator=generator)).log_softmax(-1)
        tree = scheduler.grow(tree, torch.randint(0, 32000, shape, generator=generator), log_probs)
    return tree


def median(call: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Microseconds, after ten runs to warm up."""
    for _ in range(10):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return {"median_us": round(statistics.median(times), 1), "p90_us": round(times[int(0.9 * repeat)], 1)}


def peer() -> Callable[..., Any] | None:
    """sglang's own ``organize_draft_results``, read from the installed wheel without importing the engine around it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = (Path(next(iter(spec.submodule_search_locations))) / "srt/speculative/eagle_utils.py").read_text()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "organize_draft_results")
    scope: dict[str, Any] = {"torch": torch, "List": list, "maybe_detect_oob": lambda *_: None}
    exec(compile(ast.Module([node], []), "eagle_utils", "exec"), scope)
    function: Callable[..., Any] = scope["organize_draft_results"]
    return function


def size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a dataclass."""
    parts = [value] if isinstance(value, torch.Tensor) else [v for v in vars(value).values() if isinstance(v, torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def main() -> None:
    """Times everything, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    parser.add_argument("--max-tree-rows", type=int, default=16, help="also the rows of every request in uniform layouts")
    args = parser.parse_args()
    N = args.max_tree_rows
    words = -(-N // 32)
    torch.set_num_threads(1)

    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(K), budget=ROWS, max_depth=DEPTH, max_tree_rows=N)
    tree = grown(scheduler)
    selected = scheduler.select(tree)
    packed = scheduler.pack(tree)
    packed.validate()
    context = torch.randint(CONTEXT // 2, CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(1))
    table = torch.randperm(BATCH * 80).view(BATCH, 80).int()
    lens = packed.indptr.diff()
    entries = int((lens * (context + lens)).sum())
    bytes_ = int(((lens * (context + lens) + 7) // 8).sum())
    full = int((N * (context + N)).sum())
    accepted = echo.verify(packed, packed.tokens.roll(-1))
    chain = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=ROWS, max_depth=DEPTH, max_tree_rows=N)
    chained = chain.pack(chain.grow_positions(chain.plant(torch.arange(BATCH)), torch.zeros(BATCH, 4, 1).long(), -torch.rand(BATCH, 4, 1)))
    one = echo.ElasticBudgetScheduler(echo.GlobalRank(K), budget=N, max_depth=DEPTH, max_tree_rows=N)
    small = one.grow(one.plant(torch.tensor([1])), torch.arange(4).view(1, 1, 4), -torch.rand(1, 1, 4))
    single = one.pack(small)

    exporters: dict[str, Callable[[], Any]] = {
        "sglang": lambda: layouts.sglang(packed, N, context),
        "sglang_mask QLEN_ONLY": lambda: layouts.sglang_mask(packed, N, "QLEN_ONLY"),
        "sglang_mask QLEN_ONLY_BITPACKING": lambda: layouts.sglang_mask(packed, N, "QLEN_ONLY_BITPACKING"),
        "sglang_mask FULL_MASK": lambda: layouts.sglang_mask(packed, N, "FULL_MASK", context=context, size=full),
        "chains": lambda: layouts.chains(chained),
        "flashinfer packed": lambda: layouts.flashinfer(packed, context, bytes_),
        "flashinfer flat": lambda: layouts.flashinfer(packed, context, entries, bits=False),
        "flashinfer_xqa": lambda: layouts.flashinfer_xqa(packed),
        "tensorrt_llm": lambda: layouts.tensorrt_llm(packed, N),
        "qq_bias (one tree)": lambda: layouts.qq_bias(single),
        "hugging_face": lambda: layouts.hugging_face(packed, N, context, CONTEXT),
        "slot": lambda: packed.slot(context, table, 16, 0),
        "position": lambda: packed.position(context),
        "compact, paged": lambda: compact(packed, accepted, context, page_table=table, page_size=16),
        "wire": packed.wire,
    }
    if N > 32:
        del exporters["sglang_mask QLEN_ONLY_BITPACKING"]
    results: dict[str, dict[str, float]] = {
        "pack": median(lambda: pack(tree, selected, ROWS, words), args.repeat),
        "pack, out=": median(lambda: pack(tree, selected, ROWS, words, packed), args.repeat),
        "select (GlobalRank)": median(lambda: scheduler.select(tree), args.repeat),
    }
    results["pack"]["bytes_per_row"] = round(size(packed) / ROWS, words)
    for name, call in exporters.items():
        results[name] = median(call, args.repeat)
        rows = BATCH * N if name.startswith(("sglang", "tensorrt", "hugging")) else ROWS
        results[name]["bytes_per_row"] = round(size(call()) / (N if "one tree" in name else rows), 1)
    organize = peer()
    if organize is not None:
        uniform = ROWS // BATCH
        scores = [torch.rand(BATCH, 1, K), *[torch.rand(BATCH, K, K) for _ in range(DEPTH - 1)]]
        tokens = [torch.randint(0, 32000, (BATCH, K)), *[torch.randint(0, 32000, (BATCH, K * K)) for _ in range(DEPTH - 1)]]
        parents = [torch.randint(0, K, (BATCH, K)) for _ in range(DEPTH)]
        results["sglang organize_draft_results (uniform)"] = median(lambda: organize(scores, tokens, parents, uniform), args.repeat)

    facts = {
        "requests": BATCH, "rows": ROWS, "layers": DEPTH, "nodes_per_request": int(tree.forest.token.shape[1]), "uniform_n": N,
        "context_mean": round(float(context.float().mean()), 1), "largest_tree": int(lens.max()), "smallest_tree": int(lens.min()),
        "threads": 1, "repeat": args.repeat, "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
    }  # fmt: skip
    args.out.write_text(json.dumps({"setting": facts, "results": results}, indent=1) + "\n")
    for name, row in results.items():
        print(f"{name:42} {row['median_us']:8.1f} us   p90 {row['p90_us']:8.1f}   {row.get('bytes_per_row', '')}")


if __name__ == "__main__":
    main()
