"""What each request slot remembers of its last steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo import checks
from echo.tree.accepted import Accepted
from echo.tree.packed import PackedTree

KEEP = 0.9
"""Weight of the past in the running means: a memory of about ten steps."""


@dataclass(frozen=True)
class History:
    """Running means by request slot; a value: every method returns a new one.

    Attributes:
        steps: int32 [slots], steps since the slot's last reset.
        emitted: float32 [slots], running mean of tokens emitted in a step.
        rows: float32 [slots], running mean of rows verified in a step.
    """

    steps: Tensor
    emitted: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, slots: int, device: torch.device | str = "cpu") -> History:
        """Of ``slots`` slots without a past.

        Raises:
            EchoError: slots below 1.
        """
        checks.integer("slots", slots, 1)
        steps = torch.zeros(slots, dtype=torch.int32, device=device)
        return cls(steps, torch.zeros(slots, device=device), torch.zeros(slots, device=device))

    def reset(self, slots: Tensor) -> History:
        """Forgets the ``slots`` int64 [n], to which new requests were admitted."""
        checks.tensor("slots", slots, ["n"], torch.int64, self.steps.device)
        return History(*(x.index_fill(0, slots, 0) for x in (self.steps, self.emitted, self.rows)))

    def observe(self, slots: Tensor, packed: PackedTree, accepted: Accepted) -> History:
        """After a step: ``slots`` int64 [B] says where each request of the step lives. Requests without a row are left alone."""
        checks.tensor("slots", slots, [packed.batch], torch.int64, self.steps.device)
        rows = packed.indptr.diff()
        ran = rows > 0
        old = self.steps[slots]
        keep = torch.where(ran, torch.where(old == 0, 0.0, KEEP), 1.0)
        return History(
            self.steps.index_copy(0, slots, old + ran.int()),
            self.emitted.index_copy(0, slots, keep * self.emitted[slots] + (1 - keep) * accepted.lengths),
            self.rows.index_copy(0, slots, keep * self.rows[slots] + (1 - keep) * rows),
        )
