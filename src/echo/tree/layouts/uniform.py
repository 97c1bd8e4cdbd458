"""Layouts of n rows for every request: SGLang's trees, TensorRT-LLM, Hugging Face. The gain of ragged trees is lost in them.

A tree's rows stay in canonical order (root, then by depth, parent, candidate), so siblings lie side by side, and the first n rows
of a tree are a tree. A request of more than n rows exports its first n: a smaller tree, lossless where the engine's own verification
reads the links, and where :func:`unpad` gives what it computed to :func:`echo.verify`: rows beyond have no target token, none is accepted.
``packed.max_verify_tokens_per_req`` is always enough, and ``packed.validate(max_verify_tokens_per_req=n)`` names a request that would be cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.tree.packed import WORD, PackedTree, copy_into, unpack_bits


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


def sglang(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    prefix_lens: Tensor,
    *,
    out: SGLangLinks | None = None,
) -> SGLangLinks:
    """Draft tokens, positions and links of SGLang's tree verification.

    SGLang's trees are uniform: its target verifies B * n rows instead of N, so the gain of ragged trees is lost where n is above their
    mean size.

    Args:
        packed: the step.
        max_verify_tokens_per_req: rows of every request.
        prefix_lens: int32 or int64 [B], SGLang's ``seq_lens``.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Source: ``build_tree_kernel_efficient`` of sglang 0.5.23.
    """
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, packed.tokens.device)
    grid = _Grid(packed, max_verify_tokens_per_req)
    token, sibling = grid.links()
    links = SGLangLinks(
        draft_tokens=grid.spread(packed.tokens, 0).flatten(),
        positions=(grid.spread(packed.depth, 0) + prefix_lens.long()[:, None]).flatten(),
        retrive_index=torch.arange(
            packed.batch * max_verify_tokens_per_req, device=prefix_lens.device
        ).view(packed.batch, max_verify_tokens_per_req),
        retrive_next_token=token,
        retrive_next_sibling=sibling,
    )
    return copy_into(out, links)


def sglang_mask(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    mode: Literal["FULL_MASK", "QLEN_ONLY", "QLEN_ONLY_BITPACKING"],
    *,
    prefix_lens: Tensor | None = None,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SGLang's ``tree_mask`` for ``max_verify_tokens_per_req`` rows of every request; a pad row sees itself (and, in FULL_MASK, the context).

    Args:
        packed: the step.
        max_verify_tokens_per_req: rows of every request; at most 32 for bit-packing.
        mode: FULL_MASK: bool [size], for each request n x (context + n), row by row: n bytes for each token of context, which is why the
            other modes exist. QLEN_ONLY: bool [B, n, n]. QLEN_ONLY_BITPACKING: uint8, uint16 or uint32 [B * n], bit j is row j.
        prefix_lens: int32 or int64 [B], for FULL_MASK.
        size: entries, for FULL_MASK: at least sum(context + n) * n, which only the host knows; ones beyond.
        out: persistent buffer.

    Raises:
        EchoError: n above 32 for bit-packing, an unknown mode, or a missing argument.

    Source: ``TreeMaskMode`` of sglang 0.5.23.
    """
    if mode == "QLEN_ONLY_BITPACKING" and max_verify_tokens_per_req > WORD:
        raise EchoError(
            f"n: expected at most 32 rows for QLEN_ONLY_BITPACKING, got {max_verify_tokens_per_req}"
        )
    grid, local = (
        _Grid(packed, max_verify_tokens_per_req),
        torch.arange(max_verify_tokens_per_req, device=packed.mask.device),
    )
    if mode == "QLEN_ONLY_BITPACKING":
        kind = (
            torch.uint8
            if max_verify_tokens_per_req <= 8
            else torch.int16
            if max_verify_tokens_per_req <= 16
            else torch.int32
        )
        bits = grid.spread(packed.mask[:, 0].to(kind), (1 << local).to(kind)).flatten()
        return copy_into(
            out,
            bits
            if max_verify_tokens_per_req <= 8
            else bits.view(torch.uint16 if max_verify_tokens_per_req <= 16 else torch.uint32),
        )
    square = grid.square()
    if mode == "QLEN_ONLY":
        return copy_into(out, square)
    if mode != "FULL_MASK" or prefix_lens is None or size is None:
        raise EchoError(
            f"mode: expected QLEN_ONLY, QLEN_ONLY_BITPACKING, or FULL_MASK with context and size, got {mode!r}"
        )
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, local.device)
    size = checks.integer(
        "size", size, packed.batch * max_verify_tokens_per_req * max_verify_tokens_per_req
    )
    kv = prefix_lens.long() + max_verify_tokens_per_req
    square_begin = (
        (max_verify_tokens_per_req * kv).cumsum(0) - max_verify_tokens_per_req * kv + prefix_lens
    )
    entry = (square_begin[:, None] + local * kv[:, None])[..., None] + local
    full = torch.ones(
        size + 1, dtype=torch.bool, device=local.device
    )  # the last takes what a size too small has no room for
    return copy_into(
        out, full.scatter_(0, entry.flatten().clamp_(max=size), square.flatten())[:size]
    )


def tensorrt_llm(
    packed: PackedTree, max_verify_tokens_per_req: int, *, out: TensorRTLinks | None = None
) -> TensorRTLinks:
    """TensorRT-LLM's packed mask, depth offsets and local links, ``max_verify_tokens_per_req`` rows for every request.

    Uniform: B * n rows are verified instead of N, so the gain of ragged trees is lost where n is above their mean size.

    Args:
        packed: the step.
        max_verify_tokens_per_req: rows of every request.
        out: persistent buffers.

    Raises:
        EchoError: n below 1, or buffers that do not fit.

    Source: ``spec_decoding_packed_mask`` and ``spec_decoding_position_offsets`` of TensorRT-LLM.
    """
    grid = _Grid(packed, max_verify_tokens_per_req)
    token, sibling = grid.links(torch.int32)
    links = TensorRTLinks(
        packed_mask=grid.words(),
        position_offsets=grid.spread(packed.depth, 0),
        generation_lengths=packed.indptr.diff().clamp(max=max_verify_tokens_per_req),
        tokens=grid.spread(packed.tokens.int(), 0),
        next_token=token,
        next_sibling=sibling,
    )
    return copy_into(out, links)


def hugging_face(
    packed: PackedTree,
    max_verify_tokens_per_req: int,
    prefix_lens: Tensor,
    past_len: int,
    *,
    left_padded: bool | None = None,
    dtype: torch.dtype = torch.bool,
    out: HuggingFaceInputs | None = None,
) -> HuggingFaceInputs:
    """Token ids, position ids and a 4-D mask for a transformers model with a contiguous cache of ``past_len`` entries.

    Uniform, and the mask has past + n entries a row: for loops of one's own and for tests, not for speed. Each request's text begins at
    entry 0, and the rows are appended behind entry ``past_len``. After acceptance ``echo.compact(..., past_len=past_len)`` says which entries of the
    accepted rows go behind each text; crop the cache to the longest.

    Args:
        packed: the step.
        max_verify_tokens_per_req: rows of every request.
        prefix_lens: int32 or int64 [B], tokens of each request in the cache.
        past_len: entries of the cache, a host int.
        left_padded: must be False, and be said for more than one request. In a left-padded cache texts end together, and so they cannot
            once requests have accepted different numbers of drafts; move them to entry 0 after prefill: ``keys.gather(2, index)`` with
            ``index`` the entries ``(arange(past_len) + past_len - prefix_lens[:, None]).clamp(max=past_len - 1)``, expanded to the shape of the keys.
        dtype: of the mask: bool, or a float type.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit, or a cache that is left-padded.

    Source: 4-D masks of transformers 5.23.0.
    """
    checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS, packed.tokens.device)
    past_len = checks.integer("past_len", past_len, 0)
    if left_padded or (left_padded is None and packed.batch > 1):  # one request needs no padding
        raise EchoError(
            f"left_padded: expected False, a cache whose texts begin at entry 0, got {left_padded}"
        )
    grid, shape, device = (
        _Grid(packed, max_verify_tokens_per_req),
        (packed.batch, 1, max_verify_tokens_per_req, past_len + max_verify_tokens_per_req),
        prefix_lens.device,
    )
    column, lens = (
        torch.arange(past_len, dtype=torch.int32, device=device),
        prefix_lens.int()[:, None],
    )
    if out is None:
        mask = torch.empty(shape, dtype=dtype, device=device)
    else:  # far larger than all else: written where it belongs
        buffer = checks.instance("out", out, HuggingFaceInputs).attention_mask
        mask = checks.tensor("out.attention_mask", buffer, shape, dtype, device)
    inputs = copy_into(
        out,
        HuggingFaceInputs(
            grid.spread(packed.tokens, 0),
            grid.spread(packed.depth, 0) + prefix_lens.long()[:, None],
            mask,
        ),
    )
    least = False if dtype == torch.bool else torch.finfo(dtype).min
    for part, seen in (
        (mask[..., :past_len], (column < lens)[:, None, None]),
        (mask[..., past_len:], grid.square()[:, None]),
    ):
        part.copy_(seen) if dtype == torch.bool else part.zero_().masked_fill_(~seen, least)
    return inputs


def unpad(packed: PackedTree, values: Tensor) -> Tensor:
    """What an engine computed on uniform rows, for the packed rows: sampled tokens for :func:`echo.verify`, log-probabilities, states.

    Args:
        packed: the step.
        values: [B, n, ...], any dtype.

    Returns:
        [N, ...]; nothing on pad rows and on rows beyond the first n of their request, for which nothing was computed: -1 (no token, so
        no walk goes through them), NaN, or 0 where the dtype has neither.

    Raises:
        EchoError: another batch size.
    """
    if values.dim() < 2 or values.shape[0] != packed.batch:
        raise EchoError(f"values: expected [{packed.batch}, n, ...], got {list(values.shape)}")
    n, kind = values.shape[1], values.dtype
    nothing = math.nan if kind.is_floating_point or kind.is_complex else -1 if kind.is_signed else 0
    there = (packed.request < packed.batch) & (packed.local_row < n)
    if packed.batch * n == 0:
        return values.new_full((packed.num_rows, *values.shape[2:]), nothing)
    rows = values.flatten(0, 1).index_select(
        0, torch.where(there, packed.request * n + packed.local_row, 0)
    )
    return rows.masked_fill_(~there.view(-1, *[1] * (values.dim() - 2)), nothing)


class _Grid:
    """Where each packed row goes among n rows of every request: the work is on N rows, whatever n is.

    Attributes:
        place: int64 [N], in [B * n]; B * n for pad rows and for rows beyond the first n of their request.
        local: int64 [N], row within its request, or among the pad rows.
    """

    def __init__(self, packed: PackedTree, max_verify_tokens_per_req: int) -> None:
        self.packed, self.n = (
            checks.instance("packed", packed, PackedTree),
            checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1),
        )
        self.size = packed.batch * self.n
        self.local = torch.arange(
            packed.num_rows, device=packed.indptr.device
        ) - packed.indptr.index_select(0, packed.request)
        self.place = torch.where(
            self.local < self.n, packed.request * self.n + self.local, self.size
        ).clamp_(max=self.size)

    def spread(self, values: Tensor, fill: Tensor | int) -> Tensor:
        """``values`` [N, ...] as [B, n, ...], with ``fill``, which broadcasts to it, on pad rows."""
        made = values.new_empty(self.size + 1, *values.shape[1:])
        grid = made[:-1].view(self.packed.batch, self.n, *values.shape[1:])
        grid.copy_(fill) if isinstance(fill, Tensor) else grid.fill_(fill)
        made.scatter_(0, self.place, values) if values.dim() == 1 else made.index_copy_(
            0, self.place, values
        )
        return grid

    def links(self, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
        """First child and next sibling, local, [B, n], -1 for none. Parents rise along the rows, so siblings are neighbours."""
        place, local = self.place, self.local.to(dtype)
        family = place - self.local + self.packed.parent  # the parent's place
        inside = place < self.size
        again = (family[1:] == family[:-1]) & inside[1:]  # the next sibling of the row before it
        first = inside & (self.packed.parent >= 0)
        first[1:] &= ~again
        child, sibling = torch.full((2, self.size + 1), -1, dtype=dtype, device=place.device)
        child.scatter_(0, torch.where(first, family, self.size), local)
        sibling.scatter_(0, place[:-1], torch.where(again, local[1:], -1))
        return child[:-1].view(self.packed.batch, self.n), sibling[:-1].view(
            self.packed.batch, self.n
        )

    def words(self) -> Tensor:
        """Mask words int32 [B, n, ceil(n / 32)]; a pad row sees itself."""
        words, local = -(-self.n // WORD), torch.arange(self.n, device=self.place.device)
        own = torch.zeros(self.n, words, dtype=torch.int32, device=local.device)
        own.scatter_(1, (local >> 5)[:, None], (1 << (local & WORD - 1)).int()[:, None])
        return self.spread(F.pad(self.packed.mask, (0, words - self.packed.mask.shape[1])), own)

    def square(self) -> Tensor:
        """bool [B, n, n]; a pad row sees itself."""
        own = torch.eye(self.n, dtype=torch.bool, device=self.place.device)
        return self.spread(unpack_bits(self.packed.mask, self.n), own)
