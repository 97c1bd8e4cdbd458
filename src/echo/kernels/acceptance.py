"""The acceptance walk and the arg-max over a vocabulary, as Triton kernels. The twins are in :mod:`echo.kernels.reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo.kernels import tiles
from echo.kernels.arguments import accept_shapes, logits_shape

NOWHERE = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["parts"])
def _best(
    logits, value, index, vocabulary, row_stride, parts, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest number of one chunk of one row, and its first place. NaN counts as -inf.

    Stages ask for reads ahead into shared memory: in registers there is room for one only, and memory waits while it is compared.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], NOWHERE, tl.int32)
    for at in tl.range(
        part * CHUNK, tl.minimum((part + 1) * CHUNK, vocabulary), BLOCK, num_stages=4
    ):
        token = at + lane
        score = tl.load(
            logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")
        ).to(tl.float32)
        higher = score > best  # false for NaN; a later equal one never replaces an earlier one
        best, place = tl.where(higher, score, best), tl.where(higher, token, place)
    top = tl.max(best, 0)
    tl.store(value + row * parts + part, top)
    tl.store(index + row * parts + part, tl.min(tl.where(best == top, place, NOWHERE), 0))


@triton.jit
def _winners(target, value, index, row, there, parts, PARTS: tl.constexpr):
    """The target's tokens after some rows: as given, or the best of each row's chunks; -1 for none."""
    if PARTS == 0:
        token = tl.load(target + row, mask=there, other=-1)
    else:
        lane = tl.arange(0, PARTS)[None, :]
        at, fits = row.to(tl.int64)[:, None] * parts + lane, there[:, None] & (lane < parts)
        best = tl.load(value + at, mask=fits, other=float("-inf"))
        place = tl.load(index + at, mask=fits, other=NOWHERE)
        first = tl.min(tl.where(best == tl.max(best, 1)[:, None], place, NOWHERE), 1)
        token = tl.where(first == NOWHERE, -1, first).to(tl.int64)
    return token


@triton.jit(do_not_specialize=["count", "parts", "max_depth", "endings"])
def _walk(
    parent, indptr, tokens, target, value, index, limits, ends, rows, emitted, lengths, beyond, bonus, count, parts, max_depth, endings,
    PARTS: tl.constexpr, LIMITS: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request. A step looks at the rows after the one it is on: ``max_depth`` steps of at most N rows, whatever the links are.

    All that the first ``BLOCK`` rows need is loaded at once, so that a step among them makes no trip to memory.
    """
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    first = tl.maximum(tl.load(indptr + b), 0)
    end = tl.minimum(tl.load(indptr + b + 1), count)
    base = b.to(tl.int64) * (max_depth + 1)
    near = first + lane
    near_drafted = tl.load(tokens + near, mask=near < end, other=-1)
    near_above = tl.load(parent + near, mask=near < end, other=-1)
    near_token = _winners(target, value, index, near, near < end, parts, PARTS)
    row = tl.where(end > first, first, NOWHERE)
    length, cut, last = 0, tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    room = tl.full([], 1, tl.int64) << 62
    if LIMITS:
        room = tl.load(limits + b)
    for step in range(max_depth + 1):
        local, token = row - first, tl.full([], -1, tl.int64)
        if row < NOWHERE:
            if local < BLOCK:
                token = tl.sum(tl.where(lane == local, near_token, 0), 0)
            else:
                far = row + tl.arange(0, 1)
                token = tl.sum(_winners(target, value, index, far, far < end, parts, PARTS), 0)
        if (token >= 0) & (length < room):
            tl.store(rows + base + step, row.to(tl.int64))
            tl.store(emitted + base + step, token)
            length += 1
            last = token
            if ENDS > 0:
                ending = tl.load(
                    ends + tl.arange(0, ENDS), mask=tl.arange(0, ENDS) < endings, other=-1
                )
                room = tl.where(tl.sum((ending == token).to(tl.int32), 0) > 0, 0, room)
            child = tl.where(
                (near > row) & (near_above == local) & (near_drafted == token), near, NOWHERE
            )
            for start in range(tl.maximum(row + 1, first + BLOCK), end, BLOCK):
                at = start + lane
                drafted = tl.load(tokens + at, mask=at < end, other=-1)
                above = tl.load(parent + at, mask=at < end, other=-1)
                child = tl.minimum(
                    child, tl.where((above == local) & (drafted == token), at, NOWHERE)
                )
            row = tl.min(child, 0)
        else:
            cut = tl.where((row < NOWHERE) & (step > 0), row.to(tl.int64), cut)
            row = tl.full([], NOWHERE, tl.int32)
            tl.store(rows + base + step, tl.full([], -1, tl.int64))
            tl.store(emitted + base + step, tl.full([], -1, tl.int64))
    tl.store(lengths + b, tl.full([], 0, tl.int64) + length)
    tl.store(beyond + b, cut)
    tl.store(bonus + b, last)


@triton.jit(do_not_specialize=["count", "parts"])
def _collect(value, index, token, count, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The winning tokens of some rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        token + row, _winners(token, value, index, row, row < count, parts, PARTS), mask=row < count
    )


def _scan(logits: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Best value and place of every chunk of every row: one read of the logits."""
    n, vocabulary = logits_shape(logits, tokens)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    chunk = tiles.vocabulary_chunk(vocabulary)
    parts = -(-vocabulary // chunk)
    value = torch.empty(n, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(n, parts, dtype=torch.int32, device=logits.device)
    if n:
        _best[(n, parts)](
            logits,
            value,
            index,
            vocabulary,
            logits.stride(0),
            parts,
            CHUNK=chunk,
            BLOCK=tiles.VOCABULARY_BLOCK,
            num_warps=8,
        )
    return value, index, parts


@tiles.on_its_device
def argmax_tokens(logits: Tensor) -> Tensor:
    """As :func:`echo.kernels.argmax_tokens`."""
    value, index, parts = _scan(logits)
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(token):
        grid = (-(-len(token) // tiles.WALKED),)
        _collect[grid](
            value,
            index,
            token,
            len(token),
            parts,
            PARTS=tiles.power_of_two(parts),
            BLOCK=tiles.WALKED,
            num_warps=1,
        )
    return token


@tiles.on_its_device
def accept(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target: Tensor, max_depth: int, max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`echo.kernels.accept`: of logits, the walk itself picks the winners of the rows that it visits."""
    found: tuple[Tensor, Tensor, int] = (target, target, 0)
    if target.dim() == 2:
        found, target = _scan(target, tokens), tokens
    (value, index, parts), (n, batch, max_depth) = (
        found,
        accept_shapes(parent, indptr, tokens, target, max_depth),
    )
    if out is None:
        rows = torch.empty(batch, max_depth + 1, dtype=torch.int64, device=tokens.device)
        lengths = torch.empty(batch, dtype=torch.int64, device=tokens.device)
        out = (
            rows,
            torch.empty_like(rows),
            lengths,
            torch.empty_like(lengths),
            torch.empty_like(lengths),
        )
    endings = 0 if eos_tokens is None else len(eos_tokens)
    if batch:
        _walk[(batch,)](
            parent.contiguous(), indptr.contiguous(), tokens.contiguous(), target.contiguous(), value, index,
            indptr if max_new_tokens is None else max_new_tokens.contiguous(), tokens if eos_tokens is None else eos_tokens.contiguous(), *out,
            n, parts, max_depth, endings, PARTS=tiles.power_of_two(parts) if parts else 0, LIMITS=max_new_tokens is not None,
            ENDS=tiles.power_of_two(endings) if endings else 0, BLOCK=tiles.WALKED, num_warps=1,
        )  # fmt: skip
    return out[0], out[1], out[2], out[3], out[4]
