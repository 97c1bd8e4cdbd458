"""Triton kernels for a step's predictions, the history that it updates, and its counters.

The references are PyTorch's paths of :func:`echo.budget.history.summarize`,
:meth:`echo.budget.History.observe` and :meth:`echo.stats.StepStats.observe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import codes, tiles
from echo.kernels.grow import DEAD, EMPTY, STARVED, TRUNCATED
from echo.kernels.select import Selected, ends, selected

ONE = tl.constexpr(float(codes.ONE))
Sums = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=["count", "depth", "row"])
def _summarize(
    gain, score, place_at, share, histogram, expected, count, depth, row, COSTS: tl.constexpr,
    ENDS: tl.constexpr, BINS: tl.constexpr, SKIP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One request's nodes of one layer by probability, and the sum of the selected."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1)
    begin = d * 0
    end = d * 0
    for layer in tl.static_range(len(ENDS) - 1):
        begin = tl.where(d == layer, ENDS[layer], begin)
        end = tl.where(d == layer, ENDS[layer + 1], end)
    lane = tl.arange(0, BINS)
    total = tl.zeros([PIECE], tl.float32)
    tally = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, PIECE):
        at = start + tl.arange(0, PIECE)
        inside = at < end
        if COSTS:
            cost = tl.load(gain + b * count + at, mask=inside, other=1 << 24).to(tl.float32)
            probability = (ONE - tl.minimum(cost, ONE)) / ONE
        else:
            probability = tl.load(gain + b * count + at, mask=inside, other=0.0)
        place = tl.math.sqrt_rn(probability) * (BINS + SKIP)
        scored = tl.load(score + b * row + at, mask=inside, other=DEAD) > DEAD
        counted = inside & scored & (place >= SKIP)
        bins = tl.minimum(place.to(tl.int32) - SKIP, BINS - 1)
        tally += tl.sum(((bins[:, None] == lane[None, :]) & counted[:, None]).to(tl.int32), 0)
        chosen = selected(place_at, share, b, at, inside, count)
        total += tl.where(chosen, probability, 0.0)
    tl.store(histogram + (b * depth + d) * BINS + lane, tally.to(tl.float32))
    tl.store(expected + b * depth + d, tl.sum(total, 0))


@triton.jit
def _drafts(num_emitted, cut_row, b, there, CUT: tl.constexpr):
    """Emitted tokens and accepted drafts of requests; equal if deeper drafts were not judged."""
    emitted = tl.load(num_emitted + b, mask=there, other=0)
    accepted = tl.maximum(emitted - 1, 0)
    if CUT:
        accepted += (tl.load(cut_row + b, mask=there, other=-1) >= 0).to(tl.int64)
    return emitted, accepted


@triton.jit
def _judge(
    req_indices, status, num_emitted, cut_row, step_expected, b, batch, d, depth, layers,
    CUT: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Some requests at one depth: counted, accepted, expected; judged; emitted; request indices."""
    there = b < batch
    emitted, accepted = _drafts(num_emitted, cut_row, b, there, CUT)
    judged = (emitted > 0) & ((accepted < emitted) | (accepted > d))
    stopped = tl.load(status + b, mask=there, other=0) != 0
    reached = b * 0 + d < layers
    counted = judged & (reached | (stopped & (b * 0 + layers > 0)))
    taken = (reached & (accepted > d)).to(tl.float32)
    likely = tl.zeros_like(counted.to(tl.float32))
    if SUMMARY:
        near = step_expected + b.to(tl.int64) * depth + d
        likely = tl.load(near, mask=judged & reached, other=0.0)
    index = tl.load(req_indices + b, mask=there, other=-1)
    return counted.to(tl.float32), taken, likely, judged & reached, emitted > 0, index


@triton.jit(do_not_specialize=["batch", "places", "depth", "layers"])
def _observe(
    req_indices, status, num_emitted, cut_row, step_expected, step_histogram, layers_at,
    steps, expected, accepted, histogram, new_steps, new_expected, new_accepted, new_histogram,
    batch, places, depth, layers, keep, share, DEVICE: tl.constexpr, CUT: tl.constexpr,
    SUMMARY: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of some request indices at one depth; the last place sums over all requests."""
    d = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if DEVICE:
        layers = tl.load(layers_at)
    owner = tl.full([BLOCK], -1, tl.int32)
    all_counted = tl.zeros([], tl.float32)
    all_taken = tl.zeros([], tl.float32)
    all_expected = tl.zeros([], tl.float32)
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        counted, taken, likely, _judged, ran, index = _judge(
            req_indices, status, num_emitted, cut_row, step_expected, b, batch, d, depth, layers,
            CUT, SUMMARY,
        )  # fmt: skip
        own = (index[None, :] == place[:, None]) & ran[None, :]
        owner = tl.maximum(owner, tl.max(tl.where(own, b[None, :], -1), 1))
        all_counted += tl.sum(counted, 0)
        all_taken += tl.sum(taken, 0)
        all_expected += tl.sum(likely, 0)
    b = tl.where(owner >= 0, owner, batch)
    counted, taken, likely, judged, ran, _index = _judge(
        req_indices, status, num_emitted, cut_row, step_expected, b, batch, d, depth, layers,
        CUT, SUMMARY,
    )  # fmt: skip
    overall = place == places - 1
    fade = tl.where(overall, tl.maximum(1.0 - all_counted * share, 0.0), tl.where(ran, keep, 1.0))
    at = d.to(tl.int64) * places + place
    inside = place < places
    old = tl.load(steps + at, mask=inside, other=0.0)
    tl.store(new_steps + at, old * fade + tl.where(overall, all_counted, counted), mask=inside)
    old = tl.load(expected + at, mask=inside, other=0.0)
    more = tl.where(overall, all_expected, likely)
    tl.store(new_expected + at, old * fade + more, mask=inside)
    old = tl.load(accepted + at, mask=inside, other=0.0)
    more = tl.where(overall, all_taken, taken)
    tl.store(new_accepted + at, old * fade + more, mask=inside)
    lane = tl.arange(0, BINS)
    bins = tl.zeros([BLOCK, BINS], tl.float32)
    if SUMMARY:
        near = (b.to(tl.int64) * depth + d)[:, None] * BINS + lane[None, :]
        shown = judged[:, None] & (lane < BINS)[None, :]
        bins = tl.load(step_histogram + near, mask=shown, other=0.0)
        if (tl.program_id(1) == tl.num_programs(1) - 1) & (d < layers):
            total = tl.zeros([BINS], tl.float32)
            for r in range(batch):
                emitted, right = _drafts(num_emitted, cut_row, r, True, CUT)
                counts = (emitted > 0) & ((right < emitted) | (right > d)) & (lane < BINS)
                far = (tl.full([], 0, tl.int64) + r * depth + d) * BINS + lane
                total += tl.load(step_histogram + far, mask=counts, other=0.0)
            bins = tl.where(overall[:, None], total[None, :], bins)
    wide = at[:, None] * BINS + lane[None, :]
    whole = inside[:, None] & (lane < BINS)[None, :]
    sums = tl.load(histogram + wide, mask=whole, other=0.0)
    tl.store(new_histogram + wide, sums * fade[:, None] + bins, mask=whole)


@triton.jit(do_not_specialize=["batch", "rows", "layers"])
def _count(
    indptr, status, num_emitted, invalid, layers_at, counts, new, batch, rows, layers,
    DEVICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All counters of a step, in the order of :attr:`echo.stats.StepStats.counts`."""
    zero = tl.zeros([], tl.int64)
    real = zero
    requests = zero
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        there = b < batch
        begin = tl.load(indptr + b, mask=there, other=0)
        own = tl.load(indptr + b + 1, mask=there, other=0) - begin
        real += tl.sum(own.to(tl.int64), 0)
        requests += tl.sum((own > 0).to(tl.int64), 0)
    share = rows // tl.maximum(requests, 1)
    accepted = zero
    truncated = zero
    starved = zero
    released = zero
    more = zero
    faults = zero
    silent = zero
    unserved = zero
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        there = b < batch
        begin = tl.load(indptr + b, mask=there, other=0)
        own = tl.load(indptr + b + 1, mask=there, other=0) - begin
        live = own > 0
        reason = tl.load(status + b, mask=there, other=EMPTY)
        emitted = tl.load(num_emitted + b, mask=there, other=0)
        accepted += tl.sum(tl.maximum(emitted - 1, 0), 0)
        cut = live & (reason == TRUNCATED)
        truncated += tl.sum(cut.to(tl.int64), 0)
        starved += tl.sum((live & (reason == STARVED)).to(tl.int64), 0)
        released += tl.sum(tl.where(cut, tl.maximum(share - own, 0), 0), 0)
        more += tl.sum(tl.where(live, tl.maximum(own - share, 0), 0), 0)
        faults += tl.sum(tl.load(invalid + b, mask=there, other=0).to(tl.int64), 0)
        silent += tl.sum((live & (emitted == 0)).to(tl.int64), 0)
        unserved += tl.sum((there & (own == 0) & (reason != EMPTY)).to(tl.int64), 0)
    again = tl.minimum(released, tl.maximum(more - (rows - share * requests), 0))
    depth = zero + layers
    if DEVICE:
        depth = tl.load(layers_at).to(tl.int64)
    step = (
        zero + 1, depth, requests, real, rows - real, accepted, truncated, starved, released, again,
        faults, silent, unserved,
    )  # fmt: skip
    at = tl.arange(0, 16)
    value = tl.zeros([16], tl.int64)
    for i in tl.static_range(13):
        value = tl.where(at == i, step[i], value)
    tl.store(new + at, tl.load(counts + at, mask=at < 13, other=0) + value, mask=at < 13)


def summarize(
    gain: Tensor,
    score: Tensor,
    chosen: Selected,
    sizes: Sequence[int],
    bins: int,
    skip: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Count each layer's scored nodes by sqrt(probability), and sum the selected ones.

    Args:
        gain: float32 [B, T], probabilities; or int32 [B, T], calibrated costs, 1 - probability in
            24-bit fixed point.
        score: float32 [B, T].
        chosen: as for :func:`echo.kernels.pack.pack`.
        sizes: nodes of each layer, T in total.
        bins, skip: number of bins, a power of two, and of equal bins below them that are left out.
        out: buffers to write to.

    Returns:
        float32 [B, depth, bins] and [B, depth].
    """
    batch, count = gain.shape
    depth = len(sizes) - 1
    device = gain.device
    histogram, expected = out or (
        torch.empty(batch, depth, bins, dtype=torch.float32, device=device),
        torch.empty(batch, depth, dtype=torch.float32, device=device),
    )
    if batch and depth:
        tiles.launch(
            _summarize, (batch, depth),
            gain.contiguous(), score, chosen.place, chosen.share, histogram, expected, count,
            expected.stride(0), score.stride(0), COSTS=gain.dtype == torch.int32, ENDS=ends(sizes),
            BINS=bins, SKIP=skip, PIECE=16, num_warps=1,
        )  # fmt: skip
    return histogram, expected


def observe(
    req_indices: Tensor,
    status: Tensor,
    num_emitted: Tensor,
    cut_row: Tensor | None,
    num_layers: int | Tensor,
    summary: tuple[Tensor, Tensor] | None,
    sums: Sums,
    keep: float,
    memory: int,
    out: Sums | None = None,
) -> Sums:
    """Return the sums of a history after a step.

    Args:
        req_indices: int64 [B].
        status, num_emitted: int8 and int64 [B], of the step.
        cut_row: int64 [B]; None: no answer was cut.
        num_layers: drafted layers of the step, or int32 [] on the device.
        summary: expected and histogram of the step, float32 [B, depths] and [B, depths, bins], of
            which the first ``num_layers`` depths count. None: nothing was predicted.
        sums: steps, expected and accepted, float32 [depth, max_num_reqs + 1], and the histogram,
            [depth, max_num_reqs + 1, bins].
        keep: decay of a request index's sums.
        memory: request-steps that the sums over all requests remember; a power of two.
        out: sums to write to, which may be ``sums``.
    """
    depth, places, bins = sums[3].shape
    if out is None:
        made = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in sums]
        out = made[0], made[1], made[2], made[3]
    device = isinstance(num_layers, Tensor)
    layers, layers_at = (0, num_layers) if isinstance(num_layers, Tensor) else (num_layers, status)
    predicted = summary is not None and (device or layers > 0)
    if depth:
        step = sums[:2]
        if summary is not None and predicted:
            step = summary[0].contiguous(), summary[1].contiguous()
        tiles.launch(
            _observe, (depth, -(-places // 16)),
            req_indices.contiguous(), status.contiguous(), num_emitted.contiguous(),
            (num_emitted if cut_row is None else cut_row).contiguous(), *step, layers_at,
            *(value.contiguous() for value in sums), *out, len(req_indices), places,
            step[0].shape[1], layers, keep, 1 / memory, DEVICE=device, CUT=cut_row is not None,
            SUMMARY=predicted, BINS=bins, BLOCK=16, GROUP=64, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def count(
    indptr: Tensor,
    status: Tensor,
    num_emitted: Tensor,
    invalid: Tensor,
    num_rows: int,
    num_layers: int | Tensor,
    counts: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Return the counters after a step, int64 [13].

    Args:
        indptr, status, num_emitted, invalid: int32 [B + 1], int8, int64 and int32 [B], of the step.
        num_rows: N.
        num_layers: layers drafted, or int32 [] on the device.
        counts: int64 [13], before the step.
        out: int64 [13], written to, which may be ``counts``.
    """
    new = torch.empty_like(counts) if out is None else out
    device = isinstance(num_layers, Tensor)
    tiles.launch(
        _count, (1,),
        indptr.contiguous(), status.contiguous(), num_emitted.contiguous(), invalid.contiguous(),
        num_layers if device else indptr, counts, new, len(status), num_rows,
        0 if device else num_layers, DEVICE=device, GROUP=tiles.REQUESTS,
        num_warps=tiles.warps(tiles.REQUESTS),
    )  # fmt: skip
    return new
