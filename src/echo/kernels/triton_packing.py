"""Packing, compaction and what a history learns of a step, as Triton kernels.

The twins are :func:`echo.tree.packed.pack`, :func:`echo.tree.compact` and :meth:`echo.budget.History.observe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import launch
from echo.kernels.triton_dealing import ends, layout
from echo.kernels.triton_growing import DEAD, INTERPRETED, as_bytes

__all__ = ["INTERPRETED", "compact", "foresee", "observe", "pack"]


@triton.jit(do_not_specialize=["batch", "count", "rows", "words"])
def _pack(
    selected, token, parent, score, bought, counts,
    row_token, row_parent, row_depth, row_request, indptr, mask, row_score, row_node, row_bought, batch, count, rows, words,
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
        held = tl.load(selected + node, mask=lane < count, other=0) != 0
        place = tl.cumsum(held.to(tl.int32), 0) - 1
        tl.store(indptr + b + 1, tl.minimum(first + tl.load(counts + b), rows).to(tl.int32))
        tl.store(indptr, 0, mask=b == 0)
        row, fits = first + place, held & (first + place < rows)
        depth, above = layout(lane, ENDS)
        up = tl.where(depth > 0, above + tl.load(parent + node, mask=lane < count, other=0).to(tl.int32), 0)
        tl.store(row_token + row, tl.load(token + node, mask=fits, other=0), mask=fits)
        tl.store(row_parent + row, tl.where(depth > 0, tl.gather(place, up, 0), -1), mask=fits)
        tl.store(row_depth + row, depth, mask=fits)
        tl.store(row_request + row, tl.zeros_like(lane) + b.to(tl.int32), mask=fits)
        tl.store(row_score + row, tl.load(score + node, mask=fits, other=0.0), mask=fits)
        tl.store(row_node + row, node, mask=fits)
        tl.store(row_bought + row, tl.load(bought + node, mask=fits, other=0), mask=fits)
        for word in range(words):
            at, seen = lane, tl.zeros([BLOCK], tl.int32)
            for _ in range(len(ENDS)):
                bit = tl.gather(place, at, 0)
                seen = seen | tl.where(bit >> 5 == word, tl.full([BLOCK], 1, tl.int32) << (bit & 31), 0)
                at = tl.gather(up, at, 0)
            tl.store(mask + row * words + word, seen, mask=fits)
    else:
        row = (b - batch) * BLOCK + lane
        pad = (row >= first) & (row < rows)
        tl.store(row_token + row, tl.zeros([BLOCK], tl.int64), mask=pad)
        tl.store(row_parent + row, tl.full([BLOCK], -1, tl.int32), mask=pad)
        tl.store(row_depth + row, tl.zeros([BLOCK], tl.int32), mask=pad)
        tl.store(row_request + row, tl.zeros([BLOCK], tl.int32) + batch, mask=pad)
        tl.store(row_score + row, tl.full([BLOCK], DEAD, tl.float32), mask=pad)
        tl.store(row_node + row, tl.full([BLOCK], -1, tl.int64), mask=pad)
        tl.store(row_bought + row, tl.zeros([BLOCK], tl.uint8), mask=pad)
        for word in range(words):
            tl.store(mask + row * words + word, tl.where(tl.zeros([BLOCK], tl.int32) + word == 0, 1, 0), mask=pad)


@triton.jit(do_not_specialize=["count", "steps", "pages", "size", "dummy"])
def _compact(
    rows, lengths, indptr, context, table,
    kept, gathered, valid, position, source, target, after, count, steps, pages, size, dummy, PAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the rows of accepted paths lie and belong."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, b = lane < count * steps, lane // steps
    row = tl.load(rows + lane, mask=inside, other=-1)
    begin = tl.load(context + b, mask=inside, other=0).to(tl.int64)
    there, step = row >= 0, lane - b * steps
    row = tl.where(there, row, 0)
    place, lies = begin + step, begin + row - tl.load(indptr + b, mask=inside, other=0)
    tl.store(kept + lane, tl.where(there, row, -1).to(tl.int32), mask=inside)
    tl.store(gathered + lane, row, mask=inside)
    tl.store(valid + lane, there.to(tl.uint8), mask=inside)
    tl.store(position + lane, tl.where(there, place, 0), mask=inside)
    if PAGED:
        from_ok, to_ok = there & (lies >= 0) & (lies // size < pages), there & (place >= 0) & (place // size < pages)
        page = tl.load(table + b * pages + lies // size, mask=inside & from_ok, other=-1).to(tl.int64)
        home = tl.load(table + b * pages + place // size, mask=inside & to_ok, other=-1).to(tl.int64)
        tl.store(source + lane, tl.where(page >= 0, page * size + lies % size, dummy), mask=inside)
        tl.store(target + lane, tl.where(home >= 0, home * size + place % size, dummy), mask=inside)
    else:
        tl.store(source + lane, tl.where(there, lies, 0), mask=inside)
        tl.store(target + lane, tl.where(there, place, 0), mask=inside)
    tl.store(after + b, begin + tl.load(lengths + b, mask=inside, other=0), mask=inside & (step == 0))


@triton.jit(do_not_specialize=["count", "depth"])
def _foresee(
    gain, score, selected, outlook, expected, count, depth,
    ENDS: tl.constexpr, BINS: tl.constexpr, SKIP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One request's nodes of one layer by probability, and what of it is selected."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = d * 0, d * 0
    for layer in tl.static_range(len(ENDS) - 1):
        begin, end = tl.where(d == layer, ENDS[layer], begin), tl.where(d == layer, ENDS[layer + 1], end)
    lane, total = tl.arange(0, BINS), tl.zeros([PIECE], tl.float32)
    tally = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, PIECE):
        at = start + tl.arange(0, PIECE)
        node, inside = b * count + at, at < end
        chance = tl.load(gain + node, mask=inside, other=0.0)
        place = tl.math.sqrt_rn(chance) * (BINS + SKIP)
        counted = inside & (tl.load(score + node, mask=inside, other=DEAD) > DEAD) & (place >= SKIP)
        bins = tl.minimum(place.to(tl.int32) - SKIP, BINS - 1)
        tally += tl.sum(((bins[:, None] == lane[None, :]) & counted[:, None]).to(tl.int32), 0)
        total += tl.where(tl.load(selected + node, mask=inside, other=0) != 0, chance, 0.0)
    tl.store(outlook + (b * depth + d) * BINS + lane, tally.to(tl.float32))
    tl.store(expected + b * depth + d, tl.sum(total, 0))


@triton.jit
def _seen(slots, indptr, status, lengths, more_expected, b, batch, d, depth, drafted, FORESEES: tl.constexpr):
    """Of some requests and one depth: whether it counts, was accepted, how far it was expected to be; who had rows; and the slot."""
    there = b < batch
    ran = there & (tl.load(indptr + b + 1, mask=there, other=0) > tl.load(indptr + b, mask=there, other=0))
    stopped = tl.load(status + b, mask=there, other=0) != 0
    reached = b * 0 + d < drafted
    seen = ran & (reached | (stopped & (b * 0 + drafted > 0)))
    taken = ran & reached & (tl.load(lengths + b, mask=there, other=0) - 1 > d)
    likely = tl.zeros_like(seen.to(tl.float32))
    if FORESEES:
        likely = tl.load(more_expected + b.to(tl.int64) * depth + d, mask=there & reached, other=0.0)
    return seen.to(tl.float32), taken.to(tl.float32), likely, ran, tl.load(slots + b, mask=there, other=-1)


@triton.jit(do_not_specialize=["batch", "places", "depth", "drafted"])
def _observe(
    slots, indptr, status, lengths, more_expected, more_outlook, steps, expected, accepted, outlook,
    new_steps, new_expected, new_accepted, new_outlook, batch, places, depth, drafted, keep, share,
    FORESEES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Some slots' sums of one depth."""
    d, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.full([BLOCK], -1, tl.int32)
    all_seen, all_taken, all_expected = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        seen, taken, likely, ran, slot = _seen(slots, indptr, status, lengths, more_expected, b, batch, d, depth, drafted, FORESEES)
        own = (slot[None, :] == place[:, None]) & ran[None, :]
        owner = tl.maximum(owner, tl.max(tl.where(own, b[None, :], -1), 1))
        all_seen, all_taken, all_expected = all_seen + tl.sum(seen, 0), all_taken + tl.sum(taken, 0), all_expected + tl.sum(likely, 0)
    b = tl.where(owner >= 0, owner, batch)
    seen, taken, likely, ran, _ = _seen(slots, indptr, status, lengths, more_expected, b, batch, d, depth, drafted, FORESEES)
    everybody = place == places - 1
    fade = tl.where(everybody, tl.maximum(1.0 - all_seen * share, 0.0), tl.where(ran, keep, 1.0))
    at, inside = d.to(tl.int64) * places + place, place < places
    tl.store(new_steps + at, tl.load(steps + at, mask=inside, other=0.0) * fade + tl.where(everybody, all_seen, seen), mask=inside)
    more = tl.where(everybody, all_expected, likely)
    tl.store(new_expected + at, tl.load(expected + at, mask=inside, other=0.0) * fade + more, mask=inside)
    more = tl.where(everybody, all_taken, taken)
    tl.store(new_accepted + at, tl.load(accepted + at, mask=inside, other=0.0) * fade + more, mask=inside)
    lane = tl.arange(0, BINS)
    bins = tl.zeros([BLOCK, BINS], tl.float32)
    if FORESEES:
        near = (b.to(tl.int64) * depth + d)[:, None] * BINS + lane[None, :]
        bins = tl.load(more_outlook + near, mask=((b < batch) & (b * 0 + d < drafted))[:, None] & (lane < BINS)[None, :], other=0.0)
        if (tl.program_id(1) == tl.num_programs(1) - 1) & (d < drafted):
            total = tl.zeros([BINS], tl.float32)
            for r in range(batch):
                total += tl.load(more_outlook + (tl.full([], 0, tl.int64) + r * depth + d) * BINS + lane)
            bins = tl.where(everybody[:, None], total[None, :], bins)
    wide, whole = at[:, None] * BINS + lane[None, :], inside[:, None] & (lane < BINS)[None, :]
    tl.store(new_outlook + wide, tl.load(outlook + wide, mask=whole, other=0.0) * fade[:, None] + bins, mask=whole)


@launch.on_its_device
def pack(
    selected: Tensor, token: Tensor, parent: Tensor, score: Tensor, bought: Tensor, rows: int, words: int, sizes: Sequence[int]
) -> dict[str, Tensor]:
    """The columns of :class:`echo.PackedTree`, by name: the selected nodes as ``rows`` rows.

    Args:
        selected, bought: bool [B, T].
        token, parent: int64 [B, T]; parent is an index into the nodes of the layer above.
        score: float32 [B, T].
        rows: N.
        words: mask words of a row.
        sizes: nodes of each layer, together T.
    """
    batch, count = selected.shape
    ints = partial(token.new_empty, dtype=torch.int32)
    out = {
        "tokens": token.new_empty(rows), "parent": ints(rows), "depth": ints(rows), "request": ints(rows), "indptr": ints(batch + 1),
        "mask": ints((rows, words)), "score": score.new_empty(rows), "node": token.new_empty(rows), "bought": selected.new_empty(rows),
    }  # fmt: skip
    block, _ = launch.lanes(count)
    _pack[(batch + -(-rows // block),)](
        as_bytes(selected), token, parent, score, as_bytes(bought), selected.sum(dim=1),
        *(as_bytes(column) if name == "bought" else column for name, column in out.items()), batch, count, rows, words,
        ENDS=ends(sizes), BLOCK=block, GROUP=launch.REQUESTS, num_warps=launch.warps(block),
    )  # fmt: skip
    return out


@launch.on_its_device
def compact(
    rows: Tensor, lengths: Tensor, indptr: Tensor, context: Tensor, table: Tensor | None, size: int, dummy: int
) -> dict[str, Tensor]:
    """The lists of :class:`echo.tree.Compaction`, by name.

    Args:
        rows: int64 [B, D + 1], accepted rows; -1 beyond.
        lengths: int64 [B].
        indptr: int32 [B + 1].
        context: int32 or int64 [B].
        table: int32 or int64 [B, pages]; None: places in a request's own cache.
        size: tokens of a page.
        dummy: a slot that no request owns.
    """
    batch, steps = rows.shape
    longs = [torch.empty(batch, steps, dtype=torch.int64, device=rows.device) for _ in range(4)]
    kept, valid = torch.empty_like(longs[0], dtype=torch.int32), torch.empty_like(longs[0], dtype=torch.bool)
    after = torch.empty(batch, dtype=torch.int64, device=rows.device)
    if batch:
        _compact[(-(-batch * steps // launch.REQUESTS),)](
            rows.contiguous(), lengths.contiguous(), indptr.contiguous(), context.contiguous(),
            rows if table is None else table.contiguous(),
            kept, longs[0], as_bytes(valid), *longs[1:], after, batch, steps, 0 if table is None else table.shape[1], size, dummy,
            PAGED=table is not None, BLOCK=launch.REQUESTS, num_warps=launch.warps(launch.REQUESTS),
        )  # fmt: skip
    names = ("accept_index", "gather", "valid", "position", "source", "target", "context")
    return dict(zip(names, (kept, longs[0], valid, *longs[1:], after), strict=True))


@launch.on_its_device
def foresee(gain: Tensor, score: Tensor, selected: Tensor, sizes: Sequence[int], bins: int, skip: int) -> tuple[Tensor, Tensor]:
    """Of each drafted layer how many scored nodes lie in each bin of sqrt(probability), and the sum over the selected.

    Args:
        gain, score: float32 [B, T].
        selected: bool [B, T].
        sizes: nodes of each layer, together T.
        bins, skip: bins, a power of two, and how many more below them are left out; all are equal, up to 1.

    Returns:
        float32 [B, depth, bins] and [B, depth].
    """
    (batch, count), depth = gain.shape, len(sizes) - 1
    outlook, expected = gain.new_empty(batch, depth, bins), gain.new_empty(batch, depth)
    if batch and depth:
        _foresee[(batch, depth)](
            gain.contiguous(), score.contiguous(), as_bytes(selected), outlook, expected, count, depth,
            ENDS=ends(sizes), BINS=bins, SKIP=skip, PIECE=16, num_warps=1,
        )  # fmt: skip
    return outlook, expected


@launch.on_its_device
def observe(
    slots: Tensor, indptr: Tensor, status: Tensor, lengths: Tensor, drafted: int, more: tuple[Tensor, Tensor] | None,
    sums: tuple[Tensor, Tensor, Tensor, Tensor], keep: float, memory: int,
) -> list[Tensor]:  # fmt: skip
    """The sums after a step.

    Args:
        slots: int64 [B].
        indptr, status, lengths: int32 [B + 1], int8 and int64 [B], of the step.
        drafted: layers of the step.
        more: expected and outlook of the step, float32 [B, drafted] and [B, drafted, bins]; None where nothing is foreseen.
        sums: steps, expected and accepted, float32 [depth, slots + 1], and outlook, [depth, slots + 1, bins].
        keep: what a slot's sums keep.
        memory: steps of single requests that everybody's sums keep; a power of two.
    """
    depth, places, bins = sums[3].shape
    new = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in sums]
    if depth:
        foresees = tuple(value.contiguous() for value in more) if more is not None and drafted else sums[:2]
        _observe[(depth, -(-places // 16))](
            slots.contiguous(), indptr.contiguous(), status.contiguous(), lengths.contiguous(), *foresees,
            *(value.contiguous() for value in sums), *new, len(slots), places, drafted, drafted, keep, 1 / memory,
            FORESEES=more is not None and drafted > 0, BINS=bins, BLOCK=16, GROUP=64, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return new
