"""Counts the operations of a whole step, plant to observe, part by part: what a CUDA graph of the step is made of.

    python benchmarks/operations.py          into benchmarks/results/operations.json; needs no GPU

An operation is a call into torch that computes or copies; views and empty buffers do nothing on a device. Most are one kernel, sorts and
selections more. The count does not depend on the batch.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import echo
from echo.tree import compact

BATCH, DEPTH, CANDIDATES, BEAM = 256, 6, 4, 4
RESULTS = Path(__file__).parent / "results"
IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "detach")


class Operations(TorchDispatchMode):
    """Counts by name what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IDLE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def policies() -> dict[str, echo.ElasticBudgetScheduler]:
    """The rules of the replay's table that differ in what they compute."""
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000).astype(np.float32)
    calibration = echo.calibrate(echo.WarmupLog.from_arrays(rng.integers(1, 9, 20_000), confidence, rng.random(20_000) < confidence**1.3))
    make = echo.ElasticBudgetScheduler
    return {
        "global ranking": make(echo.GlobalRank(BEAM), None, 4 * BATCH, DEPTH),
        "global ranking, calibrated": make(echo.GlobalRank(BEAM, calibration), None, 4 * BATCH, DEPTH),
        "two-level, sparse gate": make(echo.TwoLevel(2, 4), echo.SparseGate({1: 0.1, 3: 0.05}), 4 * BATCH, DEPTH),
        "goodput": make(echo.GlobalRank(BEAM, calibration), None, echo.CostModel((1, 1024, 4096), (1.0, 1.0, 4.0)), DEPTH),
    }


def step(scheduler: echo.ElasticBudgetScheduler, batch: int = BATCH, device: str = "cpu") -> dict[str, Counter[str]]:
    """The operations of each part of one step."""
    counts: dict[str, Counter[str]] = {}
    roots, rows = torch.arange(batch, device=device), 4 * batch
    history = scheduler.history(batch, device)
    context = torch.randint(0, 1000, (batch,), device=device, dtype=torch.int32)
    table = torch.arange(32 * batch, device=device, dtype=torch.int32).view(batch, 32)
    target = torch.randint(0, 1000, (rows,), device=device)

    def part(name: str, call: Any) -> Any:
        with Operations() as operations:
            value = call()
        counts[name] = counts.get(name, Counter()) + operations.count
        return value

    part("grow", lambda: _grown(scheduler, scheduler.plant(roots, rows=rows)))  # tables are copied to the device once
    scheduler.pack(_grown(scheduler, scheduler.plant(roots, rows=rows)))
    counts.clear()
    tree = part("plant", lambda: scheduler.plant(roots, rows=rows))
    for _ in range(scheduler.max_depth):
        drafted = _drafts(tree, device)
        tree = part("grow", lambda tree=tree, drafted=drafted: scheduler.grow(tree, *drafted))
    part("select", lambda: scheduler.select(tree))
    packed = part("select and pack", lambda: scheduler.pack(tree))
    accepted = part("verify", lambda: echo.verify(packed, target))
    part("compact", lambda: compact(packed, accepted, context, page_table=table, page_size=64))
    part("observe", lambda: history.observe(roots, packed, accepted))
    counts["pack"] = counts.pop("select and pack") - counts["select"]
    return counts
