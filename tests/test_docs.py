"""The README's code runs, and docstring examples hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import echo

README = Path(__file__).parents[1] / "README.md"
MODULES = [name for _, name, _ in pkgutil.walk_packages(echo.__path__, "echo.")]


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert int(scope["accepted"].lengths.min()) >= 1


def test_readme_is_short():
    assert len(README.read_text().splitlines()) < 120


@pytest.mark.parametrize("name", ["echo", *MODULES])
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_installed_package_is_typed():
    assert (Path(echo.__file__).parent / "py.typed").exists()
