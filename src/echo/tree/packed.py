"""Flatten & Pack: the selected rows of all requests as one dense, fixed-size step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo import checks
from echo.tree.supertree import SuperTree

WORD = 32
"""Bits of a mask word."""


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
        node: int64 [N], index into the forest's B * T nodes; -1 on pad rows.
        status: int8 [B], why each request stopped drafting (:class:`~echo.tree.supertree.Status`).
        invalid: int32 [B], faulty draft scores (:attr:`SuperTree.invalid`).
        max_depth: deepest layer of the tree it was packed from; a host int.
        outlook: float32 [B, depth, 64], where the budget is a cost model: how many scored nodes of each depth 1.. have which
            probability of acceptance f, in 64 equal bins. None otherwise.
        expected: float32 [B], likewise: the sum of f over the request's drafted rows.
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    request: Tensor
    indptr: Tensor
    mask: Tensor
    score: Tensor
    node: Tensor
    status: Tensor
    invalid: Tensor
    max_depth: int
    outlook: Tensor | None = None
    expected: Tensor | None = None

    @property
    def batch(self) -> int:
        """Requests, empty slots included."""
        return self.indptr.shape[0] - 1

    @property
    def rows(self) -> int:
        """N, pad rows included."""
        return self.tokens.shape[0]

    @property
    def local(self) -> Tensor:
        """int64 [N], each row's place within its request; 0 on pad rows."""
        first = self.indptr.long().gather(0, self.request.long().clamp(max=self.batch - 1))
        rows = torch.arange(self.rows, device=self.tokens.device)
        return torch.where(self.request < self.batch, rows - first, 0)

    def visible(self) -> Tensor:
        """The mask as bool [N, words * 32]: column j is row j of the same request."""
        shifts = torch.arange(WORD, dtype=torch.int32, device=self.mask.device)
        return ((self.mask[:, :, None] >> shifts) & 1).bool().flatten(1)


def pack(tree: SuperTree, selected: Tensor, rows: int, words: int) -> PackedTree:
    """Flattens the selected nodes into ``rows`` rows.

    No step depends on how many nodes are selected: each node's row is a running count, and unselected nodes write to a row
    beyond the last that is cut off.

    Args:
        tree: the super-tree.
        selected: bool [B, T] over ``tree.forest``, closed under parents; at most ``rows`` nodes, at most ``32 * words`` a request.
        rows: N.
        words: mask words of a row.

    Raises:
        EchoError: shapes or dtypes that do not fit, or rows below 1.
    """
    forest = tree.forest
    batch, nodes = forest.token.shape
    device = forest.token.device
    checks.tensor("selected", selected, [batch, nodes], torch.bool, device)
    checks.integer("rows", rows, 1)

    flat = selected.flatten()
    count = flat.long().cumsum(0)
    row = torch.where(flat, count - 1, rows)  # row of each node; `rows` is the row that is cut off
    ends = count.view(batch, nodes)[:, -1]
    indptr = torch.cat([ends.new_zeros(1), ends])

    node = torch.full((rows + 1,), -1, device=device).scatter_(0, row, torch.arange(batch * nodes, device=device))[:rows]
    real = node >= 0
    at = node.clamp(min=0)
    request = torch.where(real, at // nodes, batch)
    first = indptr[request.clamp(max=batch - 1)]
    depth = torch.where(real, forest.depth[at % nodes], 0)
    above = row[(at // nodes) * nodes + forest.parent.flatten()[at]]  # global row of the parent
    inner = real & (depth > 0)
    local = torch.where(real, torch.arange(rows, device=device) - first, 0)
    return PackedTree(
        tokens=torch.where(real, forest.token.flatten()[at], 0),
        parent=torch.where(inner, above - first, -1).int(),
        depth=depth.int(),
        request=request.int(),
        indptr=indptr.int(),
        mask=ancestors(torch.where(inner, above, rows), local, words, tree.depth),
        score=torch.where(real, forest.score.flatten()[at], -torch.inf),
        node=node,
        status=tree.status,
        invalid=tree.invalid,
        max_depth=tree.depth,
    )


def ancestors(parent: Tensor, local: Tensor, words: int, max_depth: int) -> Tensor:
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
    own = torch.where(torch.arange(words, device=local.device) == (local // WORD)[:, None], 1, 0).int()
    own = own << (local % WORD).int()[:, None]
    mask = torch.cat([own, own.new_zeros(1, words)])
    jump = torch.cat([parent, parent.new_full((1,), rows)])
    for _ in range(max_depth.bit_length()):
        mask = mask | mask[jump]
        jump = jump[jump]
    return mask[:rows]
