"""The cost model: a value that says how many seconds each decision costs."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import fit
from echo.cost.fit import Knee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
FAR = 1 << 40
"""Rows beyond the last measured count at which the curve ends; nobody asks for more."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a target step, ``curve(num_tokens) + curve(num_reqs) + context_token * context``, and of drafting.

    Both curves are piecewise linear between their knots and never fall; beyond the last knot the last slope goes on, before the first
    the first value holds. Only the first curve is needed. Numbers of numpy and torch become Python's.

    Attributes:
        num_tokens: increasing ints, knots of the curve over the rows of the forward pass (roots, drafts, prefill).
        seconds: non-decreasing floats, seconds of a step of that many rows, with the fewest requests and no context.
        draft_layer: seconds that one drafted layer costs the batch, whatever its rows.
        draft_token: seconds that each row of a drafted layer adds.
        tiers: the row counts that the engine can launch (one CUDA graph each); empty: any.
        num_reqs: increasing ints, knots of the curve over the requests of the step; empty: their number costs nothing by itself.
        request_seconds: non-decreasing floats from 0, what that many requests add.
        context_token: seconds that each token of context (of all requests together) adds.
        extend_token: seconds for each token that the drafter has to read up on after a time off; None: as ``draft_token``.
        restart: seconds of waking a drafter that was put away altogether, on top of reading up.
        k_max_interval: 95% interval of the knee's rows, from :meth:`from_samples`.
        gamma_interval: 95% interval of its slope, likewise.
    """

    num_tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    draft_layer: float = 0.0
    draft_token: float = 0.0
    tiers: tuple[int, ...] = ()
    num_reqs: tuple[int, ...] = ()
    request_seconds: tuple[float, ...] = ()
    context_token: float = 0.0
    extend_token: float | None = None
    restart: float = 0.0
    k_max_interval: tuple[int, int] | None = None
    gamma_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("num_tokens", "tiers", "num_reqs"):
            object.__setattr__(self, name, checks.ints(name, getattr(self, name), 0))
        for name in ("seconds", "request_seconds"):
            with checks.reading(f"{name}: expected numbers"):
                object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name, kind in (("k_max_interval", int), ("gamma_interval", float)):
            if (ends := getattr(self, name)) is not None:
                with checks.reading(f"{name}: expected two numbers"):
                    low, high = (kind(end) for end in ends)
                object.__setattr__(self, name, (low, high))
        _check_curve("num_tokens", self.num_tokens, "seconds", self.seconds)
        if (np.asarray(self.seconds) <= 0).any():
            raise EchoError(
                f"seconds: expected positive, non-decreasing numbers, got {self.seconds}"
            )
        if self.num_reqs or self.request_seconds:
            _check_curve("num_reqs", self.num_reqs, "request_seconds", self.request_seconds)
            if self.request_seconds[0] != 0:
                raise EchoError(
                    f"request_seconds: expected 0 at the fewest requests, got {self.request_seconds[0]}"
                )
        for name in ("draft_layer", "draft_token", "context_token", "restart"):
            checks.real_field(self, name, 0.0)
        if self.extend_token is not None:
            checks.real_field(self, "extend_token", 0.0)
        if any(a >= b for a, b in zip(self.tiers, self.tiers[1:], strict=False)) or any(
            t < 1 for t in self.tiers
        ):
            raise EchoError(f"tiers: expected increasing ints >= 1, got {self.tiers}")

    @cached_property
    def _curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _knots(self.num_tokens, self.seconds)

    @cached_property
    def _crowd(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return (
            _knots(self.num_reqs, self.request_seconds) if self.num_reqs else _knots((1,), (0.0,))
        )

    @cached_property
    def _ends(self) -> NDArray[np.float64]:
        return np.array([*self.tiers, 0.0])

    @classmethod
    def from_samples(
        cls,
        num_tokens: ArrayLike,
        seconds: ArrayLike,
        *,
        num_reqs: ArrayLike | None = None,
        context_tokens: ArrayLike | None = None,
        num_other_tokens: ArrayLike | None = None,
        draft_layer: float = 0.0,
        draft_token: float = 0.0,
        extend_token: float | None = None,
        restart: float = 0.0,
        tiers: Sequence[int] = (),
    ) -> CostModel:
        """Fits measured steps: one robust regression whose coefficients, none negative, are the rises of both curves and the slope.

        What varies in no sample is not told apart from the rest: with requests proportional to rows, the split between them is arbitrary.

        Args:
            num_tokens: ints [n], at least 1, rows of each step.
            seconds: positive floats [n].
            num_reqs: ints [n], requests of each step, at least 1.
            context_tokens: numbers [n], tokens of context of all its requests together.
            num_other_tokens: ints [n], rows of prefill in the same forward pass, not counted in ``num_tokens``.
            draft_layer, draft_token, extend_token, restart: see the class; :func:`echo.cost.line` fits them.
            tiers: see the class.

        Raises:
            EchoError: no samples, columns of different lengths, or values out of range.

        Example:
            >>> model = CostModel.from_samples([1, 8, 16, 32, 64], [1.0, 1.0, 1.0, 2.0, 4.0])
            >>> model(24), model.knee.k_max
            (1.5, 16)
        """
        y, table = fit.columns(
            seconds,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            context_tokens=context_tokens,
            num_other_tokens=num_other_tokens,
        )
        for name, least in (
            ("num_tokens", 1),
            ("num_reqs", 1),
            ("context_tokens", 0),
            ("num_other_tokens", 0),
        ):
            if name in table and not (table[name] >= least).all():
                raise EchoError(
                    f"{name}: expected at least {least} in every sample, got {table[name].min():g}"
                )
        return cls(
            draft_layer=float(draft_layer),
            draft_token=float(draft_token),
            tiers=tuple(int(t) for t in tiers),
            extend_token=extend_token,
            restart=float(restart),
            **fit.curves(y, table),
        )

    def __call__(
        self, num_tokens: ArrayLike, *, num_reqs: float = 1, context_tokens: float = 0.0
    ) -> Any:
        """Seconds of a target step of ``num_tokens`` rows (a number or an array), rounded up to its tier, prefill's included.

        Args:
            num_tokens: rows of the forward pass.
            num_reqs: that share it; matters where the model knows a curve over them.
            context_tokens: their tokens of context together.
        """
        y = np.interp(self.round_up(num_tokens), *self._curve) + self.load(num_reqs, context_tokens)
        return float(y) if y.ndim == 0 else y

    def load(self, num_reqs: float = 1, context_tokens: float = 0.0) -> float:
        """The part of a step's seconds that its rows do not change: that of ``num_reqs`` and of ``context_tokens``, their tokens together."""
        return float(np.interp(num_reqs, *self._crowd)) + self.context_token * context_tokens

    def at(self, num_reqs: int = 1, context_tokens: float = 0.0) -> CostModel:
        """The model of steps of ``num_reqs`` and that much ``context_tokens``, as a curve over rows alone, from one row a request on.

        Its knee says what the paper's law says of a batch: the rows that cost no more than plain decoding of it does.

        Raises:
            EchoError: requests below 1.
        """
        first = checks.integer("num_reqs", num_reqs, 1)
        rows = [first, *(r for r in self.num_tokens if r > first)]
        if len(rows) == 1 < len(self.num_tokens):
            rows.append(2 * first)  # the last slope goes on
        curve = np.interp(rows, *self._curve) + self.load(num_reqs, context_tokens)
        none: dict[str, Any] = {
            "num_reqs": (),
            "request_seconds": (),
            "context_token": 0.0,
            "k_max_interval": None,
            "gamma_interval": None,
        }
        return replace(self, num_tokens=tuple(rows), seconds=fit.rounded(curve), **none)

    def round_up(self, num_tokens: int | ArrayLike) -> Any:
        """The smallest tier that holds ``num_tokens``; ``num_tokens`` itself without tiers, or beyond the last tier."""
        if isinstance(num_tokens, int):
            place = bisect.bisect_left(self.tiers, num_tokens)
            return self.tiers[place] if place < len(self.tiers) else num_tokens
        x, ends = np.asarray(num_tokens), self._ends
        if self.tiers:
            x = np.maximum(x, ends[ends[:-1].searchsorted(x)])
        return int(x) if x.ndim == 0 else x

    def free_tokens(self, num_tokens: int) -> int:
        """The most rows that cost no more than ``num_tokens`` do, at one of the measured counts or the end of its tier."""
        most = bisect.bisect_right(self.seconds, self(num_tokens))
        return max(int(self.round_up(num_tokens)), self.num_tokens[most - 1] if most else 0)

    def update(
        self,
        num_tokens: int,
        seconds: float,
        *,
        num_reqs: float = 1,
        context_tokens: float = 0.0,
        rate: float = 0.1,
    ) -> CostModel:
        """The model after one more measured step: the curve gives way at ``num_tokens``, elsewhere only as far as it must not fall.

        Called after each step, it mends a model that was measured on another machine or under another load, where the engine goes;
        a knee believed at twice its rows costs goodput up to a quarter of plain decoding without it.

        Args:
            num_tokens: of the forward pass, prefill's included.
            seconds: that the pass took, without the draft's.
            num_reqs, context_tokens: as in :meth:`__call__`.
            rate: share of the error at ``num_tokens`` that is mended; a step that took more than four times its seconds counts as four.

        Raises:
            EchoError: an argument out of range.

        Example:
            >>> CostModel((1, 64), (1.0, 1.0)).learn(64, 3.0, rate=0.5).seconds
            (1.0, 2.0)
        """
        num_tokens = checks.integer("num_tokens", num_tokens, 1)
        seconds = checks.real("seconds", seconds, 1e-12)
        rate = checks.real("rate", rate, 0.0, 1.0)
        at, load = int(self.round_up(num_tokens)), self.load(num_reqs, context_tokens)
        value = float(np.interp(at, *self._curve))
        error = rate * (min(seconds, 4 * (value + load)) - value - load)
        knots, curve = fit.given_way((self.num_tokens, self.seconds), at, value, error)
        return replace(self, num_tokens=knots, seconds=curve)

    def draft_seconds(self, layers: ArrayLike, num_reqs: int, beam: int = 1) -> Any:
        """Seconds of ``layers`` layers (a number or an array) of ``num_reqs``: the first on the roots, others on ``beam`` nodes each."""
        count, row = np.asarray(layers), self.draft_token * num_reqs
        return (self.draft_layer + row * beam) * count + row * (1 - beam) * (count > 0)

    def extend_seconds(self, tokens: float, *, cold: bool = False) -> float:
        """Seconds that a drafter needs, once, before it can draft again: it reads ``tokens`` tokens that it has not seen.

        Args:
            tokens: emitted while it was off, by all requests together; with ``cold``, their whole context.
            cold: it was put away, its memory included, and is woken first.
        """
        each = self.draft_token if self.extend_token is None else self.extend_token
        return (self.draft_layer + each * tokens if tokens > 0 else 0.0) + (
            self.restart if cold else 0.0
        )

    @property
    def knee(self) -> Knee:
        """Least-squares fit of :class:`Knee` in relative error, exact over all integers K_max, with intervals where they are known.

        A curve that rises from its first point on has its knee there; one that never rises has gamma 0 and its last point.
        """
        k, base, gamma = fit.knee(self.num_tokens, self.seconds)
        return Knee(int(k), float(base), float(gamma), self.k_max_interval, self.gamma_interval)

    def tokens_within(self, factor: float) -> int:
        """The most rows of a step that costs at most ``factor`` times a step of one row: a budget where the curve has no flat part.

        Raises:
            EchoError: factor below 1.
        """
        factor = checks.real("factor", factor, 1.0)
        rows = np.arange(1, self.num_tokens[-1] + 1)
        return int(rows[self(rows) <= factor * self(1) * (1 + 1e-9)][-1])

    def to_json(self) -> str:
        """The model as JSON text."""
        return json.dumps({"format": "echo-cost", "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Reads the ``text`` that :meth:`to_json` wrote.

        Raises:
            EchoError: not JSON, of another version, or with values out of range.
        """
        with checks.reading(f"cost: expected the JSON of a CostModel, version {VERSION}"):
            data = json.loads(text)
            if data.pop("format") != "echo-cost" or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in data.items()
            }
            return cls(**fields)

    def to_sglang(self) -> str:
        """The target's part as SGLang's additive cost table (JSON): one profile serves both planners.

        Its own loader reads it from ``--speculative-dspark-sps-table-path``. It gives these seconds at every whole number of rows up
        to the last knot, tiers included, where it holds the last value.
        """
        from echo.cost import sglang

        return sglang.write(self)

    @classmethod
    def from_sglang(cls, text: str) -> CostModel:
        """Reads the ``text`` of SGLang's cost tables: the additive one, and the older one of steps per second, a step function.

        Its tables are measured and need not rise; ours are the nearest that do (least squares). They know nothing of drafting:
        ``dataclasses.replace(model, draft_layer=...)``.

        Raises:
            EchoError: neither of the two, or values out of range.
        """
        from echo.cost import sglang

        return sglang.read(text)

    def plot(self) -> Figure:
        """Seconds by rows with the knee and the tiers, and the chance of acceptance from which a draft pays by batch size.

        Returns:
            A matplotlib figure; ``.savefig(path)`` writes it.

        Raises:
            EchoError: matplotlib is not installed (extra ``plot``).
        """
        from echo import plot

        return plot.cost_model(self)


def _knots(
    points: tuple[int, ...], values: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve as ``np.interp`` takes it: one far knot more, so that its last slope goes on."""
    slope = (values[-1] - values[-2]) / (points[-1] - points[-2]) if len(points) > 1 else 0.0
    return np.array([*points, points[-1] + FAR]), np.array([*values, values[-1] + slope * FAR])


def _check_curve(x_name: str, x: tuple[int, ...], y_name: str, y: tuple[float, ...]) -> None:
    points, values = np.asarray(x), np.asarray(y, dtype=np.float64)
    if (
        points.ndim != 1
        or not len(points)
        or len(points) != len(values)
        or (np.diff(points) <= 0).any()
        or points[0] < 1
    ):
        raise EchoError(
            f"{x_name}: expected increasing ints >= 1, as many as {y_name} ({len(values)}), got {x}"
        )
    if not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) < 0).any():
        raise EchoError(
            f"{y_name}: expected {'positive, ' if y_name == 'seconds' else ''}non-decreasing numbers, got {y}"
        )
