"""A packed step in the layout that an engine's kernels read.

Sync-free: shapes come from host integers, and ``out=`` takes an engine's persistent buffers. The
inverses are in :mod:`echo.testing.importers`. B requests, N rows, n rows of every request in a
uniform layout. Ragged layouts are made here, uniform ones in :mod:`echo.tree.uniform`.

======================  ==================================  =====================================
layout                  exporter, importer                  cost
======================  ==================================  =====================================
SGLang links            :func:`sglang`, ``from_sglang``     uniform; 40 bytes a row
SGLang masks            :func:`sglang_mask`,                uniform; FULL_MASK prefix + n bytes
                        ``from_sglang_mask``                a row, QLEN_ONLY n, bit-packed 1 to 4
SGLang, vLLM chains     :func:`chains`, ``from_chains``     ragged, chains only; 28 bytes a row
FlashInfer              :func:`flashinfer`,                 ragged; (prefix + q) / 8 bytes a row,
                        ``from_flashinfer``                 or a byte an entry flat
FlashInfer XQA          :func:`flashinfer_xqa`,             ragged; a view, nothing
                        ``from_flashinfer_xqa``
TensorRT-LLM            :func:`tensorrt_llm`,               uniform; 16 + 4 * ceil(n / 32) bytes a
                        ``from_tensorrt_llm``               row
vLLM ``qq_bias``        :func:`qq_bias`, ``from_qq_bias``   one tree a batch; 4 * N bytes a row
Hugging Face            :func:`hugging_face`,               uniform; past + n entries a row
                        ``from_hugging_face``
======================  ==================================  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into
from echo.tree.packed import WORD, PackedTree, unpack_bits
from echo.tree.uniform import (
    HuggingFaceInputs,
    SGLangLinks,
    TensorRTLinks,
    hugging_face,
    sglang,
    sglang_mask,
    tensorrt_llm,
    unpad,
)

__all__ = [
    "Chains",
    "FlashInferMask",
    "HuggingFaceInputs",
    "SGLangLinks",
    "TensorRTLinks",
    "chains",
    "flashinfer",
    "flashinfer_xqa",
    "hugging_face",
    "qq_bias",
    "sglang",
    "sglang_mask",
    "tensorrt_llm",
    "unpad",
]


@dataclass(frozen=True)
class Chains:
    """Ragged chains: SGLang's ``RaggedVerifyLayout`` and vLLM's ``SpecDecodeMetadata``.

    Attributes:
        rows: int64 [N], the packed row of each row here; N - 1 on pad rows.
        tokens: int64 [N]; 0 on pad rows.
        verify_lens: int32 [B], rows of each request, root included; 0: no request.
        qo_indptr: int32 [B + 1].
        draft_token_ids: int32 [N], drafts of all requests one after another; 0 beyond the last.
        num_draft_tokens: int32 [B]; vLLM's own is a list on the host.
        cu_num_draft_tokens: int32 [B], running sum without a leading 0.
        target_logits_indices: int32 [N], for each draft the row before it; 0 beyond.
        bonus_logits_indices: int32 [B], each request's last row; 0: no request.
        logits_indices: int32 [N], rows that need logits: all.
        graph_num_tokens: N, a host int.
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
    """The custom mask of ``BatchPrefillWithPagedKVCacheWrapper.plan``, flat or packed.

    Attributes:
        mask: bool [size], or uint8 [size] least significant bit first; ones beyond ``indptr[-1]``.
        indptr: int32 [B + 1], where each request's mask begins, in entries of ``mask``.
        qo_indptr: int32 [B + 1].
        kv_lens: int32 [B], prefix + rows of each request; 0: no request.
    """

    mask: Tensor
    indptr: Tensor
    qo_indptr: Tensor
    kv_lens: Tensor


def chains(packed: PackedTree, *, out: Chains | None = None) -> Chains:
    """Ragged chains, the only shape that SGLang's ragged verification and vLLM read.

    Of a tree that branches it keeps the rows above the first branch;
    ``packed.validate(chain=True)`` finds such trees.

    Args:
        packed: the step.
        out: persistent buffers.

    Raises:
        EchoError: buffers that do not fit.

    Source: ``RaggedVerifyLayout`` of sglang 0.5.23 (``verify_lens``, ``qo_indptr``,
    ``graph_num_tokens``) and ``SpecDecodeMetadata`` of vllm 0.33.0.
    """
    n, batch, device = packed.num_rows, packed.batch, packed.tokens.device
    row = torch.arange(n, device=device)
    kept = (packed.request < batch) & (packed.depth == packed.local_row)  # no branch up to here
    draft = kept & (packed.depth > 0)
    request = torch.where(kept, packed.request, batch).long()
    lens = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    lens = lens.scatter_add_(0, request, kept.long())[:batch]
    ends, count = lens.cumsum(0), (lens - 1).clamp(min=0)
    new = torch.where(kept, kept.long().cumsum(0) - 1, n)
    rows = torch.full((n + 1,), n - 1, device=device).scatter_(0, new, row)[:n]
    nth = torch.where(draft, draft.long().cumsum(0) - 1, n)
    drafts = torch.zeros(2, n + 1, dtype=torch.int64, device=device)
    drafts.scatter_(1, nth.expand(2, -1), torch.stack([packed.tokens, new - 1]))
    made = Chains(
        rows=rows,
        tokens=torch.where(row < kept.sum(), packed.tokens[rows], 0),
        verify_lens=lens.int(),
        qo_indptr=F.pad(ends, (1, 0)).int(),
        draft_token_ids=drafts[0, :n].int(),
        num_draft_tokens=count.int(),
        cu_num_draft_tokens=count.cumsum(0).int(),
        target_logits_indices=drafts[1, :n].int(),
        bonus_logits_indices=torch.where(lens > 0, ends - 1, 0).int(),
        logits_indices=row.int(),
        graph_num_tokens=n,
    )
    return copy_into(out, made)


def qq_bias(packed: PackedTree, *, out: Tensor | None = None) -> Tensor:
    """vLLM's ``qq_bias`` float32 [N, N]: 0 where row i sees row j, -inf elsewhere.

    Args:
        packed: the step, of one request: vLLM has one tree for the whole batch.
        out: persistent buffer.

    Raises:
        EchoError: more than one request.

    Source: ``unified_attention`` of vllm 0.33.0.
    """
    if packed.batch != 1:
        raise EchoError(f"packed: expected one request, one tree a batch, got {packed.batch}")
    n = packed.num_rows
    own = torch.eye(n, dtype=torch.bool, device=packed.mask.device)
    seen = torch.where((packed.request < 1)[:, None], unpack_bits(packed.mask, n), own)
    bias = torch.zeros_like(seen, dtype=torch.float32)
    return copy_into(out, bias.masked_fill_(~seen, -torch.inf))


def flashinfer(
    packed: PackedTree,
    prefix_lens: Tensor,
    size: int,
    *,
    bits: bool = True,
    out: FlashInferMask | None = None,
) -> FlashInferMask:
    """FlashInfer's ragged custom mask: q x (prefix + q) entries a request, row by row.

    Pad rows belong to no request, and what attention leaves in them is undefined.

    Args:
        packed: the step.
        prefix_lens: int32 or int64 [B], tokens in each request's cache before this step.
        size: entries of the mask, bytes if packed, at least what the batch needs, known to the
            host: with the longest prefix P and the largest tree q,
            ``B * ceil(q * (P + q) / 8)`` bytes are enough.
        bits: packed, least significant bit first, each request in bytes of its own; False: a bool
            an entry.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``segment_packbits(..., bitorder="little")`` and ``plan`` of
    flashinfer-python 0.7.2.post1.
    """
    device = packed.tokens.device
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, device)
    size = checks.integer("size", size, 0, (1 << 31) - 1)  # indptr is int32
    lens = packed.indptr.diff().long()
    kv = torch.where(lens > 0, prefix_lens + lens, 0)
    entries = lens * kv
    indptr = F.pad((entries + 7 >> 3 if bits else entries).cumsum(0), (1, 0))
    begin = (indptr[:-1] << 3 if bits else indptr[:-1]) + kv - lens  # behind the first row's prefix
    of_request = torch.stack([begin - packed.indptr[:-1] * kv, kv, lens], dim=1)
    of_request = F.pad(of_request, (0, 0, 0, 1))  # pad rows: an empty square
    begin, stride, q = of_request.index_select(0, packed.request).unbind(1)
    entry = begin + torch.arange(packed.num_rows, device=device) * stride
    words = torch.arange(0, WORD * packed.mask.shape[1], WORD, device=device)
    hidden = (1 << (q[:, None] - words).clamp_(0, WORD)) - 1 & ~packed.mask
    if bits:  # the rest of each request's last byte is zero, as if hidden
        rest = (-256 >> (-entries & 7) & 0xFF)[:, None]
        hidden = torch.cat([hidden, F.pad(rest, (0, len(words) - 1))])
        mask = _clear_bits(hidden, torch.cat([entry, (indptr[1:] << 3) - 8]), size)
    else:
        mask = _clear_entries(hidden.int(), entry, size, packed.max_verify_tokens_per_req)
    return copy_into(out, FlashInferMask(mask, indptr.int(), packed.indptr, kv.int()))


def flashinfer_xqa(packed: PackedTree) -> Tensor:
    """FlashInfer's XQA mask uint16 [N, 2 * words], query x query only: a view, no work.

    The q of its ``((q + 31) // 32) * 2`` is then ``packed.max_verify_tokens_per_req``, and
    ``packed.indptr`` its ``q_cu_seq_lens``.

    Source: the XQA kernels of flashinfer-python 0.7.2.post1, on a little-endian machine.
    """
    return packed.mask.view(torch.uint16)


def _clear_entries(hidden: Tensor, entry: Tensor, size: int, width: int) -> Tensor:
    """Flat mask bool [size]: ones, less each row's hidden columns, words int32 [N, W]."""
    column = torch.arange(width, device=entry.device)
    full = torch.ones(size + 1, dtype=torch.uint8, device=entry.device)
    where = (entry[:, None] + column).clamp_(max=size).flatten()
    cleared = unpack_bits(hidden, width).view(torch.uint8).neg().flatten()
    return full.scatter_add_(0, where, cleared)[:size].view(torch.bool)


def _clear_bits(hidden: Tensor, entry: Tensor, size: int) -> Tensor:
    """Packed mask uint8 [size]: ones, less each row's hidden bits, words int64 [N, W].

    No two rows share a bit, so subtraction modulo 2^32 clears bits, in any order. Shifted, a word
    lies in two of the mask's.
    """
    count = -(-size // 4)
    full = torch.full((count + 1,), -1, dtype=torch.int32, device=entry.device)
    halves = (hidden << (entry & WORD - 1)[:, None]).view(torch.int32)
    word = (entry >> 5)[:, None] + torch.arange(hidden.shape[1], device=entry.device)
    where = torch.stack([word, word + 1], dim=-1).clamp_(0, count)
    return full.scatter_add_(0, where.flatten(), halves.neg().flatten()).view(torch.uint8)[:size]
