"""Tree attention over a paged prefix as Triton kernels: the contract is in :mod:`echo.kernels`.

``_attend`` works off the list that :mod:`echo.kernels.schedule` makes, ``_merge`` merges the row
tiles that were cut: launches whose grids depend on shapes only. A row tile is ``rows x group``: the
query heads of one KV head are folded into it, so that a tree of 4 rows with a group of 8 fills a
tile of 32. ``_add`` is the tree part alone, behind another kernel's attention over the prefix.
Sizes that change from step to step are not specialised on, as the distance of slots in a page is:
another batch neither compiles anew nor computes in another order. Softmax is online, in base 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels import schedule, tiles
from echo.kernels.arguments import Attention
from echo.kernels.schedule import FIELDS, _blocks

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _capped(score, cap):
    """``cap * tanh(score / cap)``."""
    decay = tl.exp2(tl.abs(score) * (-2 * LOG2E / cap))
    return tl.where(score < 0, -cap, cap) * (1 - decay) / (1 + decay)


@triton.jit
def _scores(q, k, factor, cap, CAPPED: tl.constexpr, BARE: tl.constexpr = False):
    """Scores in base 2, float32, as a row's ``factor`` and ``cap`` are; ``BARE``: without it."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    score = score if BARE else score * factor[:, None]
    return _capped(score, cap) if CAPPED else score


@triton.jit
def _broken(v):
    """1 of each key whose value is not finite, else 0."""
    return tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)


@triton.jit
def _online(score, v, acc, top, mass, factor):
    """One step of the online softmax; scores and ``top`` are of base 2 times a row's ``factor``."""
    new = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(score * factor[:, None] - (base * factor)[:, None])  # one multiply-add
    decay = tl.exp2((top - base) * factor)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new, mass * decay + tl.sum(p, 1)


@triton.jit
def _narrow(q, scale):
    """Queries as float16 below 2, exactly but for what is tiny, and each row's factor, above 0."""
    # An 8-bit key becomes float16 in half an instruction, exactly, and bfloat16 in about four.
    wide = q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)
    bits = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True)
    unit = tl.where(bits >> 23 > 0, (bits & 0x7F800000).to(tl.float32, bitcast=True), 1.0)
    factor = unit * tl.abs(scale)
    return (wide / unit[:, None]).to(tl.float16), tl.where(factor < 1e-30, 1e-30, factor)


@triton.jit
def _page(pages, start, key, length, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Page of a block of the prefix, or of each key where blocks cross pages; -1 for none."""
    if PAGE % KEYS == 0:
        number = tl.load(pages + start // PAGE, mask=start < length, other=-1)
    else:
        number = tl.load(pages + (start + key) // PAGE, mask=start + key < length, other=-1)
    return number


@triton.jit
def _slots(
    cache, page, start, key, by_page, by_slot: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr
):
    """Where each key of a block of the prefix begins, as a column."""
    if PAGE % KEYS == 0:  # offsets within the block never change, and take registers
        block = page.to(tl.int64) * by_page + tl.cast(start % PAGE, tl.int64) * by_slot
        inside = key if KEYS * by_slot < 1 << 31 else key.to(tl.int64)
        at = cache + block + (inside * by_slot)[:, None]
    else:
        slot = ((start + key) % PAGE).to(tl.int64)
        at = cache + (page.to(tl.int64) * by_page + slot * by_slot)[:, None]
    return at


@triton.jit
def _block(
    q, acc, top, mass, page, key_cache, value_cache, pages, count, start, length, since, factor,
    cap, k_page, k_slot: tl.constexpr, v_page, v_slot: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BARE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of the prefix, whose keys all rows see if ``WHOLE``; the page of the next block; and
    whether its own was there.

    With a page number and its keys in one iteration, the compiler pipelines the page number and
    leaves one buffer of keys, which is filled after the products of the iteration before.
    """
    key, d = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inner = (d < DIM if DIM < WIDTH else d >= 0)[None, :]
    ahead = _page(pages, start + KEYS, key, length, KEYS, PAGE)
    known = page.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)
    position = start + key
    seen = position < tl.where(known, length, 0) if PAGE % KEYS == 0 else known
    if WINDOW > 0:  # what no row sees may hold anything
        seen = seen & (position > length - WINDOW)
    shown = known if WHOLE and PAGE % KEYS == 0 else seen[:, None]
    shown = shown & inner if DIM < WIDTH else shown
    k_at = _slots(key_cache, page, start, key, k_page, k_slot, KEYS, PAGE) + d[None, :]
    v_at = _slots(value_cache, page, start, key, v_page, v_slot, KEYS, PAGE) + d[None, :]
    k = tl.load(k_at, mask=shown, other=0.0).to(q.dtype)
    score = _scores(q, k, factor, cap, CAPPED, BARE)
    if not WHOLE:
        visible = seen[None, :]
        if WINDOW > 0:
            visible = visible & (position[None, :] > length + since[:, None])
        score = tl.where(visible, score, float("-inf"))
    v = tl.load(v_at, mask=shown, other=0.0).to(q.dtype)
    factor = factor if BARE else tl.full(top.shape, 1.0, tl.float32)
    acc, top, mass = _online(score, v, acc, top, mass, factor)
    return acc, top, mass, ahead, known


@triton.jit
def _prefix(
    q, acc, top, mass, key_cache, value_cache, pages, count, low, high, length, since, factor, cap,
    k_page, k_slot: tl.constexpr, v_page, v_slot: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BARE: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of the prefix, one KV head; ``count`` pages exist.

    Without a window only a request's last block needs a mask, which is a fifth of the instructions;
    if a page is not there, all is done again with masks. ``BARE`` scores are multiplied within the
    softmax, for which ``factor`` is a number above 0.
    """
    key, last = tl.arange(0, KEYS), low
    page = _page(pages, low * KEYS, key, length, KEYS, PAGE)
    if WINDOW == 0:
        last, missing = tl.maximum(low, tl.minimum(high, length // KEYS)), page & 0
        for block in range(low, last):
            acc, top, mass, page, known = _block(
                q, acc, top, mass, page, key_cache, value_cache, pages, count, block * KEYS, length,
                since, factor, cap, k_page, k_slot, v_page, v_slot, DIM, WIDTH, KEYS, PAGE, WINDOW,
                CAPPED, BARE, True,
            )  # fmt: skip
            missing |= known == 0
        if (missing if PAGE % KEYS == 0 else tl.max(missing, 0)) != 0:
            last, page = low, _page(pages, low * KEYS, key, length, KEYS, PAGE)
            acc, mass = tl.zeros_like(acc), tl.zeros_like(mass)
            top = tl.full(top.shape, float("-inf"), tl.float32)
    for block in range(last, high):
        acc, top, mass, page, _ = _block(
            q, acc, top, mass, page, key_cache, value_cache, pages, count, block * KEYS, length,
            since, factor, cap, k_page, k_slot, v_page, v_slot, DIM, WIDTH, KEYS, PAGE, WINDOW,
            CAPPED, BARE, False,
        )  # fmt: skip
    return acc, top * factor if BARE else top, mass


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
    one = tl.full(top.shape, 1.0, tl.float32)
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
        acc, top, mass = _online(score, v, acc, top, mass, one)
        mass = tl.where(tl.max(tl.where(visible, broken[None, :], 0), 1) > 0, float("nan"), mass)
    return acc, top, mass


@triton.jit
def _sink(acc, top, mass, sink):
    """The online softmax with one more key of score ``sink`` (-inf: none), whose value is 0."""
    new = tl.maximum(top, sink)
    base = tl.where(new == float("-inf"), 0.0, new)
    decay = tl.exp2(top - base)
    return acc * decay[:, None], new, mass * decay + tl.exp2(sink - base)


@triton.jit
def _finish(acc, top, mass):
    """Attention, and the natural log of the summed exponentials."""
    some = tl.where(mass == 0, 1.0, mass)
    return acc / some[:, None], (top + tl.log2(some)) * LN2


@triton.jit
def _alone(q, k, v, scale, cap, CAPPED: tl.constexpr):
    """float32 attention of rows that see themselves only, and their scores."""
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
    return v.to(tl.float32), _capped(score, cap) if CAPPED else score


@triton.jit(do_not_specialize=["pages", "table_row", "words", "num_rows", "batch", "apart"])
def _attend(
    q, key_cache, value_cache, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
    sinks, indptr, work, programs, out, lse, partial, partial_lse, scale, cap, num_rows, batch,
    pages, apart, q_row, q_head, k_page, k_slot: tl.constexpr, k_head, v_page,
    v_slot: tl.constexpr, v_head, table_row, tk_row, tk_head, tv_row, tv_head, words,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    MEMBERS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, KEY_SCALED: tl.constexpr, VALUE_SCALED: tl.constexpr,
    NARROW: tl.constexpr, BARE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's work items of one KV head, then its share of the pad rows.

    Heads side by side read whole cache slots at about one time. Partial results of a KV head are
    ``apart`` rows behind those of the one before.
    """
    head = tl.program_id(0) % HEADS
    far = head.to(tl.int64)  # for strides
    me, count = tl.program_id(0) // HEADS, tl.num_programs(0) // HEADS
    d = tl.arange(0, WIDTH)
    inner = d < DIM if DIM < WIDTH else d >= 0
    first, end = tl.load(programs + me * 2), tl.load(programs + me * 2 + 1)
    for at in tl.range(first, end, disable_licm=True):  # what is hoisted would be spilled
        item = work + at * FIELDS
        b, tile, low, high = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
        slot, begin = tl.load(item + 4), tl.load(item + 5)
        rows, length = tl.load(item + 6), tl.load(item + 7)
        first, prefix, _ = _blocks(rows, length, KEYS, WINDOW)
        fold = tile * ROWS + tl.arange(0, ROWS)
        local, member = fold // GROUP, fold % GROUP
        real = local < rows
        row = (begin + local).to(tl.int64)
        whole = real[:, None] & inner[None, :]
        q_at = q + row[:, None] * q_row + (far * GROUP + member)[:, None] * q_head + d[None, :]
        queries = tl.load(q_at, mask=whole, other=0.0).to(DOT)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        since = tl.load(depth + row, mask=real, other=0) - WINDOW if WINDOW > 0 else local
        factor = tl.full([ROWS], scale * LOG2E, tl.float32)
        key_factor = tl.load(key_scale + head) if KEY_SCALED else 1.0
        narrowed, unit = _narrow(queries, key_factor) if NARROW else (queries, key_factor)
        acc, top, mass = _prefix(
            narrowed, acc, top, mass, key_cache + far * k_head, value_cache + far * v_head,
            table + b.to(tl.int64) * table_row, pages, first + low,
            first + tl.minimum(high, prefix), length, since, factor * unit, cap * LOG2E, k_page,
            k_slot, v_page, v_slot, DIM, WIDTH, KEYS, PAGE, WINDOW, CAPPED, BARE,
        )  # fmt: skip
        acc = acc * tl.load(value_scale + head) if VALUE_SCALED else acc
        acc, top, mass = _tree(
            queries, acc, top, mass, tree_key + begin.to(tl.int64) * tk_row + far * tk_head,
            tree_value + begin.to(tl.int64) * tv_row + far * tv_head, mask + row * words,
            depth + begin, tl.maximum(low - prefix, 0), high - prefix, rows, real, since, factor,
            cap * LOG2E, tk_row, tv_row, words, DIM, WIDTH, ROWS, KEYS, WINDOW, CAPPED, STAGES,
        )  # fmt: skip
        if SINKS:  # once: in the merge where there is one
            sink = tl.load(
                sinks + head * GROUP + member, mask=real & (slot < 0), other=float("-inf")
            )
            acc, top, mass = _sink(acc, top, mass, sink * LOG2E)
        acc, total = _finish(acc, top, mass)
        if slot < 0:
            to = row * (HEADS * GROUP) + head * GROUP + member
            tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
            tl.store(lse + to, total, mask=real)
        else:
            to = far * apart + slot + tl.arange(0, ROWS)
            tl.store(partial + to[:, None] * DIM + d[None, :], acc, mask=whole)
            tl.store(partial_lse + to, total, mask=real)
    for n in range(tl.load(indptr + batch) + me, num_rows, count):
        row, member = tl.cast(n, tl.int64), tl.arange(0, MEMBERS)
        whole = (member < GROUP)[:, None] & inner[None, :]
        q_at = q + row * q_row + (far * GROUP + member)[:, None] * q_head + d[None, :]
        k = tl.load(tree_key + row * tk_row + far * tk_head + d, mask=inner, other=0.0)
        v = tl.load(tree_value + row * tv_row + far * tv_head + d, mask=inner, other=0.0)
        queries = tl.load(q_at, mask=whole, other=0.0)
        own, score = _alone(queries, k[None, :], v[None, :], scale, cap, CAPPED)
        to = row * (HEADS * GROUP) + head * GROUP + member
        own = tl.broadcast_to(own, [MEMBERS, WIDTH])
        tl.store(out + to[:, None] * DIM + d[None, :], own.to(out.dtype.element_ty), mask=whole)
        tl.store(lse + to, score, mask=member < GROUP)


@triton.jit(do_not_specialize=["apart"])
def _merge(
    work, cuts, sinks, out, lse, partial, partial_lse, apart, HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    SOME: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """``SOME`` rows of the row tile that was cut in this place, if any, and one KV head: merges its
    parts in order.
    """
    head, at = tl.program_id(0) % HEADS, tl.load(cuts + tl.program_id(0) // HEADS)
    if at >= 0:
        item = work + at * FIELDS
        inside = tl.program_id(1) * SOME + tl.arange(0, SOME)
        fold = tl.load(item + 1) * ROWS + inside
        begin, rows, parts = tl.load(item + 5), tl.load(item + 6), tl.load(item + 8)
        real, d = fold < rows * GROUP, tl.arange(0, WIDTH)
        if tl.max(real.to(tl.int32), 0) > 0:
            acc = tl.zeros([SOME, WIDTH], tl.float32)
            top = tl.full([SOME], float("-inf"), tl.float32)
            mass = tl.zeros([SOME], tl.float32)
            for part in range(0, parts, PARTS):  # so many at once: a round is one trip to memory
                number = part + tl.arange(0, PARTS)
                slot = tl.load(item + number * FIELDS + 4, mask=number < parts, other=0)
                place = head.to(tl.int64) * apart + slot[:, None] + inside[None, :]
                there = (number < parts)[:, None] & real[None, :]
                lses = tl.load(partial_lse + place, mask=there, other=float("-inf")) * LOG2E
                values = tl.load(
                    partial + place[:, :, None] * DIM + d[None, None, :],
                    mask=there[:, :, None] & (d < DIM)[None, None, :], other=0.0,
                )  # fmt: skip
                new = tl.maximum(top, tl.max(lses, 0))
                base = tl.where(new == float("-inf"), 0.0, new)
                weight, decay = tl.exp2(lses - base[None, :]), tl.exp2(top - base)
                acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
                mass, top = mass * decay + tl.sum(weight, 0), new
            query_head = head * GROUP + fold % GROUP
            to = (begin + fold // GROUP).to(tl.int64) * (HEADS * GROUP) + query_head
            if SINKS:
                sink = tl.load(sinks + query_head, mask=real, other=0.0) * LOG2E
                acc, top, mass = _sink(acc, top, mass, sink)
            acc, total = _finish(acc, top, mass)
            whole = real[:, None] & (d < DIM)[None, :]
            tl.store(out + to[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
            tl.store(lse + to, total, mask=real)


def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention` in mode "whole"."""
    s, q, tree_key, tree_value = call.shapes, call.q, call.tree_key, call.tree_value
    assert call.cache is not None
    keys, values, table, prefix_lens = call.cache
    check_layout(call)
    size = schedule.sizes(s)
    tile = size.tile
    out = q.new_empty(s.num_rows, s.num_heads, s.dim)
    lse = q.new_empty(s.num_rows, s.num_heads, dtype=torch.float32)
    if s.num_rows == 0:
        return out, lse
    plan = call.plan or schedule.plan_attention(s, call.indptr, prefix_lens)
    if plan.tile != tile:
        wanted = f"one made by the Triton kernel for {tile}"
        raise EchoError(f"plan: expected {wanted}, got one for {plan.tile}")
    shape = [size.items, FIELDS.value]
    work = checks.tensor("plan.work", plan.work, shape, torch.int32, q.device)
    shape = [size.programs, 2]
    programs = checks.tensor("plan.programs", plan.programs, shape, torch.int32, q.device)
    cuts = checks.tensor("plan.cuts", plan.cuts, [size.cuts], torch.int32, q.device)
    partial = lse.new_empty(s.num_kv_heads * size.partials, s.dim)
    partial_lse = lse.new_empty(s.num_kv_heads * size.partials)
    indptr, mask = call.indptr.contiguous(), call.mask.contiguous()
    depth = indptr if call.depth is None else call.depth.contiguous()
    key_scale, value_scale, sinks = (
        lse if factors is None else factors.contiguous()
        for factors in (call.key_scale, call.value_scale, call.sinks)
    )
    cap = 1.0 if call.softcap is None else float(call.softcap)
    narrow = q.dtype == torch.bfloat16 and keys.element_size() == 1 and values.element_size() == 1
    bare = call.factor > 0 and call.softcap is None and (narrow or call.key_scale is None)
    width = tiles.power_of_two(s.dim)
    same = {
        "HEADS": s.num_kv_heads, "GROUP": s.group, "DIM": s.dim, "WIDTH": width, "ROWS": tile.rows,
        "SINKS": call.sinks is not None,
    }  # fmt: skip
    tiles.launch(
        _attend, (size.programs * s.num_kv_heads,),
        q, keys, values, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
        sinks, indptr, work, programs, out, lse, partial, partial_lse, call.factor, cap,
        s.num_rows, s.batch, keys.shape[0], size.partials, q.stride(0), q.stride(1),
        *keys.stride()[:3], *values.stride()[:3], table.stride(0), *tree_key.stride()[:2],
        *tree_value.stride()[:2], mask.shape[1], **same, MEMBERS=tiles.power_of_two(s.group),
        KEYS=tile.keys, PAGE=s.page_size, WINDOW=call.window or 0,
        CAPPED=call.softcap is not None, KEY_SCALED=call.key_scale is not None,
        VALUE_SCALED=call.value_scale is not None, NARROW=narrow, BARE=bare,
        DOT=dot_type(q.dtype), STAGES=tile.tree_stages, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if size.cuts:
        parts = schedule.MERGE_PARTS
        some = min(tiles.MERGE_ELEMENTS // (parts * width), tile.rows)
        tiles.launch(
            _merge, (size.cuts * s.num_kv_heads, -(-tile.rows // some)),
            work, cuts, sinks, out, lse, partial, partial_lse, size.partials, **same, SOME=some,
            PARTS=parts, num_warps=8,
        )  # fmt: skip
    return out, lse


def check_layout(call: Attention) -> None:
    """Check what the kernels ask for beyond the reference."""
    if not 16 <= call.shapes.dim <= 256:
        wanted = "head dimensions from 16 to 256 for the Triton kernel"
        raise EchoError(f"q: expected {wanted}, got {call.shapes.dim}")
    cached = ("prefix_out",) if call.cache is None else ("key_cache", "value_cache", "page_table")
    for name in ("q", "tree_key", "tree_value", *cached):
        value = getattr(call, name)
        if value is not None and value.stride(-1) != 1 and value.numel():
            got = f"strides {list(value.stride())}"
            raise EchoError(f"{name}: expected a contiguous last dimension, got {got}")
    eight = call.cache is not None and torch.float8_e4m3fn in (c.dtype for c in call.cache[:2])
    if eight and call.q.is_cuda:
        capability = torch.cuda.get_device_capability(call.q.device)
        if capability < (8, 9):
            wanted = f"float8_e5m2 on compute capability {capability}"
            raise EchoError(f"key_cache: expected {wanted}, got float8_e4m3fn")


def dot_type(dtype: torch.dtype) -> Any:
    """Triton's type of the matrix products. Its interpreter computes bfloat16 wrongly: float32."""
    if tiles.interpreted() and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
