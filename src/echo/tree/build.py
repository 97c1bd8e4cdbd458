"""Trees that no beam drafted: one's own arrays, continuations of an n-gram look-up, and static templates.

All of them are candidates only: ``scheduler.pack`` deals their rows by its rule. ``scheduler.grow_ready`` also asks the gates and buys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels.codes import Status
from echo.tree.supertree import Forest, Frontier, Layer, SuperTree, check_size, path_score


def from_arrays(
    token: Tensor,
    parent: Tensor,
    log_prob: Tensor,
    depth: Tensor | None = None,
    *,
    num_nodes: Tensor | None = None,
    num_verify_tokens: int | None = None,
    verify_limits: Tensor | None = None,
) -> SuperTree:
    """A tree of one's own; see :meth:`~echo.tree.supertree.SuperTree.from_arrays`. Reads everything, on the host."""
    batch, nodes = checks.tensor("token", token, ["B", "T"], checks.INTEGERS).shape
    device = token.device
    checks.tensor("parent", parent, [batch, nodes], checks.INTEGERS, device)
    checks.tensor("log_prob", log_prob, [batch, nodes], checks.FLOATS, device)
    if depth is not None:
        checks.tensor("depth", depth, [batch, nodes], checks.INTEGERS, device)
    sizes = (
        np.full(batch, nodes)
        if num_nodes is None
        else host(checks.tensor("num_nodes", num_nodes, [batch], checks.INTEGERS, device))
    )
    refuse(
        "num_nodes",
        (sizes < 0) | (sizes > nodes),
        lambda b: f"expected 0 to {nodes} nodes, got {sizes[b]}",
    )
    tokens, parents, scores = host(token), host(parent), host(log_prob.float())
    there = np.arange(nodes) < sizes[:, None]
    depths = _depths(parents, sizes, there)
    _check_nodes(tokens, parents, scores, depths, there, None if depth is None else host(depth))

    live = torch.from_numpy(sizes > 0).to(device)
    limit = torch.from_numpy(sizes).long().to(device)
    most = (
        max(int(sizes.sum()), 1)
        if num_verify_tokens is None
        else checks.integer("num_verify_tokens", num_verify_tokens, max(int((sizes > 0).sum()), 1))
    )
    if verify_limits is not None:
        limit = (
            torch.minimum(
                limit,
                checks.tensor("verify_limits", verify_limits, [batch], torch.int64, device).clamp(
                    min=1
                ),
            )
            * live
        )
    first = (
        token[:, 0].long() * live if nodes else torch.zeros(batch, dtype=torch.int64, device=device)
    )
    tree = roots(first, live, limit, most, int(sizes.max(initial=1)))
    drafted = []
    for columns, above in _layers(parents, depths, there):
        at = torch.from_numpy(columns).to(device)
        real, at = at >= 0, at.clamp(min=0)
        q = torch.where(real, log_prob.detach().float().gather(1, at), -torch.inf)
        drafted.append((token.long().gather(1, at) * real, torch.from_numpy(above).to(device), q))
    return attach(tree, drafted, count=False)


def from_paths(
    root_tokens: Tensor,
    paths: Sequence[Sequence[Sequence[int]]],
    *,
    weights: Sequence[Sequence[float]] | None = None,
    prior: float = 1.0,
    num_verify_tokens: int | None = None,
    verify_limits: Tensor | None = None,
) -> SuperTree:
    """A trie of continuations; see :meth:`~echo.tree.supertree.SuperTree.from_paths`. Host work."""
    batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
    prior = checks.real("prior", prior, 0.0)
    if len(paths) != batch or (weights is not None and len(weights) != batch):
        raise EchoError(
            f"paths, weights: expected one list for each of {batch} requests, got {len(paths)}"
        )
    trees: list[tuple[list[int], list[int], list[float]]] = []
    for b, (root, mine) in enumerate(zip(root_tokens.tolist(), paths, strict=True)):
        given: Any = [1.0] * len(mine) if weights is None else weights[b]
        shares = [
            checks.real(f"weights[{b}]", w, 0.0)
            for w in (given.tolist() if isinstance(given, Tensor) else given)
        ]
        if len(shares) != len(mine):
            raise EchoError(
                f"weights: request {b}: expected {len(mine)} weights, got {len(shares)}"
            )
        token, parent, weight, child = [root], [-1], [sum(shares)], dict[tuple[int, int], int]()
        for path, share in zip(mine, shares, strict=True):
            at = 0
            for t in checks.ints(f"paths[{b}]", path, 0):
                if (at, t) not in child:
                    child[at, t] = len(token)
                    token.append(t)
                    parent.append(at)
                    weight.append(0.0)
                at = child[at, t]
                weight[at] += share
        trees.append(
            (
                token,
                parent,
                [
                    w / (weight[p] + prior) if w and p >= 0 else float(p < 0)
                    for w, p in zip(weight, parent, strict=True)
                ],
            )
        )
    width = max((len(token) for token, _, _ in trees), default=1)
    padded = [[column + [0] * (width - len(column)) for column in tree] for tree in trees]
    device = root_tokens.device
    token_, parent_ = (
        torch.tensor([tree[i] for tree in padded], dtype=torch.int64, device=device).view(
            batch, width
        )
        for i in (0, 1)
    )
    share_ = torch.tensor([tree[2] for tree in padded], dtype=torch.float64, device=device).view(
        batch, width
    )
    lengths = torch.tensor([len(token) for token, _, _ in trees], dtype=torch.int64, device=device)
    return from_arrays(
        token_,
        parent_,
        share_.log().float(),
        num_nodes=lengths,
        num_verify_tokens=num_verify_tokens,
        verify_limits=verify_limits,
    )


@dataclass(frozen=True)
class Template:
    """A ready-made tree shape that all requests share (static EAGLE and Medusa trees). Filling it is device work without read-backs.

    Args:
        parents: for each drafted node the index of its parent among them, which comes before it; -1 under the root.
        candidates: for each drafted node, which candidate of its depth it takes where heads draft by position; its place among
            its siblings where not given.

    Raises:
        EchoError: naming the first node whose parent does not come before it.

    Example:
        >>> Template.from_choices([[0], [1], [0, 0], [0, 1], [0, 0, 0]]).parents
        (-1, -1, 0, 0, 2)
    """

    parents: tuple[int, ...]
    candidates: tuple[int, ...] | None = None
    _layers: tuple[tuple[list[int], list[int]], ...] = field(init=False, repr=False, compare=False)
    _devices: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", checks.ints("parents", self.parents, -1))
        if self.candidates is not None:
            object.__setattr__(self, "candidates", checks.ints("candidates", self.candidates, 0))
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise EchoError(
                    f"parents: node {node}: expected -1 or a node before it, got {parent}"
                )
        if self.candidates is not None and len(self.candidates) != len(self.parents):
            raise EchoError(
                f"candidates: expected {len(self.parents)} numbers, got {len(self.candidates)}"
            )
        depth: list[int] = []
        for parent in self.parents:
            depth.append(1 if parent < 0 else depth[parent] + 1)
        layers: list[list[int]] = [[-1]]
        for d in range(1, max(depth, default=0) + 1):
            above = layers[-1]
            layers.append(
                sorted(
                    (n for n, at in enumerate(depth) if at == d),
                    key=lambda n: (above.index(self.parents[n]), n),
                )
            )
        places = [
            [layers[d].index(self.parents[n]) for n in layer] for d, layer in enumerate(layers[1:])
        ]
        object.__setattr__(self, "_layers", tuple(zip(layers[1:], places, strict=True)))

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Template:
        """From Medusa's and EAGLE's notation: ``choices`` are the nodes, each as the candidates taken from the root down to it.

        Raises:
            EchoError: naming a choice that is empty, double, or whose parent is missing.
        """
        paths = sorted(
            (checks.ints("choices", choice, 0) for choice in choices),
            key=lambda path: (len(path), path),
        )
        number = {path: node for node, path in enumerate(paths)}
        for path in paths:
            if (
                not path
                or len(number) != len(paths)
                or (len(path) > 1 and path[:-1] not in number)
                or min(path) < 0
            ):
                raise EchoError(
                    f"choices: expected distinct paths >= 0 whose prefixes are paths too, got {list(path)}"
                )
        return cls(
            tuple(number.get(path[:-1], -1) for path in paths), tuple(path[-1] for path in paths)
        )

    def fill(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """The planted tree with this template's nodes as candidates.

        Args:
            tree: just planted.
            tokens: int64 [B, M], one for each node in the template's order; or [B, D, k], candidates by depth (Medusa's heads), of
                which each node takes its own.
            log_probs: float of the same shape, given the parent.

        Raises:
            EchoError: shapes or dtypes that do not fit.
        """
        batch, nodes, device = tree.batch, len(self.parents), tree.status.device
        heads = tokens.dim() == 3
        if heads:
            depth, k = len(self._layers), max(self._taken, default=0) + 1
            checks.tensor("tokens", tokens, [batch, "D", "k"], torch.int64, device)
            if depth > tokens.shape[1] or k > tokens.shape[2]:
                raise EchoError(
                    f"tokens: expected [B, {depth}, {k}] or more, got {list(tokens.shape)}"
                )
        else:
            checks.tensor("tokens", tokens, [batch, nodes], torch.int64, device)
        checks.tensor("log_probs", log_probs, list(tokens.shape), checks.FLOATS, device)
        drafted = []
        for d, (members, places, taken) in enumerate(self._indices(device)):
            token, log_prob = (
                x[:, d, taken] if heads else x[:, members] for x in (tokens, log_probs)
            )
            drafted.append((token, places.expand(batch, -1), log_prob))
        return attach(tree, drafted)

    @property
    def _taken(self) -> tuple[int, ...]:
        return self.candidates or tuple(
            self.parents[:n].count(p) for n, p in enumerate(self.parents)
        )

    def _indices(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer: nodes, places of their parents, candidates. Copied to a device once: a copy in the step would wait for it."""
        known = self._devices
        if device not in known:
            lists = [
                (members, places, [self._taken[n] for n in members])
                for members, places in self._layers
            ]
            known[device] = [
                (
                    torch.tensor(m, device=device),
                    torch.tensor(p, device=device),
                    torch.tensor(t, device=device),
                )
                for m, p, t in lists
            ]
        return known[device]


def roots(
    tokens: Tensor,
    live: Tensor,
    verify_limits: Tensor,
    num_verify_tokens: int,
    max_verify_tokens_per_req: int,
) -> SuperTree:
    """Roots that draft nothing: tokens int64 [B], live bool [B], row limit int64 [B], rows of the step and at most of a request."""
    root = tokens[:, None]
    zero, score = (
        torch.zeros_like(root),
        torch.zeros_like(root, dtype=torch.float32).masked_fill_(~live[:, None], -torch.inf),
    )
    return SuperTree(
        layers=(Layer(0, root, zero, score, live[:, None], live),),
        frontier=Frontier(root, zero, zero, score, torch.zeros_like(live)[:, None], 0),
        status=torch.where(live, int(Status.FINISHED), int(Status.EMPTY)).to(torch.int8),
        verify_limits=verify_limits,
        num_committed=live.long(),
        num_remaining=num_verify_tokens - live.sum(),
        invalid=torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device),
        num_verify_tokens=num_verify_tokens,
        max_verify_tokens_per_req=max_verify_tokens_per_req,
    )


def attach(
    tree: SuperTree, layers: Sequence[tuple[Tensor, Tensor, Tensor]], *, count: bool = True
) -> SuperTree:
    """A tree of roots with ready-made layers below them, all drafted and none bought. Device work without read-backs.

    Args:
        tree: roots only.
        layers: for each depth tokens int64 [B, M], place of the parent in the layer above int64 [B, M] rising along M, and
            log-probability given the parent, float [B, M].
        count: scores that are no finite number count as invalid.
    """
    if tree.depth:
        raise EchoError(f"tree: expected a tree just planted, got one of {tree.depth} layers")
    live = tree.status != int(Status.EMPTY)
    check_size(tree.batch, 1 + sum(token.shape[1] for token, _, _ in layers), len(layers))
    above, made, invalid = tree.layers[0].score, list(tree.layers), tree.invalid
    for depth, (token, parent, log_prob) in enumerate(layers, start=1):
        over = above.gather(1, parent)
        above, _, faulty = path_score(over, log_prob[..., None], torch.isfinite(over))
        made.append(
            Layer(depth, token, parent, above, torch.zeros_like(parent, dtype=torch.bool), live)
        )
        invalid = invalid + faulty if count else invalid
    last = made[-1]
    index = torch.arange(last.token.shape[1], device=last.token.device).expand_as(last.token)
    return replace(
        tree,
        layers=tuple(made),
        frontier=Frontier(
            last.token, last.parent, index, last.score, torch.zeros_like(last.committed), last.depth
        ),
        status=torch.where(live, int(Status.FINISHED), int(Status.EMPTY)).to(torch.int8),
        invalid=invalid,
    )


def children(forest: Forest, k: int) -> Tensor:
    """int64 [B, T, fanout]: each node's first children among the T nodes, -1 for none. Siblings lie side by side."""
    batch, nodes = forest.token.shape
    place = torch.arange(nodes, device=forest.depth.device).expand(batch, -1)
    drafted = (forest.depth > 0).expand(batch, -1) & torch.isfinite(forest.score)
    above = torch.where(drafted, forest.parent, nodes)
    first = torch.full((batch, nodes + 1), nodes, device=place.device).scatter_reduce(
        1, above, place, "amin"
    )
    rank = place - first.gather(1, above)
    at = torch.where(drafted & (rank < k), above * k + rank, nodes * k)
    table = torch.full((batch, nodes * k + 1), -1, device=place.device).scatter_(1, at, place)
    return table[:, :-1].view(batch, nodes, k)


def host(value: Tensor) -> NDArray[Any]:
    """A tensor's values, read back."""
    array: NDArray[Any] = value.detach().cpu().numpy()
    return array


def refuse(name: str, bad: NDArray[np.bool_], say: Callable[..., str]) -> None:
    """Raises :class:`EchoError` at the first True of ``bad``, [B] or [B, n]: its request and row, and what ``say`` of them says."""
    if bad.any():
        at = [int(i) for i in np.unravel_index(bad.argmax(), bad.shape)]
        where = ", ".join(f"{kind} {i}" for kind, i in zip(("request", "row"), at, strict=False))
        raise EchoError(f"{name}: {where}: {say(*at)}")


def _depths(
    parents: NDArray[Any], sizes: NDArray[Any], there: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Depth of each node, [B, T], by pointer doubling; raises at the first node whose parent is not a row before it."""
    column = np.arange(parents.shape[1])
    root, outside = column == 0, (parents < 0) | (parents >= sizes[:, None])

    def say(b: int, row: int) -> str:
        parent, mine, seen = parents[b, row], parents[b, : sizes[b]].tolist(), {row}
        if row == 0:
            return f"expected -1 for the root, got {parent}"
        if outside[b, row]:
            return f"expected a row of the same request, 0 to {sizes[b] - 1}, got {parent}"
        at = int(parent)
        while 0 <= at < len(mine) and at not in seen:
            seen.add(at)
            at = mine[at]
        return f"expected a row before its child, got {parent}{', a cycle' if at in seen else ''}"

    refuse("parent", there & np.where(root, parents != -1, outside | (parents >= column)), say)
    jump = np.where(there & ~root, parents, 0)
    depth: NDArray[np.int64] = (there & ~root).astype(np.int64)
    while jump.any():
        depth += np.take_along_axis(depth, jump, 1)
        jump = np.take_along_axis(jump, jump, 1)
    return depth


def _check_nodes(
    tokens: NDArray[Any],
    parents: NDArray[Any],
    scores: NDArray[Any],
    depths: NDArray[Any],
    there: NDArray[np.bool_],
    known: NDArray[Any] | None,
) -> None:
    """Raises at the first bad token, score or depth, and at the second of two equal siblings."""
    refuse(
        "token", there & (tokens < 0), lambda b, row: f"expected a token >= 0, got {tokens[b, row]}"
    )
    family = parents + np.arange(len(parents))[:, None] * parents.shape[1]
    order = np.lexsort(
        (tokens.ravel(), family.ravel(), ~there.ravel())
    )  # stable: equal siblings side by side, in order
    twice = np.zeros(there.size, dtype=bool)
    twice[order[1:]] = (np.diff(family.ravel()[order]) == 0) & (np.diff(tokens.ravel()[order]) == 0)
    refuse(
        "token",
        there & twice.reshape(there.shape),
        lambda b, row: (
            f"expected siblings that differ, got {tokens[b, row]} twice under row {parents[b, row]}"
        ),
    )
    drafted = there.copy()
    drafted[:, :1] = False
    refuse(
        "log_prob",
        drafted & ~(scores <= checks.ROUNDING),
        lambda b, row: (
            f"expected a log-probability, got {scores[b, row]}{checks.instead(float(scores[b, row]), scores[drafted].tolist())}"
        ),
    )
    if known is not None:
        refuse(
            "depth",
            there & (known != depths),
            lambda b, row: f"expected {depths[b, row]}, one below its parent, got {known[b, row]}",
        )


def _layers(
    parents: NDArray[Any], depths: NDArray[Any], there: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The nodes of each depth from 1 on, by parent's place and then column: columns [B, M], -1 beyond; parent's place, rising."""
    batch, nodes = parents.shape
    flat = np.flatnonzero(there)
    flat = flat[np.argsort(depths.ravel()[flat], kind="stable")]
    place = np.zeros(batch * nodes, dtype=np.int64)
    for members in np.split(flat, np.cumsum(np.bincount(depths.ravel()[flat], minlength=1)))[1:-1]:
        request, column = np.divmod(members, nodes)
        up = place[request * nodes + parents[request, column]]
        order = np.lexsort((up, request))
        request, column, up = request[order], column[order], up[order]
        count = np.bincount(request, minlength=batch)
        local = np.arange(len(order)) - (np.cumsum(count) - count)[request]
        place[request * nodes + column] = local
        columns, above = (
            np.full((batch, count.max()), -1),
            np.zeros((batch, count.max()), dtype=np.int64),
        )
        columns[request, local], above[request, local] = column, up
        yield columns, np.maximum.accumulate(above, axis=1)
