"""What the benchmarks' last runs said, in one table: ``python benchmarks/summary.py``, or at the end of ``make bench``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from policies import BASELINES
from rich.console import Console
from rich.table import Table

from replay import LONG

RESULTS = Path(__file__).parent / "results"


def found(name: str):
    """A benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def replayed() -> list[dict[str, float]]:
    """Throughput over plain decoding by policy, of each cell."""
    cells = defaultdict(dict)
    for cell in found("replay")["cells"]:
        cells[cell["shape"], cell["batch"]][cell["policy"]] = cell["ratio"]
    return list(cells.values())


def over_baseline(row: dict[str, float]) -> float:
    """Goodput beside the best tuned baseline, or plain decoding."""
    return row["goodput tree"] / max(1.0, *(row[name] for name in BASELINES))


def prolonged() -> list[dict[str, float]]:
    """The cells in which goodput and the best baseline were replayed for long."""
    return [cell for cell in found("replay")["cells"] if "long" in cell]


def modelled() -> list[float]:
    """Goodput over plain decoding in each cell of the paper's models."""
    cells = [cell for own in found("paper")["cells"].values() for cell in own if cell["policy"] == "goodput"]
    return [cell["tokens_per_second"] / cell["plain"] for cell in cells]


def adverse() -> list[float]:
    """Goodput over speculation off."""
    return [cell["ratio"] for cell in found("service")["worst"] if cell["policy"] == "goodput"]


def planning(name: str) -> float:
    """Microseconds on one CPU thread."""
    return found("plan")["results"][name]["median_us"]


SECTIONS = (
    (
        ("goodput over plain decoding, worst cell", lambda: min(row["goodput tree"] for row in replayed()), "0.99"),
        ("goodput over the best tuned baseline, worst cell", lambda: min(map(over_baseline, replayed())), "0.99"),
        (f"goodput over plain decoding in {LONG} steps, worst cell", lambda: min(c["long"] for c in prolonged()), "0.99"),
        (
            f"goodput over the best tuned baseline in {LONG} steps, worst cell",
            lambda: min(c["long"] / c["long_baseline"] for c in prolonged()),
            "0.99",
        ),
        ("trees over chains at equal rows, mean", lambda: mean(row["ratio"] for row in found("replay")["trees_over_chains"]), "1.05"),
    ),
    (
        ("goodput over plain decoding, the paper's models, worst cell", lambda: min(modelled()), "0.99"),
        ("goodput over speculation off under lag, drift and churn, worst", lambda: min(adverse()), "0.98"),
    ),
    (
        ("ranking and dealing 64 candidates a request, us", lambda: planning("select 64"), "350"),
        ("the same, calibrated, us", lambda: planning("select 64, calibrated"), "350"),
        ("ranking and dealing 512 candidates a request, us", lambda: planning("select 512"), "2000"),
        ("one grow, us", lambda: planning("grow 64"), "150"),
        ("a forecast, us", lambda: planning("forecast"), "50"),
        ("SGLang's chain planner over ours at 64", lambda: planning("sglang chains 64") / planning("select 64"), "3"),
        ("pack, us", lambda: found("pack")["max_tree_rows"]["16"]["results"]["pack"]["median_us"], "350"),
        ("histograms, million rows a second", lambda: found("calibration")["count"]["rows_per_s_median"] / 1e6, "50"),
        ("fuzzed plans that break an invariant", lambda: found("fuzz")["broken"], "0"),
    ),
)
"""Figure, where its benchmark left it, aim."""


def main() -> None:
    """Prints."""
    table = Table(header_style="bold")
    for name, justify in (("figure", "left"), ("measured", "right"), ("aim", "right")):
        table.add_column(name, justify=justify)
    for section in SECTIONS:
        for name, figure, aim in section:
            try:
                value = figure()
                measured = f"{value:.3f}" if value < 10 else f"{value:.0f}"
            except (FileNotFoundError, KeyError):  # not run here, or without the peer
                measured = "not measured"
            table.add_row(name, measured, aim)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
