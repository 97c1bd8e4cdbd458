"""Machines on which step times were measured: what a policy is charged, by requests and tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import echo
from common.replays import HERE

DRAFTER_LAYERS = 1.5
"""A drafter's layer over a target's: one decoder layer, a feature of twice the width, and an output
layer over a reduced vocabulary (EAGLE-3, arXiv 2503.01840)."""
MODELS = {
    "LLaMA-3.1-8B": ("llama-3.1-8b", 32),
    "LLaMA-3.3-70B / 8": ("llama-3.3-70b", 80),
    "Qwen3-32B / 8": ("qwen3-32b", 64),
    "Qwen3-235B / 8": ("qwen3-235b", 94),
}
"""Name, over how many devices it is spread, as measured, and layers."""


@dataclass(frozen=True)
class Machine:
    """A model on a device.

    Attributes:
        name: of the model, and over how many devices it is spread.
        cost: of its forward pass, by requests and tokens.
        dense: of the forward pass of the model whose layers the drafter has.
        share: of that pass that a drafter's layer takes.
    """

    name: str
    cost: echo.CostModel
    dense: echo.CostModel
    share: float

    def at(self, batch: int, beam: int) -> echo.CostModel:
        """The cost model of ``batch`` requests, with a drafter of at most ``beam`` nodes each."""
        root, wide = (self.share * self.dense(n * batch, num_reqs=batch) for n in (1, beam))
        token = float(wide - root) / max(1, (beam - 1) * batch)
        layer = float(root) - token * batch
        return replace(self.cost.at(batch), draft_layer=layer, draft_token=token)


def measured(folder: Path = HERE / "results" / "h100") -> dict[str, Machine]:
    """One H100's share of four models, 1,024 tokens of context, without communication.

    A drafter's layer costs ``DRAFTER_LAYERS`` measured layers of its target, at the rows that it
    drafts. Drafters of a mixture of experts are dense: that of Qwen3-235B has Qwen3-32B's layers,
    which are wider.
    """
    models = json.loads((folder / "cost-models.json").read_text())["models"]
    models["llama-3.1-8b, 1024"] = json.loads((folder / "cost-8b-1024.json").read_text())
    costs = {}
    for name, (key, _) in MODELS.items():
        (found,) = (m for n, m in models.items() if n.startswith(key) and n.endswith("1024"))
        names = ("rows", "seconds", "requests")
        rows, seconds, requests = (np.array([s[n] for s in found["samples"]]) for n in names)
        costs[name] = echo.CostModel.from_samples(rows, seconds, num_reqs=requests)
    dense = {name: "Qwen3-32B / 8" if "235B" in name else name for name in costs}
    shares = {name: DRAFTER_LAYERS / MODELS[dense[name]][1] for name in costs}
    return {n: Machine(n, cost, costs[dense[n]], shares[n]) for n, cost in costs.items()}
