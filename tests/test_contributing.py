"""Each recipe of CONTRIBUTING.md works as it is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import echo

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
GATE, RULE, LAYOUT = (RECIPES[f"Add a {part}"][0] for part in ("gate", "rule", "layout"))
NUMBERS, MACHINE = RECIPES["Tune a tile"]


@pytest.fixture(autouse=True)
def _fewer_examples(monkeypatch):
    quick = partial(echo.testing.check_scheduler, examples=40)
    monkeypatch.setattr(echo.testing, "check_scheduler", quick)


def follow(*blocks):
    """What the blocks, run one after another, leave behind."""
    names: dict[str, object] = {"__name__": "recipe"}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names


def test_a_gate_passes_the_kit():
    assert follow(GATE)["scheduler"].gate.tau == 0.3


def test_a_gate_that_syncs_does_not():
    wrong = GATE.replace("return layer", "layer.log_confidence.max().item()\n        return layer")
    with pytest.raises(echo.testing.PlanError, match="sync_free"):
        follow(wrong)


def test_a_rule_passes_the_kit():
    follow(GATE, RULE)


def test_a_rule_that_selects_beyond_the_budget_does_not():
    wrong = RULE.replace("< num_remaining", "< num_verify_tokens")
    assert wrong != RULE
    with pytest.raises(echo.testing.PlanError, match="budget"):
        follow(GATE, wrong)


def test_a_layout_goes_there_and_back():
    names = follow(GATE, LAYOUT)
    packed, trees = names["packed"], names["trees"]
    for request, tree in enumerate(trees):
        begin, end = packed.indptr[request : request + 2].tolist()
        parent = tree.forest.parent[0, 1:].tolist()
        assert parent == packed.parent[begin + 1 : end].tolist()


def test_a_tile_gives_the_references_numbers():
    pytest.importorskip("triton")
    follow(GATE, LAYOUT, NUMBERS)


@pytest.mark.parametrize(
    ("tile", "spills"),
    [
        ("rows=64, keys=32, warps=4, stages=4", False),
        ("rows=128, keys=64, warps=4, stages=3", True),
    ],
)
def test_a_tile_compiles_or_its_faults_are_found(tile, spills):
    pytest.importorskip("triton")
    chosen = re.search(r"^choice = .*$", NUMBERS, re.MULTILINE)[0]
    chosen = chosen.replace("rows=64, keys=32, warps=4, stages=4", tile)
    imports = "from unittest import mock\nimport torch\nfrom echo.kernels import schedule, tiles"
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{chosen}\n{MACHINE}"],
        cwd=ROOT / "benchmarks",
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("spill instructions" in done.stderr) == spills, done.stderr
    assert (done.returncode != 0) == spills, done.stderr
