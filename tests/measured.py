"""The step times of five models that were measured on an H100, by requests, tokens and context."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h100"
PAGE = 64
"""Tokens of context less than the name of the first file says."""


def machines() -> dict[str, dict[str, np.ndarray]]:
    """The columns of ``CostModel.from_samples``: by model and context, and of one at both."""

    def columns(samples, context):
        reqs, tokens, seconds = (
            np.array([sample[name] for sample in samples])
            for name in ("requests", "rows", "seconds")
        )
        return {
            "num_tokens": tokens,
            "seconds": seconds,
            "num_reqs": reqs,
            "context_tokens": reqs * context,
        }

    first = json.loads((RESULTS / "cost-8b-1024.json").read_text())
    models = json.loads((RESULTS / "cost-models.json").read_text())["models"]
    found = {"llama-3.1-8b, context 960": columns(first["samples"], first["context"] - PAGE)}
    for name, model in models.items():
        found[f"{name.split(',')[0]}, context {model['context']}"] = columns(
            model["samples"], model["context"]
        )
    one, two = (found[f"llama-3.1-8b, context {context}"] for context in (960, 4032))
    found["llama-3.1-8b"] = {name: np.concatenate([one[name], two[name]]) for name in one}
    return found


def part(columns: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the samples."""
    return {name: column[chosen] for name, column in columns.items()}


def load(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arguments of a model's call for all samples."""
    return {name: columns[name] for name in ("num_tokens", "num_reqs", "context_tokens")}
