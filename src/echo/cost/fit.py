"""Robust monotone regression of noisy timings, and the paper's knee of a curve.

n samples, m knots of a curve. Seconds are a curve over tokens, plus a curve over requests, plus
context times a curve over the tokens of a request, max(1, tokens / k): attention reads context once
for several tokens, but computes for each. All curves rise, so any non-negative sum does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost.samples import Floats, columns, loads

Ints = NDArray[np.int64]

MAX_KNOTS = 48
"""Maximum knots of a curve; with more distinct values, quantiles of the samples' values."""
FOLDS = 5
FEW = 8
"""Folds of the held-out error; with fewer loads, there is none."""
RESAMPLES = 200
SMOOTH = 1e-7
"""Weight of curvature over log tokens or requests: it decides only where no sample does."""
NOISE = 0.01
"""Relative error up to which a sample is no outlier."""
MISFIT = 0.25
"""Largest relative error of the paper's law on a curve that is said to have a knee."""
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
    smooth = relative[:0] if penalty is None else penalty
    weight = np.ones(len(seconds))
    x = np.zeros(design.shape[1])
    for _ in range(30):
        old = x
        rows = np.concatenate([relative * weight[:, None], smooth])
        x, _ = nnls(rows, np.append(weight, np.zeros(len(smooth))))
        error = np.abs(relative @ x - 1.0)
        limit = max(1.345 * 1.4826 * float(np.median(error)), NOISE)
        weight = np.sqrt(limit / np.maximum(error, limit))
        if np.allclose(x, old, rtol=1e-6, atol=0.0):
            break
    return np.asarray(x, dtype=np.float64)


def knots(values: Floats) -> Ints:
    """Choose where a curve over these integers may bend."""
    points = np.unique(values.astype(np.int64))
    return np.unique(np.quantile(points, np.linspace(0, 1, MAX_KNOTS), method="nearest"))


def ramps(x: Floats, points: Ints) -> Floats:
    """float64 [n, m - 1]: share of each segment below each sample; rising curves mix them."""
    return np.clip((x[:, None] - points[:-1]) / np.diff(points), 0.0, 1.0)


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
    from scipy.linalg import block_diag

    x, reqs, _ = loads(table).T
    points = knots(x)
    counts = knots(reqs)
    terms = [np.ones((len(x), 1)), ramps(x, points), ramps(reqs, counts)]
    if "context_tokens" in table:
        times = reading(x / reqs) if "num_reqs" in table else np.ones((len(x), 1))
        terms.append(table["context_tokens"][:, None] * times)
    ends = np.cumsum([term.shape[1] for term in terms])
    rough = [curvature(own) * SMOOTH / np.median(seconds) for own in (points, counts)]
    smooth = [np.zeros((0, 1)), *rough, *(term[:0] for term in terms[3:])]
    found = solve(np.hstack(terms), seconds, block_diag(*smooth))
    curve = np.maximum(found[: ends[1]].cumsum(), 1e-3 * seconds.min())
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


def folds(
    seconds: Floats, table: dict[str, Floats]
) -> Iterator[tuple[NDArray[np.bool_], dict[str, Any]]]:
    """Leave out each fifth of the loads; yield their samples, bool [n], and the others' curves.

    Neighbouring loads are in different folds; few loads are not split at all.
    """
    every, place = np.unique(loads(table)[:, [1, 2, 0]], axis=0, return_inverse=True)
    for fold in range(FOLDS) if len(every) >= FEW else ():
        own = place.ravel() % FOLDS == fold
        yield own, curves(seconds[~own], {name: column[~own] for name, column in table.items()})


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
    fixed, each = solve(np.stack([np.ones_like(y), table["amount"]], axis=1), y)
    return float(fixed), float(each)


def knee(
    points: tuple[int, ...],
    curve: tuple[float, ...],
    k_max_interval: tuple[int, int] | None,
    gamma_interval: tuple[float, float] | None,
) -> Knee:
    """Fit the law to a curve, with these intervals."""
    x = np.array(points, dtype=np.float64)
    y = np.array(curve)
    k, base, slope = _laws(x, y)
    misfit = abs(base * (1 + slope * np.maximum(0, x - k)) / y - 1)
    bends = bool(slope > 0 and k > x[0] and (misfit < MISFIT).all())
    return Knee(int(k), float(base), float(slope), k_max_interval, gamma_interval, bends)


def _laws(x: Floats, y: Floats) -> tuple[Ints, Floats, Floats]:
    """Fit the law exactly by least squares in relative error: a 2 x 2 system for each K.

    ``y`` [..., m], seconds, may be any number of curves. Returns ``k_max`` int64, ``t_ar`` and
    ``gamma`` float64 [...]; a curve that never rises has gamma 0 and its last count.
    """
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


def knee_intervals(
    x: Floats, ratio: Floats, points: tuple[int, ...], curve: tuple[float, ...]
) -> dict[str, Any]:
    """95% bootstrap intervals: resample each knot, take the median, a monotone curve, its knee.

    ``ratio`` [n]: each sample over the curve. Fewer than three samples a knot do not show the
    noise: no intervals.
    """
    from scipy.optimize import isotonic_regression

    if len(x) < 3 * len(points) or len(points) < 3:
        return {}
    rng = np.random.default_rng(0)
    knots = np.array(points, dtype=np.float64)
    near = np.abs(x[:, None] - knots).argmin(1)
    drawn = np.ones((RESAMPLES, len(knots)))
    for j in np.unique(near):
        own = ratio[near == j]
        drawn[:, j] = np.median(own[rng.integers(0, len(own), (RESAMPLES, len(own)))], axis=1)
    monotone = np.stack([isotonic_regression(row).x for row in drawn * np.array(curve)])
    k, _, gamma = _laws(knots, monotone)
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
    """Make these fields a curve's ints and floats; empty ones may stay (not the tokens').

    EchoError: they are no curve.
    """
    x = checks.ints(x_name, getattr(owner, x_name), 0)
    with checks.reading(f"{y_name}: expected numbers"):
        y = tuple(float(value) for value in getattr(owner, y_name))
    object.__setattr__(owner, x_name, x)
    object.__setattr__(owner, y_name, y)
    positive = y_name == "seconds"
    if not (x or y or positive):
        return
    if not x or len(x) != len(y) or (np.diff(x) <= 0).any() or x[0] < 1:
        expected = f"{x_name}: expected increasing ints >= 1, as many as {y_name} ({len(y)})"
        raise EchoError(f"{expected}, got {x}")
    expected = ""
    if not np.isfinite(y).all() or (np.diff(y) < 0).any() or y[0] < 0 or (positive and not y[0]):
        expected = f"{'positive, ' * positive}non-decreasing numbers"
    elif y_name == "request_seconds" and y[0]:
        expected = "0 at the fewest requests"
    elif y_name == "context_factors":
        sound = (x[0], y[0]) == (1, 1) and (np.diff(np.divide(y, x)) <= 1e-9).all()
        expected = "" if sound else "1 at one token, rising at most in proportion"
    if expected:
        raise EchoError(f"{y_name}: expected {expected}, got {y}")
