"""Triton kernels for greedy acceptance and the arg-max over a vocabulary.

The contract is in :mod:`echo.kernels`, the reference in :mod:`echo.kernels.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles

NONE = tl.constexpr(2147483647)
"""A row or index greater than all others."""


@triton.jit(do_not_specialize=["parts"])
def _chunk_argmax(
    logits, value, index, vocabulary, stride, parts, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest value of one chunk of a row, and its first index. NaN counts as -inf.

    Stages prefetch to shared memory: registers hold one block, and memory would idle meanwhile.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], NONE, tl.int32)
    end = tl.minimum((part + 1) * CHUNK, vocabulary)
    for at in tl.range(part * CHUNK, end, BLOCK, num_stages=4):
        token = at + lane
        score = tl.load(logits + row * stride + token, mask=token < vocabulary, other=float("-inf"))
        score = score.to(tl.float32)
        higher = score > best  # false for NaN; a later equal value never replaces an earlier one
        best = tl.where(higher, score, best)
        place = tl.where(higher, token, place)
    top = tl.max(best, 0)
    tl.store(value + row * parts + part, top)
    tl.store(index + row * parts + part, tl.min(tl.where(best == top, place, NONE), 0))


@triton.jit
def _target_tokens(target, value, index, row, there, parts, PARTS: tl.constexpr):
    """The target's tokens at some rows: as given, or the best of each row's chunks; or -1."""
    if PARTS == 0:
        token = tl.load(target + row, mask=there, other=-1)
    else:
        lane = tl.arange(0, PARTS)[None, :]
        at = row.to(tl.int64)[:, None] * parts + lane
        fits = there[:, None] & (lane < parts)
        best = tl.load(value + at, mask=fits, other=float("-inf"))
        place = tl.load(index + at, mask=fits, other=NONE)
        first = tl.min(tl.where(best == tl.max(best, 1)[:, None], place, NONE), 1)
        token = tl.where(first == NONE, -1, first).to(tl.int64)
    return token


@triton.jit(do_not_specialize=["count", "parts", "max_depth", "num_eos"])
def _accept(
    parent, indptr, tokens, target, value, index, max_new_tokens, eos_tokens,
    rows, emitted, num_emitted, cut_row, bonus, count, parts, max_depth, num_eos,
    PARTS: tl.constexpr, LIMITED: tl.constexpr, EOS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request, in ``max_depth`` steps of at most N rows each, whatever the parents are.

    Everything that the first ``BLOCK`` rows need is loaded at once: steps among them load nothing.
    """
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    first = tl.maximum(tl.load(indptr + b), 0)
    end = tl.minimum(tl.load(indptr + b + 1), count)
    base = b.to(tl.int64) * (max_depth + 1)
    near = first + lane
    near_drafted = tl.load(tokens + near, mask=near < end, other=-1)
    near_above = tl.load(parent + near, mask=near < end, other=-1)
    near_token = _target_tokens(target, value, index, near, near < end, parts, PARTS)
    row = tl.where(end > first, first, NONE)
    length = 0
    cut = tl.full([], -1, tl.int64)
    last = tl.full([], -1, tl.int64)
    limit = tl.full([], 1, tl.int64) << 62
    if LIMITED:
        limit = tl.load(max_new_tokens + b)
    for step in range(max_depth + 1):
        local = row - first
        token = tl.full([], -1, tl.int64)
        if row < NONE:
            if local < BLOCK:
                token = tl.sum(tl.where(lane == local, near_token, 0), 0)
            else:
                far = row + tl.arange(0, 1)
                far_token = _target_tokens(target, value, index, far, far < end, parts, PARTS)
                token = tl.sum(far_token, 0)
        if (token >= 0) & (length < limit):
            tl.store(rows + base + step, row.to(tl.int64))
            tl.store(emitted + base + step, token)
            length += 1
            last = token
            if EOS > 0:
                which = tl.arange(0, EOS)
                eos = tl.load(eos_tokens + which, mask=which < num_eos, other=-1)
                limit = tl.where(tl.sum((eos == token).to(tl.int32), 0) > 0, 0, limit)
            near_match = (near > row) & (near_above == local) & (near_drafted == token)
            child = tl.where(near_match, near, NONE)
            for start in range(tl.maximum(row + 1, first + BLOCK), end, BLOCK):
                at = start + lane
                drafted = tl.load(tokens + at, mask=at < end, other=-1)
                above = tl.load(parent + at, mask=at < end, other=-1)
                match = (above == local) & (drafted == token)
                child = tl.minimum(child, tl.where(match, at, NONE))
            row = tl.min(child, 0)
        else:
            cut = tl.where((row < NONE) & (step > 0), row.to(tl.int64), cut)
            row = tl.full([], NONE, tl.int32)
            tl.store(rows + base + step, tl.full([], -1, tl.int64))
            tl.store(emitted + base + step, tl.full([], -1, tl.int64))
    tl.store(num_emitted + b, tl.full([], 0, tl.int64) + length)
    tl.store(cut_row + b, cut)
    tl.store(bonus + b, last)


@triton.jit(do_not_specialize=["count", "parts"])
def _argmax(value, index, token, count, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The greedy tokens of some rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = _target_tokens(token, value, index, row, row < count, parts, PARTS)
    tl.store(token + row, best, mask=row < count)


def _chunks(logits: Tensor) -> tuple[Tensor, Tensor, int]:
    """Best value and index of every chunk of every row, in one read of the logits."""
    n, vocabulary = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    chunk = tiles.vocabulary_chunk(vocabulary)
    block = tiles.VOCABULARY_BLOCK
    parts = -(-vocabulary // chunk)
    value = torch.empty(n, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(n, parts, dtype=torch.int32, device=logits.device)
    if n:
        sizes = vocabulary, logits.stride(0), parts
        tiles.launch(
            _chunk_argmax,
            (n, parts),
            logits,
            value,
            index,
            *sizes,
            CHUNK=chunk,
            BLOCK=block,
            num_warps=8,
        )
    return value, index, parts


def argmax_tokens(logits: Tensor) -> Tensor:
    """Implement :func:`echo.kernels.argmax_tokens`."""
    value, index, parts = _chunks(logits)
    token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    count = len(token)
    block = tiles.ACCEPT_ROWS
    if count:
        tiles.launch(
            _argmax, (-(-count // block),),
            value, index, token, count, parts,
            PARTS=tiles.power_of_two(parts), BLOCK=block, num_warps=1,
        )  # fmt: skip
    return token


def accept(
    parent: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    target: Tensor,
    max_depth: int,
    max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`echo.kernels.accept`; of logits, only accepted rows compare their chunks."""
    batch = len(indptr) - 1
    value = target
    index = target
    parts = 0
    if target.dim() == 2:
        value, index, parts = _chunks(target)
        target = tokens
    if out is None:
        rows = torch.empty(batch, max_depth + 1, dtype=torch.int64, device=tokens.device)
        each = [torch.empty(batch, dtype=torch.int64, device=tokens.device) for _ in range(3)]
        out = (rows, torch.empty_like(rows), *each)
    num_eos = 0 if eos_tokens is None else len(eos_tokens)
    if batch:
        tiles.launch(
            _accept, (batch,),
            parent.contiguous(), indptr.contiguous(), tokens.contiguous(), target.contiguous(),
            value, index, indptr if max_new_tokens is None else max_new_tokens.contiguous(),
            tokens if eos_tokens is None else eos_tokens.contiguous(), *out,
            len(tokens), parts, max_depth, num_eos, PARTS=tiles.power_of_two(parts) if parts else 0,
            LIMITED=max_new_tokens is not None, EOS=tiles.power_of_two(num_eos) if num_eos else 0,
            BLOCK=tiles.ACCEPT_ROWS, num_warps=1,
        )  # fmt: skip
    return out[0], out[1], out[2], out[3], out[4]
