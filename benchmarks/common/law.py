"""What tree attention costs on an H100, by its work list: a law fitted to measured splits.

    us = launch + max(slope * read, block * longest) + partial * megabytes + part * parts

``read`` is the time in which memory can be read, ``longest`` the key blocks of the place that is
busy longest, ``megabytes`` those of partial results, ``parts`` the most of one row tile. The last
two are of the merge as it was: today's has a program for every eight rows that were cut, and is
expected to cost less. ``block`` is of the kernel as it was: :func:`shorter` has today's.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

from common import cases
from common.replays import short
from echo.kernels import schedule, tiles

SWEEP = Path(__file__).parents[1] / "results" / "h100" / "sweep.json"
COMPILED = Path(__file__).parents[1] / "results" / "compile.json"
MULTIPROCESSORS = 132
RESIDENT = {(64, 64, 4, 3): 2, (128, 64, 8, 3): 1, (16, 64, 4, 3): 2}
"""Tiles that the law is fitted for, and how many programs of each a multiprocessor holds."""
LOOP = {
    ((64, 64, 4, 3), "bfloat16"): (529, "D=128 bfloat16 group=4 rows=16 page=64"),
    ((128, 64, 8, 3), "bfloat16"): (479, "D=128 bfloat16 group=4 rows=32 page=64"),
    ((64, 64, 4, 3), "float8_e4m3fn"): (
        546,
        "D=128 bfloat16 group=4 rows=16 page=64 float8_e4m3fn",
    ),
    ((16, 64, 4, 3), "float8_e4m3fn"): (606, "D=128 bfloat16 group=4 rows=4 page=64 float8_e4m3fn"),
}
"""Instructions of a block in the kernel that the sweep measured, and the case of today's."""
GROWS = 0.7
"""Share of a block's time that grows with its instructions. Blocks of 32 keys take 354 instructions
in 64 rows and 347 in 128, so 34 and 45% more a key than 64 do, and took 26 to 28% and 25 to 31%
longer in the cases that arithmetic binds: 0.56 to 0.82."""


class Split(NamedTuple):
    """What a way to cut a batch's keys costs by."""

    read: float
    longest: float
    megabytes: float
    parts: float


@dataclass(frozen=True)
class Law:
    """The constants, in microseconds."""

    block: float
    launch: float
    slope: float
    partial: float
    part: float

    def __call__(self, split: Split) -> float:
        bound = max(self.slope * split.read, self.block * split.longest)
        merging = self.partial * split.megabytes + self.part * split.parts
        return self.launch + bound + merging


@dataclass(frozen=True)
class Measured:
    """One alternative of the sweep."""

    case: cases.Case
    tile: tuple[int, ...]
    rounds: float
    us: float
    split: Split


def work_list(
    rows: Sequence[int],
    contexts: Sequence[int],
    group: int,
    tile: int,
    keys: int,
    programs: int,
    splits: int = 0,
    **options: int,
) -> list[list[list[int]]]:
    """Each program's work items as the library's kernel lists them."""
    device = "cpu" if tiles.interpreted() else "cuda"
    indptr = torch.tensor([0, *rows]).cumsum(0).int().to(device)
    items = tiles.max_row_tiles(sum(rows), len(rows), group, tile) * max(splits, 1)
    items += programs * (splits == 0)
    work = torch.full((items, schedule.FIELDS.value), 1 << 30, dtype=torch.int32, device=device)
    ranges = torch.full((programs, 2), 1 << 30, dtype=torch.int32, device=device)
    row_tiles = tiles.max_row_tiles(sum(rows), len(rows), group, tile)
    places = row_tiles if splits else min(row_tiles, programs)
    cuts = torch.full((places,), 1 << 30, dtype=torch.int32, device=device)
    schedule._plan[(len(rows) + 1,)](
        indptr, torch.tensor(contexts).int().to(device), work, ranges, cuts, len(rows), 1 << 30,
        items, programs, places, splits, GROUP=group, ROWS=tile, KEYS=keys, WINDOW=0,
        MIN=tiles.MIN_BLOCKS, **({"BLOCK": 256} | options),
    )  # fmt: skip
    listed = work.tolist()
    assert all(0 <= first <= end <= items for first, end in ranges.tolist())
    in_parts = [i for own in ranges.tolist() for i in range(*own) if listed[i][8] > 1]
    begun = [i for i in in_parts if listed[i][2] == 0]
    assert sorted(i for i in cuts.tolist() if i >= 0) == begun
    return [listed[first:end] for first, end in ranges.tolist()]


def even(case: cases.Case, tile: tuple[int, ...], read: float) -> tuple[Split, list[int]]:
    """The library's split of a case, and every program's key blocks."""
    rows, contexts = cases.sizes(case)
    heads, kv_heads, dim = cases.HEADS[case.model]
    group = heads // kv_heads
    programs = max(1, RESIDENT[tile] * MULTIPROCESSORS // kv_heads)
    lists = work_list(rows, contexts, group, tile[0], tile[1], programs)
    shares = [sum(item[3] - item[2] for item in own) for own in lists]
    cut = [item for own in lists for item in own if item[8] > 1]
    partial = sum(min(tile[0], item[6] * group - item[1] * tile[0]) for item in cut)
    most = max((item[8] for item in cut), default=0)
    return Split(read, max(shares), partial * kv_heads * (dim + 1) * 4 / 1e6, most), shares


def by_pieces(case: cases.Case, tile: tuple[int, ...], rounds: float, read: float) -> Split:
    """The split of the sweep: requests cut into equal pieces, which are begun as places free up."""
    rows, contexts = cases.sizes(case)
    heads, kv_heads, dim = cases.HEADS[case.model]
    group = heads // kv_heads
    height, keys = tile[:2]
    row_tiles = [-(-r * group // height) for r in rows]
    blocks = [-(-c // keys) - (-r // keys) for r, c in zip(rows, contexts, strict=True)]
    target = max(1, round(rounds * max(1, min(4, 128 // height)) * MULTIPROCESSORS / kv_heads))
    total = sum(t * b for t, b in zip(row_tiles, blocks, strict=True))
    chunk = max(-(-total // target), tiles.MIN_BLOCKS)
    busy = [0] * (RESIDENT[tile] * MULTIPROCESSORS)
    partial, most = 0, 0
    for r, t, b in zip(rows, row_tiles, blocks, strict=True):
        pieces = -(-b // chunk)
        for piece in range(pieces):
            for _ in range(t * kv_heads):
                heapq.heapreplace(busy, busy[0] + (piece + 1) * b // pieces - piece * b // pieces)
        if pieces > 1:
            partial, most = partial + r * group * pieces, max(most, pieces)
    return Split(read, max(busy), partial * kv_heads * (dim + 1) * 4 / 1e6, most)


def sweep() -> list[Measured]:
    """The alternatives of the fitted tiles that were measured."""
    found = []
    for entry in json.loads(SWEEP.read_text())["cases"]:
        case = cases.named(entry["case"])
        for name, us in entry["all"].items():
            known = re.match(r"\((\d+), (\d+), (\d+), (\d+)\) rounds ([\d.]+)", name)
            tile = tuple(int(known[i]) for i in range(1, 5)) if known else ()
            if known and tile in RESIDENT and us == us:  # noqa: PLR0124
                rounds = float(known[5])
                split = by_pieces(case, tile, rounds, entry["read_floor_us"])
                found.append(Measured(case, tile, rounds, us, split))
    return found


def fit(points: Sequence[Measured], like: Law | None = None) -> Law:
    """The least squared relative error; no constant is below 0. Few points take what is not of the
    keys from the law ``like``.
    """
    us = np.array([p.us for p in points])
    others = np.array([(1, p.split.megabytes, p.split.parts) for p in points]) / us[:, None]
    read, longest = (np.array([getattr(p.split, n) for p in points]) for n in ("read", "longest"))
    best: tuple[float, Law] | None = None
    for slope, block in itertools.product(np.arange(1.0, 1.2, 0.01), np.arange(0.6, 3.0, 0.02)):
        left = 1 - np.maximum(slope * read, block * longest) / us
        if like is None:
            rest, error = nnls(others, left)
        else:
            rest = np.array([like.launch, like.partial, like.part])
            error = float(np.linalg.norm(others @ rest - left))
        if best is None or error < best[0]:
            launch, partial, part = map(float, rest)
            best = error, Law(float(block), launch, float(slope), partial, part)
    assert best is not None, "expected points to fit"
    return best[1]


def laws(points: Sequence[Measured]) -> dict[tuple[tuple[int, ...], str], Law]:
    """A law for each tile and kind of cache; of 8-bit caches there are six points a tile."""
    found: dict[tuple[tuple[int, ...], str], Law] = {}
    for kind in sorted({(p.tile, p.case.cache) for p in points}):
        own = [p for p in points if (p.tile, p.case.cache) == kind]
        found[kind] = fit(own, found[kind[0], "bfloat16"] if len(own) < 10 else None)
    return found


def shorter(law: Law, tile: tuple[int, ...], cache: str) -> Law:
    """The law of today's kernel, whose loop has fewer instructions (``results/compile.json``)."""
    if (tile, cache) not in LOOP:
        return law
    before, case = LOOP[tile, cache]
    compiled = json.loads(COMPILED.read_text())["kernels"]["attend"][case]
    now = compiled["loop"][compiled["arch"].index("sm_90")]
    return replace(law, block=law.block * (1 - GROWS * (1 - now / before)))


def predict() -> dict[str, object]:
    """The laws, how far they are off, and every case of the sweep in its best tile: the best split
    by the clock, what the law gives it, and what it gives the even split and today's kernel, merged
    as it was or for nothing.
    """
    points = sweep()
    fitted = laws(points)
    errors = np.array([fitted[p.tile, p.case.cache](p.split) / p.us - 1 for p in points])
    found = []
    for case in dict.fromkeys(p.case for p in points):
        best = min((p for p in points if p.case == case), key=lambda p: p.us)
        law = fitted[best.tile, case.cache]
        split, shares = even(case, best.tile, best.split.read)
        now = shorter(law, best.tile, case.cache)
        times = best.us, law(best.split), now(split), now(split._replace(megabytes=0.0, parts=0.0))
        names = "measured_us", "law_us", "even_us", "even_merged_for_nothing_us"
        busy = [share for share in shares if share]
        found.append(
            {"case": repr(case), "tile": list(best.tile), "rounds": best.rounds}
            | {name: round(us, 1) for name, us in zip(names, times, strict=True)}
            | {"blocks": [min(busy), max(busy)], "megabytes": round(split.megabytes, 2)}
        )
    return {
        "error": {
            "rms": round(float((errors**2).mean() ** 0.5), 4),
            "worst": short(max(abs(errors))),
        },
        "laws": {f"{tile} {cache}": short(asdict(law)) for (tile, cache), law in fitted.items()},
        "cases": found,
    }
