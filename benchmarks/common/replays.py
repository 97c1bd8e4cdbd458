"""Recorded traces as the benchmarks use them: halves, warm-up logs, costs, replayed steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import echo
from echo import plot
from echo.testing import Record, Trace, replay

HERE = Path(__file__).parents[1]
WARM = 8
"""First steps of a replay that are left out of its figures: all texts begin at once there."""
FREE = echo.CostModel((1,), (1.0,))
"""Charges all steps alike: for replays of which the steps are asked, not the seconds."""
LAG = 1
"""Steps by which the history is late, as in engines with overlapped scheduling."""


@dataclass(frozen=True)
class Steps:
    """What a replay's steps emitted, launched and drafted.

    Attributes:
        tokens: int64 [steps], emitted by the batch.
        num_verify_tokens: int64 [steps], of the target's forward pass.
        layers: int64 [steps], drafted.
        unprocessed: int64 [steps], tokens of the drafter's extend after steps without a draft.
        beam: int64 [steps], nodes of a layer that each request expands.
        requests: of the batch.
    """

    tokens: np.ndarray
    num_verify_tokens: np.ndarray
    layers: np.ndarray
    unprocessed: np.ndarray
    beam: np.ndarray
    requests: int

    def seconds(self, cost: echo.CostModel) -> np.ndarray:
        """Of each step: the forward pass, the layers, the drafter's extend."""
        extend = [cost.extend_seconds(tokens) for tokens in self.unprocessed.tolist()]
        drafting = cost.draft_seconds(self.layers, self.requests, self.beam)
        passes = cost(self.num_verify_tokens, num_reqs=self.requests)
        return np.asarray(passes + drafting + np.array(extend))

    def rate(self, cost: echo.CostModel) -> float:
        """Tokens a second."""
        return float(self.tokens.sum() / self.seconds(cost).sum())

    def ratio(self, cost: echo.CostModel) -> float:
        """Throughput over plain decoding."""
        return self.rate(cost) / plain(cost, self.requests)

    def interval(self, cost: echo.CostModel) -> tuple[float, float]:
        """95% bootstrap interval of :meth:`ratio` over blocks of up to ten steps."""
        block = max(1, min(10, len(self.tokens) // 4))
        count = len(self.tokens) // block
        tokens, seconds = (
            x[: count * block].reshape(count, block).sum(1)
            for x in (self.tokens, self.seconds(cost))
        )
        pick = np.random.default_rng(0).integers(0, count, (400, count))
        low, high = np.percentile(tokens[pick].sum(1) / seconds[pick].sum(1), [2.5, 97.5]) / plain(
            cost, self.requests
        )
        return float(low), float(high)


def ratio_interval(mine: np.ndarray, theirs: np.ndarray, block: int = 10) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of two runs' sums over their steps, by blocks."""
    random = np.random.default_rng(0)
    sums = []
    for values in (mine, theirs):
        blocks = values[: len(values) // block * block].reshape(-1, block).sum(1)
        sums.append(blocks[random.integers(0, len(blocks), (400, len(blocks)))].mean(1))
    low, high = np.percentile(sums[0] / sums[1], [2.5, 97.5])
    return float(low), float(high)


def plain(cost: echo.CostModel, requests: int) -> float:
    """Tokens a second of plain decoding."""
    return requests / cost(requests, num_reqs=requests)


def run(
    trace: Trace,
    scheduler: echo.ElasticBudgetScheduler,
    cost: echo.CostModel,
    batch: int,
    steps: int,
    *,
    exact: bool = False,
    **options,
) -> Steps:
    """Replays texts in random order; ``exact``, for oracles: without padding and idle layers."""
    seen: list[tuple[int, ...]] = []
    more = options.pop("observe", None)

    def observe(record: Record) -> None:
        launched = (
            (int(record.packed.indptr[-1]), record.tree.depth)
            if exact
            else (record.packed.num_rows, record.tier.depth)
        )
        beam = record.tier.beam or scheduler.rule.beam
        seen.append((int(record.emitted.sum()), *launched, record.num_unprocessed_tokens, beam))
        if more is not None:
            more(record)

    order = np.random.default_rng(1).permutation(len(trace.kind))
    report = replay(
        trace,
        scheduler,
        cost,
        batch=batch,
        steps=steps + WARM,
        order=order,
        observe=observe,
        **options,
    )
    assert report.misses == 0 or exact, (
        f"{report.misses} nodes without a record: the trace is too narrow for {scheduler}"
    )
    return Steps(*np.array(seen[WARM:]).T, batch)


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark on a recorded trace."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=HERE / "traces" / "smollm2.npz")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser


def shapes(measured: Path = HERE / "results" / "cost.json") -> dict[str, echo.CostModel]:
    """Seconds by verify tokens, a short step's being 1; and the ``measured`` curve, if any."""
    sizes = tuple(int(n) for n in np.unique(np.geomspace(1, 16384, 60).round()))
    law = lambda knee: tuple(1.0 + max(0.0, n - knee) / knee for n in sizes)
    costs = {
        "dense, knee at 256 tokens": echo.CostModel(sizes, law(256), draft_layer=0.02),
        "mixture of experts, knee at 1024": echo.CostModel(sizes, law(1024), draft_layer=0.02),
    }
    return costs | (
        {"two CPU cores, measured": echo.CostModel.from_json(measured.read_text())}
        if measured.exists()
        else {}
    )


def split(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Texts 0, 2, 4, ... of each kind, and the others."""
    first = np.concatenate(
        [np.flatnonzero(trace.kind == kind)[::2] for kind in np.unique(trace.kind)]
    )
    return first, np.setdiff1d(np.arange(len(trace.kind)), first)


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Texts for calibration and tuning, and texts for the figures: every kind in both."""
    first, others = split(trace)
    return trace.texts(first.tolist()), trace.texts(others.tolist())


def staggered(trace: Trace) -> Trace:
    """The texts four times, begun at their first to fourth token: at one request where steps
    happen to end is worth 2% of the throughput.
    """
    starts = [(i, first) for first in range(4) for i in range(len(trace.kind))]
    begin = np.array([trace.indptr[i] + first for i, first in starts])
    end = np.array([trace.indptr[i + 1] for i, _ in starts])
    at = np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)])
    text, first = np.array(starts).T
    return replace(
        trace,
        indptr=np.concatenate([[0], np.cumsum(end - begin)]),
        kind=trace.kind[text],
        limit=(trace.limit[text] - first).astype(np.int32),
        **{name: getattr(trace, name)[at] for name in ("text", "token", "log_prob", "expanded")},
    )


def decode_once(trace: Trace, observe: Callable[[Record], None]) -> None:
    """Every text decoded once, without a gate, the best of every layer verified at every step."""
    batch, most = 32, 64
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(trace.beam, 0),
        None,
        batch * most,
        trace.depth,
        max_verify_tokens_per_req=most,
    )
    replay(trace, scheduler, FREE, batch=batch, observe=observe)


@dataclass(frozen=True)
class WarmUp:
    """The log, and the text of each of its steps."""

    log: echo.WarmupLog
    text: np.ndarray

    def of(self, texts: Sequence[int] | np.ndarray) -> echo.WarmupLog:
        """The entries of some texts."""
        keep = np.isin(self.text[self.log.step], texts)
        columns = {
            name: getattr(self.log, name)[keep]
            for name in ("depth", "confidence", "accepted", "rank", "step")
        }
        return echo.WarmupLog.from_arrays(**columns)


def warm_up(trace: Trace) -> WarmUp:
    """Every text decoded once, the pool verified whole.

    The drafter expands nothing below its floor, so some steps lack deep layers. A missing layer has
    nothing to accept or to verify: it is entered as rejected at confidence 0, because thresholds by
    throughput are fitted on whole steps.
    """
    logs: list[echo.WarmupLog] = []
    texts: list[np.ndarray] = []

    def observe(record: Record) -> None:
        log = echo.loop.warmup_log(
            record.tree, record.packed, record.accepted, sum(map(len, texts))
        )
        logs.append(log)
        texts.append(record.requests)

    decode_once(trace, observe)
    columns = {
        name: np.concatenate([getattr(log, name) for log in logs])
        for name in ("depth", "confidence", "accepted", "rank", "step")
    }
    path = columns["rank"] == 0
    seen = np.zeros((sum(map(len, texts)), trace.depth), dtype=bool)
    seen[columns["step"][path], columns["depth"][path] - 1] = True
    step, layer = np.nonzero(
        ~seen & seen[:, :1]
    )  # a request at its last token drafts nothing, and is no step of the log
    missing = {
        "depth": layer + 1,
        "confidence": 0.0 * step,
        "accepted": step < 0,
        "rank": 0 * step,
        "step": step,
    }
    return WarmUp(
        echo.WarmupLog.from_arrays(
            **{name: np.concatenate([columns[name], missing[name]]) for name in columns}
        ),
        np.concatenate(texts),
    )


def warmup_log(trace: Trace) -> echo.WarmupLog:
    """The entries of :func:`decode_once`."""
    logs: list[echo.WarmupLog] = []
    decode_once(
        trace,
        lambda record: logs.append(
            echo.loop.warmup_log(record.tree, record.packed, record.accepted)
        ),
    )
    return echo.WarmupLog.concat(logs)


def calibrate(trace: Trace) -> echo.Calibration:
    """By histograms: layers missing below the drafter's floor are accepted once in 400 times."""
    return echo.calibrate(echo.gating.ConfidenceHistograms.of(warmup_log(trace)))


def describe(scheduler: echo.ElasticBudgetScheduler) -> str:
    """The policy in a line: what was tuned, without the calibration's tables."""
    rule = replace(scheduler.rule, reliability=None)
    gate = (
        f"gates {scheduler.gate.log_tau}"
        if isinstance(scheduler.gate, echo.SparseGate)
        else repr(scheduler.gate)
    )
    budget = "cost model" if isinstance(scheduler.budget, echo.CostModel) else scheduler.budget
    ranked = "calibrated" if scheduler.rule.reliability else "by draft probability"
    return f"{rule} {ranked}, {gate}, budget {budget}, depth {scheduler.max_depth}"


def by_batch(axis, batches: Sequence[int]) -> None:
    """Batch sizes across, plain decoding as a line at 1."""
    axis.axhline(1, color=plot.INK, lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])


def fold(cells: Sequence[dict[str, Any]], *by: str) -> dict[str, Any]:
    """Cells as nested dictionaries of columns: ``{model: {policy: {"batch": [...], ...}}}``."""
    out: dict[str, Any] = {}
    for cell in cells:
        node = out
        for key in by:
            node = node.setdefault(cell[key], {})
        for key, value in cell.items():
            if key not in by:
                node.setdefault(key, []).append(value)
    return out


def unfold(node: dict[str, Any], *by: str) -> list[dict[str, Any]]:
    """The cells that :func:`fold` was given."""
    if not by:
        return [dict(zip(node, row, strict=True)) for row in zip(*node.values(), strict=True)]
    return [{by[0]: name} | cell for name, inner in node.items() for cell in unfold(inner, *by[1:])]


def short(value: Any, digits: int = 5) -> Any:
    """Rounded to so many significant digits, in whatever it is nested."""
    if isinstance(value, dict):
        return {key: short(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [short(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write(path: Path, result: dict[str, Any]) -> None:
    """Rounded JSON; lists of rows have a row a line."""

    def text(value: Any, indent: str) -> str:
        if isinstance(value, dict) and any(
            isinstance(inner, dict | list) for inner in value.values()
        ):
            inner = [
                f"{indent} {json.dumps(str(key))}: {text(v, indent + ' ')}"
                for key, v in value.items()
            ]
            return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return (
                "[\n" + ",\n".join(f"{indent} {json.dumps(row)}" for row in value) + f"\n{indent}]"
            )
        return json.dumps(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(short(result), "") + "\n")
