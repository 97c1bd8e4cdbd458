"""Scoring, buying, ranking, dealing and packing, as Triton kernels: the integers of torch's operations, in a few launches.

The twins are the operations that they stand for: :meth:`echo.ElasticBudgetScheduler.grow`, :meth:`echo.GlobalRank.cost`,
:func:`echo.budget.dealing.deal` and :func:`echo.tree.packed.pack`. Decisions are comparisons of the bits of float32 sums; there is no
product that a compiler could join with a sum. Requests are programs, and what they share is counted by each, so nothing depends on the
order in which they run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import launch

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these kernels were loaded for Triton's interpreter, which runs them on the CPU."""

DEAD = tl.constexpr(float("-inf"))
NEVER = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(1 << 62)
BINS = tl.constexpr(512)
ACTIVE, TRUNCATED, STARVED, EXHAUSTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
LEVELS = tl.constexpr(128)
"""More than there are depths: cost * LEVELS + depth is one number, below 2^38."""
ROUNDS = tl.constexpr(38)


class Advance(NamedTuple):
    """What follows from a scored layer: the next frontier, and what is left."""

    index: Tensor
    token: Tensor
    parent: Tensor
    score: Tensor
    active: Tensor
    status: Tensor
    bought: Tensor | None
    held: Tensor
    left: Tensor


class Rows(NamedTuple):
    """The rows of a packed step."""

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    request: Tensor
    indptr: Tensor
    mask: Tensor
    score: Tensor
    node: Tensor
    bought: Tensor


@triton.jit
def _cost(score):
    """Bits of the negated score: smaller is better; of minus infinity, the greatest."""
    return (0.0 - score).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["width", "k", "count", "stride_b", "stride_w", "stride_k"])
def _score(
    above, active, index, log_prob, status, invalid, score, parent, bought, drafted, faults, best, candidates, width, k, count, stride_b, stride_w, stride_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One request's layer: path scores, and what of them is faulty, greatest, and selectable."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, w = lane < count, lane // k
    on = tl.load(active + b * width + w, mask=inside, other=0) != 0
    base = tl.where(on, tl.load(above + b * width + w, mask=inside, other=DEAD), DEAD)
    q = tl.load(log_prob + b * stride_b + w * stride_w + (lane - w * k) * stride_k, mask=inside, other=DEAD).to(tl.float32)
    strange = (q != q) | (q == float("inf"))
    value = base + tl.where(strange, DEAD, q)
    value = tl.where(value < base, value, base)
    top = tl.max(value, 0)
    nothing = tl.broadcast_to(top, [BLOCK]) == DEAD
    fault = (strange | (q != DEAD) | nothing) & (value == DEAD) & on & inside
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


@triton.jit
def _layout(lane, ENDS: tl.constexpr):
    """Each node's depth, and where the layer above its own begins."""
    depth, above = tl.zeros_like(lane), tl.zeros_like(lane)
    for d in tl.static_range(len(ENDS) - 1):
        deeper = lane >= ENDS[d]
        depth = tl.where(deeper, d + 1, depth)
        above = tl.where(deeper, ENDS[d - 1] if d > 0 else 0, above)
    return depth, above


@triton.jit(do_not_specialize=["count", "rows"])
def _chance(score, parent, table, cost, count, rows, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """One request's costs by a table of them: the greatest on each node's path."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, node = lane < count, lane
    dead = _cost(tl.load(score + b * count + lane, mask=inside, other=DEAD)) >= NEVER
    most = tl.zeros([BLOCK], tl.int32)
    for _ in range(len(ENDS)):
        depth, above = _layout(node, ENDS)
        own = 0.0 - tl.load(score + b * count + node, mask=inside, other=0.0)
        place = tl.minimum(own * 32.0, BINS - 1.0).to(tl.int32) + tl.minimum(depth, rows - 1) * BINS
        most = tl.maximum(most, tl.load(table + place, mask=inside, other=0))
        up = tl.load(parent + b * count + node, mask=inside, other=0).to(tl.int32)
        node = tl.where(depth > 0, above + up, 0)
    tl.store(cost + b * count + lane, tl.where(dead, NEVER, most), mask=inside)


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
    depth, _ = _layout(lane, ENDS)
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
        depth, above = _layout(lane, ENDS)
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
        page = tl.load(table + b * pages + lies // size, mask=inside & from_ok, other=0).to(tl.int64)
        home = tl.load(table + b * pages + place // size, mask=inside & to_ok, other=0).to(tl.int64)
        tl.store(source + lane, tl.where(from_ok, page * size + lies % size, dummy), mask=inside)
        tl.store(target + lane, tl.where(to_ok, home * size + place % size, dummy), mask=inside)
    else:
        tl.store(source + lane, tl.where(there, lies, 0), mask=inside)
        tl.store(target + lane, tl.where(there, place, 0), mask=inside)
    tl.store(after + b, begin + tl.load(lengths + b, mask=inside, other=0), mask=inside & (step == 0))


def _bytes(value: Tensor) -> Tensor:
    """Booleans as the kernels read and write them."""
    return value.contiguous().view(torch.uint8)


def _ends(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each layer ends among a request's nodes."""
    return tuple(itertools.accumulate(sizes))


def _block(nodes: int) -> tuple[int, int]:
    """Lanes for so many nodes, and how many of them are compared with all at once."""
    block = max(16, launch.power_of_two(nodes))
    return block, max(1, min(block, launch.COMPARED // block))


@launch.on_its_device
def score(above: Tensor, active: Tensor, index: Tensor, log_prob: Tensor, status: Tensor, invalid: Tensor) -> tuple[Tensor, ...]:
    """Path scores of a layer, and what of a frontier its candidates take over.

    Args:
        above, active, index: float32, bool and int64 [B, W], of the frontier.
        log_prob: float [B, W, k].
        status, invalid: int8 and int32 [B].

    Returns:
        score float32, parent int64 and bought (nothing is) bool [B, W * k]; drafted bool and invalid int32 [B]; and for :func:`advance` the greatest
        score, float32, and how many are finite, int32 [B].
    """
    batch, width, k = log_prob.shape
    count = width * k
    value = torch.empty(batch, count, device=above.device)
    parent, bought = torch.empty_like(value, dtype=torch.int64), torch.empty_like(value, dtype=torch.bool)
    drafted, best = active.new_empty(batch), value.new_empty(batch)
    faults, candidates = torch.empty_like(invalid), torch.empty_like(invalid)
    if batch:
        _score[(batch,)](
            above.contiguous(), _bytes(active), index.contiguous(), log_prob, status.contiguous(), invalid.contiguous(), value, parent,
            _bytes(bought), _bytes(drafted), faults, best, candidates, width, k, count, *log_prob.stride(), BLOCK=_block(count)[0], num_warps=1,
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
    block, piece = _block(count)
    if batch:
        _advance[(batch,)](
            score, tokens, best, candidates, status.contiguous(), status if verdict is None else _bytes(verdict), limit.contiguous(),
            held.contiguous(), left, *frontier, _bytes(active), after, _bytes(bought), holds, remains, batch, k, count, width, stop,
            *tokens.stride(), GATED=verdict is not None, BUYS=buys, BLOCK=block, PIECE=piece, GROUP=launch.REQUESTS,
            num_warps=launch.warps(block),
        )  # fmt: skip
    elif buys:
        remains.copy_(left)
    return Advance(*frontier, active, after, bought if buys else None, holds if buys else held, remains if buys else left)


@launch.on_its_device
def path_cost(score: Tensor, parent: Tensor, table: Tensor, sizes: Sequence[int]) -> Tensor:
    """int32 [B, T]: of each node the greatest entry on its path of a table of costs.

    Args:
        score: float32 [B, T].
        parent: int64 [B, T], index into the nodes of the layer above.
        table: int32 [depths + 1, 512].
        sizes: nodes of each layer, together T.
    """
    batch, count = score.shape
    cost = torch.empty_like(score, dtype=torch.int32)
    if batch:
        block, _ = _block(count)
        _chance[(batch,)](
            score, parent, table, cost, count, len(table), ENDS=_ends(sizes), BLOCK=block, num_warps=launch.warps(block)
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
    block, piece = _block(count)
    _rank[(batch,)](
        cost.contiguous(), _bytes(bought), cap.contiguous(), key, place, count, most, ENDS=_ends(sizes), BLOCK=block, PIECE=piece,
        MOST=launch.power_of_two(most), num_warps=launch.warps(block),
    )  # fmt: skip
    group = launch.power_of_two(batch)
    _allot[(1,)](key, left, share, batch, most, rows, GROUP=group, STEPS=most.bit_length(), num_warps=max(1, min(16, group // 32)))
    return place < share[:, None]


@launch.on_its_device
def pack(
    selected: Tensor, token: Tensor, parent: Tensor, score: Tensor, bought: Tensor, rows: int, words: int, sizes: Sequence[int]
) -> Rows:
    """The selected nodes as ``rows`` rows.

    Args:
        selected, bought: bool [B, T].
        token, parent: int64 [B, T]; parent is an index into the nodes of the layer above.
        score: float32 [B, T].
        rows: N.
        words: mask words of a row.
        sizes: nodes of each layer, together T.
    """
    batch, count = selected.shape

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=selected.device)

    out = Rows(
        token.new_empty(rows), ints(rows), ints(rows), ints(rows), ints(batch + 1), ints(rows, words),
        score.new_empty(rows), token.new_empty(rows), selected.new_empty(rows),
    )  # fmt: skip
    block, _ = _block(count)
    _pack[(batch + -(-rows // block),)](
        _bytes(selected), token, parent, score, _bytes(bought), selected.sum(dim=1), *out[:-1], _bytes(out.bought), batch, count, rows, words,
        ENDS=_ends(sizes), BLOCK=block, GROUP=launch.REQUESTS, num_warps=launch.warps(block),
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
            rows.contiguous(), lengths.contiguous(), indptr.contiguous(), context.contiguous(), rows if table is None else table.contiguous(),
            kept, longs[0], _bytes(valid), *longs[1:], after, batch, steps, 0 if table is None else table.shape[1], size, dummy,
            PAGED=table is not None, BLOCK=launch.REQUESTS, num_warps=launch.warps(launch.REQUESTS),
        )  # fmt: skip
    names = ("accept_index", "gather", "valid", "position", "source", "target", "context")
    return dict(zip(names, (kept, longs[0], valid, *longs[1:], after), strict=True))
