"""Warm-up logs: verified draft tokens, their confidence, and whether the target accepted them."""

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
    """One row per verified draft token of a warm-up run (paper, section on calibration).

    Tokens that a gate or a budget kept from verification are *missing*, not *rejected*: a gated log
    is biased unless rows carry inverse-probability weights (:class:`ExploringGate`).

    Attributes:
        depth: int32 [n], 1 for the first draft layer.
        confidence: float32 [n], path probability under the draft, in [0, 1].
        accepted: bool [n], whether the target accepted the whole path to the node.
        rank: int32 [n], rank among the candidates of its layer; 0: maximum-likelihood path.
        weight: float32 [n], 1 unless rows were sampled.
        step: int64 [n], id of the row's request-step; rows of one step are not independent.

    Raises:
        EchoError: columns of different lengths or dtypes, or the first value out of range.

    Example:
        >>> log = WarmupLog.from_arrays([1, 2], [0.9, 0.4], [1, 0], step=[0, 0])
        >>> more = WarmupLog.from_mapping({"depth": [1], "confidence": [0.8], "accepted": [1]})
        >>> both = WarmupLog.concat([log, more])
        >>> both.validate(), both.step.tolist()  # one run, ids kept apart
        (None, [0, 0, 1])
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     log.save(f"{folder}/1.npz")
        ...     more.save(f"{folder}/2.jsonl")
        ...     [len(part) for part in WarmupLog.stream(f"{folder}/*")]
        ...     len(WarmupLog.load(f"{folder}/*"))
        [2, 1]
        3
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
                expected = f"{name}: expected {kind.__name__} [n], as from_arrays makes it"
                raise EchoError(f"{expected}, got {column.dtype} {list(column.shape)}")
        c = self.confidence
        check(self.depth >= 1, "depth", ">= 1", self.depth)
        check((c >= 0) & (c <= 1), "confidence", "within [0, 1] and not NaN", c)
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
        """Build a log from columns of one length; a bool may be 0 or 1.

        Args:
            depth, confidence, accepted: as in the class.
            rank, weight: Default to 0 and 1.
            step: Defaults to one step per row; then rows missing because of a gate go unnoticed.
            gated: recorded with a gate; ``weight`` must then hold inverse probabilities.

        Raises:
            EchoError: as the class, or gated rows without weights.
        """
        if gated and weight is None:
            expected = "weight: expected inverse-probability weights for rows from behind a gate"
            raise EchoError(f"{expected} (ExploringGate), got none")
        depths = _integers("depth", depth)
        count = len(depths)
        weights = np.ones(count) if weight is None else weight
        return cls(
            depth=depths,
            confidence=_floats("confidence", confidence),
            accepted=labels(accepted),
            rank=_integers("rank", np.zeros(count) if rank is None else rank),
            weight=_floats("weight", weights),
            step=_integers("step", np.arange(count) if step is None else step),
        )

    @classmethod
    def from_mapping(cls, columns: Mapping[str, Any], *, gated: bool = False) -> WarmupLog:
        """Build a log as :meth:`from_arrays`, from a dict, an open npz file or a data frame.

        Raises:
            EchoError: a missing or unknown column, and as :meth:`from_arrays`.
        """
        names = list(columns.keys())
        if missing := [name for name in _NEEDED if name not in names]:
            expected = f"columns: expected {', '.join(_NEEDED)}"
            raise EchoError(f"{expected}, got none named {', '.join(missing)}")
        if unknown := sorted(str(name) for name in names if name not in _FIELDS):
            expected = f"columns: expected only {', '.join(_FIELDS)}"
            raise EchoError(f"{expected}, got {', '.join(unknown)}")
        return cls.from_arrays(**{name: columns[name] for name in names}, gated=gated)

    @classmethod
    def concat(cls, logs: Iterable[WarmupLog]) -> WarmupLog:
        """Concatenate ``logs``, shifting step ids to keep them apart; EchoError: no log."""
        parts = []
        first = 0
        for log in logs:
            step = _dense(checks.instance("logs", log, WarmupLog).step)
            parts.append((log, step + first))
            first += int(step.max()) + 1 if len(log) else 0
        if not parts:
            raise EchoError("logs: expected at least one WarmupLog, got none")
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(log, name) for log, _ in parts]) for name in _FIELDS
        }
        return cls(**columns | {"step": np.concatenate([step for _, step in parts])})

    def validate(self) -> None:
        """Check that the log holds one run, not several with clashing step ids.

        Raises:
            EchoError: the first row that repeats another's (step, depth, rank), or the second
                accepted row of a step and depth (a target accepts one path).
        """
        keys = self.step, self.depth, self.rank
        _first_repeat("step, depth, rank: expected each once", np.arange(len(self)), *keys)
        rows = np.flatnonzero(self.accepted)
        expected = "accepted: expected one accepted row a step and depth"
        _first_repeat(expected, rows, self.step[rows], self.depth[rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (.npz, .jsonl or .parquet) atomically: readers see the old or new file.

        Raises:
            EchoError: another file type, or Parquet without ``pyarrow``.
        """
        kind = _kind(path)
        arrow = _arrow() if kind == ".parquet" else None
        with write_atomically(path) as handle:
            if arrow is not None:
                arrow.parquet.write_table(arrow.table(vars(self)), handle)
            elif kind == ".npz":
                np.savez_compressed(handle, **vars(self))
            else:
                rows = zip(*(column.tolist() for column in vars(self).values()), strict=True)
                objects = [dict(zip(_FIELDS, row, strict=True)) for row in rows]
                lines = [json.dumps(value) for value in ({**_HEADER, "rows": len(self)}, *objects)]
                handle.write(("\n".join(lines) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WarmupLog:
        """Read the .npz, .jsonl or .parquet file ``path``, or all that match it as a glob.

        Each line of .jsonl is an object with the columns of :meth:`from_mapping`; a header, which
        :meth:`save` writes, counts the rows.

        Raises:
            EchoError: a truncated or inconsistent file, with its line or row; no file matches; or
                Parquet without ``pyarrow``.
            FileNotFoundError: no such file.
        """
        logs = list(cls.stream(path))
        return logs[0] if len(logs) == 1 else cls.concat(logs)

    @classmethod
    def stream(cls, path: str | os.PathLike[str]) -> Iterator[WarmupLog]:
        """Read as :meth:`load`, but one file at a time, in the memory of one."""
        names = [text := os.fspath(path)]
        if not Path(text).exists() and glob.has_magic(text):
            names = sorted(glob.glob(text, recursive=True))
        if not names:
            raise EchoError(f"path: expected files that match {text}, got none")
        for name in names:
            yield cls._read(name)

    @classmethod
    def _read(cls, path: str) -> WarmupLog:
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".npz": _read_npz}[_kind(path)]
        expected = f"path: expected a warm-up log with the columns {', '.join(_FIELDS)}"
        try:
            with checks.reading(expected):
                log = cls.from_mapping(read(path))
                log.validate()
        except EchoError as error:
            raise EchoError(f"{error}, in the warm-up log {path}") from error
        return log


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces ``path`` after the block, or vanishes on failure."""
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
            expected = f"line {number}: expected"
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise EchoError(f"{expected} a JSON object, got {line[:40]!r}")
            if number == 1 and "format" in entry:
                if {key: entry.get(key) for key in _HEADER} != _HEADER:
                    raise EchoError(f"{expected} the header {_HEADER}, got {entry}")
                promised = entry.get("rows")
                continue
            names = names or [name for name in _FIELDS if name in {*entry, *_NEEDED}]
            if set(entry) != set(names):
                found = ", ".join(entry) or "none"
                raise EchoError(f"{expected} the columns {', '.join(names)}, got {found}")
            row = [entry[name] for name in names]
            if not all(isinstance(value, int | float) for value in row):
                got = repr(line.strip()[:80])
                raise EchoError(f"{expected} numbers and true or false, got {got}")
            rows.append(row)
    if promised not in (None, len(rows)):
        expected = f"line {len(rows) + 1}: expected {promised} rows as the header says"
        raise EchoError(f"{expected}, got the end of the file after {len(rows)}")
    table = list(zip(*rows, strict=True)) or [()] * len(_NEEDED)
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
        expected = "path: expected pyarrow for Parquet files (pip install 'echo-specdec[parquet]')"
        raise EchoError(f"{expected}, got no such module") from error
    return pyarrow


def _dense(step: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber ids from 0 if they are negative or so large that shifting them could overflow."""
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


def _floats(name: str, value: ArrayLike) -> NDArray[np.float32]:
    with checks.reading(f"{name}: expected numbers"):
        return np.atleast_1d(np.asarray(value, dtype=np.float32))


def _integers(name: str, given: ArrayLike) -> NDArray[Any]:
    kind = _FIELDS[name]
    values = np.atleast_1d(np.asarray(given))
    with np.errstate(invalid="ignore"):
        whole = values.astype(kind if values.dtype.kind in "iuf" else np.bool_)
    if whole.dtype != kind or not np.array_equal(whole, values):
        got = f"{values.dtype} such as {values[:3].tolist()}"
        raise EchoError(f"{name}: expected integers of {kind.__name__}, got {got}")
    return whole


def labels(accepted: ArrayLike) -> NDArray[np.bool_]:
    """Return ``accepted`` (bools, or 0 and 1) as bool [n]; EchoError at the first other value."""
    values = np.atleast_1d(np.asarray(accepted))
    if values.dtype != np.bool_:
        check(np.isin(values, (0, 1)), "accepted", "0 or 1", values)
    return values.astype(np.bool_)


def check_weights(weight: NDArray[Any]) -> None:
    """Raise :class:`EchoError` at the first weight that is negative or not finite."""
    check(np.isfinite(weight) & (weight >= 0), "weight", "finite and >= 0", weight)


def check(good: NDArray[np.bool_], name: str, expected: str, values: NDArray[Any]) -> None:
    """Raise :class:`EchoError` at the first of ``values`` that is not ``good``."""
    if not good.all():
        row = int(np.argmin(good))
        raise EchoError(f"{name}: expected values {expected}, got {values[row]} in row {row}")
