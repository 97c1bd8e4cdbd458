"""The super-tree: candidate trees of all requests of a step, as a tuple of immutable layers.

B requests, W nodes of a frontier, M candidates of a layer, T nodes of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into
from echo.kernels.codes import Status
from echo.tree import build

DEAD_SCORE = float("-inf")
"""Score of a node that can never be selected."""


@dataclass(frozen=True)
class Frontier:
    """The nodes to expand next: the draft model's input.

    Attributes:
        token: int64 [B, W].
        parent: int64 [B, W], index of each node's parent in the previous frontier; 0 for the root.
        index: int64 [B, W], index among the candidates of its layer, ascending along W.
        score: float32 [B, W], path log-probability.
        active: bool [B, W]; drafts of an inactive node are ignored.
        depth: of these nodes, a host int; their children are one deeper.

    Example:
        >>> frontier = SuperTree.from_paths(torch.tensor([7]), [[[1], [2, 3]]]).frontier
        >>> state = torch.tensor([[[0.1], [0.2]]])  # of nodes 1 and 2
        >>> frontier.token.tolist(), frontier.inherit(state)  # node 3 inherits from node 2
        ([[3]], tensor([[[0.2000]]]))
    """

    token: Tensor
    parent: Tensor
    index: Tensor
    score: Tensor
    active: Tensor
    depth: int

    def inherit(self, state: Tensor) -> Tensor:
        """Reorder a drafter's ``state`` [B, W', ...] of the previous frontier into [B, W, ...].

        Each node gets its parent's hidden state, KV slot or position.

        Raises:
            EchoError: a state of another batch, or of too few nodes.
        """
        above = "nodes of the previous frontier"
        checks.tensor("state", state, [self.parent.shape[0], above, "..."])
        index = self.parent.view(*self.parent.shape, *[1] * (state.dim() - 2))
        with checks.reading(f"state: expected one for each of the {above}"):
            return state.gather(1, index.expand(*self.parent.shape, *state.shape[2:]))


@dataclass(frozen=True)
class Layer:
    """The candidates of one depth, M for each request.

    Attributes:
        depth: 0 for the roots.
        token: int64 [B, M].
        parent: int64 [B, M], index among the layer above's candidates, ascending; 0 for roots.
        score: float32 [B, M], path log-probability S <= 0; -inf: never selectable.
        committed: bool [B, M], whether committed while drafting; True for live requests' roots.
        drafted: bool [B], whether the request drafted this layer.
        request_weights: float32 [B] in (0, 1], value of each request's tokens; None: all equal.

    Example:
        >>> layer = SuperTree.from_paths(torch.tensor([7]), [[[1], [2], [3]]]).layers[1]  # 1/4 each
        >>> layer.log_confidence.exp().tolist(), layer.log_mass(beam=2).exp().tolist()
        ([0.25], [0.5])
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
        """float32 [B]: log of the paper's c[i, d], the layer's greatest path log-probability."""
        return self.score.amax(dim=1)

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log-sum-exp of the ``beam`` best path log-probabilities, as in DDD."""
        best = self.score.topk(min(beam, self.score.shape[1]), dim=1).values
        return best.logsumexp(dim=1)


@dataclass(frozen=True)
class Nodes:
    """Buffers of all layers, [B, T] each; a layer is a range of columns, with its attributes."""

    token: Tensor
    parent: Tensor
    score: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Forest(Nodes):
    """All layers, concatenated: the roots first, then by depth and candidate.

    Attributes:
        token: int64 [B, T].
        parent: int64 [B, T], index into the T nodes of the same request; a root is its own parent.
        score: float32 [B, T].
        committed: bool [B, T].
        depth: int64 [T].
    """

    depth: Tensor


@dataclass(frozen=True)
class SuperTree:
    """All candidate trees of a step. Growing returns a new value and copies no layer.

    Attributes:
        layers: the roots, then one layer per drafted depth.
        frontier: the nodes to expand next.
        status: int8 [B], each request's :class:`Status`.
        verify_limits: int64 [B], maximum verify tokens of each request, root included; 0 if empty.
        num_committed: int64 [B], verify tokens committed so far, root included.
        num_remaining: int64 [], verify tokens that may still be committed.
        invalid: int32 [B], faulty draft scores: at active nodes, scores that are no
            log-probabilities (NaN, or above 0 by more than rounding), and every score of a layer
            without a finite one. Such nodes are never selectable.
        num_verify_tokens: verify tokens of this step, a host int.
        max_verify_tokens_per_req: upper bound of ``verify_limits``, a host int.
        nodes: buffers that hold all layers as columns; None: each layer has its own.
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
        """Build a custom tree for :meth:`ElasticBudgetScheduler.pack`, with only roots committed.

        Checks every value on the host, about 0.1 ms a request. Siblings may be in any order.

        Args:
            token: int64 [B, T], each request's nodes, root first, each parent before its children.
            parent: int64 [B, T], index into the T nodes of the same request; -1 for the root.
            log_prob: float [B, T], given the parent; ignored for roots; -inf: never selectable.
            depth: int64 [B, T], checked if given.
            num_nodes: int64 [B], number of nodes of each request; 0 if empty. Defaults to T.
            num_verify_tokens: verify tokens of the step. Defaults to the number of nodes.
            verify_limits: int64 [B], maximum verify tokens of each request. Defaults to its nodes.

        Raises:
            EchoError: naming the request and row of a cycle, a parent outside the request or after
                its child, equal siblings, a negative token, a score that is no log-probability, or
                a wrong depth.

        Example:
            >>> token, parent = torch.tensor([[7, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]])
            >>> SuperTree.from_arrays(token, parent, torch.zeros(1, 4)).forest.depth.tolist()
            [0, 1, 1, 2]
        """
        sizes, drafted = build.layers(token, parent, log_prob, depth, num_nodes)
        device = token.device
        count = int((sizes > 0).sum())
        limit = torch.from_numpy(sizes).to(device)
        live = limit > 0
        if verify_limits is not None:
            checks.tensor("verify_limits", verify_limits, limit.shape, torch.int64, device)
            limit = torch.minimum(limit, verify_limits.clamp(min=1)) * live
        n = max(int(sizes.sum()), 1)
        if num_verify_tokens is not None:
            n = checks.integer("num_verify_tokens", num_verify_tokens, max(count, 1))
        root = token[:, :1].long().sum(dim=1, keepdim=True) * live[:, None]  # T may be 0
        zero = torch.zeros_like(root)
        score = torch.zeros_like(root, dtype=torch.float32).masked_fill_(~live[:, None], DEAD_SCORE)
        tree = cls(
            layers=(Layer(0, root, zero, score, live[:, None], live),),
            frontier=Frontier(root, zero, zero, score, zero.bool(), 0),
            status=torch.where(live, int(Status.FINISHED), int(Status.EMPTY)).to(torch.int8),
            verify_limits=limit,
            num_committed=live.long(),
            num_remaining=n - live.sum(),
            invalid=zero[:, 0].int(),
            num_verify_tokens=n,
            max_verify_tokens_per_req=int(sizes.max(initial=1)),
        )
        return replace(tree.attach(drafted), invalid=tree.invalid)

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
        """Build tries of the requests' continuations, from n-gram, suffix or retrieval drafters.

        A node's probability given its parent is the weight of the paths through it, divided by
        ``prior`` plus the weight of those through its parent. Runs on the host.

        Args:
            root_tokens: int64 [B], each request's last emitted token.
            paths: continuations of each request without the root, lists or tensors; may be empty.
            weights: of each continuation, such as its count. Defaults to 1.
            prior: weight of "something else follows".
            num_verify_tokens, verify_limits: as in :meth:`from_arrays`.

        Raises:
            EchoError: naming the request of an invalid path or weight.

        Example:
            >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [1, 3]]], prior=0.0)
            >>> tree.forest.token.tolist(), tree.forest.score.exp().tolist()
            ([[7, 1, 2, 3]], [[1.0, 1.0, 0.5, 0.5]])
        """
        token, parent, log_prob, num_nodes = build.trie(root_tokens, paths, weights, prior)
        return cls.from_arrays(
            token, parent, log_prob, num_nodes=num_nodes,
            num_verify_tokens=num_verify_tokens, verify_limits=verify_limits,
        )  # fmt: skip

    def attach(self, layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> SuperTree:
        """Add ready-made layers, drafted by all requests, to this tree of roots. Sync-free.

        Args:
            layers: for each depth, tokens int64 [B, M]; parents int64 [B, M], ascending indices
                into the layer above; and log-probabilities float [B, M] given the parent.

        Raises:
            EchoError: a tree that already has layers, shapes or dtypes that do not fit, or too many
                nodes.

        Example:
            >>> layer = torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), torch.tensor([[-0.5, -1.0]])
            >>> tree = SuperTree.from_paths(torch.tensor([7]), [[]]).attach([layer])
            >>> tree.column("token").tolist(), tree.column("score").tolist()
            ([[7, 1, 2]], [[0.0, -0.5, -1.0]])
        """
        if self.depth:
            raise EchoError(f"tree: expected a tree of roots only, got one of {self.depth} layers")
        live = self.status != int(Status.EMPTY)
        for token, parent, log_prob in layers:
            checks.tensor("tokens", token, [self.batch, "M"], torch.int64, live.device)
            checks.tensor("parents", parent, token.shape, torch.int64, live.device)
            checks.tensor("log_probs", log_prob, token.shape, checks.FLOATS, live.device)
            checks.integer("tokens.shape[1]", token.shape[1], 1)
        check_size(self.batch, 1 + sum(token.shape[1] for token, _, _ in layers), len(layers))
        made = list(self.layers)
        invalid = self.invalid
        for depth, (token, parent, log_prob) in enumerate(layers, start=1):
            with checks.reading("parents: expected indices into the layer above"):
                above = made[-1].score.gather(1, parent)
            score, _, faulty = path_score(above, log_prob[..., None], torch.isfinite(above))
            made.append(Layer(depth, token, parent, score, torch.zeros_like(above).bool(), live))
            invalid = invalid + faulty
        last = made[-1]
        index = torch.arange(last.token.shape[1], device=live.device).expand_as(last.token)
        off = torch.zeros_like(last.committed)
        return replace(
            self,
            layers=tuple(made),
            frontier=Frontier(last.token, last.parent, index, last.score, off, last.depth),
            status=self.status.masked_fill(live, int(Status.FINISHED)),
            invalid=invalid,
        )

    @property
    def depth(self) -> int:
        """Number of layers drafted so far."""
        return len(self.layers) - 1

    @property
    def request_weights(self) -> Tensor | None:
        """float32 [B] in (0, 1], value of each request's tokens; None: all equal."""
        return self.layers[0].request_weights

    @property
    def batch(self) -> int:
        """B, empty requests included."""
        return self.status.shape[0]

    @property
    def active(self) -> Tensor:
        """bool [B]: requests that still draft. Reading it on the host is a device-to-host sync."""
        return self.status == int(Status.ACTIVE)

    @property
    def sizes(self) -> list[int]:
        """Number of candidates of each layer, T in total; host ints."""
        return [layer.token.shape[1] for layer in self.layers]

    def column(self, name: str) -> Tensor:
        """[B, T]: ``name`` (token, parent, ...) of all layers; a view if they share buffers."""
        if self.nodes is not None:
            whole: Tensor = getattr(self.nodes, name)
            return whole[:, : sum(self.sizes)]
        return torch.cat([getattr(layer, name) for layer in self.layers], dim=1)

    @property
    def score(self) -> Tensor:
        """float32 [B, T]: as in :attr:`forest`."""
        return self.column("score")

    @property
    def committed(self) -> Tensor:
        """bool [B, T]: as in :attr:`forest`."""
        return self.column("committed")

    @property
    def forest(self) -> Forest:
        """All layers, concatenated."""
        device = self.status.device
        begins = [0, 0, *accumulate(self.sizes[:-2])]  # of the layer above each
        layers = zip(self.layers, begins, strict=False)
        parents = [layer.parent + begin if begin else layer.parent for layer, begin in layers]
        depths = [torch.full((n,), d, device=device) for d, n in enumerate(self.sizes)]
        parent = torch.cat(parents, dim=1)
        return Forest(self.column("token"), parent, self.score, self.committed, torch.cat(depths))


def write_layer(out: SuperTree, tree: SuperTree) -> SuperTree:
    """Copy the last layer, the frontier and the state of ``tree`` into the buffers of ``out``."""
    if tree.request_weights is not None:
        raise EchoError("request_weights: expected None where a tree is written to buffers")
    last = copy_into(out.layers[-1], tree.layers[-1])
    frontier = copy_into(out.frontier, tree.frontier)
    layers = *out.layers[:-1], last
    return copy_into(out, replace(tree, layers=layers, frontier=frontier, nodes=out.nodes))


def cost_bits(score: Tensor) -> Tensor:
    """int32 cost of float32 scores <= 0: smaller is better; UNSELECTABLE for -inf.

    The bits of a non-negative float rise with its value, so every device orders them alike.
    """
    return (0.0 - score).view(torch.int32)


def path_score(parent: Tensor, log_prob: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S(v) = S(parent) + min(log q(v), 0), each request's best score, and its faulty drafts.

    Faults are those of :attr:`SuperTree.invalid`; -inf means "no candidate" and is none.

    Args:
        parent: float32 [B, W].
        log_prob: float [B, W, k], of each node's k children.
        active: bool [B, W].

    Returns:
        Scores float32 [B, W * k], -inf where unselectable; best float32 [B]; faults int32 [B].
    """
    q = log_prob.detach().float()
    parent = torch.where(active, parent, DEAD_SCORE)[..., None]
    good = q <= checks.ROUNDING
    score = (parent + torch.where(good, q, DEAD_SCORE).clamp_(max=0.0)).flatten(1)
    best = score.max(dim=1).values
    good.logical_and_((best > DEAD_SCORE)[:, None, None])
    return score, best, (good < active[..., None]).sum(dim=(1, 2), dtype=torch.int32)


def check_size(requests: int, nodes: int, depth: int) -> None:
    """Raise EchoError if a forest has 2^31 nodes or more, which the integer order cannot hold."""
    if (depth + 1) * requests * nodes >= 1 << 31:
        limit = "(depth + 1) * batch * nodes < 2^31"
        got = f"({depth} + 1) * {requests} * {nodes}"
        raise EchoError(f"log_probs: expected {limit}, got {got}")
