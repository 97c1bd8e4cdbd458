"""Rules: which tokens the target verifies. Three small functions each: frontier, commit, select.

B requests; M candidates in a layer; W nodes of its frontier; T nodes of a request's tree.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo.gating.calibration import Calibration
from echo.gating.statistics import on_device
from echo.kernels.codes import BINS_PER_NAT, ONE, TABLE_BINS, UNSELECTABLE
from echo.tree.supertree import DEAD_SCORE, Layer, SuperTree, cost_bits

NO_NODE = torch.iinfo(torch.int64).max
"""Greater than every key of a node."""


class Rule(Protocol):
    """A choice of nodes to expand, to commit while drafting, and to select at the end."""

    @property
    def beam(self) -> int:
        """Maximum number of nodes of a layer that are expanded."""

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Choose nodes of ``layer`` to expand: int64 [B, W], rising; and validity, bool [B, W]."""

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Commit nodes of a layer that was just scored.

        Args:
            layer: the scored layer.
            passed: bool [B], requests that drafted it and passed the gate.
            limits: int64 [B], verify tokens that each request may still get.
            num_remaining: int64 [], verify tokens that the batch may still get.

        Returns:
            bool [B, M], only children of committed nodes; None: commits nothing while drafting.
        """

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """Select the rest at the end: bool [B, T], closed under parents with the committed nodes.

        ``tree`` is the drafted super-tree; ``limits`` and ``num_remaining`` as in :meth:`commit`;
        ``num_verify_tokens`` is a host int, the upper bound of ``num_remaining``.
        """

    def default_budget(self, batch: int) -> int | None:
        """Return the verify tokens that ``batch`` requests ask for; None: a budget is required."""

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """Return f, the probability that the whole path to each node of ``tree`` is accepted.

        float32 [B, T]; 0 at unselectable nodes.
        """


def narrowed(rule: Rule, beam: int) -> Rule:
    """``rule`` with that beam, or itself if it has no field of that name."""
    given: Any = rule
    named = {f.name for f in fields(given) if f.init} if is_dataclass(given) else set[str]()
    found: Rule = replace(given, beam=beam) if "beam" in named and beam != rule.beam else rule
    return found


@dataclass(frozen=True)
class GlobalRank:
    """One ranking over the batch by acceptance probability: optimal for its budget.

    The K nodes of greatest f(v) = P(path to v accepted) maximise the expected accepted tokens over
    all choices of K nodes, and are closed under parents, because f never rises from parent to
    child. TETRIS and AdaServe's last stage rank this way.

    Args:
        beam: maximum nodes of a layer that are expanded, the best by path probability.
        reliability: calibrates the draft's probability, f(v) = min(m_d(S(v)), f(parent)).
            Defaults to the draft's own path probability.
        max_verify_tokens_per_req: per request, root included. Defaults to the request's limit.

    Raises:
        EchoError: an argument out of range.

    Example:
        >>> rule = GlobalRank(beam=2, max_verify_tokens_per_req=6)
        >>> rule.default_budget(batch=3)
        18
        >>> from echo.tree import SuperTree
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [1, 2], [3]]])
        >>> rule.cost(tree).argsort().tolist(), tree.forest.token.tolist()
        ([[0, 1, 3, 2]], [[7, 1, 3, 2]])
        >>> torch.equal(rule.weighted_cost(tree), rule.cost(tree)), rule.cost_table("cpu")
        (True, None)
    """

    beam: int
    reliability: Calibration | None = None
    max_verify_tokens_per_req: int | None = None
    _tables: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checks.integer_field(self, "beam", 1)
        if self.max_verify_tokens_per_req is not None:
            checks.integer_field(self, "max_verify_tokens_per_req", 1)

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the ``beam`` best nodes of the layer."""
        return top_k(layer.score, self.beam)

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Return None: everything is selected at the end."""
        return None

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """Select the nodes of greatest f within each request's limit."""
        if self.max_verify_tokens_per_req is not None:
            limits = torch.minimum(limits, self.max_verify_tokens_per_req - tree.num_committed)
        cost = self.weighted_cost(tree)
        return select_cheapest(tree, cost, limits, num_remaining, num_verify_tokens)

    def default_budget(self, batch: int) -> int | None:
        """Return ``batch * max_verify_tokens_per_req`` if that is given."""
        most = self.max_verify_tokens_per_req
        return None if most is None else batch * most

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """Return f of every node: float32 [B, T]."""
        if self.reliability is None:
            return tree.score.exp()
        return (ONE - self.cost(tree).clamp(max=ONE)).float() / ONE

    def cost(self, tree: SuperTree) -> Tensor:
        """int32 [B, T] of ``tree``, rising as f falls: the bits of -S, or 2^24 - f * 2^24."""
        table = self.cost_table(tree.status.device)
        if kernels.use_triton(tree.status):
            from echo.kernels import select

            parent = None if table is None else tree.column("parent")
            return select.path_cost(tree.score, parent, table, tree.sizes)
        score = tree.score
        sizes = tree.sizes
        if table is None:
            return cost_bits(score)
        bins = (score * -BINS_PER_NAT).clamp_(max=TABLE_BINS - 1).int()
        starts = [min(depth, len(table) - 1) * TABLE_BINS for depth in range(len(sizes))]
        columns = [bins.new_full((n,), start) for n, start in zip(sizes, starts, strict=True)]
        index = bins.add_(torch.cat(columns)).flatten()
        own = table.flatten().index_select(0, index).view(score.shape)
        costs: list[Tensor] = []
        for layer, mine in zip(tree.layers, torch.split(own, sizes, dim=1), strict=True):
            costs.append(torch.maximum(mine, costs[-1].gather(1, layer.parent)) if costs else mine)
        return torch.where(score > DEAD_SCORE, torch.cat(costs, dim=1), UNSELECTABLE)

    def weighted_cost(self, tree: SuperTree) -> Tensor:
        """int32 [B, T] of ``tree``, rising as request weight times f falls: the ranking."""
        weights = tree.request_weights
        if weights is None:
            return self.cost(tree)
        if self.reliability is None:
            return cost_bits(tree.score + weights.log()[:, None])
        cost = self.cost(tree)
        value = (ONE - cost).clamp(min=0).long() * (weights * ONE).long()[:, None]
        return torch.where(cost < UNSELECTABLE, ONE - value // ONE, UNSELECTABLE).int()

    def cost_table(self, device: torch.device) -> Tensor | None:
        """Costs by depth and bin of -S, int32 [depths + 1, 512], copied to each ``device`` once.

        None without ``reliability``.
        """
        return None if self.reliability is None else on_device(self._tables, device, self._table)

    def _table(self) -> NDArray[np.int32]:
        assert self.reliability is not None
        return ONE - self.reliability.reliability_table()


def PerRequest(  # noqa: N802
    max_verify_tokens_per_req: int, beam: int, reliability: Calibration | None = None
) -> GlobalRank:
    """The best ``max_verify_tokens_per_req`` tokens of each request: EAGLE-2/3's rerank, and DDD's.

    A :class:`GlobalRank` with a budget that suffices for all requests, so that they do not compete.

    Args:
        max_verify_tokens_per_req: per request, root included.
        beam: nodes of a layer that are expanded, EAGLE's top-k.
        reliability: as in :class:`GlobalRank`.

    Raises:
        EchoError: a number below 1.

    Example:
        >>> PerRequest(6, beam=2).default_budget(batch=3)
        18
    """
    most = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    return GlobalRank(beam, reliability, max_verify_tokens_per_req=most)


@dataclass(frozen=True)
class TwoLevel:
    """ECHO's rule: first deepen the trees that pass the gate, then widen trees with what remains.

    Priority 1 (:meth:`commit`): requests that pass the gate commit their best ``beam`` nodes, most
    confident request first, while the budget lasts; the last may commit only some. Priority 2
    (:meth:`select`): one ranking over all uncommitted nodes, up to ``max_extra_tokens`` per
    request. Unlike the paper's pseudo-code, it commits after scoring and never exceeds the budget.

    Args:
        beam: maximum nodes of a layer that a request commits and expands.
        max_extra_tokens: maximum tokens that a request gets at the end.
        reliability: as in :class:`GlobalRank`, for priority 2 only.

    Raises:
        EchoError: an argument out of range.

    Example:
        >>> TwoLevel(beam=4, max_extra_tokens=8).default_budget(batch=3) is None
        True
    """

    beam: int
    max_extra_tokens: int
    reliability: Calibration | None = None
    ranking: GlobalRank = field(init=False, repr=False, compare=False)
    """The ranking of priority 2."""

    def __post_init__(self) -> None:
        checks.integer_field(self, "beam", 1)
        checks.integer_field(self, "max_extra_tokens", 0)
        object.__setattr__(self, "ranking", GlobalRank(self.beam, self.reliability))

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the committed nodes."""
        return top_k(torch.where(layer.committed, layer.score, DEAD_SCORE), self.beam)

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Commit each passing request's best ``beam`` nodes, most confident request first."""
        selectable = (layer.score > DEAD_SCORE) & passed[:, None]
        wanted = torch.minimum(selectable.sum(dim=1).clamp(max=self.beam), limits)
        confidence = layer.log_confidence
        if layer.request_weights is not None:
            confidence = confidence + layer.request_weights.log()
        requests = torch.arange(len(passed), device=passed.device)
        turn = ((cost_bits(confidence).long() << 31) + requests).argsort()
        queue = wanted.gather(0, turn)
        earlier = torch.empty_like(wanted).scatter_(0, turn, queue.cumsum(0) - queue)
        granted = torch.minimum(wanted, (num_remaining - earlier).clamp(min=0))
        rank = ranks(order(torch.where(selectable, layer.score, DEAD_SCORE)))
        return selectable & (rank < granted[:, None])

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """Select the best uncommitted nodes, at most ``max_extra_tokens`` per request."""
        cost = self.ranking.weighted_cost(tree)
        limits = limits.clamp(max=self.max_extra_tokens)
        return select_cheapest(tree, cost, limits, num_remaining, num_verify_tokens)

    def default_budget(self, batch: int) -> int | None:
        """Return None: the rule needs a budget."""
        return None

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """Return f of every node: float32 [B, T]."""
        return self.ranking.acceptance_probability(tree)


def order(score: Tensor) -> Tensor:
    """Keys int64 [B, M] of a layer's candidates: score descending, then candidate."""
    candidate = torch.arange(score.shape[1], device=score.device)
    return torch.add(candidate, cost_bits(score), alpha=1 << 31)


def ranks(key: Tensor) -> Tensor:
    """Rank of each ``key`` [B, M] in its request's ascending order, int64 [B, M]; stable."""
    turn = key.argsort(dim=1, stable=True)
    rank = torch.arange(key.shape[1], device=key.device).expand_as(turn)
    return torch.empty_like(turn).scatter_(1, turn, rank)


def top_k(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a layer's ``count`` best candidates, or all if there are fewer.

    Index int64 [B, W], rising along W, and whether each is selectable, bool [B, W].
    """
    best = order(score).topk(min(count, score.shape[1]), dim=1, largest=False, sorted=False)
    index = best.indices.sort(dim=1).values
    return index, score.gather(1, index) > DEAD_SCORE


def select_cheapest(
    tree: SuperTree, cost: Tensor, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
) -> Tensor:
    """Select the cheapest uncommitted nodes within each request's limit and the batch's.

    Cost never falls from parent to child and ties go to the shallower node, so every prefix of the
    ranking is closed under parents, even if a request's part is cut at its limit. The forest is
    never sorted: a cutoff drops nodes that are surely too costly, then the smallest keys are
    selected within each request, and then among those. A key orders by cost, depth, request and
    candidate; its remainder is the position in the flattened forest.

    Args:
        tree: the scored forest.
        cost: int32 [B, T].
        limits: int64 [B].
        num_remaining: int64 [].
        num_verify_tokens: a host int, the upper bound of ``num_remaining``.

    Returns:
        bool [B, T].
    """
    batch, nodes = cost.shape
    most = min(nodes, num_verify_tokens, tree.max_verify_tokens_per_req)
    if kernels.use_triton(cost):
        from echo.kernels import select

        bounds = limits, num_remaining, num_verify_tokens, most
        return select.select_cheapest(cost, tree.committed, *bounds, tree.sizes)
    positions = batch * nodes + 1  # the last one belongs to no node
    unused = torch.arange(num_verify_tokens, device=cost.device) < num_verify_tokens - num_remaining
    cost = cost.masked_fill(tree.committed, UNSELECTABLE)
    cutoff = _cutoff(cost, limits, unused).long() * ((tree.depth + 1) * positions)
    key = torch.minimum(_keys(tree, cost, positions), cutoff)
    # whichever is quicker
    ranked = key.topk(most, dim=1, largest=False) if 2 * most < nodes else key.sort(dim=1)
    own = _within(ranked.values[:, :most], limits, NO_NODE)
    keys = _smallest(own.flatten(), unused, NO_NODE)
    position = torch.where(keys < cutoff, keys % positions, positions - 1)
    # bytes, because inductor fills bools one by one
    chosen = torch.zeros(positions, dtype=torch.uint8, device=cost.device)
    return chosen.index_fill_(0, position, 1)[:-1].view(batch, nodes).bool()


def _keys(tree: SuperTree, cost: Tensor, positions: int) -> Tensor:
    """int64 [B, T]: sort keys of cost, then depth, then position."""
    ends = list(itertools.accumulate(tree.sizes))
    starts = [depth * positions + end for depth, end in enumerate(ends)]
    columns = [
        torch.arange(start - size, start, device=cost.device)
        for start, size in zip(starts, tree.sizes, strict=True)
    ]
    requests = torch.arange(0, tree.batch * ends[-1], ends[-1], device=cost.device)
    key = torch.add(torch.cat(columns), cost, alpha=(tree.depth + 1) * positions)
    return key.add_(requests[:, None])


def _cutoff(cost: Tensor, limits: Tensor, unused: Tensor) -> Tensor:
    """int32 []: exclusive upper bound of the cost of all selected nodes.

    Select among the cheapest node of each of a few groups of every request's nodes, and add one to
    the greatest cost: selecting among fewer nodes never ends at a lower cost than among all.
    """
    batch, nodes = cost.shape
    groups = -(-2 * len(unused) // max(batch, 1))
    if not 0 < 2 * groups <= nodes:
        return torch.full((), UNSELECTABLE, dtype=torch.int32, device=cost.device)
    grouped = cost[:, nodes % groups :].view(batch, nodes // groups, groups)
    some = _within(grouped.amin(dim=1).sort(dim=1).values, limits, UNSELECTABLE)
    greatest = _smallest(some.flatten(), unused, UNSELECTABLE).amax()
    return greatest.clamp(max=UNSELECTABLE - 1) + 1


def _within(ascending: Tensor, limits: Tensor, last: int) -> Tensor:
    """Replace entries after each request's first ``limits`` by ``last``, in place."""
    beyond = torch.arange(ascending.shape[1], device=limits.device) >= limits[:, None]
    return ascending.masked_fill_(beyond, last)


def _smallest(keys: Tensor, unused: Tensor, last: int) -> Tensor:
    """Return as many of the smallest ``keys`` as ``unused`` has False, in any order.

    -1 for each True; ``last`` if the keys run out.
    """
    pads = torch.full(unused.shape, last, dtype=keys.dtype, device=keys.device)
    merged = torch.cat([pads.masked_fill_(unused, -1), keys])
    return merged.topk(len(unused), largest=False, sorted=False).values
