"""Trees that no beam drafted: one's own arrays, continuations of an n-gram look-up, and static templates.

All of them are candidates only: ``scheduler.pack`` deals their rows by its rule. ``scheduler.grow_ready`` also asks the gates and buys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echo import checks
from echo.errors import EchoError
from echo.tree.supertree import Forest, Frontier, Layer, Status, SuperTree, check_size, path_score


def from_arrays(
    token: Tensor,
    parent: Tensor,
    log_prob: Tensor,
    depth: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    rows: int | None = None,
    row_limit: Tensor | None = None,
) -> SuperTree:
    """A tree of one's own; see :meth:`~echo.tree.supertree.SuperTree.from_arrays`. Reads everything, on the host."""
    batch, nodes = checks.tensor("token", token, ["B", "T"], checks.INTEGERS).shape
    device = token.device
    checks.tensor("parent", parent, [batch, nodes], checks.INTEGERS, device)
    checks.tensor("log_prob", log_prob, [batch, nodes], checks.FLOATS, device)
    sizes = [nodes] * batch if lengths is None else checks.tensor("lengths", lengths, [batch], checks.INTEGERS, device).tolist()
    known = None if depth is None else checks.tensor("depth", depth, [batch, nodes], checks.INTEGERS, device).tolist()
    tokens, parents, scores = token.tolist(), parent.tolist(), log_prob.float().tolist()

    layers: list[list[list[tuple[int, int]]]] = []  # by depth, by request: (parent's place in the layer above, column)
    for b in range(batch):
        if not 0 <= sizes[b] <= nodes:
            raise EchoError(f"lengths: request {b}: expected 0 to {nodes} nodes, got {sizes[b]}")
        depths = _depths(b, parents[b][: sizes[b]])
        _check_nodes(b, tokens[b], parents[b], scores[b], depths, None if known is None else known[b])
        own: list[list[int]] = [[] for _ in range(max(depths, default=0) + 1)]
        for column, d in enumerate(depths):
            own[d].append(column)
        while len(layers) < len(own):
            layers.append([[] for _ in range(batch)])
        place = [0] * len(depths)
        for d, members in enumerate(own):
            layers[d][b] = sorted((place[parents[b][column]] if d else 0, column) for column in members)
            for i, (_, column) in enumerate(layers[d][b]):
                place[column] = i

    live = torch.tensor([size > 0 for size in sizes], dtype=torch.bool, device=device)
    most = max(sum(sizes), 1) if rows is None else checks.integer("rows", rows, max(sum(size > 0 for size in sizes), 1))
    limit = torch.tensor(sizes, dtype=torch.int64, device=device)
    if row_limit is not None:
        limit = torch.minimum(limit, checks.tensor("row_limit", row_limit, [batch], torch.int64, device).clamp(min=1)) * live
    first = [tokens[b][0] if sizes[b] else 0 for b in range(batch)]
    tree = roots(torch.tensor(first, dtype=torch.int64, device=device), live, limit, most, max([1, *sizes]))
    drafted = []
    for layer in layers[1:]:
        width = max(len(nodes) for nodes in layer)
        picks = [[column for _, column in nodes] + [0] * (width - len(nodes)) for nodes in layer]
        above = [[up for up, _ in nodes] + [nodes[-1][0] if nodes else 0] * (width - len(nodes)) for nodes in layer]
        at = torch.tensor(picks, device=device).view(batch, width)
        there = torch.arange(width, device=device) < torch.tensor([len(nodes) for nodes in layer], device=device)[:, None]
        q = torch.where(there, log_prob.float().gather(1, at), -torch.inf)
        drafted.append((token.long().gather(1, at) * there, torch.tensor(above, device=device).view(batch, width), q))
    return attach(tree, drafted, count=False)


def from_paths(
    root_tokens: Tensor,
    paths: Sequence[Sequence[Sequence[int]]],
    *,
    weights: Sequence[Sequence[float]] | None = None,
    prior: float = 1.0,
    rows: int | None = None,
    row_limit: Tensor | None = None,
) -> SuperTree:
    """A trie of continuations; see :meth:`~echo.tree.supertree.SuperTree.from_paths`. Host work."""
    batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
    checks.real("prior", prior, 0.0)
    if len(paths) != batch or (weights is not None and len(weights) != batch):
        raise EchoError(f"paths, weights: expected one list for each of {batch} requests, got {len(paths)}")
    trees: list[tuple[list[int], list[int], list[float]]] = []
    for b, (root, mine) in enumerate(zip(root_tokens.tolist(), paths, strict=True)):
        shares = [1.0] * len(mine) if weights is None else [checks.real(f"weights[{b}]", w, 0.0) for w in weights[b]]
        if len(shares) != len(mine):
            raise EchoError(f"weights: request {b}: expected {len(mine)} weights, got {len(shares)}")
        token, parent, weight, child = [root], [-1], [sum(shares)], dict[tuple[int, int], int]()
        for path, share in zip(mine, shares, strict=True):
            at = 0
            for t in path:
                if (at, t) not in child:
                    child[at, t] = len(token)
                    token.append(t)
                    parent.append(at)
                    weight.append(0.0)
                at = child[at, t]
                weight[at] += share
        trees.append(
            (token, parent, [w / (weight[p] + prior) if w and p >= 0 else float(p < 0) for w, p in zip(weight, parent, strict=True)])
        )
    width = max((len(token) for token, _, _ in trees), default=1)
    padded = [[column + [0] * (width - len(column)) for column in tree] for tree in trees]
    device = root_tokens.device
    token_, parent_ = (torch.tensor([tree[i] for tree in padded], dtype=torch.int64, device=device).view(batch, width) for i in (0, 1))
    share_ = torch.tensor([tree[2] for tree in padded], dtype=torch.float64, device=device).view(batch, width)
    lengths = torch.tensor([len(token) for token, _, _ in trees], dtype=torch.int64, device=device)
    return from_arrays(token_, parent_, share_.log().float(), lengths=lengths, rows=rows, row_limit=row_limit)


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

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise EchoError(f"parents: node {node}: expected -1 or a node before it, got {parent}")
        if self.candidates is not None and len(self.candidates) != len(self.parents):
            raise EchoError(f"candidates: expected {len(self.parents)} numbers, got {len(self.candidates)}")
        depth: list[int] = []
        for parent in self.parents:
            depth.append(1 if parent < 0 else depth[parent] + 1)
        layers: list[list[int]] = [[-1]]
        for d in range(1, max(depth, default=0) + 1):
            above = layers[-1]
            layers.append(sorted((n for n, at in enumerate(depth) if at == d), key=lambda n: (above.index(self.parents[n]), n)))
        places = [[layers[d].index(self.parents[n]) for n in layer] for d, layer in enumerate(layers[1:])]
        object.__setattr__(self, "_layers", tuple(zip(layers[1:], places, strict=True)))
        object.__setattr__(self, "_devices", {})

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Template:
        """From Medusa's and EAGLE's notation: each node as the candidates taken from the root down to it.

        Raises:
            EchoError: naming a choice that is empty, double, or whose parent is missing.
        """
        paths = sorted((tuple(choice) for choice in choices), key=lambda path: (len(path), path))
        number = {path: node for node, path in enumerate(paths)}
        for path in paths:
            if not path or len(number) != len(paths) or (len(path) > 1 and path[:-1] not in number) or min(path) < 0:
                raise EchoError(f"choices: expected distinct paths >= 0 whose prefixes are paths too, got {list(path)}")
        return cls(tuple(number.get(path[:-1], -1) for path in paths), tuple(path[-1] for path in paths))

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
            depth, k = len(self.__dict__["_layers"]), max(self._taken, default=0) + 1
            checks.tensor("tokens", tokens, [batch, "D", "k"], torch.int64, device)
            if depth > tokens.shape[1] or k > tokens.shape[2]:
                raise EchoError(f"tokens: expected [B, {depth}, {k}] or more, got {list(tokens.shape)}")
        else:
            checks.tensor("tokens", tokens, [batch, nodes], torch.int64, device)
        checks.tensor("log_probs", log_probs, list(tokens.shape), checks.FLOATS, device)
        drafted = []
        for d, (members, places, taken) in enumerate(self._indices(device)):
            token, log_prob = (x[:, d, taken] if heads else x[:, members] for x in (tokens, log_probs))
            drafted.append((token, places.expand(batch, -1), log_prob))
        return attach(tree, drafted)

    @property
    def _taken(self) -> tuple[int, ...]:
        return self.candidates or tuple(self.parents[:n].count(p) for n, p in enumerate(self.parents))

    def _indices(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer: nodes, places of their parents, candidates. Copied to a device once: a copy in the step would wait for it."""
        known: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = self.__dict__["_devices"]
        if device not in known:
            layers: tuple[tuple[list[int], list[int]], ...] = self.__dict__["_layers"]
            lists = [(members, places, [self._taken[n] for n in members]) for members, places in layers]
            known[device] = [
                (torch.tensor(m, device=device), torch.tensor(p, device=device), torch.tensor(t, device=device)) for m, p, t in lists
            ]
        return known[device]


def roots(tokens: Tensor, live: Tensor, limit: Tensor, rows: int, most: int) -> SuperTree:
    """Roots that draft nothing: tokens int64 [B], live bool [B], row limit int64 [B], rows of the step and at most of a request."""
    root = tokens[:, None]
    zero, score = torch.zeros_like(root), torch.where(live, 0.0, -torch.inf)[:, None]
    return SuperTree(
        layers=(Layer(0, root, zero, score, live[:, None], live),),
        frontier=Frontier(root, zero, zero, score, torch.zeros_like(live)[:, None], 0),
        status=torch.where(live, int(Status.FINISHED), int(Status.EMPTY)).to(torch.int8),
        row_limit=limit,
        held=live.long(),
        left=rows - live.sum(),
        invalid=torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device),
        rows=rows,
        most=most,
    )


def attach(tree: SuperTree, layers: Sequence[tuple[Tensor, Tensor, Tensor]], *, count: bool = True) -> SuperTree:
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
        score, faulty = path_score(over, log_prob[..., None], torch.isfinite(over))
        above = score[..., 0]
        made.append(Layer(depth, token, parent, above, torch.zeros_like(parent, dtype=torch.bool), live))
        invalid = invalid + faulty[..., 0].sum(dim=1, dtype=torch.int32) if count else invalid
    last = made[-1]
    index = torch.arange(last.token.shape[1], device=last.token.device).expand_as(last.token)
    return replace(
        tree,
        layers=tuple(made),
        frontier=Frontier(last.token, last.parent, index, last.score, torch.zeros_like(last.bought), last.depth),
        status=torch.where(live, int(Status.FINISHED), int(Status.EMPTY)).to(torch.int8),
        invalid=invalid,
    )


def children(forest: Forest, fanout: int) -> Tensor:
    """int64 [B, T, fanout]: each node's first children among the T nodes, -1 for none. Siblings lie side by side."""
    batch, nodes = forest.token.shape
    place = torch.arange(nodes, device=forest.depth.device).expand(batch, -1)
    drafted = (forest.depth > 0).expand(batch, -1) & torch.isfinite(forest.score)
    above = torch.where(drafted, forest.parent, nodes)
    first = torch.full((batch, nodes + 1), nodes, device=place.device).scatter_reduce(1, above, place, "amin")
    rank = place - first.gather(1, above)
    at = torch.where(drafted & (rank < fanout), above * fanout + rank, nodes * fanout)
    table = torch.full((batch, nodes * fanout + 1), -1, device=place.device).scatter_(1, at, place)
    return table[:, :-1].view(batch, nodes, fanout)


def _depths(b: int, parents: list[int]) -> list[int]:
    """Depth of each node; in any order but parents first, the root at 0."""
    depths: list[int] = []
    for node, parent in enumerate(parents):
        where = f"parent: request {b}, row {node}"
        if node == 0:
            if parent != -1:
                raise EchoError(f"{where}: expected -1 for the root, got {parent}")
            depths.append(0)
        elif not 0 <= parent < len(parents):
            raise EchoError(f"{where}: expected a row of the same request, 0 to {len(parents) - 1}, got {parent}")
        elif parent >= node:
            at, seen = parent, {node}
            while at not in seen and 0 <= at < len(parents):
                seen.add(at)
                at = parents[at]
            raise EchoError(f"{where}: expected a row before its child, got {parent}{', a cycle' if at in seen else ''}")
        else:
            depths.append(depths[parent] + 1)
    return depths


def _check_nodes(b: int, tokens: list[int], parents: list[int], scores: list[float], depths: list[int], known: list[int] | None) -> None:
    siblings: set[tuple[int, int]] = set()
    for node, depth in enumerate(depths):
        where = f"request {b}, row {node}"
        if tokens[node] < 0:
            raise EchoError(f"token: {where}: expected a token >= 0, got {tokens[node]}")
        if (parents[node], tokens[node]) in siblings:
            raise EchoError(f"token: {where}: expected siblings that differ, got {tokens[node]} twice under row {parents[node]}")
        siblings.add((parents[node], tokens[node]))
        if node and not scores[node] < float("inf"):
            raise EchoError(f"log_prob: {where}: expected a log-probability, got {scores[node]}")
        if known is not None and known[node] != depth:
            raise EchoError(f"depth: {where}: expected {depth}, one below its parent, got {known[node]}")
