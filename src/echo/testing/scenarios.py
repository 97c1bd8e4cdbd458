"""Steps for testing a policy: made by hand, or drawn by hypothesis (``kit`` extra).

B requests, D drafted layers, a vocabulary of V, k candidates of a node, T nodes of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier, SuperTree

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

VOCAB = 4
CHILDREN = 3
MAX_LIMIT = 12
FAULTS = (float("nan"), float("inf"), float("-inf"), 0.01)
"""Log-probabilities that a drafter should not return, but sometimes does."""


@dataclass(frozen=True)
class Scenario:
    """The input of one step.

    Drafts after a token depend only on the token and its depth, so requests may be permuted,
    removed or batched with others without changing their drafts.

    Attributes:
        root_tokens: int64 [B], below V.
        live: bool [B].
        verify_limits: int64 [B], maximum verify tokens of each request, root included.
        log_probs: float32 [D, V, k]: after token v at depth d, log-probabilities of its candidates,
            the tokens v + 1, v + 2, ... modulo V.
        num_verify_tokens: of the step. Defaults to the scheduler's budget.
        request_weights: float32 [B], value of each request's tokens. Defaults to 1.

    Raises:
        EchoError: a shape, dtype or token out of range.

    Example:
        >>> import echo
        >>> from echo.testing import one_confident_many_doubtful
        >>> step = one_confident_many_doubtful(batch=4)
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=8, max_depth=3)
        >>> plan = step.plan(scheduler)
        >>> [len(plan.nodes(request)) for request in range(4)]
        [4, 2, 1, 1]
        >>> sorted(plan.paths(1)), plan.path(0, plan.nodes(0)[3])
        ([(), (6,)], (1, 2, 3))
        >>> step.take([0, 2]).grow(scheduler).depth
        3
        >>> step.draft(scheduler.begin(step.root_tokens, num_verify_tokens=8).frontier)[0].shape
        torch.Size([4, 1, 3])
    """

    root_tokens: Tensor
    live: Tensor
    verify_limits: Tensor
    log_probs: Tensor
    num_verify_tokens: int | None = None
    request_weights: Tensor | None = None

    def __post_init__(self) -> None:
        roots = checks.tensor("root_tokens", self.root_tokens, ["B"], torch.int64)
        checks.tensor("live", self.live, [self.batch], torch.bool)
        checks.tensor("verify_limits", self.verify_limits, [self.batch], torch.int64)
        checks.tensor("log_probs", self.log_probs, ["D", "V", "k"], checks.FLOATS)
        vocab, k = self.log_probs.shape[1:]
        if k > vocab or not bool(((roots >= 0) & (roots < vocab)).all()):
            want = f"expected tokens and k of at most V = {vocab}"
            raise EchoError(f"root_tokens, log_probs: {want}, got k = {k}")

    @property
    def batch(self) -> int:
        """B, empty lanes included."""
        return self.root_tokens.shape[0]

    @property
    def live_requests(self) -> list[int]:
        """Indices of the live requests."""
        return [int(b) for b in self.live.nonzero()]

    def draft(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """Return tokens int64 and log-probabilities [B, W, k] after each node of ``frontier``."""
        vocab, k = self.log_probs.shape[1:]
        tokens = (frontier.token[..., None] + 1 + torch.arange(k)) % vocab
        return tokens, self.log_probs[frontier.depth][frontier.token]

    def take(self, requests: Sequence[int]) -> Scenario:
        """Return the step with only these ``requests``, in this order."""
        at = torch.tensor(requests, dtype=torch.int64)
        columns = self.root_tokens[at], self.live[at], self.verify_limits[at]
        weights = None if self.request_weights is None else self.request_weights[at]
        return Scenario(*columns, self.log_probs, self.num_verify_tokens, weights)

    def grow(self, scheduler: ElasticBudgetScheduler) -> SuperTree:
        """Grow the super-tree with ``scheduler``, all D layers of it."""
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
        """Plan the step with ``scheduler``."""
        tree = self.grow(scheduler)
        return Plan(self, tree, scheduler.select(tree), scheduler.pack(tree))


@dataclass(frozen=True)
class Plan:
    """A planned step (example: :class:`Scenario`).

    Attributes:
        scenario, tree, packed: the values of the step.
        selected: bool [B, T], before packing cuts what exceeds the budget.
    """

    scenario: Scenario
    tree: SuperTree
    selected: Tensor
    packed: PackedTree

    def nodes(self, request: int) -> list[int]:
        """Indices into T of a ``request``'s selected nodes, in the order of their rows."""
        return [int(node) for node in self.selected[request].nonzero()[:, 0]]

    def path(self, request: int, node: int) -> tuple[int, ...]:
        """Tokens from the root's child to a ``node`` of a ``request``; the same in any batch."""
        forest = self.tree.forest
        tokens = list[int]()
        while int(forest.depth[node]):
            tokens.append(int(forest.token[request, node]))
            node = int(forest.parent[request, node])
        return tuple(reversed(tokens))

    def paths(self, request: int) -> set[tuple[int, ...]]:
        """A ``request``'s selected nodes, as paths."""
        return {self.path(request, node) for node in self.nodes(request)}


def burst(batch: int = 8, depth: int = 3) -> Scenario:
    """``batch`` requests confident down to ``depth``; one verify token more than roots.

    Raises:
        EchoError: an argument out of range.

    Example:
        >>> tuple(burst(4).log_probs.shape)
        (3, 8, 3)
        >>> [step(4).num_verify_tokens for step in (burst, all_equal, nan_storm)]
        [5, 9, 16]
    """
    return _scenario(batch, depth, 0.9, num_verify_tokens=batch + 1)


def one_confident_many_doubtful(batch: int = 8, depth: int = 3) -> Scenario:
    """As :func:`burst`, but only request 0 is confident; two verify tokens for each request."""
    scenario = _scenario(batch, depth, 0.2, 2 * batch)
    confident = depth + 1
    p = torch.full((confident + batch + 2,), 0.2, dtype=torch.float32)
    p[:confident] = 0.98  # the tokens that request 0 reaches first
    roots = torch.tensor([0, *range(confident, confident + batch - 1)])
    return replace(scenario, root_tokens=roots, log_probs=_candidates(p, depth))


def all_equal(batch: int = 8, depth: int = 3) -> Scenario:
    """As :func:`burst`, but all requests and candidates are equal: ties decide."""
    scenario = _scenario(batch, depth, 0.5, 2 * batch + 1)
    roots = torch.zeros(batch, dtype=torch.int64)
    equal = torch.full_like(scenario.log_probs, -0.5)
    return replace(scenario, root_tokens=roots, log_probs=equal)


def nan_storm(batch: int = 8, depth: int = 3) -> Scenario:
    """As :func:`burst`, but half of the scores are NaN, infinite or above 0."""
    scenario = _scenario(batch, depth, 0.6, 4 * batch)
    index = torch.arange(scenario.log_probs.numel()).view_as(scenario.log_probs)
    bad = [torch.nan, -0.5, torch.inf, -0.1, 0.01, -torch.inf, torch.nan]
    storm = torch.tensor(bad, dtype=torch.float32)[index % 7]
    return replace(scenario, log_probs=torch.where(index % 3 == 0, scenario.log_probs, storm))


MADE = (all_equal, burst, one_confident_many_doubtful, nan_storm)


def _scenario(batch: int, depth: int, p: float, num_verify_tokens: int) -> Scenario:
    batch = checks.integer("batch", batch, 1)
    depth = checks.integer("depth", depth, 0)
    vocab = max(2 * batch, 4)
    spread = p - 0.01 * torch.arange(vocab, dtype=torch.float32) / vocab
    live = torch.ones(batch, dtype=torch.bool)
    requests = torch.arange(batch), live, torch.full((batch,), 64)
    return Scenario(*requests, _candidates(spread, depth), num_verify_tokens)


def _candidates(p: Tensor, depth: int) -> Tensor:
    """[D, V, 3]: log of the likeliest candidate's p [V], then of 1/2 and 1/4 of the rest."""
    rest = 1.0 - p
    return torch.stack([p, rest / 2, rest / 4], dim=1).log().expand(depth, -1, -1)


def hypothesis() -> Any:
    """Import the package, or raise :class:`EchoError` with how to install it."""
    try:
        import hypothesis
    except ImportError as error:
        how = "pip install 'echo-specdec[kit]'"
        raise EchoError(f"hypothesis: expected it installed ({how}), got none") from error
    return hypothesis


def batches(
    *, max_batch: int = 5, max_depth: int = 4, budget: bool = True
) -> SearchStrategy[Scenario]:
    """Draw steps of any shape: empty lanes, tight limits, scores with ties, NaN and infinities.

    B is at most ``max_batch``, D ``max_depth``. ``budget``: also draw num_verify_tokens, from B up.

    Raises:
        EchoError: an argument out of range, or hypothesis is not installed.
    """
    st = hypothesis().strategies
    max_batch = checks.integer("max_batch", max_batch, 1)
    max_depth = checks.integer("max_depth", max_depth, 0)
    size = max_depth * VOCAB * CHILDREN
    live = st.sampled_from([True, True, False])
    below = st.integers(0, MAX_LIMIT - 1)
    request = st.tuples(st.integers(0, VOCAB - 1), live, below, st.sampled_from([1.0, 0.5, 0.1]))
    fault = st.tuples(st.integers(0, max(size - 1, 0)), st.sampled_from(FAULTS))

    def build(draw: Any) -> Scenario:
        requests = draw(st.lists(request, min_size=1, max_size=max_batch))
        depth = draw(st.integers(min(1, max_depth), max_depth))
        k = draw(st.integers(1, CHILDREN))
        spare = draw(st.integers(0, 12))
        coarse = draw(st.booleans())
        numbers = np.frombuffer(draw(st.binary(min_size=2 * size, max_size=2 * size)), ">u2")
        flat = scores(numbers, coarse=coarse)
        for index, value in draw(st.lists(fault, max_size=8 if size else 0)):
            flat[index] = value
        log_probs = flat.view(max_depth, VOCAB, CHILDREN)[:depth, :, :k]
        columns = (torch.from_numpy(np.array(c)) for c in zip(*requests, strict=True))
        roots, live, below, weight = columns
        count = max(len(requests), int(live.sum()) + spare) if budget else None
        weights = weight.float() if draw(st.booleans()) else None
        return Scenario(roots, live, MAX_LIMIT - below, log_probs, count, weights)

    strategy: SearchStrategy[Scenario] = st.composite(build)()
    return strategy


def scores(numbers: NDArray[Any], *, coarse: bool) -> Tensor:
    """Log-probabilities float32 [n] from 16-bit ``numbers`` [n]; ``coarse`` ones tie often."""
    p = 1.0 - (numbers.astype(np.float64) + 32768) % 65536 / 65536
    return torch.from_numpy(np.log(np.ceil(8 * p) / 8 if coarse else p).astype(np.float32))
