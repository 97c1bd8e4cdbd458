"""Who works on what in tree attention: the tile, the programs, and the work list they share.

A *row tile* is ``rows`` of query rows times heads of a group; a KV head's keys of a request are
its prefix in blocks of ``keys`` tokens, then its tree in blocks of ``keys`` rows. One row tile by
one block is the unit of work. ``_plan`` lays all units of a batch in one line, the first row tiles
of all requests, then all second ones, and cuts the line into as many equal ranges as programs are
resident at once: each works off the end of one row tile, whole ones, and the beginning of
another. Only a row tile that a cut goes through has partial results, two a program at most.

With ``splits`` every request is cut alike in any batch, and the programs share the pieces.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from echo import _checks as checks
from echo.kernels import tiles
from echo.kernels.arguments import AttentionPlan, Shapes
from echo.kernels.tiles import Tile

MERGE_PARTS = 4
"""Parts of a row tile that a program of the merge loads at once: two are the rule."""
FIELDS = tl.constexpr(9)
"""Of a work item: request, row tile, first and end block, first row of its partial results (-1: it
is whole), the request's first row, rows and prefix length, and the parts of its row tile, which
are neighbours in the list."""


@triton.jit
def _blocks(rows, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """First prefix block that a request's rows see, and how many of prefix and of tree follow."""
    first = tl.maximum(length - WINDOW + 1, 0) // KEYS if WINDOW > 0 else length * 0
    prefix = (length + KEYS - 1) // KEYS - first
    return first, prefix, (rows + KEYS - 1) // KEYS


@triton.jit
def _request(
    indptr, prefix_lens, b, batch, limit, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """First row, rows, prefix length, row tiles, blocks and fixed pieces of requests ``b``."""
    there = b < batch
    begin = tl.load(indptr + b, mask=there, other=0)
    rows = tl.load(indptr + b + 1, mask=there, other=0) - begin
    length = tl.load(prefix_lens + b, mask=there & (limit > 0), other=0)
    length = tl.maximum(tl.minimum(length, limit), 0)
    _, prefix, own = _blocks(rows, length, KEYS, WINDOW)
    pieces = tl.where(splits > 0, tl.minimum(prefix + own, splits), 1)
    return begin, rows, length, (rows * GROUP + ROWS - 1) // ROWS, prefix + own, pieces


@triton.jit(do_not_specialize=["batch", "limit", "items", "count", "places", "splits"])
def _plan(
    indptr, prefix_lens, work, programs, cuts, batch, limit, items, count, places, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per request, and one for the end of the line.

    Each adds up what comes before it: no program waits for another. In a balanced split the item of
    row tile ``g`` and program ``p`` is the ``g + p``-th: a step along the line raises one of them.
    A row tile that is cut has its place in ``cuts`` by its number if there is one for every row
    tile, else by the program that begins it.
    """
    me = tl.program_id(0)
    by_program = (splits == 0) & (places == count)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int64)
    before = tl.zeros([BLOCK], tl.int32)
    slots = tl.zeros([BLOCK], tl.int32)
    tall = tl.zeros([BLOCK], tl.int32)
    for at in range(0, batch, BLOCK):
        _, rows, _, row_tiles, blocks, pieces = _request(
            indptr, prefix_lens, at + lane, batch, limit, splits, GROUP, ROWS, KEYS, WINDOW
        )
        sums += row_tiles.to(tl.int64) * blocks
        before += row_tiles * pieces
        tall += row_tiles
        slots += tl.where((at + lane < me) & (pieces > 1), rows * GROUP * pieces, 0)
    total = tl.sum(sums, 0)
    listed = tl.sum(before, 0)
    slot = tl.sum(slots, 0)
    busy = tl.maximum(tl.minimum(total // MIN, count), 1)
    begin, rows, length, row_tiles, blocks, pieces = _request(
        indptr, prefix_lens, me, batch, limit, splits, GROUP, ROWS, KEYS, WINDOW
    )
    for tile in tl.range(0, row_tiles, disable_licm=True):
        sums = tl.zeros([BLOCK], tl.int64)
        before = tl.zeros([BLOCK], tl.int32)
        numbers = tl.zeros([BLOCK], tl.int32)
        for at in range(0, batch, BLOCK):
            _, _, _, others, their_blocks, their_pieces = _request(
                indptr, prefix_lens, at + lane, batch, limit, splits, GROUP, ROWS, KEYS, WINDOW
            )
            earlier = tl.minimum(others, tile + (at + lane < me).to(tl.int32))
            sums += earlier.to(tl.int64) * their_blocks
            before += earlier * their_pieces
            numbers += earlier
        start = tl.sum(sums, 0)
        first = tl.sum(before, 0)
        number = tl.sum(numbers, 0)
        lowest = ((start + 1) * busy - 1) // total  # the programs of its first and last unit
        highest = ((start + blocks) * busy - 1) // total
        crossed = (highest - lowest + 1).to(tl.int32)
        parts = tl.where(splits > 0, pieces, crossed)
        for at in range(0, parts, BLOCK):
            part = (at + lane).to(tl.int64)
            program = lowest + part
            low = tl.maximum(program * total // busy - start, 0)
            high = tl.minimum((program + 1) * total // busy - start, blocks)
            to = (2 * program + (part == 0)) * ROWS
            low = tl.where(splits > 0, part * blocks // pieces, low)
            high = tl.where(splits > 0, (part + 1) * blocks // pieces, high)
            to = tl.where(splits > 0, slot + part * (rows * GROUP) + tile * ROWS, to)
            index = first + tl.where(splits > 0, part, program)
            base = work + index * FIELDS
            fits = (part < parts) & (index < items)
            tl.store(base, me + 0 * lane, mask=fits)
            tl.store(base + 1, tile + 0 * lane, mask=fits)
            tl.store(base + 2, low.to(tl.int32), mask=fits)
            tl.store(base + 3, high.to(tl.int32), mask=fits)
            tl.store(base + 4, tl.where(parts > 1, to, -1).to(tl.int32), mask=fits)
            tl.store(base + 5, begin + 0 * lane, mask=fits)
            tl.store(base + 6, rows + 0 * lane, mask=fits)
            tl.store(base + 7, length + 0 * lane, mask=fits)
            tl.store(base + 8, parts + 0 * lane, mask=fits)
        for at in range(0, crossed, BLOCK):  # programs whose range begins here
            program = lowest + at + lane
            cut = program * total // busy - start
            mine = (program <= highest) & (cut >= 0)
            fixed = first + (cut * pieces + blocks - 1) // blocks
            own = tl.where(splits > 0, fixed, first + program)
            end = tl.where(splits > 0, fixed, own - (cut == 0).to(tl.int32))
            tl.store(programs + program * 2, own.to(tl.int32), mask=mine)
            mine = mine & (program > 0)
            tl.store(programs + program * 2 - 1, end.to(tl.int32), mask=mine)
            begun = (cut > 0) & (program - 1 == lowest)
            cutting = tl.where(begun, first + lowest, -1).to(tl.int32)
            tl.store(cuts + program - 1, cutting, mask=mine & by_program)
        cutting = tl.where(parts > 1, first + tl.where(splits > 0, 0, lowest), -1).to(tl.int32)
        tl.store(cuts + number, cutting, mask=(number < places) & (by_program == 0))
    if me == batch:
        end = (listed + tl.where(splits > 0, 0, busy - 1)).to(tl.int32)
        for at in range(0, count, BLOCK):
            program = at + lane
            idle = (program < count) & ((program >= busy) | (total == 0))
            last = (program == busy - 1) & (total > 0)
            tl.store(programs + program * 2, 0 * lane, mask=idle)
            tl.store(programs + program * 2 + 1, tl.where(last, end, 0), mask=idle | last)
        known = tl.where(by_program, tl.where(total > 0, busy - 1, 0), tl.sum(tall, 0))
        for at in range(0, places, BLOCK):
            place = at + lane
            tl.store(cuts + place, -1 + 0 * lane, mask=(place >= known) & (place < places))


class Entry(NamedTuple):
    """A tile that the clock chose, for pages that hold whole blocks."""

    generation: int
    """Major compute capability."""
    dim: int
    itemsize: int
    cache_itemsize: int
    folded: int
    """Most rows of a request times heads of a group that it is for."""
    tile: Tile


H100 = (
    Entry(9, 128, 2, 2, 64, Tile(64, 64, 4, 3, 1)),
    Entry(9, 128, 2, 2, 256, Tile(128, 64, 8, 3, 1)),
    Entry(9, 128, 2, 1, 16, Tile(16, 64, 4, 3, 1)),
    Entry(9, 128, 2, 1, 64, Tile(64, 64, 4, 3, 1)),
)
"""Of ``benchmarks/results/h100/sweep.json``. At 128 rows and more both heights were within 5%: the
taller reads the keys half as often."""


@functools.lru_cache
def table() -> tuple[Entry, ...]:
    """Measured tiles: of the file that ``ECHO_TILES`` names, by ``gpu.py --tune``, then ours.

    Raises:
        EchoError: the file is not such a table.
    """
    path = os.environ.get("ECHO_TILES")
    if not path:
        return H100
    with checks.reading(f"a table of tiles in {path}"):
        rows = json.loads(Path(path).read_text())["tiles"]
        return (*(Entry._make([*row[:-1], Tile(*row[-1])]) for row in rows), *H100)


def measured(
    group: int,
    dim: int,
    itemsize: int,
    cache_itemsize: int,
    page_size: int,
    rows: float,
    generation: int,
) -> Tile | None:
    """The tile that the clock chose for these; None where nothing was measured.

    Arguments are those of :func:`echo.kernels.tiles.tile`.
    """
    kind = (generation, dim, itemsize, cache_itemsize)
    folded = group * rows
    fitting = [e for e in table() if e[:4] == kind and folded <= e.folded]
    whole = [e for e in fitting if page_size and page_size % e.tile.keys == 0]
    return min(whole, key=lambda e: e.folded).tile if whole else None


def tile(*kind: Any) -> Tile:
    """The measured tile, else what compiled code suggests; arguments as of :func:`measured`."""
    return measured(*kind) or tiles.tile(*kind)


def resident(tile: Tile, dim: int, itemsize: int, cache_itemsize: int, hopper: bool) -> int:
    """Programs that a multiprocessor holds: by registers, and by the shared memory of Hopper or
    of Ampere. ``benchmarks/compile_kernels.py`` holds it against the compiled code.
    """
    small = itemsize == cache_itemsize == 2 and tile.rows == 16 and tile.keys * dim <= 4096
    by_registers = 4 if small else 8 // tile.warps
    buffers = tile.stages - (not hopper or tile.rows < 64)
    width = tiles.power_of_two(dim)
    shared = 2 * buffers * tile.keys * width * cache_itemsize + tile.rows * width * itemsize
    return max(1, min(by_registers, ((228 if hopper else 164) << 10) // (shared + 2048)))


class Sizes(NamedTuple):
    """Sizes of a call: its tile, and of a KV head the programs, most work items, places of row
    tiles that are cut, and rows of partial results.
    """

    tile: Tile
    programs: int
    items: int
    cuts: int
    partials: int


def sizes(s: Shapes) -> Sizes:
    """Sizes of a call's work: of its shapes only."""
    mean = s.num_rows / max(s.batch, 1) if s.splits is None else tiles.FIXED_ROWS
    generation = tiles.generation(s.device)
    chosen = tile(s.group, s.dim, s.itemsize, s.cache_itemsize, s.page_size, mean, generation)
    places = tiles.multiprocessors(s.device) * resident(
        chosen, s.dim, s.itemsize, s.cache_itemsize, generation != 8
    )
    programs = max(1, places // s.num_kv_heads)
    row_tiles = tiles.max_row_tiles(s.num_rows, s.batch, s.group, chosen.rows)
    if s.splits is None:
        partials = 2 * programs * chosen.rows if programs > 1 else 0
        cuts = min(row_tiles, programs) if programs > 1 else 0
        return Sizes(chosen, programs, row_tiles + programs, cuts, partials)
    pieces = min(s.splits, -(-s.max_prefix // chosen.keys) - (-s.num_rows // chosen.keys))
    partials = s.num_rows * s.group * pieces if pieces > 1 else 0
    cuts = row_tiles if pieces > 1 else 0
    return Sizes(chosen, programs, row_tiles * max(pieces, 1), cuts, partials)


def plan_attention(s: Shapes, indptr: Tensor, prefix_lens: Tensor) -> AttentionPlan:
    """As :func:`echo.kernels.plan_attention` in mode "whole"."""
    size = sizes(s)
    work = indptr.new_empty(size.items, FIELDS.value)
    programs = indptr.new_empty(size.programs, 2)
    cuts = indptr.new_empty(size.cuts)
    tiles.launch(
        _plan, (s.batch + 1,),
        indptr.contiguous(), prefix_lens.contiguous(), work, programs, cuts, s.batch,
        s.max_prefix, size.items, size.programs, size.cuts, s.splits or 0, GROUP=s.group,
        ROWS=size.tile.rows, KEYS=size.tile.keys, WINDOW=s.window or 0, MIN=tiles.MIN_BLOCKS,
        BLOCK=256, num_warps=8,
    )  # fmt: skip
    return AttentionPlan(s, size.tile, work, programs, cuts)
