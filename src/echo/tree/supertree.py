"""The super-tree: all requests' candidate trees of one step, as a tuple of immutable layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from echo.errors import EchoError

DEAD_SCORE = float("-inf")
"""The score of a node that can never be selected."""

UNSELECTABLE = torch.iinfo(torch.int32).max
"""Cost of a node that can never be selected; above the bits of every finite float32 and of +inf."""


class Status(IntEnum):
    """Why a request stopped drafting, or that it has not."""

    ACTIVE = 0
    TRUNCATED = 1
    """Failed a gate."""
    STARVED = 2
    """Passed, and found no rows left to buy."""
    FINISHED = 3
    """Reached the deepest layer."""
    EXHAUSTED = 4
    """Nothing to draft on: no finite score, or the row limit of the request reached."""
    EMPTY = 5
    """No request in this slot."""


@dataclass(frozen=True)
class Frontier:
    """The nodes to draft on: what an engine's draft model reads.

    Attributes:
        token: int64 [B, W].
        parent: int64 [B, W], each node's place in the previous frontier; 0 for the root.
        index: int64 [B, W], each node's place among its layer's candidates, rising along W.
        score: float32 [B, W], path log-probability.
        active: bool [B, W]; what is drafted on an inactive node is ignored.
        depth: depth of these nodes; what is drafted lies one deeper.
    """

    token: Tensor
    parent: Tensor
    index: Tensor
    score: Tensor
    active: Tensor
    depth: int


@dataclass(frozen=True)
class Layer:
    """The candidates of one depth, M of them for each request.

    Attributes:
        depth: 0 for the roots.
        token: int64 [B, M].
        parent: int64 [B, M], index into the candidates of the layer above; rising along M. 0 for roots.
        score: float32 [B, M], path log-probability S <= 0; -inf: never selectable.
        bought: bool [B, M], rows bought while drafting (the root of each live request is).
        drafted: bool [B], the request drafted this layer.
    """

    depth: int
    token: Tensor
    parent: Tensor
    score: Tensor
    bought: Tensor
    drafted: Tensor

    @property
    def log_confidence(self) -> Tensor:
        """float32 [B]: log of the paper's c[i, d], the greatest path log-probability of the layer."""
        return self.score.amax(dim=1)

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log of the sum of the path probabilities of the ``beam`` best nodes (DDD's statistic)."""
        best = self.score.topk(min(beam, self.score.shape[1]), dim=1).values
        return best.logsumexp(dim=1)


@dataclass(frozen=True)
class Forest:
    """All layers side by side: T nodes for each request, roots first, by depth, then candidate.

    Attributes:
        token: int64 [B, T].
        parent: int64 [B, T], index into the T nodes of the same request; a root's is its own.
        score: float32 [B, T].
        bought: bool [B, T].
        depth: int64 [T].
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    bought: Tensor
    depth: Tensor

    @property
    def tie(self) -> Tensor:
        """int64 [B, T]: the order among equal costs: depth, request, candidate."""
        requests, nodes = self.token.shape
        return (self.depth * requests + torch.arange(requests, device=self.depth.device)[:, None]) * nodes + torch.arange(
            nodes, device=self.depth.device
        )


@dataclass(frozen=True)
class SuperTree:
    """All candidate trees of a step. Growing makes a new value and copies no layer.

    Attributes:
        layers: the roots, then one layer for each depth drafted.
        frontier: the nodes to draft on next.
        status: int8 [B], a :class:`Status` each.
        row_limit: int64 [B], the most rows a request may get, root included; 0 for an empty slot.
        left: int64 [], rows that may still be bought.
        invalid: int32 [B], draft scores at active nodes that were NaN or plus infinity, and those of layers without any finite
            score; such nodes are never selectable.
        rows: rows of this step, a host int; ``left`` never lets more be selected.
    """

    layers: tuple[Layer, ...]
    frontier: Frontier
    status: Tensor
    row_limit: Tensor
    left: Tensor
    invalid: Tensor
    rows: int

    @property
    def depth(self) -> int:
        """Layers drafted so far."""
        return len(self.layers) - 1

    @property
    def batch(self) -> int:
        """Requests, empty slots included."""
        return self.status.shape[0]

    @property
    def active(self) -> Tensor:
        """bool [B]: requests that still draft. Looking at it reads back from the device; only a host without graphs may."""
        return self.status == int(Status.ACTIVE)

    @property
    def forest(self) -> Forest:
        """All layers side by side."""
        sizes = [layer.token.shape[1] for layer in self.layers]
        above = [0, *itertools.accumulate([0, *sizes[:-2]])] if len(sizes) > 1 else [0]  # where the layer above begins
        parents = [layer.parent + first for layer, first in zip(self.layers, above, strict=True)]
        device = self.status.device
        depth = torch.cat([torch.full((n,), layer.depth, device=device) for n, layer in zip(sizes, self.layers, strict=True)])
        return Forest(
            torch.cat([layer.token for layer in self.layers], dim=1),
            torch.cat(parents, dim=1),
            torch.cat([layer.score for layer in self.layers], dim=1),
            torch.cat([layer.bought for layer in self.layers], dim=1),
            depth,
        )


def bits(score: Tensor) -> Tensor:
    """int32 cost of float32 scores: smaller is better, equal scores have equal costs, unselectable ones the greatest.

    The bits of a non-negative float rise with its value, so no device can order them differently.
    """
    cost = (0.0 - score).view(torch.int32)
    return torch.where(torch.isfinite(score), cost, UNSELECTABLE)


def path_score(parent: Tensor, log_prob: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """S(v) = min(S(parent), S(parent) + log q(v)), and which scores are faulty.

    Minus infinity says "no candidate" and is no fault by itself; NaN and plus infinity are faults, and so is each score of a
    request that has an active node and no finite score at all.

    Args:
        parent: float32 [B, W].
        log_prob: float [B, W, k].
        active: bool [B, W].

    Returns:
        float32 [B, W, k] with -inf at unselectable nodes, bool [B, W, k].
    """
    q = log_prob.float()
    score = torch.minimum(parent[..., None], parent[..., None] + q)
    finite = torch.isfinite(q) & torch.isfinite(score)
    usable = active[..., None] & finite
    nothing = ~usable.flatten(1).any(dim=1)[:, None, None]
    faulty = active[..., None] & ~finite & (nothing | (q != -torch.inf))
    return torch.where(usable, score, DEAD_SCORE), faulty


def check_size(requests: int, nodes: int, depth: int) -> None:
    """Raises :class:`EchoError` where a forest has more nodes than the integer order can hold (2^31)."""
    if (depth + 1) * requests * nodes >= 1 << 31:
        raise EchoError(f"log_probs: expected (depth + 1) * batch * nodes < 2^31, got ({depth} + 1) * {requests} * {nodes}")
