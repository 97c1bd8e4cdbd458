"""The Dask example on a local cluster of two workers equals the single process, bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import echo


@pytest.mark.filterwarnings("ignore")
def test_two_workers_equal_one_process(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("pyarrow")
    path = Path(__file__).parents[1] / "examples" / "dask_logs.py"
    monkeypatch.syspath_prepend(str(path.parent))  # workers import the example by its name
    monkeypatch.setenv("PYTHONPATH", str(path.parent), prepend=":")
    example = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("dask_logs", path)
    )
    monkeypatch.setitem(__import__("sys").modules, "dask_logs", example)
    spec.loader.exec_module(example)
    for file in range(5):
        random = np.random.default_rng(file)
        confidence = random.random(800)
        log = echo.WarmupLog.from_arrays(
            random.integers(1, 4, 800),
            confidence,
            random.random(800) < confidence,
            weight=random.uniform(1, 9, 800),
        )
        log.save(tmp_path / f"part{file}.parquet")
    paths = sorted(str(p) for p in tmp_path.glob("*.parquet"))
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(tmp_path / "scratch"),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        merged = example.reduce(paths, client)
    alone = echo.gating.ConfidenceHistograms.of(echo.WarmupLog.stream(str(tmp_path / "*.parquet")))
    assert merged == alone
    assert (
        echo.calibrate(merged).to_json()
        == echo.calibrate(echo.WarmupLog.load(str(tmp_path / "*.parquet"))).to_json()
    )
