"""Slots of a paged cache: where rows are written, where they must not be, how values read back.

B requests, N rows, Hkv KV heads of size D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into


def slot_mapping(
    place: Tensor, request: Tensor, page_table: Tensor, page_size: int, pad_slot_id: int
) -> Tensor:
    """Map tokens to KV slots of a paged cache: int64, shaped as ``place``.

    Args:
        place: int64, token positions; ``pad_slot_id`` where negative or past the page table.
        request: int32 or int64, each token's request, which broadcasts to ``place``.
        page_table: int32 or int64 [B, pages]; ``pad_slot_id`` if the page is negative.
        page_size: tokens of a page.
        pad_slot_id: a slot that no request owns.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> place, pages = torch.tensor([7, 8, -1]), torch.tensor([[3, 5]])
        >>> slot_mapping(place, torch.tensor([0]), pages, page_size=8, pad_slot_id=0).tolist()
        [31, 40, 0]
    """
    checks.tensor("page_table", page_table, ["B", "pages"], checks.INTEGERS, place.device)
    page_size = checks.integer("page_size", page_size, 1)
    pad_slot_id = checks.integer("pad_slot_id", pad_slot_id, 0)
    batch, pages = page_table.shape
    if batch == 0 or pages == 0:
        return torch.full_like(place, pad_slot_id)
    wanted = place // page_size
    column = wanted.clamp(0, pages - 1)
    page = page_table.flatten()[request.long().clamp(max=batch - 1) * pages + column].long()
    slot = page * page_size + place % page_size
    return torch.where((column == wanted) & (page >= 0), slot, pad_slot_id)


def refuse_shared(
    slots: Tensor,
    shared_pages: Tensor,
    page_size: int,
    pad_slot_id: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Redirect ``slots`` in shared pages, or in no page, to ``pad_slot_id``. Sync-free.

    An engine must copy a page that several requests read (a common prefix, a fork's last page)
    before one of them writes to it. If it has not, this protects the other requests' entries, but
    the row has no key to attend to: give it no target token, so that the accepted path ends before
    it, at worst with no token in this step (``StepCounts.no_output``)::

        slots = refuse_shared(packed.slot_mapping(...), shared_pages, page_size, pad_slot_id)
        target_tokens = torch.where(slots == pad_slot_id, -1, target_tokens)

    Args:
        slots: int64, any shape: :meth:`PackedTree.slot_mapping`, or a compaction's ``target``.
        shared_pages: bool [pages], pages that more than one request reads.
        page_size: tokens of a page.
        pad_slot_id: a slot that no request owns.
        out: persistent buffer, which may be ``slots``.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> slots, shared = torch.tensor([5, 8, 9]), torch.tensor([False, True, False])
        >>> refuse_shared(slots, shared, page_size=4, pad_slot_id=0).tolist()
        [0, 8, 9]
    """
    checks.tensor("slots", slots, list(slots.shape), torch.int64)
    checks.tensor("shared_pages", shared_pages, ["pages"], torch.bool, slots.device)
    page_size = checks.integer("page_size", page_size, 1)
    pad_slot_id = checks.integer("pad_slot_id", pad_slot_id, 0)
    pages = shared_pages.shape[0]
    page = slots // page_size
    there = (page >= 0) & (page < pages)
    shared = F.pad(shared_pages, (0, 1), value=True)[torch.where(there, page, pages)]
    return copy_into(out, slots.masked_fill(shared, pad_slot_id))


def as_cached(values: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Round keys or values to what a cache of ``dtype`` returns, saturating as GPUs do.

    Plain decoding reads its own row from the cache, in the cache's precision. Drafts kept outside
    an 8-bit cache (``tree_key``, ``tree_value`` of :func:`echo.kernels.tree_attention`) must be
    rounded the same way, or they are scored with more precise keys than those that stay.

    Args:
        values: float [N, Hkv, D].
        dtype: of the cache, such as torch.float8_e4m3fn.
        scale: float32 [Hkv], the cache's ``key_scale`` or ``value_scale``. Defaults to 1.

    Returns:
        [N, Hkv, D] in the dtype of ``values``.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> as_cached(torch.tensor([[[0.3]]]), torch.float8_e4m3fn).item()
        0.3125
    """
    heads = checks.tensor("values", values, ["N", "Hkv", "D"], checks.FLOATS).shape[1]
    if not dtype.is_floating_point:
        raise EchoError(f"dtype: expected a float dtype, got {dtype}")
    bound = torch.finfo(dtype).max
    factor = torch.ones((), device=values.device)
    if scale is not None:
        factor = checks.tensor("scale", scale, [heads], torch.float32, values.device)[:, None]
    stored = (values.float() / factor).clamp(-bound, bound).to(dtype)
    return (stored.float() * factor).to(values.dtype)
