"""Tree attention as Triton kernels: the contract is in :mod:`echo.kernels`.

``_plan`` writes a work list, ``_attend`` works it off, ``_merge`` merges what was split: three
launches whose grids depend on shapes only. A work item is one row tile of a request times one
piece of its keys. A row tile is ``rows x group``: the query heads of one KV head are folded into
it, so that a tree of 4 rows with a group of 8 fills a tile of 32. The KV axis of a request is its
prefix in blocks of ``KEYS`` tokens, then its tree in blocks of ``KEYS`` rows; a piece is a range
of blocks.

Sizes that change from step to step are not specialised on: another batch neither compiles anew nor
computes in another order. Softmax is online, in base 2.
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
from echo.kernels.arguments import Attention, AttentionPlan, Shapes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(8)
"""Of a work item: request (-1: none), row tile, first and end block, begin of the piece's partial
results (-1: none), and the request's first row, rows and prefix length: one round of loads before
its keys are known. A piece has a partial result for each row of its request times group, one KV
head after another; the begin counts those of one head."""


@triton.jit
def _blocks(rows, length, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """First prefix block that a request's rows see, and how many of prefix and of tree follow."""
    first = tl.maximum(length - WINDOW + 1, 0) // KEYS if WINDOW > 0 else length * 0
    prefix = (length + KEYS - 1) // KEYS - first
    return first, prefix, (rows + KEYS - 1) // KEYS


@triton.jit
def _request(
    indptr, prefix_lens, b, batch, limit,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """First row, rows, prefix length, row tiles and KV blocks of requests ``b``."""
    there = b < batch
    begin = tl.load(indptr + b, mask=there, other=0)
    rows = tl.load(indptr + b + 1, mask=there, other=0) - begin
    length = tl.load(prefix_lens + b, mask=there & (limit > 0), other=0)
    length = tl.maximum(tl.minimum(length, limit), 0)
    _, prefix, own = _blocks(rows, length, KEYS, WINDOW)
    return begin, rows, length, (rows * GROUP + ROWS - 1) // ROWS, prefix + own


@triton.jit
def _pieces(blocks, chunk, splits):
    """Pieces of a request's KV axis: as many as asked for, or as hold ``chunk`` blocks each."""
    return (
        tl.minimum(blocks, splits) if splits > 0 else ((blocks + chunk - 1) // chunk).to(tl.int32)
    )


@triton.jit(do_not_specialize=["batch", "limit", "items", "target", "splits"])
def _plan(
    indptr, prefix_lens, work, spans, batch, limit, items, target, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per request, and one for the unused end of the list.

    Each adds up what comes before it: no program waits for another.
    """
    me = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for at in range(0, batch, BLOCK):
        _, _, _, row_tiles, blocks = _request(
            indptr, prefix_lens, at + lane, batch, limit, GROUP, ROWS, KEYS, WINDOW
        )
        total += row_tiles.to(tl.int64) * blocks
    # Pieces of at least `chunk` blocks: at most `target` more items than there are row tiles.
    chunk = tl.maximum((tl.sum(total, 0) + target - 1) // target, MIN)
    before, split = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for at in range(0, me, BLOCK):
        _, rows, _, row_tiles, blocks = _request(
            indptr, prefix_lens, at + lane, batch, limit, GROUP, ROWS, KEYS, WINDOW
        )
        pieces = _pieces(blocks, chunk, splits)
        before += tl.where(at + lane < me, row_tiles * pieces, 0)
        split += tl.where((at + lane < me) & (pieces > 1), rows * GROUP * pieces, 0)
    first, slot = tl.sum(before, 0), tl.sum(split, 0)
    begin, rows, length, row_tiles, blocks = _request(
        indptr, prefix_lens, me, batch, limit, GROUP, ROWS, KEYS, WINDOW
    )
    pieces = _pieces(blocks, chunk, splits)
    mine = tl.where(me < batch, row_tiles * pieces, items - first)
    for at in range(0, mine, BLOCK):
        number = at + lane
        some, parts = tl.maximum(row_tiles, 1), tl.maximum(pieces, 1)
        piece = (number // some).to(tl.int64)  # row tiles side by side: they read the same keys
        partial = slot + piece.to(tl.int32) * (rows * GROUP)
        base = work + (first + number).to(tl.int64) * FIELDS
        fits = (number < mine) & (first + number < items)
        tl.store(base, tl.where(me < batch, me, -1) + 0 * number, mask=fits)
        tl.store(base + 1, number % some, mask=fits)
        tl.store(base + 2, (piece * blocks // parts).to(tl.int32), mask=fits)
        tl.store(base + 3, ((piece + 1) * blocks // parts).to(tl.int32), mask=fits)
        tl.store(base + 4, tl.where(pieces > 1, partial, -1), mask=fits)
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
    """1 of each key whose value is not finite, else 0."""
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

    An 8-bit key becomes float16 in half an instruction, exactly, and bfloat16 in about four.
    """
    wide = q.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)[:, None]
    unit = tl.where(largest > 0, largest, 1.0)
    return (wide / unit).to(tl.float16), unit


@triton.jit
def _page(pages, start, key, length, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Page of a block of the prefix, or of each key where blocks cross pages; -1 for none."""
    if PAGE % KEYS == 0:
        number = tl.load(pages + start // PAGE, mask=start < length, other=-1)
    else:
        number = tl.load(pages + (start + key) // PAGE, mask=start + key < length, other=-1)
    return number


@triton.jit
def _slots(cache, page, start, key, by_page, by_slot, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Where each key of a block of the prefix begins, as a column."""
    if PAGE % KEYS == 0:  # offsets within the block never change
        block = page.to(tl.int64) * by_page + (start % PAGE).to(tl.int64) * by_slot
        at = cache + block + (key.to(tl.int64) * by_slot)[:, None]
    else:
        slot = ((start + key) % PAGE).to(tl.int64)
        at = cache + (page.to(tl.int64) * by_page + slot * by_slot)[:, None]
    return at


@triton.jit
def _prefix(
    q, acc, top, mass, key_cache, value_cache, pages, count, low, high, length, since, factor, cap,
    k_page, k_slot, v_page, v_slot, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of the prefix, one KV head; ``count`` pages exist.

    The page of the next block is loaded an iteration ahead. With a page number and its keys in one
    iteration, the compiler pipelines the page number and leaves one buffer of keys, which is filled
    after the products of the iteration before: nothing is in flight meanwhile.
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
    q, acc, top, mass, tree_key, tree_value, bits_of, depth, low, high, rows, real, since, factor,
    cap, tk_row, tv_row, words, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of a request's rows; ``bits_of`` are the tile's masks.

    A value that is not finite makes the rows that see it NaN. It is not loaded for the product,
    where 0 times NaN would spoil all rows.
    """
    key, d = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inner = (d < DIM if DIM < WIDTH else d >= 0)[None, :]
    for block in tl.range(low, high, num_stages=STAGES):
        start = block * KEYS
        seen = start + key < rows
        shown = seen[:, None] & inner if DIM < WIDTH else seen[:, None]
        row = (start + key).to(tl.int64)
        k_at = tree_key + (row * tk_row)[:, None] + d[None, :]
        k = tl.load(k_at, mask=shown, other=0.0).to(q.dtype)
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
            layer = tl.load(depth + start + key, mask=seen, other=0)
            visible = visible & (layer[None, :] > since[:, None])
        score = tl.where(visible, score, float("-inf"))
        v = tl.load(v_at, mask=shown & (broken == 0)[:, None], other=0.0).to(q.dtype)
        acc, top, mass = _online(score, v, acc, top, mass)
        mass = tl.where(tl.max(tl.where(visible, broken[None, :], 0), 1) > 0, float("nan"), mass)
    return acc, top, mass


@triton.jit(do_not_specialize=["pages", "table_row", "words"])
def _attend(
    q, key_cache, value_cache, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
    work, out, lse, partial, partial_lse, scale, cap, pages, q_row, q_head, k_page, k_slot, k_head,
    v_page, v_slot, v_head, table_row, tk_row, tk_head, tv_row, tv_head, words,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, PREFIX: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, KEY_SCALED: tl.constexpr,
    VALUE_SCALED: tl.constexpr, NARROW: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One work item and KV head. Heads side by side read whole cache slots at about one time."""
    head = tl.program_id(0) % HEADS
    far = head.to(tl.int64)  # for strides
    item = work + (tl.program_id(0) // HEADS) * FIELDS
    b, tile, low, high = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    slot, begin = tl.load(item + 4), tl.load(item + 5)
    rows, length = tl.load(item + 6), tl.load(item + 7)
    if b >= 0:
        first, prefix, _ = _blocks(rows, length, KEYS, WINDOW)
        fold = tile * ROWS + tl.arange(0, ROWS)
        local, member = fold // GROUP, fold % GROUP
        real = local < rows
        row = (begin + local).to(tl.int64)
        d = tl.arange(0, WIDTH)
        inner = d < DIM if DIM < WIDTH else d >= 0
        whole = real[:, None] & inner[None, :]
        q_at = q + row[:, None] * q_row + (far * GROUP + member)[:, None] * q_head + d[None, :]
        queries = tl.load(q_at, mask=whole, other=0.0).to(DOT)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        since = tl.load(depth + row, mask=real, other=0) - WINDOW if WINDOW > 0 else local
        factor, cap = scale * LOG2E, cap * LOG2E
        if PREFIX:
            narrowed, unit = _narrow(queries) if NARROW else (queries, 1.0)
            acc, top, mass = _prefix(
                narrowed, acc, top, mass, key_cache + far * k_head, value_cache + far * v_head,
                table + b.to(tl.int64) * table_row, pages, first + low,
                first + tl.minimum(high, prefix), length, since,
                factor * unit * tl.load(key_scale + head) if KEY_SCALED else factor * unit, cap,
                k_page, k_slot, v_page, v_slot, DIM, WIDTH, KEYS, PAGE, WINDOW, CAPPED,
            )  # fmt: skip
            if VALUE_SCALED:
                acc = acc * tl.load(value_scale + head)
        acc, top, mass = _tree(
            queries, acc, top, mass, tree_key + begin.to(tl.int64) * tk_row + far * tk_head,
            tree_value + begin.to(tl.int64) * tv_row + far * tv_head, mask + row * words,
            depth + begin, tl.maximum(low - prefix, 0), high - prefix, rows, real, since, factor,
            cap, tk_row, tv_row, words, DIM, WIDTH, ROWS, KEYS, WINDOW, CAPPED, STAGES,
        )  # fmt: skip
        acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
        total = (top + tl.log2(tl.where(mass == 0, 1.0, mass))) * LN2
        if slot < 0:
            to = row * (HEADS * GROUP) + head * GROUP + member
            tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
            tl.store(lse + to, total, mask=real)
        else:
            to = slot.to(tl.int64) * HEADS + head * (rows * GROUP) + fold
            tl.store(partial + to[:, None] * DIM + d[None, :], acc, mask=whole)
            tl.store(partial_lse + to, total, mask=real)


@triton.jit(do_not_specialize=["batch"])
def _merge(
    q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse, scale, cap,
    batch, q_row, q_head, tk_row, tk_head, tv_row, tv_head, GROUP: tl.constexpr,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """One row and KV head: merges pieces in order; a pad row sees itself."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads, member, d = tl.num_programs(1), tl.arange(0, MEMBERS), tl.arange(0, WIDTH)
    inner = (member < GROUP)[:, None] & (d < DIM)[None, :]
    to = (n * heads + head) * GROUP + member
    b = tl.load(request + n)
    if b >= batch:
        q_at = q + n * q_row + (head * GROUP + member)[:, None] * q_head + d[None, :]
        queries = tl.load(q_at, mask=inner, other=0.0).to(tl.float32)
        k = tl.load(tree_key + n * tk_row + head * tk_head + d, mask=d < DIM, other=0.0)
        v = tl.load(tree_value + n * tv_row + head * tv_head + d, mask=d < DIM, other=0.0)
        score = tl.sum(queries * k.to(tl.float32)[None, :], 1) * scale
        if CAPPED:
            score = _capped(score, cap)
        own = v.to(tl.float32)[None, :] + tl.zeros([MEMBERS, WIDTH], tl.float32)
        tl.store(out + to[:, None] * DIM + d[None, :], own.to(out.dtype.element_ty), mask=inner)
        tl.store(lse + to, score, mask=member < GROUP)
    else:
        pieces = tl.load(spans + b * 2 + 1)
        if pieces > 1:
            begin = tl.load(indptr + b)
            piece = (tl.load(indptr + b + 1) - begin).to(tl.int64) * GROUP
            first_own = tl.load(spans + b * 2).to(tl.int64) * heads + head * piece
            own_at = first_own + (n - begin) * GROUP + member
            acc = tl.zeros([MEMBERS, WIDTH], tl.float32)
            top = tl.full([MEMBERS], float("-inf"), tl.float32)
            mass = tl.zeros([MEMBERS], tl.float32)
            for first in range(0, pieces, PARTS):  # so many at once: a round is one trip to memory
                part = first + tl.arange(0, PARTS)
                there = (part < pieces)[:, None] & (member < GROUP)[None, :]
                at = own_at[None, :] + (part * (piece * heads))[:, None]
                lses = tl.load(partial_lse + at, mask=there, other=float("-inf"))
                partial_at = partial + at[:, :, None] * DIM + d[None, None, :]
                shown = there[:, :, None] & inner[None, :, :]
                values = tl.load(partial_at, mask=shown, other=0.0)
                new = tl.maximum(top, tl.max(lses, 0))
                base = tl.where(new == float("-inf"), 0.0, new)
                weight = tl.exp2((lses - base[None, :]) * LOG2E)
                decay = tl.exp2((top - base) * LOG2E)
                acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
                mass = mass * decay + tl.sum(weight, 0)
                top = new
            acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
            tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=inner)
            total = top + tl.log2(tl.where(mass == 0, 1.0, mass)) * LN2
            tl.store(lse + to, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["count"])
def _merge_parts(
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
    value = tl.load(o1 + at, mask=inner & (one != float("-inf"))[:, None], other=0.0)
    value = value.to(tl.float32) * first[:, None]
    other = tl.load(o2 + at, mask=inner & (two != float("-inf"))[:, None], other=0.0)
    value += other.to(tl.float32) * second[:, None]
    value = value / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inner)
    tl.store(lse + row, top + tl.log2(tl.where(mass == 0, 1.0, mass)) * LN2, mask=row < count)


class Sizes(NamedTuple):
    """Sizes of a work list: its tile, work items of a balanced split, and most items and partials.

    ``partials`` counts tiles of partial results.
    """

    tile: tiles.Tile
    target: int
    items: int
    partials: int


def list_sizes(s: Shapes) -> Sizes:
    """Sizes of the work list of a call."""
    mean = s.num_rows / max(s.batch, 1) if s.splits is None else tiles.FIXED_ROWS
    kind = s.group, s.dim, s.itemsize, s.cache_itemsize, s.page_size
    tile = tiles.tile(*kind, mean, tiles.generation(s.device))
    row_tiles = tiles.max_row_tiles(s.num_rows, s.batch, s.group, tile.rows)
    target = tiles.target_items(s.device, s.num_kv_heads, tile)
    if s.splits is None:
        return Sizes(tile, target, row_tiles + target, 2 * target)
    pieces = min(s.splits, -(-s.max_prefix // tile.keys) - (-s.num_rows // tile.keys))
    partials = -(-s.num_rows * s.group * pieces // tile.rows) if pieces > 1 else 0
    return Sizes(tile, target, row_tiles * pieces, partials)


def plan_attention(s: Shapes, indptr: Tensor, prefix_lens: Tensor | None) -> AttentionPlan:
    """As :func:`echo.kernels.plan_attention`."""
    sizes = list_sizes(s)
    lengths = indptr if s.mode == "tree" or prefix_lens is None else prefix_lens
    work, spans = indptr.new_empty(sizes.items, FIELDS.value), indptr.new_empty(s.batch + 1, 2)
    with torch.cuda.device(indptr.get_device()):
        _plan[(s.batch + 1,)](
            indptr.contiguous(), lengths.contiguous(), work, spans, s.batch, s.max_prefix,
            sizes.items, sizes.target, s.splits or 0, GROUP=s.group, ROWS=sizes.tile.rows,
            KEYS=sizes.tile.keys, WINDOW=s.window or 0, MIN=tiles.MIN_BLOCKS, BLOCK=256,
            num_warps=4,
        )  # fmt: skip
    return AttentionPlan(s, sizes.tile, work, spans)


def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention`."""
    s, q, tree_key, tree_value, indptr = (
        call.shapes, call.q, call.tree_key, call.tree_value, call.indptr
    )  # fmt: skip
    # Without a prefix nothing of these is read; they stand for pointers.
    keys, values, table, _ = call.cache or (tree_key[None], tree_value[None], indptr[None], indptr)
    _check_layout(call, keys, values, table)
    sizes = list_sizes(s)
    tile = sizes.tile
    out = q.new_empty(s.num_rows, s.num_heads, s.dim)
    lse = q.new_empty(s.num_rows, s.num_heads, dtype=torch.float32)
    if s.num_rows == 0:
        return out, lse
    plan = call.plan or plan_attention(s, indptr, call.prefix_lens)
    if plan.tile != tile:
        wanted = f"one made by the Triton kernel for {tile}"
        raise EchoError(f"plan: expected {wanted}, got one for {plan.tile}")
    items = [sizes.items, FIELDS.value]
    work = checks.tensor("plan.work", plan.work, items, torch.int32, q.device)
    spans = checks.tensor("plan.spans", plan.spans, [s.batch + 1, 2], torch.int32, q.device)
    partial = lse.new_empty(sizes.partials * tile.rows, s.num_kv_heads, s.dim)
    partial_lse = lse.new_empty(sizes.partials * tile.rows, s.num_kv_heads)
    indptr, mask, request = indptr.contiguous(), call.mask.contiguous(), call.request.contiguous()
    depth = indptr if call.depth is None else call.depth.contiguous()
    key_scale, value_scale = (
        lse if scales is None else scales.contiguous()
        for scales in (call.key_scale, call.value_scale)
    )
    cap = 1.0 if call.softcap is None else float(call.softcap)
    narrow = q.dtype == torch.bfloat16 and keys.element_size() == 1 and values.element_size() == 1
    width, members = tiles.power_of_two(s.dim), tiles.power_of_two(s.group)
    own = tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1)
    shape = {"GROUP": s.group, "DIM": s.dim, "WIDTH": width, "CAPPED": call.softcap is not None}
    with torch.cuda.device(q.get_device()):
        _attend[(sizes.items * s.num_kv_heads,)](
            q, keys, values, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
            work, out, lse, partial, partial_lse, call.factor, cap, keys.shape[0],
            q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], table.stride(0),
            *own, mask.shape[1], **shape, HEADS=s.num_kv_heads, ROWS=tile.rows, KEYS=tile.keys,
            PAGE=s.page_size or 1, PREFIX=call.cache is not None, WINDOW=call.window or 0,
            KEY_SCALED=call.key_scale is not None, VALUE_SCALED=call.value_scale is not None,
            NARROW=narrow, DOT=_dot_type(q.dtype), STAGES=tile.tree_stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _merge[(s.num_rows, s.num_kv_heads)](
            q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse,
            call.factor, cap, s.batch, q.stride(0), q.stride(1), *own, **shape, MEMBERS=members,
            PARTS=max(1, tiles.MERGE_ELEMENTS // (members * width)), num_warps=4,
        )  # fmt: skip
    return out, lse


def _check_layout(call: Attention, keys: Tensor, values: Tensor, table: Tensor) -> None:
    """Check what the kernel asks for beyond the reference."""
    if not 16 <= call.shapes.dim <= 256:
        wanted = "head dimensions from 16 to 256 for the Triton kernel"
        raise EchoError(f"q: expected {wanted}, got {call.shapes.dim}")
    own = {"q": call.q, "tree_key": call.tree_key, "tree_value": call.tree_value}
    cached = {"key_cache": keys, "value_cache": values, "page_table": table}
    for name, value in (own | cached).items():
        if value.stride(-1) != 1 and value.numel():
            got = f"strides {list(value.stride())}"
            raise EchoError(f"{name}: expected a contiguous last dimension, got {got}")
    if call.q.is_cuda and torch.float8_e4m3fn in (keys.dtype, values.dtype):
        capability = torch.cuda.get_device_capability(call.q.device)
        if capability < (8, 9):
            wanted = f"float8_e5m2 on compute capability {capability}"
            raise EchoError(f"key_cache: expected {wanted}, got float8_e4m3fn")


def _dot_type(dtype: torch.dtype) -> Any:
    """Triton's type of the matrix products. Its interpreter computes bfloat16 wrongly: float32."""
    if tiles.interpreted() and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)


@tiles.on_its_device
def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`."""
    n, heads, dim = o1.shape
    out, lse, rows = o1.new_empty(n, heads, dim), lse1.new_empty(n, heads), 16
    if n * heads:
        parts = (part.contiguous() for part in (o1, lse1, o2, lse2))
        width = tiles.power_of_two(dim)
        _merge_parts[(-(-n * heads // rows),)](
            *parts, out, lse, n * heads, DIM=dim, WIDTH=width, ROWS=rows, num_warps=4
        )
    return out, lse
