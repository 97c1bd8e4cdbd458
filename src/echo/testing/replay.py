"""Exact replay of recorded drafts: any policy, judged on the same work, thousands of steps a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.history import History
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.budget.throughput import Tier
from echo.cost import CostModel
from echo.testing.trace import Trace
from echo.tree.accept import Accepted, accept
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier, SuperTree

Observer = Callable[["Record"], object]


@dataclass(frozen=True)
class Record:
    """One replayed step, for whoever wants to look at each.

    Attributes:
        requests: int64 [B], the text that each request writes.
        position: int64 [B], its root's place in the text.
        tree, packed, accepted: the values of the step.
        emitted: int64 [B], tokens emitted.
        tier: depth and rows planned.
        num_unprocessed_tokens: tokens that the drafter reads up on in this step.
    """

    requests: NDArray[np.int64]
    position: NDArray[np.int64]
    tree: SuperTree
    packed: PackedTree
    accepted: Accepted
    emitted: NDArray[np.int64]
    tier: Tier
    num_unprocessed_tokens: int


@dataclass(frozen=True)
class Answer:
    """A text that was written in full.

    Attributes:
        kind: of its prompt.
        tokens: emitted in steps; the first token, which prefill gave, does not count.
        steps: in which it took part.
        verify_tokens: verified for it, roots included.
        seconds: modelled time from its admission to its end.
    """

    kind: str
    tokens: int
    steps: int
    verify_tokens: int
    seconds: float


@dataclass
class Report:
    """Sums over a replay.

    Attributes:
        seconds: modelled time of all steps.
        tokens, steps, request_steps: emitted tokens, steps, and requests summed over steps.
        verify_tokens: rows of real nodes, roots included.
        launched_tokens: pad rows launched.
        accepted: accepted drafted rows.
        layers: drafted layers summed over steps.
        misses: nodes that the policy drafted on and the trace has no draft for; 0 in an exact replay.
        answers: the finished texts.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    request_steps: int = 0
    verify_tokens: int = 0
    launched_tokens: int = 0
    accepted: int = 0
    layers: int = 0
    misses: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Emitted tokens a modelled second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request emits in a step."""
        return self.tokens / self.request_steps

    @property
    def acceptance(self) -> float:
        """Share of the drafted rows that were accepted; NaN where none was drafted."""
        drafted = self.verify_tokens - self.request_steps
        return self.accepted / drafted if drafted else float("nan")

    def percentiles(
        self, kind: str | None = None, points: tuple[int, ...] = (1, 50, 99)
    ) -> dict[int, float]:
        """The percentiles ``points`` over finished texts, of one ``kind`` or all, of modelled seconds a token."""
        rows = [
            answer.seconds / answer.tokens
            for answer in self.answers
            if kind in (None, answer.kind) and answer.tokens
        ]
        return {p: float(np.percentile(rows, p)) for p in points} if rows else {}

    def of_kind(self, kind: str) -> dict[str, float]:
        """The figures of the finished texts of one ``kind``: tokens and rows per step, acceptance, seconds a token, fairness among them."""
        chosen = [answer for answer in self.answers if answer.kind == kind]
        tokens, steps, rows = (
            sum(getattr(answer, name) for answer in chosen)
            for name in ("tokens", "steps", "verify_tokens")
        )
        return {
            "texts": len(chosen),
            "tokens_per_step": tokens / steps if steps else float("nan"),
            "rows_per_step": rows / steps if steps else float("nan"),
            "acceptance": (tokens - steps) / (rows - steps) if rows > steps else float("nan"),
            "seconds_per_token": sum(answer.seconds for answer in chosen) / tokens
            if tokens
            else float("nan"),
            "fairness": _jain(chosen),
        }

    @property
    def fairness(self) -> float:
        """Jain's index of the finished texts' tokens a second: 1 when all are served alike, 1/n when one gets everything."""
        return _jain(self.answers)


def _jain(answers: list[Answer]) -> float:
    rate = np.array([answer.tokens / answer.seconds for answer in answers])
    return float(rate.sum() ** 2 / (len(rate) * (rate**2).sum())) if len(rate) else float("nan")


def replay(
    trace: Trace,
    scheduler: ElasticBudgetScheduler,
    cost: CostModel,
    *,
    batch: int,
    steps: int | None = None,
    order: NDArray[np.int64] | None = None,
    compact: bool = False,
    prefill_tokens: int = 0,
    lag: int = 0,
    max_verify_tokens_per_req: int | None = None,
    update_rate: float = 0.0,
    observe: Observer | None = None,
) -> Report:
    """Decodes the trace's texts under a policy, with continuous refill, and charges each step by the cost model.

    The scheduler's own code plans each step on the recorded scores, and the text says what the target accepts: under greedy
    decoding the steps, rows and accepted tokens are those of a live decode of the same prompts in the same slots. A drafter is also
    charged for reading up on what was emitted while nothing was drafted.

    Args:
        trace: recorded drafts.
        scheduler: the policy; ``max_depth`` at most the trace's depth.
        cost: seconds of a step by rows, and of a drafted layer.
        batch: slots.
        steps: stop after that many steps, refilling forever; None: until each text of ``order`` is written once.
        order: texts in the order of their admission; the trace's order where not given.
        compact: charge only layers and nodes that are still drafted on. By default all planned layers are charged at full
            width: inside a CUDA graph a gate saves no draft time.
        prefill_tokens: rows of each admission's prefill, in the forward pass of the request's first step.
        lag: steps by which the forecast's history lies behind, 0 to 2.
        max_verify_tokens_per_req: rows of one request at most.
        update_rate: rate at which the scheduler's own cost model, where it has one, learns what each step took (:meth:`CostModel.update`).
        observe: is shown each step.

    Raises:
        EchoError: an argument out of range, or a policy deeper than the trace.
    """
    _check(trace, scheduler, batch, prefill_tokens, lag)
    queue = np.arange(len(trace.kind)) if order is None else np.asarray(order)
    source = _Source(trace)
    slots = _Slots(trace, queue, batch, forever=steps is not None)
    report, history = Report(), scheduler.history(batch)
    past: deque[History] = deque([history] * (lag + 1), maxlen=lag + 1)
    room = (
        scheduler.max_verify_tokens_per_req
        if max_verify_tokens_per_req is None
        else max_verify_tokens_per_req
    )
    while steps is None or report.steps < steps:
        fresh = slots.refill(report.seconds)
        if len(fresh):
            past[-1] = history = history.reset(torch.from_numpy(fresh))
        live = slots.live()
        if not len(live):
            break
        where, at = torch.from_numpy(live), slots.position[live]
        plan = scheduler.choose_tier(past[0], where, num_other_tokens=prefill_tokens * len(fresh))
        left = np.where(
            slots.end[live] - at > 1, slots.limit[live] - (at - slots.begin[live]) - 1, 0
        )  # some end with their first token
        limit = torch.from_numpy(np.where(left > 1, room, 1))
        tree = scheduler.begin(
            source.text[at], verify_limits=limit, num_verify_tokens=plan.num_verify_tokens
        )
        source.begin(at)
        tree, nodes = _grow(scheduler, tree, source, plan.depth)
        packed = scheduler.pack(tree)
        accepted = accept(packed, source.target(at, packed))
        history = history.observe(where, packed, accepted)
        past.append(history)
        emitted = accepted.num_emitted.numpy()

        _count(report, packed, emitted, tree.depth)
        full = float(cost.draft_seconds(plan.depth, len(live), scheduler.rule.beam))
        drafting = tree.depth * cost.draft_layer + nodes * cost.draft_token if compact else full
        unread = slots.read(live, emitted, drafted=plan.depth > 0)
        drafting += cost.extend_seconds(unread)
        launched = plan.num_verify_tokens + prefill_tokens * len(fresh)
        report.seconds += cost(launched) + drafting
        if update_rate and isinstance(scheduler.budget, CostModel):
            scheduler = replace(
                scheduler,
                budget=scheduler.budget.update(launched, cost(launched), rate=update_rate),
            )
        if observe is not None:
            observe(
                Record(
                    slots.text[live],
                    at - slots.begin[live],
                    tree,
                    packed,
                    accepted,
                    emitted,
                    plan,
                    unread,
                )
            )
        slots.advance(live, emitted, packed.indptr.diff().numpy(), report)
    report.misses = source.misses
    return report


def _check(
    trace: Trace, scheduler: ElasticBudgetScheduler, batch: int, prompt_rows: int, lag: int
) -> None:
    batch = checks.integer("batch", batch, 1)
    lag = checks.integer("lag", lag, 0, 2)
    prompt_rows = checks.integer("prompt_rows", prompt_rows, 0)
    if scheduler.max_depth > trace.depth:
        raise EchoError(
            f"scheduler: expected max_depth of at most the trace's {trace.depth}, got {scheduler.max_depth}"
        )


def _grow(
    scheduler: ElasticBudgetScheduler, tree: SuperTree, source: _Source, depth: int
) -> tuple[SuperTree, int]:
    """The tree drafted down to ``depth``, or until nobody drafts on; and how many nodes were drafted on."""
    nodes = 0
    for _ in range(depth):
        active = int(tree.frontier.active.sum())
        if active == 0:
            break
        nodes += active
        tree = scheduler.grow(tree, *source.draft(tree.frontier))
    return tree, nodes


def _count(report: Report, packed: PackedTree, emitted: NDArray[np.int64], layers: int) -> None:
    real = int(packed.indptr[-1])
    report.steps += 1
    report.request_steps += len(emitted)
    report.tokens += int(emitted.sum())
    report.verify_tokens += real
    report.launched_tokens += packed.num_rows - real
    report.accepted += int((emitted - 1).clip(min=0).sum())
    report.layers += layers


class _Slots:
    """Which text each slot writes, and where it is."""

    def __init__(self, trace: Trace, queue: NDArray[np.int64], batch: int, forever: bool) -> None:
        self.trace, self.queue, self.forever, self.next = trace, queue, forever, 0
        self.text, self.position, self.begin, self.end, self.limit, self.steps, self.rows = (
            np.full(batch, -1) for _ in range(7)
        )
        self.unread = np.zeros(batch, np.int64)
        self.since = np.zeros(batch)

    def refill(self, now: float) -> NDArray[np.int64]:
        """Admits texts to free slots; which slots."""
        free = np.flatnonzero(self.text < 0)
        if not self.forever:
            free = free[: max(0, len(self.queue) - self.next)]
        texts = self.queue[(self.next + np.arange(len(free))) % len(self.queue)]
        self.next += len(free)
        self.text[free], self.begin[free], self.end[free] = (
            texts,
            self.trace.indptr[texts],
            self.trace.indptr[texts + 1],
        )
        self.position[free], self.limit[free], self.since[free] = (
            self.begin[free],
            self.trace.limit[texts],
            now,
        )
        self.steps[free] = self.rows[free] = self.unread[free] = 0
        return free

    def live(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.text >= 0)

    def read(self, live: NDArray[np.int64], emitted: NDArray[np.int64], drafted: bool) -> int:
        """Tokens that a drafter reads now, of texts still being written; nothing while it is off."""
        if not drafted:
            self.unread[live] += emitted
            return 0
        unread = int(self.unread.sum())
        self.unread[:] = 0
        return unread

    def advance(
        self,
        live: NDArray[np.int64],
        emitted: NDArray[np.int64],
        rows: NDArray[np.int64],
        report: Report,
    ) -> None:
        """Moves on; finished texts leave and are entered in the report."""
        self.position[live] += emitted
        self.steps[live] += 1
        self.rows[live] += rows
        for slot in live[self.position[live] >= self.end[live] - 1]:
            kind, tokens = (
                str(self.trace.kind[self.text[slot]]),
                int(self.end[slot] - self.begin[slot]) - 1,
            )
            seconds = report.seconds - float(self.since[slot])
            report.answers.append(
                Answer(kind, tokens, int(self.steps[slot]), int(self.rows[slot]), seconds)
            )
            self.text[slot] = -1


class _Source:
    """The trace as a drafter and a target."""

    def __init__(self, trace: Trace) -> None:
        self.text = torch.from_numpy(trace.text).long()
        self.tokens = torch.from_numpy(trace.token).long()
        self.log_probs = torch.from_numpy(trace.log_prob).float()
        self.expanded = torch.from_numpy(trace.expanded).long()
        self.following = torch.from_numpy(trace.following).long()
        self.misses, self.floor = 0, trace.floor

    def begin(self, at: NDArray[np.int64]) -> None:
        """A new step, at these positions."""
        self.at = torch.from_numpy(at)
        self.children = torch.zeros(len(at), 1, dtype=torch.int64)

    def draft(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """What was recorded after each node of the frontier; a node without a record is a miss and has no children."""
        place = self.children.gather(1, frontier.index)
        known = place >= 0
        self.misses += int((frontier.active & ~known & (frontier.score >= self.floor)).sum())
        place = place.clamp(min=0)
        layer, k = self.expanded[self.at, frontier.depth], self.tokens.shape[3]
        child = place[..., None] * k + torch.arange(k)
        self.children = torch.where(
            known[..., None], layer.gather(1, child.flatten(1)).view_as(child), -1
        ).flatten(1)
        where = self.at[:, None]
        log_probs = torch.where(
            known[..., None], self.log_probs[where, frontier.depth, place], -torch.inf
        )
        return self.tokens[where, frontier.depth, place], log_probs

    def target(self, at: NDArray[np.int64], packed: PackedTree) -> Tensor:
        """The text's own next token after each row, none behind its end; rows off the text's path are never reached."""
        request = packed.request.long()
        real = request < packed.batch
        position = torch.from_numpy(at)[request.clamp(max=packed.batch - 1)]
        return torch.where(real, self.following[position, packed.depth.long()], -1)
