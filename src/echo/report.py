"""Should I speculate? A one-page answer, from measured acceptance and step times.

B requests are decoded together. A step verifies N tokens, roots included, of trees of d layers; a
request accepts a(B, d, N) of its drafts on average. The gain of speculation is

    speedup(B, C) = max over d and N of
        (1 + a(B, d, N)) T(B, B, C) / (T(B, N, C) + draft(B, d)),

where T is the target's seconds for so many requests, tokens and tokens of context
(:class:`echo.CostModel`). a(B, d, N) is counted on the log: draw B of its steps, take their N - B
likeliest drafts down to depth d, and count those that the target accepted. Intervals are 95%, from
logs resampled by blocks of steps and from the cost model's error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echo import _checks as checks
from echo import plot
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating.acceptance import CountedChains, LoggedDrafts, Outcomes, Z, wilson
from echo.gating.calibration import Calibration
from echo.gating.logs import WarmupLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 50
"""Accepted and rejected tokens that suffice at one depth (``calibrate``'s ``min_rows``), and
request-steps that suffice at one load."""
HEAD = (
    "context  requests  depth  verify tokens  tokens/step  speedup [95%]      K_max  8 tokens cost"
)
NOISY = 0.25
"""Error of a cost model, or gain within an interval, above which an answer is not sure."""
COSTLY = 1.15
"""Ratio above which a note says that eight tokens cost more at few requests than at the best."""
SHADES = (plot.GOOD, "#33658a", "#e9a13b", "#7b4b94")


@dataclass(frozen=True)
class DepthAcceptance:
    """Acceptance of request-steps at one depth.

    Attributes:
        depth: 1 is the first drafted token.
        drafted: verified draft tokens of this depth.
        accepted: those of them that the target accepted.
        cumulative: accepted over request-steps (vLLM's per-position rate).
        conditional: accepted over accepted at ``depth - 1``; NaN if none were.
        low, high: of ``conditional``, 95% (Wilson's interval, as if steps were independent).
        well_observed: whether at least 50 tokens were accepted and 50 rejected.
    """

    depth: int
    drafted: float
    accepted: float
    cumulative: float
    conditional: float
    low: float
    high: float
    well_observed: bool


@dataclass(frozen=True)
class Advice:
    """Recommendation for one load.

    Attributes:
        num_reqs, context_len: B, and tokens of context of each request.
        depth: layers to draft; 0: do not speculate.
        num_verify_tokens: of the whole batch's step, roots included.
        tokens_per_step: tokens that a request emits in a step, bonus token included.
        speedup, low, high: tokens per second over plain decoding's, with its 95% interval.
        k_max: the paper's K_max, the knee of the cost curve at this load; None: no knee.
        eight: cost of a step of eight tokens a request, in steps of plain decoding.
        extrapolated: whether this load is outside what the cost model was measured at.
        steps: number of request-steps that acceptance was counted on.
    """

    num_reqs: int
    context_len: float
    depth: int
    num_verify_tokens: int
    tokens_per_step: float
    speedup: float
    low: float
    high: float
    k_max: int | None
    eight: float
    extrapolated: bool
    steps: int

    @property
    def verdict(self) -> str:
        """``yes``: interval above 1; ``no``: below 1.25; else, or under 50 steps: ``unsure``."""
        doubtful = self.low <= 1 if self.depth else self.high > 1 + NOISY
        if self.extrapolated or self.steps < ENOUGH or doubtful:
            return "unsure"
        return "yes" if self.depth else "no"


@dataclass(frozen=True)
class SpeculationReport:
    """The report; ``str`` renders it as text.

    Attributes:
        depths: acceptance by depth.
        advice: one entry per context and number of requests.
        draft_acceptance_rate: accepted over verified draft tokens, pooled (vLLM's and SGLang's).
        mean_of_rates: mean of the rates of each ``unit``, however much it drafted; NaN if only
            totals are known.
        unit: steps (of a log), requests (SGLang) or intervals (vLLM's log).
        acceptance_length: mean tokens of a request's step if all is verified, bonus token included.
        sweet_spots: the calibration's gates, depth to threshold.
        notes: caveats, and what to log or measure next.
    """

    depths: tuple[DepthAcceptance, ...]
    advice: tuple[Advice, ...]
    draft_acceptance_rate: float
    mean_of_rates: float
    unit: str
    acceptance_length: float
    sweet_spots: dict[int, float]
    notes: tuple[str, ...]

    @property
    def speculate(self) -> bool:
        """Whether speculation is surely worth it at any of the loads."""
        return any(a.verdict == "yes" for a in self.advice)

    def __str__(self) -> str:
        lines = ["Should I speculate?"]
        for context, own in itertools.groupby(self.advice, lambda a: a.context_len):
            where = f"With {context:.0f} tokens of context: " if context else ""
            lines.append(where + _answer(list(own)))
        lines += ["", HEAD]
        for a in self.advice:
            what = f"{a.speedup:5.2f} [{a.low:.2f}, {a.high:.2f}]" if a.depth else " 1.00 off"
            mark = " *" if a.extrapolated else ""
            plan = f"{a.context_len:7.0f}  {a.num_reqs:8d}  {a.depth:5d}  {a.num_verify_tokens:13d}"
            worth = f"{a.tokens_per_step:11.2f}  {what:<18}{a.k_max or 'none':>6}"
            lines.append(f"{plan}  {worth}  {a.eight:7.2f} steps{mark}")
        if any(a.extrapolated for a in self.advice):
            lines.append("* beyond what the cost model was measured at: a guess")
        lines += ["", "depth   drafted  accepted  cumulative  conditional [95%]"]
        for d in self.depths:
            few = "too few to tell" if d.drafted else "not observed"
            rates = f"{d.cumulative:10.3f}  {d.conditional:.3f} [{d.low:.3f}, {d.high:.3f}]"
            tail = "" if d.well_observed else f"   {few}"
            lines.append(f"{d.depth:5d}  {d.drafted:8.0f}  {d.accepted:8.0f}  {rates}{tail}")
        rate = f"draft acceptance rate {self.draft_acceptance_rate:.3f}, pooled"
        lines += ["", f"{rate}: all accepted over all drafted (what vLLM and SGLang report)"]
        if not math.isnan(self.mean_of_rates):
            mean = f"mean of means {self.mean_of_rates:.3f}: each of the {self.unit} counts equally"
            lines.append(f"{mean}, however much it drafted")
        length = f"acceptance length {self.acceptance_length:.2f} tokens a step"
        lines.append(f"{length}, bonus token included")
        if self.sweet_spots:
            spots = ", ".join(f"depth {d} above {tau:.3g}" for d, tau in self.sweet_spots.items())
            lines.append(f"sweet spots: draft deeper only where confidence is, at {spots}")
        return "\n".join(lines + [f"- {note}" for note in self.notes])

    def plot(self) -> Figure:
        """Draw speedup with interval, depth and budget by number of requests; acceptance by depth.

        Raises:
            EchoError: matplotlib is not installed (extra ``plot``).
        """
        with plot.figure(12, 3.4) as drawn:
            worth, plan, depth = drawn.subplots(1, 3)
            contexts = itertools.groupby(self.advice, lambda a: a.context_len)
            for (context, group), colour in zip(contexts, itertools.cycle(SHADES)):
                _worth(worth, plan, list(group), colour, f"context {context:.0f}")
            worth.axhline(1, color=plot.BAD, lw=1, ls="--")
            worth.set(title="worth of speculation (hollow: unsure)", ylim=(0, None))
            worth.set(ylabel="tokens/s over plain decoding, 95%")
            plan.plot([], [], color=plot.QUIET, label="verify tokens a request")
            plan.plot([], [], color=plot.QUIET, ls=":", label="depth")
            plan.set(title="best budget and depth", ylabel="tokens", ylim=(0, None))
            reqs = list(dict.fromkeys(a.num_reqs for a in self.advice))
            for axis in (worth, plan):
                axis.set(xlabel="requests", xscale="log")
                axis.set_xticks(reqs, [str(b) for b in reqs])
                axis.minorticks_off()
                axis.legend()
            _acceptance(depth, self.depths)
        return drawn


def speculation_report(
    seen: WarmupLog | Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
    cost: CostModel,
    *,
    calibration: Calibration | None = None,
    num_reqs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    context_lens: Sequence[float] | None = None,
    beam: int = 1,
    max_verify_tokens_per_req: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> SpeculationReport:
    """Report whether to speculate, at which load and how deep, from acceptance and cost.

    Args:
        seen: a log with step ids, from steps that verified all drafts; or the counters of an engine
            that drafts chains. vLLM: ``num_drafts`` and ``num_accepted_tokens_per_pos`` (and
            ``num_draft_tokens``, if chains differ in length), the text of its metrics page, or its
            log with lines of "SpecDecoding metrics". SGLang: ``spec_accept_histogram`` (also called
            ``spec_correct_drafts_histogram``), whose entry n counts the steps that accepted n draft
            tokens, or the ``meta_info`` of each request.
        cost: measured seconds of the target's forward pass and of drafting.
        calibration: from another part of the log; ranks the draft tokens and gives the sweet spots.
            Defaults to ranking by the draft's own confidence.
        num_reqs: numbers of requests to report on.
        context_lens: tokens of context per request to report on. Defaults to the cost model's.
        beam: nodes expanded in a drafted layer.
        max_verify_tokens_per_req: maximum of a request's step, root included.
        resamples: bootstrap resamples of blocks of steps, for the intervals.
        seed: of the bootstrap.

    Raises:
        EchoError: a log without steps, counters of neither engine, or an argument out of range.

    Example:
        >>> cost = CostModel((1, 64, 256), (1.0, 1.0, 2.0), draft_layer=0.02)
        >>> seen = {"num_drafts": 900, "num_accepted_tokens_per_pos": [700, 500, 300]}
        >>> page = speculation_report(seen, cost, num_reqs=[1, 256])
        >>> [(a.num_reqs, a.depth, round(a.speedup, 2)) for a in page.advice]
        [(1, 3, 2.52), (256, 1, 1.06)]
        >>> type(page).__name__, page.speculate, len(page.plot().axes)
        ('SpeculationReport', True, 3)
    """
    checks.instance("cost", cost, CostModel)
    if calibration is not None:
        checks.instance("calibration", calibration, Calibration)
    loads = checks.ints("num_reqs", num_reqs, 1)
    given = [cost.context_len] if context_lens is None else context_lens
    with checks.reading("context_lens: expected numbers"):
        contexts = [checks.real("context_lens", context, 0.0) for context in given]
    if not loads or not contexts:
        name = "context_lens" if loads else "num_reqs"
        raise EchoError(f"{name}: expected at least one number, got none")
    beam = checks.integer("beam", beam, 1)
    limit = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 2) - 1
    resamples = checks.integer("resamples", resamples, 20)
    random = np.random.default_rng(checks.integer("seed", seed, 0))
    counted: LoggedDrafts | CountedChains
    if isinstance(seen, WarmupLog):
        counted = LoggedDrafts(seen, calibration, limit, random, resamples)
    else:
        counted = CountedChains(seen, limit, random, resamples)
    error = np.exp(random.normal(0.0, math.sqrt(2) * (cost.error or 0.0) / Z, resamples))
    outcomes = {b: counted.outcomes(b) for b in loads}
    advice = tuple(
        _advise(outcomes[b], cost, b, context, beam, error, counted.steps)
        for context, b in itertools.product(contexts, loads)
    )
    depths = _depths(counted)
    spots = {} if calibration is None else calibration.thresholds
    return SpeculationReport(
        depths=depths,
        advice=advice,
        draft_acceptance_rate=float(counted.accepted.sum()) / counted.num_draft_tokens,
        mean_of_rates=counted.mean_rate,
        unit=counted.unit,
        acceptance_length=1 + sum(d.cumulative for d in depths),
        sweet_spots=spots,
        notes=tuple(_notes(depths, advice, counted, cost, spots)),
    )


def _advise(
    outcomes: Outcomes, cost: CostModel, b: int, context: float, beam: int, error: Any, steps: int
) -> Advice:
    """Find the depth and budget of greatest speedup for ``b`` requests."""
    load: dict[str, Any] = {"num_reqs": b, "context_tokens": b * context}
    plain = cost(b, **load)
    budgets = outcomes.budgets
    layers = np.arange(1, len(budgets) + 1)[:, None]

    def speedup(accepted: Any, budget: Any, depth: Any) -> Any:
        seconds = cost(b + budget, **load) + cost.draft_seconds(depth, b, beam)
        return (1 + accepted) * plain / seconds

    rate = speedup(outcomes.accepted, budgets, layers)
    d, j = np.unravel_index(int(rate.argmax()), rate.shape)
    depth = int(d) + 1
    budget = int(budgets[d, j])
    best = float(rate[d, j])
    low, high = np.percentile(
        speedup(outcomes.resample(depth, budget), budget, depth) * error, [2.5, 97.5]
    )
    if best <= 1:
        depth = budget = 0
        best = low = 1.0
        high = max(1.0, high)
    knee = cost.at(b, b * context).knee
    return Advice(
        num_reqs=b,
        context_len=context,
        depth=depth,
        num_verify_tokens=b + budget,
        tokens_per_step=float(1 + outcomes.accepted[d, j]) if depth else 1.0,
        speedup=best,
        low=float(low),
        high=float(high),
        k_max=knee.k_max if knee.bends else None,
        eight=cost(8 * b, **load) / plain,
        extrapolated=any(cost.extrapolated(n, **load) for n in (b, b + budget)),
        steps=steps,
    )


def _depths(counted: LoggedDrafts | CountedChains) -> tuple[DepthAcceptance, ...]:
    """Acceptance by depth."""
    accepted = counted.accepted
    drafted = counted.drafted
    rates = wilson(accepted, np.concatenate([[counted.steps], accepted[:-1]]))
    enough = (accepted >= ENOUGH) & (drafted - accepted >= ENOUGH)
    columns = drafted, accepted, accepted / counted.steps, *rates, enough
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(DepthAcceptance(depth, *row) for depth, row in enumerate(rows, 1))


def _notes(
    depths: Sequence[DepthAcceptance],
    advice: Sequence[Advice],
    counted: LoggedDrafts | CountedChains,
    cost: CostModel,
    spots: Mapping[int, float],
) -> Iterator[str]:
    """Caveats, and what to log or measure next."""
    yield from (f"cost model: {doubt}" for doubt in cost.doubts)
    first = min(advice, key=lambda a: a.num_reqs)
    last = min(advice, key=lambda a: a.eight)
    # of a dense model, a token is cheapest at one request: this is a mixture of experts
    if first.eight > (COSTLY + (cost.error or 0.0)) * max(1.0, last.eight):
        yield (
            f"8 tokens a request cost {first.eight:.1f} plain steps at {first.num_reqs} request(s)"
            f" and {last.eight:.1f} at {last.num_reqs}: a mixture of experts, where each token of a"
            " small batch activates experts that no other token reads; at"
            f" {first.num_reqs} a step of {first.num_verify_tokens} tokens emits"
            f" {first.tokens_per_step:.2f} a request, a speedup of {first.speedup:.2f}"
        )
    if not cost.num_reqs and max(a.num_reqs for a in advice) > 1:
        yield "the cost model covers tokens only: measure several numbers of requests too"
    if cost.error is None:
        yield "the cost model's own error is not known: intervals cover acceptance only"
    elif cost.error > NOISY:
        yield f"step times are only known to within {cost.error:.0%}: time each load more often"
    if far := [f"{a.num_reqs} x {a.context_len:.0f}" for a in advice if a.extrapolated]:
        loads = ", ".join(far[:4] + ["..."] * (len(far) > 4))
        yield f"measure the cost at (requests x context) {loads}"
    if counted.steps < ENOUGH:
        yield f"{counted.steps} request-step(s) are too few for a sure answer: log more"
    if unsure := [a for a in advice if a.depth and a.low <= 1 and not a.extrapolated]:
        where = ", ".join(str(a.num_reqs) for a in unsure)
        yield f"the interval includes 1 at {where} requests: log more steps, or time more"
    if few := [d for d in depths if not d.well_observed]:
        rare = min(min(d.accepted, d.drafted - d.accepted) for d in few)
        known = f"about {math.ceil(counted.steps * ENOUGH / rare):,} " if rare > 0 else "more "
        where = ", ".join(str(d.depth) for d in few)
        tokens = f"fewer than {ENOUGH} accepted or rejected tokens"
        yield f"depth {where}: {tokens}; log {known}request-steps"
    deepest = max(a.depth for a in advice)
    if deepest == len(depths) and depths[-1].conditional > 0.5:
        yield f"the deepest logged depth, {deepest}, is still worth drafting: log deeper trees"
    if isinstance(counted, LoggedDrafts) and not spots:
        yield "sweet spots need a calibration, from other steps than these"
    if isinstance(counted, CountedChains):
        yield "counters do not say which drafts were likely: a WarmupLog does"
        if counted.num_draft_tokens < counted.steps * counted.max_depth:
            yield "not all chains were of full length: rates by depth are too low"


def _answer(advice: Sequence[Advice]) -> str:
    """Summarize the loads of one context in a line."""
    runs = [
        (verdict, [str(a.num_reqs) for a in group])
        for verdict, group in itertools.groupby(advice, lambda a: a.verdict)
    ]
    parts = []
    for verdict in ("yes", "no", "unsure"):
        own = [" to ".join(dict.fromkeys([run[0], run[-1]])) for v, run in runs if v == verdict]
        if loads := ", ".join(own):
            parts.append(f"{verdict} at {loads} request{'s' * (loads != '1')}")
    if sure := [a for a in advice if a.verdict == "yes"]:
        top = max(sure, key=lambda a: a.speedup)
        parts[0] += f", up to {top.speedup:.2f} times plain decoding, at {top.num_reqs}"
    return "; ".join(parts) + "."


def _worth(worth: Any, plan: Any, advice: Sequence[Advice], colour: str, label: str) -> None:
    """Draw the advice of one context: the speedup on one axis, budget and depth on the other."""
    reqs, depth, speedup, low, high, budget = np.array(
        [(a.num_reqs, a.depth, a.speedup, a.low, a.high, a.num_verify_tokens) for a in advice]
    ).T
    worth.plot(reqs, speedup, color=colour, label=label)
    worth.fill_between(reqs, low, high, color=colour, alpha=0.2, lw=0)
    for axis, y in ((worth, speedup), (plan, budget / reqs)):
        for a, x, value in zip(advice, reqs, y, strict=True):
            face = "white" if a.verdict == "unsure" else colour
            axis.plot(x, value, "o", ms=4, color=colour, mfc=face)
    plan.plot(reqs, budget / reqs, color=colour)
    plan.plot(reqs, depth, color=colour, ls=":")


def _acceptance(axis: Any, depths: Sequence[DepthAcceptance]) -> None:
    columns = [(d.depth, d.conditional, d.low, d.high, d.cumulative) for d in depths]
    places, rate, low, high, got = np.array(columns).T
    few = [d.depth for d in depths if not d.well_observed]
    for place in few:
        label = "few drafts" if place == few[0] else None
        axis.axvspan(place - 0.5, place + 0.5, color=plot.QUIET, alpha=0.2, lw=0, label=label)
    axis.errorbar(
        places, rate, [rate - low, high - rate], fmt="o-", ms=3, capsize=2, color=plot.INK,
        label="conditional: once the step is there",
    )  # fmt: skip
    axis.plot(places, got, "o-", ms=3, color=plot.GOOD, label="cumulative: of all steps")
    axis.set(title="acceptance by depth", xlabel="depth", ylabel="rate", ylim=(0, 1))
    axis.set_xticks([d.depth for d in depths])
    axis.legend()
