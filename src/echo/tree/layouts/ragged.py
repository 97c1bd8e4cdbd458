"""Layouts that keep ragged rows: FlashInfer's masks, ragged chains for SGLang and vLLM, vLLM's bias for one tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.tree.packed import WORD, PackedTree, copy_into, unpack_bits


@dataclass(frozen=True)
class Chains:
    """Ragged chains: SGLang's ``RaggedVerifyLayout`` and vLLM's ``SpecDecodeMetadata``. A row without a request is a pad.

    Attributes:
        rows: int64 [N], the packed row behind each row here; N - 1 on pad rows.
        tokens: int64 [N]; 0 on pad rows.
        verify_lens: int32 [B], rows of each request, root included; 0 only for an empty slot.
        qo_indptr: int32 [B + 1].
        draft_token_ids: int32 [N], the drafts of all requests one after another; 0 beyond ``cu_num_draft_tokens[-1]``.
        num_draft_tokens: int32 [B] (vLLM's own is a list: a read-back).
        cu_num_draft_tokens: int32 [B], running sum without a leading 0.
        target_logits_indices: int32 [N], for each draft the row that predicts it, its predecessor; 0 beyond.
        bonus_logits_indices: int32 [B], each request's last row; 0 for an empty slot.
        logits_indices: int32 [N], rows that need logits: all.
        graph_num_tokens: N, the tier; a host int.
    """

    rows: Tensor
    tokens: Tensor
    verify_lens: Tensor
    qo_indptr: Tensor
    draft_token_ids: Tensor
    num_draft_tokens: Tensor
    cu_num_draft_tokens: Tensor
    target_logits_indices: Tensor
    bonus_logits_indices: Tensor
    logits_indices: Tensor
    graph_num_tokens: int


@dataclass(frozen=True)
class FlashInferMask:
    """``custom_mask`` or ``packed_custom_mask`` for ``BatchPrefillWithPagedKVCacheWrapper.plan``.

    Attributes:
        mask: bool [size], or uint8 [size] least significant bit first; ones beyond what ``indptr`` says.
        indptr: int32 [B + 1], where each request's mask begins, in entries of ``mask``.
        qo_indptr: int32 [B + 1].
        kv_lens: int32 [B], context + rows of each request; 0 for an empty slot.
    """

    mask: Tensor
    indptr: Tensor
    qo_indptr: Tensor
    kv_lens: Tensor


def chains(packed: PackedTree, *, out: Chains | None = None) -> Chains:
    """Ragged chains: the only shape that SGLang's ragged verification and vLLM read, and nothing is lost or padded for chains.

    Of a tree that branches it keeps the rows above the first branch, a chain (``packed.validate(chain=True)`` finds such trees).

    Args:
        packed: the step.
        out: persistent buffers.

    Raises:
        EchoError: buffers that do not fit.

    Source: ``RaggedVerifyLayout`` of sglang 0.5.23 (``verify_lens``, ``qo_indptr``, ``graph_num_tokens``) and
    ``SpecDecodeMetadata`` of vllm 0.33.0.
    """
    n, batch, device = packed.num_rows, packed.batch, packed.tokens.device
    kept = (packed.request < batch) & (
        packed.depth == packed.local_row
    )  # depth = place, and so for all rows before it: no branch yet
    draft = kept & (packed.depth > 0)
    row = torch.arange(n, device=device)
    request = torch.where(kept, packed.request, batch).long()
    lens = torch.zeros(batch + 1, dtype=torch.int64, device=device).scatter_add_(
        0, request, kept.long()
    )[:batch]
    ends = lens.cumsum(0)
    new = torch.where(kept, kept.long().cumsum(0) - 1, n)
    rows = torch.full((n + 1,), n - 1, device=device).scatter_(0, new, row)[:n]
    nth = torch.where(draft, draft.long().cumsum(0) - 1, n)
    drafts = torch.zeros(2, n + 1, dtype=torch.int64, device=device)
    drafts.scatter_(1, nth.expand(2, -1), torch.stack([packed.tokens, new - 1]))
    count = (lens - 1).clamp(min=0)
    chain = Chains(
        rows=rows,
        tokens=torch.where(row < kept.sum(), packed.tokens[rows], 0),
        verify_lens=lens.int(),
        qo_indptr=torch.cat([ends.new_zeros(1), ends]).int(),
        draft_token_ids=drafts[0, :n].int(),
        num_draft_tokens=count.int(),
        cu_num_draft_tokens=count.cumsum(0).int(),
        target_logits_indices=drafts[1, :n].int(),
        bonus_logits_indices=torch.where(lens > 0, ends - 1, 0).int(),
        logits_indices=row.int(),
        graph_num_tokens=n,
    )
    return copy_into(out, chain)


def qq_bias(packed: PackedTree, *, out: Tensor | None = None) -> Tensor:
    """vLLM's ``qq_bias`` float32 [N, N] for ``unified_attention``: 0 where row i sees row j, -inf elsewhere.

    It holds one tree for the whole batch: 4 * N bytes a row.

    Args:
        packed: the step.
        out: persistent buffer.

    Raises:
        EchoError: more than one request.

    Source: ``unified_attention`` of vllm 0.33.0.
    """
    if packed.batch != 1:
        raise EchoError(
            f"packed: expected one request (qq_bias has one tree for the whole batch), got {packed.batch}"
        )
    n = packed.num_rows
    square = unpack_bits(packed.mask, n)
    own = torch.eye(n, dtype=torch.bool, device=square.device)
    square = torch.where((packed.request < 1)[:, None], square, own)
    return copy_into(
        out, torch.zeros_like(square, dtype=torch.float32).masked_fill_(~square, -torch.inf)
    )


def flashinfer(
    packed: PackedTree,
    prefix_lens: Tensor,
    size: int,
    *,
    bits: bool = True,
    out: FlashInferMask | None = None,
) -> FlashInferMask:
    """FlashInfer's custom mask, ragged, the context included: q_i x (context_i + q_i) entries of request i, row by row.

    Nothing is padded, but every row carries its whole context: context / 8 bytes a row packed, context bytes flat. Pad rows belong to no
    request, and what attention leaves in them is undefined.

    Args:
        packed: the step.
        prefix_lens: int32 or int64 [B], tokens in each request's cache before this step.
        size: entries of the mask, bytes if packed: at least what the batch needs, which only the host knows: with most context C and
            most rows q, ``B * ceil(q * (C + q) / 8)`` bytes are enough.
        bits: packed, least significant bit first, each request from a byte of its own; else one bool an entry.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``segment_packbits(..., bitorder="little")`` and ``plan`` of flashinfer-python 0.7.2.post1.
    """
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, packed.tokens.device)
    size = checks.integer("size", size, 0, (1 << 31) - 1)  # indptr is int32
    lens = packed.indptr.diff().long()
    kv = torch.where(lens > 0, prefix_lens + lens, 0)
    entries = lens * kv
    indptr = F.pad((entries + 7 >> 3 if bits else entries).cumsum(0), (1, 0))
    square = (
        (indptr[:-1] << 3 if bits else indptr[:-1]) + kv - lens
    )  # first entry behind the context of each request's first row
    of_request = F.pad(
        torch.stack([square - packed.indptr[:-1] * kv, kv, lens], dim=1), (0, 0, 0, 1)
    )  # pad rows: an empty square
    begin, stride, q = of_request.index_select(0, packed.request).unbind(1)
    entry = begin + torch.arange(packed.num_rows, device=q.device) * stride
    words = torch.arange(0, WORD * packed.mask.shape[1], WORD, device=q.device)
    hidden = (1 << (q[:, None] - words).clamp_(0, WORD)) - 1 & ~packed.mask
    if bits:  # what is left of each request's last byte is zero, as if hidden
        hidden = torch.cat(
            [hidden, F.pad((-256 >> (-entries & 7) & 0xFF)[:, None], (0, len(words) - 1))]
        )
        entry = torch.cat([entry, (indptr[1:] << 3) - 8])
        mask = _clear_bits(hidden, entry, size)
    else:
        mask = _clear_entries(hidden.int(), entry, size, packed.max_verify_tokens_per_req)
    return copy_into(
        out,
        FlashInferMask(mask=mask, indptr=indptr.int(), qo_indptr=packed.indptr, kv_lens=kv.int()),
    )


def flashinfer_xqa(packed: PackedTree) -> Tensor:
    """FlashInfer's XQA mask uint16 [N, 2 * words], query x query only: a view of the ancestor words, no work and no padding.

    The q of its ``((q + 31) // 32) * 2`` is then ``max_verify_tokens_per_req``; ``q_cu_seq_lens`` is ``packed.indptr``.

    Source: the XQA decode kernels of flashinfer-python 0.7.2.post1, on a little-endian machine.
    """
    return packed.mask.view(torch.uint16)


def _clear_entries(hidden: Tensor, entry: Tensor, size: int, width: int) -> Tensor:
    """Flat mask bool [size]: ones, less each row's hidden columns: words int32 [N, words] of ``width`` columns."""
    column = torch.arange(width, device=entry.device)
    full = torch.ones(size + 1, dtype=torch.uint8, device=entry.device)
    where = (entry[:, None] + column).clamp_(max=size).flatten()
    return full.scatter_add_(
        0, where, unpack_bits(hidden, width).view(torch.uint8).neg().flatten()
    )[:size].view(torch.bool)


def _clear_bits(hidden: Tensor, entry: Tensor, size: int) -> Tensor:
    """Packed mask uint8 [size]: ones, less each row's hidden bits, words int64 [N, words]. Shifted, a word lies in two of the mask's words.

    No two rows share a bit, so subtraction modulo 2^32 clears bits, in any order.
    """
    count = -(-size // 4)
    full = torch.full((count + 1,), -1, dtype=torch.int32, device=entry.device)
    halves = (hidden << (entry & WORD - 1)[:, None]).view(torch.int32)
    word = (entry >> 5)[:, None] + torch.arange(hidden.shape[1], device=entry.device)
    where = torch.stack([word, word + 1], dim=-1).clamp_(0, count)
    return full.scatter_add_(0, where.flatten(), halves.neg().flatten()).view(torch.uint8)[:size]
