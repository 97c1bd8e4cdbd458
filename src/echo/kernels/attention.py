"""Tree attention as Triton kernels. The contract is in :mod:`echo.kernels`, the reference in :mod:`echo.kernels.reference`.

``plan`` writes a work list, ``attend`` works it off, ``merge`` joins what was split: three launches with fixed grids, whatever the
batch is. A work item is one row tile of a request times one piece of its keys. A row tile is ``rows x group``: the query heads of one
KV head are folded into it, so that a tree of 4 rows with a group of 8 fills a tile of 32. The KV axis of a request is its context in
blocks of ``KEYS`` tokens, then its own tree in blocks of ``KEYS`` rows; a piece is a range of blocks.

Sizes that change from step to step are not specialised on: another batch neither compiles anew nor computes in another order.

Split and merge as in Flash-Decoding (Dao et al., 2023); softmax online, in base 2, as in FlashAttention-2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels import tiles
from echo.kernels.arguments import Attention, AttentionPlan, Planning, merge_shapes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(8)
"""Of a work item: request (-1: none), tile, first block, end block, where the piece's partial results begin (-1: none), and the request's
first row, rows and context length, so that a program needs one round of loads before it knows its keys.

A piece has a partial result for each of its request's rows times group, one KV head after another; ``where`` counts those of one head."""


@triton.jit
def _blocks(rows, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """First context block that a request's rows see, and how many blocks of context and of tree follow."""
    first = tl.maximum(length - WINDOW + 1, 0) // KEYS if WINDOW > 0 else length * 0
    prefix = (length + KEYS - 1) // KEYS - first
    return first, prefix, (rows + KEYS - 1) // KEYS


@triton.jit
def _sizes(
    indptr,
    context,
    b,
    batch,
    limit,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """First row, rows and context length of requests ``b``, their row tiles and KV blocks; no row, no tile."""
    there = b < batch
    begin = tl.load(indptr + b, mask=there, other=0)
    rows = tl.load(indptr + b + 1, mask=there, other=0) - begin
    length = tl.maximum(
        tl.minimum(tl.load(context + b, mask=there & (limit > 0), other=0), limit), 0
    )
    _, prefix, own = _blocks(rows, length, KEYS, WINDOW)
    return begin, rows, length, (rows * GROUP + ROWS - 1) // ROWS, prefix + own


@triton.jit
def _pieces(blocks, chunk, splits):
    """Pieces of a request's KV axis: as many as asked for, or as many as hold ``chunk`` blocks each."""
    return (
        tl.minimum(blocks, splits) if splits > 0 else ((blocks + chunk - 1) // chunk).to(tl.int32)
    )


@triton.jit(do_not_specialize=["batch", "limit", "items", "target", "splits"])
def plan(
    indptr, context, work, spans, batch, limit, items, target, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a request, and one for the unused end of the list. Each adds up what comes before it: no order, no wait."""
    me = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for at in range(0, batch, BLOCK):
        _, _, _, row_tiles, blocks = _sizes(
            indptr, context, at + lane, batch, limit, GROUP, ROWS, KEYS, WINDOW
        )
        total += row_tiles.to(tl.int64) * blocks
    # Pieces of at least `chunk` blocks: at most `target` more items than there are tiles.
    chunk = tl.maximum((tl.sum(total, 0) + target - 1) // target, MIN)
    before, split = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for at in range(0, me, BLOCK):
        _, rows, _, row_tiles, blocks = _sizes(
            indptr, context, at + lane, batch, limit, GROUP, ROWS, KEYS, WINDOW
        )
        pieces = _pieces(blocks, chunk, splits)
        before += tl.where(at + lane < me, row_tiles * pieces, 0)
        split += tl.where((at + lane < me) & (pieces > 1), rows * GROUP * pieces, 0)
    first, slot = tl.sum(before, 0), tl.sum(split, 0)
    begin, rows, length, row_tiles, blocks = _sizes(
        indptr, context, me, batch, limit, GROUP, ROWS, KEYS, WINDOW
    )
    pieces = _pieces(blocks, chunk, splits)
    mine = tl.where(me < batch, row_tiles * pieces, items - first)
    for at in range(0, mine, BLOCK):
        number = at + lane
        piece = (number // tl.maximum(row_tiles, 1)).to(
            tl.int64
        )  # row_tiles side by side: they read the same keys
        base = work + (first + number).to(tl.int64) * FIELDS
        fits = (number < mine) & (first + number < items)
        tl.store(base, tl.where(me < batch, me, -1) + 0 * number, mask=fits)
        tl.store(base + 1, number % tl.maximum(row_tiles, 1), mask=fits)
        tl.store(base + 2, (piece * blocks // tl.maximum(pieces, 1)).to(tl.int32), mask=fits)
        tl.store(base + 3, ((piece + 1) * blocks // tl.maximum(pieces, 1)).to(tl.int32), mask=fits)
        tl.store(
            base + 4,
            tl.where(pieces > 1, slot + piece.to(tl.int32) * (rows * GROUP), -1),
            mask=fits,
        )
        tl.store(base + 5, begin + 0 * number, mask=fits)
        tl.store(base + 6, rows + 0 * number, mask=fits)
        tl.store(base + 7, length + 0 * number, mask=fits)
    tl.store(spans + me * 2, slot, mask=me < batch)
    tl.store(spans + me * 2 + 1, pieces, mask=me < batch)


@triton.jit
def _capped(score, cap):
    """``cap * tanh(score / cap)``."""
    decay = tl.exp2(tl.abs(score) * (-2 * LOG2E / cap))
    return tl.where(score < 0, -cap, cap) * (1 - decay) / (1 + decay)


@triton.jit
def _scores(q, k, factor, cap, CAPPED: tl.constexpr):
    """Scores in base 2, float32; so are ``factor`` and ``cap``."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    return _capped(score, cap) if CAPPED else score


@triton.jit
def _broken(v):
    """Of each key 1 where its value is not finite, else 0."""
    return tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)


@triton.jit
def _online(score, v, acc, top, mass):
    """One step of the online softmax."""
    new = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(score - base[:, None])
    decay = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new, mass * decay + tl.sum(p, 1)


@triton.jit
def _narrow(q):
    """Queries as float16 of at most 1, and each row's factor as a column.

    An 8-bit key turns into float16 in half an instruction, exactly, and into bfloat16 in about four; bfloat16 alone might not fit.
    """
    wide = q.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)[:, None]
    unit = tl.where(largest > 0, largest, 1.0)
    return (wide / unit).to(tl.float16), unit


@triton.jit
def _page(pages, start, key, length, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Number of the page that a block of context lies in; one a key where blocks do not lie within pages. -1: none."""
    if PAGE % KEYS == 0:
        number = tl.load(pages + start // PAGE, mask=start < length, other=-1)
    else:
        number = tl.load(pages + (start + key) // PAGE, mask=start + key < length, other=-1)
    return number


@triton.jit
def _slots(cache, page, start, key, by_page, by_slot, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Where each key of a block of context begins, as a column."""
    if PAGE % KEYS == 0:  # offsets within the block never change
        at = (
            cache
            + (page.to(tl.int64) * by_page + (start % PAGE).to(tl.int64) * by_slot)
            + (key.to(tl.int64) * by_slot)[:, None]
        )
    else:
        at = (
            cache
            + (page.to(tl.int64) * by_page + ((start + key) % PAGE).to(tl.int64) * by_slot)[:, None]
        )
    return at


@triton.jit
def _context(
    q, acc, top, mass, key_cache, value_cache, pages, count, low, high, length, since, factor, cap, k_page, k_slot, v_page, v_slot,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of the context, one KV head. A key on a page that is none of the cache's ``count`` is not there.

    The page of the next block is loaded a turn ahead. With a page number and the keys behind it in one turn, the compiler spends its
    pipeline on the page number and has one buffer of keys, filled after the products of the turn before: nothing in flight meanwhile.
    """
    key, d = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inner = (d < DIM if DIM < WIDTH else d >= 0)[None, :]
    page = _page(pages, low * KEYS, key, length, KEYS, PAGE)
    for block in range(low, high):
        start = block * KEYS
        ahead = _page(pages, start + KEYS, key, length, KEYS, PAGE)
        position = start + key
        known = page.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)
        seen = position < tl.where(known, length, 0) if PAGE % KEYS == 0 else known
        if WINDOW > 0:  # what no row sees may hold anything
            seen = seen & (position > length - WINDOW)
        shown = seen[:, None] & inner if DIM < WIDTH else seen[:, None]
        k_at = _slots(key_cache, page, start, key, k_page, k_slot, KEYS, PAGE) + d[None, :]
        v_at = _slots(value_cache, page, start, key, v_page, v_slot, KEYS, PAGE) + d[None, :]
        k = tl.load(k_at, mask=shown, other=0.0).to(q.dtype)
        score = _scores(q, k, factor, cap, CAPPED)
        visible = seen[None, :]
        if WINDOW > 0:
            visible = visible & (position[None, :] > length + since[:, None])
        score = tl.where(visible, score, float("-inf"))
        v = tl.load(v_at, mask=shown, other=0.0).to(q.dtype)
        acc, top, mass = _online(score, v, acc, top, mass)
        page = ahead
    return acc, top, mass


@triton.jit
def _tree(
    q, acc, top, mass, tree_key, tree_value, bits_of, depth, low, high, rows, real, since, factor, cap, tk_row, tv_row, words,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of a request's own rows, one KV head; ``bits_of`` points to the mask words of each row of the tile.

    A value that is not finite makes those rows NaN that see it. It is not loaded for the product, where 0 times NaN would spoil all rows.
    """
    key, d = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inner = (d < DIM if DIM < WIDTH else d >= 0)[None, :]
    for block in tl.range(low, high, num_stages=STAGES):
        start = block * KEYS
        seen = start + key < rows
        shown = seen[:, None] & inner if DIM < WIDTH else seen[:, None]
        row = (start + key).to(tl.int64)
        k = tl.load(tree_key + (row * tk_row)[:, None] + d[None, :], mask=shown, other=0.0).to(
            q.dtype
        )
        v_at = tree_value + (row * tv_row)[:, None] + d[None, :]
        broken = _broken(tl.load(v_at, mask=shown, other=0.0).to(q.dtype))
        score = _scores(q, k, factor, cap, CAPPED)
        bits = tl.zeros([ROWS, KEYS], tl.int32)
        for part in tl.static_range((KEYS + 31) // 32):
            word = start // 32 + part
            own = tl.load(bits_of + word, mask=real & (word < words), other=0)
            bits = tl.where((key // 32 == part)[None, :], own[:, None], bits)
        visible = (((bits >> ((start + key) % 32)[None, :]) & 1) != 0) & seen[None, :]
        if WINDOW > 0:
            visible = visible & (
                tl.load(depth + start + key, mask=seen, other=0)[None, :] > since[:, None]
            )
        score = tl.where(visible, score, float("-inf"))
        v = tl.load(v_at, mask=shown & (broken == 0)[:, None], other=0.0).to(q.dtype)
        acc, top, mass = _online(score, v, acc, top, mass)
        mass = tl.where(tl.max(tl.where(visible, broken[None, :], 0), 1) > 0, float("nan"), mass)
    return acc, top, mass


@triton.jit(do_not_specialize=["pages", "table_row", "words"])
def attend(
    q, key_cache, value_cache, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
    work, out, lse, partial, partial_lse, scale, cap, pages,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row, tk_row, tk_head, tv_row, tv_head, words,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, KEY_SCALED: tl.constexpr,
    VALUE_SCALED: tl.constexpr, NARROW: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One work item for one KV head. Heads side by side: together they read whole cache slots, at about the same time."""
    head = tl.program_id(0) % HEADS
    far = head.to(tl.int64)  # for strides
    item = work + (tl.program_id(0) // HEADS) * FIELDS
    b, tile, low, high = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    slot, begin, rows, length = (
        tl.load(item + 4),
        tl.load(item + 5),
        tl.load(item + 6),
        tl.load(item + 7),
    )
    if b >= 0:
        first, prefix, _ = _blocks(rows, length, KEYS, WINDOW)
        fold = tile * ROWS + tl.arange(0, ROWS)
        local, member = fold // GROUP, fold % GROUP
        real = local < rows
        row = (begin + local).to(tl.int64)
        d = tl.arange(0, WIDTH)
        inner = d < DIM if DIM < WIDTH else d >= 0
        queries = tl.load(
            q + row[:, None] * q_row + (far * GROUP + member)[:, None] * q_head + d[None, :],
            mask=real[:, None] & inner[None, :], other=0.0,
        ).to(DOT)  # fmt: skip
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        since = tl.load(depth + row, mask=real, other=0) - WINDOW if WINDOW > 0 else local
        factor, cap = scale * LOG2E, cap * LOG2E
        if PREFIX:
            narrowed, unit = _narrow(queries) if NARROW else (queries, 1.0)
            acc, top, mass = _context(
                narrowed, acc, top, mass, key_cache + far * k_head, value_cache + far * v_head,
                table + b.to(tl.int64) * table_row, pages, first + low, first + tl.minimum(high, prefix), length, since,
                factor * unit * tl.load(key_scale + head) if KEY_SCALED else factor * unit, cap, k_page, k_slot, v_page, v_slot,
                DIM, WIDTH, KEYS, PAGE, WINDOW, CAPPED,
            )  # fmt: skip
            if VALUE_SCALED:
                acc = acc * tl.load(value_scale + head)
        acc, top, mass = _tree(
            queries, acc, top, mass, tree_key + begin.to(tl.int64) * tk_row + far * tk_head,
            tree_value + begin.to(tl.int64) * tv_row + far * tv_head, mask + row * words, depth + begin,
            tl.maximum(low - prefix, 0), high - prefix, rows, real, since, factor, cap, tk_row, tv_row, words,
            DIM, WIDTH, ROWS, KEYS, WINDOW, CAPPED, STAGES,
        )  # fmt: skip
        acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
        total = (top + tl.log2(tl.where(mass == 0, 1.0, mass))) * LN2
        if slot < 0:
            to = row * (HEADS * GROUP) + head * GROUP + member
            tl.store(
                out + to[:, None] * DIM + d[None, :],
                acc.to(out.dtype.element_ty),
                mask=real[:, None] & inner[None, :],
            )
            tl.store(lse + to, total, mask=real)
        else:
            to = slot.to(tl.int64) * HEADS + head * (rows * GROUP) + fold
            tl.store(
                partial + to[:, None] * DIM + d[None, :], acc, mask=real[:, None] & inner[None, :]
            )
            tl.store(partial_lse + to, total, mask=real)


@triton.jit(do_not_specialize=["batch"])
def merge(
    q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse, scale, cap, batch,
    q_row, q_head, tk_row, tk_head, tv_row, tv_head,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One row and one KV head: joins the pieces in their order, and answers pad rows, which see themselves only."""
    n, head, heads = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
        tl.num_programs(1),
    )
    member = tl.arange(0, MEMBERS)
    d = tl.arange(0, WIDTH)
    inner = (member < GROUP)[:, None] & (d < DIM)[None, :]
    to = (n * heads + head) * GROUP + member
    b = tl.load(request + n)
    if b >= batch:
        queries = tl.load(
            q + n * q_row + (head * GROUP + member)[:, None] * q_head + d[None, :],
            mask=inner,
            other=0.0,
        )
        k = tl.load(tree_key + n * tk_row + head * tk_head + d, mask=d < DIM, other=0.0).to(
            tl.float32
        )
        v = tl.load(tree_value + n * tv_row + head * tv_head + d, mask=d < DIM, other=0.0).to(
            tl.float32
        )
        score = tl.sum(queries.to(tl.float32) * k[None, :], 1) * scale
        if CAPPED:
            score = _capped(score, cap)
        own = (v[None, :] + tl.zeros([MEMBERS, WIDTH], tl.float32)).to(out.dtype.element_ty)
        tl.store(out + to[:, None] * DIM + d[None, :], own, mask=inner)
        tl.store(lse + to, score, mask=member < GROUP)
    else:
        pieces = tl.load(spans + b * 2 + 1)
        if pieces > 1:
            begin = tl.load(indptr + b)
            piece = (tl.load(indptr + b + 1) - begin).to(tl.int64) * GROUP
            own = (
                tl.load(spans + b * 2).to(tl.int64) * heads
                + head * piece
                + (n - begin) * GROUP
                + member
            )
            acc = tl.zeros([MEMBERS, WIDTH], tl.float32)
            top = tl.full([MEMBERS], float("-inf"), tl.float32)
            mass = tl.zeros([MEMBERS], tl.float32)
            for first in range(0, pieces, PARTS):  # so many at once: a round is one trip to memory
                part = first + tl.arange(0, PARTS)
                there = (part < pieces)[:, None] & (member < GROUP)[None, :]
                at = own[None, :] + (part * (piece * heads))[:, None]
                lses = tl.load(partial_lse + at, mask=there, other=float("-inf"))
                values = tl.load(
                    partial + at[:, :, None] * DIM + d[None, None, :],
                    mask=there[:, :, None] & inner[None, :, :],
                    other=0.0,
                )
                new = tl.maximum(top, tl.max(lses, 0))
                base = tl.where(new == float("-inf"), 0.0, new)
                weight, decay = (
                    tl.exp2((lses - base[None, :]) * LOG2E),
                    tl.exp2((top - base) * LOG2E),
                )
                acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
                mass = mass * decay + tl.sum(weight, 0)
                top = new
            acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
            tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=inner)
            tl.store(
                lse + to, top + tl.log2(tl.where(mass == 0, 1.0, mass)) * LN2, mask=member < GROUP
            )


@triton.jit(do_not_specialize=["count"])
def join(
    o1, lse1, o2, lse2, out, lse, count, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Rows of two parts of one softmax; a part without keys may hold anything."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inner = (row < count)[:, None] & (d < DIM)[None, :]
    one = tl.load(lse1 + row, mask=row < count, other=0.0)
    two = tl.load(lse2 + row, mask=row < count, other=0.0)
    top = tl.maximum(one, two)
    base = tl.where(top == float("-inf"), 0.0, top)
    first, second = tl.exp2((one - base) * LOG2E), tl.exp2((two - base) * LOG2E)
    mass = first + second
    at = row[:, None] * DIM + d[None, :]
    value = (
        tl.load(o1 + at, mask=inner & (one != float("-inf"))[:, None], other=0.0).to(tl.float32)
        * first[:, None]
    )
    value += (
        tl.load(o2 + at, mask=inner & (two != float("-inf"))[:, None], other=0.0).to(tl.float32)
        * second[:, None]
    )
    value = value / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inner)
    tl.store(lse + row, top + tl.log2(tl.where(mass == 0, 1.0, mass)) * LN2, mask=row < count)


class Sizes(NamedTuple):
    """What a work list is cut to: the tile, the items of a balanced split, and room for all items and, in tiles, for partial results."""

    tile: tiles.Tile
    target: int
    items: int
    slots: int


def _cut(call: Planning) -> Sizes:
    s = call.shapes
    mean = s.rows / max(s.batch, 1) if s.splits is None else tiles.FIXED_ROWS
    tile = tiles.tile(
        s.group, s.dim, s.itemsize, s.cached, s.page, mean, tiles.generation(s.device)
    )
    most = tiles.most_tiles(s.rows, s.batch, s.group, tile.rows)
    target = tiles.target_items(s.device, s.kv_heads, tile)
    if s.splits is None:
        return Sizes(tile, target, most + target, 2 * target)
    pieces = min(s.splits, -(-s.longest // tile.keys) - (-s.rows // tile.keys))
    return Sizes(
        tile,
        target,
        most * pieces,
        -(-s.rows * s.group * pieces // tile.rows) if pieces > 1 else 0,
    )


def _plan(call: Planning) -> AttentionPlan:
    s, indptr = call.shapes, call.indptr
    sizes = _cut(call)
    lengths = indptr if call.mode == "tree" or call.prefix_lens is None else call.prefix_lens
    work, spans = indptr.new_empty(sizes.items, FIELDS.value), indptr.new_empty(s.batch + 1, 2)
    plan[(s.batch + 1,)](
        indptr.contiguous(), lengths.contiguous(), work, spans, s.batch, s.longest, sizes.items, sizes.target, call.splits or 0,
        GROUP=s.group, ROWS=sizes.tile.rows, KEYS=sizes.tile.keys, WINDOW=call.window or 0, MIN=tiles.MIN_BLOCKS, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return AttentionPlan(s, sizes.tile, work, spans)


@tiles.on_its_device
def plan_attention(call: Planning) -> AttentionPlan:
    """As :func:`echo.kernels.plan_attention`."""
    return _plan(call)


@tiles.on_its_device
def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention`; tensors on a CUDA device, or anywhere under the interpreter.

    Raises:
        EchoError: as there; also a last dimension that is not contiguous, or head dimensions beyond 16 to 256.
    """
    s, q, tree_key, tree_value, indptr = (
        call.planning.shapes,
        call.q,
        call.tree_key,
        call.tree_value,
        call.indptr,
    )
    if not 16 <= s.dim <= 256:
        raise EchoError(
            f"q: expected head dimensions from 16 to 256 for the Triton kernel, got {s.dim}"
        )
    # Without a context nothing of these is read; they stand for pointers.
    keys, values, table, _ = call.cache or (tree_key[None], tree_value[None], indptr[None], indptr)
    named = {
        "q": q,
        "tree_key": tree_key,
        "tree_value": tree_value,
        "key_cache": keys,
        "value_cache": values,
        "page_table": table,
    }
    for name, value in named.items():
        if value.stride(-1) != 1 and value.numel():
            raise EchoError(
                f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}"
            )
    if q.is_cuda and torch.float8_e4m3fn in (keys.dtype, values.dtype):
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise EchoError(
                f"key_cache: expected float8_e5m2 on compute capability {capability}, got float8_e4m3fn"
            )

    sizes = _cut(call.planning)
    tile = sizes.tile
    out, lse = (
        q.new_empty(s.rows, s.heads, s.dim),
        q.new_empty(s.rows, s.heads, dtype=torch.float32),
    )
    if s.rows == 0:
        return out, lse
    plan = _plan(call.planning) if call.plan is None else call.plan
    if plan.tile != tile:
        raise EchoError(
            f"plan: expected one made by the Triton kernel for {tile}, got one for {plan.tile}"
        )
    work = checks.tensor("plan.work", plan.work, [sizes.items, FIELDS.value], torch.int32, q.device)
    spans = checks.tensor("plan.spans", plan.spans, [s.batch + 1, 2], torch.int32, q.device)
    partial, partial_lse = (
        lse.new_empty(sizes.slots * tile.rows, s.kv_heads, s.dim),
        lse.new_empty(sizes.slots * tile.rows, s.kv_heads),
    )
    indptr, mask, request = indptr.contiguous(), call.mask.contiguous(), call.request.contiguous()
    depth = indptr if call.depth is None else call.depth.contiguous()
    key_scale, value_scale = (
        lse if scales is None else scales.contiguous()
        for scales in (call.key_scale, call.value_scale)
    )
    cap = 1.0 if call.softcap is None else float(call.softcap)
    narrow = q.dtype == torch.bfloat16 and keys.element_size() == 1 and values.element_size() == 1
    shape = {
        "GROUP": s.group, "DIM": s.dim, "WIDTH": tiles.power_of_two(s.dim), "CAPPED": call.softcap is not None,
    }  # fmt: skip
    attend[(sizes.items * s.kv_heads,)](
        q, keys, values, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
        work, out, lse, partial, partial_lse, call.factor, cap, keys.shape[0],
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], table.stride(0),
        tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1), mask.shape[1],
        **shape, HEADS=s.kv_heads, ROWS=tile.rows, KEYS=tile.keys, PAGE=s.page or 1, PREFIX=call.cache is not None, WINDOW=call.window or 0,
        KEY_SCALED=call.key_scale is not None, VALUE_SCALED=call.value_scale is not None, NARROW=narrow, DOT=_dot_type(q.dtype),
        STAGES=tile.own_stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    members = tiles.power_of_two(s.group)
    merge[(s.rows, s.kv_heads)](
        q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse, call.factor, cap, s.batch,
        q.stride(0), q.stride(1), tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1),
        **shape, MEMBERS=members, PARTS=max(1, tiles.MERGED // (members * tiles.power_of_two(s.dim))), num_warps=4,
    )  # fmt: skip
    return out, lse


def _dot_type(dtype: torch.dtype) -> Any:
    """Triton's type of the matrix products. The interpreter computes bfloat16 wrongly, so there it is float32."""
    if tiles.interpreted() and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[
        dtype
    ]


@tiles.on_its_device
def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`."""
    n, heads, dim = merge_shapes(o1, lse1, o2, lse2)
    out, lse, rows = o1.new_empty(n, heads, dim), lse1.new_empty(n, heads), 16
    if n * heads:
        join[(-(-n * heads // rows),)](
            o1.contiguous(), lse1.contiguous(), o2.contiguous(), lse2.contiguous(), out, lse, n * heads,
            DIM=dim, WIDTH=tiles.power_of_two(dim), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out, lse
