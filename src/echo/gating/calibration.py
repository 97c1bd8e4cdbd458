"""From a warm-up log to the depths worth a gate, their thresholds, and calibrated acceptance probabilities."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating import files, reliability
from echo.gating.histograms import ROWS, SQUARE, UNIT, WEIGHT, ConfidenceHistograms, upper_ends
from echo.gating.logs import WarmupLog, write_atomically
from echo.gating.reliability import CalibrationError, Knots
from echo.gating.separability import from_histogram
from echo.gating.thresholds import (
    GateReport,
    Objective,
    refuse_gated,
    report,
    throughput_optimal,
    warn_of_missing,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROFILE_BINS = 20
"""Equal-mass bins of the confidence profile that a calibration keeps for the picture and for drift; 10 to 20 is the custom for PSI."""


@dataclass(frozen=True)
class DepthCalibration:
    """What the log says of one depth.

    Attributes:
        depth: 1 is the first drafted layer.
        accepted, rejected: rows of the maximum path.
        auc, auc_low, auc_high: separability and its 95% interval; NaN, 0, 1 without both kinds of rows.
        threshold: tau, by the calibration's rule; a request passes whose confidence is above it.
        youden: greatest J = P(pass | accepted) - P(pass | rejected) of this depth over all thresholds.
        gate: whether this depth is a gate.
        reason: why, or why not, in words.
        reliability: (log-probability, P(path accepted)) knots of the monotone map, both increasing; over all ranks.
        auc_error: the most by which the bins can have moved the AUC (see :class:`Separability`).
        stopped: weighted rows of the maximum path that a gate here, alone, would stop.
        stopped_accepted: those of them that the target accepted.
        effective: effective number of rows of the maximum path, (sum w)^2 / sum w^2.
        profile: (greatest confidence, accepted weight, rejected weight) of up to 20 bins of about equal mass, maximum path.
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
    reliability: Knots
    auc_error: float
    stopped: float
    stopped_accepted: float
    effective: float
    profile: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Gate depths, thresholds and reliability maps: the host-side result of :func:`calibrate`.

    ``str`` of it is a table. Equal histograms give equal calibrations, to the last bit.

    Attributes:
        depths: one entry for each depth 1..max_depth.
        min_auc, min_rows, max_gates, rule: the rules it was made with.
        throughput: with the throughput rule, its tokens per second on the log, else None.
    """

    depths: tuple[DepthCalibration, ...]
    min_auc: float
    min_rows: int
    max_gates: int
    rule: str = "youden"
    throughput: float | None = None

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
        is 1.0. A power of two times S is exact, so every device reads the same entry (:func:`echo.gating.look_up`).
        """
        return reliability.table([d.reliability for d in self.depths])

    def error(
        self, log: WarmupLog, *, bins: int = 20, resamples: int = 200, seed: int = 0
    ) -> CalibrationError:
        """Calibration error before and after, on held-out rows; see :func:`echo.gating.calibration_error` for all arguments."""
        return reliability.calibration_error(
            self.reliability_table(), log, bins=bins, resamples=resamples, seed=seed
        )

    def report(self, log: WarmupLog) -> tuple[GateReport, ...]:
        """What each gate does to the requests of a ``log``, behind the gates above it: asked, stopped, and wrongly stopped.

        Raises:
            EchoError: see :func:`echo.gating.report`.
        """
        return report(log, self.thresholds)

    def refit(self, histograms: ConfidenceHistograms) -> Calibration:
        """Calibrates again with the same settings, from ``histograms`` that went on counting (a lagged copy of the live ones).

        Raises:
            EchoError: the throughput rule, which needs rows joined by step; and as :func:`calibrate`.
        """
        return calibrate(
            histograms,
            max_depth=min(self.max_depth, _counted(histograms)),
            min_auc=self.min_auc,
            min_rows=self.min_rows,
            max_gates=self.max_gates,
            thresholds=self.rule,  # type: ignore[arg-type]
        )

    def plot(self) -> Figure:
        """A matplotlib figure: histograms with thresholds, AUC with intervals, reliability. Needs the ``plot`` extra.

        Raises:
            EchoError: matplotlib is not installed.
        """
        from echo import plot

        return plot.calibration(self)

    def __str__(self) -> str:
        return files.describe(self)

    def to_json(self) -> str:
        """The calibration as JSON text: one line for each value or map, the same bytes for equal calibrations."""
        return files.write(self)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads the ``text`` that :meth:`to_json` wrote, exactly.

        Raises:
            EchoError: not JSON, of another version, truncated, or with a value out of range.
        """
        return files.read(text, cls, DepthCalibration)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to ``path`` in one atomic move."""
        with write_atomically(path) as handle:
            handle.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads the file ``path`` that :meth:`save` wrote.

        Raises:
            EchoError: as :meth:`from_json`.
            FileNotFoundError: no such file.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def calibrate(
    log: WarmupLog | ConfidenceHistograms,
    *,
    max_depth: int | None = None,
    min_auc: float = 0.70,
    min_rows: int = 50,
    max_gates: int = 4,
    thresholds: Literal["youden", "throughput"] = "youden",
    cost: CostModel | None = None,
    batch: int = 64,
    beam: int = 1,
) -> Calibration:
    """Finds the sweet spots of a warm-up log: the depths where confidence separates accepted from rejected tokens.

    Gate depths are the root gate (1), the target depth (``max_depth``) and the depths whose AUC is above ``min_auc`` with 95%
    confidence, best first by expected benefit, ``max_gates`` at most: Youden's J times the rejected weight of that depth times the layers
    that a gate there saves. The paper names neither bound nor number; every depth carries the reason of its choice.

    A log is counted into :class:`ConfidenceHistograms` first: calibrating a log, its histograms, or merged histograms of its parts
    gives the same bits.

    Rows that a gate or budget kept from being verified are missing, and what is calibrated on the others is biased. A log whose steps bear
    the mark of a gate is refused. Where nothing joins the rows of a step (a log without step ids, histograms), a warning says that fewer
    rows are deeper.

    Args:
        log: rows of steps that were drafted without a gate, or with weights; or their histograms. Rank 0 decides gates and
            thresholds, all ranks the reliability.
        max_depth: deepest depth to calibrate; the log's deepest where not given.
        min_auc: the paper's delta, in [0.5, 1].
        min_rows: accepted and rejected rows of the maximum path that a gate needs, each. 50 rows hold the 95% interval of
            an AUC of 0.8 within about 0.09.
        max_gates: gates at most, the root gate and the target depth included; at least 2.
        thresholds: "youden": each depth's Youden point. "throughput": those of the gate depths maximise tokens per second of
            verification over whole steps (:func:`echo.gating.throughput_optimal`); it needs a log with step ids, and ``cost``.
        cost: for "throughput": seconds by rows.
        batch: for "throughput": requests decoded together.
        beam: for "throughput": rows that the rule buys of a layer.

    Raises:
        EchoError: an empty log, a log with accepted or rejected rows only, an argument out of range, a log without weights that
            bears the mark of a gate, or the throughput rule from histograms, without a cost, or on steps that lack rows.

    Example:
        >>> log = WarmupLog.from_arrays([1] * 200, [0.9] * 80 + [0.2] * 100 + [0.9] * 20, [1] * 80 + [0] * 120)
        >>> calibration = calibrate(log)
        >>> calibration.gate_depths, round(calibration.depths[0].auc, 3), round(calibration.thresholds[1], 2)
        ((1,), 0.917, 0.55)
        >>> calibration == calibrate(ConfidenceHistograms.of(log))
        True
    """
    min_auc = checks.real("min_auc", min_auc, 0.5, 1.0)
    min_rows = checks.integer("min_rows", min_rows, 1)
    max_gates = checks.integer("max_gates", max_gates, 2)
    if thresholds not in ("youden", "throughput"):
        raise EchoError(f"thresholds: expected 'youden' or 'throughput', got {thresholds!r}")
    if thresholds == "throughput":
        if not isinstance(log, WarmupLog):
            raise EchoError(
                "thresholds: expected 'youden' for histograms, got 'throughput': what a threshold is worth depends on which rows belong to "
                "one step, and histograms do not keep steps together; calibrate from a WarmupLog"
            )
        if cost is None:
            raise EchoError("cost: expected a CostModel for thresholds='throughput', got None")
    batch = checks.integer("batch", batch, 1)
    beam = checks.integer("beam", beam, 1)
    shown = isinstance(log, WarmupLog) and refuse_gated(log)
    histograms = (
        ConfidenceHistograms.of(log)
        if isinstance(log, WarmupLog)
        else checks.instance("log", log, ConfidenceHistograms)
    )
    kinds = histograms.mass[ROWS].sum(axis=(0, 1, 3))
    if not kinds.any():
        raise EchoError("log: expected rows, got an empty log")
    if not kinds.all():
        raise EchoError(
            f"log: expected accepted and rejected rows, got {kinds.sum()} {'accepted' if kinds[1] else 'rejected'} rows only"
        )
    if not shown:
        warn_of_missing(histograms)
    deepest = _counted(histograms)
    last = deepest if max_depth is None else checks.integer("max_depth", max_depth, 1, deepest)
    found = [
        _measure(histograms.mass[:, depth - 1], depth, min_auc, min_rows)
        for depth in range(1, last + 1)
    ]
    result = Calibration(tuple(_choose(found, max_gates)), float(min_auc), min_rows, max_gates)
    if thresholds == "throughput" and cost is not None and isinstance(log, WarmupLog):
        return _throughput_optimal(result, log, Objective(cost, batch, beam))
    return result


def _counted(histograms: ConfidenceHistograms) -> int:
    filled = np.flatnonzero(histograms.mass[ROWS].any(axis=(1, 2, 3)))
    return int(filled[-1]) + 1 if len(filled) else 1


def _measure(
    mass: NDArray[np.int64], depth: int, min_auc: float, min_rows: int
) -> DepthCalibration:
    """``mass`` int64 [3, 2, 2, bins] of one depth."""
    path = mass[:, 0]
    rejected, accepted = (int(n) for n in path[ROWS].sum(axis=1))
    s = from_histogram(path)
    if min(accepted, rejected) < min_rows:
        fewer, count = ("accepted", accepted) if accepted < rejected else ("rejected", rejected)
        good, reason = False, f"only {count} {fewer} rows, {min_rows} needed"
    else:
        good = s.low > min_auc
        reason = f"AUC {s.auc:.2f} [{s.low:.2f}, {s.high:.2f}] {'above' if good else 'not above'} {min_auc:.2f}"
    below = path[WEIGHT][:, upper_ends() <= s.threshold].sum(axis=1) / UNIT
    square = int(path[SQUARE].sum())
    return DepthCalibration(
        depth,
        accepted,
        rejected,
        s.auc,
        s.low,
        s.high,
        s.threshold,
        s.youden,
        good,
        reason,
        reliability.fit(mass.sum(axis=1)),
        auc_error=s.error,
        stopped=float(below.sum()),
        stopped_accepted=float(below[1]),
        effective=float(path[WEIGHT].sum() / UNIT) ** 2 / (square / UNIT) if square else 0.0,
        profile=_profile(path[WEIGHT]),
    )


def _profile(weight: NDArray[np.int64]) -> tuple[tuple[float, float, float], ...]:
    total = weight.sum(axis=0)
    if not total.any():
        return ()
    sums = np.cumsum(total)
    last = np.unique(
        np.searchsorted(sums, sums[-1] * np.arange(1, PROFILE_BINS + 1) / PROFILE_BINS)
    )
    last[-1] = len(total) - 1
    first = np.concatenate([[0], last[:-1] + 1])
    rejected, accepted = np.add.reduceat(weight, first, axis=1) / UNIT
    return tuple(
        (float(c), float(a), float(r))
        for c, a, r in zip(upper_ends()[last], accepted, rejected, strict=True)
    )


def _choose(found: list[DepthCalibration], max_gates: int) -> list[DepthCalibration]:
    ends = {1, len(found)}

    def benefit(d: DepthCalibration) -> float:
        return d.youden * sum(rejected for _, _, rejected in d.profile) * (len(found) - d.depth + 1)

    inner = sorted(
        (d for d in found if d.gate and d.depth not in ends), key=lambda d: (-benefit(d), d.depth)
    )
    chosen = ends | {d.depth for d in inner[: max(0, max_gates - len(ends))]}
    result = []
    for d in found:
        if d.depth in ends:
            name = "root gate" if d.depth == 1 else "target depth"
            result.append(replace(d, gate=True, reason=f"{name}; {d.reason}"))
        elif d.gate and d.depth not in chosen:
            result.append(
                replace(d, gate=False, reason=f"{d.reason}, but {max_gates} gates at most")
            )
        else:
            result.append(d)
    return result


def _throughput_optimal(
    calibration: Calibration, log: WarmupLog, objective: Objective
) -> Calibration:
    taus, value = throughput_optimal(
        log, calibration.gate_depths, calibration.max_depth, objective, calibration.thresholds
    )
    depths = []
    for d in calibration.depths:
        if not d.gate:
            depths.append(d)
            continue
        below = (log.depth == d.depth) & (log.rank == 0) & (log.confidence <= taus[d.depth])
        stopped, accepted = (
            float(log.weight[rows].sum(dtype=np.float64)) for rows in (below, below & log.accepted)
        )
        depths.append(
            replace(d, threshold=taus[d.depth], stopped=stopped, stopped_accepted=accepted)
        )
    return replace(calibration, depths=tuple(depths), rule="throughput", throughput=value)
