"""The pictures of real_data.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from echo import style

PAPER, GOODPUT = style.of("ECHO"), style.of("goodput")


def draw(result: dict[str, Any], images: Path) -> None:
    """Four pictures: warm_up_size, transfer, gates_and_rules, predictors (.png)."""
    for name, panel, columns, size in (
        ("warm_up_size", _size, 2, (9, 3.2)),
        ("transfer", _transfer, 2, (9.5, 3.6)),
        ("gates_and_rules", _gates, 2, (9, 3.2)),
        ("predictors", _predictors, 2, (10.5, 3.8)),
    ):
        with style.figure(*size) as figure:
            panel(figure.subplots(1, columns, sharey=name == "predictors"), result)
            figure.savefig(images / f"{name}.png", dpi=110)


def _size(axes: Any, result: dict[str, Any]) -> None:
    rows = result["warm_up_size"]
    texts = [row["texts"] for row in rows]
    for gates, other, colour in (("at most 3", "at most 4", style.QUIET), ("at most 4", "at most 3", PAPER)):
        axes[0].plot(texts, [row["most_common"][gates]["share"] for row in rows], "o-", color=colour, label=f"{gates} gates")
        for x, row in zip(texts, rows, strict=True):
            mine, label = row["most_common"][gates], "·".join(map(str, row["most_common"][gates]["gates"]))
            above = mine["share"] > row["most_common"][other]["share"]
            axes[0].annotate(label, (x, mine["share"] + (0.03 if above else -0.08)), color=colour, fontsize=7, ha="center")
    axes[0].axhline(0.95, color=style.INK, lw=0.8, ls=":")
    axes[0].set(xscale="log", ylim=(0, 1.1), xlabel="texts in the log", ylabel="share of the most common choice", title="which gates")
    axes[0].set_xticks(texts, [str(n) for n in texts])
    axes[0].legend(loc="lower right")
    worth = result["worth_of_size"]
    texts = [row["texts"] for row in worth]
    axes[1].plot(texts, [100 * row["change"] for row in worth], "o-", color=PAPER)
    axes[1].fill_between(texts, [100 * row["worst"] for row in worth], [100 * row["best"] for row in worth], color=PAPER, alpha=0.15, lw=0)
    axes[1].axhline(0, color=style.INK, lw=0.8)
    axes[1].set(
        xscale="log", xlabel="texts in the log", ylabel="tokens a second, % of 32 texts'", title="what they are worth on other texts"
    )
    axes[1].set_xticks(texts, [str(n) for n in texts])


def _transfer(axes: Any, result: dict[str, Any]) -> None:
    kinds, sources = result["transfer"]["kinds"], result["transfer"]["sources"]
    for axis, name in zip(axes, ("gates of the paper", "goodput"), strict=True):
        cells = result["transfer"][name]
        values = np.array([[100 * cells[s][k]["change"] for k in kinds] for s in sources])
        axis.imshow(values, cmap="RdYlGn", vmin=-6, vmax=6, aspect="auto")
        for i, j in np.ndindex(*values.shape):
            cell = cells[sources[i]][kinds[j]]
            text = "" if sources[i] == kinds[j] else f"\n[{100 * cell['low']:+.1f}, {100 * cell['high']:+.1f}]"
            axis.text(j, i, f"{values[i, j]:+.1f}{text}", ha="center", va="center", fontsize=7.5)
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set_yticks(range(len(sources)), sources)
        axis.set(xlabel="served", ylabel="calibrated on", title=f"{name}: tokens a second, %")


def _gates(axes: Any, result: dict[str, Any]) -> None:
    rows = result["gates_and_rules"]
    counts = [row["gates"] for row in rows if row["rule"] == "youden"]
    panels = (
        ("fixed_rows", "tokens_a_step", "tokens a step at equal rows"),
        ("each_row_costs", "over_plain", "throughput over plain decoding"),
    )
    for axis, (what, value, label) in zip(axes, panels, strict=True):
        for rule, colour in (("youden", PAPER), ("goodput", GOODPUT)):
            entries = [row[what] for row in rows if row["rule"] == rule]
            axis.plot(range(len(counts)), [e[value] for e in entries], "o-", color=colour, label=rule)
        axis.axhline(rows[0][what][value], color=style.INK, lw=0.8, ls=":", label="no gate")
        axis.set_xticks(range(len(counts)), [str(n) for n in counts[:-1]] + ["all"])
        axis.set(xlabel="gates", ylabel=label)
    axes[0].legend()


def _predictors(axes: Any, result: dict[str, Any]) -> None:
    rows = [row for row in result["predictors"] if row["f"] != "oracle"][::-1]
    for axis, place in zip(axes, (1, 2), strict=True):
        for y, row in enumerate(rows):
            low, gain, high = (100 * row[key][place] for key in ("low", "gain", "high"))
            axis.plot([low, high], [y, y], color=style.INK, lw=1.5)
            axis.plot(gain, y, "o", color=style.GOOD)
        axis.axvline(0, color=style.INK, lw=0.8)
        oracle = next(row for row in result["predictors"] if row["f"] == "oracle")["gain"][place]
        axis.set(title=f"{rows[0]['rows'][place]} drafted rows a request (oracle: {100 * oracle:+.0f}%)", xlabel="accepted drafts, %")
        axis.set_yticks(range(len(rows)), [row["f"] for row in rows])
