"""Warm-up logs: what was drafted, how confident the draft was, and whether the target accepted it."""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import _checks as checks
from echo._checks import EchoError

_FIELDS: dict[str, Any] = {
    "depth": np.int32,
    "confidence": np.float32,
    "accepted": np.bool_,
    "rank": np.int32,
    "weight": np.float32,
    "step": np.int64,
}
_NEEDED = tuple(_FIELDS)[:3]
_HEADER = {"format": "echo-log", "version": 1}


@dataclass(frozen=True)
class WarmupLog:
    """Rows of a warm-up run, one for each verified drafted node (paper, section on calibration).

    Rows that a gate or a budget kept from being verified are *missing* from the log, never *rejected*. A log from behind a gate
    is biased unless its rows carry inverse-probability weights (:class:`echo.gating.ExploringGate`).

    Attributes:
        depth: int32 [n], 1 for the first drafted layer.
        confidence: float32 [n], path probability of the node under the draft, in [0, 1].
        accepted: bool [n], whether the target accepted the whole path to the node.
        rank: int32 [n], place of the node among its layer's candidates; 0 is the maximum-likelihood path.
        weight: float32 [n], 1 unless rows were sampled.
        step: int64 [n], id of the request-step that the row came from; rows of one step are not independent.
    """

    depth: NDArray[np.int32]
    confidence: NDArray[np.float32]
    accepted: NDArray[np.bool_]
    rank: NDArray[np.int32]
    weight: NDArray[np.float32]
    step: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in _FIELDS}
        if len(set(sizes.values())) > 1:
            raise EchoError(f"log: expected columns of one length, got {sizes}")
        for name, kind in _FIELDS.items():
            column = getattr(self, name)
            if column.dtype != kind or column.ndim != 1:
                raise EchoError(
                    f"{name}: expected {kind.__name__} [n], as from_arrays makes it, got {column.dtype} {list(column.shape)}"
                )
        check(self.depth >= 1, "depth", ">= 1", self.depth)
        check(
            (self.confidence >= 0) & (self.confidence <= 1),
            "confidence",
            "within [0, 1] and not NaN",
            self.confidence,
        )
        check(self.rank >= 0, "rank", ">= 0", self.rank)
        check_weights(self.weight)

    def __len__(self) -> int:
        return len(self.depth)

    @classmethod
    def from_arrays(
        cls,
        depth: ArrayLike,
        confidence: ArrayLike,
        accepted: ArrayLike,
        *,
        rank: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        step: ArrayLike | None = None,
        gated: bool = False,
    ) -> WarmupLog:
        """A log from columns of one length.

        Args:
            depth: ints [n], at least 1.
            confidence: floats [n] in [0, 1].
            accepted: bools (or 0/1) [n].
            rank: ints [n]; 0 (the maximum path) where not given.
            weight: floats [n]; 1 where not given.
            step: ints [n]; each row is a step of its own where not given, and then nothing shows that rows are missing behind a gate.
            gated: the rows were drafted behind a gate; then ``weight`` must say how likely each was to be seen.

        Raises:
            EchoError: columns of different lengths, the first row whose value is out of range, or gated rows without weights.
        """
        if gated and weight is None:
            raise EchoError(
                "weight: expected inverse-probability weights for rows from behind a gate (ExploringGate), got none"
            )
        rows = np.atleast_1d(np.asarray(depth))
        return cls(
            depth=_integers("depth", rows),
            confidence=np.atleast_1d(np.asarray(confidence, dtype=np.float32)),
            accepted=labels(accepted),
            rank=_integers(
                "rank", np.zeros(len(rows)) if rank is None else np.atleast_1d(np.asarray(rank))
            ),
            weight=np.ones(len(rows), np.float32)
            if weight is None
            else np.atleast_1d(np.asarray(weight, dtype=np.float32)),
            step=_integers(
                "step", np.arange(len(rows)) if step is None else np.atleast_1d(np.asarray(step))
            ),
        )

    @classmethod
    def from_mapping(cls, columns: Mapping[str, Any], *, gated: bool = False) -> WarmupLog:
        """A log from named columns: a dict of arrays, an open npz file, a data frame.

        Args:
            columns: ``depth``, ``confidence`` and ``accepted``; optionally ``rank``, ``weight``, ``step``.
            gated: as in :meth:`from_arrays`, which also says more of the columns and errors.

        Raises:
            EchoError: a column is missing, or one is unknown.
        """
        names = set(columns.keys())
        if missing := set(_NEEDED) - names:
            raise EchoError(
                f"columns: expected {', '.join(_NEEDED)}, got none named {', '.join(sorted(missing))}"
            )
        if unknown := names - set(_FIELDS):
            raise EchoError(
                f"columns: expected only {', '.join(_FIELDS)}, got {', '.join(sorted(map(str, unknown)))}"
            )
        return cls.from_arrays(
            **{name: columns[name] for name in _FIELDS if name in names}, gated=gated
        )

    @classmethod
    def concat(cls, logs: Iterable[WarmupLog]) -> WarmupLog:
        """All rows of several ``logs``; step ids are shifted so that steps of different logs stay apart.

        Raises:
            EchoError: no log was given.
        """
        parts, first = [], 0
        for log in logs:
            step = _dense(checks.instance("logs", log, WarmupLog).step)
            parts.append((log, step + first))
            first += int(step.max()) + 1 if len(log) else 0
        if not parts:
            raise EchoError("logs: expected at least one WarmupLog, got none")
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(log, name) for log, _ in parts])
            for name in _FIELDS
            if name != "step"
        }
        return cls(step=np.concatenate([step for _, step in parts]), **columns)

    def validate(self) -> None:
        """Checks what single values cannot show: that the file holds one run, not several with clashing step ids.

        Raises:
            EchoError: the first row that repeats the (step, depth, rank) of another, or the second accepted row of one step and
                depth (a target accepts one path).
        """
        _first_repeat(
            "step, depth, rank: expected each once",
            np.arange(len(self)),
            self.step,
            self.depth,
            self.rank,
        )
        taken = np.flatnonzero(self.accepted)
        _first_repeat(
            "accepted: expected one accepted row a step and depth",
            taken,
            self.step[taken],
            self.depth[taken],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``path`` (.npz, .jsonl or .parquet) in one atomic move: a reader sees the old file or the whole new one.

        Raises:
            EchoError: another kind of file, or Parquet without ``pyarrow``.
        """
        columns: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        kind = _kind(path)
        arrow = _arrow() if kind == ".parquet" else None
        with write_atomically(path) as handle:
            if arrow is not None:
                arrow.parquet.write_table(arrow.table(columns), handle)
            elif kind == ".jsonl":
                lines = [json.dumps({**_HEADER, "rows": len(self)})]
                rows = zip(*(columns[name].tolist() for name in _FIELDS), strict=True)
                lines += [json.dumps(dict(zip(_FIELDS, row, strict=True))) for row in rows]
                handle.write(("\n".join(lines) + "\n").encode())
            else:
                np.savez_compressed(handle, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WarmupLog:
        """Reads .npz, .jsonl or .parquet files: the one at ``path``, or all that match it as a glob pattern, in order of their names.

        A line of .jsonl is an object with the columns of :meth:`from_mapping`. The header that :meth:`save` writes as a first line
        counts the rows, so that a file cut at the end of a line is found out too; files without it are read as they are.

        Raises:
            EchoError: a file that is truncated or mixed up, with its line or row; nothing matches; or ``pyarrow`` is not there.
            FileNotFoundError: no such file.
        """
        logs = list(cls.stream(path))
        return logs[0] if len(logs) == 1 else cls.concat(logs)

    @classmethod
    def stream(cls, path: str | os.PathLike[str]) -> Iterator[WarmupLog]:
        """The files that :meth:`load` would read from ``path``, one log at a time: memory for one file only.

        Raises:
            EchoError: as :meth:`load`.
        """
        text = os.fspath(path)
        names = (
            [text]
            if Path(text).exists() or not glob.has_magic(text)
            else sorted(glob.glob(text, recursive=True))
        )
        if not names:
            raise EchoError(f"path: expected files that match {text}, got none")
        for name in names:
            yield cls._read(name)

    @classmethod
    def _read(cls, path: str) -> WarmupLog:
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".npz": _read_npz}[_kind(path)]
        try:
            with checks.reading(
                f"path: expected a warm-up log with the columns {', '.join(_FIELDS)}"
            ):
                log = cls.from_mapping(read(path))
                log.validate()
        except EchoError as error:
            raise EchoError(f"{error}, in the warm-up log {path}") from error
        return log


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` in one move at the end of the block, or vanishes if the block fails."""
    target = Path(path)
    with open(f"{target}.{secrets.token_hex(4)}.part", "xb") as part:
        try:
            yield part
            part.flush()
            os.fsync(part.fileno())
        except BaseException:
            os.unlink(part.name)
            raise
    os.replace(part.name, target)


def _kind(path: str | os.PathLike[str]) -> str:
    kind = Path(path).suffix
    if kind not in (".npz", ".jsonl", ".parquet"):
        raise EchoError(f"path: expected a .npz, .jsonl or .parquet file, got {os.fspath(path)}")
    return kind


def _read_npz(path: str) -> dict[str, Any]:
    with open(path, "rb") as handle, np.load(handle) as file:
        return {name: file[name] for name in file.files}


def _read_jsonl(path: str) -> dict[str, Any]:
    names: list[str] = []
    rows: list[list[Any]] = []
    promised = None
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise EchoError(
                    f"line {number}: expected a JSON object, got {line[:40]!r} ({error})"
                ) from error
            if not isinstance(entry, dict):
                raise EchoError(f"line {number}: expected a JSON object, got {line[:40]!r}")
            if number == 1 and "format" in entry:
                if {key: entry.get(key) for key in _HEADER} != _HEADER:
                    raise EchoError(f"line 1: expected the header {_HEADER}, got {entry}")
                promised = entry.get("rows")
                continue
            names = names or [name for name in _FIELDS if name in entry]
            if set(entry) != set(names) or not set(_NEEDED) <= set(names):
                expected = names if set(_NEEDED) <= set(names) else _NEEDED
                raise EchoError(
                    f"line {number}: expected the columns {', '.join(expected)}, got {', '.join(entry) or 'none'}"
                )
            row = [entry[name] for name in names]
            if not all(isinstance(value, int | float) for value in row):
                raise EchoError(
                    f"line {number}: expected numbers and true or false, got {line.strip()[:80]!r}"
                )
            rows.append(row)
    if promised is not None and promised != len(rows):
        raise EchoError(
            f"line {len(rows) + 1}: expected {promised} rows as the header says, got the end of the file after {len(rows)}"
        )
    table = list(zip(*rows, strict=True)) if rows else [() for _ in _NEEDED]
    return dict(zip(names or _NEEDED, table, strict=True))


def _read_parquet(path: str) -> dict[str, Any]:
    table = _arrow().parquet.read_table(path)
    for name in table.column_names:
        if table[name].null_count:
            row = int(np.argmax(np.asarray(table[name].is_null())))
            raise EchoError(f"{name}: expected a value in every row, got null in row {row}")
    return {name: table[name].to_numpy() for name in table.column_names}


def _arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EchoError(
            "path: expected pyarrow for Parquet files (pip install 'echo-specdec[parquet]'), got no such module"
        ) from error
    return pyarrow


def _dense(step: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids, renumbered from 0 where they are negative or so large that shifting them could overflow."""
    if not len(step) or (step.min() >= 0 and step.max() < 1 << 40):
        return step
    return np.unique(step, return_inverse=True)[1].astype(np.int64)


def _first_repeat(expected: str, rows: NDArray[np.int64], *keys: NDArray[Any]) -> None:
    if len(rows) < 2 or (np.diff(keys[0]) > 0).all():
        return
    order = np.lexsort(keys[::-1])
    same = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys])
    if same.any():
        row = int(rows[order[1:][same]].min())
        values = ", ".join(str(key[np.searchsorted(rows, row)]) for key in keys)
        raise EchoError(f"{expected}, got ({values}) again in row {row}")


def _integers(name: str, values: NDArray[Any]) -> NDArray[Any]:
    kind = _FIELDS[name]
    with np.errstate(invalid="ignore"):
        whole = values.astype(kind if values.dtype.kind in "iuf" else np.bool_)
    if whole.dtype != kind or not np.array_equal(whole, values):
        raise EchoError(
            f"{name}: expected integers of {kind.__name__}, got {values.dtype} such as {values[:3].tolist()}"
        )
    return whole


def labels(accepted: ArrayLike) -> NDArray[np.bool_]:
    """bool [n] of ``accepted``, bools or 0 and 1.

    Raises:
        EchoError: the first row that is neither.
    """
    values = np.atleast_1d(np.asarray(accepted))
    if values.dtype != np.bool_:
        check(np.isin(values, (0, 1)), "accepted", "0 or 1", values)
    return values.astype(np.bool_)


def check_weights(weight: NDArray[Any]) -> None:
    """Raises :class:`EchoError` at the first weight that is negative, or no finite number."""
    check(np.isfinite(weight) & (weight >= 0), "weight", "finite and >= 0", weight)


def check(good: NDArray[np.bool_], name: str, expected: str, values: NDArray[Any]) -> None:
    """Raises :class:`EchoError` at the first of ``values`` that is not ``good``, with what was ``expected`` of it."""
    if not good.all():
        row = int(np.argmin(good))
        raise EchoError(f"{name}: expected values {expected}, got {values[row]} in row {row}")
