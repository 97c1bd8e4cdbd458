"""What the target accepted of a packed step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every request, root first, and the tokens that the step emits.

    Attributes:
        tokens: int64 [B, depth + 1], emitted tokens, accepted drafts and then the bonus token; -1 beyond.
        rows: int64 [B, depth + 1], global rows of the root and the accepted drafts: row i's own sampled token is
            ``tokens[:, i]``, and the key/value entries of exactly these rows stay; -1 beyond.
        lengths: int64 [B], tokens emitted: accepted drafts + 1; 0 for a request without rows.
        bonus: int64 [B], the last emitted token, root of the next step; -1 for a request without rows.
    """

    tokens: Tensor
    rows: Tensor
    lengths: Tensor
    bonus: Tensor
