"""Deals rows: the cheapest nodes of the batch, so many of each request and so many in all, without sorting the forest."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from echo.tree.supertree import UNSELECTABLE, SuperTree


def deal(tree: SuperTree, cost: Tensor, cap: Tensor, left: Tensor, rows: int) -> Tensor:
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
    places, most = batch * nodes + 1, min(nodes, rows, tree.most)  # the last place is nobody's
    last = torch.iinfo(torch.int64).max // places * places - 1
    spare = torch.arange(rows, device=cost.device) < rows - left
    cost = cost.masked_fill(tree.bought, UNSELECTABLE)
    key = _keys(tree, cost, places).masked_fill_(cost > _bound(cost, cap, spare), last)
    own = _within(key.topk(most, dim=1, largest=False).values, cap, last)
    at = _least(own.flatten(), spare, last) % places
    chosen = torch.zeros(places, dtype=torch.uint8, device=cost.device).index_fill_(0, at, 1)  # bytes: inductor fills bools one by one
    return chosen[:-1].view(batch, nodes).bool()


def _keys(tree: SuperTree, cost: Tensor, places: int) -> Tensor:
    """int64 [B, T]: each node's place, and above it its depth, and above that its cost."""
    sizes = [layer.token.shape[1] for layer in tree.layers]
    ends = list(itertools.accumulate(sizes))
    columns = [
        torch.arange(layer.depth * places + end - size, layer.depth * places + end, device=cost.device)
        for layer, size, end in zip(tree.layers, sizes, ends, strict=True)
    ]
    requests = torch.arange(0, tree.batch * ends[-1], ends[-1], device=cost.device)
    return torch.add(torch.cat(columns) + requests[:, None], cost, alpha=(tree.depth + 1) * places)


def _bound(cost: Tensor, cap: Tensor, spare: Tensor) -> Tensor | int:
    """int32 []: a cost that no dealt node exceeds, from the cheapest of each of a few groups of a request's nodes.

    Dealing among some of the nodes ends at a cost that is never below the one at which dealing among all of them ends.
    """
    batch, nodes = cost.shape
    groups = -(-2 * len(spare) // max(batch, 1))
    if 2 * groups > nodes:
        return UNSELECTABLE - 1
    some = cost[:, nodes % groups :].view(batch, nodes // groups, groups).amin(dim=1).sort(dim=1).values
    return _least(_within(some, cap, UNSELECTABLE).flatten(), spare, UNSELECTABLE).amax().clamp(max=UNSELECTABLE - 1)


def _within(ascending: Tensor, cap: Tensor, last: int) -> Tensor:
    """The first ``cap`` entries of each row, and ``last`` in place of the others; in place."""
    return ascending.masked_fill_(torch.arange(ascending.shape[1], device=cap.device) >= cap[:, None], last)


def _least(keys: Tensor, spare: Tensor, last: int) -> Tensor:
    """As many of the smallest keys as there are entries that are not spare, in no order; -1 for those, ``last`` where keys end."""
    pads = torch.full(spare.shape, last, dtype=keys.dtype, device=keys.device).masked_fill_(spare, -1)
    return torch.cat([pads, keys]).topk(len(spare), largest=False, sorted=False).values
