"""Docstring examples hold; the pages' links, code and words do too."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import echo

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = [name for _, name, _ in pkgutil.walk_packages(echo.__path__, "echo.")]
OURS = (
    r"deal(t|s|ing)?|redealt|dear(er|est)?|read(ing)? up|unread|second opinion|vot(e|es|ing)|trust|"
    r"twins?|read-?backs?|drafts? on|drafted on|plant(ed|s)?|buys?|bought|outlooks?|foresees?n?|"
    r"K_max rows|base_rows|lanes?|goodput|everybody|nobody|whoever|forecasts?|of one's own|"
    r"mend(s|ed)?|where not given"
)
"""Words that a reader of SGLang, vLLM or FlashInfer would have to learn."""
QUOTED = re.compile(r"```.*?^ *```|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^ *```(?:python|sh|\{testcode\})\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(#[^)\s]*)?\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            assert f"({anchor[1:]})=" in there.read_text(), anchor


@pages
def test_code_fits(page):
    for block in CODE.findall(page.read_text()):
        assert max(map(len, block.splitlines())) <= 88


@pages
def test_words_are_the_fields(page):
    prose = QUOTED.sub("", page.read_text())
    found = re.finditer(rf"\b(?:{OURS})\b", prose, re.IGNORECASE)
    assert [match[0] for match in found] == []


def test_the_replay_table_is_what_was_measured():
    cells = json.loads((ROOT / "benchmarks/results/replay.json").read_text())["cells"]
    measured = {
        "EAGLE, SGLang's default tree": "EAGLE, shipped default",
        "EAGLE, best of 12 trees": "EAGLE tree",
        "ECHO, the paper, best of 12": "ECHO (paper)",
        "throughput-optimal, nothing tuned": "throughput-optimal tree",
        "the same, trimmed": "throughput-optimal, trimmed",
    }
    table = (ROOT / "README.md").read_text().split("| batch | 1 | 8 |")[1].split("\n\n")[0]
    for model, panel in {"70B": "LLaMA-3.3-70B / 8", "235B": "Qwen3-235B / 8"}.items():
        for label, name in measured.items():
            row = re.search(rf"^\| {model}: {label}((?: \| [\d.]+){{6}})", table, re.MULTILINE)
            ratios = cells[panel][name]["ratio"][::-1]
            assert row[1].split(" | ")[1:] == [f"{ratio:.2f}" for ratio in ratios]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("name", ["echo", *MODULES])
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_installed_package_is_typed():
    assert (Path(echo.__file__).parent / "py.typed").exists()
