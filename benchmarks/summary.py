"""What the benchmarks' last runs said, in one table: ``python benchmarks/summary.py``, or at the end of ``make bench``."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def found(name: str):
    """A benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def replayed() -> list[tuple[str, float, str]]:
    """Goodput beside plain decoding and beside the best tuned baseline, over all cells."""
    cells = defaultdict(dict)
    for cell in found("replay")["cells"]:
        cells[cell["shape"], cell["batch"]][cell["policy"]] = cell["ratio"]
    baseline = [max(r for name, r in row.items() if name != "oracle" and not name.startswith("goodput")) for row in cells.values()]
    goodput = [row["goodput tree"] for row in cells.values()]
    chains = [row["ratio"] for row in found("replay")["trees_over_chains"]]
    return [
        ("goodput over plain decoding, worst cell", min(goodput), "0.99"),
        ("goodput over the best tuned baseline, worst cell", min(g / max(b, 1.0) for g, b in zip(goodput, baseline, strict=True)), "0.99"),
        ("trees over chains at equal rows, mean", sum(chains) / len(chains), "1.05"),
    ]


def modelled() -> list[tuple[str, float, str]]:
    """The paper's models and the service."""
    worst = []
    for cells in found("paper")["cells"].values():
        worst += [cell["tokens_per_second"] / cell["plain"] for cell in cells if cell["policy"] == "goodput"]
    ratios = [cell["ratio"] for cell in found("service")["worst"] if cell["policy"] == "goodput"]
    return [
        ("goodput over plain decoding, the paper's models, worst cell", min(worst), "0.99"),
        ("goodput over speculation off under lag, drift and churn, worst", min(ratios), "0.98"),
    ]


def timed() -> list[tuple[str, float, str]]:
    """Microseconds on one CPU thread."""
    plan, pack = found("plan")["results"], found("pack")["max_tree_rows"]["16"]["results"]
    peer = plan.get("sglang chains 64", {"median_us": math.nan})["median_us"]  # where its wheel was there
    return [
        ("ranking and dealing 64 candidates a request, us", plan["select 64"]["median_us"], "350"),
        ("the same, calibrated, us", plan["select 64, calibrated"]["median_us"], "350"),
        ("ranking and dealing 512 candidates a request, us", plan["select 512"]["median_us"], "2000"),
        ("one grow, us", plan["grow 64"]["median_us"], "150"),
        ("SGLang's chain planner over ours at 64", peer / plan["select 64"]["median_us"], "3"),
        ("pack, us", pack["pack"]["median_us"], "350"),
        ("histograms, million rows a second", found("calibration")["count"]["rows_per_s_median"] / 1e6, "50"),
        ("fuzzed plans that break an invariant", found("fuzz")["broken"], "0"),
    ]


def main() -> None:
    """Prints."""
    table = Table(header_style="bold")
    for name, justify in (("figure", "left"), ("measured", "right"), ("aim", "right")):
        table.add_column(name, justify=justify)
    for section in (replayed, modelled, timed):
        for name, value, aim in section():
            table.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.0f}", aim)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
