"""Draws docs/images/headline.png, two panels of benchmarks/results/replay.json."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
LINES = {
    "throughput-optimal tree": ("throughput-optimal, nothing tuned", "#33658a", "-"),
    "EAGLE tree": ("EAGLE, best of 12 trees for each batch", "#e9a13b", "-"),
    "EAGLE, shipped default": ("EAGLE, SGLang's default tree", "#e9a13b", ":"),
    "ECHO (paper)": ("ECHO as published, best of 12", "#2a7f62", "-"),
}

cells = json.loads((HERE.parent / "benchmarks" / "results" / "replay.json").read_text())["cells"]
figure = Figure(figsize=(8.6, 3.3), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
for axes, name in zip(panels, ("LLaMA-3.3-70B / 8", "Qwen3-235B / 8"), strict=True):
    axes.axhline(1, color="#22333b", linewidth=1)
    for policy, (label, colour, style) in LINES.items():
        own = cells[name][policy]
        line = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4, "linewidth": 2}
        axes.plot(own["batch"], own["ratio"], label=label, **line)
    axes.set(xscale="log", xlabel="requests in the batch", ylim=(0, 3), xlim=(0.9, 300))
    axes.set_title(name.replace(" / 8", ", one of eight H100s"))
    axes.set_xticks([1, 8, 32, 64, 128, 256], ["1", "8", "32", "64", "128", "256"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("throughput / plain decoding")
panels[0].legend(frameon=False, loc="lower left", fontsize=8)
figure.savefig(HERE / "images" / "headline.png", dpi=150)
