"""What did the benchmarks' last runs say, in one table and in pictures?

python benchmarks/report.py             # the table, at the end of ``make bench`` too
python benchmarks/report.py --pictures  # all pictures again, from the results
python benchmarks/report.py --tree      # docs/images/tree.png: one step of the paper's policy
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

import echo
from common.policies import BASELINES
from common.replays import FREE, HERE, calibrate, halves, unfold, warm_up
from echo.report import SpeculationReport, speculation_report
from echo.testing import Record, Trace, replay

RESULTS, IMAGES = HERE / "results", HERE.parent / "docs" / "images"
BATCH, BUDGET = 6, 40
"""Of the drawn step."""


def found(name: str):
    """A benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def cells_of_replay() -> list[dict[str, Any]]:
    """All cells."""
    return unfold(found("replay")["cells"], "shape", "policy")


def replayed() -> list[dict[str, float]]:
    """Throughput over plain decoding by policy, of each cell."""
    cells = defaultdict(dict)
    for cell in cells_of_replay():
        cells[cell["shape"], cell["batch"]][cell["policy"]] = cell["ratio"]
    return list(cells.values())


def over_baseline(row: dict[str, float], policy: str = "throughput-optimal tree") -> float:
    """Throughput-optimal beside the best tuned baseline, or plain decoding."""
    return row[policy] / max(1.0, *(row[name] for name in BASELINES))


def prolonged() -> list[dict[str, float]]:
    """The cells in which throughput-optimal and the best baseline were replayed for long."""
    return [cell for cell in cells_of_replay() if "long" in cell]


def modelled() -> list[float]:
    """Throughput-optimal over plain decoding in each cell of the paper's models."""
    cells = [
        cell
        for own in found("paper")["cells"].values()
        for cell in unfold(own, "model", "policy")
        if cell["policy"] == "throughput-optimal"
    ]
    return [cell["tokens_per_second"] / cell["plain"] for cell in cells]


def adverse() -> list[float]:
    """Throughput-optimal over speculation off."""
    return [
        cell["ratio"]
        for cell in unfold(found("service")["worst"], "adversity", "model", "policy")
        if cell["policy"] == "throughput-optimal"
    ]


def planning(name: str) -> float:
    """Microseconds on one CPU thread."""
    return found("host")["plan"]["us"][name]


SECTIONS = (
    (
        (
            "throughput-optimal over plain decoding, worst cell",
            lambda: min(row["throughput-optimal tree"] for row in replayed()),
            "0.99",
        ),
        (
            "throughput-optimal over the best tuned baseline, worst cell",
            lambda: min(map(over_baseline, replayed())),
            "0.99",
        ),
        (
            "the same, trimmed",
            lambda: min(over_baseline(row, "throughput-optimal, trimmed") for row in replayed()),
            "0.99",
        ),
        (
            "throughput-optimal over plain decoding in 200 steps, worst cell",
            lambda: min(c["long"] for c in prolonged()),
            "0.99",
        ),
        (
            "throughput-optimal over the best tuned baseline in 200 steps, worst cell",
            lambda: min(c["long"] / c["long_baseline"] for c in prolonged()),
            "0.99",
        ),
        (
            "trees over chains at equal verify tokens, mean",
            lambda: mean(found("replay")["trees_over_chains"]["ratio"]),
            "1.05",
        ),
    ),
    (
        (
            "throughput-optimal over plain decoding, the paper's models, worst cell",
            lambda: min(modelled()),
            "0.99",
        ),
        (
            "throughput-optimal over speculation off under lag, drift and churn, worst",
            lambda: min(adverse()),
            "0.98",
        ),
    ),
    (
        ("ranking and selecting 64 candidates a request, us", lambda: planning("select 64"), "350"),
        ("the same, calibrated, us", lambda: planning("select 64, calibrated"), "350"),
        (
            "ranking and selecting 512 candidates a request, us",
            lambda: planning("select 512"),
            "2000",
        ),
        ("one grow, us", lambda: planning("grow 64"), "150"),
        ("choose_tier, us", lambda: planning("choose_tier"), "50"),
        (
            "SGLang's chain planner over ours at 64",
            lambda: planning("sglang chains 64") / planning("select 64"),
            "3",
        ),
        ("pack, us", lambda: found("host")["pack"]["16"]["pack"]["us"], "350"),
        (
            "histograms, million entries a second",
            lambda: found("host")["calibrate"]["count_rows_per_s"] / 1e6,
            "50",
        ),
        ("fuzzed plans that break an invariant", lambda: found("fuzz")["broken"], "0"),
    ),
)
"""Figure, where its benchmark left it, aim."""


def pictures() -> None:
    """Draws what the programs draw at their ends."""
    import calibration
    import gaps
    import host
    import lookup
    import paper
    import replay as policies
    import service

    echo.CostModel.from_json((RESULTS / "cost.json").read_text()).plot().savefig(
        IMAGES / "cost.png", dpi=150
    )
    gaps.draw(found("gaps"), IMAGES)
    paper.draw(
        {name: unfold(cells, "model", "policy") for name, cells in found("paper")["cells"].items()},
        RESULTS / "paper.png",
    )
    host.draw(found("host")["plan"]["growth"], RESULTS / "plan.png")
    calibration.draw(found("calibration"), IMAGES)
    own = found("lookup")
    lookup.draw(own["equal_rows"], unfold(own["cells"], "shape"), RESULTS / "lookup.png")
    days = unfold(found("replay")["day"], "machine")
    policies.draw(cells_of_replay(), days, RESULTS / "replay.png")
    service.draw(service.read(found("service")), RESULTS / "service.png")
    speculation().plot().savefig(IMAGES / "speculation.png", dpi=110)


def speculation() -> SpeculationReport:
    """Of a mixture of experts measured on an H100, with the shipped trace's acceptance."""
    models = found("h100/cost-models")["models"]
    model = next(model for name, model in models.items() if name.startswith("qwen3-235b"))
    tokens, reqs, seconds = (
        [sample[name] for sample in model["samples"]] for name in ("rows", "requests", "seconds")
    )
    context = [model["context"] * count for count in reqs]
    cost = echo.CostModel.from_samples(
        tokens, seconds, num_reqs=reqs, context_tokens=context, draft_layer=1e-4
    )
    tune, test = halves(Trace.load(HERE / "traces" / "smollm2-head.npz"))
    return speculation_report(warm_up(test).log, cost, calibration=calibrate(tune))


def contrast(record: Record) -> tuple[float, int]:
    """How much the trees differ in size; among equals, the step that emits most."""
    return float(record.packed.indptr.diff().float().std()), int(record.emitted.sum())


def tree() -> None:
    """One step of six answers under one budget: the one whose trees differ most in size."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(HERE.parent / "examples" / "smollm2"))
    import carry

    tune, test = halves(Trace.load(HERE / "traces" / "smollm2.npz"))
    gate = echo.SparseGate(calibrate(tune))
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(beam=2, max_extra_tokens=5), gate, BUDGET, test.depth
    )
    steps: list[Record] = []
    replay(test, scheduler, FREE, batch=BATCH, steps=150, observe=steps.append)
    step = max(
        (s for s in steps if s.packed.batch == BATCH and bool((s.packed.indptr.diff() > 1).all())),
        key=contrast,
    )
    file = carry.weights()
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    label = lambda token: words.decode([token]).strip(" ").replace("\n", "⏎") or "␣"
    titles = []
    for text, position in zip(step.requests, step.position, strict=True):
        begin = test.indptr[text]
        before = words.decode(test.text[begin : begin + position].tolist()).split()
        titles.append(f"{test.kind[text]}: {' '.join(['…', *before[-4:]])}")
    figure = step.packed.plot(accepted=step.accepted, label=label, titles=titles)
    figure.savefig(IMAGES / "tree.png", dpi=150)
    print(step.packed.render(0, step.accepted, label=label))


def table() -> None:
    """Prints."""
    table_ = Table(header_style="bold")
    for name, justify in (("figure", "left"), ("measured", "right"), ("aim", "right")):
        table_.add_column(name, justify=justify)
    for section in SECTIONS:
        for name, figure, aim in section:
            try:
                value = figure()
                measured = f"{value:.3f}" if value < 10 else f"{value:.0f}"
            except (FileNotFoundError, KeyError):  # not run here, or without the peer
                measured = "not measured"
            table_.add_row(name, measured, aim)
        table_.add_section()
    Console().print(table_)


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", dest="run", action="store_const", const=pictures, default=table
    )
    parser.add_argument("--tree", dest="run", action="store_const", const=tree)
    parser.parse_args().run()


if __name__ == "__main__":
    main()
