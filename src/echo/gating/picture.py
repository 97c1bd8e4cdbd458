"""A calibration drawn: what the confidences look like, how well they separate, and what they are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from echo import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.gating.calibration import Calibration, DepthCalibration

COLUMNS = 4
LEAST = 1e-3
"""Left end of the confidence axes: path probabilities are small at depth."""


def plot(calibration: Calibration) -> Figure:
    """See :meth:`Calibration.plot`."""
    rows = -(-calibration.max_depth // COLUMNS)
    with style.figure(13, 2.1 * rows + 3.6) as figure:
        upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[2.1 * rows, 3.6]))
        axes = upper.subplots(rows, min(COLUMNS, calibration.max_depth), squeeze=False).flatten()
        for axis in axes[calibration.max_depth :]:
            axis.set_axis_off()
        for axis, d in zip(axes, calibration.depths, strict=False):
            _histogram(axis, d)
        axes[0].legend()
        auc, reliability = lower.subplots(1, 2)
        _auc(auc, calibration)
        _reliability(reliability, calibration)
    return figure


def _histogram(axis: Any, d: DepthCalibration) -> None:
    """Density of each kind over the logarithm of the confidence, each kind of mass 1 (what lies left of the axis included)."""
    axis.set_title(f"depth {d.depth}{', gate' if d.gate else ''}")
    axis.set(xscale="log", xlim=(LEAST, 1), yticks=[], xlabel="confidence")
    if not d.profile:
        return
    table = np.array(d.profile)
    edges = np.concatenate([[0.0], table[:, 0]]).clip(LEAST, 1.0)
    width = np.diff(np.log(edges))
    for column, colour, name in ((1, style.GOOD, "accepted"), (2, style.BAD, "rejected")):
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
        axis.axvline(max(d.threshold, LEAST), color=style.INK, lw=1.2, label="threshold")


def _auc(axis: Any, calibration: Calibration) -> None:
    for d in calibration.depths:
        if not np.isnan(d.auc):
            axis.plot([d.depth, d.depth], [d.auc_low, d.auc_high], color=style.INK, lw=1.5)
            axis.plot(d.depth, d.auc, "o", color=style.INK, mfc=style.INK if d.gate else "white")
    axis.axhline(calibration.min_auc, color=style.BAD, lw=1, ls="--")
    axis.set(
        title="separability (filled: gate)",
        xlabel="depth",
        ylabel="AUC, 95% interval",
        xticks=range(1, calibration.max_depth + 1),
    )


def _reliability(axis: Any, calibration: Calibration) -> None:
    axis.plot([0, 1], [0, 1], color=style.INK, lw=1, ls=":")
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
