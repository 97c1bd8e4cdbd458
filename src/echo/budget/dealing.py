"""Deals rows: the cheapest nodes of the batch, so many of each request and so many in all, without sorting the forest."""

from __future__ import annotations

import torch
from torch import Tensor

from echo.tree.supertree import UNSELECTABLE, SuperTree

_BITS = 31
"""Bits of a node's number; its cost lies above them."""
_LAST = UNSELECTABLE << _BITS
"""From here on, keys of nodes that must not be chosen."""


def deal(tree: SuperTree, cost: Tensor, cap: Tensor, left: Tensor, rows: int) -> Tensor:
    """The cheapest unbought nodes of the batch, at most ``cap`` of a request and ``left`` in all.

    Because cost never falls from parent to child and ties go to the shallower node, every prefix of the ranking is closed
    under parents, and so it stays when each request's list is cut at its cap.

    A key is a node's cost and, below it, its number in the order of ties (depth, request, candidate), so a chosen key says where
    its node is. Keys are chosen within each request, and among what those leave; what is surely too dear is sorted out before.

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
    total, device = batch * nodes, cost.device
    cost = torch.where(tree.bought, UNSELECTABLE, cost)
    key = torch.add(_numbers(tree), cost, alpha=1 << _BITS)
    groups = -(-2 * rows // max(batch, 1))
    if 2 * groups < nodes:
        key = torch.where(cost <= _bound(cost, cap, left, rows, groups), key, _LAST)
    most = min(nodes, rows, tree.most)
    own = _within(key.topk(most, dim=1, largest=False).values, cap, _LAST)
    first = _least((own + (torch.arange(batch, device=device) * nodes)[:, None]).flatten(), left, rows)
    at = torch.where((first >= 0) & (first < _LAST), (first & ((1 << _BITS) - 1)) % max(total, 1), total)
    return torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill_(0, at, True)[:total].view(batch, nodes)


def _bound(cost: Tensor, cap: Tensor, left: Tensor, rows: int, groups: int) -> Tensor:
    """int32 []: a cost that no dealt node exceeds, from the cheapest of each of ``groups`` groups of a request's nodes.

    Dealing among some of the nodes ends at a cost that is never below the one at which dealing among all of them ends.
    """
    some = cost[:, cost.shape[1] % groups :].unflatten(1, (-1, groups)).amin(dim=1)
    return _least(_within(some.sort(dim=1).values, cap, UNSELECTABLE).flatten(), left, rows).amax()


def _within(ascending: Tensor, cap: Tensor, last: int) -> Tensor:
    """Each row's first ``cap`` entries, and ``last`` in place of the others."""
    return torch.where(torch.arange(ascending.shape[1], device=cap.device) < cap[:, None], ascending, last)


def _least(keys: Tensor, left: Tensor, rows: int) -> Tensor:
    """[rows] in no order: the ``left`` smallest of ``keys``, or the greatest number in place of what is missing; -1 for the rest."""
    spare = torch.arange(rows, device=keys.device) < rows - left
    pads = torch.where(spare, -1, torch.iinfo(keys.dtype).max).to(keys.dtype)
    return torch.cat([pads, keys]).topk(rows, largest=False, sorted=False).values


def _numbers(tree: SuperTree) -> Tensor:
    """int64 [T]: each node's number in the order of ties, that of request 0; request b's lie ``b * T`` higher."""
    starts, device = [0], tree.status.device
    for layer in tree.layers:
        starts.append(starts[-1] + layer.token.shape[1])
    step = tree.batch * starts[-1]
    numbers = [
        torch.arange(layer.depth * step + first, layer.depth * step + end, device=device)
        for layer, first, end in zip(tree.layers, starts, starts[1:], strict=False)
    ]
    return torch.cat(numbers)
