"""A packed step in the layouts that engines' kernels read.

Sync-free: shapes come from host integers, and ``out=`` takes an engine's persistent buffers. The
importers are in :mod:`echo.testing.importers`. Ragged layouts are made here, uniform ones (n rows
of every request) in :mod:`echo.tree.uniform`. B requests, N rows.

======================  ==================================  =====================================
layout                  exporter, importer                  cost
======================  ==================================  =====================================
SGLang links            :func:`sglang`, ``from_sglang``     uniform; 40 bytes a row
SGLang masks            :func:`sglang_mask`,                uniform; FULL_MASK prefix + n bytes
                        ``from_sglang_mask``                a row, QLEN_ONLY n, bit-packed 1 to 4
SGLang, vLLM chains     :func:`chains`, ``from_chains``     ragged, chains only; 28 bytes a row
FlashInfer              :func:`flashinfer`,                 ragged; (prefix + q) / 8 bytes a row,
                        ``from_flashinfer``                 or a byte an entry flat
FlashInfer XQA          :func:`flashinfer_xqa`,             ragged; a view, no cost
                        ``from_flashinfer_xqa``
TensorRT-LLM            :func:`tensorrt_llm`,               uniform; 16 + 4 * ceil(n / 32) bytes a
                        ``from_tensorrt_llm``               row
vLLM ``qq_bias``        :func:`qq_bias`, ``from_qq_bias``   one tree a batch; 4 * N bytes a row
MLA kernels             :func:`mla`                         ragged, chains only; 8 bytes a request
Hugging Face            :func:`hugging_face`,               uniform; past + n entries a row
                        ``from_hugging_face``
======================  ==================================  =====================================

:func:`mix` makes a step of trees and prefill, which every exporter and kernel reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into
from echo.kernels.codes import Status
from echo.tree.packed import WORD, PackedTree, unpack_bits
from echo.tree.supertree import SuperTree
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
    "MLAChains",
    "SGLangLinks",
    "TensorRTLinks",
    "chains",
    "flashinfer",
    "flashinfer_xqa",
    "hugging_face",
    "mix",
    "mla",
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
        draft_token_ids: int32 [N], drafts of all requests one after another, then 0.
        num_draft_tokens: int32 [B]; in vLLM a list on the host.
        cu_num_draft_tokens: int32 [B], running sum without a leading 0.
        target_logits_indices: int32 [N], the row before each draft, then 0.
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
        mask: bool [size], or uint8 [size] least significant bit first; ones past ``indptr[-1]``.
        indptr: int32 [B + 1], where each request's mask begins, in entries of ``mask``.
        qo_indptr: int32 [B + 1].
        kv_lens: int32 [B], prefix + rows of each request; 0: no request.
    """

    mask: Tensor
    indptr: Tensor
    qo_indptr: Tensor
    kv_lens: Tensor


def chains(packed: PackedTree, *, out: Chains | None = None) -> Chains:
    """Export ragged chains, the only shape that SGLang's ragged verification and vLLM read.

    A tree that branches keeps only the rows above its first branch; ``packed.validate(chain=True)``
    finds such trees.

    Args:
        packed, out: the step, and persistent buffers.

    Raises:
        EchoError: buffers that do not fit.

    Source: ``RaggedVerifyLayout`` of sglang 0.5.23 (``verify_lens``, ``qo_indptr``,
    ``graph_num_tokens``) and ``SpecDecodeMetadata`` of vllm 0.33.0.
    """
    n = packed.num_rows
    batch = packed.batch
    row = torch.arange(n, device=packed.tokens.device)
    kept = (packed.request < batch) & (packed.depth == packed.local_row)  # no branch so far
    draft = kept & (packed.depth > 0)
    request = torch.where(kept, packed.request, batch).long()
    lens = row.new_zeros(batch + 1).scatter_add_(0, request, kept.long())[:batch]
    ends = lens.cumsum(0)
    count = (lens - 1).clamp(min=0)
    new = torch.where(kept, kept.long().cumsum(0) - 1, n)
    rows = row.new_full((n + 1,), n - 1).scatter_(0, new, row)[:n]
    nth = torch.where(draft, draft.long().cumsum(0) - 1, n)
    drafts = row.new_zeros(2, n + 1)
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
    """Export vLLM's ``qq_bias`` float32 [N, N]: 0 where row i sees row j, -inf elsewhere.

    Args:
        packed, out: the step, of one request, and a persistent buffer.

    Raises:
        EchoError: more than one request: vLLM has one tree for the whole batch.

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
    """Export FlashInfer's ragged custom mask: q x (prefix + q) entries per request, row by row.

    Pad rows belong to no request; attention leaves them undefined.

    Args:
        packed, out: the step, and persistent buffers.
        prefix_lens: int32 or int64 [B], tokens in each request's cache before this step.
        size: length of the mask (bytes if packed), a host int, at least what the batch needs: with
            the longest prefix P and the largest tree q, ``B * ceil(q * (P + q) / 8)`` bytes.
        bits: pack least significant bit first, each request from a new byte; False: bools.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``segment_packbits(..., bitorder="little")`` and ``plan`` of
    flashinfer-python 0.7.2.post1.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1], [2]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=3, words=1)  # rows 7, 1, 2
        >>> flashinfer(packed, torch.tensor([2]), 15, bits=False).mask.view(3, 5).int().tolist()
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
        >>> flashinfer_xqa(packed).tolist()  # bits of the last three columns
        [[1, 0], [3, 0], [5, 0]]
        >>> qq_bias(packed)[2].tolist()
        [0.0, -inf, 0.0]
    """
    device = packed.tokens.device
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, device)
    size = checks.integer("size", size, 0, (1 << 31) - 1)  # indptr is int32
    lens = packed.indptr.diff().long()
    kv = torch.where(lens > 0, prefix_lens + lens, 0)
    entries = lens * kv
    indptr = F.pad((entries + 7 >> 3 if bits else entries).cumsum(0), (1, 0))
    begin = (indptr[:-1] << 3 if bits else indptr[:-1]) + kv - lens  # after the first row's prefix
    of_request = torch.stack([begin - packed.indptr[:-1] * kv, kv, lens], dim=1)
    of_request = F.pad(of_request, (0, 0, 0, 1))  # pad rows: an empty square
    begin, stride, q = of_request.index_select(0, packed.request).unbind(1)
    entry = begin + torch.arange(packed.num_rows, device=device) * stride
    words = torch.arange(0, WORD * packed.mask.shape[1], WORD, device=device)
    hidden = (1 << (q[:, None] - words).clamp_(0, WORD)) - 1 & ~packed.mask
    if bits:  # clear the padding bits of each request's last byte, as if hidden
        rest = (-256 >> (-entries & 7) & 0xFF)[:, None]
        hidden = torch.cat([hidden, F.pad(rest, (0, len(words) - 1))])
        mask = _clear_bits(hidden, torch.cat([entry, (indptr[1:] << 3) - 8]), size)
    else:
        mask = _clear_entries(hidden.int(), entry, size, packed.max_verify_tokens_per_req)
    return copy_into(out, FlashInferMask(mask, indptr.int(), packed.indptr, kv.int()))


def flashinfer_xqa(packed: PackedTree, *, page_size: int | None = None) -> Tensor:
    """Export FlashInfer's XQA mask uint16 [N, 2 * words], query x query only: a view, at no cost.

    Its q in ``((q + 31) // 32) * 2`` is ``packed.max_verify_tokens_per_req``, and its
    ``q_cu_seq_lens`` is ``packed.indptr``.

    Args:
        packed: the step.
        page_size: tokens per page of the cache.

    Raises:
        EchoError: a page size that XQA's kernels do not read.

    Source: the XQA kernels of flashinfer-python 0.7.2.post1, on a little-endian machine.
    """
    sizes = 16, 32, 64, 128
    if page_size not in (None, *sizes):
        raise EchoError(f"page_size: expected one that XQA reads, {sizes}, got {page_size}")
    return packed.mask.view(torch.uint16)


@dataclass(frozen=True)
class MLAChains:
    """Chains of rows after their prefixes, causal from the end, as MLA kernels read them.

    Attributes:
        qo_indptr: int32 [B + 1].
        kv_lens: int32 [B], prefix + rows of each request; 0: no request.
    """

    qo_indptr: Tensor
    kv_lens: Tensor


def mla(
    packed: PackedTree, tree: SuperTree, prefix_lens: Tensor, *, out: MLAChains | None = None
) -> MLAChains:
    """Export chains for multi-head latent attention, whose kernels have only causal masks.

    The kernel reads the packed rows as they are, with their latents written to
    :meth:`PackedTree.slot_mapping`. Draft with one candidate a layer: ``beam`` 1 and k = 1.

    Args:
        packed, prefix_lens, out: as in :func:`flashinfer`.
        tree: the super-tree it was packed from, whose shapes show whether it can branch.

    Raises:
        EchoError: a tree with more than one candidate in a layer, or lengths that do not fit.

    Source: ``qo_indptr`` and ``kv_len_arr`` of ``BatchMLAPagedAttentionWrapper.plan(causal=True)``
    of flashinfer-python 0.7.2.post1.
    """
    if max(checks.instance("tree", tree, SuperTree).sizes) > 1:
        expected = "a chain, one candidate a layer: MLA kernels verify no trees"
        raise EchoError(f"tree: expected {expected}, got layers of {tree.sizes}")
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, packed.tokens.device)
    lens = packed.indptr.diff()
    kv_lens = torch.where(lens > 0, prefix_lens + lens, 0).int()
    return copy_into(out, MLAChains(packed.indptr, kv_lens))


def mix(packed: PackedTree, tokens: Tensor, indptr: Tensor, max_segment_len: int) -> PackedTree:
    """Append causal segments to a step's trees: chunks of prefill, requests without drafts.

    The result is one pass of B + S requests and N + M rows, pads last. ``prefix_lens`` and
    ``page_table`` need S more entries, for the tokens before each segment. The trees' rows stay
    first: ``accept``, ``compact`` and ``observe`` take ``packed`` itself and the first N sampled
    tokens. A segment's next token is sampled in row ``mixed.indptr[B + 1 :] - 1``. M counts as
    ``num_other_tokens`` of :meth:`ElasticBudgetScheduler.choose_tier`.

    Split a longer chunk into several segments of one request, in order, each with the earlier ones
    in its prefix, if keys are written to pages before a layer attends, as in prefill.

    Args:
        packed: the step.
        tokens: int64 [M], of all segments one after another; tokens past the last segment are pads.
        indptr: int32 [S + 1], where each segment begins, from 0.
        max_segment_len: rows of the longest segment; widens the masks to that many bits.

    Raises:
        EchoError: shapes or dtypes that do not fit, or a length below 1.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2]]])  # a chain
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=4, words=1)
        >>> mla(packed, tree, torch.tensor([10])).kv_lens, chains(packed).verify_lens
        (tensor([13], dtype=torch.int32), tensor([3], dtype=torch.int32))
        >>> mixed = mix(packed, torch.tensor([40, 41, 42]), torch.tensor([0, 2, 3]).int(), 2)
        >>> mixed.tokens.tolist(), mixed.indptr.tolist()
        ([7, 1, 2, 40, 41, 42, 0], [0, 3, 5, 6])
    """
    n = packed.num_rows
    batch = packed.batch
    device = packed.tokens.device
    m = checks.tensor("tokens", tokens, ["M"], torch.int64, device).shape[0]
    count = checks.tensor("indptr", indptr, ["S + 1"], torch.int32, device).shape[0] - 1
    longest = checks.integer("max_segment_len", max_segment_len, 1)
    row = torch.arange(n + m, device=device)
    behind = row - packed.indptr[-1]  # index among the segments' rows
    segment = torch.searchsorted(indptr[1:].long(), behind, right=True)
    trees = behind < 0
    filled = segment < count
    local = behind - indptr.index_select(0, segment)

    def join(own: Tensor, new: Tensor | float, pad: float) -> Tensor:
        segments = torch.where(filled, new, pad).to(own.dtype)
        return torch.where(trees, F.pad(own, (0, m)), segments)

    words = max(packed.mask.shape[1], -(-longest // WORD))
    begin = torch.arange(0, WORD * words, WORD, device=device)
    seen = torch.where(filled, local, 0)[:, None] + 1 - begin
    causal = ((1 << seen.clamp(0, WORD)) - 1).int()
    mask = F.pad(packed.mask, (0, words - packed.mask.shape[1], 0, m))
    own = F.pad(tokens, (0, n))
    return PackedTree(
        tokens=join(packed.tokens, own.index_select(0, behind.clamp(min=0)), 0),
        parent=join(packed.parent, local - 1, -1),
        depth=join(packed.depth, local, 0),
        request=join(packed.request, segment + batch, batch + count),
        indptr=torch.cat([packed.indptr, packed.indptr[-1] + indptr[1:]]),
        mask=torch.where(trees[:, None], mask, causal),
        score=join(packed.score, 0.0, -torch.inf),
        node=join(packed.node, -1, -1),
        committed=join(packed.committed, 1, 0),
        status=F.pad(packed.status, (0, count), value=int(Status.FINISHED)),
        invalid=F.pad(packed.invalid, (0, count)),
        max_depth=max(packed.max_depth, longest - 1),
    )


def _clear_entries(hidden: Tensor, entry: Tensor, size: int, width: int) -> Tensor:
    """Flat mask bool [size]: ones, except each row's hidden columns (words int32 [N, W])."""
    column = torch.arange(width, device=entry.device)
    full = torch.ones(size + 1, dtype=torch.uint8, device=entry.device)
    where = (entry[:, None] + column).clamp_(max=size).flatten()
    cleared = unpack_bits(hidden, width).view(torch.uint8).neg().flatten()
    return full.scatter_add_(0, where, cleared)[:size].view(torch.bool)


def _clear_bits(hidden: Tensor, entry: Tensor, size: int) -> Tensor:
    """Packed mask uint8 [size]: ones, except each row's hidden bits (words int64 [N, W]).

    No two rows share a bit, so subtraction modulo 2^32 clears bits in any order. A shifted word
    spans two words of the mask.
    """
    count = -(-size // 4)
    full = torch.full((count + 1,), -1, dtype=torch.int32, device=entry.device)
    halves = (hidden << (entry & WORD - 1)[:, None]).view(torch.int32)
    word = (entry >> 5)[:, None] + torch.arange(hidden.shape[1], device=entry.device)
    where = torch.stack([word, word + 1], dim=-1).clamp_(0, count)
    return full.scatter_add_(0, where.flatten(), halves.neg().flatten()).view(torch.uint8)[:size]
