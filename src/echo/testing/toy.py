"""A tabular target and draft model with exact probabilities. V tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echo import _checks as checks
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier

FLOATS = (torch.float32, torch.float64)


def table(vocab: int, seed: int, sharpness: float = 2.0) -> Tensor:
    """Random next-token probabilities float64 [V, V]: row t is the distribution after token t.

    Args:
        vocab: V.
        seed: for the random logits.
        sharpness: standard deviation of the logits; 0: uniform.

    Example:
        >>> table(2, seed=0, sharpness=0).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)
    return torch.softmax(sharpness * logits, dim=-1)


def blurred(target: Tensor, seed: int, noise: float = 0.5) -> Tensor:
    """Make a draft model's table: ``target`` mixed with a share ``noise`` of the table of ``seed``.

    Example:
        >>> torch.equal(blurred(table(3, seed=0), seed=1, noise=1.0), table(3, seed=1))
        True
    """
    return (1 - noise) * target + noise * table(target.shape[0], seed)


@dataclass
class TabularTarget:
    """A target whose next token depends only on the last one (:class:`echo.Target`).

    Attributes:
        probabilities: float [V, V].
        sample: turns probabilities [n, V] into tokens int64 [n]. Defaults to greedy.
        texts: for each request index, the tokens whose keys and values an engine would hold.

    Raises:
        EchoError: ``probabilities`` of another shape or dtype.

    Example:
        >>> target = TabularTarget(torch.tensor([[0.1, 0.9], [0.6, 0.4]]))
        >>> target.admit(torch.tensor([5]), [torch.tensor([0, 1, 0])]), target.texts
        (tensor([1]), {5: [0, 1, 0]})
    """

    probabilities: Tensor
    sample: Callable[[Tensor], Tensor] = field(default=lambda p: p.argmax(dim=-1))
    texts: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.tensor("probabilities", self.probabilities, ["V", "V"], FLOATS)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Sample after each prompt's last token."""
        for index, prompt in zip(req_indices.tolist(), prompts, strict=True):
            self.texts[index] = prompt.tolist()
        return self.sample(self.probabilities[torch.stack([p[-1] for p in prompts])])

    def verify(self, req_indices: Tensor, packed: PackedTree, /) -> Tensor:
        """Sample after each row's token."""
        return self.sample(self.probabilities[packed.tokens])

    def compact(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Append the accepted rows' tokens to the texts."""
        for index, rows in zip(req_indices.tolist(), accepted.rows, strict=True):
            self.texts[index] += packed.tokens[rows[rows >= 0]].tolist()


@dataclass
class TabularDrafter:
    """A drafter that proposes the ``k`` likeliest tokens of a table (:class:`echo.Drafter`).

    Attributes:
        probabilities: float [V, V].
        k: from 1 to V.
        dtype: of the log-probabilities.

    Raises:
        EchoError: a table of another shape or dtype, or k out of range.

    Example:
        >>> import echo
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=2, max_depth=1)
        >>> drafter = TabularDrafter(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), k=1)
        >>> frontier = scheduler.begin(torch.tensor([0])).frontier
        >>> drafter.draft(torch.tensor([0]), frontier)
        (tensor([[[1]]]), tensor([[[-0.2877]]]))
    """

    probabilities: Tensor
    k: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        checks.tensor("probabilities", self.probabilities, ["V", "V"], FLOATS)
        checks.integer_field(self, "k", 1, len(self.probabilities))

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """Do nothing: the table has no state."""

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Return the top k of the table's rows."""
        top = self.probabilities[frontier.token].topk(self.k, dim=-1)
        return top.indices, top.values.log().to(self.dtype)

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Do nothing: the table has no state."""
