"""How deep to draft and how many rows to launch, decided on the host before a step: what brings the most tokens a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from echo import checks
from echo.budget.history import History
from echo.cost import CostModel
from echo.errors import EchoError

CURVE, HEAD = 256, 4
"""Numbers in a rank's curve at most, 1 kB, and before its F."""


@dataclass(frozen=True)
class Forecast:
    """The two host decisions of a step, made before it.

    Attributes:
        depth: layers to draft; 0: do not speculate in this step.
        rows: rows of the target's forward pass.
    """

    depth: int
    rows: int


@dataclass(frozen=True)
class Goodput:
    """(B + F_d(K)) / (T(K) + draft(d)), maximised over depths d and rows K; d = 0 where nothing beats plain decoding by ``margin``.

    The ratio is this step's. The long-run price (F - price * seconds, price being the tokens per second so far) was tried by
    replay in all cells of the shipped trace, and left out: its mean throughput was 0.3% lower.

    Args:
        cost: seconds by rows.
        width: nodes of a layer that a request drafts on.
        max_depth, max_tree_rows, probe, margin: see :class:`~echo.ElasticBudgetScheduler`.
    """

    cost: CostModel
    width: int
    max_depth: int
    max_tree_rows: int
    probe: int
    margin: float

    def forecast(self, history: History, slots: Tensor, base_rows: int) -> Forecast:
        """See :meth:`ElasticBudgetScheduler.forecast`."""
        batch, seen = len(slots), history.foresee(slots)
        least = base_rows + batch
        if seen is None:
            depth, rows = self._unknown(least, batch)
        else:
            depth, rows = self._best(*seen, batch, least, batch, history.tick, int(history.unread))
        return Forecast(depth, rows - base_rows)

    def curve(self, history: History, slots: Tensor, base_rows: int) -> NDArray[np.float32]:
        """See :meth:`ElasticBudgetScheduler.curve`: requests, prefill rows, ticks, unread tokens, then F by depth and row count."""
        batch, seen, grid = len(slots), history.foresee(slots), self._grid()
        if seen is None:
            brings = np.full((self.max_depth, len(grid)), np.nan if batch else 0.0)
        else:
            room = grid - batch - base_rows
            brings = np.stack([np.interp(room, [0.0, *rows], [0.0, *accepted]) for rows, accepted in zip(*seen, strict=True)])
        head = [batch, base_rows, history.tick % self.probe, int(history.unread)]
        return np.concatenate([head, brings.ravel()]).astype(np.float32)

    def agree(self, curves: NDArray[np.float32], rank: int) -> Forecast:
        """See :meth:`ElasticBudgetScheduler.agree`."""
        grid = self._grid()
        if curves.ndim != 2 or curves.shape[1] != HEAD + self.max_depth * len(grid):
            raise EchoError(f"curves: expected float32 [ranks, {HEAD + self.max_depth * len(grid)}], got {list(curves.shape)}")
        checks.integer("rank", rank, 0, len(curves) - 1)
        batch, base, tick, unread = curves[:, :HEAD].astype(np.int64).T
        brings = curves[:, HEAD:].astype(np.float64).sum(axis=0).reshape(self.max_depth, len(grid))
        least, widest = int((batch + base).max()), int(batch.max())
        if np.isnan(brings).any():
            depth, rows = self._unknown(least, widest)
        else:
            drafted = np.broadcast_to(np.maximum(grid - least, 0.0), brings.shape)
            depth, rows = self._best(drafted, brings, int(batch.sum()), least, widest, int(tick.max()), int(unread.max()))
        return Forecast(depth, rows - int(base[rank]))

    def _best(
        self, drafted: NDArray[np.float64], accepted: NDArray[np.float64], tokens: int, least: int, widest: int, tick: int, unread: int
    ) -> tuple[int, int]:
        """Depth and rows of greatest goodput; (0, least) where nothing beats plain decoding.

        Args:
            drafted, accepted: float64 [depth, n], drafted rows of a step and what they bring.
            tokens: requests, each of which emits one token more.
            least: rows without any drafted one.
            widest: requests of the rank that has the most.
            tick: of the history; says whether it is time for a probe.
            unread: tokens that the drafter has to read up on before it can draft.
        """
        depths, probe = np.arange(1, self.max_depth + 1), tick % self.probe == 0
        step = self.cost(least + np.ceil(drafted), requests=widest)
        seconds = step + self.cost.draft(depths, widest, self.width)[:, None] + self.cost.catch_up(unread)
        rate = np.where(drafted >= 1, (tokens + accepted) / seconds, 0.0)
        if rate.max() > (1 + self.margin) * tokens / self.cost(least, requests=widest):
            if probe:  # a look at the deepest layers
                rate[:-1] = 0.0
        elif not probe or not tokens:
            return 0, least
        depth, place = np.unravel_index(int(rate.argmax()), rate.shape)
        rows = least + max(1, int(np.ceil(drafted[depth, place])))
        free, most = self.cost.fill(rows), min(2 * rows, least + widest * (self.max_tree_rows - 1))
        if free > most:  # more than can be of use; a tier is launched whole
            free = self.cost.tier(rows) if self.cost.tiers else most
        return int(depth) + 1, max(rows, free)

    def _unknown(self, least: int, widest: int) -> tuple[int, int]:
        """As long as too little was seen: the deepest tree, at the knee or with a row for every fourth request where that is more."""
        rows = self.cost.tier(max(least + -(-widest // 4), self.cost.at(max(widest, 1)).knee.k_max))
        return (self.max_depth, rows) if widest else (0, least)

    def _grid(self) -> NDArray[Any]:
        """Row counts at which ranks compare: the tiers, or evenly in the logarithm; as many as fit into a curve."""
        count = max(2, (CURVE - HEAD) // max(1, self.max_depth))
        points = np.asarray(self.cost.tiers or np.geomspace(1, max(2, self.cost.rows[-1]), count).round().astype(int))
        return np.unique(points[np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int)])
