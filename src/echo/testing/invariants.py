"""What must hold of every plan, whatever the policy: for the unit tests of one's own gate or rule."""

from __future__ import annotations

import torch

from echo.tree.packed import PackedTree
from echo.tree.supertree import SuperTree


def check_plan(tree: SuperTree, packed: PackedTree) -> None:
    """Checks a packed step against the tree it came from, row by row, in plain Python.

    Args:
        tree: what was packed.
        packed: what it was packed to.

    Raises:
        AssertionError: naming the invariant of the layout or the budget that does not hold.

    Example:
        >>> import torch, echo
        >>> from echo.testing import check_plan
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(beam=2), budget=6, max_depth=2)
        >>> tree = scheduler.plant(torch.tensor([3]))
        >>> tree = scheduler.grow(tree, torch.tensor([[[1, 2]]]), torch.tensor([[[-0.1, -2.4]]]))
        >>> check_plan(tree, scheduler.pack(tree))
    """
    forest, limit = tree.forest, tree.row_limit.tolist()
    nodes, ends = forest.token.shape[1], packed.indptr.tolist()
    real = ends[-1]
    assert real <= tree.rows <= packed.rows, f"total: {real} rows of {tree.rows} planned, {packed.rows} launched"
    assert ends[0] == 0 and ends == sorted(ends), f"indptr: not rising from 0: {ends}"
    parent, depth, request, node = (x.tolist() for x in (packed.parent, packed.depth, packed.request, packed.node))
    for b in range(packed.batch):
        first, end = ends[b], ends[b + 1]
        assert end - first <= limit[b], f"capacity: request {b} has {end - first} rows, at most {limit[b]} allowed"
        assert (end > first) == (limit[b] > 0), f"root: request {b} has {end - first} rows with a limit of {limit[b]}"
        previous = (-1, -1, -1)
        for row in range(first, end):
            local, flat = row - first, node[row] - b * nodes
            assert request[row] == b, f"request: row {row} says {request[row]}, expected {b}"
            assert 0 <= flat < nodes, f"node: row {row} of request {b} has node {node[row]}"
            assert depth[row] == int(forest.depth[flat]), f"depth: row {row}"
            assert packed.tokens[row] == forest.token[b, flat], f"tokens: row {row}"
            assert torch.isfinite(forest.score[b, flat]), f"score: row {row} was selected with {forest.score[b, flat]}"
            if local == 0:
                assert depth[row] == 0 and parent[row] == -1, f"root: first row {row} of request {b} is none"
                lineage = {0}
            else:
                assert 0 <= parent[row] < local, f"parent: row {row} has {parent[row]}"
                above = first + parent[row]
                assert node[above] - b * nodes == int(forest.parent[b, flat]), f"closure: row {row} hangs on another parent"
                lineage = {local, *_bits(packed, above)}
            assert _bits(packed, row) == lineage, f"mask: row {row} sees {_bits(packed, row)}, expected {lineage}"
            place = (depth[row], parent[row], flat)
            assert place > previous, f"order: row {row} comes after {previous}"
            previous = place
    for row in range(real, packed.rows):
        assert request[row] == packed.batch and parent[row] == -1 and depth[row] == 0 and node[row] == -1, f"pad: row {row}"
        assert _bits(packed, row) == {0}, f"pad: row {row} sees {_bits(packed, row)}"
    chosen = {n for n in node if n >= 0}
    bought = set(forest.bought.flatten().nonzero()[:, 0].tolist())
    assert bought <= chosen, f"bought: rows {sorted(bought - chosen)} were bought and not packed"


def _bits(packed: PackedTree, row: int) -> set[int]:
    return {32 * word + bit for word, value in enumerate(packed.mask[row].tolist()) for bit in range(32) if value >> bit & 1}
