"""The roots of a step and the growing of a layer, one launch each, as Triton kernels: the integers of torch's operations.

The reference is what :meth:`echo.ElasticBudgetScheduler.begin` and ``grow`` do with torch. Decisions compare the bits of float32 sums, and
there is no product that a compiler could join with a sum. Requests are programs; what one must know of the others it computes by itself, so
nothing depends on the order in which they run, and no launch waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import _checks as checks
from echo.kernels import codes, tiles
from echo.kernels.codes import Status

DEAD = tl.constexpr(float("-inf"))
ROUNDING = tl.constexpr(checks.ROUNDING)
NEVER = tl.constexpr(codes.UNSELECTABLE)
ACTIVE, TRUNCATED, STARVED = (
    tl.constexpr(int(s)) for s in (Status.ACTIVE, Status.TRUNCATED, Status.STARVED)
)
FINISHED, EXHAUSTED, EMPTY = (
    tl.constexpr(int(s)) for s in (Status.FINISHED, Status.EXHAUSTED, Status.EMPTY)
)


class Roots(NamedTuple):
    """Where a step begins; ``token``, ``parent``, ``score`` and ``committed`` [B, 1] may be columns of wider buffers, of one row stride.

    Without a buffer for them, ``token`` is the caller's own tensor of roots.
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor
    alive: Tensor
    drafts: Tensor
    status: Tensor
    verify_limits: Tensor
    num_committed: Tensor
    invalid: Tensor
    num_remaining: Tensor


class Grown(NamedTuple):
    """A layer [B, M] (columns of wider buffers of one row stride, or tensors of their own), the next frontier [B, W], the state after."""

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor
    drafted: Tensor
    next_token: Tensor
    next_parent: Tensor
    next_index: Tensor
    next_score: Tensor
    next_active: Tensor
    status: Tensor
    num_committed: Tensor
    num_remaining: Tensor
    invalid: Tensor


@triton.jit(do_not_specialize=["batch", "limit", "most", "deep", "row", "stride"])
def _plant(
    roots, live, capacity, budget, token, parent, score, bought, alive, drafts, status, limits, held, invalid, left,
    batch, limit, most, deep, row, stride,
    LIVE: tl.constexpr, CAPACITY: tl.constexpr, BUDGET: tl.constexpr, COPY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All requests' roots: of the first ``limit`` that are live."""
    spent = tl.zeros([], tl.int64)
    most_rows = tl.zeros([], tl.int64) + limit
    if BUDGET:
        most_rows = tl.load(budget)
    for start in range(0, batch, GROUP):
        b = (start + tl.arange(0, GROUP)).to(tl.int64)
        there = b < batch
        lives = there
        if LIVE:
            lives = tl.load(live + b, mask=there, other=0) != 0
        room = tl.zeros([GROUP], tl.int64) + most
        if CAPACITY:
            room = tl.minimum(room, tl.maximum(tl.load(capacity + b, mask=there, other=1), 1))
        missing = tl.where(lives, STARVED, EMPTY)
        lives = lives & (spent + tl.cumsum(lives.to(tl.int32), 0) <= most_rows)
        on = lives & (room > 1) & (room * deep > 0)
        reason = tl.where(lives, tl.where(room * deep > 0, EXHAUSTED, FINISHED), missing)
        if COPY:
            tl.store(token + b * row, tl.load(roots + b * stride, mask=there, other=0), mask=there)
        tl.store(parent + b * row, tl.zeros([GROUP], tl.int64), mask=there)
        tl.store(score + b * row, tl.where(lives, 0.0, DEAD), mask=there)
        tl.store(bought + b * row, lives.to(tl.uint8), mask=there)
        tl.store(alive + b, lives.to(tl.uint8), mask=there)
        tl.store(drafts + b, on.to(tl.uint8), mask=there)
        tl.store(status + b, tl.where(on, ACTIVE, reason).to(tl.int8), mask=there)
        tl.store(limits + b, tl.where(lives, room, 0), mask=there)
        tl.store(held + b, lives.to(tl.int64), mask=there)
        tl.store(invalid + b, tl.zeros([GROUP], tl.int32), mask=there)
        spent += tl.sum(lives.to(tl.int64), 0)
    tl.store(left, most_rows - spent)


@triton.jit
def _cost(score):
    """Bits of the negated score: smaller is better; of minus infinity, the greatest."""
    return (0.0 - score).to(tl.int32, bitcast=True)


@triton.jit
def _path_score(
    above, active, log_prob, r, lane, there, k, above_row, active_row, q_row, q_node, q_child
):
    """S(v) of some candidates of some requests, whether their parents draft, and whether their log-probability is no number."""
    w = (lane // k).to(tl.int64)
    on = tl.load(active + r * active_row + w, mask=there, other=0) != 0
    base = tl.where(on, tl.load(above + r * above_row + w, mask=there, other=DEAD), DEAD)
    q = tl.load(
        log_prob + r * q_row + w * q_node + (lane - w * k) * q_child, mask=there, other=DEAD
    ).to(tl.float32)
    number = (q > DEAD) & (q <= ROUNDING)
    value = base + tl.where(number, q, DEAD)
    return tl.where(value < base, value, base), on, (q != DEAD) & (number == 0)


@triton.jit
def _passing(best, status, verdict, limit, held, r, there, tau, GATED: tl.constexpr):
    """Which requests drafted, have something to draft on and room, and passed the gate too; and the room."""
    drafted = (tl.load(status + r, mask=there, other=1) == ACTIVE) & there
    room = tl.load(limit + r, mask=there, other=0) - tl.load(held + r, mask=there, other=0)
    some = (best > DEAD) & (room > 0)
    passed = drafted & some & (best > tau)
    if GATED:
        passed = passed & (tl.load(verdict + r, mask=there, other=0) != 0)
    return drafted, some, passed, room


@triton.jit(
    do_not_specialize=[
        "batch", "k", "count", "width", "stop", "row", "above_row", "active_row", "index_row", "t_row", "t_node", "t_child", "q_row",
        "q_node", "q_child",
    ]
)  # fmt: skip
def _grow(
    above, active, index, tokens, log_prob, status, verdict, limit, held, left, invalid,
    token, parent, score, bought, drafted_at, next_token, next_parent, next_index, next_score, next_active, after, holds, remains, faults,
    batch, k, count, width, stop, tau, row, above_row, active_row, index_row, t_row, t_node, t_child, q_row, q_node, q_child,
    GATED: tl.constexpr, BUYS: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One request's layer: path scores, the gate, what it buys, its next frontier, and why it stops."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own, on, odd = _path_score(
        above, active, log_prob, b, lane, inside, k, above_row, active_row, q_row, q_node, q_child
    )
    eligible, cost = (own > DEAD) & inside, _cost(own)
    best, candidates = tl.max(tl.where(inside, own, DEAD), 0), tl.sum(eligible.to(tl.int64), 0)
    fault = (odd | (tl.broadcast_to(best, [BLOCK]) == DEAD)) & on & inside
    drafted, some, passed, room = _passing(best, status, verdict, limit, held, b, True, tau, GATED)
    at = b * row + lane
    up = (lane // k).to(tl.int64)
    mine = tl.load(
        tokens + b * t_row + up * t_node + (lane - up * k) * t_child, mask=inside, other=0
    )
    if COPY:
        tl.store(token + at, mine, mask=inside)
    tl.store(parent + at, tl.load(index + b * index_row + up, mask=inside, other=0), mask=inside)
    tl.store(score + at, own, mask=inside)
    tl.store(drafted_at + b, drafted.to(tl.uint8))
    tl.store(faults + b, tl.load(invalid + b) + tl.sum(fault.to(tl.int32), 0))
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        other_lane = start + tl.arange(0, PIECE)
        there = other_lane < count
        other, _, _ = _path_score(
            above,
            active,
            log_prob,
            b,
            other_lane,
            there,
            k,
            above_row,
            active_row,
            q_row,
            q_node,
            q_child,
        )
        theirs = _cost(tl.where(there, other, DEAD))[None, :]
        ahead = (theirs < cost[:, None]) | (
            (theirs == cost[:, None]) & (other_lane[None, :] < lane[:, None])
        )
        place += tl.sum((ahead & (theirs < NEVER)).to(tl.int32), 1)
    goes = passed
    if BUYS > 0:
        worth = _cost(best)
        wanted_by_all, before = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        for start in range(0, batch, GROUP):
            r = (start + tl.arange(0, GROUP)).to(tl.int64)
            there = r < batch
            both = there[:, None] & inside[None, :]
            layer, _, _ = _path_score(
                above,
                active,
                log_prob,
                r[:, None],
                lane[None, :],
                both,
                k,
                above_row,
                active_row,
                q_row,
                q_node,
                q_child,
            )
            layer = tl.where(both, layer, DEAD)
            top = tl.max(layer, 1)
            _, _, buys, space = _passing(top, status, verdict, limit, held, r, there, tau, GATED)
            most = tl.minimum(tl.minimum(tl.sum((layer > DEAD).to(tl.int64), 1), BUYS), space)
            wanted = tl.where(buys, most, 0)
            wanted_by_all += tl.sum(wanted, 0)
            their_worth = _cost(top)
            before += tl.sum(
                tl.where((their_worth < worth) | ((their_worth == worth) & (r < b)), wanted, 0), 0
            )
        rest = tl.maximum(tl.load(left), 0)
        granted = tl.minimum(
            tl.where(passed, tl.minimum(tl.minimum(candidates, BUYS), room), 0),
            tl.maximum(rest - before, 0),
        )
        eligible = eligible & (place < granted)
        tl.store(holds + b, tl.load(held + b) + granted)
        tl.store(remains, tl.load(left) - tl.minimum(rest, wanted_by_all), mask=b == 0)
        tl.store(bought + at, eligible.to(tl.uint8), mask=inside)
        goes = passed & (granted > 0)
    else:
        tl.store(bought + at, tl.zeros([BLOCK], tl.uint8), mask=inside)
    other_place = (
        tl.cumsum((inside & (eligible == 0)).to(tl.int32), 0) - 1 + tl.sum(eligible.to(tl.int32), 0)
    )
    kept = inside & (tl.where(eligible, place, other_place) < width)
    reason = tl.where(goes, stop, tl.where(passed, STARVED, tl.where(some, TRUNCATED, EXHAUSTED)))
    reason = tl.where(drafted, reason, tl.load(status + b).to(tl.int32))
    tl.store(after + b, reason.to(tl.int8))
    node = b * width + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(next_index + node, lane.to(tl.int64), mask=kept)
    tl.store(next_token + node, mine, mask=kept)
    tl.store(next_parent + node, up, mask=kept)
    tl.store(next_score + node, own, mask=kept)
    tl.store(next_active + node, tl.where(reason == ACTIVE, eligible.to(tl.uint8), 0), mask=kept)


def as_bytes(value: Tensor) -> Tensor:
    """Booleans as the kernels read and write them."""
    return value.view(torch.uint8)


def by_rows(value: Tensor) -> Tensor:
    """A matrix whose rows are each without gaps, however far apart they lie."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


@tiles.on_its_device
def begin(
    roots: Tensor,
    live: Tensor | None,
    verify_limits: Tensor | None,
    limit: int | Tensor,
    max_verify_tokens_per_req: int,
    deep: bool,
    out: Roots | None = None,
) -> Roots:
    """The state of a step of ``limit`` rows before its first layer.

    Args:
        roots: int64 [B].
        live: bool [B]; None: all.
        verify_limits: int64 [B], rows of a request; None: ``max_verify_tokens_per_req`` each, which bounds them.
        limit: rows, or int64 [] on the device.
        max_verify_tokens_per_req: a host int.
        deep: anything is drafted at all.
        out: buffers to write to, of the token's column too.
    """
    batch = len(roots)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape or (batch,), dtype=dtype, device=roots.device)

    new = out or Roots(
        token=roots[:, None], parent=empty(torch.int64, batch, 1), score=empty(torch.float32, batch, 1),
        committed=empty(torch.bool, batch, 1), alive=empty(torch.bool), drafts=empty(torch.bool, batch, 1), status=empty(torch.int8),
        verify_limits=empty(torch.int64), num_committed=empty(torch.int64), invalid=empty(torch.int32),
        num_remaining=torch.empty((), dtype=torch.int64, device=roots.device),
    )  # fmt: skip
    _plant[(1,)](
        roots, roots if live is None else as_bytes(live.contiguous()), roots if verify_limits is None else verify_limits.contiguous(),
        limit if isinstance(limit, Tensor) else roots, *(as_bytes(value) if value.dtype == torch.bool else value for value in new),
        batch, 0 if isinstance(limit, Tensor) else limit, max_verify_tokens_per_req, int(deep), new.parent.stride(0), roots.stride(0),
        LIVE=live is not None, CAPACITY=verify_limits is not None, BUDGET=isinstance(limit, Tensor), COPY=out is not None, GROUP=tiles.REQUESTS,
        num_warps=tiles.warps(tiles.REQUESTS),
    )  # fmt: skip
    return new


@tiles.on_its_device
def grow(
    above: Tensor, active: Tensor, index: Tensor, tokens: Tensor, log_prob: Tensor, status: Tensor, verdict: Tensor | None, verify_limits: Tensor,
    num_committed: Tensor, num_remaining: Tensor, invalid: Tensor, *, beam: int, buys: int, stop: int, tau: float, out: Grown | None = None,
) -> Grown:  # fmt: skip
    """Scores a layer, asks a threshold, buys for the requests that pass in order of confidence, and finds the next frontier.

    Args:
        above, active, index: float32, bool and int64 [B, W], of the frontier; their rows may lie apart.
        tokens, log_prob: int64 and float [B, W, k], of any strides.
        status, invalid: int8 and int32 [B].
        verdict: bool [B], a gate's; None: the threshold alone decides.
        verify_limits, num_committed: int64 [B].
        num_remaining: int64 [].
        beam: most nodes of the next frontier.
        buys: rows that a request buys, and drafts on; 0: nothing is bought, and the frontier is the best.
        stop: status of requests that go on.
        tau: a request passes while its greatest score is above; minus infinity: always.
        out: buffers to write to, of the layer's tokens too.
    """
    batch, old, k = tokens.shape
    count = old * k
    above, active, index = by_rows(above), by_rows(active), by_rows(index)
    beam = min(beam, count)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    new = out or Grown(
        token=tokens.flatten(1), parent=empty(torch.int64, batch, count), score=empty(torch.float32, batch, count),
        committed=empty(torch.bool, batch, count), drafted=empty(torch.bool, batch), next_token=empty(torch.int64, batch, beam),
        next_parent=empty(torch.int64, batch, beam), next_index=empty(torch.int64, batch, beam),
        next_score=empty(torch.float32, batch, beam), next_active=empty(torch.bool, batch, beam), status=torch.empty_like(status),
        num_committed=torch.empty_like(num_committed) if buys else num_committed, num_remaining=torch.empty_like(num_remaining) if buys else num_remaining, invalid=torch.empty_like(invalid),
    )  # fmt: skip
    block, piece = tiles.lanes(count)
    if batch:
        _grow[(batch,)](
            above, as_bytes(active), index, tokens, log_prob, status, status if verdict is None else as_bytes(verdict.contiguous()), verify_limits,
            num_committed, num_remaining, invalid, *(as_bytes(value) if value.dtype == torch.bool else value for value in new), batch, k, count, beam, stop,
            tau, new.parent.stride(0), above.stride(0), active.stride(0), index.stride(0), *tokens.stride(), *log_prob.stride(),
            GATED=verdict is not None, BUYS=buys, COPY=out is not None, BLOCK=block, PIECE=piece, GROUP=tiles.others(block),
            num_warps=tiles.warps(tiles.others(block) * block if buys else block),
        )  # fmt: skip
    elif buys:
        new.num_remaining.copy_(num_remaining)
    return new
