"""Trees that no beam drafted: custom arrays, n-gram continuations, static templates.

All their nodes are candidates: ``scheduler.pack`` selects among them by its rule, and
``scheduler.grow_from`` also applies gates and commits. B requests, T nodes of each, M of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.tree.validate import Array, check_scores, check_tokens, depths, host, refuse

if TYPE_CHECKING:
    from echo.tree.supertree import Forest, SuperTree


def layers(
    token: Tensor, parent: Tensor, log_prob: Tensor, depth: Tensor | None, num_nodes: Tensor | None
) -> tuple[NDArray[np.int64], list[tuple[Tensor, Tensor, Tensor]]]:
    """Check arguments of :meth:`SuperTree.from_arrays` on the host, and sort them into layers.

    Returns each request's number of nodes int64 [B], and the layers that :meth:`SuperTree.attach`
    takes.
    """
    batch, nodes = shape = checks.tensor("token", token, ["B", "T"], checks.INTEGERS).shape
    device = token.device
    checks.tensor("parent", parent, shape, checks.INTEGERS, device)
    checks.tensor("log_prob", log_prob, shape, checks.FLOATS, device)
    if depth is not None:
        checks.tensor("depth", depth, shape, checks.INTEGERS, device)
    sizes = np.full(batch, nodes)
    if num_nodes is not None:
        sizes = host(checks.tensor("num_nodes", num_nodes, [batch], checks.INTEGERS, device))
        bad = (sizes < 0) | (sizes > nodes)
        refuse("num_nodes", bad, lambda b: f"expected 0 to {nodes} nodes, got {sizes[b]}")
    parents = host(parent)
    there = np.arange(nodes) < sizes[:, None]
    deep = depths(parents, sizes, there)
    check_tokens("token", host(token), parents, there)
    scores = host(log_prob.float())
    limit = np.full_like(scores, checks.ROUNDING)
    check_scores("log_prob", scores, limit, there & (deep > 0), "a log-probability")
    if depth is not None:
        given = host(depth)
        say = lambda b, i: f"expected {deep[b, i]}, one below its parent, got {given[b, i]}"
        refuse("depth", there & (given != deep), say)
    made = []
    for columns, above in _by_depth(parents, deep, there):
        at = torch.from_numpy(columns).to(device)
        real = at >= 0
        at = at.clamp(min=0)
        q = torch.where(real, log_prob.detach().float().gather(1, at), -torch.inf)
        made.append((token.long().gather(1, at) * real, torch.from_numpy(above).to(device), q))
    return sizes.astype(np.int64), made


def _by_depth(
    parents: Array, depth: Array, there: NDArray[np.bool_]
) -> Iterator[tuple[Array, Array]]:
    """Yield for each depth from 1: its nodes' columns [B, M], by parent and column, padded with -1;
    and their parents' indices into the layer above [B, M], ascending."""
    batch, nodes = parents.shape
    flat = np.flatnonzero(there)
    flat = flat[np.argsort(depth.ravel()[flat], kind="stable")]
    place = np.zeros(batch * nodes, dtype=np.int64)
    for members in np.split(flat, np.cumsum(np.bincount(depth.ravel()[flat], minlength=1)))[1:-1]:
        request, column = np.divmod(members, nodes)
        up = place[request * nodes + parents[request, column]]
        request, column, up = np.stack([request, column, up])[:, np.lexsort((up, request))]
        count = np.bincount(request, minlength=batch)
        local = np.arange(len(up)) - (np.cumsum(count) - count)[request]
        place[request * nodes + column] = local
        columns = np.full((batch, count.max()), -1)
        above = np.zeros_like(columns)
        columns[request, local] = column
        above[request, local] = up
        yield columns, np.maximum.accumulate(above, axis=1)


def trie(
    root_tokens: Tensor,
    paths: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[float]] | None,
    prior: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge continuations into arrays: token, parent, log_prob and num_nodes of a custom tree."""
    batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
    prior = checks.real("prior", prior, 0.0)
    for name, given in (("paths", paths), ("weights", weights)):
        if given is not None and len(given) != batch:
            expected = f"one list for each of {batch} requests"
            raise EchoError(f"{name}: expected {expected}, got {len(given)}")
    tries: list[tuple[list[int], list[int], list[float]]] = []
    for b, (root, own) in enumerate(zip(root_tokens.tolist(), paths, strict=True)):
        some: Any = [1.0] * len(own) if weights is None else weights[b]
        listed = some.tolist() if isinstance(some, Tensor) else some
        worth = [checks.real(f"weights[{b}]", w, 0.0) for w in listed]
        if len(worth) != len(own):
            raise EchoError(f"weights: request {b}: expected {len(own)} weights, got {len(worth)}")
        token = [root]
        parent = [-1]
        weight = [sum(worth)]
        child: dict[tuple[int, int], int] = {}
        for path, w in zip(own, worth, strict=True):
            at = 0
            for t in checks.ints(f"paths[{b}]", path, 0):
                if (at, t) not in child:
                    child[at, t] = len(token)
                    token.append(t)
                    parent.append(at)
                    weight.append(0.0)
                at = child[at, t]
                weight[at] += w
        drafted = zip(weight[1:], parent[1:], strict=True)
        share = [1.0, *(w / (weight[p] + prior) if w else 0.0 for w, p in drafted)]
        tries.append((token, parent, share))
    device = root_tokens.device
    sizes = [len(token) for token, _, _ in tries]
    width = max(sizes, default=1)

    def pad(column: int, dtype: torch.dtype) -> Tensor:
        rows = [[*trie[column], *[0] * (width - len(trie[column]))] for trie in tries]
        return torch.tensor(rows, dtype=dtype, device=device).view(batch, width)

    log_prob = pad(2, torch.float64).log().float()
    num_nodes = torch.tensor(sizes, dtype=torch.int64, device=device)
    return pad(0, torch.int64), pad(1, torch.int64), log_prob, num_nodes


@dataclass(frozen=True)
class Template:
    """A tree shape that all requests share, as in static EAGLE and Medusa. Filling is sync-free.

    Args:
        parents: parent of each drafted node, a node before it; -1 for the root.
        candidates: which candidate of its depth each drafted node takes, for heads that draft by
            position. Defaults to its index among its siblings.

    Raises:
        EchoError: naming the first node whose parent does not come before it.

    Example:
        >>> template = Template.from_choices([[0], [1], [0, 0], [0, 1], [0, 0, 0]])
        >>> template.parents
        (-1, -1, 0, 0, 2)
        >>> from echo.tree import SuperTree
        >>> roots = SuperTree.from_paths(torch.tensor([7]), [[]])
        >>> heads = torch.tensor([[[1, 2], [3, 4], [5, 6]]])  # two candidates of each depth
        >>> template.fill(roots, heads, torch.zeros(1, 3, 2)).forest.token.tolist()
        [[7, 1, 2, 3, 4, 5]]
    """

    parents: tuple[int, ...]
    candidates: tuple[int, ...] | None = None
    _layers: list[tuple[list[int], list[int], list[int]]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _devices: dict[torch.device, list[tuple[Tensor, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        parents = checks.ints("parents", self.parents, -1)
        depth: list[int] = []
        for node, parent in enumerate(parents):
            if parent >= node:
                expected = "expected -1 or a node before it"
                raise EchoError(f"parents: node {node}: {expected}, got {parent}")
            depth.append(1 if parent < 0 else depth[parent] + 1)
        taken = tuple(parents[:n].count(p) for n, p in enumerate(parents))
        if self.candidates is not None:
            taken = checks.ints("candidates", self.candidates, 0)
            object.__setattr__(self, "candidates", taken)
            if len(taken) != len(parents):
                raise EchoError(f"candidates: expected {len(parents)} numbers, got {len(taken)}")
        object.__setattr__(self, "parents", parents)
        above = [-1]
        for d in range(1, max(depth, default=0) + 1):
            at = {node: i for i, node in enumerate(above)}
            nodes = [n for n, deep in enumerate(depth) if deep == d]
            nodes.sort(key=lambda n: (at[parents[n]], n))
            self._layers.append((nodes, [at[parents[n]] for n in nodes], [taken[n] for n in nodes]))
            above = nodes

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Template:
        """Build from Medusa's and EAGLE's notation.

        Args:
            choices: the nodes, each as the candidates taken from the root down to it.

        Raises:
            EchoError: naming a choice that is empty, duplicate, or whose parent is missing.
        """
        paths = sorted((checks.ints("choices", c, 0) for c in choices), key=lambda p: (len(p), p))
        number = {path: node for node, path in enumerate(paths)} | {(): -1}
        for path in paths:
            if not path or len(number) != len(paths) + 1 or path[:-1] not in number:
                expected = "distinct paths >= 0 whose prefixes are paths too"
                raise EchoError(f"choices: expected {expected}, got {list(path)}")
        return cls(tuple(number[path[:-1]] for path in paths), tuple(path[-1] for path in paths))

    def fill(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """Return ``tree`` with this template's nodes as candidates.

        Args:
            tree: from ``begin``, without layers.
            tokens: int64 [B, M], one per node in the template's order; or [B, D, k], k candidates
                per depth (Medusa's heads), from which each node takes its own.
            log_probs: float of the same shape, given the parent.

        Raises:
            EchoError: shapes or dtypes that do not fit.
        """
        batch = tree.batch
        device = tree.status.device
        heads = checks.instance("tokens", tokens, Tensor).dim() == 3
        shape = (batch, "D", "k") if heads else (batch, len(self.parents))
        checks.tensor("tokens", tokens, shape, torch.int64, device)
        checks.tensor("log_probs", log_probs, tokens.shape, checks.FLOATS, device)
        if heads:
            k = 1 + max([0, *(max(taken) for _, _, taken in self._layers)])
            if len(self._layers) > tokens.shape[1] or k > tokens.shape[2]:
                least = f"[B, {len(self._layers)}, {k}]"
                raise EchoError(f"tokens: expected {least} or more, got {list(tokens.shape)}")
        if device not in self._devices:  # once: a copy during a step would be a sync
            lists = [[torch.tensor(x, device=device) for x in layer] for layer in self._layers]
            self._devices[device] = [tuple(layer) for layer in lists]
        drafted = []
        for d, (nodes, parents, taken) in enumerate(self._devices[device]):
            token, q = (x[:, d, taken] if heads else x[:, nodes] for x in (tokens, log_probs))
            drafted.append((token, parents.expand(batch, -1), q))
        return tree.attach(drafted)


def children(forest: Forest, k: int) -> Tensor:
    """int64 [B, T, k]: each node's first k children (adjacent) among the T nodes; -1: none."""
    batch, nodes = forest.token.shape
    place = torch.arange(nodes, device=forest.depth.device).expand(batch, -1)
    drafted = (forest.depth > 0).expand(batch, -1) & torch.isfinite(forest.score)
    above = torch.where(drafted, forest.parent, nodes)
    first = torch.full((batch, nodes + 1), nodes, device=place.device)
    first = first.scatter_reduce(1, above, place, "amin")
    rank = place - first.gather(1, above)
    at = torch.where(drafted & (rank < k), above * k + rank, nodes * k)
    table = torch.full((batch, nodes * k + 1), -1, device=place.device).scatter_(1, at, place)
    return table[:, :-1].view(batch, nodes, k)


def grow_from(
    grow: Callable[[SuperTree, Tensor, Tensor], SuperTree],
    tree: SuperTree,
    forest: Forest,
    k: int,
    layers: int,
) -> SuperTree:
    """Grow the first ``layers`` of ``forest``, ``k`` children a node, by calls of ``grow``."""
    table = children(forest, k)
    node = torch.zeros_like(tree.frontier.token)
    for _ in range(layers):
        kids = table.gather(1, node[..., None].expand(-1, -1, k))
        at = kids.clamp(min=0).flatten(1)
        token, score = (x.gather(1, at).view(kids.shape) for x in (forest.token, forest.score))
        log_probs = score - forest.score.gather(1, node)[..., None]
        tree = grow(tree, token, torch.where(kids >= 0, log_probs, -torch.inf))
        node = at.gather(1, tree.frontier.index)
    return tree
