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

from echo.kernels import codes, launch
from echo.kernels.triton_dealing import Selected, ends, layout
from echo.kernels.triton_growing import DEAD, EMPTY, INTERPRETED, STARVED, TRUNCATED, as_bytes

ONE = tl.constexpr(float(codes.ONE))
"""Certainty in the fixed point of calibrated costs."""

__all__ = ["INTERPRETED", "compact", "count", "observe", "pack", "summarize"]


@triton.jit
def _taken(place, share, b, lane, there, count):
    """Which nodes of a request are verified: those placed within its share."""
    return (
        tl.load(place + b * count + lane, mask=there, other=2147483647) < tl.load(share + b)
    ) & there


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
        held = _taken(place_at, share, b, lane, lane < count, count)
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


@triton.jit(do_not_specialize=["count", "depth", "row"])
def _foresee(
    gain, score, place_at, share, outlook, expected, count, depth, row,
    COSTS: tl.constexpr, ENDS: tl.constexpr, BINS: tl.constexpr, SKIP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One request's nodes of one layer by probability, and what of it is selected."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = d * 0, d * 0
    for layer in tl.static_range(len(ENDS) - 1):
        begin, end = (
            tl.where(d == layer, ENDS[layer], begin),
            tl.where(d == layer, ENDS[layer + 1], end),
        )
    lane, total = tl.arange(0, BINS), tl.zeros([PIECE], tl.float32)
    tally = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, PIECE):
        at = start + tl.arange(0, PIECE)
        inside = at < end
        if COSTS:
            chance = (
                ONE
                - tl.minimum(
                    tl.load(gain + b * count + at, mask=inside, other=1 << 24).to(tl.float32), ONE
                )
            ) / ONE
        else:
            chance = tl.load(gain + b * count + at, mask=inside, other=0.0)
        place = tl.math.sqrt_rn(chance) * (BINS + SKIP)
        counted = (
            inside
            & (tl.load(score + b * row + at, mask=inside, other=DEAD) > DEAD)
            & (place >= SKIP)
        )
        bins = tl.minimum(place.to(tl.int32) - SKIP, BINS - 1)
        tally += tl.sum(((bins[:, None] == lane[None, :]) & counted[:, None]).to(tl.int32), 0)
        total += tl.where(_taken(place_at, share, b, at, inside, count), chance, 0.0)
    tl.store(outlook + (b * depth + d) * BINS + lane, tally.to(tl.float32))
    tl.store(expected + b * depth + d, tl.sum(total, 0))


@triton.jit
def _drafts(lengths, beyond, b, there, CUT: tl.constexpr):
    """Tokens that some requests emitted, and their accepted drafts: where both are as many, what is deeper was not judged."""
    emitted = tl.load(lengths + b, mask=there, other=0)
    right = tl.maximum(emitted - 1, 0)
    if CUT:
        right += (tl.load(beyond + b, mask=there, other=-1) >= 0).to(tl.int64)
    return emitted, right


@triton.jit
def _seen(
    slots,
    status,
    lengths,
    beyond,
    more_expected,
    b,
    batch,
    d,
    depth,
    drafted,
    CUT: tl.constexpr,
    FORESEES: tl.constexpr,
):
    """Of some requests and one depth: whether it counts, was accepted, how far it was expected to be, was judged; who ran; the slot."""
    there = b < batch
    emitted, right = _drafts(lengths, beyond, b, there, CUT)
    judged = (emitted > 0) & ((right < emitted) | (right > d))
    stopped = tl.load(status + b, mask=there, other=0) != 0
    reached = b * 0 + d < drafted
    seen = judged & (reached | (stopped & (b * 0 + drafted > 0)))
    taken = reached & (right > d)
    likely = tl.zeros_like(seen.to(tl.float32))
    if FORESEES:
        likely = tl.load(
            more_expected + b.to(tl.int64) * depth + d, mask=judged & reached, other=0.0
        )
    return (
        seen.to(tl.float32),
        taken.to(tl.float32),
        likely,
        judged & reached,
        emitted > 0,
        tl.load(slots + b, mask=there, other=-1),
    )


@triton.jit(do_not_specialize=["batch", "places", "depth", "drafted"])
def _observe(
    slots, status, lengths, beyond, more_expected, more_outlook, drafted_at, steps, expected, accepted, outlook,
    new_steps, new_expected, new_accepted, new_outlook, batch, places, depth, drafted, keep, share,
    DEVICE: tl.constexpr, CUT: tl.constexpr, FORESEES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Some slots' sums of one depth."""
    d, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if DEVICE:
        drafted = tl.load(drafted_at)
    owner = tl.full([BLOCK], -1, tl.int32)
    all_seen, all_taken, all_expected = (
        tl.zeros([], tl.float32),
        tl.zeros([], tl.float32),
        tl.zeros([], tl.float32),
    )
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        seen, taken, likely, _inside, ran, slot = _seen(
            slots,
            status,
            lengths,
            beyond,
            more_expected,
            b,
            batch,
            d,
            depth,
            drafted,
            CUT,
            FORESEES,
        )
        own = (slot[None, :] == place[:, None]) & ran[None, :]
        owner = tl.maximum(owner, tl.max(tl.where(own, b[None, :], -1), 1))
        all_seen, all_taken, all_expected = (
            all_seen + tl.sum(seen, 0),
            all_taken + tl.sum(taken, 0),
            all_expected + tl.sum(likely, 0),
        )
    b = tl.where(owner >= 0, owner, batch)
    seen, taken, likely, judged, ran, _slot = _seen(
        slots, status, lengths, beyond, more_expected, b, batch, d, depth, drafted, CUT, FORESEES
    )
    everybody = place == places - 1
    fade = tl.where(everybody, tl.maximum(1.0 - all_seen * share, 0.0), tl.where(ran, keep, 1.0))
    at, inside = d.to(tl.int64) * places + place, place < places
    tl.store(
        new_steps + at,
        tl.load(steps + at, mask=inside, other=0.0) * fade + tl.where(everybody, all_seen, seen),
        mask=inside,
    )
    more = tl.where(everybody, all_expected, likely)
    tl.store(
        new_expected + at, tl.load(expected + at, mask=inside, other=0.0) * fade + more, mask=inside
    )
    more = tl.where(everybody, all_taken, taken)
    tl.store(
        new_accepted + at, tl.load(accepted + at, mask=inside, other=0.0) * fade + more, mask=inside
    )
    lane = tl.arange(0, BINS)
    bins = tl.zeros([BLOCK, BINS], tl.float32)
    if FORESEES:
        near = (b.to(tl.int64) * depth + d)[:, None] * BINS + lane[None, :]
        bins = tl.load(
            more_outlook + near, mask=judged[:, None] & (lane < BINS)[None, :], other=0.0
        )
        if (tl.program_id(1) == tl.num_programs(1) - 1) & (d < drafted):
            total = tl.zeros([BINS], tl.float32)
            for r in range(batch):
                said, drafts = _drafts(lengths, beyond, r, True, CUT)
                counts = (said > 0) & ((drafts < said) | (drafts > d)) & (lane < BINS)
                total += tl.load(
                    more_outlook + (tl.full([], 0, tl.int64) + r * depth + d) * BINS + lane,
                    mask=counts,
                    other=0.0,
                )
            bins = tl.where(everybody[:, None], total[None, :], bins)
    wide, whole = at[:, None] * BINS + lane[None, :], inside[:, None] & (lane < BINS)[None, :]
    tl.store(
        new_outlook + wide,
        tl.load(outlook + wide, mask=whole, other=0.0) * fade[:, None] + bins,
        mask=whole,
    )


@triton.jit(do_not_specialize=["batch", "rows", "layers"])
def _count(
    indptr, status, lengths, invalid, drafted_at, counts, new, batch, rows, layers, DEVICE: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """All counters of a step, in the order of :class:`echo.stats.StepCounts`."""
    zero = tl.zeros([], tl.int64)
    real, requests = zero, zero
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        there = b < batch
        held = tl.load(indptr + b + 1, mask=there, other=0) - tl.load(
            indptr + b, mask=there, other=0
        )
        real, requests = (
            real + tl.sum(held.to(tl.int64), 0),
            requests + tl.sum((held > 0).to(tl.int64), 0),
        )
    share = rows // tl.maximum(requests, 1)
    accepted, truncated, starved, released, more, faults, silent, unserved = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        there = b < batch
        held = tl.load(indptr + b + 1, mask=there, other=0) - tl.load(
            indptr + b, mask=there, other=0
        )
        live, reason, said = (
            held > 0,
            tl.load(status + b, mask=there, other=EMPTY),
            tl.load(lengths + b, mask=there, other=0),
        )
        accepted += tl.sum(tl.maximum(said - 1, 0), 0)
        cut = live & (reason == TRUNCATED)
        truncated, starved = (
            truncated + tl.sum(cut.to(tl.int64), 0),
            starved + tl.sum((live & (reason == STARVED)).to(tl.int64), 0),
        )
        released += tl.sum(tl.where(cut, tl.maximum(share - held, 0), 0), 0)
        more += tl.sum(tl.where(live, tl.maximum(held - share, 0), 0), 0)
        faults += tl.sum(tl.load(invalid + b, mask=there, other=0).to(tl.int64), 0)
        silent += tl.sum((live & (said == 0)).to(tl.int64), 0)
        unserved += tl.sum((there & (held == 0) & (reason != EMPTY)).to(tl.int64), 0)
    again = tl.minimum(released, tl.maximum(more - (rows - share * requests), 0))
    depth = zero + layers
    if DEVICE:
        depth = tl.load(drafted_at).to(tl.int64)
    at = tl.arange(0, 16)
    value = tl.where(at == 0, 1, 0).to(tl.int64)
    value = tl.where(at == 1, depth, value)
    value = tl.where(at == 2, requests, value)
    value = tl.where(at == 3, real, value)
    value = tl.where(at == 4, rows - real, value)
    value = tl.where(at == 5, accepted, value)
    value = tl.where(at == 6, truncated, value)
    value = tl.where(at == 7, starved, value)
    value = tl.where(at == 8, released, value)
    value = tl.where(at == 9, again, value)
    value = tl.where(at == 10, faults, value)
    value = tl.where(at == 11, silent, value)
    value = tl.where(at == 12, unserved, value)
    tl.store(new + at, tl.load(counts + at, mask=at < 13, other=0) + value, mask=at < 13)


def columns(like: Tensor, batch: int, rows: int, words: int) -> dict[str, Tensor]:
    """Empty columns of :class:`echo.PackedTree`, by name, where ``like`` is."""
    make = partial(torch.empty, device=like.device)
    return {
        "tokens": make(rows, dtype=torch.int64), "parent": make(rows, dtype=torch.int32), "depth": make(rows, dtype=torch.int32),
        "request": make(rows, dtype=torch.int32), "indptr": make(batch + 1, dtype=torch.int32),
        "mask": make(rows, words, dtype=torch.int32), "score": make(rows, dtype=torch.float32), "node": make(rows, dtype=torch.int64),
        "committed": make(rows, dtype=torch.bool),
    }  # fmt: skip


def as_selected(nodes: Tensor) -> Selected:
    """Any choice of nodes, bool [B, T], as :func:`select` says it."""
    share = torch.ones(len(nodes), dtype=torch.int32, device=nodes.device)
    return Selected((~nodes).int(), share, nodes.sum(dim=1), share)


@launch.on_its_device
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
    block, _ = launch.lanes(count)
    _pack[(batch + -(-rows // block),)](
        selected.place, selected.share, token, parent, score, as_bytes(committed), selected.counts,
        *(as_bytes(column) if name == "committed" else column for name, column in new.items()), batch, count, rows, words,
        token.stride(0), parent.stride(0), ENDS=ends(sizes), BLOCK=block, GROUP=launch.REQUESTS, num_warps=launch.warps(block),
    )  # fmt: skip
    return new


@launch.on_its_device
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
        _compact[(-(-batch * steps // launch.REQUESTS),)](
            rows.contiguous(), num_emitted.contiguous(), indptr.contiguous(), prefix_lens.contiguous(),
            rows if table is None else table.contiguous(),
            *(as_bytes(column) if name == "valid" else column for name, column in new.items()),
            batch, steps, 0 if table is None else table.shape[1], size, pad_slot_id, past_len,
            PAGED=table is not None, BLOCK=launch.REQUESTS, num_warps=launch.warps(launch.REQUESTS),
        )  # fmt: skip
    return new


@launch.on_its_device
def summarize(
    gain: Tensor, score: Tensor, selected: Selected, sizes: Sequence[int], bins: int, skip: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of each drafted layer how many scored nodes lie in each bin of sqrt(probability), and the sum over the selected.

    Args:
        gain: float32 [B, T]; or int32 [B, T], calibrated costs, which it is 1 less, in 24-bit fixed point.
        score: float32 [B, T].
        selected: as for :func:`pack`.
        sizes: nodes of each layer, together T.
        bins, skip: bins, a power of two, and how many more below them are left out; all are equal, up to 1.
        out: what to write to.

    Returns:
        float32 [B, depth, bins] and [B, depth].
    """
    (batch, count), depth = gain.shape, len(sizes) - 1
    outlook, expected = out or (
        torch.empty(batch, depth, bins, dtype=torch.float32, device=gain.device),
        torch.empty(batch, depth, dtype=torch.float32, device=gain.device),
    )
    if batch and depth:
        _foresee[(batch, depth)](
            gain.contiguous(), score, selected.place, selected.share, outlook, expected, count, expected.stride(0),
            score.stride(0), COSTS=gain.dtype == torch.int32, ENDS=ends(sizes), BINS=bins, SKIP=skip, PIECE=16, num_warps=1,
        )  # fmt: skip
    return outlook, expected


@launch.on_its_device
def observe(
    req_indices: Tensor, status: Tensor, num_emitted: Tensor, cut_row: Tensor | None, num_layers: int | Tensor, more: tuple[Tensor, Tensor] | None,
    sums: tuple[Tensor, Tensor, Tensor, Tensor], keep: float, memory: int, out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums after a step.

    Args:
        req_indices: int64 [B].
        status, num_emitted, cut_row: int8, int64 and int64 [B], of the step; None: no walk was cut.
        num_layers: layers of the step, or int32 [] on the device.
        more: expected and outlook of the step, float32 [B, depths] and [B, depths, bins], of which the first ``num_layers`` depths count;
            None where nothing is foreseen.
        sums: steps, expected and accepted, float32 [depth, slots + 1], and outlook, [depth, slots + 1, bins].
        keep: what a slot's sums keep.
        memory: steps of single requests that the sums over all requests keep; a power of two.
        out: sums to write to; those that are read will do.
    """
    depth, places, bins = sums[3].shape
    new = out or tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format) for value in sums
    )
    foresees = more is not None and (isinstance(num_layers, Tensor) or num_layers > 0)
    if depth:
        cut, step = num_emitted if cut_row is None else cut_row, sums[:2]
        if more is not None and foresees:
            step = more[0].contiguous(), more[1].contiguous()
        _observe[(depth, -(-places // 16))](
            req_indices.contiguous(), status.contiguous(), num_emitted.contiguous(), cut.contiguous(), *step,
            num_layers if isinstance(num_layers, Tensor) else num_emitted, *(value.contiguous() for value in sums), *new, len(req_indices), places,
            step[0].shape[1], 0 if isinstance(num_layers, Tensor) else num_layers, keep, 1 / memory, DEVICE=isinstance(num_layers, Tensor),
            CUT=cut_row is not None, FORESEES=foresees, BINS=bins, BLOCK=16, GROUP=64, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return new  # type: ignore[return-value]


@launch.on_its_device
def count(
    indptr: Tensor, status: Tensor, num_emitted: Tensor, invalid: Tensor, rows: int, layers: int | Tensor, counts: Tensor,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The counters after a step, int64 [13].

    Args:
        indptr, status, num_emitted, invalid: int32 [B + 1], int8, int64 and int32 [B], of the step.
        rows: N.
        layers: layers drafted, or int32 [] on the device.
        counts: int64 [13], before it.
        out: int64 [13], written to; ``counts`` itself will do.
    """
    new, on_device = torch.empty_like(counts) if out is None else out, isinstance(layers, Tensor)
    _count[(1,)](
        indptr.contiguous(), status.contiguous(), num_emitted.contiguous(), invalid.contiguous(), layers if on_device else indptr, counts, new,
        len(status), rows, 0 if on_device else layers, DEVICE=on_device, GROUP=launch.REQUESTS, num_warps=launch.warps(launch.REQUESTS),
    )  # fmt: skip
    return new
