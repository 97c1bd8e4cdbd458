"""Triton kernels for Flatten & Pack, and for the compaction of accepted rows.

The references are PyTorch's paths of :func:`echo.tree.packed.pack` and :func:`echo.tree.compact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles
from echo.kernels.grow import DEAD
from echo.kernels.select import Selected, ends, layout, selected
from echo.kernels.tiles import as_bytes


@triton.jit(do_not_specialize=["batch", "count", "rows", "words", "token_row", "row"])
def _pack(
    place_at, share, token, parent, score, committed, status, invalid, counts,
    row_token, row_parent, row_depth, row_request, indptr, mask, row_score, row_node, row_committed,
    new_status, new_invalid, layers_at, batch, count, rows, words, token_row, row,
    ENDS: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One request's rows; programs beyond the requests write a block of pad rows each."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = tl.zeros([], tl.int64)
    for start in range(0, tl.minimum(b, batch).to(tl.int32), GROUP):
        r = start + tl.arange(0, GROUP)
        first += tl.sum(tl.load(counts + r, mask=(r < b) & (r < batch), other=0), 0)
    if b < batch:
        node = b * count + lane
        inside = lane < count
        at = b * row + lane
        chosen = selected(place_at, share, b, lane, inside, count)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indptr + b + 1, tl.minimum(first + tl.load(counts + b), rows).to(tl.int32))
        tl.store(indptr, 0, mask=b == 0)
        if LAYERS:
            tl.store(layers_at, len(ENDS) - 1, mask=b == 0)
        tl.store(new_status + b, tl.load(status + b))
        tl.store(new_invalid + b, tl.load(invalid + b))
        to = first + place
        fits = chosen & (first + place < rows)
        depth, above = layout(lane, ENDS)
        up = above + tl.load(parent + at, mask=inside, other=0).to(tl.int32)
        up = tl.where(depth > 0, up, 0)
        own = tl.load(token + b * token_row + lane, mask=fits, other=0)
        tl.store(row_token + to, own, mask=fits)
        tl.store(row_parent + to, tl.where(depth > 0, tl.gather(place, up, 0), -1), mask=fits)
        tl.store(row_depth + to, depth, mask=fits)
        tl.store(row_request + to, tl.zeros_like(lane) + b.to(tl.int32), mask=fits)
        tl.store(row_score + to, tl.load(score + at, mask=fits, other=0.0), mask=fits)
        tl.store(row_node + to, node, mask=fits)
        tl.store(row_committed + to, tl.load(committed + at, mask=fits, other=0), mask=fits)
        for word in range(words):
            ancestor = lane
            seen = tl.zeros([BLOCK], tl.int32)
            for _ in range(len(ENDS)):
                bit = tl.gather(place, ancestor, 0)
                one = tl.full([BLOCK], 1, tl.int32) << (bit & 31)
                seen = seen | tl.where(bit >> 5 == word, one, 0)
                ancestor = tl.gather(up, ancestor, 0)
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
        tl.store(row_committed + to, tl.zeros([BLOCK], tl.uint8), mask=pad)
        for word in range(words):
            itself = tl.where(tl.zeros([BLOCK], tl.int32) + word == 0, 1, 0)
            tl.store(mask + to * words + word, itself, mask=pad)


@triton.jit(do_not_specialize=["count", "steps", "pages", "page_size", "pad_slot", "past"])
def _compact(
    rows, num_emitted, indptr, prefix_lens, table,
    accept_index, gather, valid, positions, source, target, new_lens,
    count, steps, pages, page_size, pad_slot, past, PAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the accepted rows are in the cache, and where they belong."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < count * steps
    b = lane // steps
    row = tl.load(rows + lane, mask=inside, other=-1)
    begin = tl.load(prefix_lens + b, mask=inside, other=0).to(tl.int64)
    there = row >= 0
    step = lane - b * steps
    row = tl.where(there, row, 0)
    to = begin + step
    lies = tl.where(past < 0, begin, past) + row - tl.load(indptr + b, mask=inside, other=0)
    tl.store(accept_index + lane, tl.where(there, row, -1).to(tl.int32), mask=inside)
    tl.store(gather + lane, row, mask=inside)
    tl.store(valid + lane, there.to(tl.uint8), mask=inside)
    tl.store(positions + lane, tl.where(there, to, 0), mask=inside)
    if PAGED:
        lies_ok = inside & (there & (lies >= 0) & (lies // page_size < pages))
        to_ok = inside & (there & (to >= 0) & (to // page_size < pages))
        old = tl.load(table + b * pages + lies // page_size, mask=lies_ok, other=-1).to(tl.int64)
        new = tl.load(table + b * pages + to // page_size, mask=to_ok, other=-1).to(tl.int64)
        from_slot = tl.where(old >= 0, old * page_size + lies % page_size, pad_slot)
        to_slot = tl.where(new >= 0, new * page_size + to % page_size, pad_slot)
        tl.store(source + lane, from_slot, mask=inside)
        tl.store(target + lane, to_slot, mask=inside)
    else:
        tl.store(source + lane, tl.where(there, lies, pad_slot), mask=inside)
        tl.store(target + lane, tl.where(there, to, pad_slot), mask=inside)
    length = begin + tl.load(num_emitted + b, mask=inside, other=0)
    tl.store(new_lens + b, length.to(new_lens.dtype.element_ty), mask=inside & (step == 0))


def pack(
    chosen: Selected,
    token: Tensor,
    parent: Tensor,
    score: Tensor,
    committed: Tensor,
    status: Tensor,
    invalid: Tensor,
    num_rows: int,
    words: int,
    sizes: Sequence[int],
    num_layers: Tensor | None = None,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the columns of :class:`echo.PackedTree` by name: ``num_rows`` rows.

    Args:
        chosen: the selected nodes.
        token, parent, score, committed: int64, int64, float32 and bool [B, T], of a tree; the last
            three share a row stride. A parent is an index into the nodes of the layer above.
        status, invalid: int8 and int32 [B].
        num_rows: N.
        words: mask words of a row.
        sizes: nodes of each layer, T in total.
        num_layers: int32 [], to which the number of drafted layers is written.
        out: columns to write to.
    """
    batch, count = chosen.place.shape
    empty = partial(torch.empty, device=token.device)
    new = out or {
        "tokens": empty(num_rows, dtype=torch.int64),
        "parent": empty(num_rows, dtype=torch.int32),
        "depth": empty(num_rows, dtype=torch.int32),
        "request": empty(num_rows, dtype=torch.int32),
        "indptr": empty(batch + 1, dtype=torch.int32),
        "mask": empty(num_rows, words, dtype=torch.int32),
        "score": empty(num_rows, dtype=torch.float32),
        "node": empty(num_rows, dtype=torch.int64),
        "committed": empty(num_rows, dtype=torch.bool),
        "status": torch.empty_like(status),
        "invalid": torch.empty_like(invalid),
    }
    block, _ = tiles.lanes(count)
    tiles.launch(
        _pack, (batch + -(-num_rows // block),),
        chosen.place, chosen.share, token, parent, score, as_bytes(committed), status, invalid,
        chosen.counts,
        *(as_bytes(column) if name == "committed" else column for name, column in new.items()),
        invalid if num_layers is None else num_layers,
        batch, count, num_rows, words, token.stride(0), parent.stride(0),
        ENDS=ends(sizes), LAYERS=num_layers is not None, BLOCK=block, GROUP=tiles.REQUESTS,
        num_warps=tiles.warps(block),
    )  # fmt: skip
    return new


def compact(
    rows: Tensor,
    num_emitted: Tensor,
    indptr: Tensor,
    prefix_lens: Tensor,
    page_table: Tensor | None,
    page_size: int,
    pad_slot_id: int,
    past_len: int,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the lists of :class:`echo.tree.Compaction` by name.

    Args:
        rows: int64 [B, D + 1], accepted rows, then -1.
        num_emitted: int64 [B].
        indptr: int32 [B + 1].
        prefix_lens: int32 or int64 [B].
        page_table: int32 or int64 [B, pages]; None: positions in a request's own cache.
        page_size: tokens per page.
        pad_slot_id: a slot that no request owns, or a position in a request's own cache.
        past_len: position of each request's first row in its own cache; -1: after its prefix.
        out: lists to write to.
    """
    batch, steps = rows.shape
    empty = partial(torch.empty, device=rows.device)
    new = out or {
        "accept_index": empty(batch, steps, dtype=torch.int32),
        "gather": empty(batch, steps, dtype=torch.int64),
        "valid": empty(batch, steps, dtype=torch.bool),
        "positions": empty(batch, steps, dtype=torch.int64),
        "source": empty(batch, steps, dtype=torch.int64),
        "target": empty(batch, steps, dtype=torch.int64),
        "prefix_lens": empty(batch, dtype=prefix_lens.dtype),
    }
    if batch:
        block = tiles.REQUESTS
        paged = page_table is not None
        table = rows if page_table is None else page_table.contiguous()
        tiles.launch(
            _compact, (-(-batch * steps // block),),
            rows.contiguous(), num_emitted.contiguous(), indptr.contiguous(),
            prefix_lens.contiguous(), table,
            *(as_bytes(column) if name == "valid" else column for name, column in new.items()),
            batch, steps, table.shape[1] if paged else 0, page_size, pad_slot_id, past_len,
            PAGED=paged, BLOCK=block, num_warps=tiles.warps(block),
        )  # fmt: skip
    return new
