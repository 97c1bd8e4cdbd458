"""The cost model: the seconds of verification, of drafting and of draft extend."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import fit, profiling
from echo.cost.fit import Floats, Knee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 2
FAR = 1 << 40
"""Tokens beyond the last measured count at which a curve ends."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of a forward pass of the target, and of drafting.

    A pass takes ``curve(num_tokens) + curve(num_reqs) + context_token * context_tokens``. Curves
    are piecewise linear and never fall; the first value and the last slope extend them. Only the
    first is needed.

    Attributes:
        num_tokens: increasing ints, knots of the curve over tokens (roots, drafts, prefill).
        seconds: seconds at those knots, with the fewest requests and no context.
        draft_layer: seconds of a draft layer for the batch, apart from its tokens.
        draft_token: seconds of each token of a draft layer.
        tiers: token counts that the engine can launch (one CUDA graph each); empty: any.
        num_reqs: increasing ints, knots of the curve over requests; empty: they cost nothing.
        request_seconds: what that many requests add, from 0.
        context_token: seconds of each token of context, of all requests together.
        extend_token: seconds of each unprocessed token of a draft extend; None: ``draft_token``.
        restart: seconds of reloading a drafter that was unloaded, before its draft extend.
        k_max_interval, gamma_interval: of :attr:`knee`, from :meth:`from_samples`.

    Raises:
        EchoError: a curve that falls, or a value out of range.

    Example:
        >>> CostModel((1, 64, 128), (0.02, 0.02, 0.04))(96)
        0.03
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
        if self.seconds[0] <= 0:
            expected = "positive, non-decreasing numbers"
            raise EchoError(f"seconds: expected {expected}, got {self.seconds}")
        if self.num_reqs or self.request_seconds:
            _check_curve("num_reqs", self.num_reqs, "request_seconds", self.request_seconds)
            if (first := self.request_seconds[0]) != 0:
                raise EchoError(f"request_seconds: expected 0 at the fewest requests, got {first}")
        for name in ("draft_layer", "draft_token", "context_token", "restart"):
            checks.real_field(self, name, 0.0)
        if self.extend_token is not None:
            checks.real_field(self, "extend_token", 0.0)
        if list(self.tiers) != sorted(set(self.tiers) - {0}):
            raise EchoError(f"tiers: expected increasing ints >= 1, got {self.tiers}")

    @cached_property
    def _token_curve(self) -> tuple[Floats, Floats]:
        return _extended(self.num_tokens, self.seconds)

    @cached_property
    def _request_curve(self) -> tuple[Floats, Floats]:
        return _extended(self.num_reqs or (1,), self.request_seconds or (0.0,))

    @cached_property
    def _ends(self) -> Floats:
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
        """Fits measured steps by one robust regression with non-negative coefficients.

        What varies together is not told apart: with requests proportional to tokens, the split
        between their curves is arbitrary.

        Args:
            num_tokens: ints [n], at least 1.
            seconds: positive floats [n].
            num_reqs: ints [n], at least 1. Defaults to no such curve.
            context_tokens: numbers [n], of all requests together. Defaults to no such slope.
            num_other_tokens: ints [n], prefill and whatever else shares the pass. Defaults to 0.
            draft_layer, draft_token, extend_token, restart, tiers: as the class;
                :func:`echo.cost.line` fits the first four.

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
        for name, column in table.items():
            fit.at_least(name, column, int(name in ("num_tokens", "num_reqs")))
        return cls(
            draft_layer=draft_layer,
            draft_token=draft_token,
            tiers=tuple(tiers),
            extend_token=extend_token,
            restart=restart,
            **fit.curves(y, table),
        )

    def __call__(
        self, num_tokens: ArrayLike, *, num_reqs: float = 1, context_tokens: float = 0.0
    ) -> Any:
        """Seconds of a forward pass of the target.

        Args:
            num_tokens: tokens of the pass, prefill included, each rounded up to its tier: [...].
            num_reqs: requests that share it.
            context_tokens: their tokens of context together.
        """
        tokens = np.interp(self.round_up(num_tokens), *self._token_curve)
        y = tokens + self.load(num_reqs, context_tokens)
        return float(y) if y.ndim == 0 else y

    def load(self, num_reqs: float = 1, context_tokens: float = 0.0) -> float:
        """The part of a pass's seconds that ``num_reqs`` and ``context_tokens`` alone determine."""
        requests = float(np.interp(num_reqs, *self._request_curve))
        return requests + self.context_token * context_tokens

    def at(self, num_reqs: int = 1, context_tokens: float = 0.0) -> CostModel:
        """The model of ``num_reqs`` with ``context_tokens``: a curve over tokens, from one each.

        Its knee is the batch's: the tokens that cost no more than its plain decoding.
        EchoError: ``num_reqs`` below 1.
        """
        first = checks.integer("num_reqs", num_reqs, 1)
        tokens = [first, *(count for count in self.num_tokens if count > first)]
        if len(tokens) == 1 < len(self.num_tokens):
            tokens.append(2 * first)  # the last slope continues
        curve = np.interp(tokens, *self._token_curve) + self.load(num_reqs, context_tokens)
        drafting = ("draft_layer", "draft_token", "extend_token", "restart", "tiers")
        kept = {name: getattr(self, name) for name in drafting}
        return CostModel(tuple(tokens), fit.rounded(curve), **kept)

    def round_up(self, num_tokens: int | ArrayLike) -> Any:
        """The smallest tier that holds ``num_tokens``; itself without tiers or beyond the last."""
        if isinstance(num_tokens, int):
            place = bisect.bisect_left(self.tiers, num_tokens)
            return self.tiers[place] if place < len(self.tiers) else num_tokens
        x, ends = np.asarray(num_tokens), self._ends
        if self.tiers:
            x = np.maximum(x, ends[ends[:-1].searchsorted(x)])
        return int(x) if x.ndim == 0 else x

    def free_tokens(self, num_tokens: int) -> int:
        """The most tokens, at a knot or a tier's end, that cost no more than ``num_tokens``."""
        knots = bisect.bisect_right(self.seconds, self(num_tokens))
        return max(int(self.round_up(num_tokens)), self.num_tokens[knots - 1] if knots else 0)

    def update(
        self,
        num_tokens: int,
        seconds: float,
        *,
        num_reqs: float = 1,
        context_tokens: float = 0.0,
        rate: float = 0.1,
    ) -> CostModel:
        """The model after one more measured step, changed at ``num_tokens`` and to keep it rising.

        It corrects a model of another machine or load where the engine runs; a knee believed at
        twice its tokens costs up to a quarter of plain decoding's throughput without it.

        Args:
            num_tokens: of the forward pass, prefill included.
            seconds: of the pass, without drafting.
            num_reqs, context_tokens: as in :meth:`__call__`.
            rate: share of the error to correct; a step above four times its seconds counts as four.

        Raises:
            EchoError: an argument out of range.

        Example:
            >>> CostModel((1, 64), (1.0, 1.0)).update(64, 3.0, rate=0.5).seconds
            (1.0, 2.0)
        """
        num_tokens = checks.integer("num_tokens", num_tokens, 1)
        seconds = checks.real("seconds", seconds, 1e-12)
        rate = checks.real("rate", rate, 0.0, 1.0)
        at, load = int(self.round_up(num_tokens)), self.load(num_reqs, context_tokens)
        value = float(np.interp(at, *self._token_curve))
        error = rate * (min(seconds, 4 * (value + load)) - value - load)
        x, y = np.array(self.num_tokens, dtype=np.float64), np.array(self.seconds)
        x, y = fit.bend(x, y, at, value, error)
        return replace(self, num_tokens=tuple(map(int, x)), seconds=tuple(map(float, y)))

    def draft_seconds(self, layers: ArrayLike, num_reqs: int, beam: int = 1) -> Any:
        """Seconds of drafting ``layers`` layers ([...]) for ``num_reqs``.

        ``beam`` nodes are expanded in each layer, in the first only the root.
        """
        count, token = np.asarray(layers), self.draft_token * num_reqs
        return (self.draft_layer + token * beam) * count + token * (1 - beam) * (count > 0)

    def extend_seconds(self, tokens: float, *, cold: bool = False) -> float:
        """Seconds of a draft extend of ``tokens`` unprocessed tokens of all requests together.

        ``cold``: the drafter was unloaded; ``tokens`` is then their whole context.
        """
        each = self.draft_token if self.extend_token is None else self.extend_token
        extend = self.draft_layer + each * tokens if tokens > 0 else 0.0
        return extend + (self.restart if cold else 0.0)

    @property
    def knee(self) -> Knee:
        """Least-squares :class:`Knee` in relative error, exact over all integers K_max.

        A curve that rises from its first point on has its knee there; one that never rises has
        gamma 0 and its last point.
        """
        k, base, gamma = fit.knee(self.num_tokens, self.seconds)
        return Knee(int(k), float(base), float(gamma), self.k_max_interval, self.gamma_interval)

    def tokens_within(self, factor: float) -> int:
        """The most tokens of a step at ``factor`` times the cost of one token, or less.

        A budget where the curve has no flat part; EchoError: ``factor`` below 1.
        """
        factor = checks.real("factor", factor, 1.0)
        counts = np.arange(1, self.num_tokens[-1] + 1)
        return int(counts[self(counts) <= factor * self(1) * (1 + 1e-9)][-1])

    def to_json(self) -> str:
        """The model as JSON text."""
        return json.dumps({"format": "echo-cost", "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Reads what :meth:`to_json` wrote; EchoError: not JSON, or of another version."""
        with checks.reading(f"cost: expected the JSON of a CostModel, version {VERSION}"):
            data = json.loads(text)
            if data.pop("format") != "echo-cost" or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            return cls(**data)

    def to_sglang(self) -> str:
        """The target's part as SGLang's additive cost table (JSON): one profile for both planners.

        For ``--speculative-dspark-sps-table-path``: these seconds at every number of tokens up to
        the last knot, tiers included, and its value beyond.
        """
        inside = [t for t in self.tiers if t <= self.num_tokens[-1]]
        edges = {t + 1 for t in inside} | set(inside) | {1, *self.num_tokens}
        probes = sorted(edges) if len(edges) > 1 else [1, 2]  # its reader needs two
        curve = np.asarray(self(np.array(probes)))
        table = {
            "bias_seconds": float(curve[0]),
            "bs_probes": self.num_reqs or [1],
            "alpha_seconds": self.request_seconds or [0.0],
            "m_probes": probes,
            "theta_seconds": (curve - curve[0]).tolist(),
        }
        return json.dumps(table)

    @classmethod
    def from_sglang(cls, text: str) -> CostModel:
        """Reads the ``text`` of SGLang's cost tables: additive, or the older steps per second.

        They need not rise; this is the nearest curve that does (least squares), without drafting.

        Raises:
            EchoError: neither of the two, or values out of range.
        """
        return cls(**profiling.sglang_fields(text))

    def plot(self) -> Figure:
        """A matplotlib figure: seconds by tokens with knee and tiers; where a draft pays, by batch.

        Raises:
            EchoError: matplotlib is not installed (extra ``plot``).
        """
        from echo import plot

        return plot.cost_model(self)


def _extended(points: tuple[int, ...], values: tuple[float, ...]) -> tuple[Floats, Floats]:
    """The curve for ``np.interp``, with one far knot more, so that its last slope continues."""
    slope = (values[-1] - values[-2]) / (points[-1] - points[-2]) if len(points) > 1 else 0.0
    return np.array([*points, points[-1] + FAR]), np.array([*values, values[-1] + slope * FAR])


def _check_curve(x_name: str, x: tuple[int, ...], y_name: str, y: tuple[float, ...]) -> None:
    if not x or len(x) != len(y) or (np.diff(x) <= 0).any() or x[0] < 1:
        expected = f"{x_name}: expected increasing ints >= 1, as many as {y_name} ({len(y)})"
        raise EchoError(f"{expected}, got {x}")
    if not np.isfinite(y).all() or min(y) < 0 or (np.diff(y) < 0).any():
        positive = "positive, " if y_name == "seconds" else ""
        raise EchoError(f"{y_name}: expected {positive}non-decreasing numbers, got {y}")
