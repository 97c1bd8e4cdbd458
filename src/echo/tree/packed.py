"""Flatten & Pack: the selected nodes of all requests as one dense step of fixed size.

B requests, N rows, W mask words of a row, T nodes of a request's super-tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError, copy_into
from echo.tree.cache import slot_mapping
from echo.tree.supertree import SuperTree
from echo.tree.validate import validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.tree.accept import Accepted

WORD = 32
"""Bits of a mask word."""
COLUMNS = (
    "tokens", "parent", "depth", "request", "score", "node", "committed", "mask", "indptr",
    "status", "invalid", "expected", "acceptance_histogram",
)  # fmt: skip
"""What :meth:`PackedTree.to_buffer` holds, in order; the last two are optional."""
DTYPES = {"tokens": torch.int64, "node": torch.int64, "committed": torch.bool, "status": torch.int8}
DTYPES |= dict.fromkeys(("score", "expected", "acceptance_histogram"), torch.float32)
"""Dtypes of those that are not int32."""


@dataclass(frozen=True)
class PackedTree:
    """A step of exactly N rows: the requests' trees one after another, then pads.

    Within a request the root comes first, then rows by depth, parent and candidate.

    Attributes:
        tokens: int64 [N], input ids of the target model; 0 on pad rows.
        parent: int32 [N], the parent's row within the request; -1 for a root and on pad rows.
        depth: int32 [N], 0 for a root; a row's position is its request's prefix_lens + depth.
        request: int32 [N]; B on pad rows.
        indptr: int32 [B + 1], where each request's rows begin.
        mask: int32 [N, W], least significant bit first: bit j is row j of the same request, set
            for the row itself and its ancestors.
        score: float32 [N], path log-probability; -inf on pad rows.
        node: int64 [N], index into the forest's B * T nodes and engine data of that shape; -1: pad.
        committed: bool [N], committed while drafting, as roots are; else selected last, or a pad.
        status: int8 [B], why each request stopped drafting, a :class:`~echo.tree.Status`.
        invalid: int32 [B], faulty draft scores, as :attr:`SuperTree.invalid`.
        max_depth: deepest layer of the super-tree; a host int.
        acceptance_histogram: float32 [B, depth, 32] if the budget is a cost model, else None: count
            of scored nodes by depth 1.. and acceptance probability f >= 1/289, equal in sqrt(f).
        expected: float32 [B, depth] or None, too: the sum of f over a request's rows by depth.
        num_layers: int32 [], layers drafted, if ``max_depth`` is only a bound; None: ``max_depth``.

    Example:
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [3]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=4, words=1)
        >>> print(packed.render(0, label="token {}".format))
        token 7         1.000  root
        ├─ token 1      0.333  width
        │  └─ token 2   0.167  width
        └─ token 3      0.333  width
        >>> packed.validate(), len(packed.plot(titles=["a tree"]).axes)  # a matplotlib figure
        (None, 1)
        >>> packed.ancestors().tolist()  # of 7, 1, 3, 2
        [[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 1, 3]]
        >>> packed.windowed(2).visible()[:, :4].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
        >>> pages = {"page_table": torch.tensor([[3, 5]]), "page_size": 8, "pad_slot_id": 0}
        >>> lens = torch.tensor([6])  # tokens in the cache
        >>> packed.positions(lens).tolist(), packed.slot_mapping(lens, **pages).tolist()
        ([6, 7, 7, 8], [30, 31, 40, 41])
        >>> buffer, sizes = packed.to_buffer(), {"batch": 1, "num_rows": 4, "words": 1}
        >>> there = PackedTree.from_buffer(buffer, **sizes, max_depth=2)  # on another rank
        >>> here = packed.agree(lambda own: buffer)  # all follow the broadcast buffer
        >>> len(buffer) == buffer_size(**sizes), torch.equal(there.mask, here.mask)
        (True, True)
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
        """B, empty requests included."""
        return self.indptr.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """N, pad rows included."""
        return self.tokens.shape[0]

    @property
    def local_row(self) -> Tensor:
        """int64 [N], each row's index within its request; 0 on pad rows."""
        row = torch.arange(self.num_rows, device=self.tokens.device)
        local = row - self.indptr.index_select(0, self.request)
        return torch.where(self.request < self.batch, local, 0)

    @property
    def parent_row(self) -> Tensor:
        """int64 [N], each row's parent among the N rows; -1 for a root and on pad rows."""
        first = self.indptr.index_select(0, self.request)
        return torch.where(self.parent < 0, -1, self.parent + first).long()

    @property
    def max_verify_tokens_per_req(self) -> int:
        """Upper bound on the KV slots of a request in this step, from shapes; a host int."""
        return min(self.num_rows, WORD * self.mask.shape[1])

    def visible(self) -> Tensor:
        """bool [N, 32 * W]: the mask unpacked; column j is row j of the same request."""
        return unpack_bits(self.mask, WORD * self.mask.shape[1])

    def ancestors(self, out: Tensor | None = None) -> Tensor:
        """int64 [N, max_depth + 1]: the rows on the path to each row, root first, itself last.

        -1 past the row's depth, and on pad rows. EchoError: a buffer ``out`` that does not fit.
        """
        row = torch.arange(self.num_rows, device=self.tokens.device)
        up = F.pad(self.parent_row, (0, 1), value=-1)  # index -1 (no parent) reads the padding
        above = [torch.where(self.request < self.batch, row, -1)]
        for _ in range(self.max_depth):
            above.append(up[above[-1]])
        back = self.depth[:, None] - torch.arange(len(above), device=row.device)
        path = torch.stack(above, dim=1).gather(1, back.clamp(min=0))
        return copy_into(out, path.masked_fill(back < 0, -1))

    def windowed(self, size: int) -> PackedTree:
        """Mask the step for a sliding window: a row and its ``size - 1`` nearest ancestors.

        For kernels that read masks over the rows; in the prefix a row sees positions above
        ``positions(prefix_lens) - size``. :func:`echo.kernels.tree_attention` does both
        (``window=size, depth=packed.depth``). EchoError: a size below 1.
        """
        size = min(checks.integer("size", size, 1), WORD * self.mask.shape[1])
        far = self.depth[:, None] - size
        row = self.ancestors().gather(1, far.clamp(min=0).long())[:, 0]
        hidden = self.mask.index_select(0, row.clamp(min=0))  # that ancestor and all above it
        return replace(self, mask=torch.where(far < 0, self.mask, self.mask & ~hidden))

    def positions(self, prefix_lens: Tensor) -> Tensor:
        """Return positions int64 [N]: prefix_lens + depth; 0 on pad rows.

        ``prefix_lens``: int32 or int64 [B], tokens in each request's cache, root not counted.
        EchoError: another shape or dtype.
        """
        return self._offset(prefix_lens, self.depth)

    def slot_mapping(
        self, prefix_lens: Tensor, page_table: Tensor, page_size: int, pad_slot_id: int
    ) -> Tensor:
        """Return KV slots int64 [N]: a request's rows directly follow its prefix.

        Pad rows, rows past the page table (none, if ``begin`` is given ``verify_limits``) and rows
        on a negative page write to ``pad_slot_id``.

        Args:
            prefix_lens: as in :meth:`positions`.
            page_table: int32 or int64 [B, pages], each request's pages in order; SGLang's
                ``req_to_token`` is such a table of page size 1.
            page_size: tokens per page; token p of a request is in slot
                ``page_table[b, p // page_size] * page_size + p % page_size``.
            pad_slot_id: a slot that no request owns.

        Raises:
            EchoError: shapes or dtypes that do not fit.
        """
        place = self._offset(prefix_lens, self.local_row)
        place = torch.where(self.request < self.batch, place, -1)
        return slot_mapping(place, self.request, page_table, page_size, pad_slot_id)

    def to_buffer(self, out: Tensor | None = None) -> Tensor:
        """Serialize the step to one contiguous int32 tensor, for ranks that must share one plan.

        Ranks whose scores differ by an ulp select different rows. Token ids and node indices must
        fit 31 bits. The length is ``buffer_size(batch, num_rows, words)``, plus the optional
        ``acceptance_histogram`` and ``expected``; so is that of ``out``, int32, written to.
        """
        parts = [getattr(self, name) for name in COLUMNS]
        given = [x for x in parts if x is not None]
        words = [x.view(torch.int32) if x.is_floating_point() else x.int() for x in given]
        return copy_into(out, torch.cat([x.flatten() for x in words]))

    @classmethod
    def from_buffer(
        cls, buffer: Tensor, *, batch: int, num_rows: int, words: int, max_depth: int
    ) -> PackedTree:
        """Restore the step that :meth:`to_buffer` serialized to ``buffer``, bit for bit.

        All ranks know ``batch, num_rows, words, max_depth`` on the host. EchoError: another length
        or dtype.
        """
        size = checks.tensor("buffer", buffer, ["length"], torch.int32).shape[0]
        base = buffer_size(batch, num_rows, words)
        more = size - base
        each = max(1, batch * max_depth)
        bins = more // each - 1
        if more and (bins < 1 or more % each):
            expected = f"int32 [{base}], or with an acceptance_histogram"
            raise EchoError(f"buffer: expected {expected}, got [{size}]")
        sizes = [*[num_rows] * 7, num_rows * words, batch + 1, batch, batch]
        parts = torch.split(buffer, [*sizes, each, each * bins] if more else sizes)
        columns = {}
        for name, part in zip(COLUMNS, parts, strict=False):
            kind = DTYPES.get(name, torch.int32)
            columns[name] = part.view(kind) if kind.is_floating_point else part.to(kind)
        columns["mask"] = columns["mask"].view(num_rows, words)
        if more:
            columns["expected"] = columns["expected"].view(batch, max_depth)
            shape = batch, max_depth, bins
            columns["acceptance_histogram"] = columns["acceptance_histogram"].view(shape)
        return cls(**columns, max_depth=max_depth)

    def agree(self, sync: Callable[[Tensor], Tensor], out: PackedTree | None = None) -> PackedTree:
        """Return the step that all ranks follow; each rank calls this on its own step.

        Args:
            sync: takes :meth:`to_buffer` and returns the buffer that all ranks follow, such as rank
                0's, broadcast. It may be part of a CUDA graph, as NCCL's is.
            out: persistent buffers, which may be this step's own.

        Raises:
            EchoError: a buffer of another length or dtype.
        """
        sizes = {"batch": self.batch, "num_rows": self.num_rows, "words": self.mask.shape[1]}
        buffer = sync(self.to_buffer())
        followed = PackedTree.from_buffer(buffer, **sizes, max_depth=self.max_depth)
        return copy_into(out, replace(followed, num_layers=self.num_layers))

    def validate(
        self, *, max_verify_tokens_per_req: int | None = None, chain: bool = False
    ) -> None:
        """Check every value against the layout's contract on the host, for tests and debugging.

        Args:
            max_verify_tokens_per_req: rows of one request that an export can hold.
            chain: whether every request's tree must be a chain.

        Raises:
            EchoError: naming the request and the row of a fault.
        """
        validate(self, max_verify_tokens_per_req, chain)

    def render(
        self, request: int, accepted: Accepted | None = None, *, label: Callable[[int], str] = str
    ) -> str:
        """Draw one ``request``'s tree as text: token, path probability, when chosen, accepted.

        Copies from the device. ``accepted`` is of this step; ``label`` returns a token id's text,
        such as a tokenizer's. EchoError: no such request.
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
        """Draw the requests' trees as a matplotlib figure, one below the other, depth to the right.

        Copies from the device, and needs matplotlib (the ``plot`` extra).

        Args:
            requests: their indices. Defaults to all.
            accepted, label: as in :meth:`render`.
            titles: one line per request drawn, such as the end of its text.

        Raises:
            EchoError: no such request, another number of titles, or no matplotlib.
        """
        from echo import plot

        return plot.packed_tree(self, requests, accepted, label, titles)

    def _offset(self, prefix_lens: Tensor, offset: Tensor) -> Tensor:
        """int64 [N]: ``prefix_lens`` of each row's request, plus ``offset``, which is 0 on pads."""
        checks.tensor("prefix_lens", prefix_lens, [self.batch], checks.INTEGERS, self.tokens.device)
        return F.pad(prefix_lens.long(), (0, 1)).index_select(0, self.request) + offset


def buffer_size(batch: int, num_rows: int, words: int) -> int:
    """Length of :meth:`PackedTree.to_buffer` without an ``acceptance_histogram``.

    Of ``batch`` B, ``num_rows`` N and ``words`` W.
    """
    return num_rows * (7 + words) + 3 * batch + 1


def pack(
    tree: SuperTree, selected: Tensor, num_rows: int, words: int, out: PackedTree | None = None
) -> PackedTree:
    """Flatten the selected nodes into ``num_rows`` rows. Sync-free.

    Shapes are fixed: a running count gives each node its row, and a search in it each row its node.

    Args:
        tree: the super-tree.
        selected: bool [B, T] over ``tree.forest``, closed under parents; at most ``32 * words`` per
            request and ``num_rows`` in total: the excess is cut off.
        num_rows, words: N and W.
        out: persistent buffers of the same shapes, written to and returned.

    Raises:
        EchoError: shapes or dtypes that do not fit.
    """
    batch = tree.batch
    nodes = sum(tree.sizes)
    device = tree.status.device
    checks.tensor("selected", selected, [batch, nodes], torch.bool, device)
    n = checks.integer("num_rows", num_rows, 0)
    if batch and kernels.use_triton(selected):
        from echo.kernels import pack as kernel
        from echo.kernels import select

        names = "token", "parent", "score", "committed"
        token, parent, score, committed = (tree.column(name) for name in names)
        state = tree.status, tree.invalid, n, words, tree.sizes
        chosen = select.as_selected(selected)
        columns = kernel.pack(chosen, token, parent, score, committed, *state)
        return copy_into(out, PackedTree(**columns, max_depth=tree.depth))
    forest = tree.forest
    row = torch.arange(n, device=device)
    flat = [forest.token, forest.parent, forest.score, forest.committed, selected]
    if not batch:  # an idle data-parallel rank: only pads, from one unselected node
        nodes = 1
        flat = [x.new_zeros(1, 1) for x in flat]
    token, parent, score, committed, selected = (x.flatten() for x in flat)
    count = selected.cumsum(0)
    indptr = F.pad(count.view(-1, nodes)[:batch, -1].clamp(max=n), (1, 0))
    found = torch.searchsorted(count, row, right=True)  # the node of each row, B * T on pad rows
    pad = found == count.shape[0]
    at = found.clamp(max=count.shape[0] - 1)
    owner = at // nodes
    first_node = owner * nodes
    request = owner.masked_fill(pad, batch)
    first = indptr.index_select(0, request)
    depth = forest.depth.index_select(0, at - first_node).masked_fill_(pad, 0)
    outer = depth == 0  # roots and pad rows
    above = count.index_select(0, first_node + parent.index_select(0, at)) - 1  # the parent's row
    local = (row - first).masked_fill_(pad, 0)
    packed = PackedTree(
        tokens=token.index_select(0, at).masked_fill_(pad, 0),
        parent=(above - first).masked_fill_(outer, -1).int(),
        depth=depth.int(),
        request=request.int(),
        indptr=indptr.int(),
        mask=ancestor_masks(above.masked_fill_(outer, n), local, words, tree.depth),
        score=score.index_select(0, at).masked_fill_(pad, -torch.inf),
        node=found.masked_fill_(pad, -1),
        committed=committed.index_select(0, at) & ~pad,
        status=tree.status,
        invalid=tree.invalid,
        max_depth=tree.depth,
    )
    return copy_into(out, packed)


def ancestor_masks(parent: Tensor, local: Tensor, words: int, max_depth: int) -> Tensor:
    """Ancestor masks int32 [N, W] by pointer doubling: round r finds the 2^r nearest ancestors.

    Args:
        parent: int64 [N], the parent's row in the step; N for none.
        local: int64 [N], each row's bit.
        words: W.
        max_depth: depth of the deepest row.

    Example:
        >>> ancestor_masks(torch.tensor([3, 0, 1]), torch.arange(3), 1, 2).tolist()  # a chain
        [[1], [3], [7]]
    """
    rows = parent.shape[0]
    mask = F.pad(own_bits(local, words), (0, 0, 0, 1))
    jump = F.pad(parent, (0, 1), value=rows)
    for _ in range(max_depth.bit_length()):
        mask = mask | mask.index_select(0, jump)
        jump = jump.index_select(0, jump)
    return mask[:rows]


def own_bits(row: Tensor, words: int) -> Tensor:
    """int32 [N, words]: only the bit ``row`` [N] set."""
    mask = torch.zeros(len(row), words, dtype=torch.int32, device=row.device)
    return mask.scatter_(1, (row >> 5)[:, None], (1 << (row & WORD - 1)).int()[:, None])


def unpack_bits(mask: Tensor, width: int) -> Tensor:
    """Return the first ``width`` bits of int32 [..., W] as bool, lowest first, then False."""
    words = -(-width // WORD)
    if mask.shape[-1] != words:
        mask = F.pad(mask, (0, words - mask.shape[-1]))  # a negative pad cuts
    place = torch.arange(min(width, WORD), dtype=torch.int32, device=mask.device)
    seen = (mask[..., None] & (torch.ones_like(place) << place)).bool()
    return seen[..., 0, :] if words == 1 else seen.flatten(-2)[..., :width]


def select_rows(values: Tensor, index: Tensor, there: Tensor, fill: float) -> Tensor:
    """Select [N, ...] from ``values`` [M, ...] by ``index`` [N]; ``fill`` where not ``there``."""
    if not len(values):
        return values.new_full((len(index), *values.shape[1:]), fill)
    chosen = values.index_select(0, torch.where(there, index, 0))
    return chosen.masked_fill_(~there.view(-1, *[1] * (values.dim() - 1)), fill)
