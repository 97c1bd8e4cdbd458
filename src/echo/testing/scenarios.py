"""Steps to try a policy on: a batch and a drafter that is a look-up, made by hand here and by hypothesis in ``strategies``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier, SuperTree


@dataclass(frozen=True)
class Scenario:
    """The input of one step. What is drafted after a token depends on its depth and itself alone, as with a real drafter.

    So requests may be permuted, taken out or put beside others, and each is drafted the same.

    Attributes:
        root_tokens: int64 [B], below V.
        live: bool [B].
        verify_limits: int64 [B], the most rows of each request.
        log_probs: float32 [D, V, k], after token v at depth d the log-probability of its candidates, the tokens v + 1, v + 2, ... modulo V.
        num_verify_tokens: of the step; None: what the scheduler asks for by itself.
        request_weights: float32 [B], what each request's tokens are worth; None: all alike.
    """

    root_tokens: Tensor
    live: Tensor
    verify_limits: Tensor
    log_probs: Tensor
    num_verify_tokens: int | None = None
    request_weights: Tensor | None = None

    def __post_init__(self) -> None:
        batch = checks.tensor("root_tokens", self.root_tokens, ["B"], torch.int64).shape[0]
        checks.tensor("live", self.live, [batch], torch.bool)
        checks.tensor("verify_limits", self.verify_limits, [batch], torch.int64)
        _, vocab, k = checks.tensor(
            "log_probs", self.log_probs, ["D", "V", "k"], checks.FLOATS
        ).shape
        if k > vocab or not bool(((self.root_tokens >= 0) & (self.root_tokens < vocab)).all()):
            raise EchoError(
                f"root_tokens, log_probs: expected tokens and k of at most V = {vocab}, got k = {k}"
            )

    @property
    def batch(self) -> int:
        """B, empty slots included."""
        return self.root_tokens.shape[0]

    def draft(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """Tokens int64 and log-probabilities [B, W, k] after each node of the ``frontier``."""
        vocab, k = self.log_probs.shape[1:]
        tokens = (frontier.token[..., None] + 1 + torch.arange(k)) % vocab
        return tokens, self.log_probs[frontier.depth][frontier.token]

    def take(self, requests: Sequence[int]) -> Scenario:
        """The step of these ``requests`` alone, in this order."""
        at = torch.tensor(requests, dtype=torch.int64)
        weights = None if self.request_weights is None else self.request_weights[at]
        return Scenario(
            self.root_tokens[at],
            self.live[at],
            self.verify_limits[at],
            self.log_probs,
            self.num_verify_tokens,
            weights,
        )

    def grow(self, scheduler: ElasticBudgetScheduler) -> SuperTree:
        """The super-tree that ``scheduler`` grows, all D layers of it."""
        tree = scheduler.begin(
            self.root_tokens,
            live=self.live,
            verify_limits=self.verify_limits,
            num_verify_tokens=self.num_verify_tokens,
            request_weights=self.request_weights,
        )
        for _ in range(self.log_probs.shape[0]):
            tree = scheduler.grow(tree, *self.draft(tree.frontier))
        return tree

    def plan(self, scheduler: ElasticBudgetScheduler) -> Plan:
        """The step as this ``scheduler`` plans it."""
        tree = self.grow(scheduler)
        return Plan(self, tree, scheduler.select(tree), scheduler.pack(tree))


@dataclass(frozen=True)
class Plan:
    """A planned step.

    Attributes:
        scenario, tree, packed: the values of the step.
        selected: bool [B, T] over ``tree.forest``: the bare decision, before anything is cut off at the step's rows.
    """

    scenario: Scenario
    tree: SuperTree
    selected: Tensor
    packed: PackedTree

    def rows(self, request: int) -> list[int]:
        """The selected nodes of a ``request`` among its T nodes, in the order of their rows."""
        return [int(node) for node in self.selected[request].nonzero()[:, 0]]

    def path(self, request: int, node: int) -> tuple[int, ...]:
        """Tokens from the root's child down to a ``node`` of a ``request``, by which it is known in any batch."""
        forest, tokens = self.tree.forest, list[int]()
        while int(forest.depth[node]):
            tokens.append(int(forest.token[request, node]))
            node = int(forest.parent[request, node])
        return tuple(reversed(tokens))

    def paths(self, request: int) -> set[tuple[int, ...]]:
        """What was selected for a ``request``, as paths."""
        return {self.path(request, node) for node in self.rows(request)}


def burst(batch: int = 8, depth: int = 3) -> Scenario:
    """Every one of ``batch`` slots taken, everybody confident down to ``depth``, and one row more than there are roots."""
    return _scenario(batch, depth, 0.9, rows=batch + 1)


def one_confident_many_doubtful(batch: int = 8, depth: int = 3) -> Scenario:
    """Request 0 of ``batch`` is sure of its draft of ``depth`` layers, the others are not; two rows a request."""
    scenario, confident = (
        _scenario(batch, depth, 0.2, rows=2 * batch),
        depth + 1,
    )  # the tokens that request 0 comes to first
    shares = torch.full((confident + batch + 2,), 0.2, dtype=torch.float32)
    shares[:confident] = 0.98
    roots = torch.tensor([0, *range(confident, confident + batch - 1)])
    return replace(scenario, root_tokens=roots, log_probs=_candidates(shares, depth))


def all_equal(batch: int = 8, depth: int = 3) -> Scenario:
    """The same request in ``batch`` slots, ``depth`` layers of equal candidates, and too few rows: the order of ties decides alone."""
    scenario = _scenario(batch, depth, 0.5, rows=2 * batch + 1)
    return replace(
        scenario,
        root_tokens=torch.zeros(batch, dtype=torch.int64),
        log_probs=torch.full_like(scenario.log_probs, -0.5),
    )


def nan_storm(batch: int = 8, depth: int = 3) -> Scenario:
    """A drafter gone wrong, ``batch`` requests, ``depth`` layers: two of three scores are NaN, infinite or above 0."""
    scenario = _scenario(batch, depth, 0.6, rows=4 * batch)
    places = torch.arange(scenario.log_probs.numel()).view_as(scenario.log_probs)
    storm = torch.tensor(
        [torch.nan, -0.5, torch.inf, -0.1, 0.01, -torch.inf, torch.nan], dtype=torch.float32
    )
    return replace(
        scenario, log_probs=torch.where(places % 3 == 0, scenario.log_probs, storm[places % 7])
    )


def _scenario(batch: int, depth: int, share: float, rows: int) -> Scenario:
    batch = checks.integer("batch", batch, 1)
    depth = checks.integer("depth", depth, 0)
    vocab = max(2 * batch, 4)
    spread = share - 0.01 * torch.arange(vocab, dtype=torch.float32) / vocab
    whole = torch.ones(batch, dtype=torch.bool)
    return Scenario(
        torch.arange(batch), whole, torch.full((batch,), 64), _candidates(spread, depth), rows
    )


def _candidates(share: Tensor, depth: int) -> Tensor:
    """Log-probabilities [D, V, 3]: the likeliest candidate's share [V], then a half and a quarter of what is left."""
    rest = 1.0 - share
    return torch.stack([share, rest / 2, rest / 4], dim=1).log().expand(depth, -1, -1)
