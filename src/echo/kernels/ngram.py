"""Triton kernels for prompt lookup: match n-grams of each node, blend with a draft, append.

Texts are ring buffers of int32: token i of a request's text is in column ``i % L``. Each node of a
frontier carries its *tail*, the last ``max_ngram`` tokens of its path, continued into the text
before it, newest first, so a layer reads the texts once, B * L * 4 bytes, and keeps nothing of
their size. The reference is :mod:`echo.lookup` in PyTorch: equal proposals and match lengths, and
log-probabilities equal up to rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles

ABSENT = tl.constexpr(-2)
"""A tail's padding before the beginning of the text; equals no token."""
DEAD = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["width", "above", "max_len"])
def _propose(
    texts, lengths, requests, tails, parent, token, tails_out, proposal, run_out,
    width, above, max_len,
    ROOT: tl.constexpr, NGRAM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One node: its tail, that tail's longest match before the last token, and what followed."""
    node = tl.program_id(0).to(tl.int64)
    b = node // width
    r = tl.load(requests + b)
    end = tl.load(lengths + r)
    first = tl.maximum(end - max_len, 0)
    text = texts + r * max_len
    j = tl.arange(0, LANES)
    if ROOT:
        last = end - 1 - j
        mine = tl.load(text + last % max_len, mask=(j < NGRAM) & (last >= first), other=ABSENT)
    else:
        up = (b * above + tl.load(parent + node)) * NGRAM
        mine = tl.load(tails + up + j - 1, mask=(j > 0) & (j < NGRAM), other=ABSENT)
        mine = tl.where(j == 0, tl.load(token + node).to(tl.int32), mine)
    tl.store(tails_out + node * NGRAM + j, mine, mask=j < NGRAM)
    held = (end - first).to(tl.int32)
    origin = (first % max_len).to(tl.int32)
    best = tl.zeros([], tl.int32)
    for start in range(0, held - 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        same = at < held - 1
        run = tl.zeros([BLOCK], tl.int32)
        back = 0
        left = 1
        while (back < NGRAM) & (left > 0):  # few places match more than a token or two
            column = at - back + origin
            column -= tl.where(column >= max_len, max_len, 0)
            seen = tl.load(text + column, mask=same & (at >= back), other=-1)
            same = same & (seen == tl.sum(tl.where(j == back, mine, 0), 0))
            run += same.to(tl.int32)
            left = tl.max(same.to(tl.int32), 0)
            back += 1
        best = tl.maximum(best, tl.max(tl.where(run > 0, run * max_len + at, 0), 0))
    run = best // max_len
    after = (best % max_len + 1 + origin) % max_len
    tl.store(proposal + node, tl.load(text + after, mask=run > 0, other=-1).to(tl.int64))
    tl.store(run_out + node, run.to(tl.int64))


@triton.jit(do_not_specialize=["nodes", "k"])
def _blend(
    tokens, log_probs, proposal, run, weights, new_tokens, new_log_probs, nodes, k,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``(1 - w) q + w [token = proposal]`` of some nodes' candidates; :func:`echo.lookup.blend`."""
    node = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    child = tl.arange(0, K)
    there = node < nodes
    each = there[:, None] & (child < k)[None, :]
    where = node.to(tl.int64)[:, None] * k + child[None, :]
    token = tl.load(tokens + where, mask=each, other=-1)
    q = tl.load(log_probs + where, mask=each, other=DEAD).to(tl.float32)
    said = tl.load(proposal + node, mask=there, other=-1)
    weight = tl.load(weights + tl.load(run + node, mask=there, other=0), mask=there, other=0.0)
    faulty = each & (q != q)  # noqa: PLR0124
    asked = (said >= 0) & (tl.sum(faulty.to(tl.int32), 1) == 0)
    asked = asked & (tl.max(tl.where(faulty, DEAD, q), 1) > DEAD)
    weight = tl.where(asked, weight, 0.0)[:, None]
    rest = q + tl.log(1.0 - weight)
    own = tl.where(weight > 0, tl.log(tl.maximum(weight, 1e-30)), DEAD)
    match = each & (token == said[:, None])
    among = tl.sum(match.to(tl.int32), 1) > 0
    place = tl.where(
        among, tl.argmax(match.to(tl.int32), 1), tl.argmin(tl.where(each, rest, float("inf")), 1)
    )
    here = (child[None, :] == place[:, None]) & asked[:, None]
    better = here & (among == 0)[:, None] & (own > rest)
    top = tl.maximum(rest, own)
    base = tl.where(top > DEAD, top, 0.0)  # avoids a difference of infinities
    both = base + tl.log(tl.maximum(tl.exp(rest - base) + tl.exp(own - base), 1e-30))
    value = tl.where(here & among[:, None] & (weight > 0), both, tl.where(better, own, rest))
    tl.store(new_tokens + where, tl.where(better, said[:, None], token), mask=each)
    tl.store(new_log_probs + where, value, mask=each)


@triton.jit(do_not_specialize=["count", "max_len"])
def _append(texts, lengths, requests, tokens, numbers, count, max_len, BLOCK: tl.constexpr):
    """Append one request's new tokens to its text; the last ones, if the ring holds fewer."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.load(requests + b)
    more = tl.minimum(tl.load(numbers + b), count)
    end = tl.load(lengths + r)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        new = tl.load(tokens + b * count + i, mask=i < more, other=0).to(tl.int32)
        kept = (i < more) & (i >= more - max_len)
        tl.store(texts + r * max_len + (end + i) % max_len, new, mask=kept)
    tl.store(lengths + r, end + more, mask=more > 0)


def propose(
    texts: Tensor,
    lengths: Tensor,
    req_indices: Tensor,
    max_ngram: int,
    parents: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tails, proposals and match lengths of a frontier's nodes, in one launch.

    Args:
        texts: int32 [R, L], ring buffers.
        lengths: int64 [R], tokens written to each ring, overwritten ones included.
        req_indices: int64 [B].
        max_ngram: maximum tokens compared.
        parents: tails of the layer above, int32 [B, V, max_ngram]; int64 [B, W], each node's parent
            among them, and its token. None: the roots, whose path is the text.

    Returns:
        int32 [B, W, max_ngram]; int64 [B, W], the token after the longest match, the latest if
        there are several, -1 for none; int64 [B, W], its length, 0 for none.
    """
    batch = req_indices.shape[0]
    max_len = texts.shape[1]
    width = 1 if parents is None else parents[1].shape[1]
    new = (
        texts.new_empty(batch, width, max_ngram),
        lengths.new_empty(batch, width),
        lengths.new_empty(batch, width),
    )
    if batch:
        tails, parent, token = new if parents is None else (part.contiguous() for part in parents)
        tiles.launch(
            _propose, (batch * width,),
            texts, lengths, req_indices, tails, parent, token, *new,
            width, tails.shape[1], max_len,
            ROOT=parents is None, NGRAM=max_ngram, LANES=tiles.power_of_two(max_ngram),
            BLOCK=min(1024, tiles.power_of_two(max_len)), num_warps=4,
        )  # fmt: skip
    return new


def blend(
    tokens: Tensor, log_probs: Tensor, proposal: Tensor, run: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Implement :func:`echo.lookup.blend`, with each proposal's weight looked up by match length.

    Args:
        tokens: int64 [B, W, k].
        log_probs: float [B, W, k].
        proposal, run: int64 [B, W], from :func:`propose`.
        weights: float32 [max_ngram + 1].
    """
    tokens = tokens.contiguous()
    log_probs = log_probs.contiguous()
    new = torch.empty_like(tokens), torch.empty_like(log_probs)
    nodes = proposal.numel()
    k = tokens.shape[2]
    if nodes and k:
        rows = 16
        tiles.launch(
            _blend, (-(-nodes // rows),),
            tokens, log_probs, proposal.contiguous(), run.contiguous(), weights, *new, nodes, k,
            K=tiles.power_of_two(k), ROWS=rows, num_warps=1,
        )  # fmt: skip
    return new


def append(
    texts: Tensor, lengths: Tensor, req_indices: Tensor, tokens: Tensor, num_tokens: Tensor
) -> None:
    """Append the first ``num_tokens`` int64 [B] of ``tokens`` int64 [B, n] to texts, in place."""
    batch, count = tokens.shape
    if batch and count:
        tiles.launch(
            _append, (batch,),
            texts, lengths, req_indices, tokens.contiguous(), num_tokens, count, texts.shape[1],
            BLOCK=min(1024, tiles.power_of_two(count)), num_warps=1,
        )  # fmt: skip
