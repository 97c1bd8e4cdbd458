"""The cost model: seconds of verification, of drafting and of draft extend."""

from __future__ import annotations

import bisect
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import fit, samples
from echo.cost.fit import Knee
from echo.cost.samples import Evidence, Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION, READABLE = 3, (2, 3)


@dataclass(frozen=True)
class CostModel(Evidence):
    """Seconds of a forward pass of the target, and of drafting.

    A pass takes ``curve(num_tokens) + curve(num_reqs) + context_token * context_tokens *
    factor(num_tokens / num_reqs)``. Curves are piecewise linear, never fall, and are extended by
    their first value and last slope; the factor is 1 below its knots and constant above. Only the
    token curve is required. What samples say of the model is :class:`~echo.cost.Evidence`.

    Attributes:
        num_tokens: increasing ints, knots of the token curve (roots, drafts, prefill).
        seconds: seconds at those knots, with the fewest requests and no context.
        draft_layer: fixed seconds of a draft layer of the batch.
        draft_token: seconds per token of a draft layer.
        tiers: token counts that the engine can launch (one CUDA graph each); empty: any.
        num_reqs: increasing ints, knots of the request curve; empty: requests cost nothing.
        request_seconds: seconds that so many requests add, from 0.
        context_token: seconds per token of context, of all requests together.
        tokens_per_req: increasing ints from 1, knots of the factor; empty: the factor is 1.
        context_factors: from 1, rising at most in proportion: attention reads a request's context
            once for several of its tokens, but computes for each.
        extend_token: seconds per unprocessed token of a draft extend; None: ``draft_token``.
        context_len: default context of a request; of all together if their number is unknown.
        k_max_interval, gamma_interval, measured, error, doubts: of :meth:`from_samples`, as in
            :class:`~echo.cost.Evidence`.

    Raises:
        EchoError: a falling curve, or a value out of range.

    Example:
        >>> cost = CostModel((1, 64, 128), (0.02, 0.02, 0.04), draft_layer=0.001, tiers=(8, 64))
        >>> cost(96), cost.round_up(9), cost.free_tokens(9), cost.tokens_within(1.5)
        (0.03, 64, 64, 96)
        >>> cost.draft_seconds([1, 3], num_reqs=8).tolist(), cost.extend_seconds(20)
        ([0.001, 0.003], 0.001)
        >>> cost.at(128).knee.bends, cost.load(128), cost.extrapolated(256), cost.interval(64)
        (False, 0.0, True, (nan, nan))
        >>> own, sgl = CostModel.from_json(cost.to_json()), CostModel.from_sglang(cost.to_sglang())
        >>> own == cost, sgl(64), len(cost.plot().axes)
        (True, 0.02, 2)
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
    tokens_per_req: tuple[int, ...] = ()
    context_factors: tuple[float, ...] = ()
    context_len: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fit.check_curve(self, "num_tokens", "seconds")
        fit.check_curve(self, "num_reqs", "request_seconds")
        fit.check_curve(self, "tokens_per_req", "context_factors")
        for name in ("draft_layer", "draft_token", "context_token", "context_len"):
            checks.real_field(self, name, 0.0)
        if self.extend_token is not None:
            checks.real_field(self, "extend_token", 0.0)
        object.__setattr__(self, "tiers", checks.ints("tiers", self.tiers, 0))
        if list(self.tiers) != sorted(set(self.tiers) - {0}):
            raise EchoError(f"tiers: expected increasing ints >= 1, got {self.tiers}")

    @cached_property
    def _token_curve(self) -> tuple[Floats, Floats]:
        return fit.extended(self.num_tokens, self.seconds)

    @cached_property
    def _request_curve(self) -> tuple[Floats, Floats]:
        return fit.extended(self.num_reqs or (1,), self.request_seconds or (0.0,))

    @cached_property
    def _factor_curve(self) -> tuple[Floats, Floats]:
        return np.array(self.tokens_per_req), np.array(self.context_factors)

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
        tiers: Sequence[int] = (),
    ) -> CostModel:
        """Fit scattered steps by one robust regression with non-negative coefficients.

        Inputs that vary together cannot be told apart: with requests proportional to tokens, the
        split between their curves is arbitrary; with a single context, so is that between context
        and requests. Seconds that fall with load, a single number of requests, or contexts that do
        not overlap give a model with :attr:`doubts`, and a warning for each.

        Args:
            num_tokens: ints [n], at least 1.
            seconds: positive floats [n].
            num_reqs: ints [n], at least 1. Defaults to no request curve.
            context_tokens: numbers [n], of all requests together; their median becomes the default
                context. Defaults to no context slope.
            num_other_tokens: ints [n], prefill and whatever else shares the pass. Defaults to 0.
            draft_layer, draft_token, extend_token, tiers: as the class;
                :func:`echo.cost.line` fits the first three.

        Raises:
            EchoError: no samples, columns of different lengths, or values out of range.

        Example:
            >>> model = CostModel.from_samples([1, 8, 16, 32, 64], [1.0, 1.0, 1.0, 2.0, 4.0])
            >>> model(24), model.knee.k_max
            (1.5, 16)
        """
        y, table = samples.columns(
            seconds,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            context_tokens=context_tokens,
            num_other_tokens=num_other_tokens,
        )
        x, reqs, context = samples.loads(table).T
        load = {"num_reqs": reqs, "context_tokens": context * reqs}
        fields = fit.curves(y, table)
        alone = cls(**fields)
        ratio = y / alone(x, **load)
        errors = []
        for own, others in fit.folds(y, table):
            held_out = {name: column[own] for name, column in load.items()}
            errors.append(abs(cls(**others)(x[own], **held_out) / y[own] - 1))
        error = np.quantile(np.concatenate(errors), 0.95, method="higher") if errors else None
        model = cls(
            **fields,
            **fit.knee_intervals(x, ratio, alone.num_tokens, alone.seconds),
            draft_layer=draft_layer,
            draft_token=draft_token,
            tiers=checks.ints("tiers", tiers, 0),
            extend_token=extend_token,
            context_len=float(np.quantile(context, 0.5, method="lower")),
            measured=samples.measured(table),
            error=error,
            doubts=samples.doubts(y, table),
        )
        for doubt in model.doubts:
            warnings.warn(f"CostModel: {doubt}", stacklevel=2)
        return model

    def __call__(
        self,
        num_tokens: ArrayLike,
        *,
        num_reqs: ArrayLike = 1,
        context_tokens: ArrayLike | None = None,
    ) -> Any:
        """Predict seconds of a forward pass of the target, [...]; array arguments broadcast.

        Args:
            num_tokens: tokens of the pass, prefill included; each count is rounded up to its tier.
            num_reqs: requests that share the pass.
            context_tokens: their total context: a host number, from the lengths that the engine
                schedules by. Defaults to :attr:`context_len` for each.
        """
        y: Any = np.interp(x := self.round_up(num_tokens), *self._token_curve)
        if self.num_reqs or not isinstance(num_reqs, int):
            y = y + np.interp(np.asarray(num_reqs), *self._request_curve)
        if self.context_token:
            each = self.context_token
            if self.context_factors:
                each = each * np.interp(np.divide(x, num_reqs), *self._factor_curve)
            y = y + each * self._context(num_reqs, context_tokens)
        return float(y) if y.ndim == 0 else y

    def _context(self, num_reqs: Any, context_tokens: Any) -> Any:
        if context_tokens is None:
            return self.context_len * (np.asarray(num_reqs) if self.num_reqs else np.ones(()))
        return np.asarray(context_tokens)

    def extrapolated(
        self, num_tokens: float, *, num_reqs: float = 1, context_tokens: float | None = None
    ) -> bool:
        """Whether a load is outside the samples by more than a quarter; as in :meth:`__call__`.

        Interpolation between numbers of requests measured with its context does not count. Without
        samples: outside the knots, or of a context without a slope.
        EchoError: ``num_reqs`` below 1.
        """
        num_reqs = checks.real("num_reqs", num_reqs, 1)
        total = float(self._context(num_reqs, context_tokens))
        if self.measured:
            reqs = num_reqs if self.num_reqs else 1.0
            return not self.covers(num_tokens, reqs, total / reqs)
        inside = not self.num_reqs or self.num_reqs[0] <= num_reqs <= self.num_reqs[-1]
        inside &= self.num_tokens[0] <= num_tokens <= self.num_tokens[-1]
        return not inside or (total > 0 and not self.context_token)

    def interval(
        self, num_tokens: float, *, num_reqs: float = 1, context_tokens: float | None = None
    ) -> tuple[float, float]:
        """Return the 95% interval of a step's seconds at this load; as in :meth:`__call__`.

        NaN if it is unknown: too few samples, or :meth:`extrapolated`.
        """
        load: dict[str, Any] = {"num_reqs": num_reqs, "context_tokens": context_tokens}
        if self.extrapolated(num_tokens, **load) or self.error is None:
            return math.nan, math.nan
        seconds = float(self(num_tokens, **load))
        return seconds * max(0.0, 1 - self.error), seconds * (1 + self.error)

    def load(self, num_reqs: float = 1, context_tokens: float | None = None) -> float:
        """Return what ``num_reqs`` and ``context_tokens`` add to a pass of one token per request.

        Seconds; arguments as in :meth:`__call__`.
        """
        requests = float(np.interp(num_reqs, *self._request_curve))
        return requests + self.context_token * float(self._context(num_reqs, context_tokens))

    def at(self, num_reqs: int = 1, context_tokens: float | None = None) -> CostModel:
        """Return the model at ``num_reqs`` and ``context_tokens``: a curve from one token each.

        Its knee is the batch's: the tokens that cost no more than plain decoding of the batch.
        EchoError: ``num_reqs`` below 1.
        """
        first = checks.integer("num_reqs", num_reqs, 1)
        factors = {first * count for count in self.tokens_per_req if self.context_token}
        last = max(first, self.num_tokens[-1])
        inside = {count for count in {*self.num_tokens, *factors} if first < count <= last}
        tokens = [first, *sorted(inside)]
        if len(tokens) == 1 < len(self.num_tokens):
            tokens.append(2 * first)  # the last slope continues
        whole = replace(self, tiers=())
        curve = whole(np.array(tokens), num_reqs=first, context_tokens=context_tokens)
        drafting = ("draft_layer", "draft_token", "extend_token", "tiers", "error")
        kept = {name: getattr(self, name) for name in drafting}
        return CostModel(tuple(tokens), fit.rounded(curve), **kept)

    def round_up(self, num_tokens: int | ArrayLike) -> Any:
        """Round up to the smallest tier that holds ``num_tokens``; unchanged if there is none."""
        if isinstance(num_tokens, int):
            place = bisect.bisect_left(self.tiers, num_tokens)
            return self.tiers[place] if place < len(self.tiers) else num_tokens
        x, ends = np.asarray(num_tokens), self._ends
        if self.tiers:
            x = np.maximum(x, ends[ends[:-1].searchsorted(x)])
        return int(x) if x.ndim == 0 else x

    def free_tokens(self, num_tokens: int, num_reqs: int = 1) -> int:
        """Return the most tokens, at a knot or a tier's end, that cost no more than ``num_tokens``.

        For ``num_reqs``: past some tokens per request, their context costs more.
        """
        flat = bisect.bisect_right(self.context_factors, 1 + 1e-9)
        once = self.tokens_per_req[flat - 1] if flat and self.context_token else fit.FAR
        alone = float(np.interp(self.round_up(num_tokens), *self._token_curve))
        knots = bisect.bisect_right(self.seconds, alone * (1 + 1e-6))
        free = self.num_tokens[knots - 1] if knots else 0
        return max(int(self.round_up(num_tokens)), min(free, once * num_reqs))

    def update(
        self,
        num_tokens: int,
        seconds: float,
        *,
        num_reqs: float = 1,
        context_tokens: float | None = None,
        rate: float = 0.1,
    ) -> CostModel:
        """Return the model corrected by one measured step, with the least relative changes.

        Scales the token curve (at ``num_tokens``, and where it must still rise), the whole request
        curve and the context slope, so the model learns where the engine runs.

        Args:
            num_tokens: tokens of the forward pass, prefill included.
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
        num_reqs = checks.real("num_reqs", num_reqs, 1)
        if context_tokens is not None:
            context_tokens = checks.real("context_tokens", context_tokens, 0.0)
        at = int(self.round_up(num_tokens))
        whole = self(at, num_reqs=num_reqs, context_tokens=context_tokens)
        value = float(np.interp(at, *self._token_curve))
        requests = float(np.interp(num_reqs, *self._request_curve))
        parts = np.array([value, requests, max(0.0, whole - value - requests)]) / whole
        error = rate * (min(seconds / whole, 4.0) - 1.0)
        times, reqs, context = np.maximum(1 + error * parts / (parts @ parts), 1e-3).tolist()
        x, y = fit.bend(self.num_tokens, self.seconds, at, value, times)
        rises = tuple(reqs * own for own in self.request_seconds)
        slope = context * self.context_token
        return replace(self, num_tokens=x, seconds=y, request_seconds=rises, context_token=slope)

    def draft_seconds(self, layers: ArrayLike, num_reqs: int, beam: int = 1) -> Any:
        """Return the seconds of drafting ``layers`` layers ([...]) for ``num_reqs``.

        A layer expands ``beam`` nodes per request, the first layer only the root.
        """
        count, token = np.asarray(layers), self.draft_token * num_reqs
        return (self.draft_layer + token * beam) * count + token * (1 - beam) * (count > 0)

    def extend_seconds(self, tokens: float) -> float:
        """Return the seconds of a draft extend of ``tokens`` unprocessed tokens of all requests."""
        each = self.draft_token if self.extend_token is None else self.extend_token
        return self.draft_layer + each * tokens if tokens > 0 else 0.0

    @property
    def knee(self) -> Knee:
        """The :class:`Knee` of least squares in relative error, exact over all integers K_max.

        For a batch, see :meth:`at`; whether it is a real knee, :attr:`Knee.bends`.
        """
        return fit.knee(self.num_tokens, self.seconds, self.k_max_interval, self.gamma_interval)

    def tokens_within(self, factor: float) -> int:
        """Return the most tokens of a step that costs at most ``factor`` times one token.

        A budget for curves without a flat part; EchoError: ``factor`` below 1.
        """
        factor = checks.real("factor", factor, 1.0)
        counts = np.arange(1, self.num_tokens[-1] + 1)
        return int(counts[self(counts) <= factor * self(1) * (1 + 1e-9)][-1])

    def to_json(self) -> str:
        """Return the model as JSON text."""
        return json.dumps({"format": "echo-cost", "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read what :meth:`to_json` wrote; EchoError: not JSON, or of another version."""
        with checks.reading(f"cost: expected the JSON of a CostModel, version {VERSION}"):
            data = json.loads(text)
            if data.pop("format") != "echo-cost" or data.pop("version") not in READABLE:
                raise ValueError("another format or version")
            data.pop("restart", None)  # of earlier models, never used
            return cls(**data)

    def to_sglang(self) -> str:
        """Export the target's part as SGLang's additive cost table (JSON), to share one profile.

        For ``--speculative-dspark-sps-table-path`` (0.5.23): seconds at every number of tokens up
        to the last knot, tiers included, and constant above. Context is :attr:`context_len` for
        each request; where context matters, the table is the nearest additive one.
        """
        model = self
        if self.context_token:
            pairs = [(n, b) for b in self.num_reqs or (1,) for n in self.num_tokens if n >= b]
            tokens, reqs = np.array(pairs, dtype=np.float64).T
            seconds = replace(self, tiers=())(tokens, num_reqs=reqs)
            nearest = fit.curves(seconds, {"num_tokens": tokens, "num_reqs": reqs})
            model = CostModel(tiers=self.tiers, **nearest)
        inside = [tier for tier in model.tiers if tier <= model.num_tokens[-1]]
        edges = {tier + 1 for tier in inside} | {1, *inside, *model.num_tokens}
        probes = sorted(edges) if len(edges) > 1 else [1, 2]  # SGLang's reader needs two
        curve = model(np.array(probes))
        written = {
            "bias_seconds": float(curve[0]),
            "bs_probes": model.num_reqs or [1],
            "alpha_seconds": model.request_seconds or [0.0],
            "m_probes": probes,
            "theta_seconds": (curve - curve[0]).tolist(),
        }
        return json.dumps(written)

    @classmethod
    def from_sglang(cls, text: str) -> CostModel:
        """Read the ``text`` of SGLang's cost tables: additive, or the older steps per second.

        That is ``bias + alpha(requests) + theta(tokens)`` between probes, or a rate held from probe
        to probe. Tables may fall; this is the nearest curve that does not (least squares), without
        drafting.

        Raises:
            EchoError: neither of the two, or values out of range.
        """
        from scipy.optimize import isotonic_regression

        with checks.reading("cost: expected one of SGLang's cost tables"):
            data = json.loads(text)
            if "bias_seconds" in data:
                names = ("alpha_seconds", "theta_seconds")
                alpha, theta = (isotonic_regression(data[name]).x for name in names)
                seconds = float(data["bias_seconds"]) + alpha[0] + theta
                fields = {"num_tokens": data["m_probes"], "seconds": seconds}
                if len(alpha) > 1:
                    fields |= {"num_reqs": data["bs_probes"], "request_seconds": alpha - alpha[0]}
            else:
                probes = [int(probe) for probe in data["sample_batch_tokens"]]
                slowness = isotonic_regression(1 / np.asarray(data["sample_steps_per_sec"])).x
                ends = [probe - 1 for probe in probes[1:]] + [probes[-1] + 1]
                flat = dict(zip(ends + probes, [*slowness, *slowness], strict=True))
                tokens = sorted(flat)
                fields = {"num_tokens": tokens, "seconds": [flat[count] for count in tokens]}
        return cls(**fields)

    def plot(self) -> Figure:
        """Draw in matplotlib: seconds by tokens, knee and tiers; where a draft pays off, by batch.

        EchoError: matplotlib is not installed (extra ``plot``).
        """
        from echo import plot

        return plot.cost_model(self)
