"""The tree part of attention behind another kernel's prefix, and the merge of two results.

``_add`` needs no work list: a program has a tile of packed rows times heads of a group, whichever
requests they are of, and goes through the rows of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles
from echo.kernels.arguments import Attention, Shapes
from echo.kernels.attention import (
    LN2,
    LOG2E,
    _alone,
    _finish,
    _sink,
    _tree,
    check_layout,
    dot_type,
)


@triton.jit(do_not_specialize=["num_rows", "batch", "words"])
def _add(
    q, tree_key, tree_value, request, indptr, mask, depth, sinks, prefix_out, prefix_lse, out, lse,
    scale, cap, num_rows, batch, q_row, q_head, tk_row, tk_head, tv_row, tv_head, o_row, o_head,
    lse_row, lse_head, words, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, JOINED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of packed rows and one KV head. A row's blocks of keys begin with its request, so that
    its bits do not depend on the rows beside it.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    fold = (tl.program_id(0) // HEADS) * ROWS + tl.arange(0, ROWS)
    row = (fold // GROUP).to(tl.int64)
    member = fold % GROUP
    there = row < num_rows
    d = tl.arange(0, WIDTH)
    inner = d < DIM if DIM < WIDTH else d >= 0
    whole = there[:, None] & inner[None, :]
    q_at = q + row[:, None] * q_row + (head * GROUP + member)[:, None] * q_head + d[None, :]
    queries = tl.load(q_at, mask=whole, other=0.0).to(DOT)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    factor = tl.full([ROWS], scale * LOG2E, tl.float32)
    since = tl.load(depth + row, mask=there, other=0) - WINDOW if WINDOW > 0 else member
    own = tl.load(request + row, mask=there, other=batch)
    last = tl.max(tl.where(own < batch, own, -1), 0)
    for b in tl.range(tl.min(own, 0), last + 1, disable_licm=True):
        begin = tl.load(indptr + b)
        rows = tl.load(indptr + b + 1) - begin
        acc, top, mass = _tree(
            queries, acc, top, mass, tree_key + begin.to(tl.int64) * tk_row + head * tk_head,
            tree_value + begin.to(tl.int64) * tv_row + head * tv_head, mask + row * words,
            depth + begin, 0, (rows + KEYS - 1) // KEYS, rows, own == b, since, factor,
            cap * LOG2E, tk_row, tv_row, words, DIM, WIDTH, ROWS, KEYS, WINDOW, CAPPED, 1,
        )  # fmt: skip
    real = own < batch
    pad = there & (own >= batch)
    at = row * (HEADS * GROUP) + head * GROUP + member
    if SINKS:
        sink = tl.load(sinks + head * GROUP + member, mask=real, other=float("-inf"))
        acc, top, mass = _sink(acc, top, mass, sink * LOG2E)
    if JOINED:
        lse_at = prefix_lse + row * lse_row + (head * GROUP + member) * lse_head
        before = tl.load(lse_at, mask=real, other=float("-inf")) * LOG2E
        before = tl.where(before == float("inf"), float("-inf"), before)  # FlashAttention 2's
        o_at = prefix_out + row[:, None] * o_row + (head * GROUP + member)[:, None] * o_head
        shown = whole & (real & (before != float("-inf")))[:, None]  # else it may hold anything
        theirs = tl.load(o_at + d[None, :], mask=shown, other=0.0).to(tl.float32)
        acc, top, mass = _sink(acc, top, mass, before)
        base = tl.where(top == float("-inf"), 0.0, top)
        acc += theirs * tl.exp2(before - base)[:, None]
    acc, total = _finish(acc, top, mass)
    if tl.max(pad.to(tl.int32), 0) > 0:  # pad rows see themselves
        k_at = tree_key + row[:, None] * tk_row + head * tk_head + d[None, :]
        v_at = tree_value + row[:, None] * tv_row + head * tv_head + d[None, :]
        shown = whole & pad[:, None]
        k = tl.load(k_at, mask=shown, other=0.0)
        v = tl.load(v_at, mask=shown, other=0.0)
        v, score = _alone(queries, k, v, scale, cap, CAPPED)
        acc = tl.where(pad[:, None], v, acc)
        total = tl.where(pad, score, total)
    tl.store(out + at[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
    tl.store(lse + at, total, mask=there)


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
    first = tl.exp2((one - base) * LOG2E)
    second = tl.exp2((two - base) * LOG2E)
    mass = first + second
    at = row[:, None] * DIM + d[None, :]
    value = tl.load(o1 + at, mask=inner & (one != float("-inf"))[:, None], other=0.0)
    value = value.to(tl.float32) * first[:, None]
    other = tl.load(o2 + at, mask=inner & (two != float("-inf"))[:, None], other=0.0)
    value += other.to(tl.float32) * second[:, None]
    value = value / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inner)
    tl.store(lse + row, top + tl.log2(tl.where(mass == 0, 1.0, mass)) * LN2, mask=row < count)


def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention` in mode "tree": one launch."""
    s = call.shapes
    q = call.q
    tree_key = call.tree_key
    tree_value = call.tree_value
    check_layout(call)
    out = q.new_empty(s.num_rows, s.num_heads, s.dim)
    lse = q.new_empty(s.num_rows, s.num_heads, dtype=torch.float32)
    if s.num_rows == 0:
        return out, lse
    # What is not there is not read: another tensor stands for the pointer.
    before = out if call.prefix_out is None else call.prefix_out
    before_lse = call.prefix_lse
    before_lse = lse if before_lse is None else before_lse
    indptr, request, mask = (x.contiguous() for x in (call.indptr, call.request, call.mask))
    depth = indptr if call.depth is None else call.depth.contiguous()
    sinks = lse if call.sinks is None else call.sinks.contiguous()
    rows, keys, warps = tree_tile(s)
    tiles.launch(
        _add, (-(-s.num_rows * s.group // rows) * s.num_kv_heads,),
        q, tree_key, tree_value, request, indptr, mask, depth, sinks, before, before_lse, out,
        lse, call.factor, 1.0 if call.softcap is None else float(call.softcap), s.num_rows,
        s.batch, q.stride(0), q.stride(1), *tree_key.stride()[:2], *tree_value.stride()[:2],
        before.stride(0), before.stride(1), *before_lse.stride(), mask.shape[1],
        HEADS=s.num_kv_heads, GROUP=s.group, DIM=s.dim, WIDTH=tiles.power_of_two(s.dim),
        ROWS=rows, KEYS=keys, WINDOW=call.window or 0, CAPPED=call.softcap is not None,
        SINKS=call.sinks is not None, JOINED=call.prefix_out is not None,
        DOT=dot_type(q.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out, lse


def tree_tile(s: Shapes) -> tuple[int, int, int]:
    """Rows, keys and warps of a program: one request's rows; with ``splits``, of any batch's."""
    if s.itemsize == 4:
        return 16, 16, 8
    mean = s.num_rows / max(s.batch, 1) if s.splits is None else tiles.FIXED_ROWS
    tallest = 64 if s.dim <= 128 and tiles.generation(s.device) >= tiles.HOPPER else 32
    rows = min(max(tiles.power_of_two(round(s.group * mean)), 16), tallest)
    return rows, 32, 4 if s.dim <= 128 else 8


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`."""
    n, heads, dim = o1.shape
    out = o1.new_empty(n, heads, dim)
    lse = lse1.new_empty(n, heads)
    rows = 16
    if n * heads:
        parts = (part.contiguous() for part in (o1, lse1, o2, lse2))
        width = tiles.power_of_two(dim)
        tiles.launch(
            _merge_parts,
            (-(-n * heads // rows),),
            *parts,
            out,
            lse,
            n * heads,
            DIM=dim,
            WIDTH=width,
            ROWS=rows,
            num_warps=4,
        )
    return out, lse
