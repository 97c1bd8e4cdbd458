"""Packing, compaction and what a history learns of a step, as Triton kernels.

The references are :func:`echo.tree.packed.pack`, :func:`echo.tree.compact` and :meth:`echo.budget.History.observe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles
from echo.kernels.grow import DEAD, as_bytes
from echo.kernels.select import Selected, ends, layout, taken


@triton.jit(do_not_specialize=["batch", "count", "rows", "words", "token_row", "row"])
def _pack(
    place_at, share, token, parent, score, bought, counts,
    row_token, row_parent, row_depth, row_request, indptr, mask, row_score, row_node, row_bought,
    batch, count, rows, words, token_row, row,
    ENDS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One request's rows; behind the requests, a block of pads."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = tl.zeros([], tl.int64)
    for start in range(0, tl.minimum(b, batch).to(tl.int32), GROUP):
        r = start + tl.arange(0, GROUP)
        first += tl.sum(tl.load(counts + r, mask=(r < b) & (r < batch), other=0), 0)
    if b < batch:
        node = b * count + lane
        held = taken(place_at, share, b, lane, lane < count, count)
        place = tl.cumsum(held.to(tl.int32), 0) - 1
        tl.store(indptr + b + 1, tl.minimum(first + tl.load(counts + b), rows).to(tl.int32))
        tl.store(indptr, 0, mask=b == 0)
        to, fits = first + place, held & (first + place < rows)
        depth, above = layout(lane, ENDS)
        up = tl.where(
            depth > 0,
            above + tl.load(parent + b * row + lane, mask=lane < count, other=0).to(tl.int32),
            0,
        )
        tl.store(
            row_token + to, tl.load(token + b * token_row + lane, mask=fits, other=0), mask=fits
        )
        tl.store(row_parent + to, tl.where(depth > 0, tl.gather(place, up, 0), -1), mask=fits)
        tl.store(row_depth + to, depth, mask=fits)
        tl.store(row_request + to, tl.zeros_like(lane) + b.to(tl.int32), mask=fits)
        tl.store(row_score + to, tl.load(score + b * row + lane, mask=fits, other=0.0), mask=fits)
        tl.store(row_node + to, node, mask=fits)
        tl.store(row_bought + to, tl.load(bought + b * row + lane, mask=fits, other=0), mask=fits)
        for word in range(words):
            at, seen = lane, tl.zeros([BLOCK], tl.int32)
            for _ in range(len(ENDS)):
                bit = tl.gather(place, at, 0)
                seen = seen | tl.where(
                    bit >> 5 == word, tl.full([BLOCK], 1, tl.int32) << (bit & 31), 0
                )
                at = tl.gather(up, at, 0)
            tl.store(mask + to * words + word, seen, mask=fits)
    else:
        to = (b - batch) * BLOCK + lane
        pad = (to >= first) & (to < rows)
        tl.store(row_token + to, tl.zeros([BLOCK], tl.int64), mask=pad)
        tl.store(row_parent + to, tl.full([BLOCK], -1, tl.int32), mask=pad)
        tl.store(row_depth + to, tl.zeros([BLOCK], tl.int32), mask=pad)
        tl.store(row_request + to, tl.zeros([BLOCK], tl.int32) + batch, mask=pad)
        tl.store(row_score + to, tl.full([BLOCK], DEAD, tl.float32), mask=pad)
        tl.store(row_node + to, tl.full([BLOCK], -1, tl.int64), mask=pad)
        tl.store(row_bought + to, tl.zeros([BLOCK], tl.uint8), mask=pad)
        for word in range(words):
            tl.store(
                mask + to * words + word,
                tl.where(tl.zeros([BLOCK], tl.int32) + word == 0, 1, 0),
                mask=pad,
            )


@triton.jit(do_not_specialize=["count", "steps", "pages", "size", "dummy", "past"])
def _compact(
    rows, lengths, indptr, context, table,
    kept, gathered, valid, position, source, target, after, count, steps, pages, size, dummy, past,
    PAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the rows of accepted paths lie and belong."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, b = lane < count * steps, lane // steps
    row = tl.load(rows + lane, mask=inside, other=-1)
    begin = tl.load(context + b, mask=inside, other=0).to(tl.int64)
    there, step = row >= 0, lane - b * steps
    row = tl.where(there, row, 0)
    place = begin + step
    lies = tl.where(past < 0, begin, past) + row - tl.load(indptr + b, mask=inside, other=0)
    tl.store(kept + lane, tl.where(there, row, -1).to(tl.int32), mask=inside)
    tl.store(gathered + lane, row, mask=inside)
    tl.store(valid + lane, there.to(tl.uint8), mask=inside)
    tl.store(position + lane, tl.where(there, place, 0), mask=inside)
    if PAGED:
        from_ok, to_ok = (
            there & (lies >= 0) & (lies // size < pages),
            there & (place >= 0) & (place // size < pages),
        )
        page = tl.load(table + b * pages + lies // size, mask=inside & from_ok, other=-1).to(
            tl.int64
        )
        home = tl.load(table + b * pages + place // size, mask=inside & to_ok, other=-1).to(
            tl.int64
        )
        tl.store(source + lane, tl.where(page >= 0, page * size + lies % size, dummy), mask=inside)
        tl.store(target + lane, tl.where(home >= 0, home * size + place % size, dummy), mask=inside)
    else:
        tl.store(source + lane, tl.where(there, lies, dummy), mask=inside)
        tl.store(target + lane, tl.where(there, place, dummy), mask=inside)
    tl.store(
        after + b, begin + tl.load(lengths + b, mask=inside, other=0), mask=inside & (step == 0)
    )


def columns(like: Tensor, batch: int, rows: int, words: int) -> dict[str, Tensor]:
    """Empty columns of :class:`echo.PackedTree`, by name, where ``like`` is."""
    make = partial(torch.empty, device=like.device)
    return {
        "tokens": make(rows, dtype=torch.int64), "parent": make(rows, dtype=torch.int32), "depth": make(rows, dtype=torch.int32),
        "request": make(rows, dtype=torch.int32), "indptr": make(batch + 1, dtype=torch.int32),
        "mask": make(rows, words, dtype=torch.int32), "score": make(rows, dtype=torch.float32), "node": make(rows, dtype=torch.int64),
        "committed": make(rows, dtype=torch.bool),
    }  # fmt: skip


@tiles.on_its_device
def pack(
    selected: Selected, token: Tensor, parent: Tensor, score: Tensor, committed: Tensor, rows: int, words: int, sizes: Sequence[int],
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The columns of :class:`echo.PackedTree`, by name: the selected nodes as ``rows`` rows.

    Args:
        selected: what to pack.
        token, parent, score, committed: int64, int64, float32 and bool [B, T], of a tree; the last three of one row stride. A parent is
            an index into the nodes of the layer above.
        rows: N.
        words: mask words of a row.
        sizes: nodes of each layer, together T.
        out: columns to write to.
    """
    batch, count = selected.place.shape
    new = out or columns(token, batch, rows, words)
    block, _ = tiles.lanes(count)
    _pack[(batch + -(-rows // block),)](
        selected.place, selected.share, token, parent, score, as_bytes(committed), selected.counts,
        *(as_bytes(column) if name == "committed" else column for name, column in new.items()), batch, count, rows, words,
        token.stride(0), parent.stride(0), ENDS=ends(sizes), BLOCK=block, GROUP=tiles.REQUESTS, num_warps=tiles.warps(block),
    )  # fmt: skip
    return new


@tiles.on_its_device
def compact(
    rows: Tensor, num_emitted: Tensor, indptr: Tensor, prefix_lens: Tensor, table: Tensor | None, size: int, pad_slot_id: int, past_len: int,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The lists of :class:`echo.tree.Compaction`, by name.

    Args:
        rows: int64 [B, D + 1], accepted rows; -1 beyond.
        num_emitted: int64 [B].
        indptr: int32 [B + 1].
        prefix_lens: int32 or int64 [B].
        table: int32 or int64 [B, pages]; None: places in a request's own cache.
        size: tokens of a page.
        pad_slot_id: a slot that no request owns, or a place in a request's own cache.
        past_len: place of each request's first row in its own cache; -1: behind its context.
        out: lists to write to.
    """
    (batch, steps), make = rows.shape, partial(torch.empty, device=rows.device)
    new = out or {
        "accept_index": make(batch, steps, dtype=torch.int32), "gather": make(batch, steps, dtype=torch.int64),
        "valid": make(batch, steps, dtype=torch.bool), "positions": make(batch, steps, dtype=torch.int64),
        "source": make(batch, steps, dtype=torch.int64), "target": make(batch, steps, dtype=torch.int64),
        "prefix_lens": make(batch, dtype=torch.int64),
    }  # fmt: skip
    if batch:
        _compact[(-(-batch * steps // tiles.REQUESTS),)](
            rows.contiguous(), num_emitted.contiguous(), indptr.contiguous(), prefix_lens.contiguous(),
            rows if table is None else table.contiguous(),
            *(as_bytes(column) if name == "valid" else column for name, column in new.items()),
            batch, steps, 0 if table is None else table.shape[1], size, pad_slot_id, past_len,
            PAGED=table is not None, BLOCK=tiles.REQUESTS, num_warps=tiles.warps(tiles.REQUESTS),
        )  # fmt: skip
    return new
