"""Warm-up logs: what was drafted, how confident the draft was, and whether the target accepted it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo.errors import EchoError

_FIELDS = ("depth", "confidence", "accepted", "rank", "weight", "step")


@dataclass(frozen=True)
class WarmupLog:
    """Rows of a warm-up run, one for each verified drafted node (paper, section on calibration).

    Rows that a gate or a budget kept from being verified are *missing* from the log, never *rejected*.

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
        _check(self.depth >= 1, "depth", ">= 1", self.depth)
        _check((self.confidence >= 0) & (self.confidence <= 1), "confidence", "within [0, 1] and not NaN", self.confidence)
        _check(self.rank >= 0, "rank", ">= 0", self.rank)
        _check(np.isfinite(self.weight) & (self.weight >= 0), "weight", "finite and >= 0", self.weight)

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
    ) -> WarmupLog:
        """A log from columns of one length.

        Args:
            depth: ints [n], at least 1.
            confidence: floats [n] in [0, 1].
            accepted: bools (or 0/1) [n].
            rank: ints [n]; 0 (the maximum path) where not given.
            weight: floats [n]; 1 where not given.
            step: ints [n]; each row is a step of its own where not given.

        Raises:
            EchoError: columns of different lengths, or the first row whose value is out of range.
        """
        rows = np.atleast_1d(np.asarray(depth))
        labels = np.atleast_1d(np.asarray(accepted))
        if labels.dtype != np.bool_:
            _check(np.isin(labels, (0, 1)), "accepted", "0 or 1", labels)
        return cls(
            depth=_integers("depth", rows).astype(np.int32),
            confidence=np.atleast_1d(np.asarray(confidence, dtype=np.float32)),
            accepted=labels.astype(np.bool_),
            rank=_integers("rank", np.zeros(len(rows)) if rank is None else np.atleast_1d(np.asarray(rank))).astype(np.int32),
            weight=np.ones(len(rows), np.float32) if weight is None else np.atleast_1d(np.asarray(weight, dtype=np.float32)),
            step=_integers("step", np.arange(len(rows)) if step is None else np.atleast_1d(np.asarray(step))).astype(np.int64),
        )

    @classmethod
    def concat(cls, logs: Iterable[WarmupLog]) -> WarmupLog:
        """All rows of several logs; step ids are shifted so that steps of different logs stay apart.

        Raises:
            EchoError: no log was given.
        """
        parts, first = [], 0
        for log in logs:
            parts.append((log, log.step + first))
            first += int(log.step.max()) + 1 if len(log) else 0
        if not parts:
            raise EchoError("logs: expected at least one WarmupLog, got none")
        columns: dict[str, Any] = {name: np.concatenate([getattr(log, name) for log, _ in parts]) for name in _FIELDS[:-1]}
        return cls(step=np.concatenate([step for _, step in parts]), **columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``path`` (.npz) in one atomic move: a reader sees the old file or the whole new one."""
        target = Path(path)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".part", delete=False) as part:
            try:
                columns: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
                np.savez_compressed(part, **columns)
            except BaseException:
                os.unlink(part.name)
                raise
        os.replace(part.name, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WarmupLog:
        """Reads what :meth:`save` wrote.

        Raises:
            EchoError: the file is not a whole warm-up log.
        """
        try:
            with open(path, "rb") as handle, np.load(handle) as file:
                return cls.from_arrays(**{name: file[name] for name in _FIELDS})
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            if isinstance(error, FileNotFoundError | EchoError):
                raise
            raise EchoError(f"path: expected a warm-up log with the columns {', '.join(_FIELDS)} in {path}, got: {error}") from error


def _integers(name: str, values: NDArray[Any]) -> NDArray[Any]:
    whole = values.astype(np.int64) if values.dtype.kind in "iuf" and np.isfinite(values).all() else None
    if whole is None or not np.array_equal(whole, values):
        raise EchoError(f"{name}: expected integers, got {values.dtype} such as {values[:3].tolist()}")
    return whole


def _check(good: NDArray[np.bool_], name: str, expected: str, values: NDArray[Any]) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise EchoError(f"{name}: expected values {expected}, got {values[row]} in row {row}")
