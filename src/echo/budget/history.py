"""What each request slot remembers of its last steps, and what the host foresees from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import checks
from echo.tree.accepted import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import SuperTree

KEEP = 0.9
"""Weight of the past in the running means: a memory of about ten steps."""
BINS = 64
"""Bins of the probability of acceptance in an outlook."""


@dataclass(frozen=True)
class History:
    """Running means by request slot; a value: every method returns a new one.

    Attributes:
        steps: int32 [slots], steps since the slot's last reset.
        drafted: int32 [slots], those in which something was drafted.
        emitted: float32 [slots], running mean of tokens emitted in a step.
        rows: float32 [slots], running mean of rows verified in a step.
        outlook: float32 [slots, depth, 64], running mean of :attr:`PackedTree.outlook`.
        expected, accepted: float32 [slots], running means of the drafts that were expected to be accepted, and that were.
        tick: steps of the batch so far; a host int.
    """

    steps: Tensor
    drafted: Tensor
    emitted: Tensor
    rows: Tensor
    outlook: Tensor
    expected: Tensor
    accepted: Tensor
    tick: int = 0

    @classmethod
    def empty(cls, slots: int, depth: int, device: torch.device | str = "cpu") -> History:
        """Of ``slots`` slots without a past, for trees of up to ``depth`` layers.

        Raises:
            EchoError: slots below 1 or depth below 0.
        """
        checks.integer("slots", slots, 1)
        checks.integer("depth", depth, 0)
        count, mean = torch.zeros(slots, dtype=torch.int32, device=device), torch.zeros(slots, device=device)
        return cls(count, count, mean, mean, torch.zeros(slots, depth, BINS, device=device), mean, mean)

    def reset(self, slots: Tensor) -> History:
        """Forgets the ``slots`` int64 [n], to which new requests were admitted."""
        checks.tensor("slots", slots, ["n"], torch.int64, self.steps.device)
        names = ("steps", "drafted", "emitted", "rows", "outlook", "expected", "accepted")
        columns: dict[str, Any] = {name: getattr(self, name).index_fill(0, slots, 0) for name in names}
        return replace(self, **columns)

    def observe(self, slots: Tensor, packed: PackedTree, accepted: Accepted) -> History:
        """After a step: ``slots`` int64 [B] says where each request of the step lives. Requests without a row are left alone."""
        checks.tensor("slots", slots, [packed.batch], torch.int64, self.steps.device)
        rows = packed.indptr.diff()
        ran = rows > 0
        old = self.steps[slots]
        keep = torch.where(ran, torch.where(old == 0, 0.0, KEEP), 1.0)
        after = replace(
            self,
            steps=self.steps.index_copy(0, slots, old + ran.int()),
            emitted=self.emitted.index_copy(0, slots, keep * self.emitted[slots] + (1 - keep) * accepted.lengths),
            rows=self.rows.index_copy(0, slots, keep * self.rows[slots] + (1 - keep) * rows),
            tick=self.tick + 1,
        )
        if packed.outlook is None or packed.expected is None or packed.max_depth == 0:
            return after
        old = self.drafted[slots]
        keep = torch.where(ran, torch.where(old == 0, 0.0, KEEP), 1.0)
        mixed = keep[:, None, None] * self.outlook[slots, : packed.max_depth] + (1 - keep)[:, None, None] * packed.outlook
        deeper = self.outlook[slots, packed.max_depth :]
        drafts = (accepted.lengths - 1).clamp(min=0)
        return replace(
            after,
            drafted=self.drafted.index_copy(0, slots, old + ran.int()),
            outlook=self.outlook.index_copy(0, slots, torch.cat([mixed, deeper], dim=1)),
            expected=self.expected.index_copy(0, slots, keep * self.expected[slots] + (1 - keep) * packed.expected),
            accepted=self.accepted.index_copy(0, slots, keep * self.accepted[slots] + (1 - keep) * drafts),
        )

    def foresee(self, slots: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """What drafting would bring the requests in ``slots``: by depth d and number of drafted rows, expected accepted drafts.

        A slot that has not drafted yet counts as the mean of those that have. Expectations are scaled by what was accepted of
        what was expected, so that a draft that is too sure of itself is believed less. Host tensors only.

        Returns:
            ``rows`` and ``accepted`` float64 [depth, 64], both rising along the second axis: rows of probability down to each
            bin when ``depth`` layers are drafted, and how many of them will be accepted. None: nobody has drafted yet.
        """
        known = self.drafted > 0
        if not bool(known.any()) or self.outlook.shape[1] == 0:
            return None
        mine = known[slots]
        mean = self.outlook[known].mean(dim=0)
        table = self.outlook[slots[mine]].sum(dim=0) + (len(slots) - int(mine.sum())) * mean
        counts = table.numpy().astype(np.float64).cumsum(axis=0)[:, ::-1]
        chance = ((np.arange(BINS) + 0.5) / BINS)[::-1]
        hope, truth = float(self.expected[known].sum()), float(self.accepted[known].sum())
        scale = min(max((truth + 1.0) / (hope + 1.0), 0.25), 2.0)
        return counts.cumsum(axis=1), scale * (counts * chance).cumsum(axis=1)


def outlook(tree: SuperTree, gain: Tensor) -> Tensor:
    """float32 [B, depth, 64]: how many scored nodes of each layer have a probability of acceptance in each bin."""
    batch, depth = tree.batch, tree.depth
    layer = tree.forest.depth.clamp(min=1) - 1
    place = layer * BINS + (gain * BINS).long().clamp(max=BINS - 1)
    counted = (tree.forest.depth > 0) & torch.isfinite(tree.forest.score) & (gain * BINS >= 0.5)
    flat = torch.zeros(batch, depth * BINS, device=gain.device)
    return flat.scatter_add_(1, place, counted.float()).view(batch, depth, BINS)
