"""From a warm-up log to the depths worth a gate, their thresholds, and calibrated acceptance probabilities."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo import checks
from echo.errors import EchoError
from echo.gating.separability import separability
from echo.logs import WarmupLog

VERSION = 1
ONE = 1 << 24
"""Fixed-point 1.0 of a calibrated probability."""
BINS, BINS_PER_NAT = 512, 32
"""The look-up table of a reliability map: bin i holds path log-probabilities in (-(i+1)/32, -i/32]; the last one all below."""


@dataclass(frozen=True)
class DepthCalibration:
    """What the log says of one depth.

    Attributes:
        depth: 1 is the first drafted layer.
        accepted, rejected: rows of the maximum path.
        auc, auc_low, auc_high: separability and its 95% interval; NaN, 0, 1 without both kinds of rows.
        threshold: tau, the Youden point of the maximum path's confidence; a request passes above it.
        youden: J at the threshold.
        gate: whether this depth is a gate.
        reason: why, or why not, in words.
        reliability: (log-probability, P(path accepted)) knots of the monotone map, both increasing; over all ranks.
    """

    depth: int
    accepted: int
    rejected: int
    auc: float
    auc_low: float
    auc_high: float
    threshold: float
    youden: float
    gate: bool
    reason: str
    reliability: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Gate depths, thresholds and reliability maps: the host-side result of :func:`calibrate`.

    Attributes:
        depths: one entry for each depth 1..max_depth.
        min_auc, min_rows, max_gates: the rules it was made with.
    """

    depths: tuple[DepthCalibration, ...]
    min_auc: float
    min_rows: int
    max_gates: int

    @property
    def max_depth(self) -> int:
        """The deepest calibrated depth."""
        return len(self.depths)

    @property
    def gate_depths(self) -> tuple[int, ...]:
        """Depths at which a request may be sent away."""
        return tuple(d.depth for d in self.depths if d.gate)

    @property
    def thresholds(self) -> dict[int, float]:
        """tau of every gate depth."""
        return {d.depth: d.threshold for d in self.depths if d.gate}

    def reliability_table(self) -> NDArray[np.int32]:
        """P(path accepted) as 24-bit fixed point, int32 [max_depth + 1, 512]: the maps m_d, tabulated.

        Row d, column ``min(floor(-32 * S), 511)`` answers for a node of depth d with path log-probability S; row 0, the root,
        is 1.0. A power of two times S is exact, so every device reads the same entry.
        """
        centre = -(np.arange(BINS) + 0.5) / BINS_PER_NAT
        table = np.full((self.max_depth + 1, BINS), ONE, dtype=np.int32)
        for d in self.depths:
            score, probability = np.array(d.reliability).T
            table[d.depth] = np.clip(np.rint(np.interp(centre, score, probability) * ONE), 1, ONE)
        return table

    def to_json(self) -> str:
        """The calibration as JSON text."""
        depths = [{**asdict(d), "auc": None if np.isnan(d.auc) else d.auc} for d in self.depths]
        return json.dumps({"format": "echo-calibration", "version": VERSION, **asdict(self), "depths": depths}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads what :meth:`to_json` wrote.

        Raises:
            EchoError: not JSON, of another version, truncated, or with a value out of range.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise EchoError(f"calibration: expected JSON text, got: {error}") from error
        if not isinstance(data, dict) or data.get("format") != "echo-calibration" or data.get("version") != VERSION:
            found = (data.get("format"), data.get("version")) if isinstance(data, dict) else type(data).__name__
            raise EchoError(f"calibration: expected format 'echo-calibration' version {VERSION}, got {found}")
        try:
            depths = tuple(_read_depth(entry) for entry in data["depths"])
            result = cls(depths, float(data["min_auc"]), int(data["min_rows"]), int(data["max_gates"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EchoError(f"calibration: expected the fields of version {VERSION}, got a fault at {error}") from error
        if [d.depth for d in depths] != list(range(1, len(depths) + 1)) or not depths:
            raise EchoError(f"calibration: expected depths 1, 2, ..., got {[d.depth for d in depths]}")
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to ``path`` in one atomic move."""
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(self.to_json())
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads a file that :meth:`save` wrote; see :meth:`from_json` for its errors."""
        return cls.from_json(Path(path).read_text())


def calibrate(
    log: WarmupLog,
    *,
    max_depth: int | None = None,
    min_auc: float = 0.70,
    min_rows: int = 50,
    max_gates: int = 4,
) -> Calibration:
    """Finds the sweet spots of a warm-up log: the depths where confidence separates accepted from rejected tokens.

    Gate depths are the root gate (1), the target depth (``max_depth``) and the depths whose AUC is above ``min_auc`` with 95%
    confidence, best first by expected benefit (Youden's J times the rejected rows of that depth), ``max_gates`` at most. The
    paper names neither bound nor number; every depth carries the reason of its choice.

    Args:
        log: rows of steps that were drafted without a gate. Rank 0 decides gates and thresholds, all ranks the reliability.
        max_depth: deepest depth to calibrate; the log's deepest where not given.
        min_auc: the paper's delta, in [0.5, 1].
        min_rows: accepted and rejected rows of the maximum path that a gate needs, each. 50 rows hold the 95% interval of
            an AUC of 0.8 within about 0.09.
        max_gates: gates at most, the root gate and the target depth included; at least 2.

    Raises:
        EchoError: an empty log, a log with accepted or rejected rows only, or an argument out of range.

    Example:
        >>> log = WarmupLog.from_arrays([1] * 200, [0.9] * 80 + [0.2] * 100 + [0.9] * 20, [1] * 80 + [0] * 120)
        >>> calibration = calibrate(log)
        >>> calibration.gate_depths, round(calibration.depths[0].auc, 3), round(calibration.thresholds[1], 2)
        ((1,), 0.917, 0.55)
    """
    checks.real("min_auc", min_auc, 0.5, 1.0)
    checks.integer("min_rows", min_rows, 1)
    checks.integer("max_gates", max_gates, 2)
    if not len(log):
        raise EchoError("log: expected rows, got an empty log")
    if log.accepted.all() or not log.accepted.any():
        only = "accepted" if log.accepted[0] else "rejected"
        raise EchoError(f"log: expected accepted and rejected rows, got {len(log)} {only} rows only")
    deepest = int(log.depth.max())
    last = deepest if max_depth is None else checks.integer("max_depth", max_depth, 1, deepest)
    found = [_measure(log, depth, min_auc, min_rows) for depth in range(1, last + 1)]
    return Calibration(tuple(_choose(found, max_gates)), float(min_auc), min_rows, max_gates)


def _measure(log: WarmupLog, depth: int, min_auc: float, min_rows: int) -> DepthCalibration:
    here = log.depth == depth
    path = here & (log.rank == 0)
    accepted = int(log.accepted[path].sum())
    rejected = int(path.sum()) - accepted
    s = separability(log.confidence[path], log.accepted[path], log.weight[path])
    if min(accepted, rejected) < min_rows:
        fewer, count = ("accepted", accepted) if accepted < rejected else ("rejected", rejected)
        good, reason = False, f"only {count} {fewer} rows, {min_rows} needed"
    else:
        good = s.low > min_auc
        reason = f"AUC {s.auc:.2f} [{s.low:.2f}, {s.high:.2f}] {'above' if good else 'not above'} {min_auc:.2f}"
    knots = _reliability(log.confidence[here], log.accepted[here], log.weight[here])
    return DepthCalibration(depth, accepted, rejected, s.auc, s.low, s.high, s.threshold, s.youden, good, reason, knots)


def _choose(found: list[DepthCalibration], max_gates: int) -> list[DepthCalibration]:
    ends = {1, len(found)}
    inner = sorted((d for d in found if d.gate and d.depth not in ends), key=lambda d: (-d.youden * d.rejected, d.depth))
    chosen = ends | {d.depth for d in inner[: max(0, max_gates - len(ends))]}
    result = []
    for d in found:
        if d.depth in ends:
            name = "root gate" if d.depth == 1 else "target depth"
            result.append(replace(d, gate=True, reason=f"{name}; {d.reason}"))
        elif d.gate and d.depth not in chosen:
            result.append(replace(d, gate=False, reason=f"{d.reason}, but {max_gates} gates at most"))
        else:
            result.append(d)
    return result


def _reliability(
    confidence: NDArray[np.float32], accepted: NDArray[np.bool_], weight: NDArray[np.float32]
) -> tuple[tuple[float, float], ...]:
    """Isotonic regression of acceptance on the path log-probability: (mean log-probability, probability) of each block.

    Each block's probability is shrunk by one accepted and one rejected row, so that none is certain.
    """
    from scipy.optimize import isotonic_regression

    keep = (confidence > 0) & (weight > 0)
    if not keep.any():
        return ((-1.0, 0.5),)
    order = np.argsort(confidence[keep], kind="stable")
    score = np.log(confidence[keep][order].astype(np.float64))
    label, w = accepted[keep][order].astype(np.float64), weight[keep][order].astype(np.float64)
    score, place = np.unique(score, return_inverse=True)
    mass = np.bincount(place, weights=w)
    rate = np.bincount(place, weights=w * label) / mass
    fit = isotonic_regression(rate, weights=mass)
    knots = []
    for first, end in zip(fit.blocks[:-1], fit.blocks[1:], strict=True):
        total = mass[first:end].sum()
        middle = float((score[first:end] * mass[first:end]).sum() / total)
        knots.append((middle, float((fit.x[first] * total + 1.0) / (total + 2.0))))
    rising = np.maximum.accumulate([p for _, p in knots])
    return tuple((s, float(p)) for (s, _), p in zip(knots, rising, strict=True))


def _read_depth(entry: Mapping[str, Any]) -> DepthCalibration:
    auc = float("nan") if entry["auc"] is None else float(entry["auc"])
    read = DepthCalibration(**{**entry, "auc": auc, "reliability": tuple((float(s), float(p)) for s, p in entry["reliability"])})
    checks.integer("calibration.depth", read.depth, 1)
    checks.real("calibration.threshold", read.threshold, 0.0, 1.0)
    scores = [s for s, _ in read.reliability]
    chances = [p for _, p in read.reliability]
    if not read.reliability or scores != sorted(scores) or chances != sorted(chances) or not 0 <= chances[0] <= chances[-1] <= 1:
        raise EchoError(f"calibration.reliability: expected rising knots within [0, 1] at depth {read.depth}, got {read.reliability}")
    return read
