"""CPU time of Flatten & Pack, of every exporter and importer: 256 requests, 1,024 rows, one thread, median of many runs.

    python benchmarks/pack.py [--repeat 200] [--max-tree-rows 16 64] [--out benchmarks/results/pack.json]
    python benchmarks/pack.py --sglang-cpu sglang/sgl-kernel/csrc/cpu/spec.cpp

Where sglang's wheel is importable (no dependency of it is needed), its ``organize_draft_results`` runs in the same process on uniform
trees. Its tree builder for CPUs is C++ that the wheel lacks: ``--sglang-cpu`` names the file in a checkout of sgl-project/sglang
(csrc/cpu/spec.cpp, with the headers beside it), which is then compiled as it stands, timed, and read back by our importers.
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
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load_inline

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


def medians(calls: dict[str, Callable[[], Any]], repeat: int) -> dict[str, dict[str, float]]:
    """Microseconds of each call, in ten rounds over all of them, so that a change of the machine's clock meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(10):
        for name, call in calls.items():
            call()
            for _ in range(max(repeat // 10, 1)):
                start = time.perf_counter()
                call()
                times[name].append(1e6 * (time.perf_counter() - start))
    ranked = {name: sorted(own) for name, own in times.items()}
    return {
        name: {"median_us": round(statistics.median(own), 1), "p90_us": round(own[int(0.9 * len(own))], 1)} for name, own in ranked.items()
    }


def source(path: str, names: tuple[str, ...], scope: dict[str, Any]) -> list[Callable[..., Any]] | None:
    """Functions of sglang by name, from the installed wheel's source, without importing the engine around them."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = (Path(next(iter(spec.submodule_search_locations))) / path).read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in nodes:
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *nodes], []), path, "exec"), scope)
    return [scope[name] for name in names]


class Mode(IntEnum):
    """sglang's TreeMaskMode."""

    FULL_MASK = 0
    QLEN_ONLY = 1
    QLEN_ONLY_BITPACKING = 2


def compiled(path: Path) -> Callable[..., Any]:
    """sglang's own tree builder for CPUs, its file untouched."""
    text, flags = f'#include "{path.resolve()}"', ["-O3", "-march=native"]
    module = load_inline("sglang_cpu_tree", [text], functions=["build_tree_kernel_efficient_cpu"], extra_cflags=flags)
    function: Callable[..., Any] = module.build_tree_kernel_efficient_cpu
    return function


def peers(cpp: Path | None, sizes: list[int], context: Tensor) -> dict[str, Callable[[], Any]]:
    """sglang's own steps from drafted beams to links and mask, at ``sizes`` rows for every request."""
    names = ("_select_top_k_tokens_first", "_select_top_k_tokens_later", "select_top_k_tokens")
    scope = {"torch": torch, "fast_topk": lambda x, k, dim: x.topk(k, dim=dim), "maybe_detect_oob": lambda *_: None, "TreeMaskMode": Mode}
    found = source("srt/speculative/spec_utils.py", names, scope)
    if found is None:
        return {}
    scores, collected = None, []
    for step in range(DEPTH):
        p = torch.randn(BATCH * (K if step else 1), 32).softmax(-1).topk(K)
        _, _, scores, info = found[2](step, p.values, p.indices, None, scores, K)
        collected.append(info)
    drafted = list(zip(*collected, strict=True))
    scope["build_tree_kernel_efficient_func"] = compiled(cpp) if cpp else None
    organize, build = source(  # type: ignore[misc]
        "srt/speculative/eagle_utils.py", ("organize_draft_results", "build_tree_kernel_efficient"), scope
    )
    total, calls = int(context.sum()), {}
    for n in sizes:

        def links(n: int = n) -> Any:
            parents, index, tokens = organize(*drafted, n)
            return build(torch.zeros(BATCH).long(), parents, index, tokens, context, total, K, DEPTH, n, Mode.QLEN_ONLY)

        calls[f"sglang organize_draft_results, {n} rows each"] = lambda n=n: organize(*drafted, n)
        if cpp:
            calls[f"sglang organize + build (C++), {n} rows each"] = links
            compare(links(), n)
    return calls


def compare(theirs: Any, n: int) -> None:
    """Its links and its mask are the same trees to our importers."""
    mask, positions, index, token, sibling, drafts = theirs
    one = layouts.from_sglang(layouts.SGLangLinks(drafts, positions, index, token, sibling))
    two = layouts.from_sglang_mask(mask, drafts, n, "QLEN_ONLY")
    assert one.rows == BATCH * n and torch.equal(one.tokens, two.tokens) and torch.equal(one.mask, two.mask)


def size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a dataclass."""
    parts = [value] if isinstance(value, Tensor) else [v for v in vars(value).values() if isinstance(v, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def cases(packed: echo.PackedTree, n: int, context: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Exporters and importers of one step, by name."""
    lens = packed.indptr.diff()
    entries, bits = int((lens * (context + lens)).sum()), int(((lens * (context + lens) + 7) // 8).sum())
    full = int((n * (context + n)).sum())
    chain = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=ROWS, max_depth=DEPTH, max_tree_rows=n)
    chained = chain.pack(chain.grow_positions(chain.plant(torch.arange(BATCH)), torch.zeros(BATCH, 4, 1).long(), -torch.rand(BATCH, 4, 1)))
    one = echo.ElasticBudgetScheduler(echo.GlobalRank(K), budget=n, max_depth=DEPTH, max_tree_rows=n)
    single = one.pack(one.grow(one.plant(torch.tensor([1])), torch.arange(4).view(1, 1, 4), -torch.rand(1, 1, 4)))
    table = torch.randperm(BATCH * 80).view(BATCH, 80).int()
    accepted = echo.verify(packed, packed.tokens.roll(-1))
    exporters: dict[str, Callable[[], Any]] = {
        "sglang": lambda: layouts.sglang(packed, n, context),
        "sglang_mask QLEN_ONLY": lambda: layouts.sglang_mask(packed, n, "QLEN_ONLY"),
        "sglang_mask QLEN_ONLY_BITPACKING": lambda: layouts.sglang_mask(packed, n, "QLEN_ONLY_BITPACKING"),
        "sglang_mask FULL_MASK": lambda: layouts.sglang_mask(packed, n, "FULL_MASK", context=context, size=full),
        "chains": lambda: layouts.chains(chained),
        "flashinfer packed": lambda: layouts.flashinfer(packed, context, bits),
        "flashinfer flat": lambda: layouts.flashinfer(packed, context, entries, bits=False),
        "flashinfer_xqa": lambda: layouts.flashinfer_xqa(packed),
        "tensorrt_llm": lambda: layouts.tensorrt_llm(packed, n),
        "qq_bias (one tree)": lambda: layouts.qq_bias(single),
        "hugging_face": lambda: layouts.hugging_face(packed, n, context, CONTEXT, left_padded=False),
        "slot": lambda: packed.slot(context, table, 16, 0),
        "position": lambda: packed.position(context),
        "compact, paged": lambda: compact(packed, accepted, context, page_table=table, page_size=16, dummy=0),
        "wire": packed.wire,
    }
    if n > 32:
        del exporters["sglang_mask QLEN_ONLY_BITPACKING"]
    made = {name: call() for name, call in exporters.items()}
    tokens, back = made["sglang"].draft_tokens, {"lengths": lens}
    importers: dict[str, Callable[[], Any]] = {
        "from_sglang": lambda: layouts.from_sglang(made["sglang"], **back),
        "from_sglang_mask QLEN_ONLY": lambda: layouts.from_sglang_mask(made["sglang_mask QLEN_ONLY"], tokens, n, "QLEN_ONLY", **back),
        "from_chains": lambda: layouts.from_chains(made["chains"]),
        "from_flashinfer, packed": lambda: layouts.from_flashinfer(made["flashinfer packed"], packed.tokens),
        "from_flashinfer_xqa": lambda: layouts.from_flashinfer_xqa(made["flashinfer_xqa"], packed.indptr, packed.tokens),
        "from_tensorrt_llm": lambda: layouts.from_tensorrt_llm(made["tensorrt_llm"]),
        "from_hugging_face": lambda: layouts.from_hugging_face(made["hugging_face"], **back),
        "validate": packed.validate,
    }
    return exporters, importers


def measure(n: int, repeat: int, cpp: Path | None) -> dict[str, Any]:
    """All figures with trees of at most ``n`` rows, which are also the rows of every request in uniform layouts."""
    torch.manual_seed(0)
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(K), budget=ROWS, max_depth=DEPTH, max_tree_rows=n)
    tree = grown(scheduler)
    selected, packed, words = scheduler.select(tree), scheduler.pack(tree), -(-n // 32)
    packed.validate()
    context = torch.randint(CONTEXT // 2, CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(1))
    exporters, importers = cases(packed, n, context)

    def same_job() -> Any:
        step = scheduler.pack(tree)
        return layouts.sglang(step, n, context), layouts.sglang_mask(step, n, "QLEN_ONLY")

    calls: dict[str, Callable[[], Any]] = {
        "pack": lambda: pack(tree, selected, ROWS, words),
        "pack, out=": lambda: pack(tree, selected, ROWS, words, packed),
        "select (GlobalRank)": lambda: scheduler.select(tree),
        "select + pack + sglang + QLEN_ONLY": same_job,
        **peers(cpp, [ROWS // BATCH, *([n] if n <= K * (1 + K * (DEPTH - 1)) else [])], context),
        **exporters,
    }
    results = medians(calls, repeat) | medians(importers, repeat // 5)
    results["pack"]["bytes_per_row"] = round(size(packed) / ROWS, 1)
    for name, call in exporters.items():
        rows = n if "one tree" in name else BATCH * n if name.startswith(("sglang", "tensorrt", "hugging")) else ROWS
        results[name]["bytes_per_row"] = round(size(call()) / rows, 1)
    lens = packed.indptr.diff()
    facts = {"uniform_n": n, "nodes_per_request": int(tree.forest.token.shape[1]), "context_mean": round(float(context.float().mean()), 1),
             "largest_tree": int(lens.max()), "smallest_tree": int(lens.min())}  # fmt: skip
    return {"setting": facts, "results": results}


def main() -> None:
    """Times everything, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    parser.add_argument("--max-tree-rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--sglang-cpu", type=Path, help="csrc/cpu/spec.cpp in a checkout of sgl-project/sglang")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = {"requests": BATCH, "rows": ROWS, "layers": DEPTH, "threads": 1, "repeat": args.repeat, "torch": torch.__version__,
             "python": platform.python_version(), "machine": platform.machine()}  # fmt: skip
    sizes = {n: measure(n, args.repeat, args.sglang_cpu) for n in args.max_tree_rows}
    args.out.write_text(json.dumps({"setting": facts, "max_tree_rows": sizes}, indent=1) + "\n")
    for n, found in sizes.items():
        print(f"\n{BATCH} requests, {ROWS} rows, trees of at most {n} rows")
        for name, row in found["results"].items():
            print(f"{name:48} {row['median_us']:9.1f} us   p90 {row['p90_us']:9.1f}   {row.get('bytes_per_row', '')}")


if __name__ == "__main__":
    main()
