"""Robust monotone regression of noisy timings, and the paper's knee of a curve.

n samples, m knots of a curve. Seconds are a curve over tokens, plus a curve over requests, plus
context times a curve over the tokens of a request, max(1, tokens / k): attention reads context once
for several tokens, but computes for each. All curves rise, so any non-negative sum does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo._checks import EchoError
from echo.cost.samples import at_least, columns

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_KNOTS = 48
"""Maximum knots of a curve; with more distinct values, quantiles of the samples' values."""
RESAMPLES = 200
SMOOTH = 1e-7
"""Weight of curvature over log tokens or requests: it decides only where no sample does."""
NOISE = 0.01
"""Relative error up to which a sample is no outlier."""
TOKENS_PER_REQ = np.array([1, 2, 4, 8, 16, 32, 64])
"""Knots of the curve over a request's tokens; it is flat above, where prefill is."""
FAR = 1 << 40
"""Tokens from the last measured count to the end of an extended curve."""
NEAR = 0.03
"""Relative distance within which token counts share a knot in an update: at most 32 an octave."""


@dataclass(frozen=True)
class Knee:
    """The paper's ``T(K) = T_ar * (1 + gamma * max(0, K - K_max))``, fitted to a cost curve.

    Attributes:
        k_max: tokens that cost no more than one (the paper's, plus the batch's roots).
        t_ar: seconds of a step below the knee.
        gamma: slope above the knee, in 1 / tokens.
        k_max_interval, gamma_interval: 95% intervals; None if samples were not repeated.
        bends: whether there is a real knee. Not if the curve never rises, rises from its first
            point on, or misses the law by over a quarter, as a mixture of experts with few
            requests.

    Example:
        >>> Knee(k_max=16, t_ar=0.03, gamma=0.5)(18)
        0.06
    """

    k_max: int
    t_ar: float
    gamma: float
    k_max_interval: tuple[int, int] | None = None
    gamma_interval: tuple[float, float] | None = None
    bends: bool = field(default=True, compare=False)

    def __call__(self, num_tokens: float) -> float:
        """Return the seconds of a step of ``num_tokens`` tokens."""
        return self.t_ar * (1.0 + self.gamma * max(0.0, num_tokens - self.k_max))


def solve(design: Floats, seconds: Floats, penalty: Floats | None = None) -> Floats:
    """Fit ``design @ x = seconds`` with x >= 0 in relative error, robust to outliers.

    Huber's estimator by reweighting: beyond 1.345 robust standard deviations a sample's error
    counts linearly instead of squared. The square of ``penalty @ x`` is added.
    """
    from scipy.optimize import nnls

    relative = design / seconds[:, None]
    rest = np.empty((0, design.shape[1])) if penalty is None else penalty
    weight = np.ones(len(seconds))
    x = np.zeros(design.shape[1])
    zeros = np.zeros(len(rest))
    for _ in range(30):
        old = x
        rows = np.concatenate([relative * weight[:, None], rest])
        x, _ = nnls(rows, np.concatenate([weight, zeros]))
        error = np.abs(relative @ x - 1.0)
        limit = max(1.345 * 1.4826 * float(np.median(error)), NOISE)
        weight = np.sqrt(limit / np.maximum(error, limit))
        if np.allclose(x, old, rtol=1e-6, atol=0.0):
            break
    return np.asarray(x, dtype=np.float64)


def knots(values: Floats) -> Ints:
    """Choose where a curve over these integers may bend."""
    points = np.unique(values.astype(np.int64))
    if len(points) <= MAX_KNOTS:
        return points
    return np.unique(np.quantile(points, np.linspace(0, 1, MAX_KNOTS), method="nearest"))


def ramps(x: Floats, points: Ints) -> Floats:
    """float64 [n, m - 1]: share of each segment below each sample; rising curves mix them."""
    low = points[:-1].astype(np.float64)
    high = points[1:].astype(np.float64)
    return np.clip((x[:, None] - low) / (high - low), 0.0, 1.0)


def curvature(points: Ints) -> Floats:
    """float64 [m - 2, m - 1]: change of slope (by the logarithm) between a curve's increments."""
    width = np.diff(np.log(points))
    slopes = np.diag(1.0 / width)
    between = np.sqrt((width[:-1] + width[1:]) / 2)
    result: Floats = np.diff(slopes, axis=0) * between[:, None]
    return result


def reading(per_req: Floats) -> Floats:
    """float64 [n, 6]: cost of context at ``per_req`` tokens: a column max(1, tokens / k) per k."""
    ends = np.append(TOKENS_PER_REQ[1:-1], np.inf)
    tokens = np.minimum(per_req, TOKENS_PER_REQ[-1])
    times: Floats = np.maximum(1.0, tokens[:, None] / ends)
    return times


def curves(seconds: Floats, table: dict[str, Floats]) -> dict[str, Any]:
    """Fit the fields of a :class:`CostModel` that samples determine."""
    x = table["num_tokens"] + table.get("num_other_tokens", 0.0)
    reqs = table.get("num_reqs", np.ones_like(x))
    points = knots(x)
    counts = knots(reqs)
    parts = [np.ones((len(seconds), 1)), ramps(x, points), ramps(reqs, counts)]
    if "context_tokens" in table:
        times = reading(x / reqs) if "num_reqs" in table else np.ones((len(x), 1))
        parts.append(table["context_tokens"][:, None] * times)
    design = np.concatenate(parts, axis=1)
    ends = np.cumsum([part.shape[1] for part in parts])
    rough = np.zeros((0, design.shape[1]))
    for first, own in ((ends[0], points), (ends[1], counts)):
        if len(own) > 2:
            row = np.zeros((len(own) - 2, design.shape[1]))
            row[:, first : first + len(own) - 1] = curvature(own) * SMOOTH / np.median(seconds)
            rough = np.concatenate([rough, row])
    found = solve(design, seconds, rough)
    least = 1e-3 * seconds.min()
    curve = np.maximum(found[: ends[1]].cumsum(), least)
    fields: dict[str, Any] = {"num_tokens": points, "seconds": rounded(curve)}
    if "num_reqs" in table:
        rises = found[ends[1] : ends[2]].cumsum()
        fields |= {"num_reqs": counts, "request_seconds": rounded([0.0, *rises])}
    if "context_tokens" in table:
        each = found[ends[2] :]
        fields["context_token"] = float(each.sum())
        if len(each) > 1:
            each = reading(TOKENS_PER_REQ.astype(np.float64)) @ each
        if each[-1] > each[0] * (1 + 1e-9):
            fields["tokens_per_req"] = TOKENS_PER_REQ
            fields["context_factors"] = rounded(each / each[0])
    return fields


def rounded(values: ArrayLike, digits: int = 12) -> tuple[float, ...]:
    """Round to so many digits: beyond 12, a solver leaves noise."""
    return tuple(float(f"{value:.{digits}g}") for value in np.asarray(values))


def line(amount: ArrayLike, seconds: ArrayLike) -> tuple[float, float]:
    """Fit the robust line ``seconds = fixed + each * amount``, both non-negative.

    ``draft_layer, draft_token = line(*profile(draft, counts))`` for a :class:`CostModel`, and
    ``_, extend_token = line(*profile(extend, counts))``.

    Args:
        amount: numbers [n], tokens of a draft layer or of a draft extend.
        seconds: positive floats [n].

    Raises:
        EchoError: no samples, columns of different lengths, or values out of range.

    Example:
        >>> [round(value, 6) for value in line([1, 2, 4, 8], [1.1, 1.2, 1.4, 1.8])]
        [1.0, 0.1]
    """
    y, table = columns(seconds, amount=amount)
    at_least("amount", table["amount"], 0)
    fixed, each = solve(np.stack([np.ones_like(y), table["amount"]], axis=1), y)
    return float(fixed), float(each)


def knee(num_tokens: ArrayLike, seconds: ArrayLike) -> tuple[Ints, Floats, Floats]:
    """Fit the law exactly by least squares in relative error: a 2 x 2 system for each K.

    ``seconds`` [..., m] may be any number of curves. Returns ``k_max`` int64, ``t_ar`` and
    ``gamma`` float64 [...]; a curve that never rises has gamma 0 and its last count.
    """
    x = np.asarray(num_tokens, dtype=np.float64)
    y = np.asarray(seconds, dtype=np.float64)
    error, *_ = _law(x, y, np.broadcast_to(x, (*y.shape[:-1], len(x))))
    place = _first(error)
    below = x[np.maximum(place - 1, 0)]
    above = x[np.minimum(place + 1, len(x) - 1)]
    between = np.round(below[..., None] + (above - below)[..., None] * np.linspace(0, 1, 65))
    candidates = np.concatenate([x[place][..., None], between], axis=-1)  # the first wins ties
    error, base, slope = _law(x, y, candidates)
    best = _first(error)[..., None]
    k, base, slope = (np.take_along_axis(v, best, -1)[..., 0] for v in (candidates, base, slope))
    gamma = slope / base
    return np.where(gamma > 0, k, x[-1]).astype(np.int64), base, gamma


def _law(x: Floats, y: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    """Error, base and slope of the law for each candidate: y [..., m], k [..., c] -> [..., c]."""
    u = np.broadcast_to((1.0 / y)[..., None, :], (*k.shape, len(x)))
    v = np.maximum(0.0, x - k[..., None]) * u
    uu = (u * u).sum(-1)
    uv = (u * v).sum(-1)
    vv = (v * v).sum(-1)
    u1 = u.sum(-1)
    v1 = v.sum(-1)
    det = uu * vv - uv * uv
    sound = det > 1e-12 * uu * vv
    det = np.where(sound, det, 1.0)
    base = (vv * u1 - uv * v1) / det
    slope = (uu * v1 - uv * u1) / det
    rises = sound & (slope > 0) & (base > 0)
    base = np.where(rises, base, u1 / uu)
    slope = np.where(rises, slope, 0.0)
    return ((base[..., None] * u + slope[..., None] * v - 1.0) ** 2).sum(-1), base, slope


def _first(error: Floats) -> NDArray[np.intp]:
    """The first of the smallest errors, up to rounding."""
    return np.asarray((error <= error.min(-1, keepdims=True) + 1e-12).argmax(axis=-1))


def knee_intervals(x: Floats, ratio: Floats, points: Ints, curve: Floats) -> dict[str, Any]:
    """95% bootstrap intervals: resample each knot, take the median, a monotone curve, its knee.

    ``ratio`` [n]: each sample over the curve. Fewer than three samples a knot do not show the
    noise: no intervals.
    """
    from scipy.optimize import isotonic_regression

    if len(x) < 3 * len(points) or len(points) < 3:
        return {}
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
    slopes = tuple(np.percentile(gamma, [2.5, 97.5]).tolist())
    return {"k_max_interval": (int(np.floor(low)), int(np.ceil(high))), "gamma_interval": slopes}


def bend(
    points: tuple[int, ...], values: tuple[float, ...], at: int, value: float, times: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Scale the curve's ``value`` at ``at`` by ``times``, at a near or new knot, still rising."""
    x = np.array(points)
    y = np.array(values)
    knot = int(np.abs(x - at).argmin())
    if abs(x[knot] - at) > NEAR * at:
        knot = int(np.searchsorted(x, at))
        x = np.insert(x, knot, at)
        y = np.insert(y, knot, value)
    y[knot] *= times
    y[:knot] = np.minimum(y[:knot], y[knot])
    y[knot:] = np.maximum(y[knot:], y[knot])
    return tuple(x.tolist()), tuple(y.tolist())


def extended(points: tuple[int, ...], values: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Extend the curve for ``np.interp`` by one far knot, so that its last slope continues."""
    slope = (values[-1] - values[-2]) / (points[-1] - points[-2]) if len(points) > 1 else 0.0
    return np.array([*points, points[-1] + FAR]), np.array([*values, values[-1] + slope * FAR])


def check_curve(owner: object, x_name: str, y_name: str) -> None:
    """Raise :class:`EchoError` unless these fields are a curve, or empty (not the tokens')."""
    x = getattr(owner, x_name)
    y = getattr(owner, y_name)
    positive = y_name == "seconds"
    if not (x or y or positive):
        return
    if not x or len(x) != len(y) or (np.diff(x) <= 0).any() or x[0] < 1:
        expected = f"{x_name}: expected increasing ints >= 1, as many as {y_name} ({len(y)})"
        raise EchoError(f"{expected}, got {x}")
    if not np.isfinite(y).all() or (np.diff(y) < 0).any() or y[0] < 0 or (positive and not y[0]):
        expected = f"{'positive, ' * positive}non-decreasing numbers"
        raise EchoError(f"{y_name}: expected {expected}, got {y}")
    if y_name == "request_seconds" and y[0]:
        raise EchoError(f"{y_name}: expected 0 at the fewest requests, got {y[0]}")
    sound = (x[0], y[0]) == (1, 1) and (np.diff(np.divide(y, x)) <= 1e-9).all()
    if y_name == "context_factors" and not sound:
        expected = "1 at one token, rising at most in proportion"
        raise EchoError(f"{y_name}: expected {expected}, got {y}")
