"""The step times of five models that were measured on an H100, by requests, tokens and context."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

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


class Machine:
    """A step that takes, on its own clock, what was measured: between samples, linear in logarithms.

    Beyond them the nearest sample's. Each time is off by a log-normal error of ``noise``, and the
    first of a load takes ``capture`` seconds more.
    """

    def __init__(self, columns, *, noise=0.02, seed=0, capture=0.3, slower=1.0):
        reqs, tokens = columns["num_reqs"], columns["num_tokens"]
        context = columns["context_tokens"] / reqs
        self.contexts = sorted(set(context.astype(int).tolist()))
        points, self.values = self.point(reqs, tokens, context), np.log(columns["seconds"])
        self.inside = LinearNDInterpolator(points, self.values)
        self.outside = NearestNDInterpolator(points, self.values)
        self.now, self.seen, self.calls = 0.0, set(), 0
        self.noise, self.capture, self.slower = noise, capture, slower
        self.random = np.random.default_rng(seed)

    def point(self, reqs, tokens, context):
        axes = [np.log2(reqs), np.log2(tokens), np.asarray(context) / 4096]
        return np.stack(np.broadcast_arrays(*axes[: 3 if len(self.contexts) > 1 else 2]), axis=-1)

    def seconds(self, reqs, tokens, context):
        at = self.point(reqs, tokens, context)
        found = self.inside(at)
        return self.slower * np.exp(np.where(np.isnan(found), self.outside(at), found))

    def __call__(self, *load):
        self.calls += 1
        self.now += self.capture * (load not in self.seen)
        self.seen.add(load)
        error = np.exp(self.noise * self.random.normal())
        self.now += float(self.seconds(*load).squeeze()) * error

    def clock(self):
        return self.now
