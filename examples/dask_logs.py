"""Calibrates from logs on many machines: each worker counts its files, and only histograms travel.

    python examples/dask_logs.py 'logs/*.parquet' calibration.json [--scheduler tcp://host:8786]

Without --scheduler it starts two local workers. The result has the bits of a single process,
whatever the number of workers and their order: histograms are integers, and merging is associative.
"""

import argparse
import glob

from dask.distributed import Client, LocalCluster

import echo

Histograms = echo.gating.ConfidenceHistograms


def count(path: str) -> Histograms:
    return Histograms.of(echo.WarmupLog.load(path))


def reduce(paths: list[str], client: Client) -> Histograms:
    parts = client.map(count, paths)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        merged = [client.submit(Histograms.merge, a, b) for a, b in pairs]
        parts = merged + parts[len(parts) & ~1 :]
    return parts[0].result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("logs")
    parser.add_argument("out")
    parser.add_argument("--scheduler")
    args = parser.parse_args()
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with Client(args.scheduler or LocalCluster(**local)) as client:
        calibration = echo.calibrate(reduce(sorted(glob.glob(args.logs)), client))
    calibration.save(args.out)
    print(calibration)
