"""The plugins' own parts, without the engines: settings are taken as the engine gives them."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest
import torch

import echo
from conftest import CALIBRATION

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def plugin(monkeypatch):
    """Imports a plugin by its name."""
    for name in ("CALIBRATION", "COST", "VERIFY_TOKENS"):
        monkeypatch.delenv(f"ECHO_{name}", raising=False)

    def load(engine):
        monkeypatch.syspath_prepend(str(EXAMPLES / engine))
        return import_module(f"echo_{engine}")

    return load


@pytest.mark.parametrize("steps", [0, 1, 5, 8, 12, 64])
@pytest.mark.parametrize("asked", ["", "TOKENS", "CALIBRATION COST", "CALIBRATION TOKENS"])
def test_depths_and_rows_are_the_engines(plugin, monkeypatch, tmp_path, steps, asked):
    CALIBRATION.save(tmp_path / "calibration.json")
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), (1.0, 2.0)).to_json())
    paths = {name: str(tmp_path / f"{name.lower()}.json") for name in ("CALIBRATION", "COST")}
    given = {"TOKENS": ("VERIFY_TOKENS", "64")} | {name: (name, paths[name]) for name in paths}
    for name in asked.split():
        monkeypatch.setenv(f"ECHO_{given[name][0]}", given[name][1])
    policy = plugin("sglang").scheduler(4, steps, 48)
    assert (policy.max_depth, policy.max_verify_tokens_per_req, policy.rule.beam) == (steps, 48, 4)
    chain = plugin("vllm").scheduler(steps)
    limits = chain.max_depth, chain.max_verify_tokens_per_req, chain.rule.beam
    assert limits == (steps, steps + 1, 1)


def test_a_plan_without_requests_and_one_deeper_than_eight(plugin):
    module = plugin("sglang")
    plan = module.draft.Plan(module.scheduler(2, 12, 30), 3, 30, "cpu")
    parents = torch.tensor([[-1, *(2 * i for i in range(11))]])  # each layer's best goes on
    scores, tokens = 0.9 ** torch.arange(1.0, 25)[None], torch.arange(24)[None]
    for roots in (torch.zeros(0, dtype=torch.int64), torch.tensor([7])):
        plan.start(roots, 30)
        plan.draw(parents, scores, tokens, 12, 30)
        packed, tree = plan.packed(len(roots), 12, 30), plan.space.tree(len(roots), 12)
        packed.validate()
        assert packed.batch == len(roots) and tree.depth == 12
        assert int(packed.depth.max()) == 12 * len(roots)
        assert int((packed.request < len(roots)).sum()) == 25 * len(roots)


def test_confidences_and_costs_of_no_requests_and_of_a_fixed_budget(plugin):
    module = plugin("vllm")
    fitted = echo.GlobalRank(1, CALIBRATION)
    policy = dataclasses.replace(module.scheduler(4), rule=fitted, budget=6)
    assert module.calibrated(policy, torch.ones(0, 4)).shape == (0, 4)
    own = module.calibrated(policy, torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.3, 0.0, 0.9, 0.9]]))
    assert (own >= 0).all() and (own <= 1).all() and own[1, 1:].tolist() == [0, 0, 0]
    draft, verify = module.cost_tables(policy, 0, ([1.0] * 3, [1.0] * 9))
    assert draft.tolist() == [0, 0, 0]
    assert verify.argmax() == 7 and (verify[:7] == 1).all()
