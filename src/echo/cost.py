"""What a step costs: rows of the target's forward pass -> seconds, and the knee beyond which rows stop being free."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import checks
from echo.errors import EchoError

VERSION = 1


@dataclass(frozen=True)
class Knee:
    """The paper's latency model ``T(K) = T_ar * (1 + gamma * max(0, K - K_max))``, fitted to a cost curve.

    Attributes:
        k_max: rows that cost no more than one row does (roots included: the paper counts drafted rows only, its K_max is
            ours minus the batch).
        t_ar: seconds of a step below the knee.
        gamma: slope beyond the knee, in 1 / rows.
    """

    k_max: int
    t_ar: float
    gamma: float

    def __call__(self, rows: float) -> float:
        """Seconds of a step of ``rows`` rows."""
        return self.t_ar * (1.0 + self.gamma * max(0.0, rows - self.k_max))


@dataclass(frozen=True)
class CostModel:
    """Seconds of a target step by rows: piecewise linear between the measured points, never falling.

    Attributes:
        rows: increasing ints, the measured row counts.
        seconds: non-decreasing floats, seconds of a verify step of that many rows.
        draft_layer: seconds that one drafted layer costs the batch, whatever its rows.
        draft_row: seconds that each row of a drafted layer adds.
        tiers: the row counts that the engine can launch (one CUDA graph each); empty: any.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    draft_layer: float = 0.0
    draft_row: float = 0.0
    tiers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows, seconds = np.asarray(self.rows), np.asarray(self.seconds, dtype=np.float64)
        if rows.ndim != 1 or not len(rows) or len(rows) != len(seconds) or (np.diff(rows) <= 0).any() or rows[0] < 1:
            raise EchoError(f"rows: expected increasing ints >= 1, as many as seconds ({len(seconds)}), got {self.rows}")
        if not np.isfinite(seconds).all() or (seconds <= 0).any() or (np.diff(seconds) < 0).any():
            raise EchoError(f"seconds: expected positive, non-decreasing numbers, got {self.seconds}")
        checks.real("draft_layer", self.draft_layer, 0.0)
        checks.real("draft_row", self.draft_row, 0.0)
        if any(a >= b for a, b in zip(self.tiers, self.tiers[1:], strict=False)) or any(t < 1 for t in self.tiers):
            raise EchoError(f"tiers: expected increasing ints >= 1, got {self.tiers}")

    @classmethod
    def from_samples(
        cls, rows: ArrayLike, seconds: ArrayLike, *, draft_layer: float = 0.0, draft_row: float = 0.0, tiers: Sequence[int] = ()
    ) -> CostModel:
        """Fits measured steps: the median of each row count, then monotone regression weighted by samples.

        Args:
            rows: ints [n], at least 1.
            seconds: positive floats [n].
            draft_layer, draft_row, tiers: see the class.

        Raises:
            EchoError: no samples, columns of different lengths, or values out of range.

        Example:
            >>> model = CostModel.from_samples([1, 8, 16, 32, 64], [1.0, 1.0, 1.0, 2.0, 4.0])
            >>> model(24), model.knee.k_max
            (1.5, 16)
        """
        from scipy.optimize import isotonic_regression

        x, y = np.atleast_1d(np.asarray(rows)), np.atleast_1d(np.asarray(seconds, dtype=np.float64))
        if len(x) != len(y) or not len(x):
            raise EchoError(f"seconds: expected as many as rows ({len(x)}, at least 1), got {len(y)}")
        if (x < 1).any() or not np.isfinite(y).all() or (y <= 0).any():
            raise EchoError("rows, seconds: expected rows >= 1 and positive seconds in every sample")
        points = np.unique(x)
        middle = np.array([np.median(y[x == point]) for point in points])
        fit = isotonic_regression(middle, weights=np.array([(x == point).sum() for point in points]))
        return cls(
            tuple(int(p) for p in points),
            tuple(float(s) for s in fit.x),
            draft_layer=float(draft_layer),
            draft_row=float(draft_row),
            tiers=tuple(int(t) for t in tiers),
        )

    def __call__(self, rows: ArrayLike) -> Any:
        """Seconds of a verify step of ``rows`` rows (a number or an array), rounded up to its tier.

        Beyond the last measured point the last segment's slope goes on; below the first, the first point holds.
        """
        x = np.asarray(self.tier(rows), dtype=np.float64)
        y = np.interp(x, self.rows, self.seconds)
        if len(self.rows) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
            y = np.where(x > self.rows[-1], self.seconds[-1] + slope * (x - self.rows[-1]), y)
        return float(y) if y.ndim == 0 else y

    def tier(self, rows: ArrayLike) -> Any:
        """The smallest tier that holds ``rows``; ``rows`` itself without tiers, or beyond the last tier."""
        x = np.asarray(rows)
        if self.tiers:
            tiers = np.asarray(self.tiers)
            x = np.where(x > tiers[-1], x, tiers[np.minimum(np.searchsorted(tiers, x), len(tiers) - 1)])
        return int(x) if x.ndim == 0 else x

    def fill(self, rows: int) -> int:
        """The most rows that cost no more than ``rows`` do, at one of the measured counts or the end of its tier."""
        most = np.searchsorted(self.seconds, self(rows), side="right")
        return max(int(self.tier(rows)), self.rows[most - 1] if most else 0)

    def draft(self, layers: ArrayLike, rows_per_layer: float) -> Any:
        """Seconds of drafting ``layers`` layers (a number or an array) of ``rows_per_layer`` rows each."""
        return np.asarray(layers) * (self.draft_layer + self.draft_row * rows_per_layer)

    @property
    def knee(self) -> Knee:
        """Least-squares fit of :class:`Knee` in relative error, K_max at one of the measured row counts.

        A curve that rises from its first point on has its knee there; one that never rises has gamma 0 and its last point.
        """
        x, y = np.asarray(self.rows, dtype=np.float64), np.asarray(self.seconds)
        best: tuple[float, Knee] | None = None
        for k in self.rows:
            beyond = np.maximum(0.0, x - k)
            design = np.stack([np.ones_like(x), beyond], axis=1) / y[:, None]
            (base, slope), *_ = np.linalg.lstsq(design, np.ones_like(x), rcond=None)
            if base <= 0:
                continue
            gamma = max(0.0, float(slope / base))
            error = float((((base * (1 + gamma * beyond)) / y - 1.0) ** 2).sum())
            if best is None or error < best[0] - 1e-12:
                best = error, Knee(int(k), float(base), gamma)
        if best is None:
            return Knee(int(self.rows[0]), float(y[0]), 0.0)
        return Knee(int(self.rows[-1]), best[1].t_ar, 0.0) if best[1].gamma == 0.0 else best[1]

    def rows_within(self, factor: float) -> int:
        """The most rows of a step that costs at most ``factor`` times a step of one row: a budget where the curve has no flat part.

        Raises:
            EchoError: factor below 1.
        """
        checks.real("factor", factor, 1.0)
        rows = np.arange(1, self.rows[-1] + 1)
        return int(rows[self(rows) <= factor * self(1) * (1 + 1e-9)][-1])

    def to_json(self) -> str:
        """The model as JSON text."""
        return json.dumps({"format": "echo-cost", "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Reads what :meth:`to_json` wrote.

        Raises:
            EchoError: not JSON, of another version, or with values out of range.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != "echo-cost" or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            columns: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
            return cls(**columns)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, EchoError):
                raise
            raise EchoError(f"cost: expected the JSON of a CostModel, version {VERSION}, got: {error}") from error


def profile(
    step: Callable[[int], object],
    rows: Iterable[int],
    *,
    repeats: int = 5,
    synchronize: Callable[[], object] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Times ``step(rows)`` for each row count: one warm-up call, then ``repeats`` timed rounds over all counts.

    Rounds are interleaved so that a slow moment of the machine does not fall on one row count alone.

    Args:
        step: runs one verify step of that many rows.
        rows: row counts, at least 1.
        repeats: timed calls of each.
        synchronize: waits for the device, for example ``torch.cuda.synchronize``.

    Returns:
        Samples for :meth:`CostModel.from_samples`: rows int64 [n * repeats] and seconds float64 [n * repeats].

    Raises:
        EchoError: no row counts, or an argument out of range.
    """
    counts = [checks.integer("rows", r, 1) for r in rows]
    checks.integer("repeats", repeats, 1)
    if not counts:
        raise EchoError("rows: expected at least one row count, got none")
    wait = synchronize or (lambda: None)
    for count in counts:
        step(count)
    seconds = []
    for _ in range(repeats):
        for count in counts:
            wait()
            start = time.perf_counter()
            step(count)
            wait()
            seconds.append(time.perf_counter() - start)
    return np.array(counts * repeats, dtype=np.int64), np.array(seconds)
