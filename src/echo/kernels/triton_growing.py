"""Planting, scoring, buying and the next frontier, as Triton kernels: the integers of torch's operations, in one or two launches.

The twin is what :meth:`echo.ElasticBudgetScheduler.plant` and ``grow`` do with torch. Decisions compare the bits of float32 sums, and there
is no product that a compiler could join with a sum. Requests are programs; what one must know of the others it counts by itself, so
nothing depends on the order in which they run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import checks
from echo.kernels import launch

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these kernels were loaded for Triton's interpreter, which runs them on the CPU."""

DEAD = tl.constexpr(float("-inf"))
ROUNDING = tl.constexpr(checks.ROUNDING)
NEVER = tl.constexpr(0x7F800000)
ACTIVE, TRUNCATED, STARVED, FINISHED, EXHAUSTED, EMPTY = (tl.constexpr(status) for status in range(6))


class Roots(NamedTuple):
    """Where a step begins."""

    score: Tensor
    alive: Tensor
    drafts: Tensor
    status: Tensor
    limit: Tensor
    held: Tensor
    zero: Tensor
    invalid: Tensor
    left: Tensor


class Advance(NamedTuple):
    """What follows from a scored layer: the next frontier, and what is left."""

    place: Tensor
    token: Tensor
    parent: Tensor
    score: Tensor
    active: Tensor
    status: Tensor
    bought: Tensor | None
    held: Tensor
    left: Tensor


@triton.jit(do_not_specialize=["batch", "limit", "most", "deep"])
def _plant(
    live, capacity, score, alive, drafts, status, limits, held, zero, invalid, left, batch, limit, most, deep,
    LIVE: tl.constexpr, CAPACITY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All requests' roots."""
    spent = tl.zeros([], tl.int64)
    for start in range(0, batch, GROUP):
        b = start + tl.arange(0, GROUP)
        there = b < batch
        lives = there
        if LIVE:
            lives = tl.load(live + b, mask=there, other=0) != 0
        room = tl.zeros([GROUP], tl.int64) + most
        if CAPACITY:
            room = tl.minimum(room, tl.maximum(tl.load(capacity + b, mask=there, other=1), 1))
        on = lives & (room > 1) & (room * deep > 0)
        reason = tl.where(lives, tl.where(room * deep > 0, EXHAUSTED, FINISHED), EMPTY)
        tl.store(score + b, tl.where(lives, 0.0, DEAD), mask=there)
        tl.store(alive + b, lives.to(tl.uint8), mask=there)
        tl.store(drafts + b, on.to(tl.uint8), mask=there)
        tl.store(status + b, tl.where(on, ACTIVE, reason).to(tl.int8), mask=there)
        tl.store(limits + b, tl.where(lives, room, 0), mask=there)
        tl.store(held + b, lives.to(tl.int64), mask=there)
        tl.store(zero + b, tl.zeros([GROUP], tl.int64), mask=there)
        tl.store(invalid + b, tl.zeros([GROUP], tl.int32), mask=there)
        spent += tl.sum(lives.to(tl.int64), 0)
    tl.store(left, limit - spent)


@triton.jit
def _cost(score):
    """Bits of the negated score: smaller is better; of minus infinity, the greatest."""
    return (0.0 - score).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["width", "k", "count", "stride_b", "stride_w", "stride_k"])
def _score(
    above, active, index, log_prob, status, invalid, score, parent, bought, drafted, faults, best, candidates,
    width, k, count, stride_b, stride_w, stride_k, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request's layer: path scores, and what of them is faulty, greatest, and selectable."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, w = lane < count, lane // k
    on = tl.load(active + b * width + w, mask=inside, other=0) != 0
    base = tl.where(on, tl.load(above + b * width + w, mask=inside, other=DEAD), DEAD)
    q = tl.load(log_prob + b * stride_b + w * stride_w + (lane - w * k) * stride_k, mask=inside, other=DEAD).to(tl.float32)
    number = (q > DEAD) & (q <= ROUNDING)
    value = base + tl.where(number, q, DEAD)
    value = tl.where(value < base, value, base)
    top = tl.max(value, 0)
    nothing = tl.broadcast_to(top, [BLOCK]) == DEAD
    fault = (((q != DEAD) & (number == 0)) | nothing) & on & inside
    tl.store(score + b * count + lane, value, mask=inside)
    tl.store(parent + b * count + lane, tl.load(index + b * width + w, mask=inside, other=0), mask=inside)
    tl.store(bought + b * count + lane, tl.zeros([BLOCK], tl.uint8), mask=inside)
    tl.store(faults + b, tl.load(invalid + b) + tl.sum(fault.to(tl.int32), 0))
    tl.store(drafted + b, (tl.load(status + b) == ACTIVE).to(tl.uint8))
    tl.store(best + b, top)
    tl.store(candidates + b, tl.sum(((value > DEAD) & inside).to(tl.int32), 0))


@triton.jit
def _passing(best, status, verdict, limit, held, b, there, GATED: tl.constexpr):
    """Who drafted, who has something to draft on and room, and who passed the gate too; and the room."""
    drafted = (tl.load(status + b, mask=there, other=1) == ACTIVE) & there
    room = tl.load(limit + b, mask=there, other=0) - tl.load(held + b, mask=there, other=0)
    confidence = tl.load(best + b, mask=there, other=DEAD)
    some = (confidence > DEAD) & (room > 0)
    passed = drafted & some
    if GATED:
        passed = passed & (tl.load(verdict + b, mask=there, other=0) != 0)
    return drafted, some, passed, room, _cost(confidence)


@triton.jit(do_not_specialize=["batch", "k", "count", "width", "stop", "stride_b", "stride_w", "stride_k"])
def _advance(
    score, tokens, best, candidates, status, verdict, limit, held, left,
    index, token, parent, value, active, after, bought, holds, remains, batch, k, count, width, stop, stride_b, stride_w, stride_k,
    GATED: tl.constexpr, BUYS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One request's purchase, its next frontier and why it stops."""
    b = tl.program_id(0).to(tl.int64)
    drafted, some, passed, room, worth = _passing(best, status, verdict, limit, held, b, True, GATED)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own = tl.load(score + b * count + lane, mask=inside, other=DEAD)
    eligible, cost = (own > DEAD) & inside, _cost(own)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        at = start + tl.arange(0, PIECE)
        other = _cost(tl.load(score + b * count + at, mask=at < count, other=DEAD))[None, :]
        ahead = (other < cost[:, None]) | ((other == cost[:, None]) & (at[None, :] < lane[:, None]))
        place += tl.sum((ahead & (other < NEVER)).to(tl.int32), 1)
    on = passed
    if BUYS > 0:
        wanted_by_all, before = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        for start in range(0, batch, GROUP):
            r = (start + tl.arange(0, GROUP)).to(tl.int64)
            there = r < batch
            _, _, buys, space, theirs = _passing(best, status, verdict, limit, held, r, there, GATED)
            most = tl.minimum(tl.minimum(tl.load(candidates + r, mask=there, other=0).to(tl.int64), BUYS), space)
            wanted = tl.where(buys, most, 0)
            wanted_by_all += tl.sum(wanted, 0)
            before += tl.sum(tl.where((theirs < worth) | ((theirs == worth) & (r < b)), wanted, 0), 0)
        rest = tl.maximum(tl.load(left), 0)
        mine = tl.minimum(tl.minimum(tl.load(candidates + b).to(tl.int64), BUYS), room)
        granted = tl.minimum(tl.where(passed, mine, 0), tl.maximum(rest - before, 0))
        eligible = eligible & (place < granted)
        tl.store(bought + b * count + lane, eligible.to(tl.uint8), mask=inside)
        tl.store(holds + b, tl.load(held + b) + granted)
        tl.store(remains, tl.load(left) - tl.minimum(rest, wanted_by_all), mask=b == 0)
        on = passed & (granted > 0)
    other_place = tl.cumsum((inside & (eligible == 0)).to(tl.int32), 0) - 1 + tl.sum(eligible.to(tl.int32), 0)
    kept = inside & (tl.where(eligible, place, other_place) < width)
    reason = tl.where(on, stop, tl.where(passed, STARVED, tl.where(some, TRUNCATED, EXHAUSTED)))
    reason = tl.where(drafted, reason, tl.load(status + b).to(tl.int32))
    tl.store(after + b, reason.to(tl.int8))
    at = b * width + tl.cumsum(kept.to(tl.int32), 0) - 1
    up = lane // k
    tl.store(index + at, lane.to(tl.int64), mask=kept)
    tl.store(token + at, tl.load(tokens + b * stride_b + up * stride_w + (lane - up * k) * stride_k, mask=kept, other=0), mask=kept)
    tl.store(parent + at, up.to(tl.int64), mask=kept)
    tl.store(value + at, own, mask=kept)
    tl.store(active + at, tl.where(reason == ACTIVE, eligible.to(tl.uint8), 0), mask=kept)


def as_bytes(value: Tensor) -> Tensor:
    """Booleans as the kernels read and write them."""
    return value.contiguous().view(torch.uint8)


@launch.on_its_device
def plant(roots: Tensor, live: Tensor | None, capacity: Tensor | None, limit: int, most: int, deep: bool) -> Roots:
    """The state of a step of ``limit`` rows before its first layer.

    Args:
        roots: int64 [B]; only its shape and device count.
        live: bool [B]; None: all.
        capacity: int64 [B], rows of a request; None: ``most`` each, which bounds them.
        limit, most: host ints.
        deep: anything is drafted at all.
    """
    batch = len(roots)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(batch, dtype=dtype, device=roots.device)

    out = Roots(
        score=empty(torch.float32), alive=empty(torch.bool), drafts=empty(torch.bool), status=empty(torch.int8), limit=empty(torch.int64),
        held=empty(torch.int64), zero=empty(torch.int64), invalid=empty(torch.int32),
        left=torch.empty((), dtype=torch.int64, device=roots.device),
    )  # fmt: skip
    _plant[(1,)](
        roots if live is None else as_bytes(live), roots if capacity is None else capacity.contiguous(),
        *(as_bytes(value) if value.dtype == torch.bool else value for value in out), batch, limit, most, int(deep),
        LIVE=live is not None, CAPACITY=capacity is not None, GROUP=launch.REQUESTS, num_warps=launch.warps(launch.REQUESTS),
    )  # fmt: skip
    return out


@launch.on_its_device
def score(above: Tensor, active: Tensor, index: Tensor, log_prob: Tensor, status: Tensor, invalid: Tensor) -> tuple[Tensor, ...]:
    """Path scores of a layer, and what of a frontier its candidates take over.

    Args:
        above, active, index: float32, bool and int64 [B, W], of the frontier.
        log_prob: float [B, W, k].
        status, invalid: int8 and int32 [B].

    Returns:
        score float32, parent int64 and bought (nothing is) bool [B, W * k]; drafted bool and invalid int32 [B]; and for
        :func:`advance` the greatest score, float32, and how many are finite, int32 [B].
    """
    batch, width, k = log_prob.shape
    count = width * k
    value = torch.empty(batch, count, dtype=torch.float32, device=above.device)
    parent, bought = torch.empty_like(value, dtype=torch.int64), torch.empty_like(value, dtype=torch.bool)
    drafted, best = active.new_empty(batch), value.new_empty(batch)
    faults, candidates = torch.empty_like(invalid), torch.empty_like(invalid)
    if batch:
        _score[(batch,)](
            above.contiguous(), as_bytes(active), index.contiguous(), log_prob, status.contiguous(), invalid.contiguous(),
            value, parent, as_bytes(bought), as_bytes(drafted), faults, best, candidates, width, k, count, *log_prob.stride(),
            BLOCK=launch.lanes(count)[0], num_warps=1,
        )  # fmt: skip
    return value, parent, bought, drafted, faults, best, candidates


@launch.on_its_device
def advance(
    score: Tensor, tokens: Tensor, best: Tensor, candidates: Tensor, status: Tensor, verdict: Tensor | None, limit: Tensor, held: Tensor,
    left: Tensor, *, width: int, buys: int, stop: int,
) -> Advance:  # fmt: skip
    """What requests that pass buy of a scored layer, in order of confidence, and the next frontier.

    Args:
        score: float32 [B, W * k]; ``best`` and ``candidates`` as :func:`score` returned them.
        tokens: int64 [B, W, k].
        status: int8 [B].
        verdict: bool [B], the gate's; None: everybody passes.
        limit, held: int64 [B].
        left: int64 [].
        width: most nodes of the next frontier.
        buys: rows that a request buys, and drafts on; 0: nothing is bought, and the frontier is the best.
        stop: status of those that go on.
    """
    batch, _, k = tokens.shape
    count = score.shape[1]
    width = min(width, count)
    index = torch.empty(batch, width, dtype=torch.int64, device=score.device)
    frontier = (index, torch.empty_like(index), torch.empty_like(index), torch.empty_like(index, dtype=torch.float32))
    active = torch.empty_like(index, dtype=torch.bool)
    bought = torch.empty_like(score, dtype=torch.bool) if buys else active
    after, holds, remains = torch.empty_like(status), torch.empty_like(held), torch.empty_like(left)
    block, piece = launch.lanes(count)
    if batch:
        _advance[(batch,)](
            score, tokens, best, candidates, status.contiguous(), status if verdict is None else as_bytes(verdict), limit.contiguous(),
            held.contiguous(), left, *frontier, as_bytes(active), after, as_bytes(bought), holds, remains, batch, k, count, width, stop,
            *tokens.stride(), GATED=verdict is not None, BUYS=buys, BLOCK=block, PIECE=piece, GROUP=launch.REQUESTS,
            num_warps=launch.warps(block),
        )  # fmt: skip
    elif buys:
        remains.copy_(left)
    return Advance(*frontier, active, after, bought if buys else None, holds if buys else held, remains if buys else left)
