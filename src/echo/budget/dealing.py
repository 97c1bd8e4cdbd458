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
    its node is. Two partial selections find the keys, one within each request and one among what those leave.

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
    most = min(nodes, rows)
    key = torch.where(tree.bought, _LAST, torch.add(_numbers(tree), cost, alpha=1 << _BITS))
    key = _cheapest(key, cap, most) + (torch.arange(batch, device=device) * nodes)[:, None]
    first = key.flatten().topk(min(rows, batch * most), largest=False).values
    taken = (torch.arange(len(first), device=device) < left) & (first < _LAST)
    at = torch.where(taken, (first & ((1 << _BITS) - 1)) % max(total, 1), total)
    return torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill_(0, at, True)[:total].view(batch, nodes)


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


def _cheapest(key: Tensor, cap: Tensor, most: int) -> Tensor:
    """int64 [B, most] in no order: each request's ``cap`` smallest keys, and then ``_LAST``.

    Behind as many pads before them all as the cap falls short of ``most``, they are among the ``most`` smallest, whatever the cap.
    """
    spare = torch.arange(most, device=key.device) < (most - cap)[:, None]
    pads = torch.where(spare, -1, _LAST)
    chosen = torch.cat([pads, key], dim=1).topk(most, dim=1, largest=False, sorted=False).values
    return torch.where(chosen < 0, _LAST, chosen)
