"""Calibration on large logs: rows counted a second, milliseconds to calibrate, and scikit-learn on the same rows.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py [--rows 1000000] [--depths 8] [--out benchmarks/results/calibration.json]

All on one core. Rows are synthetic: Beta-distributed confidences, acceptance drawn with a probability that depends on them, one
row of rank 0 for each step and depth. Times are seconds of CPU, because other programs may be running; wall time stands beside
them. scikit-learn is optional; without it its entries are null.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import echo
from echo.gating import separability


def synthetic(rows: int, depths: int, seed: int = 0) -> echo.WarmupLog:
    """``rows`` rows of each depth."""
    random = np.random.default_rng(seed)
    n = rows * depths
    depth = np.repeat(np.arange(1, depths + 1, dtype=np.int32), rows)
    confidence = random.beta(1.5, 1.2, n).astype(np.float32) ** (0.6 + 0.4 * depth.astype(np.float32))
    accepted = random.random(n, dtype=np.float32) < 0.1 + 0.8 * confidence**0.7
    order = random.permutation(n)  # as a serving engine would write them: depths mixed
    return echo.WarmupLog.from_arrays(depth[order], confidence[order], accepted[order])


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    seconds, walls = [], []
    for _ in range(repeats):
        wall, start = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.process_time() - start)
        walls.append(time.perf_counter() - wall)
    return {"best_s": min(seconds), "median_s": float(np.median(seconds)), "median_wall_s": float(np.median(walls)), "repeats": repeats}


def peers(log: echo.WarmupLog, depths: int) -> dict[str, Any] | None:
    """scikit-learn's AUC and isotonic regression, depth by depth, and how far our numbers are from them."""
    try:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.metrics import roc_auc_score
    except ImportError:
        return None
    columns = [(log.confidence[log.depth == d], log.accepted[log.depth == d]) for d in range(1, depths + 1)]
    found: dict[str, Any] = {}
    auc: list[float] = []
    maps: list[IsotonicRegression] = []
    exact: list[float] = []
    found["roc_auc_score"] = timed(lambda: auc.extend(float(roc_auc_score(a, c)) for c, a in columns), 1)
    found["isotonic"] = timed(lambda: maps.extend(IsotonicRegression(out_of_bounds="clip").fit(c, a) for c, a in columns), 1)
    found["our_exact_auc"] = timed(lambda: exact.extend(separability(c, a).auc for c, a in columns), 3)
    exact = exact[:depths]
    calibration = echo.calibrate(log)
    found["exact_auc_largest_difference"] = max(abs(x - y) for x, y in zip(auc, exact, strict=True))
    found["binned_auc_largest_difference"] = max(abs(x - d.auc) for x, d in zip(auc, calibration.depths, strict=True))
    found["binned_auc_largest_bound"] = max(d.auc_error for d in calibration.depths)
    grid = np.linspace(0.02, 0.98, 97)
    gaps = [
        np.abs(m.predict(grid) - np.interp(np.log(grid), *np.array(d.reliability).T)) for m, d in zip(maps, calibration.depths, strict=True)
    ]
    found["isotonic_mean_difference"] = float(np.mean(gaps))
    found["isotonic_largest_difference"] = float(np.max(gaps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each depth")
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log = synthetic(args.rows, args.depths)
    weighted = echo.WarmupLog.from_arrays(log.depth, log.confidence, log.accepted, weight=np.where(np.arange(len(log)) % 9, 1.0, 10.0))
    histograms = echo.ConfidenceHistograms.of(log)
    count = timed(lambda: echo.ConfidenceHistograms.of(log), args.repeats)
    build = timed(lambda: echo.WarmupLog.from_arrays(log.depth, log.confidence, log.accepted, rank=log.rank, step=log.step), 3)
    slow = timed(lambda: echo.ConfidenceHistograms.of(weighted), args.repeats)
    echo.calibrate(histograms)  # imports scipy.optimize
    fit = timed(lambda: echo.calibrate(histograms), 3 * args.repeats)
    live = histograms.live()
    rows = 512
    part = {"depth": log.depth[:rows], "log_prob": np.log(log.confidence[:rows] + 1e-6).clip(max=0), "accepted": log.accepted[:rows]}
    step = {name: torch.from_numpy(column) for name, column in part.items()}
    step["rank"] = torch.zeros(rows, dtype=torch.int64)
    update = timed(lambda: live.update(**step, in_place=True), 200)
    sklearn = peers(log, args.depths)
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "rows": len(log),
        "depths": args.depths,
        "build_checked_log_from_arrays": build | {"rows_per_s_median": len(log) / build["median_s"]},
        "count": count | {"rows_per_s_best": len(log) / count["best_s"], "rows_per_s_median": len(log) / count["median_s"]},
        "count_weighted": slow | {"rows_per_s_best": len(log) / slow["best_s"], "rows_per_s_median": len(log) / slow["median_s"]},
        "calibrate_from_histograms": fit,
        "live_update_512_rows_cpu": update,
        "scikit_learn": sklearn,
    }
    if sklearn is not None:
        ours = count["median_s"] + fit["median_s"]
        theirs = sklearn["roc_auc_score"]["median_s"] + sklearn["isotonic"]["median_s"]
        result["speedup_over_scikit_learn_cpu"] = theirs / ours
        result["speedup_exact_auc_alone_cpu"] = sklearn["roc_auc_score"]["median_s"] / sklearn["our_exact_auc"]["median_s"]
        result["speedup_exact_auc_and_isotonic_cpu"] = theirs / (ours + sklearn["our_exact_auc"]["median_s"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
