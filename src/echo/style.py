"""How every picture of the project looks, and the one place that needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from echo.errors import EchoError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
