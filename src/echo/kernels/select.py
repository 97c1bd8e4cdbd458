"""Triton kernels for the costs of nodes, and for selecting the cheapest over the batch.

The references are PyTorch's paths of :meth:`echo.GlobalRank.cost` and
:func:`echo.budget.rules.select_cheapest`. T is the number of nodes of a request's tree, layer by
layer; ``sizes`` are the layers' sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import codes, tiles
from echo.kernels.grow import DEAD, NEVER
from echo.kernels.tiles import as_bytes, by_rows

BINS = tl.constexpr(codes.TABLE_BINS)
PER_NAT = tl.constexpr(float(codes.BINS_PER_NAT))
LEVELS = tl.constexpr(128)
"""Exceeds every depth: cost * LEVELS + depth is one key, below 2^KEY_BITS."""
KEY_BITS = 38
NO_LIMIT = (1 << 31) - 1
NO_PLACE = tl.constexpr(NO_LIMIT)


class Selected(NamedTuple):
    """The verified nodes of a step: of each request, those with a ``place`` below its ``share``.

    ``place`` int32 [B, T], -1 for committed nodes; ``share`` int32 [B]; ``counts`` int64 [B], total
    nodes of each request; ``key`` int64 [B, limit] is scratch.
    """

    place: Tensor
    share: Tensor
    counts: Tensor
    key: Tensor


@triton.jit
def selected(place, share, b, lane, there, count):
    """Which nodes of a request are verified: those with a place below its share."""
    own = tl.load(place + b * count + lane, mask=there, other=NO_PLACE)
    return (own < tl.load(share + b)) & there


@triton.jit
def layout(lane, ENDS: tl.constexpr):
    """Each node's depth, and where the layer above its own begins."""
    depth = tl.zeros_like(lane)
    above = tl.zeros_like(lane)
    for d in tl.static_range(len(ENDS) - 1):
        deeper = lane >= ENDS[d]
        depth = tl.where(deeper, d + 1, depth)
        above = tl.where(deeper, ENDS[d - 1] if d > 0 else 0, above)
    return depth, above


@triton.jit(do_not_specialize=["count", "rows", "score_row", "parent_row"])
def _path_cost(
    score, parent, table, cost, count, rows, score_row, parent_row,
    TABLE: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request's costs: bits of its scores, or the greatest table entry on each node's path."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    node = lane
    value = 0.0 - tl.load(score + b * score_row + lane, mask=inside, other=DEAD)
    most = value.to(tl.int32, bitcast=True)
    if TABLE:
        most = tl.zeros([BLOCK], tl.int32)
        for _ in range(len(ENDS)):
            depth, above = layout(node, ENDS)
            own = 0.0 - tl.load(score + b * score_row + node, mask=inside, other=0.0)
            bin = tl.minimum(own * PER_NAT, BINS - 1.0).to(tl.int32)
            place = bin + tl.minimum(depth, rows - 1) * BINS
            most = tl.maximum(most, tl.load(table + place, mask=inside, other=0))
            up = tl.load(parent + b * parent_row + node, mask=inside, other=0).to(tl.int32)
            node = tl.where(depth > 0, above + up, 0)
    tl.store(cost + b * count + lane, tl.where(value == float("inf"), NEVER, most), mask=inside)


@triton.jit
def _costs(cost, row, lane, there, SCORES: tl.constexpr):
    """Costs of some nodes of a request: as they are, or bits of negated scores."""
    if SCORES:
        score = tl.load(cost + row + lane, mask=there, other=DEAD)
        value = (0.0 - score).to(tl.int32, bitcast=True)
    else:
        value = tl.load(cost + row + lane, mask=there, other=NEVER)
    return value


@triton.jit(do_not_specialize=["count", "limit", "total", "extra", "cost_row", "row"])
def _rank(
    cost, committed, verify_limits, num_committed, key, place, share,
    count, limit, total, extra, cost_row, row,
    SCORES: tl.constexpr, COMMITTED: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Order a request's uncommitted nodes by cost, as many as it may have: its ``share``."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own = _costs(cost, b * cost_row, lane, inside, SCORES)
    is_committed = tl.load(committed + b * row + lane, mask=inside, other=0) != 0
    able = inside & (own < NEVER) & (is_committed == 0)
    mine = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        at = start + tl.arange(0, PIECE)
        other = _costs(cost, b * cost_row, at, at < count, SCORES)
        on = tl.load(committed + b * row + at, mask=at < count, other=1)
        free = (other < NEVER) & (on == 0)
        tie = (other[None, :] == own[:, None]) & (at[None, :] < lane[:, None])
        ahead = (other[None, :] < own[:, None]) | tie
        mine += tl.sum((ahead & free[None, :]).to(tl.int32), 1)
    most = tl.minimum(tl.load(verify_limits + b), total)
    if COMMITTED:
        most = tl.minimum(most - tl.load(num_committed + b), extra)
    bound = tl.minimum(tl.minimum(most, limit), tl.sum(able.to(tl.int64), 0))
    able = able & (mine < bound)
    depth, _ = layout(lane, ENDS)
    tl.store(key + b * limit + mine, own.to(tl.int64) * LEVELS + depth, mask=able)
    tl.store(share + b, tl.maximum(bound, 0).to(tl.int32))
    mine = tl.where(is_committed, -1, tl.where(able, mine, NO_PLACE))
    tl.store(place + b * count + lane, mine, mask=inside)


@triton.jit(do_not_specialize=["batch", "limit", "budget"])
def _share(
    key, num_remaining, num_committed, share, counts, batch, limit, budget,
    COMMITTED: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Cut each request's share to the nodes below the cutoff, then ties in order of requests.

    The cutoff is found a few bits a round, from the top. Each request's keys rise, and every round
    narrows where among them the cutoff may lie, so soon nothing is left to read.
    """
    r = tl.arange(0, GROUP).to(tl.int64)
    there = r < batch
    goal = tl.minimum(tl.load(num_remaining), budget)
    cutoff = tl.zeros([], tl.int64)
    digit = (tl.arange(0, DIGITS) + (1 if BITS == 1 else 0)).to(tl.int64)  # for one bit, only 1
    below = tl.zeros([GROUP], tl.int32)
    within = tl.load(share + r, mask=there, other=0)
    for turn in range(ROUNDS):
        shift = BITS * (ROUNDS - 1 - turn)
        raised = cutoff + (digit << shift)
        low = below[:, None] + tl.zeros([1, DIGITS], tl.int32)
        high = within[:, None] + tl.zeros([1, DIGITS], tl.int32)
        longest = tl.max(within - below, 0)
        while longest > 0:  # binary searches, all at once
            middle = (low + high) // 2
            searches = low < high
            own = tl.load(key + r[:, None] * limit + middle, mask=searches, other=0)
            less = searches & (own < raised[None, :])
            high = tl.where(searches & (less == 0), middle, high)
            low = tl.where(less, middle + 1, low)
            longest = longest // 2
        fewer = tl.sum(low, 0) < goal
        below = tl.maximum(below, tl.max(tl.where(fewer[None, :], low, 0), 1))
        within = tl.minimum(within, tl.min(tl.where(fewer[None, :], NO_PLACE, low), 1))
        cutoff += tl.sum((fewer & (digit > 0)).to(tl.int64), 0) << shift
    ties = within - below
    rest = goal - tl.sum(below, 0)
    before = tl.cumsum(ties, 0) - ties
    got = below + tl.minimum(tl.maximum(rest - before, 0), ties)
    tl.store(share + r, got.to(tl.int32), mask=there)
    if COMMITTED:
        tl.store(counts + r, tl.load(num_committed + r, mask=there, other=0) + got, mask=there)


def ends(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each layer ends among a request's nodes."""
    return tuple(itertools.accumulate(sizes))


def path_cost(
    score: Tensor,
    parent: Tensor | None,
    table: Tensor | None,
    sizes: Sequence[int],
    out: Tensor | None = None,
) -> Tensor:
    """int32 [B, T]: bits of each negated score, or, with a table, the greatest entry on its path.

    Args:
        score: float32 [B, T].
        parent: int64 [B, T], index into the nodes of the layer above; required with a table.
        table: int32 [depths + 1, 512], costs.
        sizes: nodes of each layer.
        out: int32 [B, T], written to.
    """
    batch, count = score.shape
    cost = torch.empty(batch, count, dtype=torch.int32, device=score.device) if out is None else out
    if not batch:
        return cost
    score = by_rows(score)
    block, _ = tiles.lanes(count)
    links = cost, cost, 0, 0
    if table is not None and parent is not None:
        parent = by_rows(parent)
        links = parent, table, len(table), parent.stride(0)
    tiles.launch(
        _path_cost, (batch,),
        score, *links[:2], cost, count, links[2], score.stride(0), links[3],
        TABLE=table is not None, ENDS=ends(sizes), BLOCK=block, num_warps=tiles.warps(block),
    )  # fmt: skip
    return cost


def select(
    cost: Tensor,
    committed: Tensor,
    verify_limits: Tensor,
    num_committed: Tensor | None,
    num_remaining: Tensor,
    num_verify_tokens: int,
    limit: int,
    sizes: Sequence[int],
    *,
    total: int = NO_LIMIT,
    extra: int = NO_LIMIT,
    out: Selected | None = None,
) -> Selected:
    """Select the ``num_remaining`` cheapest uncommitted nodes that requests' limits allow.

    Args:
        cost: int32 [B, T]; or float32 [B, T], scores, whose negated bits are the cost.
        committed: bool [B, T].
        verify_limits: int64 [B], verify tokens of a request, at most ``total``.
        num_committed: int64 [B], counted against the limits. None: 0, and no ``counts`` written.
        num_remaining: int64 [].
        num_verify_tokens: upper bound of ``num_remaining``.
        limit: maximum uncommitted nodes of a request, at most T.
        sizes: nodes of each layer.
        total, extra: maximum nodes of a request in all, and beyond its committed ones.
        out: buffers to write to.
    """
    batch, count = cost.shape
    device = cost.device
    new = out or Selected(
        place=torch.empty(batch, count, dtype=torch.int32, device=device),
        share=torch.empty(batch, dtype=torch.int32, device=device),
        counts=torch.empty(batch, dtype=torch.int64, device=device),
        key=torch.empty(batch, limit, dtype=torch.int64, device=device),
    )
    if not batch:
        return new
    cost = by_rows(cost)
    committed = by_rows(committed)
    block, piece = tiles.lanes(count)
    counted = num_committed is not None
    group = tiles.requests_at_once(batch)
    own = verify_limits if num_committed is None else num_committed
    bits = tiles.cutoff_bits(group)
    tiles.launch(
        _rank, (batch,),
        cost, as_bytes(committed), verify_limits, own, new.key, new.place, new.share,
        count, limit, total, extra, cost.stride(0), committed.stride(0),
        SCORES=cost.dtype == torch.float32, COMMITTED=counted, ENDS=ends(sizes), BLOCK=block,
        PIECE=piece, num_warps=tiles.warps(block),
    )  # fmt: skip
    tiles.launch(
        _share, (1,),
        new.key, num_remaining, own, new.share, new.counts, batch, limit, num_verify_tokens,
        COMMITTED=counted, GROUP=group, BITS=bits, DIGITS=1 << bits if bits > 1 else 1,
        ROUNDS=-(-KEY_BITS // bits),
        num_warps=max(1, min(32, (group << bits) // 128)),
    )  # fmt: skip
    return new


def as_selected(nodes: Tensor) -> Selected:
    """Convert any choice of nodes, bool [B, T], to the result of :func:`select`."""
    share = torch.ones(len(nodes), dtype=torch.int32, device=nodes.device)
    return Selected((~nodes).int(), share, nodes.sum(dim=1), share)


def select_cheapest(
    cost: Tensor,
    committed: Tensor,
    limits: Tensor,
    num_remaining: Tensor,
    num_verify_tokens: int,
    limit: int,
    sizes: Sequence[int],
) -> Tensor:
    """bool [B, T]: the cheapest uncommitted nodes, at most ``limits`` int64 [B] per request.

    Other arguments as in :func:`select`.
    """
    if not len(cost):
        return torch.zeros_like(committed)
    bounds = limits.contiguous(), None, num_remaining, num_verify_tokens
    chosen = select(cost, committed, *bounds, limit, sizes)
    return (chosen.place < chosen.share[:, None]) & ~committed
