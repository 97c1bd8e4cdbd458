"""A tabular language model pair with exact probabilities: fast, deterministic, and enumerable by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echo import _checks as checks
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier


def table(vocab: int, seed: int, sharpness: float = 2.0) -> Tensor:
    """Random next-token probabilities float64 [vocab, vocab]: row t is the distribution after token t.

    Args:
        vocab: tokens.
        seed: of the random numbers.
        sharpness: standard deviation of the logits; 0: uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(
        sharpness * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64), dim=-1
    )


def blurred(target: Tensor, seed: int, noise: float = 0.5) -> Tensor:
    """A draft model's table: that of ``target``, mixed with a share of ``noise`` in [0, 1], another table from ``seed``."""
    return (1 - noise) * target + noise * table(target.shape[0], seed)


@dataclass
class TabularTarget:
    """A target whose next token depends on the last one only (:class:`echo.Target`).

    Attributes:
        probabilities: float [V, V].
        sample: turns probabilities [n, V] into tokens int64 [n]; greedy where not given.
        texts: all tokens of each slot whose keys and values an engine would hold.
    """

    probabilities: Tensor
    sample: Callable[[Tensor], Tensor] = field(default=lambda p: p.argmax(dim=-1))
    texts: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.tensor(
            "probabilities", self.probabilities, ["V", "V"], (torch.float32, torch.float64)
        )

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Samples after each prompt's last token."""
        self.texts.update(
            (slot, prompt.tolist())
            for slot, prompt in zip(req_indices.tolist(), prompts, strict=True)
        )
        return self.sample(self.probabilities[torch.stack([p[-1] for p in prompts])])

    def verify(self, req_indices: Tensor, packed: PackedTree, /) -> Tensor:
        """Samples after each row's token."""
        return self.sample(self.probabilities[packed.tokens])

    def compact(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Appends the accepted rows' tokens."""
        for slot, rows in zip(req_indices.tolist(), accepted.rows, strict=True):
            self.texts[slot] += packed.tokens[rows[rows >= 0]].tolist()


@dataclass
class TabularDrafter:
    """Proposes the ``k`` likeliest tokens of its own table after each node (:class:`echo.Drafter`).

    Attributes:
        probabilities: float [V, V].
        k: from 1 to V.
        dtype: of the log-probabilities.
    """

    probabilities: Tensor
    k: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        vocab = checks.tensor(
            "probabilities", self.probabilities, ["V", "V"], (torch.float32, torch.float64)
        ).shape[0]
        checks.integer_field(self, "k", 1, vocab)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """Nothing to remember."""

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Top-k of the table's rows."""
        top = self.probabilities[frontier.token].topk(self.k, dim=-1)
        return top.indices, top.values.log().to(self.dtype)

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Nothing to remember."""
