"""Exact replay of recorded drafts: compare policies on the same work. B requests in a step."""

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
    """One replayed step.

    Attributes:
        requests, position: int64 [B], each request's text, and the position of its root in it.
        tree, packed, accepted: the values of the step.
        emitted: int64 [B], number of tokens emitted.
        tier: the planned depth and verify tokens.
        num_unprocessed_tokens: tokens of the draft extend in this step.
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
    """A completed text.

    Attributes:
        kind: kind of its prompt.
        tokens: tokens emitted in steps, without the first one, from prefill.
        steps: steps in which it took part.
        verify_tokens: tokens verified for it, roots included.
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
        verify_tokens, padding: tokens verified, roots included, and pad rows launched.
        accepted, layers: accepted drafts, and drafted layers summed over steps.
        misses: nodes that the policy expanded but the trace has no draft for; 0 in an exact replay.
        answers: the completed texts.

    Example: :func:`replay`.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    request_steps: int = 0
    verify_tokens: int = 0
    padding: int = 0
    accepted: int = 0
    layers: int = 0
    misses: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Emitted tokens per modelled second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a request emits in a step."""
        return self.tokens / self.request_steps

    @property
    def acceptance(self) -> float:
        """Share of verified drafts that were accepted; NaN without drafts."""
        drafted = self.verify_tokens - self.request_steps
        return self.accepted / drafted if drafted else float("nan")


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
    load: Callable[[], int] | None = None,
    observe: Observer | None = None,
) -> Report:
    """Decode the trace's texts under a policy and a cost model, with continuous refill.

    The scheduler plans each step on the recorded scores, and the text determines what the target
    accepts: the steps, verify tokens and accepted tokens equal those of a live greedy decode of the
    same prompts at the same request indices. The draft extend is charged too.

    Args:
        trace: recorded drafts.
        scheduler: the policy; ``max_depth`` at most the trace's depth.
        cost: seconds of a step by its verify tokens, and of a drafted layer.
        batch: max_num_reqs.
        steps: stop after that many steps, refilling forever. Defaults to each text of ``order``
            once.
        order: indices of texts in order of admission. Defaults to the trace's.
        compact: charge only layers and nodes that are expanded. By default all planned layers are
            charged at full width: inside a CUDA graph a gate saves no draft time.
        prefill_tokens: prefill of each admission, in the forward pass of the request's first step.
        lag: steps by which the history of ``choose_tier`` lags, 0 to 2.
        max_verify_tokens_per_req: Defaults to the scheduler's.
        update_rate: of :meth:`echo.CostModel.update` with each step's seconds, if the scheduler's
            budget is a cost model.
        load: returns the number of requests wanted before each step, at most ``batch``, its
            default; the excess complete their texts.
        observe: called with the :class:`Record` of each step.

    Raises:
        EchoError: an argument out of range, or a policy deeper than the trace.

    Example:
        >>> import echo
        >>> from echo.testing import TabularDrafter, TabularTarget, record, replay, table
        >>> target, own = TabularTarget(table(9, seed=1)), table(9, seed=1)
        >>> pair = target, TabularDrafter(own, k=3, dtype=torch.float16)
        >>> options = {"max_num_reqs": 2, "depth": 2, "beam": 2, "max_new_tokens": 9}
        >>> prompts = [torch.tensor([1]), torch.tensor([2])]
        >>> *_, trace = record(*pair, prompts, ["one", "two"], **options)
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(beam=2), budget=6, max_depth=2)
        >>> report = replay(trace, scheduler, echo.CostModel((1, 8), (1.0, 1.5)), batch=2)
        >>> report.tokens, report.steps, report.misses
        (16, 4, 0)
    """
    batch = checks.integer("batch", batch, 1)
    lag = checks.integer("lag", lag, 0, 2)
    prefill_tokens = checks.integer("prefill_tokens", prefill_tokens, 0)
    if scheduler.max_depth > trace.depth:
        want = f"expected max_depth of at most the trace's {trace.depth}"
        raise EchoError(f"scheduler: {want}, got {scheduler.max_depth}")
    queue = np.arange(len(trace.kind)) if order is None else np.asarray(order)
    source = Source(trace)
    requests = _Requests(trace, queue, batch, forever=steps is not None)
    report = Report()
    history = scheduler.history(batch)
    past: deque[History] = deque([history] * (lag + 1), maxlen=lag + 1)
    most = scheduler.max_verify_tokens_per_req
    if max_verify_tokens_per_req is not None:
        most = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    while steps is None or report.steps < steps:
        fresh = requests.refill(report.seconds, batch if load is None else load())
        if len(fresh):
            past[-1] = history = history.reset(torch.from_numpy(fresh))
        live = requests.live()
        if not len(live):
            break
        req_indices = torch.from_numpy(live)
        at = requests.position[live]
        other = prefill_tokens * len(fresh)
        tier = scheduler.choose_tier(past[0], req_indices, num_other_tokens=other)
        limits = torch.from_numpy(np.where(requests.remaining(live) > 1, most, 1))
        tree = scheduler.begin(
            source.text[at], verify_limits=limits, num_verify_tokens=tier.num_verify_tokens
        )
        source.begin(at)
        expanded = 0
        while scheduler.deeper(tree, tier) and (active := int(tree.frontier.active.sum())):
            expanded += active
            tree = scheduler.grow(tree, *source.draft(tree.frontier), beam=tier.beam)
        if scheduler.trims:
            tree = scheduler.trim(tree, tier, other)
            tier = replace(tier, depth=tree.depth)  # for which the host has waited
        packed = scheduler.pack(tree)
        accepted = accept(packed, source.target(at, packed))
        history = history.observe(req_indices, packed, accepted)
        past.append(history)
        emitted = accepted.num_emitted.numpy()
        unprocessed = requests.extend(live, emitted, drafted=tier.depth > 0)

        _count(report, packed, emitted, tree.depth)
        beam = tier.beam or scheduler.rule.beam
        drafting = float(cost.draft_seconds(tier.depth, len(live), beam))
        if compact:
            drafting = tree.depth * cost.draft_layer + expanded * cost.draft_token
        count = packed.num_rows
        report.seconds += cost(count + other) + drafting + cost.extend_seconds(unprocessed)
        if update_rate and isinstance(scheduler.budget, CostModel):
            updated = scheduler.budget.update(count + other, cost(count + other), rate=update_rate)
            scheduler = replace(scheduler, budget=updated)
        if observe is not None:
            position = at - requests.begin[live]
            values = (tree, packed, accepted)
            observe(Record(requests.text[live], position, *values, emitted, tier, unprocessed))
        requests.advance(live, emitted, packed.indptr.diff().numpy(), report)
    report.misses = source.misses
    return report


def _count(report: Report, packed: PackedTree, emitted: NDArray[np.int64], layers: int) -> None:
    real = int(packed.indptr[-1])
    report.steps += 1
    report.request_steps += len(emitted)
    report.tokens += int(emitted.sum())
    report.verify_tokens += real
    report.padding += packed.num_rows - real
    report.accepted += int((emitted - 1).clip(min=0).sum())
    report.layers += layers


class _Requests:
    """The text that each request index writes, and its position in it; -1: none."""

    def __init__(self, trace: Trace, queue: NDArray[np.int64], batch: int, forever: bool) -> None:
        self.trace = trace
        self.queue = queue
        self.forever = forever
        self.next = 0
        self.text, self.position, self.begin, self.end, self.limit = np.full((5, batch), -1)
        self.steps, self.verified, self.unprocessed = np.zeros((3, batch), np.int64)
        self.since = np.zeros(batch)

    def refill(self, now: float, wanted: int) -> NDArray[np.int64]:
        """Admit texts to free request indices until ``wanted`` are live; return those indices."""
        free = np.flatnonzero(self.text < 0)
        free = free[: max(0, wanted - len(self.text) + len(free))]
        if not self.forever:
            free = free[: max(0, len(self.queue) - self.next)]
        texts = self.queue[(self.next + np.arange(len(free))) % len(self.queue)]
        self.next += len(free)
        self.text[free] = texts
        self.limit[free] = self.trace.limit[texts]
        self.begin[free] = self.position[free] = self.trace.indptr[texts]
        self.end[free] = self.trace.indptr[texts + 1]
        self.since[free] = now
        self.steps[free] = self.verified[free] = self.unprocessed[free] = 0
        return free

    def live(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.text >= 0)

    def remaining(self, live: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that each may still emit; 0 for a text that ends with its first token."""
        at = self.position[live]
        return np.where(self.end[live] - at > 1, self.limit[live] - (at - self.begin[live]) - 1, 0)

    def extend(self, live: NDArray[np.int64], emitted: NDArray[np.int64], drafted: bool) -> int:
        """Tokens of the draft extend: none without a draft, then all that have accumulated."""
        if not drafted:
            self.unprocessed[live] += emitted
            return 0
        total = int(self.unprocessed.sum())
        self.unprocessed[:] = 0
        return total

    def advance(
        self,
        live: NDArray[np.int64],
        emitted: NDArray[np.int64],
        verified: NDArray[np.int64],
        report: Report,
    ) -> None:
        """Advance the requests; completed texts move to the report."""
        self.position[live] += emitted
        self.steps[live] += 1
        self.verified[live] += verified
        for i in live[self.position[live] >= self.end[live] - 1]:
            kind = str(self.trace.kind[self.text[i]])
            tokens = int(self.end[i] - self.begin[i]) - 1
            steps = int(self.steps[i])
            verify_tokens = int(self.verified[i])
            seconds = report.seconds - float(self.since[i])
            report.answers.append(Answer(kind, tokens, steps, verify_tokens, seconds))
            self.text[i] = -1


class Source:
    """A trace as a drafter and a target. P positions; W nodes in a frontier, k candidates each.

    Attributes:
        text: int64 [P].
        misses: expanded nodes so far without a record.
    """

    def __init__(self, trace: Trace) -> None:
        self.text = torch.from_numpy(trace.text).long()
        self.tokens = torch.from_numpy(trace.token).long()
        self.log_probs = torch.from_numpy(trace.log_prob).float()
        self.expanded = torch.from_numpy(trace.expanded).long()
        self.following = torch.from_numpy(trace.following).long()
        self.misses = 0
        self.floor = trace.floor

    def begin(self, at: NDArray[np.int64]) -> None:
        """Begin a step at these positions, int64 [B]."""
        self.at = torch.from_numpy(at)
        self.children = torch.zeros(len(at), 1, dtype=torch.int64)

    def draft(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """Return recorded tokens and log-probabilities [B, W, k]; a miss has no children."""
        index = self.children.gather(1, frontier.index)
        known = index >= 0
        self.misses += int((frontier.active & ~known & (frontier.score >= self.floor)).sum())
        where = self.at[:, None], frontier.depth, index.clamp(min=0)
        k = self.tokens.shape[3]
        child = (where[2][..., None] * k + torch.arange(k)).flatten(1)
        children = self.expanded[self.at, frontier.depth].gather(1, child)
        self.children = torch.where(known.repeat_interleave(k, dim=1), children, -1)
        log_probs = torch.where(known[..., None], self.log_probs[where], -torch.inf)
        return self.tokens[where], log_probs

    def target(self, at: NDArray[np.int64], packed: PackedTree) -> Tensor:
        """Return the text's next token after each row, also off its path; -1 after its end."""
        request = packed.request.long()
        real = request < packed.batch
        position = torch.from_numpy(at)[request.clamp(max=packed.batch - 1)]
        return torch.where(real, self.following[position, packed.depth.long()], -1)
