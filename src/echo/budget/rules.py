"""Rules: which rows the budget buys. Three small functions each: frontier, buy, deal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo.budget.dealing import select_cheapest
from echo.gating.calibration import Calibration
from echo.gating.statistics import on_device
from echo.kernels.codes import BINS_PER_NAT, ONE, TABLE_BINS, UNSELECTABLE
from echo.tree.supertree import DEAD_SCORE, Layer, SuperTree, cost_bits


class Rule(Protocol):
    """Which nodes are drafted on, which rows are bought on the way, and who gets the rest."""

    @property
    def beam(self) -> int:
        """Most nodes of a layer that are drafted on."""

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The nodes of a scored ``layer`` to draft on: index int64 [B, W] rising along W, and which of them count, bool [B, W]."""

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Rows bought after a layer is scored.

        Args:
            layer: the scored layer.
            passed: bool [B], requests that draft and passed the gate.
            limits: int64 [B], rows that each request may still get.
            num_remaining: int64 [], rows that the batch may still get.

        Returns:
            bool [B, M], children of bought nodes only; or None: this rule buys nothing while drafting.
        """

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """The rest, at the end: bool [B, T] over ``tree.forest``, disjoint from what is bought, closed under parents with it.

        ``limits`` and ``num_remaining`` as in :meth:`buy`; ``num_verify_tokens`` is the step's row count, a bound of ``num_remaining`` known to the host.
        """

    def default_budget(self, batch: int) -> int | None:
        """Rows that this rule alone asks for ``batch`` requests; None: it takes whatever budget it is given."""

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """f, the probability that the whole path to each node of ``tree`` is accepted: float32 [B, T]; 0 at unselectable nodes."""


@dataclass(frozen=True)
class GlobalRank:
    """One ranking over the whole batch by the probability that a path is accepted: optimal for a given number of rows.

    The K nodes of greatest f(v) = P(path to v accepted) maximise the expected accepted tokens over all choices of K
    rows, and are closed under parents, because f never rises from parent to child. TETRIS and AdaServe's last stage rank so.

    Args:
        beam: nodes of each layer that are drafted on, the best by path probability.
        reliability: turns the draft's probability into a calibrated one, f(v) = min(m_d(S(v)), f(parent)); without it f is
            the draft's own path probability.
        max_verify_tokens_per_req: rows of one request, root included; None: as many as its limit allows.

    Raises:
        EchoError: an argument out of range.
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
        """The ``beam`` best nodes of the layer."""
        return top_k(layer.score, self.beam)

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Nothing: all rows are dealt at the end."""
        return None

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """The ``num_remaining`` nodes of greatest f, at most ``limits`` and ``max_verify_tokens_per_req`` of a request."""
        cap = (
            limits
            if self.max_verify_tokens_per_req is None
            else torch.minimum(limits, self.max_verify_tokens_per_req - tree.num_committed)
        )
        return select_cheapest(
            tree, self.weighted_cost(tree), cap, num_remaining, num_verify_tokens
        )

    def default_budget(self, batch: int) -> int | None:
        """``batch * max_verify_tokens_per_req`` where there is a cap of its own."""
        return (
            None
            if self.max_verify_tokens_per_req is None
            else batch * self.max_verify_tokens_per_req
        )

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """f of every node: float32 [B, T]."""
        if self.reliability is None:
            return tree.score.exp()
        return (ONE - self.cost(tree).clamp(max=ONE)).float() / ONE

    def cost(self, tree: SuperTree) -> Tensor:
        """int32 [B, T] of ``tree``, rising as f falls: the bits of -S, or 2^24 - f in 24-bit fixed point."""
        table = self.cost_table(tree.status.device)
        if kernels.use_triton(tree.status):
            from echo.kernels import select

            parent = None if table is None else tree.column("parent")
            return select.path_cost(tree.score, parent, table, tree.sizes)
        if table is None:
            return cost_bits(tree.score)
        score, sizes, deepest = tree.score, tree.sizes, len(table) - 1
        bins = (score * -BINS_PER_NAT).clamp_(max=TABLE_BINS - 1).int()
        begins = [
            bins.new_full((n,), min(layer.depth, deepest) * TABLE_BINS)
            for n, layer in zip(sizes, tree.layers, strict=True)
        ]
        own = (
            table.flatten()
            .index_select(0, bins.add_(torch.cat(begins)).flatten())
            .view(score.shape)
        )
        costs: list[Tensor] = []
        for layer, mine in zip(tree.layers, torch.split(own, sizes, dim=1), strict=True):
            costs.append(torch.maximum(mine, costs[-1].gather(1, layer.parent)) if costs else mine)
        return torch.where(score > DEAD_SCORE, torch.cat(costs, dim=1), UNSELECTABLE)

    def weighted_cost(self, tree: SuperTree) -> Tensor:
        """int32 [B, T] of ``tree``, rising as weight times f falls: the order in which rows are dealt."""
        if tree.request_weights is None:
            return self.cost(tree)
        if self.reliability is None:
            return cost_bits(tree.score + tree.request_weights.log()[:, None])
        cost = self.cost(tree)
        worth = (ONE - cost).clamp(min=0).long() * (tree.request_weights * ONE).long()[:, None]
        return torch.where(cost < UNSELECTABLE, ONE - worth // ONE, UNSELECTABLE).int()

    def cost_table(self, device: torch.device) -> Tensor | None:
        """Costs by depth and bin of -S, int32 [depths + 1, 512], copied to a ``device`` once; None where f is the draft's own."""
        return None if self.reliability is None else on_device(self._tables, device, self._table)

    def _table(self) -> NDArray[np.int32]:
        assert self.reliability is not None
        return ONE - self.reliability.reliability_table()


def PerRequest(  # noqa: N802
    max_verify_tokens_per_req: int, beam: int, reliability: Calibration | None = None
) -> GlobalRank:
    """The ``max_verify_tokens_per_req`` best rows of each request, its root included: EAGLE-2/3's rerank, and DDD's.

    It is the global ranking with a cap for each request and a budget of ``max_verify_tokens_per_req`` rows a request, so that nobody competes.

    Args:
        max_verify_tokens_per_req: rows of a request, root included.
        beam: EAGLE's top-k: nodes of each layer that are drafted on.
        reliability: as in :class:`GlobalRank`.

    Raises:
        EchoError: a number below 1.
    """
    return GlobalRank(
        beam,
        reliability,
        max_verify_tokens_per_req=checks.integer(
            "max_verify_tokens_per_req", max_verify_tokens_per_req, 1
        ),
    )


@dataclass(frozen=True)
class TwoLevel:
    """ECHO's rule: depth first, a layer at a time to whoever passes the gate; what is left then widens the trees.

    Priority 1 (buy): those that pass buy their best ``beam`` nodes, in order of confidence, while rows remain; the last
    buyer may get a part. Priority 2 (deal): one ranking over all scored, unbought nodes, ``max_extra_tokens`` more rows a request.
    Unlike the paper's pseudo-code it buys after a layer is scored and never exceeds the budget.

    Args:
        beam: rows that a request buys of a layer, and nodes that it drafts on.
        max_extra_tokens: rows more that a request may get at the end.
        reliability: as in :class:`GlobalRank`, for the end only.

    Raises:
        EchoError: an argument out of range.
    """

    beam: int
    max_extra_tokens: int
    reliability: Calibration | None = None
    ranking: GlobalRank = field(init=False, repr=False, compare=False)
    """The ranking by which what is left is selected at the end."""

    def __post_init__(self) -> None:
        checks.integer_field(self, "beam", 1)
        checks.integer_field(self, "max_extra_tokens", 0)
        object.__setattr__(self, "ranking", GlobalRank(self.beam, self.reliability))

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The nodes that were bought."""
        return top_k(torch.where(layer.committed, layer.score, DEAD_SCORE), self.beam)

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        """Each passing request's best ``beam`` nodes, in order of confidence, while rows remain."""
        selectable = (layer.score > DEAD_SCORE) & passed[:, None]
        wanted = torch.minimum(selectable.sum(dim=1).clamp(max=self.beam), limits)
        requests = torch.arange(len(passed), device=passed.device)
        worth = (
            layer.log_confidence
            if layer.request_weights is None
            else layer.log_confidence + layer.request_weights.log()
        )
        key = (cost_bits(worth).long() << 31) + requests
        turn = key.argsort()
        queue = wanted.gather(0, turn)
        before = torch.empty_like(wanted).scatter_(0, turn, queue.cumsum(0) - queue)
        granted = torch.minimum(wanted, (num_remaining - before).clamp(min=0))
        return selectable & (
            ranks(order(torch.where(selectable, layer.score, DEAD_SCORE))) < granted[:, None]
        )

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        """The best unbought nodes of the batch, at most ``max_extra_tokens`` of a request."""
        return select_cheapest(
            tree,
            self.ranking.weighted_cost(tree),
            limits.clamp(max=self.max_extra_tokens),
            num_remaining,
            num_verify_tokens,
        )

    def default_budget(self, batch: int) -> int | None:
        """None: it takes whatever budget it is given."""
        return None

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        """f of every node: float32 [B, T]."""
        return self.ranking.acceptance_probability(tree)


def order(score: Tensor) -> Tensor:
    """int64 [B, M] keys of a layer's candidates: score descending, then candidate."""
    return torch.add(
        torch.arange(score.shape[1], device=score.device), cost_bits(score), alpha=1 << 31
    )


def ranks(key: Tensor) -> Tensor:
    """int64 [B, M]: each key's place in its row's ascending order (keys equal only where they do not matter)."""
    turn = key.argsort(dim=1, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(turn)
    return torch.empty_like(turn).scatter_(1, turn, places)


def top_k(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A layer's ``count`` best candidates (all where it has fewer): index int64 [B, W] rising, and which are selectable, bool [B, W]."""
    index = (
        order(score)
        .topk(min(count, score.shape[1]), dim=1, largest=False, sorted=False)
        .indices.sort(dim=1)
        .values
    )
    return index, score.gather(1, index) > DEAD_SCORE
