"""Packing, compaction and what a history learns of a step, as Triton kernels.

The references are :func:`echo.tree.packed.pack`, :func:`echo.tree.compact` and :meth:`echo.budget.History.observe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import codes, tiles
from echo.kernels.grow import DEAD, EMPTY, STARVED, TRUNCATED
from echo.kernels.select import Selected, ends, taken

ONE = tl.constexpr(float(codes.ONE))
"""Certainty in the fixed point of calibrated costs."""


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
        total += tl.where(taken(place_at, share, b, at, inside, count), chance, 0.0)
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


@tiles.on_its_device
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


@tiles.on_its_device
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


@tiles.on_its_device
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
        len(status), rows, 0 if on_device else layers, DEVICE=on_device, GROUP=tiles.REQUESTS, num_warps=tiles.warps(tiles.REQUESTS),
    )  # fmt: skip
    return new
