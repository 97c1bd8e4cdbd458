"""After the target's forward pass: accept drafts, and list the KV entries and states to keep.

B requests, N rows, D the deepest layer of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError, copy_into
from echo.kernels import reference
from echo.tree.cache import slot_mapping
from echo.tree.packed import PackedTree

PER_REQUEST = "num_emitted", "cut_row", "bonus", "prefix_lens"
"""Results of shape [B]; the others are [B, D + 1]."""


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every request, root first, and the tokens that the step emits.

    A path holds the rows whose own sampled token was emitted. It ends *before* a row for which the
    target has no token (-1), so a request may emit nothing: then its prefix is unchanged, and its
    root stays the root of the next step.

    Attributes:
        tokens: int64 [B, D + 1], emitted tokens: accepted drafts, then the bonus token; then -1.
        rows: int64 [B, D + 1], the path's rows, then -1: the token sampled at row i is
            ``tokens[:, i]``, and exactly these rows' keys and values are kept.
        num_emitted: int64 [B], number of accepted drafts, plus 1 for the bonus token; 0 for a
            request without rows, or whose root has no token.
        bonus: int64 [B], the last token emitted and root of the next step, whose keys and values
            are not written yet; -1 if none was emitted. The next roots are
            ``torch.where(accepted.num_emitted > 0, accepted.bonus, root_tokens)``.
        cut_row: int64 [B], the draft that equals ``bonus`` but emitted no token of its own, because
            the target has none there or the answer is over; -1 for no such draft. None: no cuts.
    """

    tokens: Tensor
    rows: Tensor
    num_emitted: Tensor
    bonus: Tensor
    cut_row: Tensor | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, rows: Tensor, num_emitted: Tensor, cut_row: Tensor | None = None
    ) -> Accepted:
        """Build from another verification's ``tokens, rows, num_emitted, cut_row``.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        batch, steps = checks.tensor("tokens", tokens, ["B", "D + 1"], torch.int64).shape
        checks.tensor("rows", rows, [batch, steps], torch.int64, tokens.device)
        checks.tensor("num_emitted", num_emitted, [batch], torch.int64, tokens.device)
        if cut_row is not None:
            checks.tensor("cut_row", cut_row, [batch], torch.int64, tokens.device)
        with checks.reading(f"num_emitted: expected at most {steps} tokens"):
            bonus = tokens.gather(1, (num_emitted - 1).clamp(min=0)[:, None])[:, 0]
        return cls(tokens, rows, num_emitted, bonus, cut_row)

    @property
    def num_accepted_drafts(self) -> Tensor:
        """int64 [B]: number of drafts that the target accepted, ``cut_row`` included.

        Where it equals ``num_emitted``, deeper drafts were not judged.
        """
        path = (self.num_emitted - 1).clamp(min=0)
        return path if self.cut_row is None else path + (self.cut_row >= 0)

    @property
    def last_row(self) -> Tensor:
        """int64 [B]: the deepest row whose token was emitted; -1 if there is none.

        A state-space layer continues from the state after this row.
        """
        at = (self.num_emitted - 1).clamp(min=0)[:, None]
        return self.rows.gather(1, at)[:, 0]

    def truncate(
        self, *, eos_tokens: Tensor | None = None, max_new_tokens: Tensor | None = None
    ) -> Accepted:
        """End answers as if the target had no token after their end. Sync-free.

        Args:
            eos_tokens: int64 [n], tokens that end an answer as its last token.
            max_new_tokens: int64 [B], tokens that each answer may still get; 0 emits nothing.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        if eos_tokens is None and max_new_tokens is None:
            return self
        if max_new_tokens is not None:
            batch = list(self.num_emitted.shape)
            checks.tensor("max_new_tokens", max_new_tokens, batch, torch.int64, self.rows.device)
        if eos_tokens is not None:
            checks.tensor("eos_tokens", eos_tokens, ["n"], torch.int64, self.rows.device)
        path = self.rows, self.tokens, self.num_emitted, self.cut_row
        rows, tokens, num_emitted, cut_row = reference.truncate(*path, max_new_tokens, eos_tokens)
        return Accepted.of(tokens, rows, num_emitted, cut_row)


def accept(
    packed: PackedTree,
    target_tokens: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None,
    backend: str = "auto",
    out: Accepted | None = None,
) -> Accepted:
    """Accept, from each root down, the child that equals the target's own token.

    Lossless for greedy decoding and for sampling, whatever was drafted and selected: every emitted
    token is the target's.

    Args:
        packed: the step.
        target_tokens: int64 [N], the token that the engine sampled at each row; -1 for none.
        logits: float [N, V] instead, for greedy decoding, as in :func:`echo.kernels.accept`.
        max_new_tokens, eos_tokens: as in :meth:`Accepted.truncate`.
        backend: "auto", "torch" or "triton", as in :mod:`echo.kernels`; all give the same bits.
        out: buffers of the same shapes, written to and returned.

    Raises:
        EchoError: neither or both of ``target_tokens`` and ``logits``, shapes or dtypes that do not
            fit, or an unavailable backend.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [3]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=4, words=1)
        >>> accepted = accept(packed, torch.tensor([3, 0, 5, 0]))  # rows 7, 1, 3, 2
        >>> ended = accepted.truncate(eos_tokens=torch.tensor([3]))
        >>> accepted.tokens.tolist(), ended.tokens.tolist()
        ([[3, 5, -1]], [[3, -1, -1]])
        >>> same = Accepted.of(accepted.tokens, accepted.rows, accepted.num_emitted)
        >>> moves = compact(packed, same, torch.tensor([10]))  # the cache holds 10 tokens
        >>> moves.source.tolist(), moves.target.tolist(), moves.prefix_lens.tolist()
        ([[10, 12, 0]], [[10, 11, 0]], [12])
    """
    if (target_tokens is None) == (logits is None):
        raise EchoError("target_tokens, logits: expected exactly one of them")
    device = checks.instance("packed", packed, PackedTree).tokens.device
    n = packed.num_rows
    if logits is not None:
        target = checks.tensor("logits", logits, [n, "V"], checks.FLOATS, device)
    else:
        target = checks.tensor("target_tokens", target_tokens, [n], torch.int64, device)
    names = "rows", "tokens", "num_emitted", "cut_row", "bonus"  # in the order of the results
    buffers = None
    if out is not None:
        found = _buffers(out, Accepted, (packed.batch, packed.max_depth + 1), device)
        buffers = tuple(found[name] for name in names)
    step = packed.parent, packed.indptr, packed.tokens, target, packed.max_depth
    results = kernels.accept(
        *step, max_new_tokens=max_new_tokens, eos_tokens=eos_tokens, out=buffers, backend=backend
    )
    return Accepted(**dict(zip(names, results, strict=True)))


@dataclass(frozen=True)
class Compaction:
    """Fixed-shape lists of each request's accepted path, root first.

    Attributes:
        accept_index: int32 [B, D + 1], rows whose token was emitted (SGLang's name), then -1.
        gather: int64 [B, D + 1], the same rows, then 0: indices of hidden states for the next draft
            extend, to be masked by ``valid``.
        valid: bool [B, D + 1], whether the entry is on the path.
        positions: int64 [B, D + 1], position of each kept row, then 0.
        source, target: int64 [B, D + 1], where a kept row's keys and values are, and where they
            belong: entries of the request's contiguous cache, or slots of a paged one. Both are
            ``pad_slot_id`` past the path, and equal where a row need not move.
        prefix_lens: [B], tokens in each request's cache after the step, in the dtype of those
            before it.
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
    """List the moves that make each accepted path the end of its request's cache. Sync-free.

    Rows were written one after another from the end of the prefix
    (:meth:`PackedTree.slot_mapping`), so the accepted rows of a tree are scattered, and without
    these moves the next step would attend to rejected tokens. A target never lies after its source:
    copying column by column is safe, and a parallel copy must gather before it scatters.

    Args:
        packed, accepted: the step.
        prefix_lens: int32 or int64 [B], tokens in each request's cache before it, root not counted.
        page_table: int32 or int64 [B, pages] of a paged cache. Defaults to a contiguous one.
        page_size: as in :meth:`PackedTree.slot_mapping`.
        pad_slot_id: a slot that no request owns, required with a page table; or an entry of a
            contiguous cache. Defaults to 0, which is right if ``target`` is filled from ``source``;
            to write other rows to ``target``, pass an entry without a token, or mask by ``valid``.
        past_len: entries of a contiguous cache after which all rows were appended, instead of after
            each request's prefix, as transformers' ``DynamicCache`` does; texts begin at entry 0.
        out: persistent buffers.

    Raises:
        EchoError: shapes or dtypes that do not fit, a page table without ``pad_slot_id``, or one
            with ``past_len``.

    Example:
        A contiguous cache [B, length, heads, dim]::

            moved = cache.gather(1, moves.source[..., None, None].expand(-1, -1, heads, dim))
            cache.scatter_(1, moves.target[..., None, None].expand(-1, -1, heads, dim), moved)
    """
    device = checks.instance("packed", packed, PackedTree).tokens.device
    rows = checks.instance("accepted", accepted, Accepted).rows
    batch = packed.batch
    steps = checks.tensor("accepted.rows", rows, [batch, "D + 1"], torch.int64, device).shape[1]
    checks.tensor("prefix_lens", prefix_lens, [batch], checks.INTEGERS, device)
    page_size = checks.integer("page_size", page_size, 1)
    if page_table is not None:
        checks.tensor("page_table", page_table, [batch, "pages"], checks.INTEGERS, device)
        paged = "to go with page_table, got"
        if pad_slot_id is None:
            raise EchoError(f"pad_slot_id: expected a slot that no request owns, {paged} None")
        if past_len is not None:
            raise EchoError(f"past_len: expected None, {paged} {past_len!r}")
    spare = 0 if pad_slot_id is None else checks.integer("pad_slot_id", pad_slot_id, 0)
    past = -1 if past_len is None else checks.integer("past_len", past_len, 0)
    if kernels.use_triton(rows):
        from echo.kernels import pack

        step = rows, accepted.num_emitted, packed.indptr, prefix_lens, page_table
        buffers = None
        if out is not None:
            kinds = {"accept_index": torch.int32, "valid": torch.bool}
            kinds["prefix_lens"] = prefix_lens.dtype
            buffers = _buffers(out, Compaction, rows.shape, device, **kinds)
            if not all(x.is_contiguous() for x in buffers.values()):
                buffers = None
        lists = Compaction(**pack.compact(*step, page_size, spare, past, out=buffers))
        return lists if buffers is not None else copy_into(out, lists)
    past_end = rows < 0
    kept = rows.clamp(min=0)
    begin = prefix_lens.long()[:, None]
    positions = begin + torch.arange(steps, device=device)
    written = kept - packed.indptr[:-1, None] + (begin if past_len is None else past)
    if page_table is None:
        source, target = (x.masked_fill(past_end, spare) for x in (written, positions))
    else:
        request = torch.arange(batch, device=device)[:, None]
        places = torch.stack([written, positions]).masked_fill_(past_end, -1)
        source, target = slot_mapping(places, request, page_table, page_size, spare).unbind()
    lists = Compaction(
        accept_index=rows.int(),
        gather=kept,
        valid=~past_end,
        positions=positions.masked_fill(past_end, 0),
        source=source,
        target=target,
        prefix_lens=prefix_lens + accepted.num_emitted.to(prefix_lens.dtype),
    )
    return copy_into(out, lists)


def _buffers(
    out: object, kind: type[Any], shape: Sequence[int], device: torch.device, **dtypes: torch.dtype
) -> dict[str, Tensor]:
    """Check that the buffers fit, int64 unless in ``dtypes``, and return them by name."""
    checks.instance("out", out, kind)
    return {
        name: checks.tensor(
            f"out.{name}",
            getattr(out, name),
            shape[:1] if name in PER_REQUEST else shape,
            dtypes.get(name, torch.int64),
            device,
        )
        for name in kind.__dataclass_fields__
    }
