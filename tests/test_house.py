"""The house: no circle of imports between the files of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import echo

ROOT = Path(echo.__file__).parent
KNOWN_CIRCLES: set[frozenset[str]] = set()
"""Circles that may still be there; to be emptied, never to grow."""


def modules(root: Path) -> dict[str, Path]:
    """Every file of a package by its dotted name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST):
    """All nodes, inside functions too, but not what is under ``if TYPE_CHECKING``."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        children: list[ast.AST] = list(tree.orelse)
    else:
        yield tree
        children = list(ast.iter_child_nodes(tree))
    for child in children:
        yield from statements(child)


def imports(source: str, known: set[str]) -> set[str]:
    """The modules of the package that a source imports: ``from a import b`` is ``a.b`` if a
    module.
    """
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "expected absolute imports"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return found & known


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of two nodes or more that all reach each other."""
    reach = {node: set(targets) for node, targets in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    groups = {frozenset(n for n in reach[m] if m in reach[n]) for m in graph if m in reach[m]}
    return {group for group in groups if len(group) > 1}


def test_circles_are_found():
    """Inside functions too; type-checking imports count for nothing."""
    sources = {
        "p": "from p.a import x",
        "p.a": "def f():\n    from p import b",
        "p.b": "from p.c import y",
        "p.c": "import p.a",
        "p.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import e",
        "p.e": "from p import d",
    }
    graph = {name: imports(source, set(sources)) for name, source in sources.items()}
    assert circles(graph) == {frozenset({"p.a", "p.b", "p.c"})}


def test_imports_point_one_way():
    files = modules(ROOT)
    assert len(files) > 20
    graph = {name: imports(path.read_text(), set(files)) for name, path in files.items()}
    assert circles(graph) <= KNOWN_CIRCLES
