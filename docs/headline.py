"""Draws docs/images/headline.png, one panel of benchmarks/results/replay.json."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
LINES = {
    "throughput-optimal tree": ("throughput-optimal, nothing tuned", "#33658a", (256, 1.07)),
    "EAGLE tree": ("EAGLE tree, best of 11 shapes", "#e9a13b", (256, 0.66)),
    "ECHO (paper)": ("ECHO as published, best of 12", "#2a7f62", (256, 0.82)),
}

cells = json.loads((HERE.parent / "benchmarks" / "results" / "replay.json").read_text())["cells"]
panel = cells["dense, knee at 256 tokens"]
figure = Figure(figsize=(7.2, 3.2), layout="constrained")
axes = figure.add_subplot()
axes.axhline(1, color="#22333b", linewidth=1)
axes.text(1, 0.97, "plain decoding", color="#22333b", va="top")
for name, (label, colour, (x, y)) in LINES.items():
    batch, ratio = panel[name]["batch"], panel[name]["ratio"]
    axes.plot(batch, ratio, color=colour, marker="o", linewidth=2, label=label)
    axes.text(x * 1.04, y, f"{ratio[batch.index(x)]:.2f}", color=colour)
axes.set(xscale="log", xlabel="requests in the batch", ylabel="throughput / plain decoding")
axes.set(ylim=(0, 2.8), xlim=(0.9, 340))
axes.set_xticks([1, 8, 32, 64, 128, 256], ["1", "8", "32", "64", "128", "256"])
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower left")
figure.savefig(HERE / "images" / "headline.png", dpi=150)
