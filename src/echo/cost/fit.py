"""From noisy timings to numbers: one robust non-negative regression, the paper's knee in closed form, and its intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo._checks import EchoError

Floats = NDArray[np.float64]

MOST_KNOTS = 48
"""Knots of a curve at most; where samples have more different values, their quantiles."""
RESAMPLES = 200
NEAR = 0.03
"""Row counts this close are one knot where a curve learns: at most 32 to an octave."""


@dataclass(frozen=True)
class Knee:
    """The paper's latency model ``T(K) = T_ar * (1 + gamma * max(0, K - K_max))``, fitted to a cost curve.

    Attributes:
        k_max: rows that cost no more than one row does (roots included: the paper counts drafted rows only, its K_max is
            ours minus the batch).
        t_ar: seconds of a step below the knee.
        gamma: slope beyond the knee, in 1 / rows.
        k_max_interval: 95% interval of ``k_max``; None where the samples were not repeated.
        gamma_interval: 95% interval of ``gamma``; None likewise.
    """

    k_max: int
    t_ar: float
    gamma: float
    k_max_interval: tuple[int, int] | None = None
    gamma_interval: tuple[float, float] | None = None

    def __call__(self, num_tokens: float) -> float:
        """Seconds of a step of ``num_tokens`` rows."""
        return self.t_ar * (1.0 + self.gamma * max(0.0, num_tokens - self.k_max))


def columns(seconds: ArrayLike, **inputs: ArrayLike | None) -> tuple[Floats, dict[str, Floats]]:
    """Samples as float columns of one length; inputs that are None are left out.

    Raises:
        EchoError: none at all, different lengths, inputs that are not finite, or seconds that are not positive and finite.
    """
    y = np.atleast_1d(np.asarray(seconds, dtype=np.float64))
    table = {
        name: np.atleast_1d(np.asarray(value, dtype=np.float64))
        for name, value in inputs.items()
        if value is not None
    }
    for name, column in table.items():
        if column.shape != y.shape or y.ndim != 1 or not len(y):
            raise EchoError(
                f"seconds: expected as many as {name} ({len(column)}, at least 1), got {len(y)}"
            )
        if not np.isfinite(column).all():
            raise EchoError(
                f"{name}: expected a finite number in every sample, got {column[~np.isfinite(column)][0]}"
            )
    if not (np.isfinite(y) & (y > 0)).all():
        raise EchoError("seconds: expected a positive number in every sample")
    return y, table


def solve(design: Floats, seconds: Floats) -> Floats:
    """Coefficients >= 0 that fit ``design @ x = seconds`` in relative error, whatever a few wild samples say.

    Huber's estimator by reweighting: a sample beyond 1.345 robust standard deviations counts with its distance, not its square.

    Args:
        design: float64 [n, m], non-negative.
        seconds: float64 [n], positive.
    """
    from scipy.optimize import nnls

    relative, weight, x = (
        design / seconds[:, None],
        np.ones(len(seconds)),
        np.zeros(design.shape[1]),
    )
    for _ in range(30):
        old, (x, _) = x, nnls(relative * weight[:, None], weight)
        error = np.abs(relative @ x - 1.0)
        limit = max(1.345 * 1.4826 * float(np.median(error)), 1e-9)
        weight = np.sqrt(limit / np.maximum(error, limit))
        if np.allclose(x, old, rtol=1e-6, atol=0.0):
            break
    return np.asarray(x, dtype=np.float64)


def knots(values: Floats) -> NDArray[np.int64]:
    """Where a curve over these integers may bend."""
    points = np.unique(values.astype(np.int64))
    if len(points) <= MOST_KNOTS:
        return points
    return np.unique(np.quantile(points, np.linspace(0, 1, MOST_KNOTS), method="nearest"))


def ramps(x: Floats, points: NDArray[np.int64]) -> Floats:
    """float64 [n, knots - 1]: how far each sample is up each segment; a rising curve is a non-negative mixture of them."""
    low, high = points[:-1].astype(np.float64), points[1:].astype(np.float64)
    return np.clip((x[:, None] - low) / (high - low), 0.0, 1.0)


def curves(seconds: Floats, table: dict[str, Floats]) -> dict[str, Any]:
    """The fields of a :class:`CostModel` that samples tell: both curves, the context's slope and the knee's intervals.

    Args:
        seconds: float64 [n].
        table: float64 [n] each, ``rows`` and perhaps ``requests``, ``context``, ``base_rows``.
    """
    x = table["num_tokens"] + table.get("num_other_tokens", 0.0)
    points, parts = knots(x), [np.ones((len(seconds), 1))]
    parts.append(ramps(x, points))
    crowd = knots(table["num_reqs"]) if "num_reqs" in table else None
    if crowd is not None:
        parts.append(ramps(table["num_reqs"], crowd))
    if "context_tokens" in table:
        parts.append(table["context_tokens"][:, None])
    design = np.concatenate(parts, axis=1)
    found, least = solve(design, seconds), 1e-3 * seconds.min()
    curve = np.maximum(found[: len(points)].cumsum(), least)
    fields: dict[str, Any] = {"num_tokens": tuple(points.tolist()), "seconds": rounded(curve)}
    if crowd is not None:
        rises = found[len(points) : len(points) + len(crowd) - 1]
        fields |= {
            "num_reqs": tuple(crowd.tolist()),
            "request_seconds": rounded(np.concatenate([[0.0], rises.cumsum()])),
        }
    if "context_tokens" in table:
        fields["context_token"] = float(found[-1])
    k_max, gamma = knee_intervals(x, seconds / np.maximum(design @ found, least), points, curve)
    return fields | {"k_max_interval": k_max, "gamma_interval": gamma}


def rounded(values: ArrayLike, digits: int = 12) -> tuple[float, ...]:
    """To that many digits: what the solver leaves beyond 12 is noise."""
    return tuple(float(f"{value:.{digits}g}") for value in np.asarray(values))


def line(amount: ArrayLike, seconds: ArrayLike) -> tuple[float, float]:
    """The robust line through timings, ``seconds = fixed + each * amount``, neither of them negative.

    For what a :class:`CostModel` takes beside its curve: ``draft_layer, draft_row = line(*profile(draft, rows))``, and
    ``restart, extend_token = line(*profile(refill, tokens))``.

    Args:
        amount: numbers [n], rows of a drafted layer or tokens of a refill.
        seconds: positive floats [n].

    Raises:
        EchoError: no samples, columns of different lengths, or values out of range.

    Example:
        >>> [round(value, 6) for value in line([1, 2, 4, 8], [1.1, 1.2, 1.4, 1.8])]
        [1.0, 0.1]
    """
    y, table = columns(seconds, amount=amount)
    if not (table["amount"] >= 0).all():
        raise EchoError("amount: expected a number >= 0 in every sample")
    fixed, each = solve(np.stack([np.ones_like(y), table["amount"]], axis=1), y)
    return float(fixed), float(each)


def knee(num_tokens: ArrayLike, seconds: ArrayLike) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Least squares of the law in relative error, exact: for each integer K its base and slope are a 2 x 2 system.

    Measured row counts are tried first, then the integers on both sides of the best.

    Args:
        num_tokens: increasing ints [n].
        seconds: positive floats [..., n], any number of curves.

    Returns:
        ``k_max`` int64 [...], ``t_ar`` and ``gamma`` float64 [...]. A curve that never rises has gamma 0 and its last row count.
    """
    x, y = np.asarray(num_tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    error, *_ = _law(x, y, np.broadcast_to(x, (*y.shape[:-1], len(x))))
    place = _first(error)
    below, above = x[np.maximum(place - 1, 0)], x[np.minimum(place + 1, len(x) - 1)]
    between = np.round(below[..., None] + (above - below)[..., None] * np.linspace(0, 1, 65))
    candidates = np.concatenate(
        [x[place][..., None], between], axis=-1
    )  # the measured count first: it wins ties
    error, base, slope = _law(x, y, candidates)
    best = _first(error)[..., None]
    k, base, slope = (np.take_along_axis(v, best, -1)[..., 0] for v in (candidates, base, slope))
    gamma = slope / base
    return np.where(gamma > 0, k, x[-1]).astype(np.int64), base, gamma


def _law(x: Floats, y: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    """Error, base and slope of the law for each candidate: y [..., n], k [..., c] -> [..., c] each."""
    u = np.broadcast_to((1.0 / y)[..., None, :], (*k.shape, len(x)))
    v = np.maximum(0.0, x - k[..., None]) * u
    uu, uv, vv, u1, v1 = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1), u.sum(-1), v.sum(-1)
    det = uu * vv - uv * uv
    sound = det > 1e-12 * uu * vv
    det = np.where(sound, det, 1.0)
    base, slope = (vv * u1 - uv * v1) / det, (uu * v1 - uv * u1) / det
    rises = sound & (slope > 0) & (base > 0)
    base, slope = np.where(rises, base, u1 / uu), np.where(rises, slope, 0.0)
    return ((base[..., None] * u + slope[..., None] * v - 1.0) ** 2).sum(-1), base, slope


def _first(error: Floats) -> NDArray[np.intp]:
    """The first of the smallest errors, rounding aside."""
    return np.asarray((error <= error.min(-1, keepdims=True) + 1e-12).argmax(axis=-1))


def knee_intervals(
    x: Floats, ratio: Floats, points: NDArray[np.int64], curve: Floats
) -> tuple[tuple[int, int], tuple[float, float]] | tuple[None, None]:
    """95% bootstrap intervals of K_max and gamma: samples drawn anew at each knot, their median, a monotone curve, its knee.

    Args:
        x: float64 [n], row counts of the samples.
        ratio: float64 [n], each sample over the fitted curve.
        points, curve: [m], the fitted curve.

    Returns:
        None twice where fewer than three samples fall to a knot on average: then nothing is known about the noise.
    """
    from scipy.optimize import isotonic_regression

    if len(x) < 3 * len(points) or len(points) < 3:
        return None, None
    rng = np.random.default_rng(0)
    near = np.abs(x[:, None] - points).argmin(1)
    drawn = np.ones((RESAMPLES, len(points)))
    for j in range(len(points)):
        own = ratio[near == j]
        if len(own):
            drawn[:, j] = np.median(own[rng.integers(0, len(own), (RESAMPLES, len(own)))], axis=1)
    monotone = np.stack([isotonic_regression(row).x for row in drawn * curve])
    k, _, gamma = knee(points, monotone)
    low, high = np.percentile(k, [2.5, 97.5])
    return (int(np.floor(low)), int(np.ceil(high))), (
        float(np.percentile(gamma, 2.5)),
        float(np.percentile(gamma, 97.5)),
    )


def given_way(
    curve: tuple[tuple[int, ...], tuple[float, ...]], at: int, value: float, error: float
) -> tuple[Any, Any]:
    """A curve whose value at ``at`` moves by ``error``, at the knot near it or a new one, and that falls on neither side of it."""
    x, y = (np.asarray(part, dtype=np.float64) for part in curve)
    knot = int(np.abs(x - at).argmin())
    if abs(x[knot] - at) > NEAR * at:
        knot = int(np.searchsorted(x, at))
        x, y = np.insert(x, knot, at), np.insert(y, knot, value)
    y[knot] = max(y[knot] + error, 1e-3 * y[0])
    y[:knot] = np.minimum(y[:knot], y[knot])
    y[knot:] = np.maximum(y[knot:], y[knot])
    return tuple(int(r) for r in x), tuple(float(s) for s in y)
