"""Timing samples of steps: their columns, the loads that they cover, and doubts about them.

n samples, each of one load: tokens, requests and their total context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import _checks as checks
from echo._checks import EchoError

Floats = NDArray[np.float64]
Table = Mapping[str, Floats]

FOLDS = 5
FEW = 8
"""Folds of the held-out error; with fewer loads, there is none."""
REACH = 1.25
"""How far outside its samples a model still holds, as a ratio."""
FALL = 1.25
"""Ratio by which all samples of a load must exceed all of a greater load for seconds to fall."""


def columns(seconds: ArrayLike, **inputs: ArrayLike | None) -> tuple[Floats, dict[str, Floats]]:
    """Return samples as float columns of one length; EchoError if they are not.

    Inputs that are None are left out, except the first, which is required.
    """
    y = _column("seconds", seconds)
    table: dict[str, Floats] = {}
    for name, value in inputs.items():
        if value is None and table:
            continue
        column = table[name] = _column(name, value)
        if column.shape != y.shape or y.ndim != 1 or not len(y):
            expected = f"seconds: expected as many as {name} ({len(column)}, at least 1)"
            raise EchoError(f"{expected}, got {len(y)}")
        if not np.isfinite(column).all():
            wrong = column[~np.isfinite(column)][0]
            raise EchoError(f"{name}: expected a finite number in every sample, got {wrong}")
    if not (np.isfinite(y) & (y > 0)).all():
        raise EchoError("seconds: expected a positive number in every sample")
    return y, table


def _column(name: str, values: object) -> Floats:
    with checks.reading(f"{name}: expected numbers"):
        if values is None:
            raise ValueError("no samples")
        return np.atleast_1d(np.asarray(values, dtype=np.float64))


def at_least(name: str, column: Floats, low: int) -> None:
    """Raise :class:`EchoError` if a sample of ``column`` is below ``low``."""
    if not (column >= low).all():
        raise EchoError(f"{name}: expected at least {low} in every sample, got {column.min():g}")


def loads(table: Table) -> Floats:
    """Tokens, requests and context per request, float64 [n, 3]; 1 and 0 if not recorded."""
    tokens = table["num_tokens"] + table.get("num_other_tokens", 0.0)
    reqs = table.get("num_reqs", np.ones_like(tokens))
    context = table.get("context_tokens", np.zeros_like(tokens)) / reqs
    return np.stack([tokens, reqs, context], axis=1)


def parts(table: Table) -> list[NDArray[np.bool_]]:
    """Split into folds, bool [n] each: samples of one load together, neighbouring loads apart."""
    found, place = np.unique(loads(table)[:, [1, 2, 0]], axis=0, return_inverse=True)
    part = place.ravel() % FOLDS
    return [part == i for i in range(FOLDS)] if len(found) >= FEW else []


def held_out(
    seconds: Floats, table: Table, fitted: Callable[[Floats, dict[str, Floats]], Any]
) -> float | None:
    """Return the 95th percentile of the relative held-out error; None if there are too few loads.

    ``fitted`` makes a model of the other folds.
    """
    tokens, reqs, context = loads(table).T
    error = np.zeros(len(seconds))
    for own in (found := parts(table)):
        model = fitted(seconds[~own], {name: column[~own] for name, column in table.items()})
        total = context[own] * reqs[own]
        known = model(tokens[own], num_reqs=reqs[own], context_tokens=total)
        error[own] = abs(known / seconds[own] - 1)
    return float(np.quantile(error, 0.95, method="higher")) if found else None


def measured(table: Table) -> tuple[tuple[float, ...], ...]:
    """By number of requests: that number, fewest and most tokens, least and most context of each.

    As :func:`loads`; a single entry if requests were not recorded.
    """
    every = loads(table)
    found = []
    for count in np.unique(every[:, 1]):
        tokens, _, context = every[every[:, 1] == count].T
        spread = tokens.min(), tokens.max(), context.min(), context.max()
        found.append((float(count), *map(float, spread)))
    return tuple(found)


def covers(
    ranges: Sequence[Sequence[float]], num_tokens: float, num_reqs: float, context_len: float
) -> bool:
    """Whether samples cover a load: those of the nearest numbers of requests with its context."""
    own = [r for r in ranges if r[3] / REACH <= context_len <= r[4] * REACH]
    counts = [count for count, *_ in own]
    if not own or not counts[0] / REACH <= num_reqs <= counts[-1] * REACH:
        return False
    fewest, most = (float(np.interp(num_reqs, counts, [r[i] for r in own])) for i in (1, 2))
    return fewest / REACH <= num_tokens <= most * REACH


def reach(ranges: Sequence[Sequence[float]], num_reqs: float, context_len: float) -> float:
    """The most tokens that samples speak for: of these requests or the nearest to them."""
    own = [r for r in ranges if r[3] / REACH <= context_len <= r[4] * REACH] or ranges
    return REACH * float(np.interp(num_reqs, [r[0] for r in own], [r[2] for r in own]))


def doubts(seconds: Floats, table: Table) -> tuple[str, ...]:
    """List what speaks against a model of these samples."""
    found = []
    every, place, size = np.unique(loads(table), axis=0, return_inverse=True, return_counts=True)
    own = np.split(seconds[place.ravel().argsort(kind="stable")], size.cumsum()[:-1])
    low, high = (np.array([of(part) for part in own]) for of in (np.min, np.max))
    first = [int(np.where((every <= load).all(axis=1), low, 0.0).argmax()) for load in every]
    fall = low[first] / high
    if fall.max() > FALL:
        worst = int(fall.argmax())
        texts = [
            f"{every[i, 0]:.0f} tokens of {every[i, 1]:.0f} request(s) took {y:.3g} s"
            for i, y in ((first[worst], low[first[worst]]), (worst, high[worst]))
        ]
        found.append(f"samples fall: {texts[0]}, {texts[1]}")
    if "num_reqs" in table:
        ranges = measured(table)
        if len(ranges) == 1:
            found.append(
                f"samples of {ranges[0][0]:.0f} request(s) only: the cost of others is a guess"
            )
        longest = math.inf
        for count, _, _, least, most in sorted(ranges, key=lambda own: own[3:]):
            if least > REACH * longest:
                found.append(
                    f"contexts up to {longest:.0f} and from {least:.0f}, that of {count:.0f}"
                    " request(s), were not measured with one number of requests: the costs of"
                    " requests and of context cannot be told apart"
                )
            longest = most if longest == math.inf else max(longest, most)
    return tuple(found)
