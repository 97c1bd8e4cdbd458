"""The plugins' own parts, without the engines: settings are taken as the engine gives them."""

from __future__ import annotations

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
@pytest.mark.parametrize("asked", ["", "VERIFY_TOKENS", "CALIBRATION COST", "CALIBRATION VERIFY_TOKENS"])
def test_depths_and_rows_are_the_engines(plugin, monkeypatch, tmp_path, steps, asked):
    CALIBRATION.save(tmp_path / "calibration.json")
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), (1.0, 2.0)).to_json())
    given = {
        "VERIFY_TOKENS": "64",
        "CALIBRATION": str(tmp_path / "calibration.json"),
        "COST": str(tmp_path / "cost.json"),
    }
    for name in asked.split():
        monkeypatch.setenv(f"ECHO_{name}", given[name])
    policy = plugin("sglang").scheduler(4, steps, 48)
    assert (policy.max_depth, policy.max_verify_tokens_per_req, policy.rule.beam) == (steps, 48, 4)
    chain = plugin("vllm").scheduler(steps)
    assert (chain.max_depth, chain.max_verify_tokens_per_req, chain.rule.beam) == (
        steps,
        steps + 1,
        1,
    )


def test_a_plan_without_requests_and_one_deeper_than_eight(plugin):
    module, nothing = plugin("sglang"), torch.zeros(0, dtype=torch.int64)
    policy = module.scheduler(2, 12, 30)
    tree, packed = module.plan(
        policy,
        nothing,
        torch.zeros(0, 3).long(),
        torch.zeros(0, 6),
        torch.zeros(0, 6).long(),
        2,
        0,
        30,
    )
    assert packed.batch == 0 and packed.request.tolist() == [0]
    parents = torch.tensor([[-1, *(2 * i for i in range(11))]])  # each layer's best goes on
    tree, packed = module.plan(
        policy,
        torch.tensor([7]),
        parents,
        0.9 ** torch.arange(1.0, 25)[None],
        torch.arange(24)[None],
        12,
        30,
        30,
    )
    assert tree.depth == 12 and int(packed.depth.max()) == 12


def test_admission_of_no_requests_and_of_no_drafts(plugin):
    module = plugin("vllm")
    policy = module.scheduler(4)
    none = torch.zeros(0, dtype=torch.int32)
    for budget in (0, 5):
        assert module.admit(policy, torch.ones(0, 4), none, budget).tolist() == []
    sure, room = torch.full((2, 4), 0.9), torch.tensor([4, 2])
    assert module.admit(policy, sure, room, 0).tolist() == [0, 0]
    assert module.admit(policy, sure, room, 5).tolist() == [3, 2]
    assert module.admit(policy, sure[:, :0], room, 5).tolist() == [0, 0]
