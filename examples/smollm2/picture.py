"""The demo's picture: what calibration saw, what the machine costs, and what each policy made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import echo
from echo import plot


def draw(
    log: echo.WarmupLog,
    calibration: echo.Calibration,
    cost: echo.CostModel,
    k_max: int,
    runs,
    path: Path,
    plain: str,
) -> None:
    """Writes the picture.

    Args:
        log: the warm-up rows.
        calibration, cost: what was made of them, and of the machine.
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
    axes = figure.subplots(1, calibration.max_depth, sharey=True)
    bins = np.linspace(0, 1, 21)
    for axis, d in zip(np.atleast_1d(axes), calibration.depths, strict=True):
        here = (log.depth == d.depth) & (log.rank == 0)
        for accepted, colour, label in (
            (False, plot.BAD, "rejected"),
            (True, plot.GOOD, "accepted"),
        ):
            rows = log.confidence[here & (log.accepted == accepted)]
            axis.hist(
                rows,
                bins,
                weights=np.full(len(rows), 1 / max(1, len(rows))),
                color=colour,
                alpha=0.6,
                label=label,
            )
        if d.gate:
            axis.axvline(d.threshold, color=plot.INK, lw=1.5)
            label = f"gate\n{d.threshold:.2f}"
            at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axis.annotate(label, (d.threshold, 0.97), xytext=(4, 0), va="top", color=plot.INK, **at)
        axis.set_title(f"depth {d.depth}")
        axis.set_xlabel("path confidence")
    np.atleast_1d(axes)[0].set_ylabel("share of rows")
    np.atleast_1d(axes)[-1].legend(loc="center right")
    figure.suptitle(
        "Where confidence separates accepted from rejected drafts", fontsize=12, fontweight="bold"
    )


def _auc(axis, calibration: echo.Calibration) -> None:
    depth = [d.depth for d in calibration.depths]
    auc = np.array([d.auc for d in calibration.depths])
    spread = np.abs(np.array([[d.auc_low, d.auc_high] for d in calibration.depths]).T - auc)
    axis.errorbar(depth, auc, spread, color=plot.QUIET, fmt="none", capsize=3)
    gates = [d.gate for d in calibration.depths]
    axis.scatter(
        depth, auc, c=[plot.INK if g else "white" for g in gates], edgecolor=plot.INK, zorder=3
    )
    axis.axhline(calibration.min_auc, color=plot.BAD, lw=1, ls="--")
    axis.set_xlabel("depth")
    axis.set_title("AUC by depth (filled: gate)")
    axis.set_xticks(depth)


def _cost(axis, cost: echo.CostModel, k_max: int) -> None:
    rows = np.array(cost.num_tokens)
    knee = cost.knee
    axis.plot(rows, 1e3 * np.array(cost.seconds), "o-", color=plot.INK, ms=4, label="measured")
    fine = np.linspace(1, rows[-1], 200)
    axis.plot(
        fine,
        [1e3 * knee(k) for k in fine],
        color=plot.BAD,
        lw=1,
        ls="--",
        label=f"T (1 + γ max(0, K - {knee.k_max}))",
    )
    axis.axvline(k_max, color=plot.QUIET, lw=1)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axis.annotate(f"K_max = {k_max}", (k_max, 0.02), (5, 0), color=plot.INK, **at)
    axis.set_ylim(0)
    axis.set_xlabel("rows verified in one step")
    axis.set_ylabel("ms")
    axis.set_title("What a step costs here")
    axis.legend()


def _throughput(axis, runs, plain: str) -> None:
    batches = sorted({run.batch for run in runs})
    names = list(dict.fromkeys(run.policy for run in runs))
    speed = {(run.batch, run.policy): run.figures()["tokens_per_second"] for run in runs}
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ratio = [speed[b, name] / speed[b, plain] for b in batches]
        at = np.arange(len(batches)) + (i - (len(names) - 1) / 2) * width
        bars = axis.bar(at, ratio, width * 0.92, color=plot.of(name), label=name)
        labels = [
            f"{speed[b, name]:.0f}\ntok/s" if name == plain else f"{r:.2f}"
            for b, r in zip(batches, ratio, strict=True)
        ]
        axis.bar_label(bars, labels, fontsize=7, padding=2)
    axis.axhline(1, color=plot.INK, lw=0.8)
    axis.set_xticks(range(len(batches)), [f"batch {b}" for b in batches])
    axis.set_ylabel("throughput / plain decoding")
    axis.set_title("Throughput by batch and policy")
    axis.legend(ncols=2, loc="upper right")
    axis.set_ylim(0, 1.25 * max(speed[b, n] / speed[b, plain] for b in batches for n in names))
