"""What the target accepted of a packed step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo import checks
from echo.kernels import reference


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every request, root first, and the tokens that the step emits.

    A row counts here once its own sampled token was emitted. A walk ends *before* a row whose target has no number (token -1), so a
    request may emit nothing: its length is 0, its ``bonus`` -1, its context as before, and its root stays the root of the next step.

    Attributes:
        tokens: int64 [B, depth + 1], emitted tokens, accepted drafts and then the bonus token; -1 beyond.
        rows: int64 [B, depth + 1], global rows of the root and the accepted drafts: row i's own sampled token is
            ``tokens[:, i]``, and the key/value entries of exactly these rows stay; -1 beyond.
        num_emitted: int64 [B], tokens emitted: accepted drafts + 1; 0 for a request without rows, or whose root row has no number.
        bonus: int64 [B], the last emitted token, root of the next step, whose keys and values are not written yet; -1 where nothing
            was emitted: ``torch.where(accepted.num_emitted > 0, accepted.bonus, root_tokens)`` are the next roots.
        cut_row: int64 [B], where a walk was cut: the draft that equals ``bonus``, but emitted no token of its own, since the target has no
            number there or the answer is over; -1 elsewhere. None: no walk was cut.
    """

    tokens: Tensor
    rows: Tensor
    num_emitted: Tensor
    bonus: Tensor
    cut_row: Tensor | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, rows: Tensor, num_emitted: Tensor, cut_row: Tensor | None = None
    ) -> Accepted:
        """From what a walk returns, as in :func:`echo.kernels.accept`: the bonus token is the last that was emitted."""
        return cls(
            tokens,
            rows,
            num_emitted,
            tokens.gather(1, (num_emitted - 1).clamp(min=0)[:, None])[:, 0],
            cut_row,
        )

    @property
    def num_accepted_drafts(self) -> Tensor:
        """int64 [B]: drafts that the target accepted, that at which a walk was cut among them.

        Where as many drafts were accepted as tokens emitted, what is deeper was not judged: nothing is known of it. Elsewhere all was.
        """
        path = (self.num_emitted - 1).clamp(min=0)
        return path if self.cut_row is None else path + (self.cut_row >= 0)

    def truncate(
        self, *, eos_tokens: Tensor | None = None, max_new_tokens: Tensor | None = None
    ) -> Accepted:
        """Without what lies behind the end of an answer: as if the target had no number there. On the device, nothing is read back.

        Args:
            eos_tokens: int64 [n], tokens that end an answer, themselves included.
            max_new_tokens: int64 [B], tokens that each answer may still get; 0 emits nothing.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.

        Example:
            >>> tokens, rows = torch.tensor([[5, 2, 40]]), torch.tensor([[0, 1, 2]])
            >>> seen = Accepted.of(tokens, rows, torch.tensor([3])).cut(eos_tokens=torch.tensor([2]))
            >>> seen.tokens.tolist(), seen.num_emitted.tolist()
            ([[5, 2, -1]], [2])
        """
        if eos_tokens is None and max_new_tokens is None:
            return self
        device = self.num_emitted.device
        if max_new_tokens is not None:
            checks.tensor(
                "max_new_tokens", max_new_tokens, list(self.num_emitted.shape), torch.int64, device
            )
        if eos_tokens is not None:
            checks.tensor("eos_tokens", eos_tokens, ["n"], torch.int64, device)
        rows, tokens, lengths, beyond = reference.cut(
            self.rows, self.tokens, self.num_emitted, self.cut_row, max_new_tokens, eos_tokens
        )
        return Accepted.of(tokens, rows, lengths, beyond)
