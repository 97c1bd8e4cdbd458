"""What nodes cost, and dealing rows to the cheapest of them, as Triton kernels.

The twins are :meth:`echo.GlobalRank.cost` and :func:`echo.budget.dealing.deal`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import launch
from echo.kernels.triton_growing import DEAD, INTERPRETED, NEVER, as_bytes

NOWHERE = tl.constexpr(1 << 62)
BINS = tl.constexpr(512)
LEVELS = tl.constexpr(128)
"""More than there are depths: cost * LEVELS + depth is one number, below 2^38."""
ROUNDS = tl.constexpr(38)

__all__ = ["INTERPRETED", "deal", "path_cost"]


@triton.jit
def layout(lane, ENDS: tl.constexpr):
    """Each node's depth, and where the layer above its own begins."""
    depth, above = tl.zeros_like(lane), tl.zeros_like(lane)
    for d in tl.static_range(len(ENDS) - 1):
        deeper = lane >= ENDS[d]
        depth = tl.where(deeper, d + 1, depth)
        above = tl.where(deeper, ENDS[d - 1] if d > 0 else 0, above)
    return depth, above


@triton.jit(do_not_specialize=["count", "rows"])
def _chance(score, parent, table, cost, count, rows, TABLE: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """One request's costs: bits of its scores, or of a table of costs the greatest on each node's path."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, node = lane < count, lane
    value = 0.0 - tl.load(score + b * count + lane, mask=inside, other=DEAD)
    most = value.to(tl.int32, bitcast=True)
    if TABLE:
        most = tl.zeros([BLOCK], tl.int32)
        for _ in range(len(ENDS)):
            depth, above = layout(node, ENDS)
            own = 0.0 - tl.load(score + b * count + node, mask=inside, other=0.0)
            place = tl.minimum(own * 32.0, BINS - 1.0).to(tl.int32) + tl.minimum(depth, rows - 1) * BINS
            most = tl.maximum(most, tl.load(table + place, mask=inside, other=0))
            node = tl.where(depth > 0, above + tl.load(parent + b * count + node, mask=inside, other=0).to(tl.int32), 0)
    tl.store(cost + b * count + lane, tl.where(value == float("inf"), NEVER, most), mask=inside)


@triton.jit(do_not_specialize=["count", "most"])
def _rank(
    cost, bought, cap, key, place, count, most, ENDS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """One request's unbought nodes in order, as many as it may have."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own = tl.load(cost + b * count + lane, mask=inside, other=NEVER)
    able = inside & (own < NEVER) & (tl.load(bought + b * count + lane, mask=inside, other=1) == 0)
    mine = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        at = start + tl.arange(0, PIECE)
        other = tl.load(cost + b * count + at, mask=at < count, other=NEVER)
        free = (other < NEVER) & (tl.load(bought + b * count + at, mask=at < count, other=1) == 0)
        ahead = (other[None, :] < own[:, None]) | ((other[None, :] == own[:, None]) & (at[None, :] < lane[:, None]))
        mine += tl.sum((ahead & free[None, :]).to(tl.int32), 1)
    limit = tl.minimum(tl.minimum(tl.load(cap + b), most), tl.sum(able.to(tl.int64), 0))
    able = able & (mine < limit)
    depth, _ = layout(lane, ENDS)
    tl.store(key + b * most + mine, own.to(tl.int64) * LEVELS + depth, mask=able)
    tail = tl.arange(0, MOST)
    tl.store(key + b * most + tail, tl.full([MOST], NOWHERE, tl.int64), mask=(tail >= limit) & (tail < most))
    tl.store(place + b * count + lane, tl.where(able, mine, 2147483647), mask=inside)


@triton.jit
def _below(key, r, there, most, bound, STEPS: tl.constexpr):
    """How many of each request's ascending keys are below a bound."""
    low, high = tl.zeros_like(r).to(tl.int32), tl.zeros_like(r).to(tl.int32) + most
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(key + r * most + middle, mask=there & (low < high), other=NOWHERE) < bound
        low, high = tl.where(less & (low < high), middle + 1, low), tl.where(less, high, middle)
    return tl.where(there, low, 0)


@triton.jit(do_not_specialize=["batch", "most", "rows"])
def _allot(key, left, share, batch, most, rows, GROUP: tl.constexpr, STEPS: tl.constexpr):
    """How many nodes each request gets: the bits of the dearest key from the top, then its ties in order of requests."""
    r = tl.arange(0, GROUP).to(tl.int64)
    there = r < batch
    goal = tl.minimum(tl.load(left), rows)
    dearest = tl.zeros([], tl.int64)
    for turn in range(ROUNDS):
        raised = dearest + (tl.full([], 1, tl.int64) << (ROUNDS - 1 - turn))
        fewer = tl.sum(_below(key, r, there, most, raised, STEPS), 0) < goal
        dearest = tl.where(fewer, raised, dearest)
    below = _below(key, r, there, most, dearest, STEPS)
    ties = _below(key, r, there, most, dearest + 1, STEPS) - below
    rest = goal - tl.sum(below, 0)
    before = tl.cumsum(ties, 0) - ties
    tl.store(share + r, below + tl.minimum(tl.maximum(rest - before, 0), ties), mask=there)


def ends(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each layer ends among a request's nodes."""
    return tuple(itertools.accumulate(sizes))


@launch.on_its_device
def path_cost(score: Tensor, parent: Tensor | None, table: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """int32 [B, T]: the bits of each node's negated score; or, of a table of costs, the greatest entry on its path.

    Args:
        score: float32 [B, T].
        parent: int64 [B, T], index into the nodes of the layer above; needed with a table.
        table: int32 [depths + 1, 512].
        sizes: nodes of each layer, together T.
    """
    batch, count = score.shape
    cost = torch.empty(batch, count, dtype=torch.int32, device=score.device)
    if batch:
        block, _ = launch.lanes(count)
        links = (score, cost, cost, 0) if table is None or parent is None else (score, parent, table, len(table))
        _chance[(batch,)](
            *links[:3], cost, count, links[3], TABLE=table is not None, ENDS=ends(sizes), BLOCK=block, num_warps=launch.warps(block)
        )  # fmt: skip
    return cost


@launch.on_its_device
def deal(cost: Tensor, bought: Tensor, cap: Tensor, left: Tensor, rows: int, most: int, sizes: Sequence[int]) -> Tensor:
    """bool [B, T]: the cheapest unbought nodes of the batch, at most ``cap`` of a request and ``left`` in all.

    Args:
        cost: int32 [B, T].
        bought: bool [B, T].
        cap: int64 [B].
        left: int64 [].
        rows: bound of ``left``.
        most: bound of ``cap``.
        sizes: nodes of each layer, together T.
    """
    batch, count = cost.shape
    if not batch:
        return torch.zeros_like(bought)
    key = torch.empty(batch, most, dtype=torch.int64, device=cost.device)
    place, share = torch.empty_like(cost), torch.empty(batch, dtype=torch.int32, device=cost.device)
    block, piece = launch.lanes(count)
    _rank[(batch,)](
        cost.contiguous(), as_bytes(bought), cap.contiguous(), key, place, count, most, ENDS=ends(sizes), BLOCK=block, PIECE=piece,
        MOST=launch.power_of_two(most), num_warps=launch.warps(block),
    )  # fmt: skip
    group = launch.power_of_two(batch)
    _allot[(1,)](key, left, share, batch, most, rows, GROUP=group, STEPS=most.bit_length(), num_warps=max(1, min(16, group // 32)))
    return place < share[:, None]
