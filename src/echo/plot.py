"""Figures of cost models, calibrations and draft trees in one style; trees also as text.

The only module that imports matplotlib, inside the functions that draw.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
PALE, RULE = "#6f7a80", "#dcdfe0"
POLICIES = {
    "EAGLE": "#e9a13b",
    "ECHO": GOOD,
    "throughput-optimal": "#33658a",
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
    """Return the colour of a ``policy`` by the first word of its name; ``QUIET`` for references."""
    first = policy.replace(",", " ").replace("-", " ").split()[0]
    name = "throughput-optimal" if first == "throughput" else first
    return POLICIES.get(name, QUIET)


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of ``width`` by ``height`` inches, to fill and save in the block.

    Raises:
        EchoError: matplotlib is not installed.

    Example:
        >>> with figure(4, 3) as drawn:
        ...     (line,) = drawn.subplots().plot([1, 2], [3, 4], color=of("EAGLE tree"))
        >>> drawn.get_size_inches().tolist(), line.get_color()
        ([4.0, 3.0], '#e9a13b')
    """
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'echo-specdec[plot]'"
        raise EchoError(f"plot: expected matplotlib ({hint}), got no such module")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        drawn.draw_without_rendering()  # otherwise deferred, and drawn in another style


# Cost models and calibrations.


def cost_model(model: CostModel) -> Figure:
    """Draw a cost model: see :meth:`CostModel.plot`."""
    with figure(10, 3.8) as drawn:
        curve, chance = drawn.subplots(1, 2)
        _curve(curve, model)
        # one draft per request (of B) pays above T(2B) / T(B) - 1
        ends = 1, max(2, model.num_tokens[-1] // 2)
        batch = np.unique(np.geomspace(*ends, 200).round().astype(int))
        plain = np.asarray([model(b, num_reqs=b) for b in batch])
        drafted = [model(2 * b, num_reqs=b) + model.draft_seconds(1, b) for b in batch]
        chance.plot(batch, np.asarray(drafted) / plain - 1.0, color=GOOD, lw=1.4)
        chance.axhline(1, color=BAD, lw=1, ls="--")
        chance.text(batch[0], 1.03, "never pays", color=BAD, fontsize="small")
        chance.set(title="one draft for each request pays from", xscale="log", ylim=(0, 1.3))
        chance.set(xlabel="requests", ylabel="acceptance probability")
    return drawn


def _curve(axis: Any, model: CostModel) -> None:
    """Milliseconds by tokens, for up to four numbers of requests, with their knees."""
    counts = model.num_reqs or (1,)
    places = np.unique(np.linspace(0, len(counts) - 1, 4).round().astype(int))
    for i, b in enumerate(counts[place] for place in places):
        curve, shade = model.at(b), (1 - i / 3) * 0.75 * (len(places) > 1)
        colour = (shade, 0.45 + shade / 2, 0.4 + shade / 2)
        grid = np.unique(np.geomspace(b, max(curve.num_tokens), 400).round().astype(int))
        milliseconds, knee = 1e3 * np.asarray(curve(grid)), curve.knee
        text = f"K_max {knee.k_max}" if knee.bends else "no knee"
        many = f"{b} request{'s' * (b > 1)}: " if model.num_reqs else ""
        axis.plot(grid, milliseconds, color=colour, lw=1.4, label=f"{many}{text}")
        spread = milliseconds * (model.error or 0.0)
        low, high = milliseconds - spread, milliseconds + spread
        axis.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)
        if knee.bends:
            axis.plot(knee.k_max, 1e3 * curve(knee.k_max), "o", ms=4, color=BAD, zorder=5)
    if len(counts) == 1:
        knee = model.knee
        law = [1e3 * knee(k) for k in grid]
        axis.plot(grid, law, color=INK, lw=1, ls="--", label=f"law, γ {knee.gamma:.2g}")
        axis.plot(model.num_tokens, 1e3 * np.asarray(model.seconds), "o", ms=3.5, color=GOOD)
        if knee.k_max_interval is not None:
            axis.axvspan(*knee.k_max_interval, color=BAD, alpha=0.15, lw=0, label="K_max, 95%")
    axis.set(title="a step of the target", xscale="log", ylim=(0, None))
    axis.set(xlabel="verify tokens", ylabel="milliseconds")
    axis.legend()


COLUMNS = 4
LEAST = 1e-3
"""Left end of the confidence axes: path probabilities are small at depth."""


def calibration(calibration: Calibration) -> Figure:
    """Draw a calibration: see :meth:`Calibration.plot`."""
    depths = calibration.max_depth
    rows = -(-depths // COLUMNS)
    with figure(13, 2.1 * rows + 3.6) as drawn:
        upper, lower = np.asarray(drawn.subfigures(2, 1, height_ratios=[2.1 * rows, 3.6]))
        axes = upper.subplots(rows, min(COLUMNS, depths), squeeze=False).flatten()
        for axis in axes[depths:]:
            axis.set_axis_off()
        auc, reliability = lower.subplots(1, 2)
        reliability.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
        for axis, d in zip(axes, calibration.depths, strict=False):
            _densities(axis, d)
            if not np.isnan(d.auc):
                auc.plot([d.depth, d.depth], [d.auc_low, d.auc_high], color=INK, lw=1.5)
                auc.plot(d.depth, d.auc, "o", color=INK, mfc=INK if d.gate else "white")
            score, chance = np.array(d.reliability).T
            shade = 0.85 * (d.depth - 1) / max(1, depths - 1)
            colour = (shade, shade * 0.8, 1 - shade)
            reliability.plot(np.exp(score), chance, color=colour, lw=1.3, label=f"depth {d.depth}")
        axes[0].legend()
        auc.axhline(calibration.min_auc, color=BAD, lw=1, ls="--")
        auc.set(title="separability (filled: gate)", xlabel="depth", ylabel="AUC, 95% interval")
        auc.set_xticks(range(1, depths + 1))
        reliability.set(title="reliability", xlim=(0, 1), ylim=(0, 1))
        reliability.set(xlabel="path probability of the draft", ylabel="P(path accepted)")
        reliability.legend(ncols=2)
    return drawn


def _densities(axis: Any, d: DepthCalibration) -> None:
    """Density of each kind over log confidence, of mass 1 including what is left of the axis."""
    axis.set_title(f"depth {d.depth}{', gate' if d.gate else ''}")
    axis.set(xscale="log", xlim=(LEAST, 1), yticks=[], xlabel="confidence")
    if not d.profile:
        return
    ends, accepted, rejected = np.array(d.profile).T
    edges = np.concatenate([[0.0], ends]).clip(LEAST, 1.0)
    width = np.diff(np.log(edges))
    for mass, colour, name in ((accepted, GOOD, "accepted"), (rejected, BAD, "rejected")):
        if mass.sum() > 0:
            density = np.where(width > 0, mass / mass.sum() / np.maximum(width, 0.1), 0.0)
            axis.stairs(density, edges, fill=True, alpha=0.45, color=colour, label=name)
    if d.gate:
        axis.axvline(max(d.threshold, LEAST), color=INK, lw=1.2, label="threshold")


# Draft trees: as text, and drawn.

STATUS = {
    Status.ACTIVE: "still drafting",
    Status.TRUNCATED: "stopped by a gate",
    Status.STARVED: "stopped, no budget remained",
    Status.FINISHED: "drafted to the last layer",
    Status.EXHAUSTED: "nothing to expand",
    Status.EMPTY: "no request",
}


@dataclass
class Node:
    """A node on the host, with its place in a drawing.

    Attributes:
        text: of its token.
        parent: index of its parent among the request's nodes; -1: the root.
        depth: 0 for the root.
        probability: path probability.
        kind: "root", "depth" (committed while drafting) or "width" (selected last).
        accepted: whether it is on the accepted path.
        children: indices.
        y: row of the drawing, one for each leaf; each parent is amid its children.
    """

    text: str
    parent: int
    depth: int
    probability: float
    kind: str
    accepted: bool
    children: list[int] = field(default_factory=list)
    y: float = 0.0

    @property
    def beside(self) -> str:
        """The probability, in small beside the text; none at the root."""
        return f"{self.probability:.2f}".lstrip("0") if self.depth else ""

    @property
    def width(self) -> float:
        """Inches of the box in a drawing."""
        beside = BESIDE + _width(self.beside, SMALL) if self.beside else 0
        return _width(self.text) + 2 * PAD + beside


def read(
    packed: PackedTree, request: int, accepted: Accepted | None, label: Callable[[int], str]
) -> list[Node]:
    """Read the nodes of one ``request`` of ``packed``, in order, and whether each is ``accepted``.

    ``label`` gives a token's text. Synchronizes with the device; EchoError: no such request.
    """
    request = checks.integer("request", request, 0, packed.batch - 1)
    first, end = packed.indptr[request : request + 2].tolist()
    p = packed.score.double().exp()
    columns = packed.tokens, packed.parent, packed.depth, p, packed.committed
    path = set() if accepted is None else set(accepted.rows[request].tolist())
    nodes: list[Node] = []
    rows = zip(*(column[first:end].tolist() for column in columns), strict=True)
    for row, (token, parent, depth, probability, committed) in enumerate(rows):
        kind = "root" if row == 0 else "depth" if committed else "width"
        nodes.append(Node(label(token), parent, depth, probability, kind, first + row in path))
        if row:
            nodes[parent].children.append(row)
    leaf = itertools.count()

    def place(node: Node) -> float:
        below = [place(nodes[child]) for child in node.children]
        node.y = (below[0] + below[-1]) / 2 if below else next(leaf)
        return node.y

    if nodes:
        place(nodes[0])
    return nodes


def render(
    packed: PackedTree, request: int, accepted: Accepted | None, label: Callable[[int], str]
) -> str:
    """Draw one tree as text: see :meth:`~echo.tree.packed.PackedTree.render`."""
    nodes = read(packed, request, accepted, label)
    lines: list[tuple[str, str]] = []

    def draw(node: Node, lead: str, branch: str, below: str) -> None:
        mark = "  accepted" if node.accepted else ""
        lines.append((lead + branch + node.text, f"{node.probability:6.3f}  {node.kind}{mark}"))
        for child in node.children:
            ends = ("└─ ", "   ") if child == node.children[-1] else ("├─ ", "│  ")
            draw(nodes[child], lead + below, *ends)

    if not nodes:
        return f"request {request}: no rows"
    draw(nodes[0], "", "", "")
    width = max(len(text) for text, _ in lines)
    return "\n".join(f"{text:<{width}}  {facts}" for text, facts in lines)


FILL = {"root": "#e6e6e6", "depth": "#cde0f3", "width": "#fbe2bb"}
LEGEND = {"root": "root", "selected by depth": "depth", "selected by width": "width"}
SIZE, SMALL = 9.0, 6.5  # of text, in points
# Inches: a row of nodes, a node's height, a request's title, the space above it.
LINE, BOX, HEAD, SPACE = 0.27, 0.2, 0.34, 0.16
# Inches: around a node's text, between token and probability, depths, around the figure.
PAD, BESIDE, GAP, MARGIN = 0.07, 0.06, 0.34, 0.3
LEGEND_WIDTH = 7.4


def packed_tree(
    packed: PackedTree,
    requests: Sequence[int] | None,
    accepted: Accepted | None,
    label: Callable[[int], str],
    titles: Sequence[str] | None,
) -> Figure:
    """Draw trees: see :meth:`~echo.tree.packed.PackedTree.plot`.

    Example:
        >>> import echo, torch
        >>> plain = echo.ElasticBudgetScheduler.autoregressive()
        >>> packed = plain.pack(plain.begin(torch.tensor([7])))
        >>> read(packed, 0, None, str)[0].kind, render(packed, 0, None, str)
        ('root', '7   1.000  root')
        >>> made = echo.calibrate(echo.WarmupLog.from_arrays([1, 1], [0.9, 0.2], [1, 0]))
        >>> model, tree = echo.CostModel((1, 64), (0.01, 0.02)), (packed, None, None, str, None)
        >>> [len(one.axes) for one in (packed_tree(*tree), cost_model(model), calibration(made))]
        [1, 2, 3]
    """
    wanted = range(packed.batch) if requests is None else requests
    chosen = [checks.integer("requests", b, 0, packed.batch - 1) for b in wanted]
    names = [f"request {b}" for b in chosen] if titles is None else list(titles)
    if len(names) != len(chosen):
        expected = f"titles: expected one for each of {len(chosen)} requests"
        raise EchoError(f"{expected}, got {len(names)}")
    trees = [read(packed, b, accepted, label) for b in chosen]
    facts = [_facts(packed, b, t, accepted) for b, t in zip(chosen, trees, strict=True)]
    lines = [1 + max((node.y for node in tree), default=0) for tree in trees]
    tall = 2 * LINE + sum(SPACE + HEAD + LINE * count for count in lines) + 2 * MARGIN
    with figure(1, tall) as drawn:
        widest = collections.defaultdict[int, float](float)  # node of each depth
        for node in itertools.chain(*trees):
            widest[node.depth] = max(widest[node.depth], node.width)
        left = [0.0, *itertools.accumulate(widest[depth] + GAP for depth in sorted(widest))]
        heads = [_width(n) + 0.3 + _width(f) for n, f in zip(names, facts, strict=True)]
        wide = max([left[-1] - GAP, *heads, LEGEND_WIDTH])
        drawn.set_size_inches(wide + 2 * MARGIN, tall)
        drawn.set_layout_engine("none")
        axis = drawn.add_axes((0, 0, 1, 1))  # in inches, from the figure's upper left corner
        axis.set(xlim=(-MARGIN, wide + MARGIN), ylim=(MARGIN - tall, MARGIN))
        axis.set_axis_off()
        x = 0.0
        for text, kind in (LEGEND if accepted is None else LEGEND | {"accepted": "depth"}).items():
            node = Node(text, -1, 0, 1.0, kind, text == "accepted")
            _box(axis, x, -LINE / 2, node)
            x += node.width + MARGIN
        _text(axis, x, -LINE / 2, "numbers: path probability", color=PALE)
        top = -LINE
        for tree, name, fact, count in zip(trees, names, facts, lines, strict=True):
            axis.plot([0, wide], [top - SPACE / 2] * 2, color=RULE, lw=0.8)
            _text(axis, 0, top - SPACE - HEAD / 2, name)
            _text(axis, wide, top - SPACE - HEAD / 2, fact, color=PALE, ha="right")
            top -= SPACE + HEAD
            _draw(axis, tree, left, top - LINE / 2)
            top -= LINE * count
        for depth, x in enumerate(left[:-1]):
            name = str(depth) if depth else "depth 0"
            _text(axis, x + PAD, top - LINE / 2, name, size=SMALL, color=PALE)
    return drawn


def _facts(packed: PackedTree, request: int, nodes: list[Node], accepted: Accepted | None) -> str:
    kinds = [node.kind for node in nodes]
    status = STATUS[Status(int(packed.status[request]))]
    counts = f"{kinds.count('depth')} by depth, {kinds.count('width')} by width"
    emitted = sum(node.accepted for node in nodes)
    end = "" if accepted is None else f"; {emitted} token{'s' * (emitted != 1)} emitted"
    return f"{status}; {len(kinds)} rows: {counts}{end}"


def _draw(axis: Any, nodes: Sequence[Node], left: Sequence[float], top: float) -> None:
    """Draw each node's edge from its parent, and boxes over the edges."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for node in nodes:
        x, y = left[node.depth], top - LINE * node.y
        if node.depth:
            above = nodes[node.parent]
            x0, y0 = left[above.depth] + above.width, top - LINE * above.y
            bend, middle = x - GAP, x - GAP / 2
            path = Path([(x0, y0), (bend, y0), (middle, y0), (middle, y), (x, y)], [1, 2, 4, 4, 4])
            colour, line = (GOOD, 1.8) if node.accepted else (QUIET, 0.9)
            order = 1 + node.accepted
            axis.add_patch(PathPatch(path, fill=False, ec=colour, lw=line, zorder=order))
        _box(axis, x, y, node)


def _box(axis: Any, x: float, y: float, node: Node) -> None:
    from matplotlib.patches import FancyBboxPatch

    corners, fill = f"round,pad=0,rounding_size={BOX / 3}", FILL[node.kind]
    colour, line = (GOOD, 1.8) if node.accepted else (QUIET, 0.6)
    look: dict[str, Any] = {"boxstyle": corners, "fc": fill, "ec": colour, "lw": line, "zorder": 3}
    axis.add_patch(FancyBboxPatch((x, y - BOX / 2), node.width, BOX, **look))
    _text(axis, x + PAD, y, node.text)
    _text(axis, x + PAD + _width(node.text) + BESIDE, y, node.beside, size=SMALL, color=PALE)


def _text(axis: Any, x: float, y: float, text: str, **look: Any) -> None:
    axis.text(x, y, text, **{"size": SIZE, "color": INK, "va": "center_baseline"} | look)


@functools.lru_cache(4096)
def _width(text: str, size: float = SIZE) -> float:
    """Width of a text in inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().x1) / 72 if text.strip() else 0.05
