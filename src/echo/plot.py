"""How every picture of the project looks, and the one place that needs matplotlib."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels.codes import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.cost.model import CostModel
    from echo.gating.calibration import Calibration, DepthCalibration
    from echo.tree.accept import Accepted
    from echo.tree.packed import PackedTree

GOOD, BAD, INK, QUIET = "#2a7f62", "#d1495b", "#22333b", "#9aa5ab"
POLICIES = {
    "EAGLE": "#e9a13b",
    "ECHO": GOOD,
    "goodput": "#33658a",
    "global": "#7b4b94",
    "DDD": "#8d6e63",
}
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def of(policy: str) -> str:
    """A policy's colour, by the first word of its name; the quiet one for what is only there to compare with."""
    return POLICIES.get(policy.replace(",", " ").replace("-", " ").split()[0], QUIET)


def require() -> None:
    """Says how to get matplotlib where it is missing.

    Raises:
        EchoError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EchoError(
            "plot: expected matplotlib (pip install 'echo-specdec[plot]'), got no such module"
        )


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of that many inches, to be filled and saved in the block; without pyplot's global state.

    Raises:
        EchoError: matplotlib is not installed.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        drawn.draw_without_rendering()  # makes what matplotlib leaves until then, in the same look


def cost_model(model: CostModel) -> Figure:
    """See :meth:`CostModel.plot`."""
    with figure(10, 3.8) as drawn:
        curve, chance = drawn.subplots(1, 2)
        _curve(curve, model)
        _chance(chance, model)
    return drawn


def _curve(axis: Any, model: CostModel) -> None:
    """Milliseconds by rows; the paper's law and its K_max with its interval; one line more where requests cost by themselves."""
    rows, knee = np.asarray(model.num_tokens), model.knee
    grid = np.unique(np.geomspace(1, rows[-1], 400).round().astype(int))
    axis.plot(
        rows,
        1e3 * np.asarray(model.seconds),
        "o",
        ms=3.5,
        color=GOOD,
        label="measured, fitted",
    )
    axis.plot(
        grid,
        1e3 * np.asarray(model(grid)),
        color=GOOD,
        lw=1.4,
        label="with tiers" if model.tiers else None,
    )
    axis.plot(
        grid,
        [1e3 * knee(r) for r in grid],
        color=INK,
        lw=1,
        ls="--",
        label=f"law: K_max {knee.k_max}, γ {knee.gamma:.2g}",
    )
    axis.axvline(knee.k_max, color=BAD, lw=1)
    if knee.k_max_interval is not None:
        axis.axvspan(*knee.k_max_interval, color=BAD, alpha=0.15, lw=0, label="K_max, 95%")
    if len(model.num_reqs) > 1:
        most = model.num_reqs[-1]
        axis.plot(
            grid,
            1e3 * np.asarray(model(grid, num_reqs=most)),
            color=QUIET,
            lw=1.4,
            label=f"{most} requests",
        )
    axis.set(
        title="a step of the target",
        xlabel="rows",
        ylabel="milliseconds",
        xscale="log",
        ylim=(0, None),
    )
    axis.legend()


def _chance(axis: Any, model: CostModel) -> None:
    """One drafted row more in a plain step of B requests pays from the chance (T(B + B) - T(B)) / T(B) on, were each given one."""
    batch = np.unique(np.geomspace(1, max(2, model.num_tokens[-1] // 2), 200).round().astype(int))
    plain = np.asarray([model(b, num_reqs=b) for b in batch])
    drafted = np.asarray([model(2 * b, num_reqs=b) + model.draft_seconds(1, b) for b in batch])
    axis.plot(batch, drafted / plain - 1.0, color=GOOD, lw=1.4)
    axis.axhline(1, color=BAD, lw=1, ls="--")
    axis.set(
        title="one draft for each request pays from",
        xlabel="requests",
        ylabel="chance of acceptance",
        xscale="log",
        ylim=(0, 1.3),
    )
    axis.text(batch[0], 1.03, "never pays", color=BAD, fontsize="small")


COLUMNS = 4
LEAST = 1e-3
"""Left end of the confidence axes: path probabilities are small at depth."""


def calibration(calibration: Calibration) -> Figure:
    """See :meth:`Calibration.plot`."""
    rows = -(-calibration.max_depth // COLUMNS)
    with figure(13, 2.1 * rows + 3.6) as drawn:
        upper, lower = np.asarray(drawn.subfigures(2, 1, height_ratios=[2.1 * rows, 3.6]))
        axes = upper.subplots(rows, min(COLUMNS, calibration.max_depth), squeeze=False).flatten()
        for axis in axes[calibration.max_depth :]:
            axis.set_axis_off()
        for axis, d in zip(axes, calibration.depths, strict=False):
            _calibration_histogram(axis, d)
        axes[0].legend()
        auc, reliability = lower.subplots(1, 2)
        _auc(auc, calibration)
        _reliability(reliability, calibration)
    return drawn


def _calibration_histogram(axis: Any, d: DepthCalibration) -> None:
    """Density of each kind over the logarithm of the confidence, each kind of mass 1 (what lies left of the axis included)."""
    axis.set_title(f"depth {d.depth}{', gate' if d.gate else ''}")
    axis.set(xscale="log", xlim=(LEAST, 1), yticks=[], xlabel="confidence")
    if not d.profile:
        return
    table = np.array(d.profile)
    edges = np.concatenate([[0.0], table[:, 0]]).clip(LEAST, 1.0)
    width = np.diff(np.log(edges))
    for column, colour, name in ((1, GOOD, "accepted"), (2, BAD, "rejected")):
        if table[:, column].sum() > 0:
            density = table[:, column] / table[:, column].sum() / np.maximum(width, 0.1)
            axis.stairs(
                np.where(width > 0, density, 0.0),
                edges,
                fill=True,
                alpha=0.45,
                color=colour,
                label=name,
            )
    if d.gate:
        axis.axvline(max(d.threshold, LEAST), color=INK, lw=1.2, label="threshold")


def _auc(axis: Any, calibration: Calibration) -> None:
    for d in calibration.depths:
        if not np.isnan(d.auc):
            axis.plot([d.depth, d.depth], [d.auc_low, d.auc_high], color=INK, lw=1.5)
            axis.plot(d.depth, d.auc, "o", color=INK, mfc=INK if d.gate else "white")
    axis.axhline(calibration.min_auc, color=BAD, lw=1, ls="--")
    axis.set(
        title="separability (filled: gate)",
        xlabel="depth",
        ylabel="AUC, 95% interval",
        xticks=range(1, calibration.max_depth + 1),
    )


def _reliability(axis: Any, calibration: Calibration) -> None:
    axis.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
    for d in calibration.depths:
        score, chance = np.array(d.reliability).T
        shade = 0.85 * (d.depth - 1) / max(1, calibration.max_depth - 1)
        axis.plot(
            np.exp(score),
            chance,
            color=(shade, shade * 0.8, 1 - shade),
            lw=1.3,
            label=f"depth {d.depth}",
        )
    axis.set(
        title="reliability",
        xlabel="path probability of the draft",
        ylabel="P(path accepted)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend(ncols=2)


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


def packed_tree(
    packed: PackedTree,
    requests: Sequence[int] | None,
    accepted: Accepted | None,
    label: Callable[[int], str],
    titles: Sequence[str] | None,
) -> Figure:
    """See :meth:`~echo.tree.packed.PackedTree.plot`."""
    require()
    chosen = [
        checks.integer("requests", b, 0, packed.batch - 1)
        for b in (range(packed.batch) if requests is None else requests)
    ]
    if titles is not None and len(titles) != len(chosen):
        raise EchoError(
            f"titles: expected one for each of {len(chosen)} requests, got {len(titles)}"
        )
    trees = [read(packed, b, accepted) for b in chosen]
    nodes = [_nodes(tree, label) for tree in trees]
    names = [f"request {b}" for b in chosen] if titles is None else list(titles)
    facts = [_facts(tree, accepted is not None) for tree in trees]

    left = _columns(nodes)
    heads = [
        _width(name, SIZE) + 0.3 + _width(fact, SIZE)
        for name, fact in zip(names, facts, strict=True)
    ]
    wide = max([left[-1], *heads, LEGEND])
    tall = [SPACE + HEAD + LINE * (1 + max((node.y for node in own), default=0)) for own in nodes]
    size = wide + 2 * MARGIN, 2 * LINE + sum(tall) + 2 * MARGIN
    with figure(*size) as drawn:
        drawn.set_layout_engine("none")
        axis = drawn.add_axes((0, 0, 1, 1))  # in inches, from the figure's upper left corner
        axis.set(xlim=(-MARGIN, wide + MARGIN), ylim=(MARGIN - size[1], MARGIN))
        axis.set_axis_off()
        _legend(axis, accepted is not None)
        top = -LINE
        for own, name, fact, height in zip(nodes, names, facts, tall, strict=True):
            axis.plot([0, wide], [top - SPACE / 2] * 2, color=RULE, lw=0.8)
            axis.text(0, top - SPACE - HEAD / 2, name, size=SIZE, color=INK, va="center")
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
    return drawn


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
        axis.text(x + PAD, y, node.token, size=SIZE, color=INK, va="center_baseline")
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
    colour, line = (GOOD, 1.8) if taken else (QUIET, 0.9)
    path = Path([(x0, y0), (x1 - GAP, y0), (middle, y0), (middle, y1), (x1, y1)], [1, 2, 4, 4, 4])
    axis.add_patch(PathPatch(path, fill=False, ec=colour, lw=line, zorder=1 + taken))


def _box(axis: Any, x: float, y: float, width: float, kind: str, taken: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    corners = f"round,pad=0,rounding_size={BOX / 3}"
    colour, line = (GOOD, 1.8) if taken else (QUIET, 0.6)
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
        axis.text(x + 0.34, -LINE / 2, text, size=SIZE, color=INK, va="center_baseline")
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


WHY = {
    Status.ACTIVE: "still drafting",
    Status.TRUNCATED: "stopped by a gate",
    Status.STARVED: "stopped for want of rows",
    Status.FINISHED: "drafted to the last layer",
    Status.EXHAUSTED: "nothing to draft on",
    Status.EMPTY: "no request",
}


@dataclass(frozen=True)
class Tree:
    """One request's tree on the host.

    Attributes:
        tokens, parent, score, committed: of each row; parents local.
        taken: local rows of the accepted path.
        status: why it stopped drafting, in words.
    """

    tokens: list[int]
    parent: list[int]
    score: list[float]
    committed: list[bool]
    taken: frozenset[int]
    status: str

    def kind(self, row: int) -> str:
        """What the row was bought for."""
        return "root" if row == 0 else "depth" if self.committed[row] else "width"

    def below(self, row: int) -> list[int]:
        """The row's children; below -1, the root."""
        return [child for child, up in enumerate(self.parent) if up == row]


def read(packed: PackedTree, request: int, accepted: Accepted | None = None) -> Tree:
    """One request's tree, read back."""
    request = checks.integer("request", request, 0, packed.batch - 1)
    first, end = packed.indptr[request : request + 2].tolist()
    tokens, parent, score, bought = (
        x[first:end].tolist()
        for x in (packed.tokens, packed.parent, packed.score, packed.committed)
    )
    taken = (
        ()
        if accepted is None
        else (row - first for row in accepted.rows[request].tolist() if row >= 0)
    )
    return Tree(
        tokens, parent, score, bought, frozenset(taken), WHY[Status(int(packed.status[request]))]
    )


def render(
    packed: PackedTree, request: int, accepted: Accepted | None, label: Callable[[int], str]
) -> str:
    """A picture of one request's tree in text; see :meth:`~echo.tree.packed.PackedTree.render`."""
    tree = read(packed, request, accepted)
    lines: list[tuple[str, str]] = []

    def draw(row: int, lead: str, branch: str, below: str) -> None:
        facts = f"{math.exp(tree.score[row]):6.3f}  {tree.kind(row)}{'  accepted' if row in tree.taken else ''}"
        lines.append((f"{lead}{branch}{label(tree.tokens[row])}", facts))
        children = tree.below(row)
        for child in children:
            last = child == children[-1]
            draw(child, lead + below, "└─ " if last else "├─ ", "   " if last else "│  ")

    for root in tree.below(-1):
        draw(root, "", "", "")
    width = max((len(text) for text, _ in lines), default=0)
    return (
        "\n".join(f"{text:<{width}}  {facts}" for text, facts in lines)
        or f"request {request}: no rows"
    )
