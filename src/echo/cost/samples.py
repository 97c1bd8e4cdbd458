"""Timing samples of steps, the loads that they cover, and what they leave in doubt.

n samples, each of one load: tokens, requests and their total context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import _checks as checks
from echo._checks import EchoError

Floats = NDArray[np.float64]
Table = Mapping[str, Floats]

REACH = 1.25
"""How far outside its samples a model still holds, as a ratio."""
FALL = 1.25
"""Ratio by which all samples of a load must exceed all of a greater load for seconds to fall."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What samples say of the :class:`~echo.CostModel` fitted to them, beside its curves.

    Attributes:
        k_max_interval, gamma_interval: 95% intervals of the knee; None: too few samples.
        measured: ranges of the samples, by number of requests (1 if unknown): that number, fewest
            and most tokens, least and most context of a request. Empty: there are no samples.
        error: 95th percentile of the relative held-out error. None: too few loads.
        doubts: what in the samples speaks against the model.

    Raises:
        EchoError: a value of another kind or out of range.

    Example:
        >>> few = Evidence(measured=((1, 1, 16, 0, 4096),))
        >>> few.covers(20, 1, 0), few.covers(21, 1, 0), few.reach(1, 0), Evidence().reach(1, 0)
        (True, False, 20.0, inf)
    """

    k_max_interval: tuple[int, int] | None = None
    gamma_interval: tuple[float, float] | None = None
    measured: tuple[tuple[float, ...], ...] = ()
    error: float | None = None
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("k_max_interval", int), ("gamma_interval", float)):
            if (ends := getattr(self, name)) is not None:
                with checks.reading(f"{name}: expected two numbers"):
                    low, high = map(kind, ends)
                object.__setattr__(self, name, (low, high))
        with checks.reading("measured: expected five numbers for each number of requests"):
            ranges = sorted((b, n, m, c, d) for b, n, m, c, d in self.measured)
            if not np.isfinite(np.array(ranges, dtype=np.float64)).all():
                raise ValueError(f"not finite: {ranges}")
            object.__setattr__(self, "measured", tuple(tuple(map(float, own)) for own in ranges))
        if self.error is not None:
            checks.real_field(self, "error", 0.0)
        with checks.reading("doubts: expected texts"):
            object.__setattr__(self, "doubts", tuple(map(str, self.doubts)))

    def _near(self, context_len: float) -> list[tuple[float, ...]]:
        return [r for r in self.measured if r[3] / REACH <= context_len <= r[4] * REACH]

    def covers(self, num_tokens: float, num_reqs: float, context_len: float) -> bool:
        """Whether samples, of the nearest ``num_reqs`` at ``context_len``, cover ``num_tokens``."""
        own = self._near(context_len)
        if not own or not own[0][0] / REACH <= num_reqs <= own[-1][0] * REACH:
            return False
        counts, fewest, most, *_ = zip(*own, strict=True)
        low, high = (float(np.interp(num_reqs, counts, ends)) for ends in (fewest, most))
        return low / REACH <= num_tokens <= high * REACH

    def reach(self, num_reqs: float, context_len: float) -> float:
        """The most tokens that samples cover, of the nearest ``num_reqs`` at ``context_len``.

        Infinite without samples.
        """
        if not self.measured:
            return math.inf
        counts, _, most, *_ = zip(*(self._near(context_len) or self.measured), strict=True)
        return REACH * float(np.interp(num_reqs, counts, most))


def columns(seconds: ArrayLike, **inputs: ArrayLike | None) -> tuple[Floats, dict[str, Floats]]:
    """Return samples as float columns of one length; EchoError if they are not, or out of range.

    Inputs that are None are left out, except the first, which is required.
    """
    given = {"seconds": seconds, **inputs}
    table: dict[str, Floats] = {}
    for name, values in given.items():
        if values is None and name not in list(given)[:2]:
            continue
        with checks.reading(f"{name}: expected numbers"):
            if values is None:
                raise ValueError("no samples")
            table[name] = np.atleast_1d(np.asarray(values, dtype=np.float64))
    y = table.pop("seconds")
    for name, column in table.items():
        if column.shape != y.shape or y.ndim != 1 or not len(y):
            expected = f"seconds: expected as many as {name} ({len(column)}, at least 1)"
            raise EchoError(f"{expected}, got {len(y)}")
        low = int(name in ("num_tokens", "num_reqs"))
        wrong = column[~(np.isfinite(column) & (column >= low))]
        if len(wrong):
            expected = f"at least {low}" if np.isfinite(wrong[0]) else "a finite number"
            raise EchoError(f"{name}: expected {expected} in every sample, got {wrong[0]:g}")
    if not (np.isfinite(y) & (y > 0)).all():
        raise EchoError("seconds: expected a positive number in every sample")
    return y, table


def loads(table: Table) -> Floats:
    """Tokens, requests and context per request, float64 [n, 3]; 1 and 0 if not recorded."""
    tokens = table["num_tokens"] + table.get("num_other_tokens", 0.0)
    reqs = table.get("num_reqs", np.ones_like(tokens))
    context = table.get("context_tokens", np.zeros_like(tokens)) / reqs
    return np.stack([tokens, reqs, context], axis=1)


def measured(table: Table) -> tuple[tuple[float, ...], ...]:
    """Return :attr:`Evidence.measured`: a single entry if requests were not recorded."""
    every = loads(table)
    found = []
    for count in np.unique(every[:, 1]):
        tokens, _, context = every[every[:, 1] == count].T
        found.append((count, tokens.min(), tokens.max(), context.min(), context.max()))
    return tuple(found)


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
        found.append("samples fall: " + ", ".join(texts))
    if "num_reqs" not in table:
        return tuple(found)
    ranges = sorted(measured(table), key=lambda own: own[3:])
    if len(ranges) == 1:
        only = f"{ranges[0][0]:.0f} request(s) only"
        found.append(f"samples of {only}: the cost of others is a guess")
    longest = ranges[0][4]
    for count, _, _, least, most in ranges:
        if least > REACH * longest:
            apart = f"contexts up to {longest:.0f} and from {least:.0f}, that of {count:.0f}"
            found.append(
                f"{apart} request(s), were not measured with one number of requests: the costs of"
                " requests and of context cannot be told apart"
            )
        longest = max(longest, most)
    return tuple(found)
