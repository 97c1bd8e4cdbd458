"""The demo's picture: confidence and AUC by depth, the cost curve, throughput by policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import echo
from echo import plot

AT = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}


def draw(log: echo.WarmupLog, calibration, cost, k_max: int, runs, path: Path, plain: str) -> None:
    """Writes the picture.

    Args:
        log: the warm-up log.
        calibration, cost: what was made of it, and of the machine.
        k_max: the budget, in rows.
        runs: of the demo.
        path: PNG file.
        plain: the policy that the others are compared with.
    """
    with plot.figure(12, 8) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        _histograms(upper, log, calibration)
        auc, curve, bars = lower.subplots(1, 3, width_ratios=(1, 1, 1.7))
        _auc(auc, calibration)
        _cost(curve, cost, k_max)
        _throughput(bars, runs, plain)
        figure.savefig(path, dpi=150)


def _histograms(figure, log: echo.WarmupLog, calibration: echo.Calibration) -> None:
    axes = np.atleast_1d(figure.subplots(1, calibration.max_depth, sharey=True))
    bins, kinds = np.linspace(0, 1, 21), ((plot.BAD, "rejected"), (plot.GOOD, "accepted"))
    for axis, d in zip(axes, calibration.depths, strict=True):
        here = (log.depth == d.depth) & (log.rank == 0)
        for accepted, (colour, label) in enumerate(kinds):
            rows = log.confidence[here & (log.accepted == accepted)]
            weights = np.full(len(rows), 1 / max(1, len(rows)))
            axis.hist(rows, bins, weights=weights, color=colour, alpha=0.6, label=label)
        if d.gate:
            axis.axvline(d.threshold, color=plot.INK, lw=1.5)
            label, place = f"gate\n{d.threshold:.2f}", (d.threshold, 0.97)
            axis.annotate(label, place, (4, 0), va="top", color=plot.INK, **AT)
        axis.set(title=f"depth {d.depth}", xlabel="path confidence")
    axes[0].set_ylabel("share of rows")
    axes[-1].legend(loc="center right")
    title = "Where confidence separates accepted from rejected drafts"
    figure.suptitle(title, fontsize=12, fontweight="bold")


def _auc(axis, calibration: echo.Calibration) -> None:
    depth = [d.depth for d in calibration.depths]
    auc = np.array([d.auc for d in calibration.depths])
    spread = np.abs(np.array([[d.auc_low, d.auc_high] for d in calibration.depths]).T - auc)
    axis.errorbar(depth, auc, spread, color=plot.QUIET, fmt="none", capsize=3)
    fill = [plot.INK if d.gate else "white" for d in calibration.depths]
    axis.scatter(depth, auc, c=fill, edgecolor=plot.INK, zorder=3)
    axis.axhline(calibration.min_auc, color=plot.BAD, lw=1, ls="--")
    axis.set(xlabel="depth", title="AUC by depth (filled: gate)", xticks=depth)


def _cost(axis, cost: echo.CostModel, k_max: int) -> None:
    rows, knee = np.array(cost.num_tokens), cost.knee
    axis.plot(rows, 1e3 * np.array(cost.seconds), "o-", color=plot.INK, ms=4, label="measured")
    fine, fit = np.linspace(1, rows[-1], 200), f"T (1 + γ max(0, K - {knee.k_max}))"
    axis.plot(fine, [1e3 * knee(k) for k in fine], color=plot.BAD, lw=1, ls="--", label=fit)
    axis.axvline(k_max, color=plot.QUIET, lw=1)
    axis.annotate(f"K_max = {k_max}", (k_max, 0.02), (5, 0), color=plot.INK, **AT)
    axis.set_ylim(0)
    axis.set(xlabel="rows verified in one step", ylabel="ms", title="What a step costs here")
    axis.legend()


def _throughput(axis, runs, plain: str) -> None:
    batches = sorted({run.batch for run in runs})
    names = list(dict.fromkeys(run.policy for run in runs))
    speed = {(run.batch, run.policy): run.figures()["tokens_per_second"] for run in runs}
    width, highest = 0.8 / len(names), 1.0
    for i, name in enumerate(names):
        ratio = [speed[b, name] / speed[b, plain] for b in batches]
        at = np.arange(len(batches)) + (i - (len(names) - 1) / 2) * width
        bars = axis.bar(at, ratio, width * 0.92, color=plot.of(name), label=name)
        labels = [f"{r:.2f}" for r in ratio]
        if name == plain:
            labels = [f"{speed[b, name]:.0f}\ntok/s" for b in batches]
        axis.bar_label(bars, labels, fontsize=7, padding=2)
        highest = max(highest, *ratio)
    axis.axhline(1, color=plot.INK, lw=0.8)
    axis.set_xticks(range(len(batches)), [f"batch {b}" for b in batches])
    axis.set(ylabel="throughput / plain decoding", title="Throughput by batch and policy")
    axis.legend(ncols=2, loc="upper right")
    axis.set_ylim(0, 1.25 * highest)
