"""How deep to draft and how many rows to launch, decided on the host before a step: what brings the most tokens a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.history import History
from echo.cost import CostModel

CURVE, HEAD = 256, 5
"""Numbers in a rank's curve at most, 1 kB, and before its F."""
THRIFT, PATIENCE = 0.005, 16
"""Share of the time without speculation that the reading for a probe may cost; the wait that makes one due whatever it costs, in probes:
a choice, that no replay was long enough to judge."""
COMMIT = 20
"""Steps over which a drafter's catching up is spread: about what a history remembers. On the measured curve of two CPU cores, where
nothing is won at 256 requests, 1,000 steps came to 0.946 of plain decoding before THRIFT and this, and come to 0.998 since."""
SHY = 1 - 1e-5
"""Rows are sums of float32: what comes out a hair above a whole number, in another order of slots, costs no row more."""
DEPTHS = np.arange(1.0, 65.0)
"""As deep as a scheduler may draft."""


@dataclass(frozen=True)
class Tier:
    """The two host decisions of a step, made before it.

    Attributes:
        depth: layers to draft; 0: do not speculate in this step.
        num_verify_tokens: rows of the target's forward pass.
    """

    depth: int
    num_verify_tokens: int


@dataclass(frozen=True)
class ThroughputOptimal:
    """(B + F_d(K)) / (T(K) + draft(d)), maximised over depths d and rows K; d = 0 where nothing beats plain decoding by ``margin``.

    The ratio is this step's. The long-run price (F - price * seconds, price being the tokens per second so far) was tried by
    replay in all cells of the shipped trace, and left out: its mean throughput was 0.3% lower.

    Args:
        cost: seconds by rows.
        beam: nodes of a layer that a request drafts on.
        max_depth, probe_interval, margin: see :class:`~echo.ElasticBudgetScheduler`.
        max_verify_tokens_per_req: rows that one request can get at most, by the scheduler and by its rule.
    """

    cost: CostModel
    beam: int
    max_depth: int
    max_verify_tokens_per_req: int
    probe_interval: int
    margin: float

    def choose_tier(
        self, history: History, req_indices: NDArray[np.int64], num_other_tokens: int
    ) -> Tier:
        """See :meth:`ElasticBudgetScheduler.choose_tier`."""
        batch, seen = len(req_indices), history.predict(req_indices)
        least = num_other_tokens + batch
        if seen is None:
            depth, rows = self._unknown(least, batch)
        else:
            depth, rows = self._best(
                *seen,
                batch,
                least,
                batch,
                history.num_steps,
                history.num_idle_steps,
                _unread(history, req_indices),
            )
        return Tier(depth, rows - num_other_tokens)

    def tier_curve(
        self, history: History, req_indices: NDArray[np.int64], num_other_tokens: int
    ) -> NDArray[np.float32]:
        """See :meth:`ElasticBudgetScheduler.tier_curve`: requests, prefill rows, steps, idle ones of them, unread tokens; then F by depth."""
        batch, seen, grid = len(req_indices), history.predict(req_indices), self._grid()
        if seen is None:
            brings = np.full((self.max_depth, len(grid)), np.nan if batch else 0.0)
        else:
            room = grid - batch - num_other_tokens
            brings = np.stack(
                [np.interp(room, rows, accepted) for rows, accepted in zip(*seen, strict=True)]
            )
        head = [
            batch,
            num_other_tokens,
            history.num_steps % self.probe_interval,
            history.num_idle_steps,
            _unread(history, req_indices),
        ]
        return np.concatenate([head, brings.ravel()]).astype(np.float32)

    def agree_on_tier(self, curves: NDArray[np.float32], rank: int) -> Tier:
        """See :meth:`ElasticBudgetScheduler.agree_on_tier`."""
        grid = self._grid()
        if curves.ndim != 2 or curves.shape[1] != HEAD + self.max_depth * len(grid):
            raise EchoError(
                f"curves: expected float32 [ranks, {HEAD + self.max_depth * len(grid)}], got {list(curves.shape)}"
            )
        rank = checks.integer("rank", rank, 0, len(curves) - 1)
        batch, base, *counts = curves[:, :HEAD].astype(np.int64).T
        brings = curves[:, HEAD:].astype(np.float64).sum(axis=0).reshape(self.max_depth, len(grid))
        least, widest = int((batch + base).max()), int(batch.max())
        if np.isnan(brings).any():
            depth, rows = self._unknown(least, widest)
        else:
            drafted = np.broadcast_to(np.maximum(grid - least, 0.0), brings.shape)
            depth, rows = self._best(
                drafted,
                brings,
                int(batch.sum()),
                least,
                widest,
                *(int(count.max()) for count in counts),
            )
        return Tier(depth, rows - int(base[rank]))

    def _best(
        self,
        drafted: NDArray[Any],
        accepted: NDArray[Any],
        tokens: int,
        least: int,
        widest: int,
        tick: int,
        idle: int,
        unread: int,
    ) -> tuple[int, int]:
        """Depth and rows of greatest goodput; (0, least) where nothing beats plain decoding.

        Args:
            drafted, accepted: float [depth, n], drafted rows of a step and what they bring; ``drafted[0, 0]`` costs nothing.
            tokens: requests, each of which emits one token more.
            least: rows without any drafted one.
            widest: requests of the rank that has the most.
            tick, idle: of the history; they say whether it is time for a probe.
            unread: tokens that the drafter has to read up on before it can draft.
        """
        if not widest:  # no requests at all
            return 0, least
        most = widest * (
            self.max_verify_tokens_per_req - 1
        )  # more drafts have no place, and of those the likeliest bring at least their share
        drafted, accepted = (
            np.minimum(drafted, most),
            accepted * np.minimum(1.0, most / np.maximum(drafted, 1.0)),
        )
        whole = np.ceil(drafted * SHY)
        step = self.cost(least + whole, num_reqs=widest)
        drafting = self.cost.draft_seconds(DEPTHS[: self.max_depth], widest, self.beam)
        seconds = step + drafting[:, None]
        rate = (tokens + accepted) / seconds
        rate *= drafted >= 1
        best = int(rate.argmax())
        plain, reading, probe = (
            step.item(0),
            self.cost.extend_seconds(unread),
            (idle or tick) % self.probe_interval == 0,
        )
        cheap = reading <= THRIFT * idle * plain or idle % (PATIENCE * self.probe_interval) == 0
        if rate.item(best) > (1 + self.margin) * tokens / plain * (
            1 + reading / (COMMIT * seconds.item(best))
        ):
            if probe:  # a look at the deepest layers
                best = rate.size - rate.shape[1] + int(rate[-1].argmax())
        elif not (probe and cheap and tokens):
            return 0, least
        depth, place = divmod(best, rate.shape[1])
        rows = least + max(1, int(whole[depth, place]))
        free, useful = self.cost.free_tokens(rows), min(2 * rows, least + most)
        if free > useful:  # a tier is launched whole
            free = self.cost.round_up(rows) if self.cost.tiers else useful
        return depth + 1, max(rows, free)

    def _unknown(self, least: int, widest: int) -> tuple[int, int]:
        """As long as too little was seen: the deepest tree, at the knee or with a row for every fourth request where that is more."""
        knee = min(
            self.cost.at(max(widest, 1)).knee.k_max,
            least + widest * (self.max_verify_tokens_per_req - 1),
        )  # more is of no use
        rows = self.cost.round_up(max(least + -(-widest // 4), knee))
        return (self.max_depth, rows) if widest else (0, least)

    def _grid(self) -> NDArray[Any]:
        """Row counts at which ranks compare: the tiers, or evenly in the logarithm; as many as fit into a curve."""
        count = max(2, (CURVE - HEAD) // max(1, self.max_depth))
        points = np.asarray(
            self.cost.tiers
            or np.geomspace(1, max(2, self.cost.num_tokens[-1]), count).round().astype(int)
        )
        return np.unique(
            points[np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int)]
        )


def _unread(history: History, slots: NDArray[np.int64]) -> int:
    """Tokens that the drafter has to read up on before it can draft for ``slots``: none after a step that drafted."""
    return (
        0
        if not history.num_idle_steps
        else int(history.num_unprocessed_tokens.numpy()[slots].sum())
    )
