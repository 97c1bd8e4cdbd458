"""How many microseconds does the host take to plan, pack and calibrate? One thread, with peers.

    pip install --no-deps --target PEERS sglang==0.5.23          # 40 MB
    PYTHONPATH=PEERS python benchmarks/host.py                   # results/host.json, plan.png
    PYTHONPATH=PEERS python benchmarks/host.py --only plan pack  # sections of it

*plan*: ranking and selecting 1,024 verify tokens of 256 requests, growing a layer, choose_tier.
SGLang's ``ScheduleVerifyLensTopk`` plans chains instead: it multiplies confidences along each
request's chain, ranks all positions and returns how far each chain is verified; there are no
parents, and no limit but the chain's length. Both see as many candidates and select as many. Calls
take turns, and every call gets other numbers than the one before, so that no branch predictor
learns them.

*pack*: Flatten & Pack, every exporter and importer, and SGLang's ``organize_draft_results`` on
uniform trees. Its tree builder for CPUs is C++ that its wheel lacks: ``--sglang-cpu`` names
csrc/cpu/spec.cpp in a checkout of sgl-project/sglang, which is compiled as it stands.

*ranks*, printed only: the bytes and microseconds by which two and four ranks follow one plan, gloo
between processes of this machine, or ``--nccl``, a card for each of two, inside a CUDA graph.

*calibrate*: synthetic log entries (Beta-distributed confidences) counted a second, and scikit-learn
on the same entries where it is installed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import echo
from common import ranks
from common.replays import fold, write
from echo import plot
from echo.gating import separability
from echo.testing import importers
from echo.tree import compact, layouts
from echo.tree.packed import pack

RESULTS = Path(__file__).parent / "results"
BATCH, ROWS, DEPTH, K, CONTEXT = 256, 1024, 4, 4, 512
SHAPES = {64: (4, (16, 4, 4, 4)), 512: (8, (64, *[8] * 7))}
"""Candidates of a request: nodes expanded in a layer, and for each layer candidates of each."""
POOLS, TURN = 8, 20
Call = Callable[[int], Any]


def timed(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median microseconds of each call, in turns of twenty, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 2:
        for name, call in calls.items():
            for i in range(TURN):
                start = time.perf_counter()
                call(turn * TURN + i)
                times[name].append(1e6 * (time.perf_counter() - start))
        turn += 1
    return {name: round(float(np.median(own[TURN:])), 1) for name, own in times.items()}


def calibration() -> echo.Calibration:
    """From drafts whose confidence says a little too much."""
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000).astype(np.float32)
    return echo.calibrate(
        echo.WarmupLog.from_arrays(
            rng.integers(1, 9, 20_000), confidence, rng.random(20_000) < confidence**1.3
        )
    )


def drafts(
    tree: echo.SuperTree, k: int, generator: torch.Generator, sharpness: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities of every frontier node; requests differ in confidence."""
    shape = (*tree.frontier.token.shape, k)
    return torch.randint(0, 32000, shape, generator=generator), (
        sharpness * torch.randn(shape, generator=generator)
    ).log_softmax(-1)


def steps(
    scheduler: echo.ElasticBudgetScheduler,
    batch: int,
    rows: int,
    layers: tuple[int, ...],
    pools: int = POOLS,
) -> list[tuple[Any, ...]]:
    """Trees ready to be planned, each with the tree a layer before and that layer's drafts."""
    made = []
    for seed in range(pools):
        generator = torch.Generator().manual_seed(seed)
        sharpness = 0.3 + 4 * torch.rand(batch, 1, 1, generator=generator)
        tree = scheduler.begin(torch.arange(batch), num_verify_tokens=rows)
        for k in layers:
            before, drafted = tree, drafts(tree, k, generator, sharpness)
            tree = scheduler.grow(tree, *drafted)
        made.append((tree, before, *drafted))
    return made


def wheel() -> Path | None:
    """Where sglang lies, if it is installed."""
    spec = importlib.util.find_spec("sglang")
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec is not None and spec.submodule_search_locations
        else None
    )


def planner() -> Any:
    """``ScheduleVerifyLensTopk`` of an installed wheel, without its engine, or None."""
    folder = wheel()
    if folder is None:
        return None
    for name in (
        "",
        ".kernels",
        ".kernels.ops",
        ".kernels.ops.speculative",
        ".kernels.ops.speculative.dspark",
    ):
        package = types.ModuleType(f"sglang{name}")
        package.__path__ = [str(folder) + name.replace(".", "/")]
        sys.modules[package.__name__] = package
    return importlib.import_module(
        "sglang.kernels.ops.speculative.dspark.dspark_schedule"
    ).ScheduleVerifyLensTopk


def chains(theirs: Any, batch: int, candidates: int, extra: int) -> Call:
    """Their plan of ``extra`` tokens among chains of that many candidates, with its defaults."""
    settings = types.SimpleNamespace(
        min_verify_len=1, survival_eps=1e-6, resolved_max_verify_len=lambda: candidates + 1
    )
    generator = torch.Generator().manual_seed(0)
    confidence = 1 - 12 / candidates * torch.rand(
        POOLS, batch, candidates, generator=generator
    )  # nearly all reach its least survival
    return lambda i: theirs.torch(confidence=confidence[i % POOLS], budget=extra, cfg=settings)


def plans(theirs: Any, seconds: float) -> dict[str, float]:
    """The whole table at 256 requests and 1,024 verify tokens."""
    table: dict[str, float] = {}
    for candidates, (beam, layers) in SHAPES.items():
        calls: dict[str, Call] = {}
        for name, reliability in (("", None), (", calibrated", calibration())):
            scheduler = echo.ElasticBudgetScheduler(
                echo.GlobalRank(beam, reliability), budget=ROWS, max_depth=len(layers)
            )
            made = steps(scheduler, BATCH, ROWS, layers)
            calls[f"select {candidates}{name}"] = lambda i, made=made, select=scheduler.select: (
                select(made[i % POOLS][0])
            )
            if reliability is None:
                calls[f"grow {candidates}"] = lambda i, made=made, grow=scheduler.grow: grow(
                    *made[i % POOLS][1:]
                )
        if theirs is not None:
            calls[f"sglang chains {candidates}"] = chains(theirs, BATCH, candidates, ROWS - BATCH)
        table |= timed(calls, seconds / len(SHAPES))
    return table


def choose_tier() -> Call:
    """The host's decision from a history of twenty steps, of a scheduler with a cost model."""
    cost = echo.CostModel(
        (1, 64, 256, 512, 1024, 2048),
        (1.0, 1.1, 1.4, 2.0, 3.5, 7.0),
        0.05,
        0.0001,
        (256, 384, 512, 768, 1024, 2048),
    )
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(4, calibration()), None, cost, 4)
    histories = [scheduler.history(BATCH)]
    req_indices = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    for tree, *_ in steps(scheduler, BATCH, ROWS, SHAPES[64][1], pools=20):
        packed = scheduler.pack(tree)
        histories.append(
            histories[-1].observe(req_indices, packed, echo.accept(packed, packed.tokens.roll(-1)))
        )
    return lambda i: scheduler.choose_tier(histories[-1 - i % POOLS], req_indices)


def growth(theirs: Any, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Selection among 64 candidates a request: by requests at four tokens each, and by tokens."""
    beam, layers = SHAPES[64]
    lines: dict[str, list[dict[str, float]]] = {"requests": [], "rows": []}
    sizes = [("requests", b, 4 * b) for b in (1, 4, 16, 64, 256, 1024, 4096)] + [
        ("rows", BATCH, n * BATCH) for n in (2, 4, 8, 16, 32)
    ]
    for line, batch, rows in sizes:
        scheduler = echo.ElasticBudgetScheduler(
            echo.GlobalRank(beam), budget=rows, max_depth=len(layers)
        )
        made = steps(scheduler, batch, rows, layers)
        calls: dict[str, Call] = {
            "ours": lambda i, made=made, select=scheduler.select: select(made[i % POOLS][0])
        }
        if theirs is not None:
            calls["sglang chains"] = chains(theirs, batch, 64, rows - batch)
        lines[line].append({"requests": batch, "rows": rows, **timed(calls, seconds / len(sizes))})
    return lines


def draw(lines: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Both growth lines, on logarithmic axes, with the slope of what is linear."""
    with plot.figure(9, 3.6) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (line, points) in zip(axes, lines.items(), strict=True):
            x = points[line]
            for name, colour in (("ours", plot.GOOD), ("sglang chains", plot.QUIET)):
                if name in points:
                    label = "echo: trees" if name == "ours" else "SGLang 0.5.23: chains"
                    axis.loglog(x, points[name], "o-", color=colour, label=label)
            last = points["ours"][-1]
            axis.loglog(
                x, [last * v / x[-1] for v in x], ":", color=plot.INK, lw=0.8, label="linear"
            )
            axis.set_xlabel(
                "requests, 4 tokens each" if line == "requests" else f"tokens, {BATCH} requests"
            )
            axis.set_xticks(x, [f"{v:,}" for v in x])
            axis.minorticks_off()
        axes[0].set_ylabel("microseconds, one thread")
        axes[0].set_ylim(bottom=min(points["ours"][0] for points in lines.values()) / 2)
        axes[0].legend()
        figure.suptitle("Ranking and selecting, 64 candidates a request")
        figure.savefig(path, dpi=120)


def grown(scheduler: echo.ElasticBudgetScheduler, seed: int = 0) -> echo.SuperTree:
    """A step of random draft scores of various sharpness, so that trees are ragged."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 0.3 + 4 * torch.rand(BATCH, 1, 1, generator=generator)
    tree = scheduler.begin(torch.randint(0, 32000, (BATCH,), generator=generator))
    for _ in range(DEPTH):
        shape = (*tree.frontier.token.shape, K)
        log_probs = (sharpness * torch.randn(*shape, generator=generator)).log_softmax(-1)
        tree = scheduler.grow(tree, torch.randint(0, 32000, shape, generator=generator), log_probs)
    return tree


def source(
    path: str, names: tuple[str, ...], scope: dict[str, Any]
) -> list[Callable[..., Any]] | None:
    """Functions of sglang by name, from the installed wheel's source, without its engine."""
    folder = wheel()
    if folder is None:
        return None
    text = (folder / path).read_text()
    nodes = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
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
    from torch.utils.cpp_extension import load_inline

    text, flags = f'#include "{path.resolve()}"', ["-O3", "-march=native"]
    module = load_inline(
        "sglang_cpu_tree", [text], functions=["build_tree_kernel_efficient_cpu"], extra_cflags=flags
    )
    function: Callable[..., Any] = module.build_tree_kernel_efficient_cpu
    return function


def peers(cpp: Path | None, sizes: list[int], context: Tensor) -> dict[str, Callable[[], Any]]:
    """sglang's own steps from drafted beams to links and mask, at ``sizes`` tokens a request."""
    names = ("_select_top_k_tokens_first", "_select_top_k_tokens_later", "select_top_k_tokens")
    scope = {
        "torch": torch,
        "fast_topk": lambda x, k, dim: x.topk(k, dim=dim),
        "maybe_detect_oob": lambda *_: None,
        "TreeMaskMode": Mode,
    }
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
        "srt/speculative/eagle_utils.py",
        ("organize_draft_results", "build_tree_kernel_efficient"),
        scope,
    )
    total, calls = int(context.sum()), {}
    for n in sizes:

        def links(n: int = n) -> Any:
            parents, index, tokens = organize(*drafted, n)
            return build(
                torch.zeros(BATCH).long(),
                parents,
                index,
                tokens,
                context,
                total,
                K,
                DEPTH,
                n,
                Mode.QLEN_ONLY,
            )

        calls[f"sglang organize_draft_results, {n} rows each"] = lambda n=n: organize(*drafted, n)
        if cpp:
            calls[f"sglang organize + build (C++), {n} rows each"] = links
            compare(links(), n)
    return calls


def compare(theirs: Any, n: int) -> None:
    """Its links and its mask are the same trees to our importers."""
    mask, positions, index, token, sibling, drafts = theirs
    one = importers.from_sglang(layouts.SGLangLinks(drafts, positions, index, token, sibling))
    two = importers.from_sglang_mask(mask, drafts, n, "QLEN_ONLY")
    assert (
        one.num_rows == BATCH * n
        and torch.equal(one.tokens, two.tokens)
        and torch.equal(one.mask, two.mask)
    )


def size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a dataclass."""
    parts = (
        [value]
        if isinstance(value, Tensor)
        else [v for v in vars(value).values() if isinstance(v, Tensor)]
    )
    return sum(part.numel() * part.element_size() for part in parts)


def cases(
    packed: echo.PackedTree, n: int, context: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Exporters and importers of one step, by name."""
    lens = packed.indptr.diff()
    entries, bits = (
        int((lens * (context + lens)).sum()),
        int(((lens * (context + lens) + 7) // 8).sum()),
    )
    full = int((n * (context + n)).sum())
    chain = echo.ElasticBudgetScheduler(
        echo.GlobalRank(1), budget=ROWS, max_depth=DEPTH, max_verify_tokens_per_req=n
    )
    chained = chain.pack(
        chain.grow_positions(
            chain.begin(torch.arange(BATCH)),
            torch.zeros(BATCH, 4, 1).long(),
            -torch.rand(BATCH, 4, 1),
        )
    )
    one = echo.ElasticBudgetScheduler(
        echo.GlobalRank(K), budget=n, max_depth=DEPTH, max_verify_tokens_per_req=n
    )
    single = one.pack(
        one.grow(one.begin(torch.tensor([1])), torch.arange(4).view(1, 1, 4), -torch.rand(1, 1, 4))
    )
    table = torch.randperm(BATCH * 80).view(BATCH, 80).int()
    accepted = echo.accept(packed, packed.tokens.roll(-1))
    exporters: dict[str, Callable[[], Any]] = {
        "sglang": lambda: layouts.sglang(packed, n, context),
        "sglang_mask QLEN_ONLY": lambda: layouts.sglang_mask(packed, n, "QLEN_ONLY"),
        "sglang_mask QLEN_ONLY_BITPACKING": lambda: layouts.sglang_mask(
            packed, n, "QLEN_ONLY_BITPACKING"
        ),
        "sglang_mask FULL_MASK": lambda: layouts.sglang_mask(
            packed, n, "FULL_MASK", prefix_lens=context, size=full
        ),
        "chains": lambda: layouts.chains(chained),
        "flashinfer packed": lambda: layouts.flashinfer(packed, context, bits),
        "flashinfer flat": lambda: layouts.flashinfer(packed, context, entries, bits=False),
        "flashinfer_xqa": lambda: layouts.flashinfer_xqa(packed),
        "tensorrt_llm": lambda: layouts.tensorrt_llm(packed, n),
        "qq_bias (one tree)": lambda: layouts.qq_bias(single),
        "hugging_face": lambda: layouts.hugging_face(
            packed, n, context, CONTEXT, left_padded=False
        ),
        "slot_mapping": lambda: packed.slot_mapping(context, table, 16, 0),
        "positions": lambda: packed.positions(context),
        "compact, paged": lambda: compact(
            packed, accepted, context, page_table=table, page_size=16, pad_slot_id=0
        ),
        "to_buffer": packed.to_buffer,
    }
    if n > 32:
        del exporters["sglang_mask QLEN_ONLY_BITPACKING"]
    made = {name: call() for name, call in exporters.items()}
    tokens, back = made["sglang"].draft_tokens, {"num_nodes": lens}
    imported: dict[str, Callable[[], Any]] = {
        "from_sglang": lambda: importers.from_sglang(made["sglang"], **back),
        "from_sglang_mask QLEN_ONLY": lambda: importers.from_sglang_mask(
            made["sglang_mask QLEN_ONLY"], tokens, n, "QLEN_ONLY", **back
        ),
        "from_chains": lambda: importers.from_chains(made["chains"]),
        "from_flashinfer, packed": lambda: importers.from_flashinfer(
            made["flashinfer packed"], packed.tokens
        ),
        "from_flashinfer_xqa": lambda: importers.from_flashinfer_xqa(
            made["flashinfer_xqa"], packed.indptr, packed.tokens
        ),
        "from_tensorrt_llm": lambda: importers.from_tensorrt_llm(made["tensorrt_llm"]),
        "from_hugging_face": lambda: importers.from_hugging_face(made["hugging_face"], **back),
        "validate": packed.validate,
    }
    return exporters, imported


def packing(n: int, seconds: float, cpp: Path | None) -> dict[str, Any]:
    """All figures with trees of at most ``n`` tokens, the tokens a request of uniform layouts."""
    torch.manual_seed(0)
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(K), budget=ROWS, max_depth=DEPTH, max_verify_tokens_per_req=n
    )
    tree = grown(scheduler)
    selected, packed, words = scheduler.select(tree), scheduler.pack(tree), -(-n // 32)
    packed.validate()
    context = torch.randint(
        CONTEXT // 2, CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(1)
    )
    exporters, imported = cases(packed, n, context)

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
    everything = timed(
        {name: lambda _, call=call: call() for name, call in (calls | imported).items()}, seconds
    )
    results = {name: {"us": us} for name, us in everything.items()}
    results["pack"]["bytes_per_row"] = round(size(packed) / ROWS, 1)
    for name, call in exporters.items():
        rows = (
            n
            if "one tree" in name
            else BATCH * n
            if name.startswith(("sglang", "tensorrt", "hugging"))
            else ROWS
        )
        results[name]["bytes_per_row"] = round(size(call()) / rows, 1)
    return results


def synthetic(rows: int, depths: int, seed: int = 0) -> echo.WarmupLog:
    """``rows`` entries of each depth."""
    random = np.random.default_rng(seed)
    n = rows * depths
    depth = np.repeat(np.arange(1, depths + 1, dtype=np.int32), rows)
    confidence = random.beta(1.5, 1.2, n).astype(np.float32) ** (
        0.6 + 0.4 * depth.astype(np.float32)
    )
    accepted = random.random(n, dtype=np.float32) < 0.1 + 0.8 * confidence**0.7
    order = random.permutation(n)  # as a serving engine would write them: depths mixed
    return echo.WarmupLog.from_arrays(depth[order], confidence[order], accepted[order])


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of a call, because other programs may be running."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def calibrating(rows: int, depths: int = 8) -> dict[str, Any]:
    """Log entries counted a second, seconds to calibrate, scikit-learn's time over ours."""
    log = synthetic(rows, depths)
    weighted = echo.WarmupLog.from_arrays(
        log.depth, log.confidence, log.accepted, weight=np.where(np.arange(len(log)) % 9, 1.0, 10.0)
    )
    histograms = echo.gating.ConfidenceHistograms.of(log)
    count = cpu_seconds(lambda: echo.gating.ConfidenceHistograms.of(log), 7)
    calibrated = echo.calibrate(histograms)  # imports scipy.optimize
    fit = cpu_seconds(lambda: echo.calibrate(histograms), 21)
    found: dict[str, Any] = {
        "rows": len(log),
        "depths": depths,
        "count_rows_per_s": len(log) / count,
        "count_weighted_rows_per_s": len(log)
        / cpu_seconds(lambda: echo.gating.ConfidenceHistograms.of(weighted), 7),
        "calibrate_s": fit,
    }
    try:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.metrics import roc_auc_score
    except ImportError:
        return found
    columns = [
        (log.confidence[log.depth == d], log.accepted[log.depth == d]) for d in range(1, depths + 1)
    ]
    auc: list[float] = []
    exact: list[float] = []
    theirs = cpu_seconds(lambda: auc.extend(float(roc_auc_score(a, c)) for c, a in columns), 1)
    isotonic = cpu_seconds(
        lambda: [IsotonicRegression(out_of_bounds="clip").fit(c, a) for c, a in columns], 1
    )
    ours = cpu_seconds(lambda: exact.extend(separability(c, a).auc for c, a in columns), 1)
    return found | {
        "roc_auc_score_s": theirs,
        "isotonic_s": isotonic,
        "our_exact_auc_s": ours,
        "exact_auc_largest_difference": max(abs(x - y) for x, y in zip(auc, exact, strict=True)),
        "binned_auc_largest_difference": max(
            abs(x - d.auc) for x, d in zip(auc, calibrated.depths, strict=True)
        ),
        "scikit_learn_over_ours": (theirs + isotonic) / (count + fit),
        "scikit_learn_over_exact_auc": theirs / ours,
        "scikit_learn_over_exact_auc_and_isotonic": (theirs + isotonic) / (count + fit + ours),
    }


@torch.inference_mode()
def planning(seconds: float) -> dict[str, Any]:
    """The table and the two growth lines, as engines run: under inference mode."""
    theirs = planner()
    table = plans(theirs, 0.4 * seconds) | timed({"choose_tier": choose_tier()}, 0.1 * seconds)
    lines = {name: fold(points) for name, points in growth(theirs, 0.5 * seconds).items()}
    return {"peer": "sglang 0.5.23" if theirs is not None else None, "us": table, "growth": lines}


def main() -> None:
    """Times everything, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=["plan", "pack", "calibrate"],
        choices=["plan", "pack", "calibrate", "ranks"],
    )
    parser.add_argument("--nccl", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of timing in each section but the last"
    )
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="of each depth, for calibrating"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--sglang-cpu", type=Path, help="csrc/cpu/spec.cpp in a checkout of sgl-project/sglang"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "ranks" in args.only:
        ranks.table([2] if args.nccl else [2, 4], args.nccl)
    path = args.out / "host.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    made_with = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    sections: dict[
        str, Callable[[], dict[str, Any]]
    ] = {  # packing first: planning leaves an sglang without its own package behind
        "pack": lambda: {str(n): packing(n, args.seconds / 2, args.sglang_cpu) for n in (16, 64)},
        "plan": lambda: planning(args.seconds),
        "calibrate": lambda: calibrating(args.rows),
    }
    for name, section in sections.items():
        if name in args.only:
            found[name] = made_with | section()
            print(name, json.dumps(found[name], indent=1))
    write(path, found)
    if "plan" in args.only:
        draw(found["plan"]["growth"], args.out / "plan.png")


if __name__ == "__main__":
    main()
