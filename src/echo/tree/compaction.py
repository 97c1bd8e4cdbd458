"""After acceptance: which cache entries, hidden states and log-probabilities stay, and where they go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo import checks, kernels
from echo.errors import EchoError
from echo.tree.accepted import Accepted
from echo.tree.packed import PackedTree, copy_into, slot_mapping


@dataclass(frozen=True)
class Compaction:
    """Fixed-shape lists for the accepted path of every request; D + 1 = deepest layer + 1, root first.

    Attributes:
        accept_index: int32 [B, D + 1], global rows whose sampled token was emitted (log-probabilities); -1 beyond. SGLang's.
        gather: int64 [B, D + 1], the same, 0 beyond: hidden-state rows for the next draft-extend; mask by ``valid``.
        valid: bool [B, D + 1], the entry exists.
        positions: int64 [B, D + 1], position of each kept row; 0 beyond.
        source, target: int64 [B, D + 1], where a kept row's keys and values lie, and where they belong: places in the request's own
            cache, or slots of a paged one. Beyond, and with nothing kept, both are the dummy: a copy of it does nothing. Where a path
            is the first rows already (a chain), source equals target too.
        prefix_lens: int64 [B], tokens in each request's cache after the step.
    """

    accept_index: Tensor
    gather: Tensor
    valid: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    prefix_lens: Tensor


def compact(
    packed: PackedTree,
    accepted: Accepted,
    prefix_lens: Tensor,
    *,
    page_table: Tensor | None = None,
    page_size: int = 1,
    pad_slot_id: int | None = None,
    past_len: int | None = None,
    out: Compaction | None = None,
) -> Compaction:
    """The lists that make an accepted path the end of its request's cache. No read-backs.

    A row's keys and values were written behind the context at the row's place in its request (:meth:`PackedTree.slot_mapping`), and a tree's
    accepted rows are scattered there: without the move the next step attends to rejected tokens. A target never lies behind its source,
    so copying in order of the columns is safe; a parallel copy must gather before it scatters.

    Args:
        packed, accepted: the step.
        prefix_lens: int32 or int64 [B], tokens in each request's cache before the step.
        page_table: int32 or int64 [B, pages], for slots of a paged cache; places in the request's own contiguous cache where not given.
        page_size: as in :meth:`PackedTree.slot_mapping`.
        pad_slot_id: a slot that no request owns, needed with a page table; or a place in a contiguous cache, where it defaults to 0: an engine
            that does not copy from ``source``, but writes rows (``gather``) to ``target``, gives a place without a token, or masks by
            ``valid``.
        past_len: where every request's rows lie behind so many entries of a contiguous cache, and not behind its own context: transformers'
            ``DynamicCache`` appends behind the longest text. Texts begin at place 0.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit, no dummy for a page table, or past with one.

    Example:
        A contiguous cache [B, length, heads, dim]::

            moved = cache.gather(1, lists.source[..., None, None].expand(-1, -1, heads, dim))
            cache.scatter_(1, lists.target[..., None, None].expand(-1, -1, heads, dim), moved)
    """
    device = checks.instance("packed", packed, PackedTree).tokens.device
    checks.instance("accepted", accepted, Accepted)
    batch, steps = checks.tensor(
        "accepted.rows", accepted.rows, [packed.batch, "D + 1"], torch.int64, device
    ).shape
    checks.tensor("prefix_lens", prefix_lens, [batch], checks.INTEGERS, device)
    page_size = checks.integer("page_size", page_size, 1)
    if page_table is not None:
        checks.tensor("page_table", page_table, [batch, "pages"], checks.INTEGERS, device)
        if pad_slot_id is None:
            raise EchoError(
                "pad_slot_id: expected a slot that no request owns, to go with page_table, got None"
            )
        if past_len is not None:
            raise EchoError(f"past_len: expected None, to go with page_table, got {past_len!r}")
    spare = 0 if pad_slot_id is None else checks.integer("pad_slot_id", pad_slot_id, 0)
    behind = -1 if past_len is None else checks.integer("past_len", past_len, 0)
    fused = kernels.fused("packing", accepted.rows)
    if fused is not None:
        step = (
            accepted.rows,
            accepted.num_emitted,
            packed.indptr,
            prefix_lens,
            page_table,
            page_size,
            spare,
            behind,
        )
        buffers = None if out is None else check(out, batch, steps, device)
        if buffers is not None and not all(buffer.is_contiguous() for buffer in buffers.values()):
            buffers = None
        lists = Compaction(**fused.compact(*step, out=buffers))
        return lists if buffers is not None else copy_into(out, lists)
    gone, rows = accepted.rows < 0, accepted.rows.clamp(min=0)
    begin = prefix_lens.long()[:, None]
    place = begin + torch.arange(steps, device=device)
    lies = rows - packed.indptr[:-1, None] + (begin if past_len is None else behind)
    if page_table is None:
        source, target = (x.masked_fill(gone, spare) for x in (lies, place))
    else:
        request = torch.arange(batch, device=device)[:, None]
        places = torch.stack([lies, place]).masked_fill_(gone, -1)
        source, target = slot_mapping(places, request, page_table, page_size, spare).unbind()
    lists = Compaction(
        accept_index=accepted.rows.int(),
        gather=rows,
        valid=~gone,
        positions=place.masked_fill(gone, 0),
        source=source,
        target=target,
        prefix_lens=prefix_lens.long() + accepted.num_emitted,
    )
    return copy_into(out, lists)


def check(out: Compaction, batch: int, steps: int, device: torch.device) -> dict[str, Tensor]:
    """The buffers by name, once all of them fit; an EchoError names the first that does not."""
    kinds = {"accept_index": torch.int32, "valid": torch.bool}
    checks.instance("out", out, Compaction)
    return {
        name: checks.tensor(
            f"out.{name}",
            value,
            [batch] if name == "prefix_lens" else [batch, steps],
            kinds.get(name, torch.int64),
            device,
        )
        for name, value in vars(out).items()
    }
