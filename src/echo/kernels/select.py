"""What nodes cost, and the selection of the cheapest of them over the batch, as Triton kernels.

The references are :meth:`echo.GlobalRank.cost` and :func:`echo.budget.rules.select_cheapest`.
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
from echo.kernels.grow import DEAD, NEVER, as_bytes, by_rows

NOWHERE = tl.constexpr(1 << 62)
BINS, PER_NAT = tl.constexpr(codes.TABLE_BINS), tl.constexpr(float(codes.BINS_PER_NAT))
LEVELS = tl.constexpr(128)
"""More than there are depths: cost * LEVELS + depth is one number, below 2^38."""
KEY_BITS = 38
"""Bits of a key."""
NEVER_PLACED = 2147483647


class Selected(NamedTuple):
    """What a step verifies: of each request the nodes whose ``place`` is below its ``share``; that of committed nodes is -1.

    ``place`` int32 [B, T]; ``share`` int32 [B]; ``counts`` int64 [B], nodes of each request in all; ``key`` int64 [B, most] is scratch.
    """

    place: Tensor
    share: Tensor
    counts: Tensor
    key: Tensor


@triton.jit
def layout(lane, ENDS: tl.constexpr):
    """Each node's depth, and where the layer above its own begins."""
    depth, above = tl.zeros_like(lane), tl.zeros_like(lane)
    for d in tl.static_range(len(ENDS) - 1):
        deeper = lane >= ENDS[d]
        depth = tl.where(deeper, d + 1, depth)
        above = tl.where(deeper, ENDS[d - 1] if d > 0 else 0, above)
    return depth, above


@triton.jit
def taken(place, share, b, lane, there, count):
    """Which nodes of a request are verified: those placed within its share."""
    return (
        tl.load(place + b * count + lane, mask=there, other=2147483647) < tl.load(share + b)
    ) & there


@triton.jit(do_not_specialize=["count", "rows", "score_row", "parent_row"])
def _chance(
    score, parent, table, cost, count, rows, score_row, parent_row, TABLE: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One request's costs: bits of its scores, or of a table of costs the greatest on each node's path."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, node = lane < count, lane
    value = 0.0 - tl.load(score + b * score_row + lane, mask=inside, other=DEAD)
    most = value.to(tl.int32, bitcast=True)
    if TABLE:
        most = tl.zeros([BLOCK], tl.int32)
        for _ in range(len(ENDS)):
            depth, above = layout(node, ENDS)
            own = 0.0 - tl.load(score + b * score_row + node, mask=inside, other=0.0)
            place = (
                tl.minimum(own * PER_NAT, BINS - 1.0).to(tl.int32)
                + tl.minimum(depth, rows - 1) * BINS
            )
            most = tl.maximum(most, tl.load(table + place, mask=inside, other=0))
            node = tl.where(
                depth > 0,
                above + tl.load(parent + b * parent_row + node, mask=inside, other=0).to(tl.int32),
                0,
            )
    tl.store(cost + b * count + lane, tl.where(value == float("inf"), NEVER, most), mask=inside)


@triton.jit
def _costs(cost, row, lane, there, SCORES: tl.constexpr):
    """Costs of some nodes of a request: as they are, or bits of negated scores."""
    if SCORES:
        value = (0.0 - tl.load(cost + row + lane, mask=there, other=DEAD)).to(
            tl.int32, bitcast=True
        )
    else:
        value = tl.load(cost + row + lane, mask=there, other=NEVER)
    return value


@triton.jit(do_not_specialize=["count", "most", "total", "extra", "cost_row", "row"])
def _rank(
    cost, bought, limit, held, key, place, count, most, total, extra, cost_row, row,
    SCORES: tl.constexpr, HELD: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One request's uncommitted nodes in order, as many as it may have."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    own = _costs(cost, b * cost_row, lane, inside, SCORES)
    bought_already = tl.load(bought + b * row + lane, mask=inside, other=0) != 0
    able = inside & (own < NEVER) & (bought_already == 0)
    mine = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, PIECE):
        at = start + tl.arange(0, PIECE)
        other = _costs(cost, b * cost_row, at, at < count, SCORES)
        free = (other < NEVER) & (tl.load(bought + b * row + at, mask=at < count, other=1) == 0)
        ahead = (other[None, :] < own[:, None]) | (
            (other[None, :] == own[:, None]) & (at[None, :] < lane[:, None])
        )
        mine += tl.sum((ahead & free[None, :]).to(tl.int32), 1)
    room = tl.minimum(tl.load(limit + b), total)
    if HELD:
        room = tl.minimum(room - tl.load(held + b), extra)
    bound = tl.minimum(tl.minimum(room, most), tl.sum(able.to(tl.int64), 0))
    able = able & (mine < bound)
    depth, _ = layout(lane, ENDS)
    tl.store(key + b * most + mine, own.to(tl.int64) * LEVELS + depth, mask=able)
    tail = tl.arange(0, MOST)
    tl.store(
        key + b * most + tail,
        tl.full([MOST], NOWHERE, tl.int64),
        mask=(tail >= bound) & (tail < most),
    )
    tl.store(
        place + b * count + lane,
        tl.where(bought_already, -1, tl.where(able, mine, 2147483647)),
        mask=inside,
    )


@triton.jit
def _below(key, r, there, most, bound, STEPS: tl.constexpr):
    """How many of each request's ascending keys are below each bound."""
    low = (r * 0 + bound * 0).to(tl.int32)
    high = low + most
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(key + r * most + middle, mask=there & (low < high), other=NOWHERE) < bound
        low, high = tl.where(less & (low < high), middle + 1, low), tl.where(less, high, middle)
    return tl.where(there, low, 0)


@triton.jit(do_not_specialize=["batch", "most", "rows"])
def _allot(
    key, left, held, share, counts, batch, most, rows,
    HELD: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """How many nodes each request gets: the cutoff, a few bits a round from the top, then its ties in order of requests."""
    r = tl.arange(0, GROUP).to(tl.int64)
    there = r < batch
    goal = tl.minimum(tl.load(left), rows)
    cutoff = tl.zeros([], tl.int64)
    digit = (tl.arange(0, DIGITS) + (1 if BITS == 1 else 0)).to(
        tl.int64
    )  # of one bit, 1 alone is asked for
    for turn in range(ROUNDS):
        shift = BITS * (ROUNDS - 1 - turn)
        raised = cutoff + (digit << shift)
        fewer = (
            tl.sum(_below(key, r[:, None], there[:, None], most, raised[None, :], STEPS), 0) < goal
        )
        cutoff += tl.sum((fewer & (digit > 0)).to(tl.int64), 0) << shift
    below = _below(key, r, there, most, cutoff, STEPS)
    ties = _below(key, r, there, most, cutoff + 1, STEPS) - below
    rest = goal - tl.sum(below, 0)
    before = tl.cumsum(ties, 0) - ties
    got = below + tl.minimum(tl.maximum(rest - before, 0), ties)
    tl.store(share + r, got.to(tl.int32), mask=there)
    if HELD:
        tl.store(counts + r, tl.load(held + r, mask=there, other=0) + got, mask=there)


def ends(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each layer ends among a request's nodes."""
    return tuple(itertools.accumulate(sizes))


@tiles.on_its_device
def path_cost(
    score: Tensor,
    parent: Tensor | None,
    table: Tensor | None,
    sizes: Sequence[int],
    out: Tensor | None = None,
) -> Tensor:
    """int32 [B, T]: the bits of each node's negated score; or, of a table of costs, the greatest entry on its path.

    Args:
        score: float32 [B, T].
        parent: int64 [B, T], index into the nodes of the layer above; needed with a table.
        table: int32 [depths + 1, 512].
        sizes: nodes of each layer, together T.
        out: int32 [B, T], written to.
    """
    batch, count = score.shape
    cost = torch.empty(batch, count, dtype=torch.int32, device=score.device) if out is None else out
    if batch:
        score, (block, _) = by_rows(score), tiles.lanes(count)
        links = (
            (cost, cost, 0, 0)
            if table is None or parent is None
            else (by_rows(parent), table, len(table), parent.stride(0))
        )
        _chance[(batch,)](
            score, *links[:2], cost, count, links[2], score.stride(0), links[3],
            TABLE=table is not None, ENDS=ends(sizes), BLOCK=block, num_warps=tiles.warps(block),
        )  # fmt: skip
    return cost


@tiles.on_its_device
def select(
    cost: Tensor, committed: Tensor, verify_limits: Tensor, num_committed: Tensor | None, num_remaining: Tensor, num_verify_tokens: int, most: int, sizes: Sequence[int],
    *, total: int = NEVER_PLACED, extra: int = NEVER_PLACED, out: Selected | None = None,
) -> Selected:  # fmt: skip
    """The cheapest uncommitted nodes of the batch: ``num_remaining`` in all, and of a request as its limits allow.

    Args:
        cost: int32 [B, T], or float32 [B, T], scores, whose negated bits it is.
        committed: bool [B, T], committed nodes.
        verify_limits: int64 [B], rows of a request; ``total`` bounds them all.
        num_committed: int64 [B], committed nodes of a request, counted against its limit; None: none is, and ``counts`` are not written.
        num_remaining: int64 [].
        num_verify_tokens: bound of ``num_remaining``.
        most: bound of what a request may get.
        sizes: nodes of each layer, together T.
        extra: more than its committed nodes that a request may get at most.
        out: buffers to write to.
    """
    batch, count = cost.shape
    new = out or Selected(
        torch.empty(batch, count, dtype=torch.int32, device=cost.device), torch.empty(batch, dtype=torch.int32, device=cost.device),
        torch.empty(batch, dtype=torch.int64, device=cost.device), torch.empty(batch, most, dtype=torch.int64, device=cost.device),
    )  # fmt: skip
    if batch:
        cost, committed, (block, piece) = by_rows(cost), by_rows(committed), tiles.lanes(count)
        group, counted = (
            tiles.power_of_two(batch),
            verify_limits if num_committed is None else num_committed,
        )
        bits = tiles.cutoff_bits(group)
        digits = 1 << bits if bits > 1 else 1
        _rank[(batch,)](
            cost, as_bytes(committed), verify_limits, counted, new.key, new.place, count, most, total, extra, cost.stride(0), committed.stride(0),
            SCORES=cost.dtype == torch.float32, HELD=num_committed is not None, ENDS=ends(sizes), BLOCK=block, PIECE=piece,
            MOST=tiles.power_of_two(most), num_warps=tiles.warps(block),
        )  # fmt: skip
        _allot[(1,)](
            new.key, num_remaining, counted, new.share, new.counts, batch, most, num_verify_tokens,
            HELD=num_committed is not None, GROUP=group, STEPS=most.bit_length(), BITS=bits, DIGITS=digits, ROUNDS=-(-KEY_BITS // bits),
            num_warps=max(1, min(32, (group << bits) // (256 if bits > 1 else 128))),
        )  # fmt: skip
    return new


def nodes(selected: Selected) -> Tensor:
    """bool [B, T]: the nodes selected, committed ones included."""
    return selected.place < selected.share[:, None]


def as_selected(nodes: Tensor) -> Selected:
    """Any choice of nodes, bool [B, T], as :func:`select` says it."""
    share = torch.ones(len(nodes), dtype=torch.int32, device=nodes.device)
    return Selected((~nodes).int(), share, nodes.sum(dim=1), share)


@tiles.on_its_device
def select_cheapest(
    cost: Tensor,
    bought: Tensor,
    cap: Tensor,
    left: Tensor,
    rows: int,
    most: int,
    sizes: Sequence[int],
) -> Tensor:
    """bool [B, T]: the cheapest uncommitted nodes of the batch, at most ``cap`` int64 [B] of a request; the others as in :func:`select`."""
    if not len(cost):
        return torch.zeros_like(bought)
    return nodes(select(cost, bought, cap.contiguous(), None, left, rows, most, sizes)) & ~bought
