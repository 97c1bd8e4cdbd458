"""Timing a custom step: at given token counts, or at the loads that decisions depend on most.

A decision is how many tokens each of B requests verifies, given the context and the probability
that a draft token is accepted. It is taken from a model of all samples, and judged by models that
each lack a part of them: where one of these would lose most throughput by it, the next load is
measured.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import fit
from echo.cost.model import CostModel
from echo.cost.samples import Floats

VERSION = 1
DRAFTING = ("draft_layer", "draft_token", "extend_token")
TOKENS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Verify tokens of a request that are compared."""
ROUND = 4
STABLE = 3
VISITS = 3
"""Loads measured between two fits; fits in a row after which unchanged decisions are final; times
that a load is measured at most."""
DRIFT = 1.25
DRIFT_LOADS = 3
"""Ratio to the saved seconds beyond which they are another machine's; loads that tell."""
Load = tuple[int, int, int]
Sample = tuple[int, int, int, float]
TICK = 1e-12
"""Minimum seconds of a step; below it, the clock is too coarse."""


def profile(
    step: Callable[[int], object],
    num_tokens: Iterable[int],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Time ``step(count)`` for each token count: ``warmup`` untimed rounds, then ``repeats``.

    A round runs all counts, so that a slow moment of the machine does not affect only one.

    Args:
        step: runs one step of that many tokens; on CUDA, on the current stream.
        num_tokens: token counts, at least 1.
        repeats: timed calls per count.
        warmup: untimed calls per count, for compilation, graph capture and clocks.
        device: where the step runs; on CUDA it is timed by events.

    Returns:
        Token counts int64 and seconds float64 [n * repeats], for :meth:`CostModel.from_samples`.

    Raises:
        EchoError: no token counts, an argument out of range, or a step that took no time.

    Example:
        >>> counts, seconds = profile(lambda count: sum(range(count)), [1, 8], repeats=2)
        >>> counts.tolist(), seconds.shape
        ([1, 8, 1, 8], (4,))
    """
    counts = list(checks.ints("num_tokens", num_tokens, 1))
    repeats = checks.integer("repeats", repeats, 1)
    warmup = checks.integer("warmup", warmup, 0)
    if not counts:
        raise EchoError("num_tokens: expected at least one token count, got none")
    for count in counts * warmup:
        step(count)
    timed = counts * repeats
    return np.array(timed), np.array([_seconds_of(step, (count,), device) for count in timed])


@dataclass(frozen=True)
class SpeculationProfile:
    """Measured steps of one engine and model: ``speculation_profile.json``.

    Attributes:
        identity: what was measured, such as model, device, engine and degree of parallelism.
        samples: number of requests, number of tokens, context of each request, and seconds.
        drafting: any of ``draft_layer``, ``draft_token``, ``extend_token`` of a
            :class:`~echo.CostModel`.
        settled: arguments of :meth:`measure` for which decisions no longer change, if any.

    Raises:
        EchoError: a value of another kind.

    Example:
        >>> empty = SpeculationProfile({"model": "llama-3.1-8b", "device": "H100"})
        >>> step = lambda num_reqs, num_tokens, context_len: sum(range(1000 * num_tokens))
        >>> profile = empty.measure(step, max_num_reqs=4, max_num_tokens=32, max_seconds=0.5)
        >>> SpeculationProfile.from_json(profile.to_json(), empty.identity) == profile
        True
        >>> profile.cost().num_tokens[0]
        1
    """

    identity: Mapping[str, str]
    samples: tuple[Sample, ...] = ()
    drafting: Mapping[str, float] = field(default_factory=dict)
    settled: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("identity", "drafting", "settled"):
            checks.instance(name, getattr(self, name), dict)
        for pair in self.identity.items():
            if not all(isinstance(part, str) for part in pair):
                raise EchoError(f"identity: expected strings by name, got {pair}")
        if unknown := sorted(set(self.drafting) - set(DRAFTING), key=str):
            raise EchoError(f"drafting: expected {', '.join(DRAFTING)}, got {unknown}")
        drafting = {name: checks.real(name, value, 0.0) for name, value in self.drafting.items()}
        with checks.reading("samples: expected requests, tokens, context and seconds of each"):
            found = tuple((int(b), int(n), int(c), float(y)) for b, n, c, y in self.samples)
            if wrong := [s for s in found if min(s[:2]) < 1 or s[2] < 0 or not 0 < s[3] < np.inf]:
                raise ValueError(f"out of range: {wrong[0]}")
        object.__setattr__(self, "drafting", drafting)
        object.__setattr__(self, "samples", found)

    def cost(self) -> CostModel:
        """The model of the samples, with its doubts and warnings; EchoError: there are none."""
        seconds, table = self._columns()
        columns: dict[str, Any] = {**table, **self.drafting}
        return CostModel.from_samples(seconds=seconds, **columns)

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps({"format": "echo-profile", "version": VERSION, **vars(self)})

    @classmethod
    def from_json(cls, text: str, identity: Mapping[str, str]) -> SpeculationProfile:
        """Read what :meth:`to_json` wrote.

        Raises:
            EchoError: not such JSON, of another version, or not of this ``identity``.
        """
        with checks.reading(f"profile: expected the JSON of a profile, version {VERSION}"):
            data = json.loads(text)
            if data.pop("format") != "echo-profile" or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            found = cls(**data)
        if found.identity != identity:
            raise EchoError(f"profile: expected one of {identity}, got one of {found.identity}")
        return found

    def measure(
        self,
        step: Callable[[int, int, int], object],
        *,
        max_num_reqs: int,
        max_num_tokens: int,
        context_lens: Sequence[int] = (1024,),
        acceptance: Sequence[float] = (0.5, 0.7, 0.9),
        max_seconds: float = 60.0,
        tolerance: float = 0.02,
        repeats: int = 3,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        on_sample: Callable[[SpeculationProfile, float], object] | None = None,
    ) -> SpeculationProfile:
        """Measure until decisions no longer change; a profile with samples is resumed.

        Three of its loads are timed again then, to compare; they are not added to it. One that has
        settled for these arguments is returned as it is.

        Args:
            step: ``step(num_reqs, num_tokens, context_len)`` runs the target's forward pass of
                ``num_tokens`` tokens in all for so many requests, each with that context. The first
                of a load is not timed (capture, compilation).
            max_num_reqs, max_num_tokens: of a step.
            context_lens: of a request; the shortest and the longest are measured first.
            acceptance: probabilities of a draft token given those before it, to decide for.
            max_seconds: of ``clock``; no step is begun that would end later, if it takes no longer
                than the longest so far.
            tolerance: share of throughput that decisions may lose.
            repeats: timed steps of a load.
            device: on CUDA, events of the current stream time a step, not ``clock``.
            clock: seconds.
            on_sample: called after each load, and once settled, with the profile so far, to save
                it, and the share of throughput at stake, infinite before the first fit.

        Raises:
            EchoError: an argument out of range; a step took no time; or loads take another time
                than saved, by more than a quarter: the profile is of another machine.
        """
        tolerance = checks.real("tolerance", tolerance, 0.0)
        repeats = checks.integer("repeats", repeats, 1)
        most = checks.integer("max_num_reqs", max_num_reqs, 1)
        limit = checks.integer("max_num_tokens", max_num_tokens, most)
        contexts = checks.ints("context_lens", context_lens, 0)
        with checks.reading("acceptance: expected numbers"):
            chances = [checks.real("acceptance", chance, 0.0, 1.0) for chance in acceptance]
        if not contexts or not chances:
            name = "acceptance" if contexts else "context_lens"
            raise EchoError(f"{name}: expected at least one number, got none")
        plan = _Plan(most, limit, sorted(set(contexts)), chances)
        end = clock() + checks.real("max_seconds", max_seconds, 0.0)
        timer = _Timer(step, repeats, device, clock, end)
        found = self
        stake = np.inf
        asked = {
            "max_num_reqs": most,
            "max_num_tokens": limit,
            "context_lens": list(contexts),
            "acceptance": chances,
            "tolerance": tolerance,
            "drafting": dict(self.drafting),
        }

        def add(new: list[Sample], settled: Mapping[str, Any] | None = None) -> None:
            nonlocal found
            if new or settled:
                found = replace(found, samples=found.samples + tuple(new), settled=settled or {})
                if on_sample is not None:
                    on_sample(found, stake)

        visits = dict.fromkeys(sample[:3] for sample in self.samples)
        longest = plan.context.max()
        known = [load for load in visits if load[0] <= most and load[1] <= limit]
        known.sort(key=lambda load: (load not in plan.first, load[2] > longest))
        self._compare([timer(load) for load in known[:DRIFT_LOADS]])
        if self.settled == asked:
            return self
        for load in plan.first:
            if load not in visits:
                add(timer(load))
        decided = None
        stable = 0
        while stable < STABLE and not timer.is_over:
            model, *others = found._models()
            rates = plan.emitted / plan.seconds(model)
            chosen = rates.argmax(axis=-1)[..., None]
            if decided is not None:
                kept = np.take_along_axis(rates, decided, -1)[..., 0] / rates.max(axis=-1)
                stable = stable + 1 if kept.min() >= 1 - tolerance else 0
            decided = chosen
            times = Counter(sample[:3] for sample in found.samples)
            done = {load for load, count in times.items() if count >= VISITS * repeats}
            stake, loads = plan.disputed(chosen, others, done)
            if stake <= tolerance or not loads:
                stable = STABLE
                break
            for load in loads[:ROUND]:
                add(timer(load))
        if stable >= STABLE:
            add([], asked)
        return found

    def _compare(self, again: Sequence[list[Sample]]) -> None:
        """Refuses to go on where loads take another time than this profile says."""
        pairs = [(new, [s for s in self.samples if s[:3] == new[0][:3]]) for new in again if new]
        ratios = [np.median(new, axis=0)[3] / np.median(old, axis=0)[3] for new, old in pairs]
        if ratios and not 1 / DRIFT <= (ratio := float(np.median(ratios))) <= DRIFT:
            expected = "step: expected about the profile's seconds"
            raise EchoError(f"{expected}, got {ratio:.2f} times as many: another machine or model")

    def _columns(self) -> tuple[Floats, dict[str, Floats]]:
        reqs, tokens, context, seconds = np.array(self.samples, dtype=np.float64).reshape(-1, 4).T
        table = {"num_tokens": tokens, "num_reqs": reqs, "context_tokens": reqs * context}
        return seconds, table

    def _models(self) -> Iterable[CostModel]:
        """Of all samples, then each without a part of them."""
        seconds, table = self._columns()
        others = [fields for _, fields in fit.folds(seconds, table)]
        for fields in (fit.curves(seconds, table), *others):
            yield CostModel(**{**fields, **self.drafting})


def _seconds_of(
    step: Callable[..., object],
    load: tuple[int, ...],
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time ``step(*load)``: on CUDA by events, from an idle device; else by ``clock``."""
    if torch.device(device).type != "cuda":
        start = clock()
        step(*load)
        seconds = clock() - start
    else:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        step(*load)
        end.record()
        end.synchronize()
        seconds = float(begin.elapsed_time(end)) / 1e3
    return checks.real("seconds of a step", seconds, TICK)


@dataclass
class _Timer:
    """Times loads until ``end``, of ``clock``; ``longest`` is the longest step so far."""

    step: Callable[[int, int, int], object]
    repeats: int
    device: torch.device | str
    clock: Callable[[], float]
    end: float
    longest: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether a step as long as the longest would end too late."""
        return self.clock() + self.longest > self.end

    def __call__(self, load: Load) -> list[Sample]:
        """One step untimed, then ``repeats``, or as many as there is time for."""
        samples: list[Sample] = []
        for timed in range(self.repeats + 1):
            if self.is_over:
                break
            begin = self.clock()
            seconds = _seconds_of(self.step, load, self.device, self.clock)
            self.longest = max(self.longest, self.clock() - begin)
            samples += [(*load, seconds)] if timed else []
        return samples


class _Plan:
    """The decisions: of all batches of a power of two and ``most``, at all contexts.

    P probabilities, L batches with a context, R numbers of tokens.

    Attributes:
        reqs, context: float64 [L, 1].
        tokens: float64 [L, R], of the batch, rising.
        emitted: float64 [P, L, R], tokens of the batch that a step emits.
        first: loads to begin with.
    """

    def __init__(
        self, most: int, limit: int, contexts: Sequence[int], chances: Sequence[float]
    ) -> None:
        batches = sorted({1 << i for i in range(most.bit_length())} | {most})
        pairs = [(b, c) for c in contexts for b in batches]
        self.reqs, self.context = np.array(pairs, dtype=np.float64).T[..., None]
        self.tokens = np.minimum(np.round(self.reqs * TOKENS), limit)
        powers = np.array(chances)[:, None] ** np.arange(TOKENS[-1] + 1)
        sums = np.pad(powers.cumsum(axis=1), ((0, 0), (1, 0)))
        each = [np.interp(self.tokens / self.reqs, np.arange(len(row)), row) for row in sums]
        self.emitted = np.stack(each) * self.reqs
        first = [
            (b, int(n), c)
            for c in {contexts[0], contexts[-1]}
            for b in {1, batches[len(batches) // 2], most}
            for n in np.unique(np.geomspace(b, min(limit, TOKENS[-1] * b), 3).round())
        ]
        if len(first) < fit.FEW:
            first += [self.load(row, column) for row, column in np.ndindex(self.tokens.shape)]
        self.first = sorted(set(first), key=lambda load: load[1])

    def seconds(self, model: CostModel) -> Floats:
        """float64 [L, R]."""
        layers = np.ceil(self.tokens / self.reqs) - 1
        drafting = model.draft_layer * layers + model.draft_token * self.reqs * layers
        context = self.reqs * self.context
        found: Floats = drafting + model(self.tokens, num_reqs=self.reqs, context_tokens=context)
        return found

    def load(self, row: int, column: int) -> Load:
        """What to measure for a decision."""
        found = self.reqs[row, 0], self.tokens[row, column], self.context[row, 0]
        return int(found[0]), int(found[1]), int(found[2])

    def disputed(
        self, chosen: NDArray[np.intp], others: Sequence[CostModel], done: set[Load]
    ) -> tuple[float, list[Load]]:
        """The greatest loss by ``chosen`` [P, L, 1] that another model sees; what would settle it.

        For each batch, of plain decoding, the choice and the other model's choice, that on whose
        seconds the models agree least.
        """
        if not others:
            return np.inf, []
        seconds = np.stack([self.seconds(other) for other in others])
        rates = self.emitted / seconds[:, None]
        best = rates.argmax(axis=-1)
        kept = np.take_along_axis(rates, np.broadcast_to(chosen, (*best.shape, 1)), -1)[..., 0]
        lost = (1 - kept / rates.max(axis=-1)).reshape(-1, len(self.reqs))
        judge = lost.argmax(axis=0)
        spread = seconds.std(axis=0) / seconds.mean(axis=0)
        loads = []
        for row in np.argsort(-lost.max(axis=0), kind="stable").tolist():
            rival = best.reshape(lost.shape)[judge[row], row]
            own = chosen[judge[row] % len(chosen), row, 0]
            columns = [c for c in {0, int(own), int(rival)} if self.load(row, c) not in done]
            if columns:
                loads.append(self.load(row, max(columns, key=lambda c: spread[row, c])))
        return float(lost.max()), loads
