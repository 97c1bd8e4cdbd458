"""A calibration as text: JSON that round-trips exactly, and a table to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from echo import _checks as checks
from echo._checks import EchoError

if TYPE_CHECKING:
    from echo.gating.calibration import Calibration, DepthCalibration

FORMAT, VERSION = "echo-calibration", 1


def write(calibration: Calibration) -> str:
    """JSON, one value or map a line; NaN as null, floats with as many digits as it takes to read them back exactly."""
    head = {"format": FORMAT, "version": VERSION} | {
        f.name: getattr(calibration, f.name) for f in fields(calibration)
    }
    entries = [
        ",\n".join(f"   {_pair(f.name, getattr(d, f.name))}" for f in fields(d))
        for d in calibration.depths
    ]
    depths = ",\n".join(f"  {{\n{entry}\n  }}" for entry in entries)
    lines = [
        f' "depths": [\n{depths}\n ]' if name == "depths" else f" {_pair(name, value)}"
        for name, value in head.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(text: str, kind: type[Calibration], entry: type[DepthCalibration]) -> Calibration:
    """See :meth:`Calibration.from_json`."""
    with checks.reading("calibration: expected JSON text"):
        data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        found = (
            (data.get("format"), data.get("version"))
            if isinstance(data, dict)
            else type(data).__name__
        )
        newer = (
            isinstance(found, tuple)
            and found[0] == FORMAT
            and isinstance(found[1], int)
            and found[1] > VERSION
        )
        hint = ": a newer ECHO wrote it, update this one" if newer else ""
        raise EchoError(
            f"calibration: expected format '{FORMAT}' version {VERSION}, got {found}{hint}"
        )
    with checks.reading(f"calibration: expected the fields of version {VERSION}"):
        depths = tuple(_depth(d, entry) for d in data["depths"])
        throughput = data["throughput"]
        result = kind(
            depths,
            float(data["min_auc"]),
            int(data["min_rows"]),
            int(data["max_gates"]),
            str(data["rule"]),
            None if throughput is None else float(throughput),
        )
    if [d.depth for d in depths] != list(range(1, len(depths) + 1)) or not depths:
        raise EchoError(f"calibration: expected depths 1, 2, ..., got {[d.depth for d in depths]}")
    return result


def describe(calibration: Calibration) -> str:
    """A table in plain text, one line for each depth. "stops" is what the gate alone stops, "wrongly" the accepted part of that."""
    lines = [
        f"{calibration.max_depth} depths, gates at {', '.join(map(str, calibration.gate_depths))}; thresholds by {calibration.rule}"
        + (
            f" ({calibration.throughput:.4g} tokens/s)"
            if calibration.throughput is not None
            else ""
        ),
        "depth  gate  accepted  rejected  AUC   95%           threshold   stops  wrongly  reason",
    ]
    for d in calibration.depths:
        rows = sum(a + r for _, a, r in d.profile)
        auc = "  - " if math.isnan(d.auc) else f"{d.auc:.2f}"
        stops = f"{d.stopped / rows:6.1%}" if rows else "     -"
        wrongly = f"{d.stopped_accepted / d.stopped:7.1%}" if d.stopped else "      -"
        lines.append(
            f"{d.depth:5d}  {'yes' if d.gate else 'no':<4}  {d.accepted:8d}  {d.rejected:8d}  {auc}  [{d.auc_low:.2f}, {d.auc_high:.2f}]"
            f"  {d.threshold:9.3g}  {stops}  {wrongly}  {d.reason}"
        )
    return "\n".join(lines)


def _pair(name: str, value: Any) -> str:
    plain = None if isinstance(value, float) and math.isnan(value) else value
    return f"{json.dumps(name)}: {json.dumps(plain, allow_nan=False)}"


def _depth(data: Mapping[str, Any], kind: type[DepthCalibration]) -> DepthCalibration:
    """One entry, checked."""
    read = kind(
        **{
            **data,
            "auc": float("nan") if data["auc"] is None else float(data["auc"]),
            "reliability": _rows(data["reliability"]),
            "profile": _rows(data["profile"]),
        }
    )
    checks.integer("calibration.depth", read.depth, 1)
    checks.real("calibration.threshold", read.threshold, 0.0, 1.0)
    for name in ("accepted", "rejected"):
        checks.integer(f"calibration.{name}", getattr(read, name), 0)
    checks.real("calibration.effective", read.effective, 0.0)
    for number in (number for row in read.profile for number in row):
        checks.real("calibration.profile", number, 0.0)
    knots = read.reliability
    scores, chances = [s for s, _ in knots], [p for _, p in knots]
    rising = (
        scores == sorted(scores)
        and chances == sorted(chances)
        and all(map(math.isfinite, scores + chances))
    )
    if not knots or not rising or not 0 <= chances[0] <= chances[-1] <= 1:
        raise EchoError(
            f"calibration.reliability: expected rising knots within [0, 1] at depth {read.depth}, got {knots}"
        )
    return read


def _rows(table: Any) -> Any:
    return tuple(tuple(float(value) for value in row) for row in table)
