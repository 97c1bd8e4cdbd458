"""Invariants of the bare decision, each as a mask of the nodes that break it; leading dimensions are other plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo.kernels.codes import Status
from echo.tree.supertree import SuperTree


@dataclass(frozen=True)
class Selection:
    """What a scheduler selected of what; any leading dimensions [...] may stand for plans.

    Attributes:
        selected: bool [..., B, T].
        committed: bool [..., B, T], bought while drafting.
        parent: int64 [..., B, T], a root's is its own.
        score: float32 [..., B, T].
        depth: int64 [T].
        live: bool [..., B].
        verify_limits: int64 [..., B], most rows of a request.
        status: int8 [..., B].
        num_verify_tokens: int64 [...], rows of the step.
    """

    selected: Tensor
    committed: Tensor
    parent: Tensor
    score: Tensor
    depth: Tensor
    live: Tensor
    verify_limits: Tensor
    status: Tensor
    num_verify_tokens: Tensor

    @classmethod
    def of(cls, tree: SuperTree, selected: Tensor, live: Tensor) -> Selection:
        """One plan."""
        forest = tree.forest
        of = forest.committed, forest.parent, forest.score, forest.depth
        return cls(
            selected,
            *of,
            live,
            tree.verify_limits,
            tree.status,
            torch.tensor(tree.num_verify_tokens),
        )


def overspent(s: Selection) -> Tensor:
    """Rows: no more nodes are selected than the step has rows."""
    count = s.selected.flatten(-2).cumsum(-1).view(s.selected.shape)
    return s.selected & (count > s.num_verify_tokens[..., None, None])


def rootless(s: Selection) -> Tensor:
    """Root: each live request has its root, an empty slot nothing."""
    root = s.depth == 0
    return torch.where(root, s.selected != s.live[..., None], s.selected & ~s.live[..., None])


def orphaned(s: Selection) -> Tensor:
    """Closed: the parent of every selected node is selected."""
    return s.selected & ~s.selected.gather(-1, s.parent)


def crowded(s: Selection) -> Tensor:
    """Limit: no request has more rows than its capacity and max_tree_rows allow."""
    return s.selected & (s.selected.cumsum(-1) > s.verify_limits[..., None])


def faulty(s: Selection) -> Tensor:
    """Finite: no node is selected whose score is NaN or infinite, or that lies below such a node."""
    return s.selected & ~torch.isfinite(s.score)


def returned(s: Selection) -> Tensor:
    """Kept: what was bought is selected."""
    return s.committed & ~s.selected


def unstable(s: Selection) -> Tensor:
    """Ties: of siblings with equal scores the lower candidate comes first."""
    place = torch.arange(len(s.depth))
    drafted = s.depth > 0
    twin = (s.parent[..., None] == s.parent[..., None, :]) & (
        s.score[..., None] == s.score[..., None, :]
    )
    earlier = (
        twin & (place < place[:, None]) & (s.depth == s.depth[:, None]) & drafted
    )  # [..., v, u]: u is v's equal and before it
    return s.selected & drafted & (earlier & ~s.selected[..., None, :]).any(-1)


def widened(s: Selection) -> Tensor:
    """Depth first: nothing is dealt for width while a request that passed its gate found no rows."""
    starved = (s.status == int(Status.STARVED)).any(-1)
    return s.selected & ~s.committed & starved[..., None, None]


def idle(s: Selection) -> Tensor:
    """Full: rows are left over only if no request may have one more node."""
    left = s.selected.sum((-1, -2)) < s.num_verify_tokens
    room = s.selected.sum(-1) < s.verify_limits
    buyable = (
        ~s.selected & torch.isfinite(s.score) & s.selected.gather(-1, s.parent) & (s.depth > 0)
    )
    return buyable & room[..., None] & left[..., None, None]


Check = Callable[[Selection], Tensor]

INVARIANTS: dict[str, Check] = {
    "rows": overspent,
    "root": rootless,
    "closed": orphaned,
    "limit": crowded,
    "finite": faulty,
    "kept": returned,
}
"""Of every plan, whatever the policy."""

CLAIMS: dict[str, Check] = {"ties": unstable, "depth_first": widened, "full": idle}
"""Of policies that claim them."""
