"""The EAGLE head's layer on a GPU: what lies between its matrix products, fused with Triton.

``GraphEagle`` in torch's operations is the reference. A drafted layer is 12 launches instead of
some 35: five matrix products, and

- ``_inherit``: the parent's state and ancestors, the norm;
- ``_rotary``: the token's part of q, k and v, rotation, k and v into the cache;
- ``_attend``: the lane's text, then the node's ancestors, without a mask;
- ``_add_norm``, twice: the residual and the norm;
- ``_silu_mul``: the feed-forward layer's product;
- ``_top_k``: the k likeliest of the draft vocabulary and their log-probabilities.
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
"""Cache columns loaded at once; rows of a dot product, of which few are real: Triton's minimum."""


@triton.jit
def _norm(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS)


@triton.jit(do_not_specialize=["nodes", "layer"])
def _inherit(source, lane_stride, parent, state, normed, above, ancestors, nodes, layer,
             TEXT: tl.constexpr, ROOT: tl.constexpr, BEAM: tl.constexpr, DEPTH: tl.constexpr,
             WIDTH: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """A node starts as its parent, in layer 0 as the lane's root; text has no parent."""
    row = tl.program_id(0)
    lane, node, column = row // nodes, row % nodes, tl.arange(0, WIDTH)
    up = 0 if TEXT or ROOT else tl.load(parent + row)
    x = tl.load(source + lane * lane_stride + up * WIDTH + column)
    if not TEXT:
        tl.store(state + row * WIDTH + column, x)
        own = ancestors + (lane * BEAM + node) * DEPTH
        for each in range(layer):
            tl.store(own + each, tl.load(above + (lane * BEAM + up) * DEPTH + each))
        tl.store(own + layer, node.to(tl.int32))
    x = _norm(x.to(tl.float32), WIDTH, EPS)
    tl.store(normed + row * WIDTH + column, x.to(normed.dtype.element_ty))


@triton.jit(do_not_specialize=["token_stride", "nodes", "layer", "first", "length", "scratch"])
def _rotary(qkv, table, tokens, token_stride, cos_sin, used, num_tokens, queries, kv, lane_stride,
            nodes, layer, first, length, scratch, TEXT: tl.constexpr, WIDTH: tl.constexpr,
            SIZE: tl.constexpr):  # fmt: skip
    """q, k and v of a row: of the lane's next text, or of a node ``layer`` positions after it."""
    row = tl.program_id(0)
    lane, node = row // nodes, row % nodes
    read = tl.load(used + lane)
    token = tl.maximum(tl.load(tokens + lane * token_stride + node), 0)
    if TEXT:
        position = read + node
        fits = (node < tl.load(num_tokens + lane)) & (position < length)
        column = tl.where(fits, position, scratch)
    else:
        position, column = read + layer, first + node
    pair = tl.arange(0, WIDTH // 2)
    angle = cos_sin + position * (3 * SIZE) + pair % (SIZE // 2) * 2
    cos, sin = tl.load(angle), tl.load(angle + 1)
    for part in tl.static_range(3):
        at = part * WIDTH + 2 * pair
        of_state, of_token = qkv + row * (3 * WIDTH) + at, table + token * (3 * WIDTH) + at
        a = tl.load(of_state).to(tl.float32) + tl.load(of_token).to(tl.float32)
        b = tl.load(of_state + 1).to(tl.float32) + tl.load(of_token + 1).to(tl.float32)
        if part < 2:
            a, b = a * cos - b * sin, a * sin + b * cos
        if part == 0:
            out = queries + row * WIDTH + 2 * pair
        else:
            out = kv + lane * lane_stride + column * (2 * WIDTH) + (part - 1) * WIDTH + 2 * pair
        tl.store(out, a.to(out.dtype.element_ty))
        tl.store(out + 1, b.to(out.dtype.element_ty))


@triton.jit
def _softmax(scores, visible, values, top, total, sums):
    """One block more of an online softmax."""
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    share, less = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
    product = tl.dot(share.to(values.dtype), values, input_precision="ieee")
    return higher, total * less + tl.sum(share, 1), sums * less[:, None] + product


@triton.jit(do_not_specialize=["nodes", "layer", "text", "length"])
def _attend(queries, kv, lane_stride, used, num_tokens, ancestors, out, nodes, layer, text, length,
            TEXT: tl.constexpr, BEAM: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
            SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
            DOT: tl.constexpr):  # fmt: skip
    """One head of one lane: its nodes, or (TEXT) the last token of the text just read."""
    lane, head = tl.program_id(0), tl.program_id(1)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, SIZE)
    read = tl.load(used + lane).to(tl.int32)
    if TEXT:
        fresh = tl.load(num_tokens + lane).to(tl.int32)
        row = lane * nodes + tl.maximum(fresh - 1, 0) + query * 0
        real = query < 1
        read = tl.minimum(read + fresh, length)
    else:
        row = lane * nodes + query
        real = query < nodes
    own = row[:, None] * WIDTH + head * SIZE + dim[None, :]
    q = tl.load(queries + own, mask=real[:, None], other=0.0).to(DOT)
    base = kv + lane * lane_stride + head * SIZE
    top = tl.full([QUERIES], -1e30, tl.float32)
    total, sums = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, SIZE], tl.float32)
    for begin in range(0, read, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at = base + column[:, None] * (2 * WIDTH) + dim[None, :]
        there = (column < read)[:, None]
        k = tl.load(at, mask=there, other=0.0).to(DOT)
        v = tl.load(at + WIDTH, mask=there, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SIZE**-0.5
        top, total, sums = _softmax(scores, (column < read)[None, :], v, top, total, sums)
    if not TEXT:
        node = tl.arange(0, OWN)
        there = node < (layer + 1) * BEAM
        at = base + (text + node)[:, None] * (2 * WIDTH) + dim[None, :]
        k = tl.load(at, mask=there[:, None], other=0.0).to(DOT)
        v = tl.load(at + WIDTH, mask=there[:, None], other=0.0).to(DOT)
        chain = ancestors + (lane * BEAM + query)[:, None] * DEPTH + (node // BEAM)[None, :]
        ancestor = tl.load(chain, mask=real[:, None] & there[None, :], other=-1)
        visible = ancestor == (node % BEAM)[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SIZE**-0.5
        top, total, sums = _softmax(scores, visible, v, top, total, sums)
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    if TEXT:
        own = (lane + query * 0)[:, None] * WIDTH + head * SIZE + dim[None, :]
    tl.store(out + own, sums.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["nodes", "span"])
def _add_norm(base, add, num_tokens, state, lane_stride, normed, nodes, span, LAST: tl.constexpr,
              GUARD: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """``state = base + add`` and its norm.

    LAST: the base is that of the lane's last token; GUARD: lanes without tokens keep their state.
    """
    row = tl.program_id(0)
    lane, node, column = row // nodes, row % nodes, tl.arange(0, WIDTH)
    fresh = tl.load(num_tokens + lane) if LAST or GUARD else 1
    at = lane * span + tl.maximum(fresh - 1, 0) if LAST else row
    x = tl.load(base + at * WIDTH + column).to(tl.float32)
    x += tl.load(add + row * WIDTH + column).to(tl.float32)
    writes = (column >= 0) & (fresh > 0) if GUARD else column >= 0
    to = state + lane * lane_stride + node * WIDTH + column
    tl.store(to, x.to(state.dtype.element_ty), mask=writes)
    tl.store(normed + row * WIDTH + column, _norm(x, WIDTH, EPS).to(normed.dtype.element_ty))


@triton.jit
def _silu_mul(both, out, HIDDEN: tl.constexpr):
    """``silu(gate) * up`` of rows [gate, up]."""
    row, column = tl.program_id(0), tl.arange(0, HIDDEN)
    gate = tl.load(both + row * (2 * HIDDEN) + column).to(tl.float32)
    up = tl.load(both + row * (2 * HIDDEN) + HIDDEN + column).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * HIDDEN + column, product.to(out.dtype.element_ty))


@triton.jit
def _top_k(logits, vocab, score, active, num_tokens, tokens, log_probs, size, floor,
           TEXT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row's likeliest tokens, of equal ones the earlier; -inf on nodes that are not expanded."""
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + place, mask=place < size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    total = top + tl.log(tl.sum(tl.exp(x - top), 0))
    if TEXT:
        writes, expanded = tl.load(num_tokens + row) > 0, True
    else:
        writes, expanded = True, tl.load(active + row) & (tl.load(score + row) >= floor)
    for rank in tl.static_range(K):
        best = tl.max(x, 0)
        index = tl.min(tl.where(x == best, place, size - 1), 0)
        log_prob = tl.where(expanded, best - total, float("-inf"))
        tl.store(tokens + row * K + rank, tl.load(vocab + index), mask=writes)
        tl.store(log_probs + row * K + rank, log_prob, mask=writes)
        x = tl.where(place == index, float("-inf"), x)


def draft(head: GraphEagle, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
    """As :meth:`GraphEagle.draft`, of a frontier below the root."""
    (batch, nodes), layer = frontier.token.shape, frontier.depth - 1
    rows, kv, used = batch * nodes, head.kv, head.used
    source, parent = (head.state, frontier.parent) if layer else (head.root, frontier.token)
    state, normed, queries, attended = (kv.new_empty(rows, WIDTH) for _ in range(4))
    above, ancestors = head.ancestors[max(layer - 1, 0)], head.ancestors[layer]
    norm = {"WIDTH": WIDTH, "EPS": head.eps}
    tree = {"TEXT": False, "BEAM": head.beam, "DEPTH": head.depth}
    own = max(16, triton.next_power_of_2(head.depth * head.beam))
    _inherit[(rows,)](
        source, source.stride(0), parent.contiguous(), state, normed, above, ancestors, nodes,
        layer, ROOT=layer == 0, **tree, **norm,
    )  # fmt: skip
    _rotary[(rows,)](
        torch.mm(normed, head.qkv.T), head.table, frontier.token.contiguous(), nodes, head.cos_sin,
        used, used, queries, kv, kv.stride(0), nodes, layer, head.text + layer * head.beam,
        head.length, head.scratch, TEXT=False, WIDTH=WIDTH, SIZE=SIZE,
    )  # fmt: skip
    _attend[(batch, HEADS)](
        queries, kv, kv.stride(0), used, used, ancestors, attended, nodes, layer, head.text,
        head.length, **tree, WIDTH=WIDTH, SIZE=SIZE, BLOCK=KEYS, OWN=own, DOT=_dot_type(kv.dtype),
        QUERIES=max(QUERIES, triton.next_power_of_2(nodes)),
    )  # fmt: skip
    plain, out = {"LAST": False, "GUARD": False, **norm}, torch.mm(attended, head.out.T)
    _add_norm[(rows,)](state, out, used, state, nodes * WIDTH, normed, nodes, 1, **plain)
    down, to = _feed_forward(head, normed), head.state
    _add_norm[(rows,)](state, down, used, to, to.stride(0), normed, nodes, 1, **plain)
    tokens = torch.empty(batch, nodes, head.k, dtype=torch.int64, device=kv.device)
    log_probs = torch.empty(tokens.shape, device=kv.device)
    _choose(head, rows, normed, frontier.score, frontier.active, used, tokens, log_probs, False)
    return tokens, log_probs


def extend(
    head: GraphEagle, lanes: slice, features: Tensor, tokens: Tensor, num_tokens: Tensor
) -> None:
    """As :meth:`GraphEagle.extend`, of any adjacent lanes."""
    (batch, span), used, kv = tokens.shape, head.used[lanes], head.kv[lanes]
    rows, num_tokens = batch * span, num_tokens.contiguous()
    state = torch.mm(features.to(kv.dtype).reshape(rows, -1), head.fuse.T)
    normed, queries, none = torch.empty_like(state), torch.empty_like(state), head.ancestors
    norm = {"WIDTH": WIDTH, "EPS": head.eps}
    text = {"TEXT": True, "BEAM": head.beam, "DEPTH": head.depth}
    _inherit[(rows,)](
        state, WIDTH, tokens, state, normed, none, none, 1, 0, ROOT=False, **text, **norm
    )
    _rotary[(rows,)](
        torch.mm(normed, head.qkv.T), head.table, tokens, tokens.stride(0), head.cos_sin, used,
        num_tokens, queries, kv, kv.stride(0), span, 0, 0, head.length, head.scratch, TEXT=True,
        WIDTH=WIDTH, SIZE=SIZE,
    )  # fmt: skip
    attended, new, normed = (kv.new_empty(batch, WIDTH) for _ in range(3))
    _attend[(batch, HEADS)](
        queries, kv, kv.stride(0), used, num_tokens, none, attended, span, 0, head.text,
        head.length, **text, WIDTH=WIDTH, SIZE=SIZE, QUERIES=QUERIES, BLOCK=KEYS, OWN=16,
        DOT=_dot_type(kv.dtype),
    )  # fmt: skip
    out, last = torch.mm(attended, head.out.T), {"LAST": True, "GUARD": False, **norm}
    _add_norm[(batch,)](state, out, num_tokens, new, WIDTH, normed, 1, span, **last)
    down, guard = _feed_forward(head, normed), {"LAST": False, "GUARD": True, **norm}
    _add_norm[(batch,)](new, down, num_tokens, head.root[lanes], WIDTH, normed, 1, 1, **guard)
    to = head.tokens[lanes], head.log_probs[lanes]
    _choose(head, batch, normed, used, used, num_tokens, *to, True)
    used.add_(num_tokens).clamp_(max=head.length)


def _choose(head, rows, normed, score, active, num_tokens, tokens, log_probs, text) -> None:
    logits = torch.mm(normed, head.head.T)
    size = logits.shape[1]
    _top_k[(rows,)](
        logits, head.vocab, score.contiguous(), active.contiguous(), num_tokens, tokens, log_probs,
        size, head.floor, TEXT=text, K=head.k, BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip


def _feed_forward(head: GraphEagle, normed: Tensor) -> Tensor:
    both = torch.mm(normed, head.gate_up.T)
    product = both.new_empty(len(both), HIDDEN)
    _silu_mul[(len(both),)](both, product, HIDDEN=HIDDEN)
    return torch.mm(product, head.down.T)


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """Of matrix products. Triton's interpreter computes bfloat16 wrongly: there it is float32."""
    exact = dtype == torch.float32 or triton.knobs.runtime.interpret
    return tl.float32 if exact else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
