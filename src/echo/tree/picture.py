"""A packed step drawn: each request's tree from left to right, how many rows it got for what, and what was accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echo import checks, style
from echo.errors import EchoError
from echo.tree.host import Tree, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.tree.accepted import Accepted
    from echo.tree.packed import PackedTree

FILL = {"root": "#e6e6e6", "depth": "#cde0f3", "width": "#fbe2bb"}
MEANING = {"root": "root", "depth": "bought by depth", "width": "bought by width"}
PALE, RULE = "#6f7a80", "#dcdfe0"
SIZE, SMALL = 9.0, 6.5  # of text, in points
LINE, BOX, HEAD, SPACE = (
    0.27,
    0.2,
    0.34,
    0.16,
)  # inches: a row of nodes, a node's height, a request's title, above it
PAD, GAP, MARGIN = (
    0.07,
    0.34,
    0.3,
)  # inches: around a node's text, between depths, around the figure
LEGEND = 7.0  # inches that it takes


@dataclass
class _Node:
    """A node's text and measures, in inches: width of its token, of the probability beside it, and where its row is."""

    token: str
    chance: str
    kind: str
    taken: bool
    parent: int
    depth: int
    token_width: float
    width: float
    y: float = 0.0


def plot(
    packed: PackedTree,
    requests: Sequence[int] | None,
    accepted: Accepted | None,
    label: Callable[[int], str],
    titles: Sequence[str] | None,
) -> Figure:
    """See :meth:`~echo.tree.packed.PackedTree.plot`."""
    style.require()
    chosen = [
        checks.integer("requests", b, 0, packed.batch - 1)
        for b in (range(packed.batch) if requests is None else requests)
    ]
    if titles is not None and len(titles) != len(chosen):
        raise EchoError(
            f"titles: expected one for each of {len(chosen)} requests, got {len(titles)}"
        )
    trees = [read(packed, b, accepted) for b in chosen]
    drawn = [_nodes(tree, label) for tree in trees]
    names = [f"request {b}" for b in chosen] if titles is None else list(titles)
    facts = [_facts(tree, accepted is not None) for tree in trees]

    left = _columns(drawn)
    heads = [
        _width(name, SIZE) + 0.3 + _width(fact, SIZE)
        for name, fact in zip(names, facts, strict=True)
    ]
    wide = max([left[-1], *heads, LEGEND])
    tall = [SPACE + HEAD + LINE * (1 + max((node.y for node in own), default=0)) for own in drawn]
    size = wide + 2 * MARGIN, 2 * LINE + sum(tall) + 2 * MARGIN
    with style.figure(*size) as figure:
        figure.set_layout_engine("none")
        axis = figure.add_axes((0, 0, 1, 1))  # in inches, from the figure's upper left corner
        axis.set(xlim=(-MARGIN, wide + MARGIN), ylim=(MARGIN - size[1], MARGIN))
        axis.set_axis_off()
        _legend(axis, accepted is not None)
        top = -LINE
        for own, name, fact, height in zip(drawn, names, facts, tall, strict=True):
            axis.plot([0, wide], [top - SPACE / 2] * 2, color=RULE, lw=0.8)
            axis.text(0, top - SPACE - HEAD / 2, name, size=SIZE, color=style.INK, va="center")
            axis.text(
                wide, top - SPACE - HEAD / 2, fact, size=SIZE, color=PALE, va="center", ha="right"
            )
            _draw(axis, own, left, top - SPACE - HEAD - LINE / 2)
            top -= height
        for depth, x in enumerate(left[:-1]):
            axis.text(
                x + PAD,
                top - LINE / 2,
                f"depth {depth}" if depth == 0 else str(depth),
                size=SMALL,
                color=PALE,
                va="center_baseline",
            )
    return figure


def _nodes(tree: Tree, label: Callable[[int], str]) -> list[_Node]:
    """The tree's nodes, each leaf in a row of its own, each parent between its first and its last child."""
    nodes: list[_Node] = []
    for row, token in enumerate(tree.tokens):
        text = label(token)
        chance = "" if row == 0 else f"{math.exp(tree.score[row]):.2f}".lstrip("0")
        token_width = _width(text, SIZE)
        width = token_width + 2 * PAD + (0.06 + _width(chance, SMALL) if chance else 0)
        depth = 0 if row == 0 else nodes[tree.parent[row]].depth + 1
        nodes.append(
            _Node(
                text,
                chance,
                tree.kind(row),
                row in tree.taken,
                tree.parent[row],
                depth,
                token_width,
                width,
            )
        )
    leaves = 0

    def place(row: int) -> float:
        nonlocal leaves
        below = [place(child) for child in tree.below(row)]
        if not below:
            leaves += 1
        nodes[row].y = (below[0] + below[-1]) / 2 if below else leaves - 1
        return nodes[row].y

    for root in tree.below(-1):
        place(root)
    return nodes


def _columns(drawn: Sequence[Sequence[_Node]]) -> list[float]:
    """Where each depth begins, so that its widest node ends before the next; last, where all ends."""
    deepest = max((node.depth for own in drawn for node in own), default=0)
    begins = [0.0]
    for depth in range(deepest + 1):
        begins.append(
            begins[-1]
            + max((node.width for own in drawn for node in own if node.depth == depth), default=0.0)
            + GAP
        )
    begins[-1] -= GAP
    return begins


def _draw(axis: Any, nodes: Sequence[_Node], left: Sequence[float], top: float) -> None:
    """Edges, then boxes over them."""
    for node in nodes:
        if node.parent >= 0:
            above = nodes[node.parent]
            _edge(
                axis,
                left[above.depth] + above.width,
                top - LINE * above.y,
                left[node.depth],
                top - LINE * node.y,
                node.taken,
            )
    for node in nodes:
        x, y = left[node.depth], top - LINE * node.y
        _box(axis, x, y, node.width, node.kind, node.taken)
        axis.text(x + PAD, y, node.token, size=SIZE, color=style.INK, va="center_baseline")
        axis.text(
            x + PAD + node.token_width + 0.06,
            y,
            node.chance,
            size=SMALL,
            color=PALE,
            va="center_baseline",
        )


def _edge(axis: Any, x0: float, y0: float, x1: float, y1: float, taken: bool) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = x1 - GAP / 2
    colour, line = (style.GOOD, 1.8) if taken else (style.QUIET, 0.9)
    path = Path([(x0, y0), (x1 - GAP, y0), (middle, y0), (middle, y1), (x1, y1)], [1, 2, 4, 4, 4])
    axis.add_patch(PathPatch(path, fill=False, ec=colour, lw=line, zorder=1 + taken))


def _box(axis: Any, x: float, y: float, width: float, kind: str, taken: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    corners = f"round,pad=0,rounding_size={BOX / 3}"
    colour, line = (style.GOOD, 1.8) if taken else (style.QUIET, 0.6)
    axis.add_patch(
        FancyBboxPatch(
            (x, y - BOX / 2),
            width,
            BOX,
            boxstyle=corners,
            fc=FILL[kind],
            ec=colour,
            lw=line,
            zorder=3,
        )
    )


def _legend(axis: Any, accepted: bool) -> None:
    x = 0.0
    for kind, taken, text in [
        *((kind, False, text) for kind, text in MEANING.items()),
        *([("depth", True, "accepted")] * accepted),
    ]:
        _box(axis, x, -LINE / 2, 0.26, kind, taken)
        axis.text(x + 0.34, -LINE / 2, text, size=SIZE, color=style.INK, va="center_baseline")
        x += 0.34 + _width(text, SIZE) + 0.3
    axis.text(
        x, -LINE / 2, "numbers: path probability", size=SIZE, color=PALE, va="center_baseline"
    )


def _facts(tree: Tree, accepted: bool) -> str:
    kinds = [tree.kind(row) for row in range(len(tree.tokens))]
    text = f"{tree.status}; {len(kinds)} rows: {kinds.count('depth')} by depth, {kinds.count('width')} by width"
    emitted = len(tree.taken)
    return f"{text}; {emitted} token{'s' * (emitted != 1)} emitted" if accepted else text


def _width(text: str, size: float) -> float:
    """Inches that a text takes."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().x1) / 72 if text.strip() else 0.05
