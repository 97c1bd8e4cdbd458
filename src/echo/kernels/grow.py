"""Triton kernels for the roots of a step and for growing a layer, one launch each.

The reference is PyTorch's path of :meth:`echo.ElasticBudgetScheduler.begin` and ``grow``, with the
same integers: decisions compare the bits of float32 sums, and no product could be fused with a sum.
A program handles one request and itself computes what it needs of the others: no launch waits for
another, and nothing depends on the order in which programs run.
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
from echo.kernels.tiles import as_bytes, by_rows

DEAD = tl.constexpr(float("-inf"))
ROUNDING = tl.constexpr(checks.ROUNDING)
NEVER = tl.constexpr(codes.UNSELECTABLE)
ACTIVE = tl.constexpr(int(Status.ACTIVE))
TRUNCATED = tl.constexpr(int(Status.TRUNCATED))
STARVED = tl.constexpr(int(Status.STARVED))
FINISHED = tl.constexpr(int(Status.FINISHED))
EXHAUSTED = tl.constexpr(int(Status.EXHAUSTED))
EMPTY = tl.constexpr(int(Status.EMPTY))


class Roots(NamedTuple):
    """State before the first layer.

    ``token``, ``parent``, ``score`` and ``committed`` [B, 1] may be columns of wider buffers of
    one row stride. Without buffers, ``token`` is the caller's own tensor of roots.
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor
    drafted: Tensor
    active: Tensor
    status: Tensor
    verify_limits: Tensor
    num_committed: Tensor
    invalid: Tensor
    num_remaining: Tensor


class Grown(NamedTuple):
    """A layer [B, M] (or columns of wider buffers of one row stride), the next frontier [B, W], and
    the state after it.
    """

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


@triton.jit(do_not_specialize=["batch", "budget", "limit", "drafts", "row", "stride"])
def _begin(
    roots, live, limits, budget_at,
    token, parent, score, committed, drafted, active, status, verify_limits, num_committed, invalid,
    num_remaining, batch, budget, limit, drafts, row, stride,
    LIVE: tl.constexpr, LIMITS: tl.constexpr, BUDGET: tl.constexpr, COPY: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """All requests' roots; the first live ones, as many as the budget has tokens for, get one."""
    spent = tl.zeros([], tl.int64)
    total = tl.zeros([], tl.int64) + budget
    if BUDGET:
        total = tl.load(budget_at)
    for start in range(0, batch, GROUP):
        b = (start + tl.arange(0, GROUP)).to(tl.int64)
        there = b < batch
        lives = there
        if LIVE:
            lives = tl.load(live + b, mask=there, other=0) != 0
        own = tl.zeros([GROUP], tl.int64) + limit
        if LIMITS:
            own = tl.minimum(own, tl.maximum(tl.load(limits + b, mask=there, other=1), 1))
        missing = tl.where(lives, STARVED, EMPTY)
        lives = lives & (spent + tl.cumsum(lives.to(tl.int32), 0) <= total)
        on = lives & (own > 1) & (own * drafts > 0)
        reason = tl.where(lives, tl.where(own * drafts > 0, EXHAUSTED, FINISHED), missing)
        if COPY:
            tl.store(token + b * row, tl.load(roots + b * stride, mask=there, other=0), mask=there)
        tl.store(parent + b * row, tl.zeros([GROUP], tl.int64), mask=there)
        tl.store(score + b * row, tl.where(lives, 0.0, DEAD), mask=there)
        tl.store(committed + b * row, lives.to(tl.uint8), mask=there)
        tl.store(drafted + b, lives.to(tl.uint8), mask=there)
        tl.store(active + b, on.to(tl.uint8), mask=there)
        tl.store(status + b, tl.where(on, ACTIVE, reason).to(tl.int8), mask=there)
        tl.store(verify_limits + b, tl.where(lives, own, 0), mask=there)
        tl.store(num_committed + b, lives.to(tl.int64), mask=there)
        tl.store(invalid + b, tl.zeros([GROUP], tl.int32), mask=there)
        spent += tl.sum(lives.to(tl.int64), 0)
    tl.store(num_remaining, total - spent)


@triton.jit
def _cost(score):
    """Bits of the negated score: smaller is better, and minus infinity has the greatest."""
    return (0.0 - score).to(tl.int32, bitcast=True)


@triton.jit
def _path_score(
    above, active, log_prob, r, lane, there, k, above_row, active_row, q_row, q_node, q_child
):
    """Path scores of some candidates, whether their parents are expanded, and faulty scores."""
    w = (lane // k).to(tl.int64)
    on = tl.load(active + r * active_row + w, mask=there, other=0) != 0
    base = tl.where(on, tl.load(above + r * above_row + w, mask=there, other=DEAD), DEAD)
    q_at = log_prob + r * q_row + w * q_node + (lane - w * k) * q_child
    q = tl.load(q_at, mask=there, other=DEAD).to(tl.float32)
    number = (q > DEAD) & (q <= ROUNDING)
    value = base + tl.where(number, q, DEAD)
    return tl.where(value < base, value, base), on, (q != DEAD) & (number == 0)


@triton.jit
def _gate(
    best, status, verdict, verify_limits, num_committed, r, there, log_tau, GATED: tl.constexpr
):
    """Which requests drafted, may go on, and passed the gate; and their remaining limits."""
    drafted = (tl.load(status + r, mask=there, other=1) == ACTIVE) & there
    limit = tl.load(verify_limits + r, mask=there, other=0)
    free = limit - tl.load(num_committed + r, mask=there, other=0)
    able = (best > DEAD) & (free > 0)
    passed = drafted & able & (best > log_tau)
    if GATED:
        passed = passed & (tl.load(verdict + r, mask=there, other=0) != 0)
    return drafted, able, passed, free


@triton.jit(
    do_not_specialize=[
        "batch", "k", "count", "beam", "stop", "row", "above_row", "active_row", "index_row",
        "t_row", "t_node", "t_child", "q_row", "q_node", "q_child",
    ]
)  # fmt: skip
def _grow(
    above, active, index, tokens, log_prob, status, verdict, verify_limits, num_committed,
    num_remaining, invalid,
    token, parent, score, committed, drafted_at, next_token, next_parent, next_index, next_score,
    next_active, new_status, new_committed, new_remaining, new_invalid,
    batch, k, count, beam, stop, log_tau, row, above_row, active_row, index_row,
    t_row, t_node, t_child, q_row, q_node, q_child,
    GATED: tl.constexpr, COMMIT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One request's layer: path scores, the gate, commits, the next frontier, the new status."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own, on, odd = _path_score(
        above, active, log_prob, b, lane, inside, k, above_row, active_row, q_row, q_node, q_child
    )
    eligible = (own > DEAD) & inside
    cost = _cost(own)
    best = tl.max(tl.where(inside, own, DEAD), 0)
    candidates = tl.sum(eligible.to(tl.int64), 0)
    fault = (odd | (tl.broadcast_to(best, [BLOCK]) == DEAD)) & on & inside
    drafted, able, passed, free = _gate(
        best, status, verdict, verify_limits, num_committed, b, True, log_tau, GATED
    )
    at = b * row + lane
    up = (lane // k).to(tl.int64)
    mine_at = tokens + b * t_row + up * t_node + (lane - up * k) * t_child
    mine = tl.load(mine_at, mask=inside, other=0)
    if COPY:
        tl.store(token + at, mine, mask=inside)
    tl.store(parent + at, tl.load(index + b * index_row + up, mask=inside, other=0), mask=inside)
    tl.store(score + at, own, mask=inside)
    tl.store(drafted_at + b, drafted.to(tl.uint8))
    tl.store(new_invalid + b, tl.load(invalid + b) + tl.sum(fault.to(tl.int32), 0))
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        some = start + tl.arange(0, PIECE)
        there = some < count
        other, _, _ = _path_score(
            above, active, log_prob, b, some, there, k, above_row, active_row,
            q_row, q_node, q_child,
        )  # fmt: skip
        theirs = _cost(tl.where(there, other, DEAD))[None, :]
        tie = (theirs == cost[:, None]) & (some[None, :] < lane[:, None])
        ahead = (theirs < cost[:, None]) | tie
        place += tl.sum((ahead & (theirs < NEVER)).to(tl.int32), 1)
    goes = passed
    if COMMIT > 0:
        best_cost = _cost(best)
        wanted_by_all = tl.zeros([], tl.int64)
        before = tl.zeros([], tl.int64)
        for start in range(0, batch, GROUP):
            r = (start + tl.arange(0, GROUP)).to(tl.int64)
            there = r < batch
            both = there[:, None] & inside[None, :]
            layer, _, _ = _path_score(
                above, active, log_prob, r[:, None], lane[None, :], both,
                k, above_row, active_row, q_row, q_node, q_child,
            )  # fmt: skip
            layer = tl.where(both, layer, DEAD)
            top = tl.max(layer, 1)
            _, _, commits, spare = _gate(
                top, status, verdict, verify_limits, num_committed, r, there, log_tau, GATED
            )
            found = tl.sum((layer > DEAD).to(tl.int64), 1)
            wanted = tl.where(commits, tl.minimum(tl.minimum(found, COMMIT), spare), 0)
            wanted_by_all += tl.sum(wanted, 0)
            top_cost = _cost(top)
            sooner = (top_cost < best_cost) | ((top_cost == best_cost) & (r < b))
            before += tl.sum(tl.where(sooner, wanted, 0), 0)
        rest = tl.maximum(tl.load(num_remaining), 0)
        want = tl.where(passed, tl.minimum(tl.minimum(candidates, COMMIT), free), 0)
        granted = tl.minimum(want, tl.maximum(rest - before, 0))
        eligible = eligible & (place < granted)
        tl.store(new_committed + b, tl.load(num_committed + b) + granted)
        remains = tl.load(num_remaining) - tl.minimum(rest, wanted_by_all)
        tl.store(new_remaining, remains, mask=b == 0)
        tl.store(committed + at, eligible.to(tl.uint8), mask=inside)
        goes = passed & (granted > 0)
    else:
        tl.store(committed + at, tl.zeros([BLOCK], tl.uint8), mask=inside)
    others = tl.cumsum((inside & (eligible == 0)).to(tl.int32), 0) - 1
    place = tl.where(eligible, place, others + tl.sum(eligible.to(tl.int32), 0))
    kept = inside & (place < beam)
    reason = tl.where(goes, stop, tl.where(passed, STARVED, tl.where(able, TRUNCATED, EXHAUSTED)))
    reason = tl.where(drafted, reason, tl.load(status + b).to(tl.int32))
    tl.store(new_status + b, reason.to(tl.int8))
    node = b * beam + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(next_index + node, lane.to(tl.int64), mask=kept)
    tl.store(next_token + node, mine, mask=kept)
    tl.store(next_parent + node, up, mask=kept)
    tl.store(next_score + node, own, mask=kept)
    tl.store(next_active + node, tl.where(reason == ACTIVE, eligible.to(tl.uint8), 0), mask=kept)


def begin(
    roots: Tensor,
    live: Tensor | None,
    verify_limits: Tensor | None,
    budget: int | Tensor,
    max_verify_tokens_per_req: int,
    drafts: bool,
    out: Roots | None = None,
) -> Roots:
    """Compute the state of a step before its first layer.

    Args:
        roots: int64 [B].
        live: bool [B]. Defaults to all.
        verify_limits: int64 [B], at most ``max_verify_tokens_per_req``, to which they default.
        budget: verify tokens, or int64 [] on the device.
        max_verify_tokens_per_req: a host int.
        drafts: whether the step drafts at all.
        out: buffers to write to.
    """
    batch = len(roots)
    device = roots.device

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    new = out or Roots(
        token=roots[:, None],
        parent=empty(torch.int64, batch, 1),
        score=empty(torch.float32, batch, 1),
        committed=empty(torch.bool, batch, 1),
        drafted=empty(torch.bool, batch),
        active=empty(torch.bool, batch, 1),
        status=empty(torch.int8, batch),
        verify_limits=empty(torch.int64, batch),
        num_committed=empty(torch.int64, batch),
        invalid=empty(torch.int32, batch),
        num_remaining=empty(torch.int64),
    )
    scalar = not isinstance(budget, Tensor)
    tiles.launch(
        _begin, (1,),
        roots, roots if live is None else as_bytes(live.contiguous()),
        roots if verify_limits is None else verify_limits.contiguous(), roots if scalar else budget,
        *(as_bytes(value) if value.dtype == torch.bool else value for value in new), batch,
        budget if scalar else 0, max_verify_tokens_per_req, int(drafts),
        new.parent.stride(0), roots.stride(0), LIVE=live is not None,
        LIMITS=verify_limits is not None, BUDGET=not scalar, COPY=out is not None,
        GROUP=tiles.REQUESTS, num_warps=tiles.warps(tiles.REQUESTS),
    )  # fmt: skip
    return new


def grow(
    above: Tensor,
    active: Tensor,
    index: Tensor,
    tokens: Tensor,
    log_prob: Tensor,
    status: Tensor,
    verdict: Tensor | None,
    verify_limits: Tensor,
    num_committed: Tensor,
    num_remaining: Tensor,
    invalid: Tensor,
    *,
    beam: int,
    commit: int,
    stop: int,
    log_tau: float,
    out: Grown | None = None,
) -> Grown:
    """Score a layer, gate it, commit nodes in order of confidence, and find the next frontier.

    Args:
        above, active, index: float32, bool and int64 [B, W], of the frontier; rows may be strided.
        tokens, log_prob: int64 and float [B, W, k], of any strides.
        status, invalid: int8 and int32 [B].
        verdict: bool [B], of a custom gate. Defaults to the threshold alone.
        verify_limits, num_committed: int64 [B].
        num_remaining: int64 [].
        beam: maximum nodes of the next frontier.
        commit: maximum nodes that a request commits and expands; 0: none, and the frontier is the
            best.
        stop: new status of requests that would go on.
        log_tau: a request passes if its greatest score is above it; minus infinity: always.
        out: buffers to write to.
    """
    batch, width, k = tokens.shape
    count = width * k
    above = by_rows(above)
    active = by_rows(active)
    index = by_rows(index)
    beam = min(beam, count)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    new = out or Grown(
        token=tokens.flatten(1),
        parent=empty(torch.int64, batch, count),
        score=empty(torch.float32, batch, count),
        committed=empty(torch.bool, batch, count),
        drafted=empty(torch.bool, batch),
        next_token=empty(torch.int64, batch, beam),
        next_parent=empty(torch.int64, batch, beam),
        next_index=empty(torch.int64, batch, beam),
        next_score=empty(torch.float32, batch, beam),
        next_active=empty(torch.bool, batch, beam),
        status=torch.empty_like(status),
        num_committed=torch.empty_like(num_committed) if commit else num_committed,
        num_remaining=torch.empty_like(num_remaining) if commit else num_remaining,
        invalid=torch.empty_like(invalid),
    )
    block, piece = tiles.lanes(count)
    group = tiles.other_requests(block)
    if batch:
        tiles.launch(
            _grow, (batch,),
            above, as_bytes(active), index, tokens, log_prob, status,
            status if verdict is None else as_bytes(verdict.contiguous()), verify_limits,
            num_committed, num_remaining, invalid,
            *(as_bytes(value) if value.dtype == torch.bool else value for value in new),
            batch, k, count, beam, stop, log_tau, new.parent.stride(0), above.stride(0),
            active.stride(0), index.stride(0), *tokens.stride(), *log_prob.stride(),
            GATED=verdict is not None, COMMIT=commit, COPY=out is not None, BLOCK=block,
            PIECE=piece, GROUP=group, num_warps=tiles.warps(group * block if commit else block),
        )  # fmt: skip
    elif commit:
        new.num_remaining.copy_(num_remaining)
    return new
