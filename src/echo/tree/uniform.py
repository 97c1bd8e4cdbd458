"""Uniform layouts: n rows of every request, as SGLang, TensorRT-LLM and transformers read trees.

These verify B * n rows instead of N, so ragged trees save nothing where n exceeds their mean size.
Larger trees are cut to their first n rows, which are a tree. That is lossless, whether the engine's
own verification reads the links, or :func:`unpad` returns its results to :func:`echo.accept`: rows
past n have no target token. ``packed.max_verify_tokens_per_req`` is always enough;
``packed.validate(max_verify_tokens_per_req=n)`` names a cut request. B requests, N packed rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into
from echo.tree.packed import WORD, PackedTree, own_bits, select_rows, unpack_bits


@dataclass(frozen=True)
class SGLangLinks:
    """Inputs of SGLang's tree verification, in its own spelling.

    Attributes:
        draft_tokens: int64 [B * n], root first; 0 on pad rows.
        positions: int64 [B * n], prefix + depth; the prefix on pad rows.
        retrive_index: int64 [B, n], row b * n + i.
        retrive_next_token: int64 [B, n], local row of the first child; -1 for none.
        retrive_next_sibling: int64 [B, n], local row of the next sibling, ascending; -1 for none.
    """

    draft_tokens: Tensor
    positions: Tensor
    retrive_index: Tensor
    retrive_next_token: Tensor
    retrive_next_sibling: Tensor


@dataclass(frozen=True)
class TensorRTLinks:
    """Inputs of TensorRT-LLM's tree verification.

    Attributes:
        packed_mask: int32 [B, n, ceil(n / 32)], bit j % 32 of word j // 32 is row j; a pad row sees
            itself.
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
    """Arguments of a transformers model's forward pass.

    Attributes:
        input_ids: int64 [B, n].
        position_ids: int64 [B, n]; the prefix on pad rows.
        attention_mask: [B, 1, n, past + n]; bool, or float: 0 if visible, else the type's minimum.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor


def sglang(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    prefix_lens: Tensor,
    *,
    out: SGLangLinks | None = None,
) -> SGLangLinks:
    """Export draft tokens, positions and links for SGLang's tree verification.

    Args:
        packed: the step.
        max_verify_tokens_per_req: n.
        prefix_lens: int32 or int64 [B], tokens of each request in the cache: SGLang's ``seq_lens``.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``build_tree_kernel_efficient`` of sglang 0.5.23.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1], [2]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=5, words=1)
        >>> links = sglang(packed, 4, torch.tensor([10]))  # rows 7, 1, 2, a pad
        >>> links.retrive_next_token.tolist(), links.retrive_next_sibling.tolist()
        ([[1, -1, -1, -1]], [[-1, 2, -1, -1]])
        >>> sglang_mask(packed, 4, "QLEN_ONLY_BITPACKING").tolist()
        [1, 3, 5, 8]
        >>> tensorrt_llm(packed, 4).position_offsets.tolist()
        [[0, 1, 1, 0]]
        >>> hugging_face(packed, 4, torch.tensor([10]), past_len=10).attention_mask.shape
        torch.Size([1, 1, 4, 14])
        >>> unpad(packed, links.draft_tokens.view(1, 4)).tolist()  # back to the packed rows
        [7, 1, 2, -1, -1]
    """
    grid = _Grid(packed, max_verify_tokens_per_req)
    prefix = grid.prefix(prefix_lens)
    child, sibling = grid.links(torch.int64)
    tokens = grid.spread(packed.tokens, 0).flatten()
    positions = (grid.spread(packed.depth, 0) + prefix).flatten()
    index = torch.arange(grid.size, device=prefix.device).view_as(child)
    return copy_into(out, SGLangLinks(tokens, positions, index, child, sibling))


def sglang_mask(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    mode: Literal["FULL_MASK", "QLEN_ONLY", "QLEN_ONLY_BITPACKING"],
    *,
    prefix_lens: Tensor | None = None,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Export SGLang's ``tree_mask``; a pad row sees itself and, in FULL_MASK, the prefix.

    Args:
        packed, max_verify_tokens_per_req, out: as in :func:`sglang`; n at most 32 for bit-packing.
        mode: FULL_MASK: bool [size], n x (prefix + n) per request. QLEN_ONLY: bool [B, n, n].
            QLEN_ONLY_BITPACKING: uint8, uint16 or uint32 [B * n], bit j is row j.
        prefix_lens: int32 or int64 [B], for FULL_MASK.
        size: entries of FULL_MASK, a host int of at least sum(prefix + n) * n; the excess is ones.

    Raises:
        EchoError: n above 32 for bit-packing, an unknown mode, or a missing argument.

    Source: ``TreeMaskMode`` of sglang 0.5.23.
    """
    grid = _Grid(packed, max_verify_tokens_per_req)
    n = grid.n
    row = torch.arange(grid.n, device=packed.mask.device)
    if mode == "QLEN_ONLY_BITPACKING":
        checks.integer("max_verify_tokens_per_req", n, 1, WORD)
        signed, kind = (torch.int16, torch.uint16) if n <= 16 else (torch.int32, torch.uint32)
        if n <= 8:
            signed = kind = torch.uint8
        words = grid.spread(packed.mask[:, 0].to(signed), (1 << row).to(signed))
        return copy_into(out, words.flatten().view(kind))
    square = grid.square()
    if mode == "QLEN_ONLY":
        return copy_into(out, square)
    if mode != "FULL_MASK" or prefix_lens is None or size is None:
        modes = "QLEN_ONLY, QLEN_ONLY_BITPACKING, or FULL_MASK with prefix_lens and size"
        raise EchoError(f"mode: expected {modes}, got {mode!r}")
    prefix = grid.prefix(prefix_lens)
    size = checks.integer("size", size, grid.size * n)
    kv = prefix + n
    begin = (n * kv).cumsum(0) - n * kv + prefix
    entry = (begin + row * kv)[..., None] + row
    full = torch.ones(size + 1, dtype=torch.bool, device=row.device)  # the last takes overflow
    full.scatter_(0, entry.flatten().clamp_(max=size), square.flatten())
    return copy_into(out, full[:size])


def tensorrt_llm(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    *,
    window: int | None = None,
    mla: bool = False,
    out: TensorRTLinks | None = None,
) -> TensorRTLinks:
    """Export TensorRT-LLM's packed mask, depth offsets and local links.

    Args:
        packed, max_verify_tokens_per_req, out: as in :func:`sglang`.
        window, mla: of the model's attention; rejected: its dynamic trees have no kernels for it.

    Raises:
        EchoError: n below 1, buffers that do not fit, a sliding window, or latent attention.

    Source: ``spec_decoding_packed_mask`` and ``spec_decoding_position_offsets`` of TensorRT-LLM.
    """
    if window is not None or mla:
        expected = "full attention, without a window or latents: TensorRT-LLM has no other trees"
        raise EchoError(f"window, mla: expected {expected}, got {window}, {mla}")
    grid = _Grid(packed, max_verify_tokens_per_req)
    lens = packed.indptr.diff().clamp(max=grid.n)
    offsets = grid.spread(packed.depth, 0)
    tokens = grid.spread(packed.tokens.int(), 0)
    links = grid.links(torch.int32)
    return copy_into(out, TensorRTLinks(grid.words(), offsets, lens, tokens, *links))


def hugging_face(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    prefix_lens: Tensor,
    past_len: int,
    *,
    left_padded: bool | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.bool,
    out: HuggingFaceInputs | None = None,
) -> HuggingFaceInputs:
    """Export ids, positions and a 4-D mask for a transformers model with a contiguous cache.

    For custom loops and tests, not for speed. Texts begin at entry 0 and rows are appended after
    entry ``past_len``; after the moves of ``echo.compact(..., past_len=past_len)`` crop the cache
    to the longest text.

    Args:
        packed, max_verify_tokens_per_req, prefix_lens, out: as in :func:`sglang`.
        past_len: length of the cache, a host int.
        left_padded: must be False, and given for more than one request. Texts of a left-padded
            cache end together, which fails once requests accept different numbers of drafts. Move
            them to entry 0 after prefill: ``keys.gather(2, index)``, where ``index`` is
            ``(arange(past_len) + past_len - prefix_lens[:, None]).clamp(max=past_len - 1)``.
        window: positions visible in a sliding-window layer, the row's own included, for its entry
            in transformers' masks by kind of layer. Defaults to all.
        dtype: of the mask: bool, or a float type.

    Raises:
        EchoError: shapes or dtypes that do not fit, or a cache that is left-padded.

    Source: 4-D masks of transformers 5.23.0.
    """
    if window is not None:
        packed = checks.instance("packed", packed, PackedTree).windowed(window)
    grid = _Grid(packed, max_verify_tokens_per_req)
    prefix = grid.prefix(prefix_lens)
    past_len = checks.integer("past_len", past_len, 0)
    if left_padded or (left_padded is None and packed.batch > 1):
        expected = "False, a cache whose texts begin at entry 0"
        raise EchoError(f"left_padded: expected {expected}, got {left_padded}")
    shape = (packed.batch, 1, grid.n, past_len + grid.n)
    device = prefix.device
    if out is None:
        mask = torch.empty(shape, dtype=dtype, device=device)
    else:  # the largest buffer by far, so it is written in place
        mask = checks.instance("out", out, HuggingFaceInputs).attention_mask
        checks.tensor("out.attention_mask", mask, shape, dtype, device)
    positions = grid.spread(packed.depth, 0) + prefix
    inputs = copy_into(out, HuggingFaceInputs(grid.spread(packed.tokens, 0), positions, mask))
    column = torch.arange(past_len, dtype=torch.int32, device=device)
    past = (column < prefix.int())[:, None, None]
    if window is not None:
        past = past & (column > (positions - window)[:, None, :, None])
    parts = mask[..., :past_len], mask[..., past_len:]
    for part, seen in zip(parts, (past, grid.square()[:, None]), strict=True):
        if dtype == torch.bool:
            part.copy_(seen)
        else:
            part.zero_().masked_fill_(~seen, torch.finfo(dtype).min)
    return inputs


def unpad(packed: PackedTree, values: Tensor) -> Tensor:
    """Gather packed rows from a uniform layout: sampled tokens, log-probabilities, states.

    Args:
        packed: the step.
        values: [B, n, ...], any dtype.

    Returns:
        [N, ...]; rows without a value (pads, and rows past the first n of their request) get -1 (no
        token), NaN, or 0 if the dtype has neither.

    Raises:
        EchoError: another batch size.
    """
    n = checks.tensor("values", values, [packed.batch, "n", "..."]).shape[1]
    kind = values.dtype
    local = packed.local_row
    nothing = math.nan if kind.is_floating_point or kind.is_complex else -1 if kind.is_signed else 0
    there = (packed.request < packed.batch) & (local < n)
    return select_rows(values.flatten(0, 1), packed.request * n + local, there, nothing)


class _Grid:
    """Where each packed row goes among n rows of every request. Costs O(N).

    Attributes:
        size: B * n.
        place: int64 [N], index in [B * n]; B * n for pad rows and rows past the first n.
        local: int64 [N], row within its request, or among the pad rows.
    """

    def __init__(self, packed: PackedTree, n: int) -> None:
        self.packed = checks.instance("packed", packed, PackedTree)
        self.n = checks.integer("max_verify_tokens_per_req", n, 1)
        self.size = packed.batch * self.n
        row = torch.arange(packed.num_rows, device=packed.indptr.device)
        self.local = row - packed.indptr.index_select(0, packed.request)
        place = packed.request * self.n + self.local
        self.place = torch.where(self.local < self.n, place, self.size).clamp_(max=self.size)

    def prefix(self, prefix_lens: Tensor) -> Tensor:
        """Check the argument and return it as int64 [B, 1]."""
        batch = [self.packed.batch]
        device = self.place.device
        checks.tensor("prefix_lens", prefix_lens, batch, checks.INTEGERS, device)
        return prefix_lens.long()[:, None]

    def spread(self, values: Tensor, fill: Tensor | int) -> Tensor:
        """Scatter ``values`` [N, ...] to [B, n, ...], with ``fill`` (broadcast) on pad rows."""
        made = values.new_empty(self.size + 1, *values.shape[1:])
        grid = made[:-1].view(self.packed.batch, self.n, *values.shape[1:])
        grid[:] = fill
        if values.dim() == 1:
            made.scatter_(0, self.place, values)
        else:
            made.index_copy_(0, self.place, values)
        return grid

    def links(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Local rows of first child and next sibling [B, n]; -1: none. Siblings are adjacent."""
        place = self.place
        local = self.local.to(dtype)
        family = place - self.local + self.packed.parent  # the parent's place
        inside = place < self.size
        again = (family[1:] == family[:-1]) & inside[1:]  # next sibling of the row before it
        first = inside & (self.packed.parent >= 0)
        first[1:] &= ~again
        links = torch.full((2, self.size + 1), -1, dtype=dtype, device=place.device)
        links[0].scatter_(0, torch.where(first, family, self.size), local)
        links[1].scatter_(0, place[:-1], torch.where(again, local[1:], -1))
        child, sibling = links[:, :-1].view(2, self.packed.batch, self.n).unbind()
        return child, sibling

    def words(self) -> Tensor:
        """Mask words int32 [B, n, ceil(n / 32)]; a pad row sees itself."""
        words = -(-self.n // WORD)
        own = own_bits(torch.arange(self.n, device=self.place.device), words)
        return self.spread(F.pad(self.packed.mask, (0, words - self.packed.mask.shape[1])), own)

    def square(self) -> Tensor:
        """bool [B, n, n]; a pad row sees itself."""
        own = torch.eye(self.n, dtype=torch.bool, device=self.place.device)
        return self.spread(unpack_bits(self.packed.mask, self.n), own)
