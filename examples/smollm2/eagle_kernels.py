"""The EAGLE head's layer on a GPU: what lies between its matrix products, fused into Triton kernels.

``GraphEagle`` in torch's operations is the reference. A drafted layer is 12 launches instead of some 35: five matrix products, and

- ``_enter``: the parent's state and ancestors, the norm;
- ``_turn``: the token's part, the turn by position, keys and values into the cache;
- ``_attend``: the lane's text as far as it goes, then the node's own ancestors: no mask is made;
- ``_join``, twice: the sum with the state, the norm;
- ``_gate``: the feed-forward layer's product;
- ``_choose``: the k likeliest of the draft vocabulary and their log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from head import HEADS, HIDDEN, WIDTH

if TYPE_CHECKING:
    import echo
    from graph_eagle import GraphEagle

SIZE = WIDTH // HEADS
KEYS, QUERIES = 64, 16
"""Columns of the cache that are read at once; and queries, of which few are real: the least that a matrix unit takes."""


@triton.jit
def _norm(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS)


@triton.jit(do_not_specialize=["nodes", "layer"])
def _enter(source, lane_stride, parent, state, normed, seen, sees, nodes, layer, TEXT: tl.constexpr, ROOT: tl.constexpr,
           BEAM: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """A node begins as its parent or, in layer 0, as the lane's root; text has no parent."""
    row = tl.program_id(0)
    lane, node, column = row // nodes, row % nodes, tl.arange(0, WIDTH)
    above = 0 if TEXT or ROOT else tl.load(parent + row)
    x = tl.load(source + lane * lane_stride + above * WIDTH + column)
    if not TEXT:
        tl.store(state + row * WIDTH + column, x)
        mine = sees + (lane * BEAM + node) * DEPTH
        for each in range(layer):
            tl.store(mine + each, tl.load(seen + (lane * BEAM + above) * DEPTH + each))
        tl.store(mine + layer, node.to(tl.int32))
    tl.store(
        normed + row * WIDTH + column,
        _norm(x.to(tl.float32), WIDTH, EPS).to(normed.dtype.element_ty),
    )


@triton.jit(do_not_specialize=["token_stride", "nodes", "layer", "first", "length", "scratch"])
def _turn(qkv, table, tokens, token_stride, angles, used, lengths, queries, kv, lane_stride, nodes, layer, first, length, scratch,
          TEXT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Queries, keys and values of a row: of the lane's text after what is read, or of a node ``layer`` places after its end."""
    row = tl.program_id(0)
    lane, node = row // nodes, row % nodes
    read = tl.load(used + lane)
    token = tl.maximum(tl.load(tokens + lane * token_stride + node), 0)
    if TEXT:
        place = read + node
        column = tl.where((node < tl.load(lengths + lane)) & (place < length), place, scratch)
    else:
        place, column = read + layer, first + node
    pair = tl.arange(0, WIDTH // 2)
    turn = angles + place * (3 * SIZE) + pair % (SIZE // 2) * 2
    cos, sin = tl.load(turn), tl.load(turn + 1)
    for part in tl.static_range(3):
        at = part * WIDTH + 2 * pair
        a = tl.load(qkv + row * (3 * WIDTH) + at).to(tl.float32) + tl.load(
            table + token * (3 * WIDTH) + at
        ).to(tl.float32)
        b = tl.load(qkv + row * (3 * WIDTH) + at + 1).to(tl.float32) + tl.load(
            table + token * (3 * WIDTH) + at + 1
        ).to(tl.float32)
        if part < 2:
            a, b = a * cos - b * sin, a * sin + b * cos
        if part == 0:
            out = queries + row * WIDTH + 2 * pair
        else:
            out = kv + lane * lane_stride + column * (2 * WIDTH) + (part - 1) * WIDTH + 2 * pair
        tl.store(out, a.to(out.dtype.element_ty))
        tl.store(out + 1, b.to(out.dtype.element_ty))


@triton.jit
def _softmax(scores, seen, values, most, total, sums):
    """One block more of an online softmax."""
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    share, less = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
    return (
        higher,
        total * less + tl.sum(share, 1),
        sums * less[:, None] + tl.dot(share.to(values.dtype), values, input_precision="ieee"),
    )


@triton.jit(do_not_specialize=["nodes", "layer", "text", "length"])
def _attend(queries, kv, lane_stride, used, lengths, sees, out, nodes, layer, text, length, TEXT: tl.constexpr, BEAM: tl.constexpr,
            DEPTH: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
            OWN: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One head of one lane: its nodes, or the last token of its text, which is read beforehand (TEXT)."""
    lane, head = tl.program_id(0), tl.program_id(1)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, SIZE)
    read = tl.load(used + lane).to(tl.int32)
    if TEXT:
        fresh = tl.load(lengths + lane).to(tl.int32)
        row = lane * nodes + tl.maximum(fresh - 1, 0) + query * 0
        real = query < 1
        read = tl.minimum(read + fresh, length)
    else:
        row = lane * nodes + query
        real = query < nodes
    q = tl.load(
        queries + row[:, None] * WIDTH + head * SIZE + dim[None, :], mask=real[:, None], other=0.0
    ).to(DOT)
    base = kv + lane * lane_stride + head * SIZE
    most = tl.full([QUERIES], -1e30, tl.float32)
    total, sums = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, SIZE], tl.float32)
    for begin in range(0, read, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at = base + column[:, None] * (2 * WIDTH) + dim[None, :]
        there = (column < read)[:, None]
        k = tl.load(at, mask=there, other=0.0).to(DOT)
        v = tl.load(at + WIDTH, mask=there, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SIZE**-0.5
        most, total, sums = _softmax(scores, (column < read)[None, :], v, most, total, sums)
    if not TEXT:
        node = tl.arange(0, OWN)
        there = node < (layer + 1) * BEAM
        at = base + (text + node)[:, None] * (2 * WIDTH) + dim[None, :]
        k = tl.load(at, mask=there[:, None], other=0.0).to(DOT)
        v = tl.load(at + WIDTH, mask=there[:, None], other=0.0).to(DOT)
        mine = sees + (lane * BEAM + query)[:, None] * DEPTH + (node // BEAM)[None, :]
        ancestor = tl.load(mine, mask=real[:, None] & there[None, :], other=-1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SIZE**-0.5
        most, total, sums = _softmax(
            scores, ancestor == (node % BEAM)[None, :], v, most, total, sums
        )
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    if TEXT:
        row = lane + query * 0
    tl.store(
        out + row[:, None] * WIDTH + head * SIZE + dim[None, :],
        sums.to(out.dtype.element_ty),
        mask=real[:, None],
    )


@triton.jit(do_not_specialize=["nodes", "span"])
def _join(base, add, lengths, state, lane_stride, normed, nodes, span, LAST: tl.constexpr, GUARD: tl.constexpr, WIDTH: tl.constexpr,
          EPS: tl.constexpr):  # fmt: skip
    """``state = base + add`` and its norm; LAST: the base is that of the lane's last token; GUARD: lanes of no length keep their state."""
    row = tl.program_id(0)
    lane, node, column = row // nodes, row % nodes, tl.arange(0, WIDTH)
    fresh = tl.load(lengths + lane) if LAST or GUARD else 1
    at = lane * span + tl.maximum(fresh - 1, 0) if LAST else row
    x = tl.load(base + at * WIDTH + column).to(tl.float32) + tl.load(add + row * WIDTH + column).to(
        tl.float32
    )
    writes = (column >= 0) & (fresh > 0) if GUARD else column >= 0
    tl.store(
        state + lane * lane_stride + node * WIDTH + column,
        x.to(state.dtype.element_ty),
        mask=writes,
    )
    tl.store(normed + row * WIDTH + column, _norm(x, WIDTH, EPS).to(normed.dtype.element_ty))


@triton.jit
def _gate(both, out, HIDDEN: tl.constexpr):
    """``silu(gate) * up`` of rows [gate, up]."""
    row, column = tl.program_id(0), tl.arange(0, HIDDEN)
    gate = tl.load(both + row * (2 * HIDDEN) + column).to(tl.float32)
    up = tl.load(both + row * (2 * HIDDEN) + HIDDEN + column).to(tl.float32)
    tl.store(
        out + row * HIDDEN + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty)
    )


@triton.jit
def _choose(logits, vocab, score, active, lengths, tokens, log_probs, size, floor, TEXT: tl.constexpr, COUNT: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """The likeliest of a row, best first, the earlier of two equals first; minus infinity on nodes that are not drafted on."""
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + place, mask=place < size, other=float("-inf")).to(tl.float32)
    most = tl.max(x, 0)
    total = most + tl.log(tl.sum(tl.exp(x - most), 0))
    if TEXT:
        writes, drafted = tl.load(lengths + row) > 0, True
    else:
        writes, drafted = True, tl.load(active + row) & (tl.load(score + row) >= floor)
    for rank in tl.static_range(COUNT):
        best = tl.max(x, 0)
        index = tl.min(tl.where(x == best, place, size - 1), 0)
        tl.store(tokens + row * COUNT + rank, tl.load(vocab + index), mask=writes)
        tl.store(
            log_probs + row * COUNT + rank,
            tl.where(drafted, best - total, float("-inf")),
            mask=writes,
        )
        x = tl.where(place == index, float("-inf"), x)


def draft(head: GraphEagle, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
    """What :meth:`GraphEagle.draft` returns for a frontier below the root."""
    (batch, nodes), layer = frontier.token.shape, frontier.depth - 1
    rows, kv, used = batch * nodes, head.kv, head.used
    source, parent = (head.state, frontier.parent) if layer else (head.root, frontier.token)
    state, normed, queries, attended = (kv.new_empty(rows, WIDTH) for _ in range(4))
    seen, sees = head.sees[max(layer - 1, 0)], head.sees[layer]
    sizes = {"WIDTH": WIDTH, "EPS": head.eps}
    tree = {"TEXT": False, "BEAM": head.beam, "DEPTH": head.depth}
    begins = source, source.stride(0), parent.contiguous(), state, normed, seen, sees, nodes, layer
    _enter[(rows,)](*begins, ROOT=layer == 0, **tree, **sizes)
    first = head.text + layer * head.beam
    _turn[(rows,)](
        torch.mm(normed, head.qkv.T), head.table, frontier.token.contiguous(), nodes, head.turns, used, used, queries, kv, kv.stride(0),
        nodes, layer, first, head.length, head.scratch, TEXT=False, WIDTH=WIDTH, SIZE=SIZE,
    )  # fmt: skip
    _attend[(batch, HEADS)](
        queries, kv, kv.stride(0), used, used, sees, attended, nodes, layer, head.text, head.length, **tree, WIDTH=WIDTH, SIZE=SIZE,
        QUERIES=max(QUERIES, triton.next_power_of_2(nodes)), BLOCK=KEYS, OWN=max(16, triton.next_power_of_2(head.depth * head.beam)),
        DOT=_products(kv.dtype),
    )  # fmt: skip
    plain = {"LAST": False, "GUARD": False, **sizes}
    _join[(rows,)](
        state, torch.mm(attended, head.out.T), used, state, nodes * WIDTH, normed, nodes, 1, **plain
    )
    down = _feed_forward(head, normed)
    _join[(rows,)](state, down, used, head.state, head.state.stride(0), normed, nodes, 1, **plain)
    tokens = torch.empty(batch, nodes, head.count, dtype=torch.int64, device=kv.device)
    log_probs = torch.empty(tokens.shape, device=kv.device)
    logits = torch.mm(normed, head.head.T)
    _choose[(rows,)](
        logits, head.vocab, frontier.score.contiguous(), frontier.active.contiguous(), used, tokens, log_probs, logits.shape[1], head.floor,
        TEXT=False, COUNT=head.count, BLOCK=triton.next_power_of_2(logits.shape[1]), num_warps=8,
    )  # fmt: skip
    return tokens, log_probs


def extend(
    head: GraphEagle, lanes: slice, features: Tensor, tokens: Tensor, lengths: Tensor
) -> None:
    """:meth:`GraphEagle.extend` of any lanes side by side."""
    (batch, span), used, kv = tokens.shape, head.used[lanes], head.kv[lanes]
    rows, lengths = batch * span, lengths.contiguous()
    state = torch.mm(features.to(kv.dtype).reshape(rows, -1), head.fuse.T)
    normed, queries = torch.empty_like(state), torch.empty_like(state)
    sizes = {"WIDTH": WIDTH, "EPS": head.eps}
    tree = {"TEXT": True, "BEAM": head.beam, "DEPTH": head.depth}
    _enter[(rows,)](
        state, WIDTH, tokens, state, normed, head.sees, head.sees, 1, 0, ROOT=False, **tree, **sizes
    )
    _turn[(rows,)](
        torch.mm(normed, head.qkv.T), head.table, tokens, tokens.stride(0), head.turns, used, lengths, queries, kv, kv.stride(0),
        span, 0, 0, head.length, head.scratch, TEXT=True, WIDTH=WIDTH, SIZE=SIZE,
    )  # fmt: skip
    attended, new, normed = (kv.new_empty(batch, WIDTH) for _ in range(3))
    _attend[(batch, HEADS)](
        queries, kv, kv.stride(0), used, lengths, head.sees, attended, span, 0, head.text, head.length, **tree,
        WIDTH=WIDTH, SIZE=SIZE, QUERIES=QUERIES, BLOCK=KEYS, OWN=16, DOT=_products(kv.dtype),
    )  # fmt: skip
    _join[(batch,)](
        state,
        torch.mm(attended, head.out.T),
        lengths,
        new,
        WIDTH,
        normed,
        1,
        span,
        LAST=True,
        GUARD=False,
        **sizes,
    )
    down, root = _feed_forward(head, normed), head.root[lanes]
    _join[(batch,)](new, down, lengths, root, WIDTH, normed, 1, 1, LAST=False, GUARD=True, **sizes)
    logits = torch.mm(normed, head.head.T)
    _choose[(batch,)](
        logits, head.vocab, used, used, lengths, head.tokens[lanes], head.log_probs[lanes], logits.shape[1], head.floor,
        TEXT=True, COUNT=head.count, BLOCK=triton.next_power_of_2(logits.shape[1]), num_warps=8,
    )  # fmt: skip
    used.add_(lengths).clamp_(max=head.length)


def _products(dtype: torch.dtype) -> tl.dtype:
    """Triton's type of the matrix products. The interpreter computes bfloat16 wrongly, so there it is float32."""
    exact = dtype == torch.float32 or triton.knobs.runtime.interpret
    return tl.float32 if exact else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _feed_forward(head: GraphEagle, normed: Tensor) -> Tensor:
    both = torch.mm(normed, head.gate_up.T)
    product = both.new_empty(len(both), HIDDEN)
    _gate[(len(both),)](both, product, HIDDEN=HIDDEN)
    return torch.mm(product, head.down.T)
