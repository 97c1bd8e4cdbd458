"""Which tile of tree attention is fastest on this card: a table that the library reads.

python benchmarks/gpu.py --tune tiles.json --heads 32 8 128
ECHO_TILES=tiles.json python ...
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from common import cases, timing
from echo import kernels
from echo.kernels import schedule, tiles
from echo.kernels.tiles import Tile

FOLDED = (16, 64, 256)
"""Query rows times heads of a group that a tile is chosen for."""


def candidates(folded: int, itemsize: int) -> list[Tile]:
    """Those that compile without spills somewhere; tall ones for as many rows only."""
    if itemsize == 4:
        return [Tile(16, 16, warps, stages, 1) for warps in (4, 8) for stages in (2, 3)]
    found = [(16, 32, 4, 4), (16, 64, 4, 3), (32, 32, 4, 4), (64, 32, 4, 4), (64, 64, 4, 3)]
    found += [(64, 64, 4, 4), (128, 32, 8, 4), (128, 64, 8, 3), (128, 128, 8, 3)]
    return [
        Tile(*tile, 1) for tile in found if tile[0] <= max(64, folded) and 4 * tile[0] >= folded
    ]


def calls(case: cases.Case, tile: Tile, device: torch.device, copies: int) -> Iterator[timing.Call]:
    """Planned calls with that tile, one for each copy of the inputs."""
    for seed in range(copies):
        args = cases.inputs(case, device, seed)
        with mock.patch.object(schedule, "tile", return_value=tile):
            plan = kernels.plan_attention(
                *(args[name] for name in ("q", "key_cache", "page_table", "prefix_lens")),
                args["tree_key"], args["indptr"], backend="triton",
            )  # fmt: skip
        yield partial(attend, args, plan, tile)


def attend(args: dict[str, torch.Tensor], plan: kernels.AttentionPlan, tile: Tile) -> object:
    """One call with that tile."""
    with mock.patch.object(schedule, "tile", return_value=tile):
        return kernels.tree_attention(**args, plan=plan, backend="triton")


def once(heads: tuple[int, int, int], cache: str, tile: Tile) -> None:
    """Compiles a tile; what fails fails again where it is timed."""
    cases.HEADS["tuned"] = heads
    with contextlib.suppress(Exception):
        case = cases.Case("tuned", 2, 4, 300, page=128, cache=cache)
        next(calls(case, tile, torch.device("cuda"), 1))()


def tune(
    heads: tuple[int, int, int],
    device: torch.device,
    timer: timing.Timer = timing.alternating,
    caches: tuple[str, ...] = ("bfloat16", "float8_e4m3fn"),
    batch: int = 32,
    context: int = 2048,
) -> list[list[object]]:
    """The rows of the table: the fastest candidate of each size, for pages of 128 and of 64; those
    that fail are left out.
    """
    cases.HEADS["tuned"] = heads
    if device.type == "cuda":  # into Triton's cache, side by side
        jobs = [(heads, c, t) for c in caches for n in FOLDED for t in candidates(n, 2)]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            pool.starmap(once, dict.fromkeys(jobs))
    group, found = heads[0] // heads[1], []
    for cache in caches:
        for folded in FOLDED:
            rows = min(-(-folded // group), 64)  # most that is drafted
            case = cases.Case("tuned", batch, rows, context, page=128, cache=cache)
            moved = 2 * batch * context * heads[1] * heads[2] * (1 if cache != "bfloat16" else 2)
            contenders: dict[str, list[timing.Call]] = {}
            for tile in candidates(folded, 2):
                try:
                    ready = list(calls(case, tile, device, timing.copies(moved, device)))
                    ready[0]()
                    contenders[json.dumps(tile)] = ready
                except Exception as reason:  # too large for this card: not a candidate
                    print(f"{tile}: {type(reason).__name__}: {reason}"[:200])
            times = {
                name: statistics.median(samples) for name, samples in timer(contenders).items()
            }
            kind = tiles.generation(device), heads[2], 2, 1 if cache != "bfloat16" else 2
            for page in (128, 64):
                fitting = [name for name in times if json.loads(name)[1] <= page]
                row = [*kind, folded, json.loads(min(fitting, key=times.__getitem__, default="0"))]
                found += [row] * (bool(fitting) and row not in found)
    return found


def write(path: Path, card: str, rows: list[list[object]]) -> None:
    """The table, in the form that :func:`echo.kernels.schedule.table` reads."""
    path.write_text(json.dumps({"card": card, "tiles": rows}, indent=1) + "\n")
