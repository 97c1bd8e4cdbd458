"""Deals rows: the cheapest nodes of the batch, so many of each request and so many in all, without sorting the forest."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from echo import kernels
from echo.kernels.codes import UNSELECTABLE
from echo.tree.supertree import SuperTree

NOBODY = torch.iinfo(torch.int64).max
"""Above every key."""


def select_cheapest(tree: SuperTree, cost: Tensor, cap: Tensor, left: Tensor, rows: int) -> Tensor:
    """The cheapest unbought nodes of the batch, at most ``cap`` of a request and ``left`` in all.

    Because cost never falls from parent to child and ties go to the shallower node, every prefix of the ranking is closed
    under parents, and so it stays when each request's list is cut at its cap.

    A key orders the nodes by cost, then depth, request, candidate, and its remainder says where its node is. Keys are chosen
    within each request, and among what those leave; what is surely too dear is sorted out before.

    Args:
        tree: the scored forest.
        cost: int32 [B, T].
        cap: int64 [B].
        left: int64 [].
        rows: host-side bound of ``left``.

    Returns:
        bool [B, T].
    """
    batch, nodes = cost.shape
    most = min(nodes, rows, tree.max_verify_tokens_per_req)
    if kernels.use_triton(cost):
        from echo.kernels import select

        return select.select_cheapest(cost, tree.committed, cap, left, rows, most, tree.sizes)
    places = batch * nodes + 1  # the last place is nobody's
    spare = torch.arange(rows, device=cost.device) < rows - left
    cost = cost.masked_fill(tree.committed, UNSELECTABLE)
    dear = _dear(cost, cap, spare).long() * ((tree.depth + 1) * places)
    key = torch.minimum(_keys(tree, cost, places), dear)
    ascending = (
        key.topk(most, dim=1, largest=False) if 2 * most < nodes else key.sort(dim=1)
    )  # whichever is quicker
    own = _within(ascending.values[:, :most], cap, NOBODY)
    keys = _least(own.flatten(), spare, NOBODY)
    at = torch.where(keys < dear, keys % places, places - 1)
    chosen = torch.zeros(places, dtype=torch.uint8, device=cost.device).index_fill_(
        0, at, 1
    )  # bytes: inductor fills bools one by one
    return chosen[:-1].view(batch, nodes).bool()


def _keys(tree: SuperTree, cost: Tensor, places: int) -> Tensor:
    """int64 [B, T]: each node's place, and above it its depth, and above that its cost."""
    ends = list(itertools.accumulate(tree.sizes))
    columns = [
        torch.arange(
            layer.depth * places + end - size, layer.depth * places + end, device=cost.device
        )
        for layer, size, end in zip(tree.layers, tree.sizes, ends, strict=True)
    ]
    requests = torch.arange(0, tree.batch * ends[-1], ends[-1], device=cost.device)
    return torch.add(torch.cat(columns), cost, alpha=(tree.depth + 1) * places).add_(
        requests[:, None]
    )


def _dear(cost: Tensor, cap: Tensor, spare: Tensor) -> Tensor:
    """int32 []: a cost that all dealt nodes are below, one more than that of the cheapest of each of a few groups of a request's nodes.

    Dealing among some of the nodes ends at a cost that is never below the one at which dealing among all of them ends.
    """
    batch, nodes = cost.shape
    groups = -(-2 * len(spare) // max(batch, 1))
    if not 0 < 2 * groups <= nodes:
        return torch.full((), UNSELECTABLE, dtype=torch.int32, device=cost.device)
    some = (
        cost[:, nodes % groups :]
        .view(batch, nodes // groups, groups)
        .amin(dim=1)
        .sort(dim=1)
        .values
    )
    return (
        _least(_within(some, cap, UNSELECTABLE).flatten(), spare, UNSELECTABLE)
        .amax()
        .clamp(max=UNSELECTABLE - 1)
        + 1
    )


def _within(ascending: Tensor, cap: Tensor, last: int) -> Tensor:
    """The first ``cap`` entries of each row, and ``last`` in place of the others; in place."""
    return ascending.masked_fill_(
        torch.arange(ascending.shape[1], device=cap.device) >= cap[:, None], last
    )


def _least(keys: Tensor, spare: Tensor, last: int) -> Tensor:
    """As many of the smallest keys as there are entries that are not spare, in no order; -1 for those, ``last`` where keys end."""
    pads = torch.full(spare.shape, last, dtype=keys.dtype, device=keys.device).masked_fill_(
        spare, -1
    )
    return torch.cat([pads, keys]).topk(len(spare), largest=False, sorted=False).values
