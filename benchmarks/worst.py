"""The figure that decides adoption: the worst ratio to speculation off, under churn, lag and drift, by exact replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import echo
import roofline
from echo.testing import Trace, replay
from replay import calibrate

MODEL = "LLaMA-3.3-70B"
MODELS = ("LLaMA-3.1-8B", MODEL, "Qwen3-235B-A22B")
CONTEXT = 800
"""Tokens of context of a request."""
STEPS = {8: 160, 64: 120, 256: 120}
Scheduler = echo.ElasticBudgetScheduler


def policies(calibration: echo.Calibration, cost: echo.CostModel, batch: int, beam: int) -> dict[str, Scheduler]:
    """Nothing tuned: off, SGLang's default tree, the paper's rule within the knee (at most 60 rows a request), and goodput."""
    at = cost.at(batch, CONTEXT * batch)
    k_max = min(at.knee.k_max, 60 * batch)
    return {
        "off": Scheduler.autoregressive(),
        "EAGLE-3": Scheduler.eagle(n=8, beam=4, max_depth=5),
        "ECHO": Scheduler(echo.TwoLevel(3, 8), echo.SparseGate(calibration), k_max, calibration.max_depth),
        "goodput": Scheduler.goodput(calibration, at, beam=beam),
    }


def conditions(tune: Trace, test: Trace) -> dict[str, tuple[Trace, echo.Calibration, int]]:
    """Trace, calibration and lag of each adversity. Drift: calibrated on code alone, used on the rest. Churn: texts of 12 tokens."""
    known, only_code = calibrate(tune), calibrate(tune.texts(np.flatnonzero(tune.kind == "code").tolist()))
    other = test.texts(np.flatnonzero(test.kind != "code").tolist())
    return {
        "none": (test, known, 0),
        "lag 2": (test, known, 2),
        "drift": (other, only_code, 0),
        "churn": (cut(test, 12), known, 0),
        "all": (cut(other, 12), only_code, 2),
    }


def cut(trace: Trace, tokens: int) -> Trace:
    """The trace with every text cut into texts of that many tokens, the rest left out."""
    starts = [np.arange(a, b - tokens + 1, tokens) for a, b in zip(trace.indptr[:-1], trace.indptr[1:], strict=True)]
    at = (np.concatenate(starts)[:, None] + np.arange(tokens)).flatten()
    count, kind = len(at) // tokens, np.repeat(trace.kind, [len(s) for s in starts])
    columns = {name: getattr(trace, name)[at] for name in ("text", "token", "log_prob", "expanded")}
    return replace(trace, **columns, kind=kind, limit=np.full(count, tokens, np.int32), indptr=np.arange(count + 1) * tokens)


def worst(tune: Trace, test: Trace, share: float) -> list[dict[str, object]]:
    """Exact replay of the two elastic policies in every adversity: throughput over plain decoding, catching up and probes charged."""
    torch.set_num_threads(1)
    cells: list[dict[str, object]] = []
    for name, (trace, calibration, lag) in conditions(tune, test).items():
        order = np.random.default_rng(3).permutation(len(trace.kind))
        for model in MODELS:
            for batch, count in STEPS.items():
                cost = roofline.plan(model, most_rows=16384)
                at = cost.at(batch, CONTEXT * batch)
                for policy in ("ECHO", "goodput"):
                    scheduler = policies(calibration, cost, batch, trace.beam)[policy]
                    steps = max(8, int(share * count))
                    report = replay(trace, scheduler, at, batch=batch, steps=steps, order=order, lag=lag)
                    ratio = report.throughput / (batch / at(batch))
                    cells.append({"adversity": name, "model": model, "batch": batch, "policy": policy, "ratio": ratio})
    return cells
