"""How the library's own pictures look, and the one place that needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echo.errors import EchoError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOOD, BAD, PLAIN, QUIET = "#1b7837", "#c2593f", "#555555", "#b8bfc4"


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, without pyplot's global state.

    Raises:
        EchoError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EchoError("plot: expected matplotlib (pip install 'echo-specdec[plot]'), got no such module") from error
    return Figure(figsize=(width, height), layout="constrained")
