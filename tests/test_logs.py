"""Log files: every kind round-trips, and what is cut or mixed up is refused with its place."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import echo
from echo.gating import ConfidenceHistograms

FIELDS = ("depth", "confidence", "accepted", "rank", "weight", "step")


def same(one, two):
    return all(
        np.array_equal(getattr(one, f), getattr(two, f))
        and getattr(one, f).dtype == getattr(two, f).dtype
        for f in FIELDS
    )


@st.composite
def logs(draw):
    n = draw(st.integers(0, 20))
    floats = st.floats(0, 1, width=32)
    return echo.WarmupLog.from_arrays(
        draw(hnp.arrays(np.int32, n, elements=st.integers(1, 60))),
        draw(hnp.arrays(np.float32, n, elements=floats)),
        draw(hnp.arrays(np.bool_, n)),
        rank=draw(hnp.arrays(np.int32, n, elements=st.integers(0, 1000))),
        weight=draw(hnp.arrays(np.float32, n, elements=st.floats(0, 1000, width=32))),
        step=np.array(
            draw(st.lists(st.integers(-(2**62), 2**62), min_size=n, max_size=n, unique=True)),
            dtype=np.int64,
        ),
    )


@pytest.mark.parametrize("kind", ["npz", "jsonl", "parquet"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
def test_files_round_trip_exactly(tmp_path, kind, log):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"log.{kind}"
    log.save(path)
    assert same(echo.WarmupLog.load(path), log)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def small(n=4, seed=0):
    random = np.random.default_rng(seed)
    return echo.WarmupLog.from_arrays(
        np.arange(n) % 2 + 1, random.random(n), random.random(n) < 0.5, step=np.arange(n) // 2
    )


def test_from_mapping():
    log = small()
    assert same(echo.WarmupLog.from_mapping({f: getattr(log, f) for f in FIELDS}), log)
    assert same(
        echo.WarmupLog.from_mapping({"accepted": [1], "confidence": [0.5], "depth": [2]}),
        echo.WarmupLog.from_arrays([2], [0.5], [1]),
    )
    with pytest.raises(
        echo.EchoError,
        match="columns: expected depth, confidence, accepted, got none named accepted",
    ):
        echo.WarmupLog.from_mapping({"depth": [1], "confidence": [0.5]})
    with pytest.raises(echo.EchoError, match=r"columns: expected only .*, got label"):
        echo.WarmupLog.from_mapping(
            {"depth": [1], "confidence": [0.5], "accepted": [1], "label": [1]}
        )


def test_a_glob_loads_all_files_and_keeps_their_steps_apart(tmp_path):
    parts = [small(seed=i) for i in range(3)]
    for i, log in enumerate(parts):
        log.save(tmp_path / f"day{i}.{'jsonl' if i == 1 else 'npz'}")
    whole = echo.WarmupLog.load(tmp_path / "day*")
    assert same(whole, echo.WarmupLog.concat(parts))
    assert len(np.unique(whole.step)) == 6
    assert ConfidenceHistograms.of(
        echo.WarmupLog.stream(tmp_path / "day*")
    ) == ConfidenceHistograms.of(whole)
    with pytest.raises(
        echo.EchoError, match=r"path: expected files that match .*night\*, got none"
    ):
        echo.WarmupLog.load(tmp_path / "night*")
    with pytest.raises(FileNotFoundError):
        echo.WarmupLog.load(tmp_path / "night.npz")


def test_concat_keeps_steps_of_huge_ids_apart():
    log = echo.WarmupLog.from_arrays([1, 2], [0.5, 0.4], [1, 0], step=[2**62, -(2**62)])
    whole = echo.WarmupLog.concat([log, log, log])
    assert len(np.unique(whole.step)) == 6


def line(**change):
    return json.dumps({"depth": 1, "confidence": 0.5, "accepted": True, "step": 3} | change)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(), line(step=4)[:-9]], "line 2: expected a JSON object, got"),
        ([line(), "[1, 2]"], r"line 2: expected a JSON object, got '\[1, 2\]'"),
        (
            [line(), '{"depth": 1, "confidence": 0.5}'],
            "line 2: expected the columns depth, .*, step, got depth, confidence,",
        ),
        (
            [line(), line(extra=1)],
            "line 2: expected the columns .*, got depth, confidence, accepted, step, extra,",
        ),
        (['{"depth": 1}'], "line 1: expected the columns depth, confidence, accepted, got depth,"),
        ([line(), line(step=4, depth="2")], "line 2: expected numbers and true or false, got"),
        (
            [line(), line(step=4, confidence=1.5)],
            r"confidence: expected values within \[0, 1\] and not NaN, got 1.5 in row 1",
        ),
        (
            [line(), line(step=4), line()],
            r"step, depth, rank: expected each once, got \(3, 1, 0\) again in row 2",
        ),
        (
            ['{"format": "echo-log", "version": 2, "rows": 1}', line()],
            "line 1: expected the header",
        ),
        (
            ['{"format": "echo-log", "version": 1, "rows": 3}', line(), line(step=4)],
            "line 3: expected 3 rows as the header says",
        ),
    ],
)
def test_a_faulty_jsonl_file_is_refused_with_its_line_or_row(tmp_path, lines, message):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(echo.EchoError, match=message) as caught:
        echo.WarmupLog.load(path)
    assert str(path) in str(caught.value)


def test_a_target_accepts_one_path():
    log = echo.WarmupLog.from_arrays(
        [1, 1, 1, 2], [0.5, 0.3, 0.2, 0.1], [1, 0, 1, 0], rank=[0, 1, 2, 0], step=[8, 8, 8, 8]
    )
    with pytest.raises(
        echo.EchoError,
        match=r"accepted: expected one accepted row a step and depth, got \(8, 1\) again in row 2",
    ):
        log.validate()


@pytest.mark.parametrize("kind", ["npz", "jsonl", "parquet"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"log.{kind}"
    small(200).save(path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        if kind == "jsonl" and cut == 0:
            assert len(echo.WarmupLog.load(path)) == 0  # an empty file is an empty log
            continue
        with pytest.raises(echo.EchoError, match=rf"expected .*log\.{kind}"):
            echo.WarmupLog.load(path)


@pytest.mark.parametrize("place", [59, 1600])
def test_a_file_with_a_damaged_byte_is_refused(tmp_path, place):
    path = tmp_path / "log.npz"
    small(200).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(echo.EchoError, match="path: expected a warm-up log"):
        echo.WarmupLog.load(path)


def test_a_parquet_file_with_nulls_is_refused_with_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"depth": [1, 1, None], "confidence": [0.5, 0.4, 0.3], "accepted": [True, False, True]}
    )
    parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(
        echo.EchoError,
        match="depth: expected a value in every row, got null in row 2, in the warm-up log",
    ):
        echo.WarmupLog.load(tmp_path / "log.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(echo.EchoError, match=r"pip install 'echo-specdec\[parquet\]'"):
        small().save(tmp_path / "log.parquet")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "log.npz"
    small().save(path)
    before = path.read_bytes()

    def fail(handle, **columns):
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        small(8).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["log.npz"]


def test_a_saved_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    small().save(tmp_path / "log.npz")
    assert (tmp_path / "log.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(
        echo.EchoError, match=r"path: expected a .npz, .jsonl or .parquet file, got .*log.csv"
    ):
        small().save(tmp_path / "log.csv")


@pytest.mark.parametrize("name", ["confidence", "weight"])
def test_columns_that_are_no_numbers_are_named(name):
    columns = {"confidence": [0.5], "weight": [1.0]} | {name: ["half"]}
    with pytest.raises(echo.EchoError, match=f"{name}: expected numbers, got ValueError"):
        echo.WarmupLog.from_arrays([1], accepted=[1], **columns)
