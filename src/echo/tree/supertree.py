"""The super-tree: all requests' candidate trees of one step, as a tuple of immutable layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels.codes import Status

DEAD_SCORE = float("-inf")
"""The score of a node that can never be selected."""


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

    def inherit(self, state: Tensor) -> Tensor:
        """What a drafter knows of the previous frontier, ``state`` [B, W', ...], gathered for these nodes, [B, W, ...].

        Hidden-state rows, KV slots, positions: ``parent`` is the reorder list that says which branch each kept node needs.
        """
        index = self.parent.view(*self.parent.shape, *[1] * (state.dim() - 2))
        return state.gather(1, index.expand(*self.parent.shape, *state.shape[2:]))


@dataclass(frozen=True)
class Layer:
    """The candidates of one depth, M of them for each request.

    Attributes:
        depth: 0 for the roots.
        token: int64 [B, M].
        parent: int64 [B, M], index into the candidates of the layer above; rising along M. 0 for roots.
        score: float32 [B, M], path log-probability S <= 0; -inf: never selectable.
        committed: bool [B, M], rows bought while drafting (the root of each live request is).
        drafted: bool [B], the request drafted this layer.
        request_weights: float32 [B] in (0, 1], what each request's tokens are worth; None: all alike.
    """

    depth: int
    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor
    drafted: Tensor
    request_weights: Tensor | None = None

    @property
    def log_confidence(self) -> Tensor:
        """float32 [B]: log of the paper's c[i, d], the greatest path log-probability of the layer."""
        return self.score.amax(dim=1)

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log of the sum of the path probabilities of the ``beam`` best nodes (DDD's statistic)."""
        best = self.score.topk(min(beam, self.score.shape[1]), dim=1).values
        return best.logsumexp(dim=1)


@dataclass(frozen=True)
class Nodes:
    """Buffers that hold all layers side by side, each layer a few columns of them.

    Attributes:
        token, parent: int64 [B, T]; a parent is an index into the candidates of the layer above.
        score: float32 [B, T].
        committed: bool [B, T].
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Forest:
    """All layers side by side: T nodes for each request, roots first, by depth, then candidate.

    Attributes:
        token: int64 [B, T].
        parent: int64 [B, T], index into the T nodes of the same request; a root's is its own.
        score: float32 [B, T].
        committed: bool [B, T].
        depth: int64 [T].
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor
    depth: Tensor


@dataclass(frozen=True)
class SuperTree:
    """All candidate trees of a step. Growing makes a new value and copies no layer.

    Attributes:
        layers: the roots, then one layer for each depth drafted.
        frontier: the nodes to draft on next.
        status: int8 [B], a :class:`Status` each.
        verify_limits: int64 [B], the most rows a request may get, root included; 0 for an empty slot.
        num_committed: int64 [B], rows bought so far, root included.
        num_remaining: int64 [], rows that may still be bought.
        invalid: int32 [B], draft scores at active nodes that were no log-probabilities (NaN, or above 0 by more than a rounding), and
            those of layers without any finite score; such nodes are never selectable.
        num_verify_tokens: rows of this step, a host int; ``num_remaining`` never lets more be selected.
        max_verify_tokens_per_req: a host int that bounds ``verify_limits``.
        nodes: the buffers that the layers are columns of; None: each layer has its own.
    """

    layers: tuple[Layer, ...]
    frontier: Frontier
    status: Tensor
    verify_limits: Tensor
    num_committed: Tensor
    num_remaining: Tensor
    invalid: Tensor
    num_verify_tokens: int
    max_verify_tokens_per_req: int
    nodes: Nodes | None = None

    @classmethod
    def from_arrays(
        cls,
        token: Tensor,
        parent: Tensor,
        log_prob: Tensor,
        depth: Tensor | None = None,
        *,
        num_nodes: Tensor | None = None,
        num_verify_tokens: int | None = None,
        verify_limits: Tensor | None = None,
    ) -> SuperTree:
        """A tree of one's own, for :meth:`ElasticBudgetScheduler.select` and ``pack``: all its nodes are candidates, none is bought.

        It reads every value on the host and checks it (about a tenth of a millisecond a request); siblings may be in any order.

        Args:
            token: int64 [B, T], each request's nodes, root first, every parent before its children.
            parent: int64 [B, T], index into the T nodes of the same request; -1 for the root.
            log_prob: float [B, T], given the parent; not read for roots; -inf: never selectable.
            depth: int64 [B, T], checked where given.
            num_nodes: int64 [B], nodes of each request, 0 for an empty slot; T where not given.
            num_verify_tokens: rows of the step; as many as there are nodes where not given.
            verify_limits: int64 [B], the most rows a request may get.

        Raises:
            EchoError: naming the request and the row of a cycle, a parent after its child or outside the request, equal siblings,
                a negative token, a log-probability that is no number, or a wrong depth.

        Example:
            >>> q = torch.tensor([[0.0, -0.1, -0.5, -0.2]])
            >>> tree = SuperTree.from_arrays(torch.tensor([[7, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]), q, rows=3)
            >>> tree.forest.depth.tolist()
            [0, 1, 1, 2]
        """
        from echo.tree.build import from_arrays

        return from_arrays(
            token,
            parent,
            log_prob,
            depth,
            num_nodes=num_nodes,
            num_verify_tokens=num_verify_tokens,
            verify_limits=verify_limits,
        )

    @classmethod
    def from_paths(
        cls,
        root_tokens: Tensor,
        paths: Sequence[Sequence[Sequence[int]]],
        *,
        weights: Sequence[Sequence[float]] | None = None,
        prior: float = 1.0,
        num_verify_tokens: int | None = None,
        verify_limits: Tensor | None = None,
    ) -> SuperTree:
        """The trie of what may follow each request (n-gram, suffix or retrieval drafters): shared prefixes become one node.

        A node's probability given its parent is the weight of the paths through it over ``prior`` plus the weight through its parent.

        Args:
            root_tokens: int64 [B], each request's last emitted token.
            paths: for each request its continuations, the root not included, lists or tensors; none is fine.
            weights: for each request the weight of each continuation (how often it was seen); 1 where not given.
            prior: weight of "something else follows".
            num_verify_tokens, verify_limits: as in :meth:`from_arrays`.

        Raises:
            EchoError: naming the request of a bad path or weight.

        Example:
            >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [1, 3]]], prior=0.0)
            >>> tree.forest.token.tolist(), tree.forest.score.exp().tolist()
            ([[7, 1, 2, 3]], [[1.0, 1.0, 0.5, 0.5]])
        """
        from echo.tree.build import from_paths

        return from_paths(
            root_tokens,
            paths,
            weights=weights,
            prior=prior,
            num_verify_tokens=num_verify_tokens,
            verify_limits=verify_limits,
        )

    @property
    def depth(self) -> int:
        """Layers drafted so far."""
        return len(self.layers) - 1

    @property
    def request_weights(self) -> Tensor | None:
        """float32 [B] in (0, 1], what each request's tokens are worth; None: all alike."""
        return self.layers[0].request_weights

    @property
    def batch(self) -> int:
        """Requests, empty slots included."""
        return self.status.shape[0]

    @property
    def active(self) -> Tensor:
        """bool [B]: requests that still draft. Looking at it reads back from the device; only a host without graphs may."""
        return self.status == int(Status.ACTIVE)

    @property
    def sizes(self) -> list[int]:
        """Candidates of each layer, together T; host ints."""
        return [layer.token.shape[1] for layer in self.layers]

    def column(self, name: str) -> Tensor:
        """[B, T]: what each layer calls ``name`` (token, parent, score, bought), side by side; copied only where they lie apart."""
        if self.nodes is not None:
            whole: Tensor = getattr(self.nodes, name)
            return whole[:, : sum(self.sizes)]
        return torch.cat([getattr(layer, name) for layer in self.layers], dim=1)

    @property
    def score(self) -> Tensor:
        """float32 [B, T]: that of :attr:`forest` alone."""
        return self.column("score")

    @property
    def committed(self) -> Tensor:
        """bool [B, T]: that of :attr:`forest` alone."""
        return self.column("committed")

    @property
    def forest(self) -> Forest:
        """All layers side by side."""
        sizes = self.sizes
        above = (
            [0, *itertools.accumulate([0, *sizes[:-2]])] if len(sizes) > 1 else [0]
        )  # where the layer above begins
        parents = [
            layer.parent + first if first else layer.parent
            for layer, first in zip(self.layers, above, strict=True)
        ]
        device = self.status.device
        depth = torch.cat(
            [
                torch.full((n,), layer.depth, device=device)
                for n, layer in zip(sizes, self.layers, strict=True)
            ]
        )
        return Forest(
            self.column("token"),
            torch.cat(parents, dim=1),
            self.score,
            self.committed,
            depth,
        )


def write_layer(out: SuperTree, tree: SuperTree) -> SuperTree:
    """``out`` with the last layer, the frontier and the state of ``tree`` copied into its buffers: of the same shapes.

    Raises:
        EchoError: weights, for which there are no buffers.
    """
    if tree.request_weights is not None:
        raise EchoError("weights: expected none where a tree is written to buffers")
    parts = (out, tree), (out.layers[-1], tree.layers[-1]), (out.frontier, tree.frontier)
    for old, new in parts:
        for field in fields(new):
            buffer, value = getattr(old, field.name), getattr(new, field.name)
            if isinstance(value, Tensor) and buffer is not value:
                buffer.copy_(value)
    return replace(
        out,
        num_verify_tokens=tree.num_verify_tokens,
        max_verify_tokens_per_req=tree.max_verify_tokens_per_req,
    )


def cost_bits(score: Tensor) -> Tensor:
    """int32 cost of float32 scores <= 0 that are numbers, as :func:`path_score` makes them: smaller is better, equal scores cost the same.

    The bits of a non-negative float rise with its value, so no device can order them differently; minus infinity is UNSELECTABLE.
    """
    return (0.0 - score).view(torch.int32)


def path_score(parent: Tensor, log_prob: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S(v) = S(parent) + min(log q(v), 0), the greatest of each request, and how many of its drafts are faulty.

    Minus infinity says "no candidate" and is no fault by itself; NaN and what is above 0 by more than a rounding (a probability, a
    logit) are faults, and so is each score of a request that has an active node and no finite score at all.

    Args:
        parent: float32 [B, W].
        log_prob: float [B, W, k].
        active: bool [B, W].

    Returns:
        float32 [B, W * k] with -inf at unselectable nodes, float32 [B], int32 [B].
    """
    q, parent = log_prob.detach().float(), torch.where(active, parent, DEAD_SCORE)[..., None]
    good = q <= checks.ROUNDING
    score = (parent + torch.where(good, q, DEAD_SCORE).clamp_(max=0.0)).flatten(1)
    best = score.max(dim=1).values
    good.logical_and_((best > DEAD_SCORE)[:, None, None])
    return score, best, (good < active[..., None]).sum(dim=(1, 2), dtype=torch.int32)


def check_size(requests: int, nodes: int, depth: int) -> None:
    """Raises :class:`EchoError` where a forest has more nodes than the integer order can hold (2^31)."""
    if (depth + 1) * requests * nodes >= 1 << 31:
        raise EchoError(
            f"log_probs: expected (depth + 1) * batch * nodes < 2^31, got ({depth} + 1) * {requests} * {nodes}"
        )
