"""Should I speculate? One page from what was accepted and what a step costs.

B requests are decoded together; a step verifies N tokens, their roots included, of trees of d
layers, and of the drafts a request's step accepts a in the mean. Speculation is worth

    speedup(B) = max over d and N of (1 + a(B, d, N)) T(B, B) / (T(N, B) + draft(d, B)),

T being the target's seconds for so many tokens and requests (:class:`echo.CostModel`). a(B, d, N)
is counted on the log: B of its steps at random, their N - B likeliest drafts down to depth d, and
how many of those the target accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating.calibration import Calibration
from echo.gating.logs import WarmupLog
from echo.gating.statistics import look_up
from echo.kernels.codes import ONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
GRID = 24
"""Budgets that are tried for a number of requests, evenly in the logarithm."""
GROUPS = 64
"""Batches of log steps, at least, that a budget is tried on."""
BLOCKS = 400
"""Blocks of consecutive steps that the bootstrap draws: steps of one answer are not independent."""
ENOUGH = 50
"""Accepted and rejected tokens that say enough of a depth: ``calibrate``'s ``min_rows``."""
HEAD = "requests  depth  verify tokens  tokens/step  speedup [95%]        K_max  8 tokens cost"
DEAR = 1.15
"""Above it, eight tokens of one request are said to be dearer than one."""


@dataclass(frozen=True)
class DepthAcceptance:
    """Acceptance at one depth, of request-steps.

    Attributes:
        depth: 1 is the first drafted token.
        drafted: verified draft tokens of this depth.
        accepted: those that the target accepted.
        cumulative: accepted over request-steps: the rate at which a step gets so deep (vLLM's
            per-position rate).
        conditional: accepted over those of the depth above: the rate once the step is there. NaN
            where none is.
        well_observed: at least 50 accepted and 50 rejected tokens.
    """

    depth: int
    drafted: float
    accepted: float
    cumulative: float
    conditional: float
    well_observed: bool


@dataclass(frozen=True)
class Advice:
    """What to do with ``num_reqs`` requests.

    Attributes:
        num_reqs: B.
        depth: layers to draft; 0: do not speculate.
        num_verify_tokens: of a step of the batch, roots included.
        tokens_per_step: that a request emits, bonus token included.
        speedup, low, high: tokens per second over plain decoding's, and the 95% interval for this
            depth and budget.
        k_max: the paper's K_max, the knee of the cost curve of so many requests.
        eight: what a step of eight tokens a request costs, in steps of plain decoding.
        extrapolated: the cost model was not measured there.
    """

    num_reqs: int
    depth: int
    num_verify_tokens: int
    tokens_per_step: float
    speedup: float
    low: float
    high: float
    k_max: int
    eight: float
    extrapolated: bool


@dataclass(frozen=True)
class SpeculationReport:
    """The page; ``str`` of it is its text.

    Attributes:
        depths: acceptance by depth.
        advice: by number of requests.
        draft_acceptance_rate: accepted over verified draft tokens, pooled: vLLM's and SGLang's
            rate.
        mean_of_step_rates: the mean of every step's own rate: another number, since steps that
            draft little weigh more in it. NaN where only totals are known.
        acceptance_length: mean tokens of a request's step, bonus token included, with all that was
            drafted verified.
        sweet_spots: the calibration's gates, depth to threshold.
        notes: what to mind, and what to log next.
    """

    depths: tuple[DepthAcceptance, ...]
    advice: tuple[Advice, ...]
    draft_acceptance_rate: float
    mean_of_step_rates: float
    acceptance_length: float
    sweet_spots: dict[int, float]
    notes: tuple[str, ...]

    @property
    def speculate(self) -> bool:
        """Whether it is worth it at any number of requests: a whole interval above 1."""
        return any(a.depth and a.low > 1 for a in self.advice)

    def __str__(self) -> str:
        best = [a for a in self.advice if a.depth and a.low > 1]
        lines = ["Should I speculate? " + (_span(best) if best else "No, at none of these loads.")]
        lines += ["", HEAD]
        for a in self.advice:
            what = f"{a.speedup:5.2f} [{a.low:.2f}, {a.high:.2f}]" if a.depth else " 1.00 off"
            mark = " *" if a.extrapolated else ""
            plan = f"{a.num_reqs:8d}  {a.depth:5d}  {a.num_verify_tokens:13d}"
            worth = f"{a.tokens_per_step:11.2f}  {what:<20}"
            lines.append(f"{plan}  {worth}{a.k_max:6d}  {a.eight:8.2f} steps{mark}")
        if any(a.extrapolated for a in self.advice):
            lines.append("* beyond what the cost model was measured at")
        lines += ["", "depth   drafted  accepted  cumulative  conditional"]
        for d in self.depths:
            few = "too few to tell" if d.drafted else "not observed"
            rates = f"{d.cumulative:10.3f}  {d.conditional:11.3f}"
            tail = "" if d.well_observed else f"   {few}"
            lines.append(f"{d.depth:5d}  {d.drafted:8.0f}  {d.accepted:8.0f}  {rates}{tail}")
        pooled = (
            f"draft acceptance rate {self.draft_acceptance_rate:.3f}, all accepted over all drafted"
        )
        if not math.isnan(self.mean_of_step_rates):
            pooled += f"; mean of each step's rate {self.mean_of_step_rates:.3f}"
        lines += [
            "",
            pooled,
            f"acceptance length {self.acceptance_length:.2f} tokens a step, bonus token included",
        ]
        if self.sweet_spots:
            spots = ", ".join(f"depth {d} above {tau:.3g}" for d, tau in self.sweet_spots.items())
            lines.append(f"sweet spots: draft deeper only where confidence is, at {spots}")
        return "\n".join(lines + [f"- {note}" for note in self.notes])

    def plot(self) -> Figure:
        """Speedup with its interval by number of requests, and acceptance by depth.

        Raises:
            EchoError: matplotlib is not installed (extra ``plot``).
        """
        from echo import plot

        return plot.speculation(self)


def speculation_report(
    seen: WarmupLog | Mapping[str, Any],
    cost: CostModel,
    *,
    calibration: Calibration | None = None,
    num_reqs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    context_len: float = 0.0,
    beam: int = 1,
    max_verify_tokens_per_req: int = 64,
    resamples: int = 200,
    seed: int = 0,
) -> SpeculationReport:
    """Report whether to speculate, at which load and how deep, from acceptance and cost.

    Args:
        seen: a log with step ids, from steps that verified what they drafted; or counters of an
            engine that drafts chains: vLLM's ``num_drafts`` and ``num_accepted_tokens_per_pos``, or
            SGLang's ``spec_accept_histogram`` (also called ``spec_correct_drafts_histogram``),
            whose entry n counts the steps that accepted n draft tokens.
        cost: seconds of the target's pass and of drafting, measured.
        calibration: made from another part of the log; says which draft tokens are likely. Defaults
            to the draft's own confidence.
        num_reqs: numbers of requests to answer for.
        context_len: tokens of context of a request, for a cost model that knows what they cost.
        beam: nodes expanded in a drafted layer.
        max_verify_tokens_per_req: of a step, the root included.
        resamples: of the bootstrap over blocks of steps, for the intervals.
        seed: of the bootstrap.

    Raises:
        EchoError: a log without steps, counters of neither engine, or an argument out of range.

    Example:
        >>> cost = CostModel((1, 64, 256), (1.0, 1.0, 2.0), draft_layer=0.02)
        >>> seen = {"num_drafts": 900, "num_accepted_tokens_per_pos": [700, 500, 300]}
        >>> page = speculation_report(seen, cost, num_reqs=[1, 256])
        >>> [(a.num_reqs, a.depth, round(a.speedup, 2)) for a in page.advice]
        [(1, 3, 2.52), (256, 1, 1.06)]
    """
    checks.instance("cost", cost, CostModel)
    loads = checks.ints("num_reqs", num_reqs, 1)
    context_len = checks.real("context_len", context_len, 0.0)
    beam = checks.integer("beam", beam, 1)
    limit = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    resamples = checks.integer("resamples", resamples, 20)
    random = np.random.default_rng(seed)
    counted: _Drafts | _Chains
    if isinstance(seen, WarmupLog):
        counted = _Drafts(seen, calibration, limit, random, resamples)
    else:
        counted = _Chains(*_counters(seen), random, resamples)
    advice = tuple(_advise(counted, cost, b, context_len, beam, limit) for b in loads)
    depths = _depths(counted)
    return SpeculationReport(
        depths=depths,
        advice=advice,
        draft_acceptance_rate=sum(d.accepted for d in depths)
        / max(sum(d.drafted for d in depths), 1e-9),
        mean_of_step_rates=counted.mean_rate,
        acceptance_length=1 + sum(d.cumulative for d in depths),
        sweet_spots={} if calibration is None else calibration.thresholds,
        notes=tuple(_notes(depths, advice, counted, cost)),
    )


class _Drafts:
    """The drafts of a log, a row a request-step, the likeliest first.

    ``f`` float64 [steps, M], -1 where there is none; ``accepted`` bool and ``depth`` int64 of the
    same shape.
    """

    def __init__(
        self,
        log: WarmupLog,
        calibration: Calibration | None,
        limit: int,
        random: np.random.Generator,
        resamples: int,
    ) -> None:
        if not len(log):
            raise EchoError("seen: expected rows of a warm-up log, got none")
        if (log.weight != 1).any():
            raise EchoError("seen: expected a log of steps drafted without a gate, got weights")
        step, place, size = np.unique(log.step, return_inverse=True, return_counts=True)
        if len(step) == len(log) and (log.depth > 1).any():
            raise EchoError("seen: expected rows joined by step ids, got one step for every row")
        f = log.confidence.astype(np.float64)
        if calibration is not None:
            with np.errstate(divide="ignore"):
                score = torch.from_numpy(np.log(log.confidence))
            table = torch.from_numpy(calibration.reliability_table())
            f = look_up(table, score, torch.from_numpy(log.depth)).numpy() / ONE
        order = np.lexsort((log.depth, -f, place))
        where = place[order], np.arange(len(log)) - np.repeat(size.cumsum() - size, size)
        shape, kept = (len(step), int(size.max())), max(limit - 1, 1)

        def spread(values: NDArray[Any], none: Any) -> NDArray[Any]:
            wide = np.full(shape, none, values.dtype)
            wide[where] = values[order]
            return wide[:, :kept]

        self.f = spread(f, -1.0)
        self.accepted = spread(log.accepted, False)
        self.depth = spread(log.depth, 1)
        self.steps, self.max_depth = len(step), int(log.depth.max())
        self.totals = [
            np.bincount(log.depth, w, self.max_depth + 1)[1:] for w in (None, log.accepted)
        ]
        self.mean_rate = float((np.bincount(place, log.accepted) / size).mean())
        self.random, self.resamples = random, resamples

    def batches(self, b: int) -> NDArray[np.int64]:
        """Log steps decoded together, int64 [groups, b]: every step about as often as any other."""
        turns = -(-max(GROUPS * b, self.steps) // self.steps)
        drawn = np.concatenate([self.random.permutation(self.steps) for _ in range(turns)])
        return drawn[: len(drawn) // b * b].reshape(-1, b)

    def accepted_drafts(
        self, b: int, budgets: NDArray[np.int64], together: NDArray[np.int64]
    ) -> Floats:
        """Mean accepted drafts of a request's step, float64 [depths, budgets].

        ``budgets`` int64 [n] are drafts of the whole batch.
        """
        found = []
        for depth in range(1, self.max_depth + 1):
            f = np.where(self.depth <= depth, self.f, -1.0)[together].reshape(len(together), -1)
            order = np.argsort(-f, axis=1, kind="stable")
            good = (self.accepted & (self.depth <= depth))[together].reshape(f.shape)
            total = np.take_along_axis(good, order, 1).cumsum(1)
            found.append(total[:, np.minimum(budgets, f.shape[1]) - 1].mean(0) / b)
        return np.stack(found)

    def interval(self, b: int, depth: int, budget: int, together: NDArray[np.int64]) -> Floats:
        """The same in logs resampled by blocks of consecutive steps, float64 [resamples]."""
        f = np.where(self.depth <= depth, self.f, -1.0)[together].reshape(len(together), -1)
        taken = np.zeros(f.shape, bool)
        np.put_along_axis(taken, np.argsort(-f, axis=1, kind="stable")[:, :budget], True, 1)
        good = (self.accepted & (self.depth <= depth))[together]
        per = (taken.reshape(good.shape) & good).sum(2)
        uses = np.bincount(together.ravel(), minlength=self.steps)
        mean = np.bincount(together.ravel(), per.ravel(), self.steps)
        blocks = min(BLOCKS, self.steps)
        block = np.arange(self.steps) * blocks // self.steps
        sums, counts = (np.bincount(block, x, blocks) for x in (mean, uses))
        weights = self.random.multinomial(blocks, np.full(blocks, 1 / blocks), self.resamples)
        result: Floats = (weights @ sums) / np.maximum(weights @ counts, 1)
        return result


class _Chains:
    """An engine's counters of chains: every step drafts all positions."""

    mean_rate = math.nan

    def __init__(
        self, drafts: int, accepted: Floats, random: np.random.Generator, resamples: int
    ) -> None:
        self.steps, self.max_depth = drafts, len(accepted)
        self.totals = [np.full(len(accepted), float(drafts)), accepted]
        above = np.concatenate([[drafts], accepted[:-1]])
        drawn = [np.full(resamples, drafts)]
        for rate in accepted / np.maximum(above, 1):
            drawn.append(random.binomial(drawn[-1], rate))
        self.mean = accepted.cumsum() / drafts
        self.drawn = np.stack(drawn[1:]).cumsum(0) / drafts


def _advise(
    counted: _Drafts | _Chains, cost: CostModel, b: int, context_len: float, beam: int, limit: int
) -> Advice:
    """The depth and the tokens of greatest speedup for ``b`` requests."""
    load: dict[str, Any] = {"num_reqs": b, "context_tokens": b * context_len}
    plain, layers = cost(b, **load), np.arange(1, counted.max_depth + 1)
    if isinstance(counted, _Drafts):
        together = counted.batches(b)
        most = min(limit - 1, counted.f.shape[1])
        budgets = np.unique(np.geomspace(1, max(b * most, 1), GRID).round().astype(np.int64))
        accepted = counted.accepted_drafts(b, budgets, together)
        budgets = np.broadcast_to(budgets, accepted.shape)
    else:
        budgets, accepted = b * np.minimum(layers, limit - 1)[:, None], counted.mean[:, None]

    def speedup(accepted: Floats, budget: Any, depth: Any) -> Any:
        return (
            (1 + accepted) * plain / (cost(b + budget, **load) + cost.draft_seconds(depth, b, beam))
        )

    rate = speedup(accepted, budgets, layers[:, None])
    d, j = np.unravel_index(int(rate.argmax()), rate.shape)
    depth, budget, best = int(d) + 1, int(budgets[d, j]), float(rate[d, j])
    knee = int(cost.at(b, b * context_len).knee.k_max)
    eight = cost(8 * b, **load) / plain
    outside = bool(cost.num_reqs) and not cost.num_reqs[0] <= b <= cost.num_reqs[-1]
    if best <= 1 or limit == 1:
        return Advice(b, 0, b, 1.0, 1.0, 1.0, 1.0, knee, eight, outside or b > cost.num_tokens[-1])
    drawn = (
        counted.interval(b, depth, budget, together)
        if isinstance(counted, _Drafts)
        else counted.drawn[d]
    )
    low, high = np.percentile(speedup(drawn, budget, depth), [2.5, 97.5])
    outside = outside or b + budget > cost.num_tokens[-1]
    tokens = float(1 + accepted[d, j])
    return Advice(b, depth, b + budget, tokens, best, float(low), float(high), knee, eight, outside)


def _depths(counted: _Drafts | _Chains) -> tuple[DepthAcceptance, ...]:
    """Acceptance by depth."""
    drafted, accepted = (np.asarray(total, dtype=np.float64) for total in counted.totals)
    above = np.concatenate([[counted.steps], accepted[:-1]])
    ratios = np.divide(accepted, above, out=np.full_like(accepted, math.nan), where=above > 0)
    enough = (accepted >= ENOUGH) & (drafted - accepted >= ENOUGH)
    return tuple(
        DepthAcceptance(
            depth=d + 1,
            drafted=float(drafted[d]),
            accepted=float(accepted[d]),
            cumulative=float(accepted[d] / counted.steps),
            conditional=float(ratios[d]),
            well_observed=bool(enough[d]),
        )
        for d in range(counted.max_depth)
    )


def _notes(
    depths: Sequence[DepthAcceptance],
    advice: Sequence[Advice],
    counted: _Drafts | _Chains,
    cost: CostModel,
) -> list[str]:
    """What a reader should mind, and log next."""
    notes = []
    first, last = advice[0], min(advice, key=lambda a: a.eight)
    # a dense model's tokens are cheapest at one request
    if first.eight > DEAR * max(1.0, last.eight):
        notes.append(
            f"8 tokens a request cost {first.eight:.1f} plain steps at {first.num_reqs} request(s),"
            f" {last.eight:.1f} at {last.num_reqs}: a mixture of experts, where each token of a"
            " small batch wakes other experts; verify few tokens there"
        )
    if not cost.num_reqs and advice[-1].num_reqs > 1:
        notes.append(
            "the cost model knows tokens only: measure it with several numbers of requests too"
        )
    few = [d for d in depths if not d.well_observed]
    if few:
        steps, rare = counted.steps, min(min(d.accepted, d.drafted - d.accepted) for d in few)
        more = (
            f"about {math.ceil(steps * ENOUGH / rare):,} request-steps"
            if rare > 0
            else "more request-steps"
        )
        where = ", ".join(str(d.depth) for d in few)
        notes.append(f"depth {where}: fewer than {ENOUGH} accepted or rejected tokens; log {more}")
    deepest = max((a.depth for a in advice), default=0)
    if deepest == len(depths) and depths[-1].conditional > 0.5:
        notes.append(
            f"the deepest logged depth, {deepest}, is still worth drafting: log deeper trees"
        )
    if isinstance(counted, _Chains):
        notes.append("counters do not say which drafts were likely: a WarmupLog does")
    return notes


def _counters(counters: Mapping[str, Any]) -> tuple[int, Floats]:
    """Request-steps, and how many of them accepted each position."""
    if isinstance(counters, Mapping):
        for name in ("spec_accept_histogram", "spec_correct_drafts_histogram"):
            if name in counters:
                histogram = np.array(checks.ints(name, counters[name], 0), dtype=np.float64)
                if len(histogram) < 2 or not histogram.sum():
                    given = list(counters[name])
                    raise EchoError(f"{name}: expected steps by accepted drafts, got {given}")
                return int(histogram.sum()), histogram[::-1].cumsum()[::-1][1:]
        if "num_drafts" in counters and "num_accepted_tokens_per_pos" in counters:
            drafts = checks.integer("num_drafts", counters["num_drafts"], 1)
            accepted = checks.ints(
                "num_accepted_tokens_per_pos", counters["num_accepted_tokens_per_pos"], 0, drafts
            )
            if not accepted or sorted(accepted, reverse=True) != list(accepted):
                raise EchoError(
                    f"num_accepted_tokens_per_pos: expected counts that never rise, got {accepted}"
                )
            return drafts, np.array(accepted, dtype=np.float64)
    got = sorted(counters) if isinstance(counters, Mapping) else type(counters).__name__
    raise EchoError(
        "seen: expected a WarmupLog, vLLM's num_drafts and num_accepted_tokens_per_pos, or"
        f" SGLang's spec_accept_histogram, got {got}"
    )


def _span(best: Sequence[Advice]) -> str:
    """Which of the loads are worth it."""
    top = max(best, key=lambda a: a.speedup)
    loads = (
        f"{best[0].num_reqs} to {best[-1].num_reqs} requests"
        if len(best) > 1
        else f"{best[0].num_reqs} request(s)"
    )
    return f"Yes, at {loads}: up to {top.speedup:.2f} times plain decoding, at {top.num_reqs}."
