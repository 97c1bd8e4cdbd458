"""Random forests, and a slow pure-Python oracle of everything that packing, compaction and the
exporters do with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

import echo
from echo.tree.packed import pack


def paths(packed: echo.PackedTree, b: int) -> list[list[int]]:
    """The tokens on the way to each row of a request, sorted: its tree, whatever the order of
    its rows.
    """
    found: list[list[int]] = []
    for row in range(*packed.indptr[b : b + 2].tolist()):
        up = int(packed.parent[row])
        found.append([*(found[up] if up >= 0 else []), int(packed.tokens[row])])
    return sorted(found)


@dataclass
class Row:
    """A selected node: ancestors as columns of its request's arrays, root first, itself last."""

    request: int
    path: list[int]
    token: int
    score: float


@dataclass
class Case:
    """A random forest, a selection closed under parents, and the step packed from it."""

    tokens: list[list[int]]
    parents: list[list[int]]
    log_probs: list[list[float]]
    selected: list[set[int]]
    tree: echo.SuperTree
    packed: echo.PackedTree

    def rows(self, b: int) -> list[Row]:
        """The oracle's order: by depth, then by the columns on the way down, which is by parent
        and then candidate.
        """
        paths = sorted(
            (self.path(b, column) for column in self.selected[b]),
            key=lambda path: (len(path), path),
        )
        return [Row(b, path, self.tokens[b][path[-1]], self.score(b, path)) for path in paths]

    def path(self, b: int, column: int) -> list[int]:
        return [*(self.path(b, self.parents[b][column]) if column else []), column]

    def score(self, b: int, path: list[int]) -> float:
        total = torch.tensor(0.0)
        for column in path[1:]:
            total = total + torch.tensor(self.log_probs[b][column])
        return float(total)

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def largest(self) -> int:
        return max(1, *(len(own) for own in self.selected))

    def sees(self, b: int) -> list[list[bool]]:
        """Who sees whom among the rows of a request."""
        rows = self.rows(b)
        return [[other.path == row.path[: len(other.path)] for other in rows] for row in rows]

    def parent_rows(self, b: int) -> list[int]:
        place = {tuple(row.path): i for i, row in enumerate(self.rows(b))}
        return [place.get(tuple(row.path[:-1]), -1) for row in self.rows(b)]


def forest(
    seed: int,
    batch: int,
    most: int,
    *,
    shape: str = "any",
    pads: int = 0,
    empty: bool = True,
    exact: bool = False,
) -> Case:
    """Trees of up to ``most`` nodes, or all of exactly so many; ``any`` or ``chain``."""
    rng = random.Random(seed)
    tokens, parents, log_probs, selected = [], [], [], []
    for _ in range(batch):
        size = 0 if empty and rng.random() < 0.15 else most if exact else rng.randint(1, most)
        deep = rng.random()
        own, up, q = (
            ([rng.randrange(1000)] if size else []),
            ([-1] if size else []),
            ([0.0] if size else []),
        )
        for node in range(1, size):
            parent = node - 1 if shape == "chain" or rng.random() < deep else rng.randrange(node)
            taken = {own[n] for n in range(1, node) if up[n] == parent}
            own.append(rng.choice([t for t in range(len(taken) + 4) if t not in taken]))
            up.append(parent)
            q.append(-rng.random())
        chosen = {0} if size else set()
        keep = 1.0 if exact else rng.choice([1.0, 0.6])
        for node in range(1, size):
            if up[node] in chosen and rng.random() <= keep:
                chosen.add(node)
        for column, target in ((own, tokens), (up, parents), (q, log_probs)):
            target.append(column)
        selected.append(chosen)
    width = max(1, *(len(own) for own in tokens))
    filled = [
        torch.tensor([[*own, *[0] * (width - len(own))] for own in table])
        for table in (tokens, parents, log_probs)
    ]
    lengths = torch.tensor([len(own) for own in tokens])
    tree = echo.SuperTree.from_arrays(filled[0], filled[1], filled[2].float(), num_nodes=lengths)
    case = Case(tokens, parents, log_probs, selected, tree, None)  # type: ignore[arg-type]
    chosen_nodes = torch.zeros_like(tree.forest.committed)
    for b in range(batch):
        places = node_of(case, b)
        for column in selected[b]:
            chosen_nodes[b, places[column]] = True
    rows = sum(len(own) for own in selected) + pads
    case.packed = pack(
        tree, chosen_nodes, max(rows, 1), -(-max(1, *(len(own) for own in selected)) // 32)
    )
    return case


def node_of(case: Case, b: int) -> dict[int, int]:
    """Where each column of a request went among the nodes of the super-tree: by depth, then by
    the columns on the way down.
    """
    offsets, places = [0], {}
    for layer in case.tree.layers:
        offsets.append(offsets[-1] + layer.token.shape[1])
    by_depth: dict[int, list[list[int]]] = {}
    for column in range(len(case.tokens[b])):
        path = case.path(b, column)
        by_depth.setdefault(len(path) - 1, []).append(path)
    for depth, paths in by_depth.items():
        for i, path in enumerate(sorted(paths)):
            places[path[-1]] = offsets[depth] + i
    return places
