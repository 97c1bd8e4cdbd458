"""Layouts of n rows for every request: SGLang's trees, TensorRT-LLM, Hugging Face. The gain of ragged trees is lost in them.

A tree's rows stay in canonical order (root, then by depth, parent, candidate), so siblings lie side by side, and the first n rows
of a tree are a tree. A request of more than n rows exports its first n: a smaller tree, lossless where the engine's own
verification reads the links (:func:`echo.verify` needs a target token for every row, so n must hold every tree).
``packed.max_slots_per_request`` is always enough, and ``packed.validate(max_rows=n)`` names a request that would be cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from echo import checks
from echo.errors import EchoError
from echo.tree.packed import WORD, PackedTree, columns, into


@dataclass(frozen=True)
class SGLangLinks:
    """What SGLang's tree verification reads, n rows for every request (its own spelling).

    Attributes:
        draft_tokens: int64 [B * n], root first; 0 on pad rows.
        positions: int64 [B * n], context + depth; the context on pad rows.
        retrive_index: int64 [B, n], global row b * n + i.
        retrive_next_token: int64 [B, n], local row of the first child; -1 for none.
        retrive_next_sibling: int64 [B, n], local row of the next sibling, rising; -1 for none.
    """

    draft_tokens: Tensor
    positions: Tensor
    retrive_index: Tensor
    retrive_next_token: Tensor
    retrive_next_sibling: Tensor


@dataclass(frozen=True)
class TensorRTLinks:
    """TensorRT-LLM's tree of n rows for every request.

    Attributes:
        packed_mask: int32 [B, n, ceil(n / 32)], bit j % 32 of word j // 32 is row j; a pad row sees itself.
        position_offsets: int32 [B, n], depth; 0 on pad rows.
        generation_lengths: int32 [B], rows in use.
        tokens: int32 [B, n].
        next_token: int32 [B, n], local row of the first child; -1 for none.
        next_sibling: int32 [B, n]; -1 for none.
    """

    packed_mask: Tensor
    position_offsets: Tensor
    generation_lengths: Tensor
    tokens: Tensor
    next_token: Tensor
    next_sibling: Tensor


@dataclass(frozen=True)
class HuggingFaceInputs:
    """Arguments of a transformers model's forward pass; n rows for every request.

    Attributes:
        input_ids: int64 [B, n].
        position_ids: int64 [B, n]; the context on pad rows.
        attention_mask: [B, 1, n, past + n]; bool, or float with 0 where visible and the dtype's least number elsewhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor


def sglang(packed: PackedTree, n: int, context: Tensor, *, out: SGLangLinks | None = None) -> SGLangLinks:
    """Draft tokens, positions and links of SGLang's tree verification.

    SGLang's trees are uniform: its target verifies B * n rows instead of N, so the gain of ragged trees is lost where n is above their
    mean size.

    Args:
        packed: the step.
        n: rows of every request.
        context: int32 or int64 [B], SGLang's ``seq_lens``.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``build_tree_kernel_efficient`` of sglang 0.5.23.
    """
    at, real = _grid(packed, n)
    token, sibling = _links(packed, at, real)
    checks.tensor("context", context, [packed.batch], checks.INTEGERS, at.device)
    links = SGLangLinks(
        draft_tokens=torch.where(real, _take(packed.tokens, at), 0).flatten(),
        positions=(torch.where(real, _take(packed.depth, at), 0) + context.long()[:, None]).flatten(),
        retrive_index=torch.arange(packed.batch * n, device=at.device).view(packed.batch, n),
        retrive_next_token=token,
        retrive_next_sibling=sibling,
    )
    return into(out, links)


def sglang_mask(
    packed: PackedTree,
    n: int,
    mode: Literal["FULL_MASK", "QLEN_ONLY", "QLEN_ONLY_BITPACKING"],
    *,
    context: Tensor | None = None,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SGLang's ``tree_mask`` for ``n`` rows of every request; a pad row sees itself (and, in FULL_MASK, the context).

    Args:
        packed: the step.
        n: rows of every request; at most 32 for bit-packing.
        mode: FULL_MASK: bool [size], for each request n x (context + n), row by row: n bytes for each token of context, which is why the
            other modes exist. QLEN_ONLY: bool [B, n, n]. QLEN_ONLY_BITPACKING: uint8, uint16 or uint32 [B * n], bit j is row j.
        context: int32 or int64 [B], for FULL_MASK.
        size: entries, for FULL_MASK: at least sum(context + n) * n, which only the host knows; ones beyond.
        out: persistent buffer.

    Raises:
        EchoError: n above 32 for bit-packing, an unknown mode, or a missing argument.

    Source: ``TreeMaskMode`` of sglang 0.5.23.
    """
    if mode == "QLEN_ONLY_BITPACKING" and n > WORD:
        raise EchoError(f"n: expected at most 32 rows for QLEN_ONLY_BITPACKING, got {n}")
    at, real = _grid(packed, n)
    words = _words(packed, at, real)
    if mode == "QLEN_ONLY_BITPACKING":
        kind = torch.uint8 if n <= 8 else torch.int16 if n <= 16 else torch.int32
        narrow = words[..., 0].to(kind).flatten()
        return into(out, narrow if n <= 8 else narrow.view(torch.uint16 if n <= 16 else torch.uint32))
    square = columns(words, n)
    if mode == "QLEN_ONLY":
        return into(out, square)
    if mode != "FULL_MASK" or context is None or size is None:
        raise EchoError(f"mode: expected QLEN_ONLY, QLEN_ONLY_BITPACKING, or FULL_MASK with context and size, got {mode!r}")
    checks.tensor("context", context, [packed.batch], checks.INTEGERS, at.device)
    checks.integer("size", size, packed.batch * n * n)
    kv = context.long() + n
    begin = (n * kv).cumsum(0) - n * kv
    local = torch.arange(n, device=at.device)
    entry = (begin + context)[:, None, None] + local[:, None] * kv[:, None, None] + local
    full = torch.ones(size + 1, dtype=torch.bool, device=at.device)
    return into(out, full.scatter_(0, entry.flatten().clamp(max=size), square.flatten())[:size])


def tensorrt_llm(packed: PackedTree, n: int, *, out: TensorRTLinks | None = None) -> TensorRTLinks:
    """TensorRT-LLM's packed mask, depth offsets and local links, ``n`` rows for every request.

    Uniform: B * n rows are verified instead of N, so the gain of ragged trees is lost where n is above their mean size.

    Raises:
        EchoError: n below 1.

    Source: ``spec_decoding_packed_mask`` and ``spec_decoding_position_offsets`` of TensorRT-LLM.
    """
    at, real = _grid(packed, n)
    token, sibling = _links(packed, at, real)
    words = _words(packed, at, real)
    links = TensorRTLinks(
        packed_mask=words,
        position_offsets=torch.where(real, _take(packed.depth, at), 0),
        generation_lengths=packed.indptr.diff().clamp(max=n),
        tokens=torch.where(real, _take(packed.tokens, at), 0).int(),
        next_token=token.int(),
        next_sibling=sibling.int(),
    )
    return into(out, links)


def hugging_face(
    packed: PackedTree,
    n: int,
    context: Tensor,
    past: int,
    *,
    left_padded: bool = True,
    dtype: torch.dtype = torch.bool,
    out: HuggingFaceInputs | None = None,
) -> HuggingFaceInputs:
    """Token ids, position ids and a 4-D mask for a transformers model with a contiguous cache of ``past`` entries.

    Uniform, and the mask has past + n entries a row: for loops of one's own and for tests, not for speed. After acceptance gather the
    accepted rows of the cache (:func:`echo.compact`).

    Args:
        packed: the step.
        n: rows of every request.
        context: int32 or int64 [B], tokens of each request in the cache.
        past: entries of the cache, a host int.
        left_padded: each request's tokens end at ``past``; else they begin at 0.
        dtype: of the mask: bool, or a float type.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: 4-D masks of transformers 5.23.0.
    """
    checks.tensor("context", context, [packed.batch], checks.INTEGERS, packed.tokens.device)
    checks.integer("past", past, 0)
    at, real = _grid(packed, n)
    square = columns(_words(packed, at, real), n)
    column, lens = torch.arange(past, device=at.device), context.long()[:, None]
    prefix = column >= past - lens if left_padded else column < lens
    mask = torch.empty(packed.batch, 1, n, past + n, dtype=dtype, device=at.device)
    least = False if dtype == torch.bool else torch.finfo(dtype).min
    for part, seen in ((mask[..., :past], prefix[:, None, None]), (mask[..., past:], square[:, None])):
        part.copy_(seen if dtype == torch.bool else torch.where(seen, 0.0, least))
    inputs = HuggingFaceInputs(
        input_ids=torch.where(real, _take(packed.tokens, at), 0),
        position_ids=torch.where(real, _take(packed.depth, at), 0) + lens,
        attention_mask=mask,
    )
    return into(out, inputs)


def unpad(packed: PackedTree, values: Tensor) -> Tensor:
    """What an engine computed on uniform rows, for the packed rows: sampled tokens for :func:`echo.verify`, log-probabilities, states.

    Args:
        packed: the step.
        values: [B, n, ...], any dtype; n holds every tree.

    Returns:
        [N, ...]; on pad rows those of some row.

    Raises:
        EchoError: another batch size.
    """
    if values.dim() < 2 or values.shape[0] != packed.batch:
        raise EchoError(f"values: expected [{packed.batch}, n, ...], got {list(values.shape)}")
    n = values.shape[1]
    at = packed.request.clamp(max=max(packed.batch - 1, 0)) * n + packed.local.clamp(max=n - 1)
    return values.flatten(0, 1).index_select(0, at)


def _grid(packed: PackedTree, n: int) -> tuple[Tensor, Tensor]:
    """Global rows int64 [B, n] of each request's first n rows, and which of them exist, bool [B, n]."""
    checks.integer("n", n, 1)
    first, end = packed.indptr[:-1, None].long(), packed.indptr[1:, None].long()
    at = first + torch.arange(n, device=first.device)
    return at.clamp(max=packed.rows - 1), at < end


def _links(packed: PackedTree, at: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """First child and next sibling, local, int64 [B, n], -1 for none. Parents rise along the rows, so siblings are neighbours."""
    batch, n = at.shape
    parent = torch.where(real, _take(packed.parent, at), -1).long()
    local = torch.arange(n, device=at.device)
    repeats = torch.zeros_like(real)
    repeats[:, 1:] = (parent[:, 1:] == parent[:, :-1]) & (parent[:, 1:] >= 0)
    owner = torch.where((parent >= 0) & ~repeats, parent, n)
    child = torch.full((batch, n + 1), -1, device=at.device).scatter_(1, owner, local.expand(batch, n))[:, :n]
    sibling = torch.full_like(parent, -1)
    sibling[:, :-1] = torch.where(repeats[:, 1:], local[1:], -1)
    return child.contiguous(), sibling


def _words(packed: PackedTree, at: Tensor, real: Tensor) -> Tensor:
    """Mask words int32 [B, n, ceil(n / 32)]; a pad row sees itself."""
    n = at.shape[1]
    words = -(-n // WORD)
    local = torch.arange(n, device=at.device)
    own = torch.where(torch.arange(words, device=at.device) == (local // WORD)[:, None], 1, 0).int() << (local % WORD).int()[:, None]
    have = packed.mask.shape[1]
    mask = packed.mask[:, :words] if have >= words else torch.nn.functional.pad(packed.mask, (0, words - have))
    return torch.where(real[..., None], _take(mask, at), own)


def _take(value: Tensor, at: Tensor) -> Tensor:
    return value.index_select(0, at.flatten()).view(*at.shape, *value.shape[1:])
