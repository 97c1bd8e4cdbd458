"""Confidence histograms: all calibration needs of a log, in constant memory, summed exactly."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.logs import WarmupLog, write_atomically

VERSION = 1
PER_OCTAVE = 128
OCTAVES = 24
BINS = PER_OCTAVE * OCTAVES + 2
"""Bins of a histogram. Their edges are the bfloat16 numbers from 2^-24 to 1, the upper 16 bits of a
float32 confidence: bin 0 holds values below 2^-24, the last bin exactly 1, and every other bin
spans a factor of at most 1 + 1/128."""
UNIT = 1 << 16
"""Fixed-point weight 1.0: weights are rounded to multiples of 2^-16 before they are added."""
MIN_WEIGHT = 1 / 64
MAX_WEIGHT = 1024.0
"""Bounds of a nonzero weight: sums of squares over blocks of 2^16 rows are exact in float64, and a
rounded square is within 4%."""
MAX_DEPTH = 64
RANKS = 2
"""Ranks told apart: 0, the maximum-likelihood path, on which gates are judged, and all others."""
ROWS = 0
WEIGHT = 1
SQUARE = 2
"""Planes of ``mass``: number of rows, sum of weights, sum of squared weights (in 2^-16)."""
_FIRST = ((127 - OCTAVES) << 7) - 1  # upper half of the bits of 2^-24, less 1: becomes bin 0
_BLOCK = 1 << 18
LOWER: NDArray[np.float32] = ((np.arange(BINS, dtype=np.int32) + _FIRST) << 16).view(np.float32)
LOWER[0] = 0.0
UPPER = np.append(np.nextafter(LOWER[1:], np.float32(0.0)), np.float32(1.0))
"""float32 [3074]: smallest and greatest confidence of each bin."""
_LOGS = np.log(np.maximum(LOWER, 2.0**-OCTAVES, dtype=np.float64))
MIDDLE = 0.5 * (_LOGS + np.append(_LOGS[1:], 0.0))
"""float64 [3074]: log of each bin's geometric middle; log 2^-24 for the first."""


@dataclass(frozen=True, eq=False)
class ConfidenceHistograms:
    """Accepted and rejected rows of logs, by depth, rank 0 or not, and confidence; immutable.

    Entries are integers, so merged histograms calibrate to the same bits as all rows at once.

    Attributes:
        mass: int64 [3, depths, 2, 2, 3074]: rows, weights, squared weights (both in 2^-16);
            depth - 1; rank 0, all other ranks; rejected, accepted; bin.

    Raises:
        EchoError: a mass of another shape or dtype, or with negative entries.

    Example:
        >>> monday = WarmupLog.from_arrays([1, 1], [0.9, 0.2], [1, 0])
        >>> tuesday = WarmupLog.from_arrays([1], [0.9], [1])
        >>> both = ConfidenceHistograms.of(monday).merge(ConfidenceHistograms.of(tuesday))
        >>> both == ConfidenceHistograms.of([monday, tuesday]), both.rows
        (True, 3)
        >>> both.add(tuesday).since(both) == ConfidenceHistograms.of(tuesday)
        True
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     both.save(f"{folder}/both.npz")
        ...     ConfidenceHistograms.load(f"{folder}/both.npz") == both
        True
    """

    mass: NDArray[np.int64]

    def __post_init__(self) -> None:
        kind = self.mass.dtype
        shape = self.mass.shape
        fits = len(shape) == 5 and (shape[0], *shape[2:]) == (3, RANKS, 2, BINS)
        if kind != np.int64 or not fits or not 1 <= shape[1] <= MAX_DEPTH:
            expected = f"int64 [3, 1..{MAX_DEPTH}, {RANKS}, 2, {BINS}]"
            raise EchoError(f"mass: expected {expected}, got {kind} {list(shape)}")
        if self.mass.size and int(self.mass.min()) < 0:
            raise EchoError(f"mass: expected entries >= 0, got {int(self.mass.min())}")

    @property
    def max_depth(self) -> int:
        """The deepest depth that can be counted."""
        return int(self.mass.shape[1])

    @property
    def rows(self) -> int:
        """Number of rows counted, of weight above 0."""
        return int(self.mass[ROWS].sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfidenceHistograms) and np.array_equal(self.mass, other.mass)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def empty(cls, max_depth: int) -> ConfidenceHistograms:
        """Return empty histograms for depths 1 to ``max_depth``; EchoError: not 1 to 64."""
        max_depth = checks.integer("max_depth", max_depth, 1, MAX_DEPTH)
        return cls(np.zeros((3, max_depth, RANKS, 2, BINS), dtype=np.int64))

    @classmethod
    def of(cls, logs: WarmupLog | Iterable[WarmupLog]) -> ConfidenceHistograms:
        """Count ``logs``, one or a stream in constant memory (:meth:`WarmupLog.stream`).

        Raises:
            EchoError: no log, a depth above 64, or a weight neither 0 nor from 1/64 to 1024.
        """
        mass = None
        if not isinstance(logs, Iterable):
            logs = (logs,)
        for log in logs:
            mass = cls.empty(1).mass if mass is None else mass
            mass = _count(mass, log)
        if mass is None:
            raise EchoError("logs: expected at least one WarmupLog, got none")
        return cls(mass)

    def add(self, log: WarmupLog) -> ConfidenceHistograms:
        """Count the rows of ``log`` too; raises as :meth:`of`."""
        return ConfidenceHistograms(_count(self.mass.copy(), log))

    def merge(self, other: ConfidenceHistograms) -> ConfidenceHistograms:
        """Add the rows of ``other``, down to the deeper ``max_depth`` of the two."""
        one, two = self._aligned("other", other)
        return ConfidenceHistograms(one + two)

    def since(self, earlier: ConfidenceHistograms) -> ConfidenceHistograms:
        """Return the rows counted since a snapshot: a window for :class:`echo.gating.DriftMonitor`.

        Raises:
            EchoError: ``earlier`` is not an earlier state of these histograms.
        """
        one, two = self._aligned("earlier", earlier)
        if (one < two).any():
            expected = f"earlier: expected an earlier state of these histograms ({self.rows} rows)"
            raise EchoError(f"{expected}, got one with rows they lack")
        return ConfidenceHistograms(one - two)

    def live(self, device: torch.device | str = "cpu") -> LiveHistograms:
        """Copy to ``device``, to update there; this synchronizes, so call it before serving."""
        return LiveHistograms(torch.from_numpy(self.mass.copy()).to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (.npz) atomically."""
        with write_atomically(path) as handle:
            np.savez_compressed(handle, version=np.array(VERSION), mass=self.mass)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConfidenceHistograms:
        """Read the file ``path`` that :meth:`save` wrote.

        Raises:
            EchoError: an incomplete histogram file, or one of another version.
            FileNotFoundError: no such file.
        """
        expected = checks.reading(f"path: expected histograms in {path}")
        with expected, open(path, "rb") as handle, np.load(handle) as file:
            if (version := int(file["version"])) != VERSION:
                wanted = f"histograms of version {VERSION} in {path}"
                raise EchoError(f"path: expected {wanted}, got version {version}")
            return cls(file["mass"])

    def _aligned(self, name: str, other: object) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        mass = checks.instance(name, other, ConfidenceHistograms).mass
        deepest = max(self.max_depth, mass.shape[1])
        return _deepen(self.mass, deepest), _deepen(mass, deepest)


@dataclass(frozen=True, eq=False)
class LiveHistograms:
    """:class:`ConfidenceHistograms` on the device, updated at every step, sync-free.

    Attributes:
        mass: int64 [3, depths, 2, 2, 3074], as in :class:`ConfidenceHistograms`.

    Raises:
        EchoError: a mass of another shape or dtype.

    Example:
        >>> live = ConfidenceHistograms.empty(1).live()
        >>> rows = torch.tensor([1]), torch.tensor([-0.1]), torch.tensor([True]), torch.tensor([0])
        >>> live.update(*rows).snapshot().rows
        1
    """

    mass: Tensor

    def __post_init__(self) -> None:
        checks.tensor("mass", self.mass, [3, "depths", RANKS, 2, BINS], torch.int64)

    def update(
        self,
        depth: Tensor,
        log_prob: Tensor,
        accepted: Tensor,
        rank: Tensor,
        weight: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> LiveHistograms:
        """Count the N packed rows of a step by integer additions, the same in any order.

        Skips depths outside 1 to ``depths`` (roots and pad rows have 0), negative ranks, and
        invalid scores or weights.

        Args:
            depth, rank: int32 or int64 [N].
            log_prob: float [N], path log-probability S.
            accepted: bool [N].
            weight: float [N], of :meth:`echo.gating.ExploringGate.weights`; 0: skip. Defaults to 1.
            in_place: add into this mass instead of a copy (2.4 MB for 8 depths), for CUDA graphs.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device = self.mass.device
        depths = self.mass.shape[1]
        count = checks.tensor("depth", depth, ["N"], checks.INTEGERS, device).shape[0]
        checks.tensor("log_prob", log_prob, [count], (*checks.FLOATS, torch.float64), device)
        checks.tensor("accepted", accepted, [count], torch.bool, device)
        checks.tensor("rank", rank, [count], checks.INTEGERS, device)
        score = log_prob.detach().float()
        w = torch.ones_like(score)
        if weight is not None:
            w = checks.tensor("weight", weight, [count], checks.FLOATS, device).float()
        valid = (depth >= 1) & (depth <= depths) & (rank >= 0) & (score <= 0)
        valid &= (w >= MIN_WEIGHT) & (w <= MAX_WEIGHT)
        confidence = torch.where(valid, score, 0.0).exp()
        index = _places(depth.clamp(1, depths), rank, accepted, confidence).expand(3, -1)
        w = torch.where(valid, w, 0.0)
        square = w.double() ** 2
        planes = valid.long(), (w * UNIT).round().long(), (square * UNIT).round().long()
        flat = self.mass.view(3, -1)
        if in_place:
            flat.scatter_add_(1, index, torch.stack(planes))
            return self
        return LiveHistograms(flat.scatter_add(1, index, torch.stack(planes)).view_as(self.mass))

    def snapshot(self) -> ConfidenceHistograms:
        """Copy to the host, to recalibrate. Synchronizes: call it now and then, between steps.

        Without blocking, copy ``mass`` into pinned memory, and wrap it a step later.
        """
        return ConfidenceHistograms(self.mass.detach().cpu().numpy().copy())


def _deepen(mass: NDArray[np.int64], depths: int) -> NDArray[np.int64]:
    more = depths - mass.shape[1]
    return mass if more <= 0 else np.pad(mass, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)])


def _places(depth: Tensor, rank: Tensor, accepted: Tensor, confidence: Tensor) -> Tensor:
    """int64 [N]: where in a flat plane of ``mass`` each row counts."""
    column = ((confidence.view(torch.int32) >> 16) - _FIRST).clamp(0, BINS - 1)
    group = (depth - 1) * RANKS + rank.clamp(0, RANKS - 1)
    return ((group * 2 + accepted) * BINS + column).long()


def _count(mass: NDArray[np.int64], log: WarmupLog) -> NDArray[np.int64]:
    """Add the log's rows to ``mass`` in place, block by block; to a copy if the log is deeper."""
    deepest = int(checks.instance("logs", log, WarmupLog).depth.max(initial=1))
    if deepest > MAX_DEPTH:
        row = int(log.depth.argmax())
        raise EchoError(f"log.depth: expected at most {MAX_DEPTH}, got {deepest} in row {row}")
    mass = _deepen(mass, deepest)
    flat = mass.reshape(3, -1)
    size = flat.shape[1]
    block = _BLOCK
    weighted = not (log.weight == 1).all()
    if weighted:
        wrong = (log.weight > MAX_WEIGHT) | ((log.weight < MIN_WEIGHT) & (log.weight > 0))
        if wrong.any():
            row = int(wrong.argmax())
            bounds = f"0 or from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise EchoError(f"log.weight: expected {bounds}, got {log.weight[row]:g} in row {row}")
        exact = int(2.0**52 / (UNIT * max(1.0, float(log.weight.max())) ** 2))
        block = min(2 * _BLOCK, exact)  # sums stay integers below 2^53, exact in float64
    columns = log.depth, log.rank, log.accepted, log.confidence
    for start in range(0, len(log), block):
        part = slice(start, start + block)
        # torch takes neither negative strides nor read-only memory
        own = (np.require(column[part], requirements=["C", "A", "W"]) for column in columns)
        place = _places(*map(torch.from_numpy, own)).numpy()
        if not weighted:
            rows = np.bincount(place, minlength=size)
            flat += rows * np.array([[1], [UNIT], [UNIT]])
            continue
        w = log.weight[part].astype(np.float64)
        planes = w > 0, np.rint(w * UNIT), np.rint(w * w * UNIT)
        for plane, values in zip(flat, planes, strict=True):
            plane += np.bincount(place, values, size).astype(np.int64)
    return mass
