"""A cost model drawn: what rows cost, where they stop being free, and from which batch on a draft no longer pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from echo import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from echo.cost.model import CostModel


def plot(model: CostModel) -> Figure:
    """See :meth:`CostModel.plot`."""
    with style.figure(10, 3.8) as figure:
        curve, chance = figure.subplots(1, 2)
        _curve(curve, model)
        _chance(chance, model)
    return figure


def _curve(axis: Any, model: CostModel) -> None:
    """Milliseconds by rows; the paper's law and its K_max with its interval; one line more where requests cost by themselves."""
    rows, knee = np.asarray(model.num_tokens), model.knee
    grid = np.unique(np.geomspace(1, rows[-1], 400).round().astype(int))
    axis.plot(
        rows,
        1e3 * np.asarray(model.seconds),
        "o",
        ms=3.5,
        color=style.GOOD,
        label="measured, fitted",
    )
    axis.plot(
        grid,
        1e3 * np.asarray(model(grid)),
        color=style.GOOD,
        lw=1.4,
        label="with tiers" if model.tiers else None,
    )
    axis.plot(
        grid,
        [1e3 * knee(r) for r in grid],
        color=style.INK,
        lw=1,
        ls="--",
        label=f"law: K_max {knee.k_max}, γ {knee.gamma:.2g}",
    )
    axis.axvline(knee.k_max, color=style.BAD, lw=1)
    if knee.k_max_interval is not None:
        axis.axvspan(*knee.k_max_interval, color=style.BAD, alpha=0.15, lw=0, label="K_max, 95%")
    if len(model.num_reqs) > 1:
        most = model.num_reqs[-1]
        axis.plot(
            grid,
            1e3 * np.asarray(model(grid, num_reqs=most)),
            color=style.QUIET,
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
    axis.plot(batch, drafted / plain - 1.0, color=style.GOOD, lw=1.4)
    axis.axhline(1, color=style.BAD, lw=1, ls="--")
    axis.set(
        title="one draft for each request pays from",
        xlabel="requests",
        ylabel="chance of acceptance",
        xscale="log",
        ylim=(0, 1.3),
    )
    axis.text(batch[0], 1.03, "never pays", color=style.BAD, fontsize="small")
