"""After the target's pass: the walk that accepts, and what of the cache, hidden states and log-probabilities stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError
from echo.kernels import reference
from echo.tree.packed import PackedTree, copy_into, slot_mapping


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every request, root first, and the tokens that the step emits.

    A row counts here once its own sampled token was emitted. A walk ends *before* a row whose target has no number (token -1), so a
    request may emit nothing: its length is 0, its ``bonus`` -1, its context as before, and its root stays the root of the next step.

    Attributes:
        tokens: int64 [B, depth + 1], emitted tokens, accepted drafts and then the bonus token; -1 beyond.
        rows: int64 [B, depth + 1], global rows of the root and the accepted drafts: row i's own sampled token is
            ``tokens[:, i]``, and the key/value entries of exactly these rows stay; -1 beyond.
        num_emitted: int64 [B], tokens emitted: accepted drafts + 1; 0 for a request without rows, or whose root row has no number.
        bonus: int64 [B], the last emitted token, root of the next step, whose keys and values are not written yet; -1 where nothing
            was emitted: ``torch.where(accepted.num_emitted > 0, accepted.bonus, root_tokens)`` are the next roots.
        cut_row: int64 [B], where a walk was cut: the draft that equals ``bonus``, but emitted no token of its own, since the target has no
            number there or the answer is over; -1 elsewhere. None: no walk was cut.
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
        """From what a walk returns, as in :func:`echo.kernels.accept`: the bonus token is the last that was emitted."""
        return cls(
            tokens,
            rows,
            num_emitted,
            tokens.gather(1, (num_emitted - 1).clamp(min=0)[:, None])[:, 0],
            cut_row,
        )

    @property
    def num_accepted_drafts(self) -> Tensor:
        """int64 [B]: drafts that the target accepted, that at which a walk was cut among them.

        Where as many drafts were accepted as tokens emitted, what is deeper was not judged: nothing is known of it. Elsewhere all was.
        """
        path = (self.num_emitted - 1).clamp(min=0)
        return path if self.cut_row is None else path + (self.cut_row >= 0)

    def truncate(
        self, *, eos_tokens: Tensor | None = None, max_new_tokens: Tensor | None = None
    ) -> Accepted:
        """Without what lies behind the end of an answer: as if the target had no number there. On the device, nothing is read back.

        Args:
            eos_tokens: int64 [n], tokens that end an answer, themselves included.
            max_new_tokens: int64 [B], tokens that each answer may still get; 0 emits nothing.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.

        Example:
            >>> tokens, rows = torch.tensor([[5, 2, 40]]), torch.tensor([[0, 1, 2]])
            >>> seen = Accepted.of(tokens, rows, torch.tensor([3])).cut(eos_tokens=torch.tensor([2]))
            >>> seen.tokens.tolist(), seen.num_emitted.tolist()
            ([[5, 2, -1]], [2])
        """
        if eos_tokens is None and max_new_tokens is None:
            return self
        device = self.num_emitted.device
        if max_new_tokens is not None:
            checks.tensor(
                "max_new_tokens", max_new_tokens, list(self.num_emitted.shape), torch.int64, device
            )
        if eos_tokens is not None:
            checks.tensor("eos_tokens", eos_tokens, ["n"], torch.int64, device)
        rows, tokens, lengths, beyond = reference.truncate(
            self.rows, self.tokens, self.num_emitted, self.cut_row, max_new_tokens, eos_tokens
        )
        return Accepted.of(tokens, rows, lengths, beyond)


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
    """Accepts, from each root down, the child that equals the target's own token.

    Lossless for greedy decoding and for sampling, whatever was drafted and selected: every emitted token is the target's. A walk ends
    before a row without a token, as :class:`Accepted` says.

    Args:
        packed: the step.
        target_tokens: int64 [N], the token that the engine sampled after each row; negative where there is none.
        logits: float [N, V] instead, for greedy decoding; NaN never wins, and a row without a number above -inf has no token.
        max_new_tokens: int64 [B], tokens that each answer may still get; what lies behind is cut off as by :meth:`Accepted.truncate`.
        eos_tokens: int64 [n], tokens that end an answer, likewise.
        backend: "auto", "torch" or "triton", as in :mod:`echo.kernels`; both give the same bits.
        out: buffers of the same shapes, which are written to and returned.

    Raises:
        EchoError: neither or both were given, shapes or dtypes that do not fit, or a backend that is not there.
    """
    if (target_tokens is None) == (logits is None):
        raise EchoError("target_tokens, logits: expected exactly one of them")
    device = checks.instance("packed", packed, PackedTree).tokens.device
    links = packed.parent, packed.indptr, packed.tokens
    if logits is not None:
        target = checks.tensor("logits", logits, [packed.num_rows, "V"], checks.FLOATS, device)
    else:
        target = checks.tensor(
            "target_tokens", target_tokens, [packed.num_rows], torch.int64, device
        )
    buffers = None
    if out is not None:
        shape = [packed.batch, packed.max_depth + 1]
        given = {
            "rows": out.rows,
            "tokens": out.tokens,
            "num_emitted": out.num_emitted,
            "cut_row": out.cut_row,
            "bonus": out.bonus,
        }
        sizes = {"rows": shape, "tokens": shape}
        buffers = tuple(
            checks.tensor(f"out.{k}", v, sizes.get(k, shape[:1]), torch.int64, device)
            for k, v in given.items()
        )
    rows, tokens, lengths, beyond, bonus = kernels.accept(
        *links,
        target,
        packed.max_depth,
        max_new_tokens=max_new_tokens,
        eos_tokens=eos_tokens,
        out=buffers,
        backend=backend,
    )
    return Accepted(tokens, rows, lengths, bonus, beyond)


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
    if kernels.use_triton(accepted.rows):
        from echo.kernels import pack

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
        lists = Compaction(**pack.compact(*step, out=buffers))
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
