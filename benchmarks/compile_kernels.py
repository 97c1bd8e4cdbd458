"""Do all kernel configurations compile without spills? Registers, occupancy, the hot loop; no GPU.

    python benchmarks/compile_kernels.py            all, into benchmarks/results/compile.*
    python benchmarks/compile_kernels.py --quick    a representative subset, nothing written

Each launch is recorded from the real launcher on CPU tensors, so that types, constants and
divisibility hints are the launch's own. Exit status 1: spills (of attention's programs, in the
loops over keys), shared memory over the limit, fewer programs resident than are planned, a 16-bit
tile of 64 rows without the wide matrix instruction, or keys that are not copied ahead in pieces of
16 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.replays import fold, write
from echo.budget.history import BINS, SKIP
from echo.kernels import (
    acceptance,
    arguments,
    grow,
    join,
    ngram,
    observe,
    pack,
    schedule,
    select,
    tiles,
)
from echo.kernels import attention as attention_kernels

RESULTS = Path(__file__).parent / "results"
WIDE = {90: "HGMMA", 100: "UTCHMMA"}
"""What a tile of 64 rows and more of 16 bits must use, by architecture."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
"""By architecture: most shared memory of a block and of a multiprocessor; 1 KiB is reserved."""
MATRIX = ("UTCHMMA", "HGMMA", "HMMA")
"""Matrix instructions in the machine code, widest first."""
MEMORY = {80: 2.04e12 / 108 / 1.41e9, 90: 3.35e12 / 132 / 1.755e9, 100: 8.0e12 / 148 / 1.85e9}
"""Bytes of memory per multiprocessor and cycle: data sheets of A100 80 GB, H100 SXM and B200."""
ISSUED = 4
"""Instructions that a multiprocessor issues per cycle, one a scheduler."""
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of tree attention: what decides how its kernels are compiled."""

    dim: int
    dtype: torch.dtype
    group: int
    rows: int
    page: int = 64
    cache: torch.dtype | None = None
    mode: str = "whole"
    window: int | None = None
    softcap: float | None = None
    batch: int = 8
    splits: int | None = None
    sinks: bool = False
    joined: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        parts = [
            f"D={self.dim}",
            str(self.dtype)[6:],
            f"group={self.group}",
            f"rows={self.rows}",
            f"page={self.page}",
        ]
        parts += [str(self.cache)[6:]] * (self.cache is not None) + ["tree part"] * (
            self.mode == "tree"
        )
        parts += [f"batch={self.batch}"] * (self.batch != 8) + [f"splits={self.splits}"] * (
            self.splits is not None
        )
        return " ".join(
            parts
            + ["window"] * (self.window is not None)
            + ["softcap"] * (self.softcap is not None)
            + ["sinks"] * self.sinks
            + ["joined"] * self.joined
        )


STEP = (
    "_begin", "_grow", "_path_cost", "_rank", "_share", "_pack", "_compact", "_summarize",
    "_observe", "_count", "_propose", "_blend", "_append",
)  # fmt: skip
"""Kernels of a step other than attention and acceptance."""


class Recorder:
    """Stands in for a kernel, and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.args = ()
        self.options = {}
        self.grid = (0,)

    def __getitem__(self, grid: Any) -> Any:
        def record(*args: Any, **options: Any) -> None:
            self.args = args
            self.options = options
            self.grid = grid

        return record


def record(modules: list[Any], names: tuple[str, ...], call: Any) -> dict[str, Recorder]:
    """The launches that ``call`` makes."""
    with contextlib.ExitStack() as patches:
        places = [(module, name) for module in modules for name in names if hasattr(module, name)]
        found = {
            name: patches.enter_context(
                mock.patch.object(module, name, Recorder(getattr(module, name)))
            )
            for module, name in places
        }
        call()
    return {name: recorder for name, recorder in found.items() if recorder.args}


def source(recorder: Recorder) -> tuple[ASTSource, dict[str, int]]:
    """What Triton would compile for that launch.

    Ints equal to 1 are constants and those divisible by 16 are hinted, as pointers are, except
    what is not to be specialised on.
    """
    names = recorder.kernel.arg_names
    named = dict(zip(names, recorder.args, strict=False)) | {
        k: v for k, v in recorder.options.items() if k in names
    }
    plain = {p.name for p in recorder.kernel.params if p.do_not_specialize}
    constants = {p.name for p in recorder.kernel.params if p.is_constexpr}
    signature = {}
    fixed = {}
    hints = {}
    for place, name in enumerate(names):
        value = named[name]
        if name in constants or (isinstance(value, int) and value == 1 and name not in plain):
            signature[name] = "constexpr"
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and name not in plain:
                hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {
        k: v
        for k, v in recorder.options.items()
        if k in ("num_warps", "num_stages", "enable_fp_fusion")
    }
    return ASTSource(recorder.kernel, signature, constexprs=fixed, attrs=hints), options


@functools.lru_cache(1)
def disassembly(cubin: bytes) -> str:
    """Resource usage, then the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        found = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "EXIT" in found, "expected a disassembly"
    return found


def resources(compiled: Any, arch: int, warps: int) -> dict[str, Any]:
    """Registers, spills, shared memory, and predicted blocks of a kernel per multiprocessor."""
    sass = disassembly(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    assert found is not None, sass
    registers = int(found[1])
    stack = int(found[2])
    # The compiler may add warps, such as one that loads: launch bounds have the real size.
    bound = re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"])
    threads = int(bound[1]) if bound else 32 * warps
    shared = compiled.metadata.shared
    _, whole = SHARED[arch]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * (threads // 32))
    blocks = min(by_registers, whole // (shared + 1024), 2048 // threads, 32)
    return {
        "arch": f"sm_{arch}",
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "stack": stack,
        "shared": shared,
        "threads": threads,
        "blocks": blocks,
        "occupancy": round(blocks * threads / 2048, 3),
        "matrix": next((kind for kind in MATRIX if re.search(rf"\b{kind}\b", sass)), "none"),
    }


def loops(sass: str) -> list[list[str]]:
    """Opcodes of every loop without a loop inside, in order."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", sass)
    found: list[tuple[int, int]] = []
    for at, opcode, operands in lines:
        back = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if back and int(back[1], 16) < int(at, 16):
            found.append((int(back[1], 16), int(at, 16)))
    inner = [
        (low, high)
        for low, high in found
        if not any((low, high) != o and low <= o[0] and o[1] <= high for o in found)
    ]
    return [[name for at, name, _ in lines if low <= int(at, 16) <= high] for low, high in inner]


def hot_loop(sass: str) -> list[str]:
    """The first loop that copies to shared memory: that over the prefix, if any."""
    copying = (body for body in loops(sass) if any(name.startswith("LDGSTS") for name in body))
    return next(copying, [])


def turn(
    compiled: Any, arch: int, keys: int, width: int, key_bytes: int, found: dict[str, Any]
) -> dict[str, Any]:
    """One turn of the hot loop over ``keys`` keys, each ``key_bytes`` of key and value.

    ``buffers``: turns whose keys shared memory holds at once. ``in_flight``: bytes a
    multiprocessor may have asked for, all its blocks together; memory needs about 25 KiB to be
    busy. ``issue``: instructions over those that fit into the time that memory takes for the
    same keys: above 1, instructions are the limit.
    """
    count = Counter(hot_loop(disassembly(compiled.asm["cubin"])))
    total = sum(count.values())
    rings = re.findall(
        rf"local_alloc : \(\) -> !ttg.memdesc<(\d+)x{keys}x{width}x\w+, [^>]*mutable>",
        compiled.asm["ttgir"],
    )
    buffers = int(rings[0]) if rings else 1
    starting = lambda *names: sum(n for name, n in count.items() if name.startswith(names))
    return {
        "loop": total,
        "copies16": starting("LDGSTS.E.BYPASS.128"),
        "barriers": starting("BAR"),
        "buffers": buffers,
        "in_flight": found["blocks"] * buffers * keys * key_bytes,
        "issue": round(
            total * found["threads"] / 32 / keys / (ISSUED * key_bytes / MEMORY[arch]), 2
        ),
    }


def measure(recorder: Recorder, arch: int) -> dict[str, Any]:
    """Compiles one launch for one architecture and reads its machine code."""
    src, options = source(recorder)
    compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
    found = resources(compiled, arch, options.get("num_warps", 4))
    if "KEYS" in recorder.options and "WIDTH" in recorder.options:
        cached = recorder.args[1].element_size()  # of the cache, or of the tree's own keys
        keys, width, dim = (recorder.options[name] for name in ("KEYS", "WIDTH", "DIM"))
        found |= turn(compiled, arch, keys, width, 2 * dim * cached, found)
        bodies = loops(disassembly(compiled.asm["cubin"]))
        looped = sum(name.startswith(("STL", "LDL")) for body in bodies for name in body)
        found |= {"spills": looped, "outside": found["spills"] - looped}
    if "PAGE" in recorder.options:
        found["planned"] = recorder.grid[0] // tiles.multiprocessors(torch.device("cpu"))
    return found


def attention(case: Case, arch: int) -> dict[str, Recorder]:
    """The launches of one attention call, as on that architecture."""
    batch = case.batch
    kv_heads = 2
    words, width = (1, 1) if batch == 1 else (2, 32)
    n = case.rows * batch
    cache = case.cache or case.dtype
    q = torch.empty(n, kv_heads * case.group, case.dim, dtype=case.dtype)
    pages = [torch.empty(64, case.page, kv_heads, case.dim, dtype=cache) for _ in range(2)]
    own = [torch.empty(n, kv_heads, case.dim, dtype=case.dtype) for _ in range(2)]
    ints = {"dtype": torch.int32}
    scales = None if case.cache is None else torch.ones(kv_heads)

    def call() -> None:
        checked = arguments.Attention(
            q, *pages, torch.zeros(batch, width, **ints), torch.zeros(batch, **ints), *own,
            torch.zeros(n, **ints), torch.zeros(batch + 1, **ints), torch.zeros(n, words, **ints),
            mode=case.mode, window=case.window, softcap=case.softcap, depth=torch.zeros(n, **ints),
            key_scale=scales, value_scale=scales, splits=case.splits,
            sinks=torch.zeros(kv_heads * case.group) if case.sinks else None,
            prefix_out=torch.empty_like(q) if case.joined else None,
            prefix_lse=torch.zeros(n, kv_heads * case.group) if case.joined else None,
        )  # fmt: skip
        (join if case.mode == "tree" else attention_kernels).tree_attention(checked)

    modules = [schedule, attention_kernels, join]
    with mock.patch.object(tiles, "generation", return_value=arch // 10):
        found = record(modules, ("_plan", "_attend", "_merge", "_add"), call)
    return {name.strip("_"): recorder for name, recorder in found.items()}


def others(n: int, vocabulary: int) -> list[tuple[str, str, Recorder]]:
    """Kernel, case and launch of acceptance from logits and tokens, and of merging two parts."""
    links = torch.zeros(n + 1, dtype=torch.int32)
    tokens = torch.zeros(n, dtype=torch.int64)
    logits, out, lse = (torch.empty(n, size, dtype=torch.bfloat16) for size in (vocabulary, 128, 1))
    trees = links[:n], links[: n // 8 + 2], tokens
    parts = out[:, None], lse.float(), out[:, None], lse.float()
    calls = {
        f"V={vocabulary}": lambda: acceptance.accept(*trees, logits, n // 8 + 1),
        f"V={vocabulary} arg-max": lambda: acceptance.argmax_tokens(logits),
        "from tokens": lambda: acceptance.accept(*trees, tokens, n // 8 + 1),
        "D=128": lambda: join.merge_attention(*parts),
    }
    found = []
    for case, call in calls.items():
        launches = record(
            [acceptance, join],
            ("_chunk_argmax", "_accept", "_argmax", "_merge_parts"),
            call,
        )
        found += [
            (name.strip("_"), f"{case} bfloat16 N={n}", recorder)
            for name, recorder in launches.items()
        ]
    return found


def steps(
    batch: int, beam: int, k: int, depth: int, limit: int = 64
) -> list[tuple[str, str, Recorder]]:
    """The launches of one step but for acceptance, of trees of that shape."""
    sizes = [1, k, *[beam * k] * (depth - 1)]
    batched = lambda n, dtype: torch.zeros(batch, n, dtype=dtype)
    one = {
        dtype: torch.zeros(batch, dtype=dtype)
        for dtype in (torch.int8, torch.int32, torch.int64, torch.float32, torch.bool)
    }
    score, place, yes = (
        batched(sum(sizes), dtype) for dtype in (torch.float32, torch.int64, torch.bool)
    )
    frontier = [batched(beam, dtype) for dtype in (torch.float32, torch.bool, torch.int64)]
    drafted = torch.zeros(batch, beam, k)
    rows = batch * limit
    remaining = torch.zeros((), dtype=torch.int64)
    links = torch.zeros(batch + 1, dtype=torch.int32)
    context = one[torch.int32]
    table = batched(32, torch.int32)
    found = one[torch.int8], one[torch.bool], one[torch.int64], one[torch.int64], remaining, context
    sums = [torch.zeros(depth, batch + 1) for _ in range(3)] + [torch.zeros(depth, batch + 1, 64)]
    summary = torch.zeros(batch, depth), torch.zeros(batch, depth, BINS)

    def call() -> None:
        grow.begin(one[torch.int64], one[torch.bool], one[torch.int64], rows, limit, True)
        grow.grow(
            *frontier, drafted.long(), drafted, *found, beam=beam, commit=beam, stop=0, log_tau=-1.0
        )
        select.path_cost(score, place, torch.zeros(depth + 1, 512, dtype=torch.int32), sizes)
        selected = select.select(
            score.int(), yes, one[torch.int64], one[torch.int64], remaining, rows, limit, sizes
        )
        state = one[torch.int8], one[torch.int32]
        pack.pack(selected, place, place, score, yes, *state, rows, -(-limit // 32), sizes)
        pack.compact(
            batched(depth + 1, torch.int64), one[torch.int64], links, context, table, 64, 0, -1
        )
        observe.summarize(score, score, selected, sizes, BINS, SKIP)
        emitted = one[torch.int8], one[torch.int64], one[torch.int64]
        observe.count(links, *emitted[:2], context, rows, depth, torch.zeros(13, dtype=torch.int64))
        observe.observe(one[torch.int64], *emitted, depth, summary, sums, 0.95, 512)
        rings = batched(4096, torch.int32), one[torch.int64], one[torch.int64]
        tails, _, _ = ngram.propose(*rings, 8)
        frontier_tokens = batched(beam, torch.int64), batched(beam, torch.int64)
        _, proposal, matches = ngram.propose(*rings, 8, (tails, *frontier_tokens))
        ngram.blend(drafted.long(), drafted, proposal, matches, torch.zeros(9))
        ngram.append(*rings, batched(depth + 1, torch.int64), one[torch.int64])

    launches = record([grow, select, pack, observe, ngram], STEP, call)
    return [
        (name.strip("_"), f"beam={beam} candidates={k} depth={depth} B={batch}", recorder)
        for name, recorder in launches.items()
    ]


def cases(quick: bool) -> list[Case]:
    """What is compiled: every head dimension, kind and tile height, then each feature once."""
    half = torch.float16
    brain = torch.bfloat16
    single = torch.float32
    # Arguments equal to 1 are compiled in, which changes types: all that can be 1 is.
    ones = Case(64, half, 1, 1, page=1, batch=1, splits=1)
    if quick:
        return [
            ones,
            Case(128, brain, 4, 16),
            Case(128, brain, 4, 4),
            Case(80, half, 5, 20, page=1),
            Case(64, single, 4, 16),
        ]
    # float16 compiles to what bfloat16 does; float32 has one tile.
    grid = [Case(dim, brain, 4, rows) for dim in tiles.HEAD_DIMS for rows in (2, 8, 16, 32)]
    grid += [Case(dim, single, 4, 16) for dim in tiles.HEAD_DIMS] + [
        Case(128, half, 4, rows) for rows in (2, 16)
    ]
    e4 = torch.float8_e4m3fn
    e5 = torch.float8_e5m2
    features = [
        Case(128, brain, 4, 16, page=16), Case(128, brain, 4, 16, page=1),
        Case(128, brain, 8, 16, page=256),
        Case(128, brain, 4, 16, cache=e4), Case(128, brain, 4, 16, cache=e5),
        Case(128, half, 8, 2, cache=e4),
        Case(128, brain, 4, 16, mode="tree"), Case(128, brain, 4, 4, mode="tree", joined=True),
        Case(64, half, 3, 4, mode="tree", joined=True, sinks=True),
        Case(256, brain, 4, 16, mode="tree", joined=True),
        Case(128, single, 4, 4, mode="tree", joined=True), Case(128, brain, 4, 4, cache=e4),
        Case(64, brain, 8, 8, sinks=True), Case(64, brain, 3, 8),
        Case(256, brain, 2, 16, window=4096, softcap=50.0),
        Case(128, brain, 7, 16), Case(64, half, 1, 8, window=1024), Case(128, brain, 16, 4),
    ]  # fmt: skip
    return [*grid, *features, ones]


def faults(entry: dict[str, Any], tile_rows: int, sixteen: bool) -> list[str]:
    """What a compiled kernel must not be."""
    arch = int(entry["arch"][3:])
    found = [f"{entry['spills']} spill instructions, {entry['stack']} bytes of stack"] * bool(
        entry["spills"] or (entry["stack"] and not entry.get("outside"))
    )
    planned = entry.get("planned", 0)
    found += [f"{entry['blocks']} blocks, {planned} planned"] * (entry["blocks"] < planned)
    found += [f"{entry['shared']} bytes of shared memory"] * (entry["shared"] > SHARED[arch][0])
    wide = WIDE.get(arch)
    if sixteen and tile_rows >= 64 and wide and entry["matrix"] != wide:
        found.append(f"{entry['matrix']} instead of {wide}")
    if (
        sixteen
        and tile_rows
        and "tree part" not in entry.get("case", "")
        and (entry["buffers"] < 2 or entry["copies16"] == 0)
    ):
        found.append(f"{entry['buffers']} buffers, {entry['copies16']} copies of 16 bytes")
    return found


def jobs(quick: bool, arch: int) -> list[tuple[str, str, Recorder, int, bool]]:
    """Kernel, case, launch, tile height (0: none) and whether products are of 16 bits."""
    found = []
    for case in cases(quick):
        if case.cache == torch.float8_e4m3fn and arch < 89:
            continue
        for name, recorder in attention(case, arch).items():
            once = case in (Case(128, torch.bfloat16, 4, 16), Case(256, torch.float32, 4, 16))
            if name in ("attend", "add") or case.batch == 1 or once:
                height = recorder.options["ROWS"] if name in ("attend", "add") else 0
                found.append((name, case.name, recorder, height, case.dtype.itemsize == 2))
    if quick and arch != 90:
        return found
    shapes = ((256, 4, 4, 6), (4096, 8, 8, 8), (1, 1, 1, 1))[: 1 + 2 * (not quick)]
    found += [(*launched, 0, False) for shape in shapes for launched in steps(*shape)]
    return found + [
        (*other, 0, False)
        for n, vocabulary in (((64, 128256), (1, 1))[: 1 + (not quick)])
        for other in others(n, vocabulary)
    ]


def run(quick: bool, archs: tuple[int, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every entry of the table, and every fault."""
    table: list[dict[str, Any]] = []
    broken: list[str] = []
    for arch in archs:
        for kernel, name, recorder, height, sixteen in jobs(quick, arch):
            shape = {
                key: recorder.options[key]
                for key in ("ROWS", "KEYS")
                if key in recorder.options and height
            }
            entry = {"kernel": kernel, "case": name} | shape | measure(recorder, arch)
            wrong = faults(entry, height, sixteen)
            broken += [f"{kernel} {name} {entry['arch']}: {what}" for what in wrong]
            table.append(entry)
            print(json.dumps(entry), "; ".join(wrong), flush=True)
    return table, broken


COLUMNS = (
    "kernel", "case", "ROWS", "KEYS", "arch", "registers", "spills", "outside", "shared", "threads",
    "blocks", "occupancy", "matrix", "loop", "barriers", "buffers", "in_flight", "issue",
)  # fmt: skip


def markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "# Compiled kernels",
        "",
        f"Triton {triton.__version__}, no GPU: `python benchmarks/compile_kernels.py`. `blocks`",
        "and `occupancy` are predictions from registers, shared memory and threads; `shared` is in",
        "bytes; `spills` counts instructions, for attention those in the loops over keys, and",
        "`outside` those that run once a work item. Of one turn of the loop over the keys: `loop`",
        "its instructions, `buffers` the turns that shared memory holds, `in_flight` the bytes a",
        "multiprocessor may have asked for, `issue` its instructions over those that fit into the",
        "time that memory takes for the same keys (data sheet rates).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return (
        "\n".join(
            lines
            + ["| " + " | ".join(str(row.get(key, "")) for key in COLUMNS) + " |" for row in table]
        )
        + "\n"
    )


def main() -> int:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a representative subset; nothing is written"
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(SHARED))
    options = parser.parse_args()
    table, broken = run(options.quick, tuple(options.arch))
    if not options.quick:
        made_with = {k: v for k, v in vars(tiles).items() if k.isupper() and len(k) > 1}
        kept = [
            {
                key: row[key]
                for key in ("kernel", "case", "ROWS", "KEYS", "arch", "spills", "stack", "loop")
                if key in row
            }
            for row in table
        ]
        write(
            RESULTS / "compile.json",
            {
                "triton": triton.__version__,
                "launch": made_with,
                "kernels": fold(kept, "kernel", "case"),
            },
        )
        (RESULTS / "compile.md").write_text(markdown(table))
    print(f"{len(table)} kernels, {len(broken)} faults", *broken, sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
