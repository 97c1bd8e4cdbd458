"""From a warm-up log to gate depths, thresholds and calibrated acceptance probabilities."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating import statistics
from echo.gating.histograms import ROWS, SQUARE, UNIT, UPPER, WEIGHT, ConfidenceHistograms
from echo.gating.logs import WarmupLog, write_atomically
from echo.gating.statistics import CalibrationError, Knots
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

FORMAT = "echo-calibration"
VERSION = 2
PROFILE_BINS = 20
"""Equal-mass bins of the confidence profile, for the plot and drift; customary for PSI."""


@dataclass(frozen=True)
class DepthCalibration:
    """Gate, threshold and statistics of one depth.

    Attributes:
        depth: 1 is the first draft layer.
        accepted, rejected: number of rows of rank 0.
        auc, auc_low, auc_high: separability and its 95% interval; NaN, 0, 1 without both kinds.
        threshold: tau, by the calibration's rule; a request passes above it.
        youden: greatest J = P(pass | accepted) - P(pass | rejected) over all thresholds.
        gate, reason: whether this depth is a gate, and why, in words.
        reliability: knots (log-probability, P(path accepted)), both rising; over all ranks.
        auc_error: bound on the binning error of the AUC.
        stopped, stopped_accepted: weight of rank-0 rows this gate alone stops; of accepted ones.
        effective: effective number of rows of rank 0, (sum w)^2 / sum w^2.
        profile: (greatest confidence, accepted, rejected weight) of about equal-mass bins, rank 0.
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

    ``str`` renders a table. Equal histograms give equal calibrations, to the last bit.

    Attributes:
        depths: one entry per depth 1..max_depth.
        min_auc, min_rows, max_gates, rule: the settings it was made with.
        throughput: tokens per second on the log, under the throughput rule; else None.

    Example:
        >>> log = WarmupLog.from_arrays([1] * 200, [0.9] * 100 + [0.2] * 100, [1, 1, 0, 0, 0] * 40)
        >>> made = calibrate(log)
        >>> round(float(made.reliability_table()[1, 3]) / 2**24, 2)  # P(accepted) about S = log 0.9
        0.4
        >>> round(made.error(log).before[0], 2), made.report(log)[0].asked
        (0.35, 200.0)
        >>> made.refit(ConfidenceHistograms.of(log).add(log)).depths[0].accepted
        160
        >>> Calibration.from_json(made.to_json()) == made
        True
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     made.save(f"{folder}/made.json")
        ...     made.plot().savefig(f"{folder}/made.png")
        ...     Calibration.load(f"{folder}/made.json") == made
        True
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
        """Depths at which a request may be stopped."""
        return tuple(d.depth for d in self.depths if d.gate)

    @property
    def thresholds(self) -> dict[int, float]:
        """Map each gate depth to its tau."""
        return {d.depth: d.threshold for d in self.depths if d.gate}

    def reliability_table(self) -> NDArray[np.int32]:
        """Tabulate P(path accepted) in 24-bit fixed point, int32 [max_depth + 1, 512].

        Row d, column ``min(floor(-32 * S), 511)`` is for a node of depth d with path
        log-probability S; row 0, the root, is 1.0. For :func:`echo.gating.look_up`.
        """
        return statistics.table([d.reliability for d in self.depths])

    def error(
        self, log: WarmupLog, *, bins: int = 20, resamples: int = 200, seed: int = 0
    ) -> CalibrationError:
        """Compute the error on a held-out ``log``, as :func:`echo.gating.calibration_error`."""
        table = self.reliability_table()
        return statistics.calibration_error(table, log, bins=bins, resamples=resamples, seed=seed)

    def report(self, log: WarmupLog) -> tuple[GateReport, ...]:
        """Report what these thresholds do to a ``log``, as :func:`echo.gating.report`."""
        return report(log, self.thresholds)

    def refit(self, histograms: ConfidenceHistograms) -> Calibration:
        """Calibrate with the same settings from ``histograms`` that continued counting.

        Raises:
            EchoError: the throughput rule, which needs step ids; and as :func:`calibrate`.
        """
        return calibrate(
            histograms,
            max_depth=min(self.max_depth, _deepest(histograms)),
            min_auc=self.min_auc,
            min_rows=self.min_rows,
            max_gates=self.max_gates,
            thresholds=self.rule,  # type: ignore[arg-type]
        )

    def plot(self) -> Figure:
        """Draw histograms with thresholds, AUC with intervals, and reliability in matplotlib.

        EchoError: matplotlib is not installed (extra ``plot``).
        """
        from echo import plot

        return plot.calibration(self)

    def __str__(self) -> str:
        gates = ", ".join(map(str, self.gate_depths))
        rate = "" if self.throughput is None else f" ({self.throughput:.4g} tokens/s)"
        counts = "depth  gate  accepted  rejected  AUC   95%           threshold"
        head = f"{counts}   stops  wrongly  reason"
        title = f"{self.max_depth} depths, gates at {gates}; thresholds by {self.rule}{rate}"
        return "\n".join([title, head, *map(_line, self.depths)])

    def to_json(self) -> str:
        """Return JSON text, one value or map per line: the same bytes for equal calibrations."""
        depths = ",\n".join(_object(vars(d), "  ") for d in self.depths)
        head = _object({"format": FORMAT, "version": VERSION, **vars(self), "depths": []}, "")
        return head.replace("[]", f"[\n{depths}\n ]", 1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read the ``text`` that :meth:`to_json` wrote, exactly.

        Raises:
            EchoError: not JSON, of another version, truncated, or with a value out of range.
        """
        with checks.reading("calibration: expected JSON text"):
            data = json.loads(text)
        found: Any = type(data).__name__
        if isinstance(data, dict):
            found = data.pop("format", None), data.pop("version", None)
        if found != (FORMAT, VERSION):
            newer = isinstance(found, tuple) and isinstance(found[1], int) and found[1] > VERSION
            hint = ": a newer ECHO wrote it, update this one" if newer else ""
            wanted = f"format '{FORMAT}' version {VERSION}"
            raise EchoError(f"calibration: expected {wanted}, got {found}{hint}")
        with checks.reading(f"calibration: expected the fields of version {VERSION}"):
            depths = tuple(_read_depth(entry) for entry in data["depths"])
            result = cls(**{**data, "depths": depths})
        numbers = [d.depth for d in depths]
        if numbers != list(range(1, len(depths) + 1)) or not depths:
            raise EchoError(f"calibration: expected depths 1, 2, ..., got {numbers}")
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to ``path`` atomically."""
        with write_atomically(path) as handle:
            handle.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read the file that :meth:`save` wrote; raises as :meth:`from_json` and ``open``."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _line(d: DepthCalibration) -> str:
    """Format a depth; ``stops``: what the gate alone stops; ``wrongly``: its accepted part."""
    rows = sum(a + r for _, a, r in d.profile)
    gate = "yes" if d.gate else "no"
    auc = "  - " if math.isnan(d.auc) else f"{d.auc:.2f}"
    stops = f"{d.stopped / rows:6.1%}" if rows else "     -"
    wrongly = f"{d.stopped_accepted / d.stopped:7.1%}" if d.stopped else "      -"
    counts = f"{d.depth:5d}  {gate:<4}  {d.accepted:8d}  {d.rejected:8d}"
    interval = f"[{d.auc_low:.2f}, {d.auc_high:.2f}]"
    return f"{counts}  {auc}  {interval}  {d.threshold:9.3g}  {stops}  {wrongly}  {d.reason}"


def _object(values: Mapping[str, Any], indent: str) -> str:
    """Return a JSON object, one value a line, NaN as null."""
    lines = []
    for name, value in values.items():
        plain = None if isinstance(value, float) and math.isnan(value) else value
        lines.append(f"{indent} {json.dumps(name)}: {json.dumps(plain, allow_nan=False)}")
    return f"{indent}{{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _read_depth(data: Mapping[str, Any]) -> DepthCalibration:
    """Read and check one entry."""
    auc = float("nan") if data["auc"] is None else float(data["auc"])
    named = ("reliability", "profile")
    maps: Any = {name: tuple(tuple(map(float, row)) for row in data[name]) for name in named}
    d = DepthCalibration(**{**data, "auc": auc, **maps})
    for name, low in (("depth", 1), ("accepted", 0), ("rejected", 0)):
        checks.integer(f"calibration.{name}", getattr(d, name), low)
    checks.real("calibration.threshold", d.threshold, 0.0, 1.0)
    checks.real("calibration.effective", d.effective, 0.0)
    for number in itertools.chain(*d.profile):
        checks.real("calibration.profile", number, 0.0)
    knots = np.array([(score, share) for score, share in d.reliability]).reshape(-1, 2)
    rising = np.isfinite(knots).all() and (np.diff(knots, axis=0) >= 0).all()
    if not len(knots) or not rising or not 0 <= knots[0, 1] <= knots[-1, 1] <= 1:
        expected = f"expected rising knots within [0, 1] at depth {d.depth}"
        raise EchoError(f"calibration.reliability: {expected}, got {d.reliability}")
    return d


def calibrate(
    log: WarmupLog | Sequence[WarmupLog] | ConfidenceHistograms,
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
    """Find the depths at which confidence separates accepted from rejected tokens in a warm-up log.

    Gate depths are the root gate (1), the target depth (``max_depth``) and the depths whose AUC is
    above ``min_auc`` with 95% confidence, best first by Youden's J times the depth's rejected
    weight times the layers that a gate there saves. (The paper gives neither bound nor number.)

    A log, its histograms, and merged histograms of its parts give the same bits. Rows that a gate
    or budget kept from verification bias it: a visibly gated log is refused; without step ids,
    fewer rows at deeper depths give a warning.

    Args:
        log: rows of steps drafted without a gate, or with weights: one log, several, or their
            histograms. Rank 0 decides gates and thresholds, all ranks the reliability.
        max_depth: deepest depth to calibrate. Defaults to the log's deepest.
        min_auc: the paper's delta, in [0.5, 1].
        min_rows: accepted rows, and rejected rows, of rank 0 that a gate needs. With 50 each, the
            95% interval of an AUC of 0.8 is within about 0.09.
        max_gates: maximum number of gates, root gate and target depth included; at least 2.
        thresholds: "youden": each depth's Youden point. "throughput": thresholds that maximize
            tokens per second (:func:`echo.gating.throughput_optimal`); needs step ids and ``cost``.
        cost, batch, beam: for "throughput", as in :class:`echo.gating.Objective`.

    Raises:
        EchoError: an argument out of range; a log that is empty, visibly gated, or all accepted or
            all rejected; the throughput rule from histograms or on steps that lack rows.

    Example:
        >>> confidence = [0.9] * 80 + [0.2] * 100 + [0.9] * 20
        >>> log = WarmupLog.from_arrays([1] * 200, confidence, [1] * 80 + [0] * 120)
        >>> made = calibrate(log)
        >>> made.gate_depths, round(made.depths[0].auc, 3), round(made.thresholds[1], 2)
        ((1,), 0.917, 0.55)
        >>> made == calibrate(ConfidenceHistograms.of(log)) == calibrate([log])
        True
    """
    min_auc = checks.real("min_auc", min_auc, 0.5, 1.0)
    min_rows = checks.integer("min_rows", min_rows, 1)
    max_gates = checks.integer("max_gates", max_gates, 2)
    if thresholds not in ("youden", "throughput"):
        raise EchoError(f"thresholds: expected 'youden' or 'throughput', got {thresholds!r}")
    if isinstance(log, Sequence):
        log = WarmupLog.concat(log)
    objective = None
    if isinstance(log, ConfidenceHistograms):
        histograms = log
        shown = False
        if thresholds == "throughput":
            expected = "thresholds: expected 'youden' for histograms, got 'throughput'"
            raise EchoError(f"{expected}: histograms do not keep steps together")
    else:
        if thresholds == "throughput":
            objective = Objective(checks.instance("cost", cost, CostModel), batch, beam)
        shown = refuse_gated(checks.instance("log", log, WarmupLog))
        histograms = ConfidenceHistograms.of(log)
    kinds = histograms.mass[ROWS].sum(axis=(0, 1, 3))
    if not kinds.any():
        raise EchoError("log: expected rows, got an empty log")
    if not kinds.all():
        only = f"{kinds.sum()} {'accepted' if kinds[1] else 'rejected'} rows only"
        raise EchoError(f"log: expected accepted and rejected rows, got {only}")
    if not shown:
        warn_of_missing(histograms)
    deepest = _deepest(histograms)
    last = deepest if max_depth is None else checks.integer("max_depth", max_depth, 1, deepest)
    found = [_measure(histograms.mass[:, d - 1], d, min_auc, min_rows) for d in range(1, last + 1)]
    result = Calibration(tuple(_choose(found, max_gates)), min_auc, min_rows, max_gates)
    if objective is None or not isinstance(log, WarmupLog):
        return result
    return _optimize(result, log, objective)


def _deepest(histograms: ConfidenceHistograms) -> int:
    filled = np.flatnonzero(histograms.mass[ROWS].any(axis=(1, 2, 3)))
    return int(filled[-1]) + 1 if len(filled) else 1


def _measure(
    mass: NDArray[np.int64], depth: int, min_auc: float, min_rows: int
) -> DepthCalibration:
    """Calibrate one depth from ``mass`` int64 [3, 2, 2, bins]."""
    path = mass[:, 0]
    rejected, accepted = (int(n) for n in path[ROWS].sum(axis=1))
    s = statistics.from_histogram(path)
    good = s.low > min_auc
    reason = f"AUC {'above' if good else 'not above'} {min_auc:.2f}"
    if min(accepted, rejected) < min_rows:
        good = False
        fewer = "accepted" if accepted < rejected else "rejected"
        reason = f"only {min(accepted, rejected)} {fewer} rows, {min_rows} needed"
    below = path[WEIGHT][:, s.threshold >= UPPER].sum(axis=1) / UNIT
    total = float(path[WEIGHT].sum() / UNIT)
    square = int(path[SQUARE].sum()) / UNIT
    return DepthCalibration(
        depth=depth,
        accepted=accepted,
        rejected=rejected,
        auc=s.auc,
        auc_low=s.low,
        auc_high=s.high,
        threshold=s.threshold,
        youden=s.youden,
        gate=good,
        reason=reason,
        reliability=statistics.fit(mass.sum(axis=1)),
        auc_error=s.error,
        stopped=float(below.sum()),
        stopped_accepted=float(below[1]),
        effective=total**2 / square if square else 0.0,
        profile=_profile(path[WEIGHT]),
    )


def _profile(weight: NDArray[np.int64]) -> tuple[tuple[float, float, float], ...]:
    total = weight.sum(axis=0)
    if not total.any():
        return ()
    sums = np.cumsum(total)
    shares = np.arange(1, PROFILE_BINS + 1) / PROFILE_BINS
    last = np.unique(np.searchsorted(sums, sums[-1] * shares))
    last[-1] = len(total) - 1
    first = np.concatenate([[0], last[:-1] + 1])
    rejected, accepted = np.add.reduceat(weight, first, axis=1) / UNIT
    columns = (column.tolist() for column in (UPPER[last], accepted, rejected))
    return tuple(zip(*columns, strict=True))


def _choose(found: list[DepthCalibration], max_gates: int) -> list[DepthCalibration]:
    ends = {len(found): "target depth", 1: "root gate"}

    def benefit(d: DepthCalibration) -> float:
        return d.youden * sum(rejected for _, _, rejected in d.profile) * (len(found) - d.depth + 1)

    inner = [d for d in found if d.gate and d.depth not in ends]
    inner.sort(key=lambda d: (-benefit(d), d.depth))
    extra = {d.depth for d in inner[max(0, max_gates - len(ends)) :]}
    result = []
    for d in found:
        if d.depth in ends:
            d = replace(d, gate=True, reason=f"{ends[d.depth]}; {d.reason}")
        elif d.depth in extra:
            d = replace(d, gate=False, reason=f"{d.reason}, but {max_gates} gates at most")
        result.append(d)
    return result


def _optimize(calibration: Calibration, log: WarmupLog, objective: Objective) -> Calibration:
    """Replace the gates' thresholds by throughput-optimal ones."""
    known = calibration.gate_depths, calibration.max_depth, objective, calibration.thresholds
    taus, value = throughput_optimal(log, *known)
    depths = {d.depth: d for d in calibration.depths}
    for depth, tau in taus.items():
        below = (log.depth == depth) & (log.rank == 0) & (log.confidence <= tau)
        kinds = below, below & log.accepted
        stopped, accepted = (float(log.weight[k].sum(dtype=np.float64)) for k in kinds)
        d = replace(depths[depth], threshold=tau, stopped=stopped, stopped_accepted=accepted)
        depths[depth] = d
    optimal = tuple(depths.values())
    return replace(calibration, depths=optimal, rule="throughput", throughput=value)
