"""An engine's published modules, imported without the engine: what a test names is real, everything
around it a stand-in.

``ECHO_PEERS=install`` fetches the wheel without its dependencies (sglang 40 MB, vllm 340 MB) and
unpacks its Python files; ``ECHO_PEERS=<folder>`` is a folder that has them already. None of an
engine's code is in this repository.
"""

from __future__ import annotations
import __future__

import ast
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest


def sources(name: str, version: str, folder: Path) -> Path:
    """The folder that holds package ``name``; skips the test where it cannot be had."""
    asked = os.environ.get("ECHO_PEERS")
    if not asked:
        pytest.skip(
            f"set ECHO_PEERS=install, or to a folder that holds {name}=={version}, to test with the engine's own code"
        )
    if asked != "install":
        if not (Path(asked) / name).is_dir():
            pytest.skip(f"no {name} in the folder that ECHO_PEERS names ({Path(asked).name})")
        return Path(asked)
    options = ["-q", "--no-deps", "--only-binary", ":all:", "-d"]
    command = [sys.executable, "-m", "pip", "download", *options, str(folder), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{name}=={version} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [member for member in archive.namelist() if member.endswith(".py")]
            )
        wheel.unlink()
    return folder


class Loose(type):
    """A class whose missing attributes are stand-ins."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{cls.__name__}.{name}")


class StandIn(metaclass=Loose):
    """A class of the engine: it holds what it is given."""

    def __init__(self, **given: object) -> None:
        vars(self).update(given)

    def __init_subclass__(cls, **_: object) -> None:
        """Takes any keyword, as ``msgspec.Struct`` does."""


class Module(types.ModuleType):
    """A module of the engine: its classes are stand-ins, its functions mocks."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = (
            Loose(name, (StandIn,), {})
            if name[0].isupper() and not name.isupper()
            else mock.MagicMock(name=f"{self.__name__}.{name}")
        )
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for every module of ``packages`` but those below ``real``; packages keep their
    folder, so that those are found.
    """

    def __init__(self, folder: Path, packages: Sequence[str], real: Sequence[str]) -> None:
        self.folder, self.packages, self.real = folder, packages, real

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages or name.startswith(tuple(self.real)):
            return None
        there = self.folder / name.replace(".", "/")
        if name.startswith(f"{self.packages[0]}.") and not (
            there.is_dir() or there.with_suffix(".py").is_file()
        ):
            return None  # an attribute, not a module
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = Module(spec.name)
        module.__path__ = [str(self.folder / spec.name.replace(".", "/"))]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """A stand-in is made empty."""


@contextmanager
def around(folder: Path, packages: Sequence[str], real: Sequence[str]) -> Iterator[None]:
    """Imports of ``packages`` go to stand-ins, but those below ``real`` to the files in
    ``folder``; afterwards all are forgotten.
    """

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    kept = {name: sys.modules.pop(name) for name in loaded()}
    finder = Finder(folder, packages, real)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(kept)


@lru_cache
def compiled(path: Path, names: tuple[str, ...], inside: str | None) -> types.CodeType:
    """The code of :func:`definitions`."""
    found = ast.parse(path.read_text()).body
    if inside is not None:
        found = next(
            node for node in found if isinstance(node, ast.ClassDef) and node.name == inside
        ).body
    chosen = [
        node
        for node in found
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    ]
    assert sorted(node.name for node in chosen) == sorted(names)
    return compile(
        ast.Module(chosen, []), path.name, "exec", flags=__future__.annotations.compiler_flag
    )


def definitions(
    path: Path, names: tuple[str, ...], scope: dict[str, object], inside: str | None = None
) -> None:
    """Runs functions and classes of a module that cannot be imported (methods of class
    ``inside``) from its source in ``scope``.
    """
    exec(compiled(path, names, inside), scope)
