"""Flatten & Pack: the selected rows of all requests as one dense, fixed-size step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError
from echo.tree.supertree import SuperTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.tree.accept import Accepted

WORD = 32
"""Bits of a mask word."""

T = TypeVar("T")


@dataclass(frozen=True)
class PackedTree:
    """Exactly N rows: the requests' trees one after another, each root first, then by depth, parent, candidate; then pads.

    Attributes:
        tokens: int64 [N], what the target model reads; 0 on pad rows.
        parent: int32 [N], row of the parent within the same request; -1 for a root and on pad rows.
        depth: int32 [N], 0 for a root: a row's position is its request's context length + depth.
        request: int32 [N]; B on pad rows.
        indptr: int32 [B + 1], where each request's rows begin.
        mask: int32 [N, words], least significant bit first: bit j is row j of the same request, itself and its ancestors.
        score: float32 [N], path log-probability; -inf on pad rows.
        node: int64 [N], index into the forest's B * T nodes; -1 on pad rows. An engine's own handles of the nodes, [B * T, ...],
            reach the rows by it.
        committed: bool [N], bought while drafting (a root, or depth); False: dealt at the end (width), and on pad rows.
        status: int8 [B], why each request stopped drafting (:class:`~echo.tree.supertree.Status`).
        invalid: int32 [B], faulty draft scores (:attr:`SuperTree.invalid`).
        max_depth: deepest layer of the tree it was packed from; a host int.
        acceptance_histogram: float32 [B, depth, 32], where the budget is a cost model: how many scored nodes of each depth 1.. have which
            probability of acceptance f, in 32 bins that are equal in sqrt(f), from f = 1/136 up. None otherwise.
        expected: float32 [B, depth], likewise: the sum of f over the request's drafted rows of each depth.
        num_layers: int32 [], layers drafted, where ``max_depth`` is a bound only (a :class:`Workspace`'s step); None: ``max_depth`` layers.
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    request: Tensor
    indptr: Tensor
    mask: Tensor
    score: Tensor
    node: Tensor
    committed: Tensor
    status: Tensor
    invalid: Tensor
    max_depth: int
    acceptance_histogram: Tensor | None = None
    expected: Tensor | None = None
    num_layers: Tensor | None = None

    @property
    def batch(self) -> int:
        """Requests, empty slots included."""
        return self.indptr.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """N, pad rows included."""
        return self.tokens.shape[0]

    @property
    def local_row(self) -> Tensor:
        """int64 [N], each row's place within its request; 0 on pad rows."""
        first = self.indptr.index_select(0, self.request)
        return torch.where(
            self.request < self.batch,
            torch.arange(self.num_rows, device=self.tokens.device) - first,
            0,
        )

    @property
    def max_verify_tokens_per_req(self) -> int:
        """The most key/value slots that one request of this step can take, from shapes alone; a host int."""
        return min(self.num_rows, WORD * self.mask.shape[1])

    def visible(self) -> Tensor:
        """The mask as bool [N, words * 32]: column j is row j of the same request."""
        return unpack_bits(self.mask, WORD * self.mask.shape[1])

    def positions(self, prefix_lens: Tensor) -> Tensor:
        """Positions int64 [N]: context length + depth; 0 on pad rows.

        Args:
            prefix_lens: int32 or int64 [B], tokens in each request's cache before this step.

        Raises:
            EchoError: another shape or dtype.
        """
        return self._offset(prefix_lens, self.depth)

    def slot_mapping(
        self, prefix_lens: Tensor, page_table: Tensor, page_size: int, pad_slot_id: int
    ) -> Tensor:
        """Key/value slots int64 [N], ragged: a request's rows lie one after another behind its context, in its own pages.

        A pad row, a row beyond the page table (give ``plant`` a capacity, and there is none) and one on a negative page write to the
        dummy slot.

        Args:
            prefix_lens: int32 or int64 [B], tokens in each request's cache before this step.
            page_table: int32 or int64 [B, pages], each request's pages in order; SGLang's ``req_to_token`` is one of page size 1.
            page_size: tokens of a page; token p of a request lies in slot ``page_table[b, p // page_size] * page_size + p % page_size``.
            pad_slot_id: a slot that no request owns.

        Raises:
            EchoError: shapes or dtypes that do not fit.
        """
        place = torch.where(
            self.request < self.batch, self._offset(prefix_lens, self.local_row), -1
        )
        return slot_mapping(place, self.request, page_table, page_size, pad_slot_id)

    def to_buffer(self, out: Tensor | None = None) -> Tensor:
        """The whole step as one contiguous int32 tensor, to broadcast: ranks whose scores differ by an ulp must share one plan.

        Its length is ``buffer_size(batch, rows, words)``, and more where there is an outlook, from which later steps are planned. Token
        ids and node numbers must fit 31 bits.

        Args:
            out: int32 of that length, written to.
        """
        parts = [
            self.tokens,
            self.parent,
            self.depth,
            self.request,
            self.score.view(torch.int32),
            self.node,
            self.committed,
        ]
        parts += [self.mask.flatten(), self.indptr, self.status, self.invalid]
        parts += [
            part.flatten().view(torch.int32)
            for part in (self.expected, self.acceptance_histogram)
            if part is not None
        ]
        return copy_into(out, torch.cat([part.int() for part in parts]))

    @classmethod
    def from_buffer(
        cls, buffer: Tensor, *, batch: int, num_rows: int, words: int, max_depth: int
    ) -> PackedTree:
        """The step that :meth:`wire` was called on, bit for bit.

        Args:
            buffer: int32, as :meth:`wire` made it.
            batch, num_rows, words, max_depth: host integers that all ranks know.

        Raises:
            EchoError: another length or dtype.
        """
        size, base = (
            checks.tensor("wire", buffer, ["length"], torch.int32).shape[0],
            buffer_size(batch, num_rows, words),
        )
        more = size - base
        each = max(1, batch * max_depth)
        bins = more // each - 1
        if more and (bins < 1 or more % each):
            raise EchoError(f"wire: expected int32 [{base}], or with an outlook, got [{size}]")
        sizes = (
            [num_rows] * 7
            + [num_rows * words, batch + 1, batch, batch]
            + ([each, each * bins] if more else [])
        )
        (
            tokens,
            parent,
            depth,
            request,
            score,
            node,
            bought,
            mask,
            indptr,
            status,
            invalid,
            *foresight,
        ) = torch.split(buffer, sizes)
        expected, outlook = (
            (part.view(torch.float32) for part in foresight) if more else (None, None)
        )
        return cls(
            tokens=tokens.long(),
            parent=parent,
            depth=depth,
            request=request,
            indptr=indptr,
            mask=mask.view(num_rows, words),
            score=score.view(torch.float32),
            node=node.long(),
            committed=bought.bool(),
            status=status.to(torch.int8),
            invalid=invalid,
            max_depth=max_depth,
            acceptance_histogram=None if outlook is None else outlook.view(batch, max_depth, bins),
            expected=None if expected is None else expected.view(batch, max_depth),
        )

    def validate(
        self, *, max_verify_tokens_per_req: int | None = None, chain: bool = False
    ) -> None:
        """Checks every value against the layout's contract. Reads everything back: for tests and for debugging, not for the step.

        Args:
            max_verify_tokens_per_req: rows of one request that an export can hold.
            chain: every request's tree must be a chain.

        Raises:
            EchoError: naming the request and the row of the first fault.
        """
        from echo.tree.validate import validate

        validate(self, max_verify_tokens_per_req=max_verify_tokens_per_req, chain=chain)

    def render(
        self, request: int, accepted: Accepted | None = None, *, label: Callable[[int], str] = str
    ) -> str:
        """A small picture of one request's tree in text: token, path probability, bought by depth or by width, accepted.

        Reads back from the device.

        Args:
            request: which.
            accepted: of this step.
            label: what to write for a token: its number, or its text by a tokenizer.

        Raises:
            EchoError: no such request.
        """
        from echo import plot

        return plot.render(self, request, accepted, label)

    def plot(
        self,
        requests: Sequence[int] | None = None,
        accepted: Accepted | None = None,
        *,
        label: Callable[[int], str] = str,
        titles: Sequence[str] | None = None,
    ) -> Figure:
        """The requests' trees drawn below each other, depth from left to right: who got rows, for what, and what was accepted.

        Needs matplotlib (the ``plot`` extra). Reads back from the device.

        Args:
            requests: which; all where not given.
            accepted: of this step.
            label: what to write for a token: its number, or its text by a tokenizer.
            titles: a line for each request drawn, such as the end of its text.

        Returns:
            A matplotlib figure, as large as it needs to be: ``figure.savefig("step.png", dpi=150)``.

        Raises:
            EchoError: no such request, another number of titles, or no matplotlib.
        """
        from echo import plot

        return plot.packed_tree(self, requests, accepted, label, titles)

    def _offset(self, prefix_lens: Tensor, offset: Tensor) -> Tensor:
        """int64 [N]: ``prefix_lens`` of each row's request, plus ``offset``; 0 on pad rows."""
        checks.tensor("prefix_lens", prefix_lens, [self.batch], checks.INTEGERS, self.tokens.device)
        known = torch.cat([prefix_lens.long(), prefix_lens.new_zeros(1, dtype=torch.int64)])
        return torch.where(self.request < self.batch, known[self.request.long()] + offset, 0)


def buffer_size(batch: int, num_rows: int, words: int) -> int:
    """Length of :meth:`PackedTree.to_buffer` without an outlook, for ``batch`` requests, ``num_rows`` rows and ``words`` mask words of a row."""
    return num_rows * (7 + words) + 3 * batch + 1


def pack(
    tree: SuperTree, selected: Tensor, num_rows: int, words: int, out: PackedTree | None = None
) -> PackedTree:
    """Flattens the selected nodes into ``num_rows`` rows.

    No step depends on how many nodes are selected: a running count gives each node its row, and a search in it each row its node.

    Args:
        tree: the super-tree.
        selected: bool [B, T] over ``tree.forest``, closed under parents; at most ``num_rows`` nodes (what is more is cut off),
            at most ``32 * words`` a request.
        num_rows: N.
        words: mask words of a row.
        out: a step of the same shapes (an engine's persistent buffers), whose tensors are written to and returned.

    Raises:
        EchoError: shapes or dtypes that do not fit.
    """
    batch, nodes, device = tree.batch, sum(tree.sizes), tree.status.device
    checks.tensor("selected", selected, [batch, nodes], torch.bool, device)
    num_rows = checks.integer("num_rows", num_rows, 0)
    if batch == 0:  # an idle data-parallel rank: pads alone
        return copy_into(out, _pads(tree, num_rows, words))
    if kernels.use_triton(selected):
        from echo.kernels import pack as packing
        from echo.kernels import select

        chosen = select.as_selected(selected)
        token, parent, score, committed = map(
            tree.column, ("token", "parent", "score", "committed")
        )
        columns = packing.pack(chosen, token, parent, score, committed, num_rows, words, tree.sizes)
        return copy_into(
            out,
            PackedTree(**columns, status=tree.status, invalid=tree.invalid, max_depth=tree.depth),
        )
    forest = tree.forest
    count = selected.flatten().cumsum(0)
    indptr = F.pad(count.view(batch, nodes)[:, -1].clamp(max=num_rows), (1, 0))
    row = torch.arange(num_rows, device=device)
    found = torch.searchsorted(
        count, row, right=True
    )  # the node at which the count exceeds this row; B * T on pad rows
    pad = found == batch * nodes
    at = found.clamp(max=batch * nodes - 1)
    owner = at // nodes
    tree_begins, request = owner * nodes, owner.masked_fill(pad, batch)
    first = indptr.index_select(0, request)
    depth = forest.depth.index_select(0, at - tree_begins).masked_fill_(pad, 0)
    outer = depth == 0  # roots and pad rows
    above = (
        count.index_select(0, tree_begins + forest.parent.flatten().index_select(0, at)) - 1
    )  # global row of the parent
    packed = PackedTree(
        tokens=forest.token.flatten().index_select(0, at).masked_fill_(pad, 0),
        parent=(above - first).masked_fill_(outer, -1).int(),
        depth=depth.int(),
        request=request.int(),
        indptr=indptr.int(),
        mask=ancestor_masks(
            above.masked_fill_(outer, num_rows),
            (row - first).masked_fill_(pad, 0),
            words,
            tree.depth,
        ),
        score=forest.score.flatten().index_select(0, at).masked_fill_(pad, -torch.inf),
        node=found.masked_fill_(pad, -1),
        committed=forest.committed.flatten().index_select(0, at) & ~pad,
        status=tree.status,
        invalid=tree.invalid,
        max_depth=tree.depth,
    )
    return copy_into(out, packed)


def ancestor_masks(parent: Tensor, local: Tensor, words: int, max_depth: int) -> Tensor:
    """Ancestor masks by pointer doubling: after r rounds a row knows its nearest 2^r ancestors.

    Args:
        parent: int64 [N], global row of the parent; N for none.
        local: int64 [N], each row's bit.
        words: mask words of a row.
        max_depth: of the deepest row.

    Returns:
        int32 [N, words].
    """
    rows = parent.shape[0]
    mask = torch.zeros(rows + 1, words, dtype=torch.int32, device=local.device)
    mask[:rows].scatter_(1, (local >> 5)[:, None], (1 << (local & WORD - 1)).int()[:, None])
    jump = F.pad(parent, (0, 1), value=rows)
    for _ in range(max_depth.bit_length()):
        mask = mask | mask.index_select(0, jump)
        jump = jump.index_select(0, jump)
    return mask[:rows]


def _pads(tree: SuperTree, num_rows: int, words: int) -> PackedTree:
    zero = torch.zeros(num_rows, dtype=torch.int32, device=tree.status.device)
    return PackedTree(
        tokens=zero.long(),
        parent=zero - 1,
        depth=zero,
        request=zero,
        indptr=zero.new_zeros(1),
        mask=F.pad(zero[:, None] + 1, (0, words - 1)),
        score=torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=zero.device),
        node=zero.long() - 1,
        committed=zero.bool(),
        status=tree.status,
        invalid=tree.invalid,
        max_depth=tree.depth,
    )


def unpack_bits(mask: Tensor, width: int) -> Tensor:
    """The first ``width`` bits of mask words int32 [..., words], least significant first, bool [..., width]; False beyond the words."""
    words = -(-width // WORD)
    if mask.shape[-1] != words:
        mask = F.pad(mask, (0, words - mask.shape[-1]))  # cuts where it is negative
    bits = torch.ones((), dtype=torch.int32, device=mask.device) << torch.arange(
        min(width, WORD), dtype=torch.int32, device=mask.device
    )
    seen = (mask[..., None] & bits).bool()
    return seen[..., 0, :] if words == 1 else seen.flatten(-2)[..., :width]


def slot_mapping(
    place: Tensor, request: Tensor, page_table: Tensor, page_size: int, pad_slot_id: int
) -> Tensor:
    """Where tokens lie in a paged cache: int64, shaped as ``place``.

    Args:
        place: int64, each token's place in its request's text; the dummy slot where it is negative or beyond the page table.
        request: int32 or int64 of the same shape, or one that broadcasts to it.
        page_table: int32 or int64 [B, pages]; the dummy slot where it is negative, as tables are padded.
        page_size: tokens of a page.
        pad_slot_id: a slot that no request owns.

    Raises:
        EchoError: shapes or dtypes that do not fit.
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
    return torch.where(
        (column == wanted) & (page >= 0), page * page_size + place % page_size, pad_slot_id
    )


def copy_into(out: T | None, value: T) -> T:
    """``value``; or ``out`` with the value's tensors copied into its own, which must have their shapes, dtypes and device.

    Where ``out`` has None it is no buffer: the value's own tensor is passed on.

    Raises:
        EchoError: naming the buffer that does not fit.
    """
    if out is None:
        return value
    mine: Any = value
    theirs: Any = out
    if isinstance(mine, Tensor):
        buffer: T = checks.tensor("out", theirs, mine.shape, mine.dtype, mine.device).copy_(mine)  # type: ignore[assignment]
        return buffer
    checks.instance("out", theirs, type(mine))
    host, pairs = {}, []
    for field in fields(mine):
        new, old = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(new, Tensor) and old is not None:
            pairs.append(
                (checks.tensor(f"out.{field.name}", old, new.shape, new.dtype, new.device), new)
            )
        else:
            host[field.name] = new
    for old, new in pairs:  # all of it fits
        if old is not new:
            old.copy_(new)
    written: T = replace(theirs, **host)
    return written
