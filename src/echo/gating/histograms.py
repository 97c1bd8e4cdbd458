"""Histograms of confidence: all that calibration needs of a log, in constant memory, and they add exactly."""

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
PER_OCTAVE, OCTAVES = 128, 24
BINS = PER_OCTAVE * OCTAVES + 2
"""Bins of a histogram. Their edges are the bfloat16 numbers from 2^-24 to 1, that is the upper 16 bits of the float32 confidence:
bin 0 holds what lies below 2^-24, the last bin exactly 1, and every other one spans a factor of at most 1 + 1/128."""
UNIT = 1 << 16
"""Fixed-point weight 1.0. A row's weight is rounded to a multiple of 2^-16, once, before anything is added."""
MIN_WEIGHT, MAX_WEIGHT = 1 / 64, 1024.0
"""Bounds of a weight that is not 0. Below the greatest the sums of a block of 2^16 rows and more, squares included, are exact in float64;
above the smallest the rounded square is within 4%. Only ratios matter, so weights may be scaled until their smallest is 1."""
MAX_DEPTH = 64
RANKS = 2
"""Ranks kept apart: 0, the maximum path, by which gates are judged, and all others together."""
_FIRST = ((127 - OCTAVES) << 7) - 1  # upper half of the bits of 2^-24, less 1: what becomes bin 0
_BLOCK = 1 << 18
ROWS, WEIGHT, SQUARE = 0, 1, 2
"""Planes of ``mass``: number of rows; sum of weights and of squared weights in units of 2^-16."""


@dataclass(frozen=True, eq=False)
class ConfidenceHistograms:
    """Accepted and rejected rows by depth, maximum path or not, and confidence. A value: :meth:`add` and :meth:`merge` make new ones.

    All entries are integers, so sums are exact in any order: merging is associative and commutative, and calibrating merged
    histograms gives the same bits as calibrating all rows at once.

    Attributes:
        mass: int64 [3, depths, 2, 2, 3074]. Planes: rows, sum of weights, sum of squared weights (both in 2^-16); then rank 0, all
            other ranks; then rejected, accepted.

    Raises:
        EchoError: a mass of another shape or dtype, or with negative entries.

    Example:
        >>> monday, tuesday = WarmupLog.from_arrays([1, 1], [0.9, 0.2], [1, 0]), WarmupLog.from_arrays([1], [0.9], [1])
        >>> both = ConfidenceHistograms.of(monday).merge(ConfidenceHistograms.of(tuesday))
        >>> both == ConfidenceHistograms.of(WarmupLog.concat([monday, tuesday])), both.rows
        (True, 3)
    """

    mass: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.mass.shape
        fits = (
            len(shape) == 5
            and (shape[0], *shape[2:]) == (3, RANKS, 2, BINS)
            and 1 <= shape[1] <= MAX_DEPTH
        )
        if self.mass.dtype != np.int64 or not fits:
            raise EchoError(
                f"mass: expected int64 [3, 1..{MAX_DEPTH}, {RANKS}, 2, {BINS}], got {self.mass.dtype} {list(shape)}"
            )
        if self.mass.size and int(self.mass.min()) < 0:
            raise EchoError(f"mass: expected entries >= 0, got {int(self.mass.min())}")

    @property
    def max_depth(self) -> int:
        """The deepest depth there is room for."""
        return int(self.mass.shape[1])

    @property
    def rows(self) -> int:
        """Rows counted, of weight above 0."""
        return int(self.mass[ROWS].sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfidenceHistograms) and np.array_equal(self.mass, other.mass)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def empty(cls, max_depth: int) -> ConfidenceHistograms:
        """No rows yet.

        Args:
            max_depth: from 1 to 64.

        Raises:
            EchoError: an argument out of range.
        """
        max_depth = checks.integer("max_depth", max_depth, 1, MAX_DEPTH)
        return cls(np.zeros((3, max_depth, RANKS, 2, BINS), dtype=np.int64))

    @classmethod
    def of(cls, logs: WarmupLog | Iterable[WarmupLog]) -> ConfidenceHistograms:
        """The histograms of a log, or of a stream of logs in constant memory (:meth:`WarmupLog.stream` reads files one by one).

        Args:
            logs: one log or many.

        Raises:
            EchoError: no log, a depth above 64, or a weight that is neither 0 nor from 1/64 to 1024.
        """
        mass, none = cls.empty(1).mass, True
        for log in (logs,) if isinstance(logs, WarmupLog) else logs:
            mass, none = _counted(mass, checks.instance("logs", log, WarmupLog)), False
        if none:
            raise EchoError("logs: expected at least one WarmupLog, got none")
        return cls(mass)

    def add(self, log: WarmupLog) -> ConfidenceHistograms:
        """These rows and those of ``log``; see :meth:`of` for errors."""
        return ConfidenceHistograms(_counted(self.mass.copy(), log))

    def merge(self, other: ConfidenceHistograms) -> ConfidenceHistograms:
        """These rows and those of ``other``: exactly associative and commutative. The deeper of the two decides ``max_depth``."""
        one, two = self._aligned("other", other)
        return ConfidenceHistograms(one + two)

    def since(self, earlier: ConfidenceHistograms) -> ConfidenceHistograms:
        """The rows counted after a snapshot was taken: a window for :class:`echo.gating.DriftMonitor`.

        Raises:
            EchoError: ``earlier`` is no earlier state of these histograms.
        """
        one, two = self._aligned("earlier", earlier)
        if (one < two).any():
            raise EchoError(
                f"earlier: expected an earlier state of these histograms ({self.rows} rows), got one with rows they lack"
            )
        return ConfidenceHistograms(one - two)

    def live(self, device: torch.device | str = "cpu") -> LiveHistograms:
        """A copy on the ``device``, to be updated there; made before serving, since it waits for the device."""
        return LiveHistograms(torch.from_numpy(self.mass.copy()).to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``path`` (.npz) in one atomic move."""
        with write_atomically(path) as handle:
            np.savez_compressed(handle, version=np.array(VERSION), mass=self.mass)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConfidenceHistograms:
        """Reads the file ``path`` that :meth:`save` wrote.

        Raises:
            EchoError: no whole histogram file, or one of another version.
            FileNotFoundError: no such file.
        """
        with (
            checks.reading(f"path: expected histograms in {path}"),
            open(path, "rb") as handle,
            np.load(handle) as file,
        ):
            version, mass = int(file["version"]), file["mass"]
        if version != VERSION:
            raise EchoError(
                f"path: expected histograms of version {VERSION} in {path}, got version {version}"
            )
        return cls(mass)

    def _aligned(
        self, name: str, other: ConfidenceHistograms
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        deepest = max(self.max_depth, checks.instance(name, other, ConfidenceHistograms).max_depth)
        return _deepen(self.mass, deepest), _deepen(other.mass, deepest)


@dataclass(frozen=True, eq=False)
class LiveHistograms:
    """:class:`ConfidenceHistograms` on the device, updated by a serving engine at every step without a read-back.

    Attributes:
        mass: int64 [3, depths, 2, 2, 3074], as in :class:`ConfidenceHistograms`.

    Raises:
        EchoError: a mass of another shape or dtype.
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
        """Counts the rows of one step: integer additions, so the order in which a device does them is of no consequence.

        Roots, pads (depth 0), rows deeper than there is room for, and scores or weights that are no valid number count nothing.

        Args:
            depth: int32 or int64 [N], 0 for rows that do not count.
            log_prob: float [N], path log-probability S.
            accepted: bool [N].
            rank: int32 or int64 [N], place of the node in its layer; negative for rows that do not count.
            weight: float [N], inverse-probability weights (:meth:`echo.gating.ExploringGate.weights`), 0: do not count; None: all 1.
            in_place: adds into this mass instead of a copy (2.4 MB for 8 depths), for engines with persistent buffers (CUDA graphs).

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device = self.mass.device
        count = checks.tensor("depth", depth, ["N"], checks.INTEGERS, device).shape[0]
        checks.tensor("log_prob", log_prob, [count], (*checks.FLOATS, torch.float64), device)
        checks.tensor("accepted", accepted, [count], torch.bool, device)
        checks.tensor("rank", rank, [count], checks.INTEGERS, device)
        depths = self.mass.shape[1]
        score = log_prob.detach().float()
        w = (
            torch.ones_like(score)
            if weight is None
            else checks.tensor("weight", weight, [count], checks.FLOATS, device).float()
        )
        counts = (
            (depth >= 1)
            & (depth <= depths)
            & (rank >= 0)
            & (score <= 0)
            & (w >= MIN_WEIGHT)
            & (w <= MAX_WEIGHT)
        )
        confidence = torch.where(counts, score, 0.0).exp()
        column = ((confidence.view(torch.int32) >> 16) - _FIRST).clamp(0, BINS - 1).long()
        row = (depth.long().clamp(1, depths) - 1) * RANKS + rank.long().clamp(0, RANKS - 1)
        place = (row * 2 + accepted) * BINS + column
        w = torch.where(counts, w, 0.0)
        planes = torch.stack(
            [counts.long(), (w * UNIT).round().long(), (w.double() ** 2 * UNIT).round().long()]
        )
        flat = self.mass.view(3, -1)
        index = place.expand(3, -1)
        if in_place:
            flat.scatter_add_(1, index, planes)
            return self
        return LiveHistograms(flat.scatter_add(1, index, planes).view(self.mass.shape))

    def snapshot(self) -> ConfidenceHistograms:
        """A copy on the host. It waits for the device: call it now and then, outside the step, and refit from it.

        An engine that must never wait copies ``mass`` into pinned memory without blocking and wraps it a step later.
        """
        return ConfidenceHistograms(self.mass.detach().cpu().numpy().copy())


def lower_edges() -> NDArray[np.float32]:
    """float32 [3074]: the smallest confidence of each bin; 0 for the first."""
    bits = (np.arange(BINS, dtype=np.int32) + _FIRST) << 16
    edges = bits.view(np.float32).copy()
    edges[0] = 0.0
    return edges


def upper_ends() -> NDArray[np.float32]:
    """float32 [3074]: the greatest confidence of each bin."""
    ends = np.ones(BINS, dtype=np.float32)
    ends[:-1] = np.nextafter(lower_edges()[1:], np.float32(0.0))
    return ends


def middle_scores() -> NDArray[np.float64]:
    """float64 [3074]: log of the geometric middle of each bin; the first bin's is log 2^-24."""
    lower = lower_edges().astype(np.float64)
    scores: NDArray[np.float64] = np.zeros(BINS)
    scores[1:-1] = 0.5 * (np.log(lower[1:-1]) + np.log(lower[2:]))
    scores[0] = -OCTAVES * np.log(2.0)
    return scores


def _deepen(mass: NDArray[np.int64], depths: int) -> NDArray[np.int64]:
    more = depths - mass.shape[1]
    return mass if more <= 0 else np.pad(mass, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)])


def _counted(mass: NDArray[np.int64], log: WarmupLog) -> NDArray[np.int64]:
    """``mass`` with the log's rows added in place, block by block; a deeper copy of it where it has no room for them."""
    deepest = int(log.depth.max(initial=1))
    if deepest > MAX_DEPTH:
        raise EchoError(
            f"log.depth: expected at most {MAX_DEPTH}, got {deepest} in row {int(log.depth.argmax())}"
        )
    mass = _deepen(mass, deepest)
    flat = mass.reshape(3, -1)
    unit = bool((log.weight == 1).all())
    if (
        not unit
        and (
            wrong := (log.weight > MAX_WEIGHT) | ((log.weight < MIN_WEIGHT) & (log.weight > 0))
        ).any()
    ):
        row = int(wrong.argmax())
        raise EchoError(
            f"log.weight: expected 0 or from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, got {log.weight[row]:g} in row {row}"
        )
    block = (
        _BLOCK
        if unit
        else min(2 * _BLOCK, int(2.0**52 / (UNIT * max(1.0, float(log.weight.max())) ** 2)))
    )
    size = flat.shape[1]
    for start in range(0, len(log), block):
        part = slice(start, start + block)
        place = _places(log, part)
        if unit:
            counts = np.bincount(place, minlength=size)
            flat[ROWS] += counts
            counts *= UNIT
            flat[WEIGHT] += counts
            flat[SQUARE] += counts
            continue
        w = log.weight[part].astype(np.float64)
        # Whole numbers below 2^53 in float64: the sums are exact.
        flat[ROWS] += np.bincount(place, weights=w > 0, minlength=size).astype(np.int64)
        flat[WEIGHT] += np.bincount(place, weights=np.rint(w * UNIT), minlength=size).astype(
            np.int64
        )
        flat[SQUARE] += np.bincount(place, weights=np.rint(w * w * UNIT), minlength=size).astype(
            np.int64
        )
    return mass


def _places(log: WarmupLog, part: slice) -> NDArray[np.intp]:
    column = np.ascontiguousarray(log.confidence[part]).view(np.int32) >> 16
    column -= _FIRST
    np.maximum(column, 0, out=column)
    group = log.depth[part] - 1
    group *= RANKS
    group += np.minimum(log.rank[part], RANKS - 1)
    group *= 2
    group += log.accepted[part]
    group *= BINS
    places: NDArray[np.intp] = np.add(group, column, dtype=np.intp)
    return places
