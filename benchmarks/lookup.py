"""What is prompt lookup beside a drafter worth? The same texts drafted with and without it.

    python benchmarks/lookup.py

Accepted drafts at equal verify tokens, the best of the batch by calibrated path probability, with
intervals from a bootstrap over texts; and throughput in the cells of replay.py, which is run first:
results/replay.json has those of the pooled drafts. The oracle and the baselines are those of the
head alone. Writes results/lookup.json and .png.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import echo
from common.policies import BASELINES
from common.replays import HERE, arguments, by_batch, fold, shapes, split, unfold, write
from echo import plot
from echo.gating import look_up
from echo.kernels.codes import ONE
from echo.testing import Trace
from echo.testing.replay import Source
from replay import BATCHES, column

DRAFTS = (1, 2, 4, 8, 16)
"""Verified drafts a request."""
DRAWN = "dense, knee at 256 tokens"


@dataclass(frozen=True)
class Pool:
    """All drafts of a trace: P positions, T nodes each, the root first.

    Attributes:
        score: float32 [P, T], of the path; -inf where there is no node.
        parent, depth: ints [P, T].
        accepted: bool [P, T], the text goes through the node.
        text: ints [P], whose position.
    """

    score: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    accepted: np.ndarray
    text: np.ndarray

    @property
    def drafted(self) -> np.ndarray:
        """bool [P, T]: what may be selected."""
        return np.isfinite(self.score) & (self.depth > 0)


def pool(trace: Trace) -> Pool:
    """The drafts at every position but the last of each text, on the widest beam."""
    source, following = Source(trace), torch.from_numpy(trace.following).long()
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(trace.beam), None, 1 << 20, trace.depth)
    at = np.delete(np.arange(trace.positions), trace.indptr[1:] - 1)
    parts = []
    for positions in np.array_split(at, max(1, len(at) // 512)):
        tree = scheduler.begin(source.text[positions])
        source.begin(positions)
        for _ in range(trace.depth):
            tree = scheduler.grow(tree, *source.draft(tree.frontier))
        forest = tree.forest
        right = (
            forest.token
            == following[torch.from_numpy(positions)][:, (forest.depth - 1).clamp(min=0)]
        )
        right &= torch.isfinite(forest.score)
        right[:, 0] = True
        for _ in range(trace.depth):
            right = right & right.gather(1, forest.parent)
        parts.append(
            [x.numpy() for x in (forest.score, forest.parent, forest.depth.expand_as(right), right)]
        )
    return Pool(
        *(np.concatenate(column) for column in zip(*parts, strict=True)),
        np.searchsorted(trace.indptr, at, side="right") - 1,
    )


def mapped(p: Pool, half: np.ndarray) -> np.ndarray:
    """f [P, T] as of :class:`echo.GlobalRank`: scores through reliability maps, never rising."""
    use = p.drafted & half[:, None]
    log = echo.WarmupLog.from_arrays(p.depth[use], np.exp(p.score[use]), p.accepted[use])
    table = torch.from_numpy(
        echo.calibrate(echo.gating.ConfidenceHistograms.of(log)).reliability_table()
    )
    own = (
        look_up(
            table, torch.from_numpy(p.score), torch.from_numpy(np.ascontiguousarray(p.depth))
        ).numpy()
        / ONE
    )
    f = np.where(p.drafted, own, 0.0)
    f[:, 0] = 1.0
    for d in range(1, int(p.depth.max()) + 1):
        here = p.depth[0] == d
        f[:, here] = np.minimum(f[:, here], np.take_along_axis(f, p.parent, 1)[:, here])
    return f


def ranking(p: Pool, f: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drafts of the positions ``chosen``, best first, then shallowest: text, accepted or not."""
    use = p.drafted & chosen[:, None]
    order = np.lexsort((p.depth[use], -f[use]))
    return np.broadcast_to(p.text[:, None], use.shape)[use][order], p.accepted[use][order]


def accepted(
    order: tuple[np.ndarray, np.ndarray], positions: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Accepted drafts [len(DRAFTS)] of the best ones; texts count ``weight`` times."""
    w = weight[order[0]]
    count, hits = np.cumsum(w), np.cumsum(w * order[1])
    at = np.searchsorted(count, np.array(DRAFTS) * (weight * positions).sum())
    return hits[np.minimum(at, len(hits) - 1)]


def oracle(p: Pool, chosen: np.ndarray, positions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Accepted drafts [len(DRAFTS)] if nothing else is verified."""
    path = (weight[p.text[chosen]] * p.accepted[chosen, 1:].sum(axis=1)).sum()
    return np.minimum(path, np.array(DRAFTS) * (weight * positions).sum())


def equal_rows(alone: Trace, pooled: Trace, resamples: int = 400) -> list[dict[str, float]]:
    """Accepted drafts a position at equal verify tokens; maps cross-fitted on two halves."""
    pools = {"alone": pool(alone), "pooled": pool(pooled)}
    first, _ = split(alone)
    random, texts = np.random.default_rng(0), len(alone.kind)
    weights = [np.ones(texts)] + [
        np.bincount(random.integers(0, texts, texts), minlength=texts).astype(float)
        for _ in range(resamples)
    ]
    found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(weights), len(DRAFTS))))
    for name, p in pools.items():
        half = np.isin(p.text, first)
        for fit, test in ((half, ~half), (~half, half)):
            order, positions = (
                ranking(p, mapped(p, fit), test),
                np.bincount(p.text[test], minlength=texts),
            )
            found[name] += [accepted(order, positions, w) for w in weights]
            if name == "alone":
                found["oracle"] += [oracle(p, test, positions, w) for w in weights]
    total = np.array([w[pools["alone"].text].sum() for w in weights])[:, None]
    found = {name: values / total for name, values in found.items()}
    gain = found["pooled"] / found["alone"] - 1
    closed = (found["pooled"] - found["alone"]) / (found["oracle"] - found["alone"])
    rows = []
    for i, each in enumerate(DRAFTS):
        low, high = np.percentile(gain[1:, i], [2.5, 97.5])
        own = {name: float(values[0, i]) for name, values in found.items()}
        rows.append(
            {
                "rows": each,
                **own,
                "gain": float(gain[0, i]),
                "low": low,
                "high": high,
                "share_of_way_to_oracle": float(closed[0, i]),
            }
        )
    return rows


def cells(alone: Path, pooled: list[dict[str, Any]]) -> list[dict[str, float | str]]:
    """Each cell of replay.py: throughput over plain decoding, way from baseline to oracle."""
    order = sorted(BATCHES, reverse=True)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as workers:
        parts = workers.map(column, [alone] * len(order), order, [shapes()] * len(order))
        found: dict[str, dict[tuple[str, int], dict[str, float]]] = {
            "alone": defaultdict(dict),
            "pooled": defaultdict(dict),
        }
        for name, column_ in (("alone", itertools.chain.from_iterable(parts)), ("pooled", pooled)):
            for cell in column_:
                found[name][cell["shape"], cell["batch"]][cell["policy"]] = cell["ratio"]
    rows = []
    for (shape, batch), own in found["alone"].items():
        both = found["pooled"][shape, batch]
        best, best_pooled = (
            max(1.0, *(ratios[name] for name in BASELINES)) for ratios in (own, both)
        )
        row = {
            "alone": own["throughput-optimal tree"],
            "pooled": both["throughput-optimal tree"],
            "oracle": own["oracle"],
        }
        way = own["oracle"] - best
        rows.append(
            {
                "shape": shape,
                "batch": batch,
                "baseline": best,
                "baseline_pooled": best_pooled,
                **row,
                "oracle_pooled": both["oracle"],
            }
            | {
                f"closed_{name}": (row[name] - best) / way if way > 0.01 else float("nan")
                for name in ("alone", "pooled")
            }
        )
    return rows


def draw(equal: list[dict[str, float]], found: list[dict[str, float | str]], path: Path) -> None:
    """Accepted drafts by verified drafts, and throughput by batch."""
    lines = {
        "oracle": ("oracle, head's drafts", plot.QUIET),
        "pooled": ("throughput-optimal, head and prompt lookup", plot.GOOD),
    }
    lines |= {
        "alone": ("throughput-optimal, head alone", plot.of("throughput-optimal")),
        "baseline": ("best tuned baseline, head alone", plot.of("EAGLE")),
    }
    with plot.figure(9, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        x = [row["rows"] for row in equal]
        left.plot(
            x, [row["oracle"] for row in equal], color=plot.QUIET, label="oracle, head's drafts"
        )
        left.plot(
            x,
            [row["pooled"] for row in equal],
            "o-",
            ms=3,
            color=plot.GOOD,
            label="head and prompt lookup",
        )
        left.plot(
            x,
            [row["alone"] for row in equal],
            "o-",
            ms=3,
            color=plot.of("throughput-optimal"),
            label="head alone",
        )
        left.set_xscale("log", base=2)
        left.set_xticks(x, [str(n) for n in x])
        left.set(
            title="At equal verify tokens",
            xlabel="verified drafts a request",
            ylabel="accepted drafts a step",
            ylim=(0, None),
        )
        left.legend()
        by_batch(right, BATCHES)
        for name, (label, colour) in lines.items():
            row = {int(r["batch"]): float(r[name]) for r in found if r["shape"] == DRAWN}
            right.plot(BATCHES, [row[b] for b in BATCHES], "o-", ms=3, color=colour, label=label)
        right.set(
            title=f"In throughput ({DRAWN})",
            xlabel="batch",
            ylabel="throughput / plain decoding",
            ylim=(0, None),
        )
        right.legend()
        figure.savefig(path, dpi=110)


def main() -> None:
    """Compares the two traces."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--alone",
        type=Path,
        default=HERE / "traces" / "smollm2-head.npz",
        help="the head's own drafts of the same texts",
    )
    args = parser.parse_args()
    alone, pooled = Trace.load(args.alone), Trace.load(args.trace)
    if not np.array_equal(alone.text, pooled.text):
        raise SystemExit(f"{args.alone}: expected the texts of {args.trace}, got others")
    replayed = json.loads((args.out / "replay.json").read_text())
    if replayed["trace"] != args.trace.name:
        got = f"got one of {replayed['trace']}: run replay.py first"
        raise SystemExit(f"replay.json: expected a replay of {args.trace.name}, {got}")
    result = {
        "equal_rows": equal_rows(alone, pooled),
        "cells": cells(args.alone, unfold(replayed["cells"], "shape", "policy")),
    }
    write(
        args.out / "lookup.json",
        {"equal_rows": result["equal_rows"], "cells": fold(result["cells"], "shape")},
    )
    draw(result["equal_rows"], result["cells"], args.out / "lookup.png")
    for row in result["equal_rows"]:
        gain = f"{row['gain']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]"
        text = f"{row['alone']:.3f} -> {row['pooled']:.3f} accepted ({gain})"
        way = f"{row['share_of_way_to_oracle']:.0%} of the way to the oracle"
        print(f"{row['rows']:3} drafts a request: {text}, {way}")
    for row in result["cells"]:
        text = f"throughput-optimal {row['alone']:.2f} -> {row['pooled']:.2f}"
        text = f"baseline {row['baseline']:.2f}, {text}, oracle {row['oracle']:.2f}"
        closed = f"closed {row['closed_alone']:.2f} -> {row['closed_pooled']:.2f}"
        print(f"{row['shape']:34} {row['batch']:4}  {text}; {closed}")


if __name__ == "__main__":
    main()
