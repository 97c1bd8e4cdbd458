"""One speculative step composed of the parts, and a continuous-batching loop around it.

B requests of a step; W nodes of a frontier; k candidates of a node; N rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.history import History
from echo.budget.rules import ranks
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.budget.throughput import Tier
from echo.gating.logs import WarmupLog
from echo.tree.accept import Accepted, accept
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier, SuperTree, cost_bits


class Target(Protocol):
    """The target model with its cache and its sampler.

    ``req_indices`` int64 [B] says where each request's state is kept, below ``max_num_reqs``.
    """

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Prefill new requests' ``prompts``, int64 [length] each; int64 [B], their first tokens."""

    def verify(self, req_indices: Tensor, packed: PackedTree, /) -> Tensor:
        """One forward pass over ``packed``; int64 [N], the token sampled after each row."""

    def compact(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Keep the KV entries of ``accepted.rows`` of ``packed``, in order, and drop its others."""


class Drafter(Protocol):
    """What proposes tokens, for the target's ``req_indices``.

    Its state must depend on nothing but the emitted text.
    """

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """New requests, after the target's prefill of ``prompts``, int64 [length] each.

        ``first`` int64 [B] are the tokens sampled after them.
        """

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Candidates of each node of the ``frontier``: tokens int64 [B, W, k] and log-probs float.

        -inf fills up where there are fewer than k; k may differ by depth. A step's first frontier
        is of depth 0, or of depth 1 where :meth:`ElasticBudgetScheduler.begin` was given a first
        layer.
        """

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Draft extend: ``accepted.rows`` of ``packed`` stay; ``accepted.tokens`` were emitted."""


@dataclass(frozen=True)
class Seconds:
    """Wall time of a step by part, on the host's clock.

    Attributes:
        draft: the drafter's calls, draft extend included.
        scheduling: choice of the tier, growing, packing, acceptance.
        verify: the target's forward pass and its cache.
    """

    draft: float = 0.0
    scheduling: float = 0.0
    verify: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.draft + self.scheduling + self.verify


@dataclass(frozen=True)
class Step:
    """What happened in one step.

    Attributes:
        tree, packed, accepted: the values of the step; ``accepted`` cut at the ends of answers.
        sampled: int64 [N], the target's tokens.
        req_indices: int64 [B].
        tier: depth and verify tokens chosen.
        seconds: where the time went.
        gated: a gate kept requests from drafting deeper.
        requests: of :func:`decode`, the prompt that each of the B requests answers.
        emitted: of :func:`decode`, the tokens each emitted: its row of ``accepted.tokens``, in its
            first step behind the token that prefill sampled.
        finished: of :func:`decode`, prompts answered in full with this step.
        failed: of :func:`decode`, prompts whose answers end here unfinished: the target had no
            number for their next token.
    """

    tree: SuperTree
    packed: PackedTree
    accepted: Accepted
    sampled: Tensor
    req_indices: Tensor
    tier: Tier
    seconds: Seconds
    gated: bool
    requests: tuple[int, ...] = ()
    emitted: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()

    def log(self, first_step: int = 0, *, weights: Tensor | None = None) -> WarmupLog:
        """The warm-up log of this step: as :func:`warmup_log`.

        Raises:
            EchoError: a step behind a gate without weights (what the gate stopped is missing, and
                the log biased), or weights of another shape.
        """
        if self.gated and weights is None:
            raise EchoError(
                "log: expected a step drafted without a gate, or weights (ExploringGate), "
                "got one behind a gate: its log would be biased"
            )
        return warmup_log(self.tree, self.packed, self.accepted, first_step, weights=weights)


def warmup_log(
    tree: SuperTree,
    packed: PackedTree,
    accepted: Accepted,
    first_step: int = 0,
    *,
    weights: Tensor | None = None,
) -> WarmupLog:
    """Each judged draft token: path probability, rank in its layer, and whether it was accepted.

    Nodes that were not verified are missing, not rejected: warm up with a rule that commits the
    best of every layer. So are those that the target did not judge
    (:attr:`Accepted.num_accepted_drafts`).

    Args:
        tree, packed, accepted: of one step.
        first_step: id of this step's first request-step; the next B - 1 ids are used too.
        weights: float [B, depths + 1], inverse-probability weights by request and depth
            (:meth:`echo.gating.ExploringGate.weights`); tokens of weight 0 are left out. Defaults
            to 1, for steps drafted without a gate.

    Raises:
        EchoError: weights of another shape or dtype.
    """
    rank, taken = draft_labels(tree, packed, accepted)
    kept = (packed.depth > 0) & (rank >= 0)
    weight = torch.ones(packed.num_rows, dtype=torch.float32, device=kept.device)
    if weights is not None:
        checks.tensor("weights", weights, [tree.batch, "depths + 1"], checks.FLOATS, kept.device)
        count = weights.shape[1]
        if count <= tree.depth:
            expected = f"a column for each depth from 0 to {tree.depth}"
            raise EchoError(f"weights: expected {expected}, got {count} columns")
        request = packed.request.long().clamp(max=tree.batch - 1)
        weight = weights.detach()[request, packed.depth.long()].float()
        kept = kept & (weight > 0)
    step = first_step + packed.request.long()
    columns = packed.depth, packed.score.exp(), taken, rank, weight, step
    depth, confidence, labels, rank, weight, step = (x[kept].cpu() for x in columns)
    return WarmupLog.from_arrays(
        depth=depth.numpy(),
        confidence=confidence.numpy(),
        accepted=labels.numpy(),
        rank=rank.numpy(),
        weight=weight.numpy(),
        step=step.numpy(),
    )


def draft_labels(tree: SuperTree, packed: PackedTree, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """Label a step's rows, sync-free: what :meth:`echo.gating.LiveHistograms.update` counts.

    Args:
        tree, packed, accepted: the values of one step.

    Returns:
        rank int64 [N], each row's rank among its request's candidates of its depth, by path
        probability (0 on roots and pads); -1 on rows that the target did not judge
        (:attr:`Accepted.num_accepted_drafts`). And bool [N], whether the whole path to a row was
        accepted.
    """
    checks.instance("tree", tree, SuperTree)
    num_rows = checks.instance("packed", packed, PackedTree).num_rows
    drafts, path = accepted.num_accepted_drafts, accepted.rows.flatten()
    rows = path if accepted.cut_row is None else torch.cat([path, accepted.cut_row])
    rows = torch.where(
        rows < 0, num_rows, rows
    )  # -1, no row, falls behind the last, and is cut off
    taken = torch.zeros(num_rows + 1, dtype=torch.bool, device=packed.tokens.device)
    taken = taken.index_fill(0, rows, True)[:-1]
    deepest = F.pad(torch.where(drafts < accepted.num_emitted, packed.max_depth, drafts), (0, 1))
    by_layer = [ranks(cost_bits(layer.score).long()) for layer in tree.layers]
    rank = F.pad(torch.cat(by_layer, dim=1).flatten(), (0, 1))[packed.node]  # pads: the last
    drafted, judged = packed.depth > 0, packed.depth <= deepest[packed.request]
    return rank.masked_fill(~drafted, 0).masked_fill(~judged, -1), taken & drafted


def speculate(
    scheduler: ElasticBudgetScheduler,
    target: Target,
    drafter: Drafter | None,
    req_indices: Tensor,
    root_tokens: Tensor,
    history: History,
    *,
    verify_limits: Tensor | None = None,
    num_other_tokens: int = 0,
    early_stop: bool = True,
    tier: Tier | None = None,
    eos_tokens: Tensor | None = None,
    max_new_tokens: Tensor | None = None,
) -> tuple[Step, History]:
    """One step: begin, draft and grow, pack, verify, accept, compact. All tensors on one device.

    Args:
        scheduler: the policy.
        target, drafter: the engine's models; no drafter drafts nothing.
        req_indices: int64 [B].
        root_tokens: int64 [B], each request's last emitted token.
        history: of all requests.
        verify_limits: int64 [B], as in :meth:`ElasticBudgetScheduler.begin`.
        num_other_tokens: of prefill in the same forward pass.
        early_stop: stop drafting once no request is active. It waits for one flag a layer; inside a
            CUDA graph it must be False.
        tier: from :meth:`ElasticBudgetScheduler.choose_tier`. Defaults to one chosen here, for
            which indices and history are copied to the host: on a GPU the step then begins with a
            sync.
        eos_tokens, max_new_tokens: where answers end, as in :meth:`Accepted.truncate`.

    Returns:
        The step, and the history after it.

    Example:
        >>> from echo.testing import TabularDrafter, TabularTarget, table
        >>> own, ids = table(9, seed=3), torch.tensor([0])
        >>> models = TabularTarget(own), TabularDrafter(own, k=3)
        >>> roots = models[0].admit(ids, [torch.tensor([1, 2])])
        >>> scheduler = ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, max_depth=2)
        >>> step, history = speculate(scheduler, *models, ids, roots, scheduler.history(1))
        >>> values = step.tree, step.packed, step.accepted
        >>> len(step.log()), warmup_log(*values).accepted.tolist()  # a row for each draft token
        (3, [True, False, True])
        >>> rank, taken = draft_labels(*values)  # on the device, of all rows
        >>> rank.tolist(), taken.tolist()
        ([0, 0, 1, 0], [False, True, False, True])
    """
    clock, drafting = time.perf_counter, 0.0
    start = clock()
    if tier is None:
        tier = scheduler.choose_tier(history.to("cpu"), req_indices.cpu(), num_other_tokens)
    count = tier.num_verify_tokens
    tree = scheduler.begin(root_tokens, verify_limits=verify_limits, num_verify_tokens=count)
    for _ in range(tier.depth):
        if drafter is None or (early_stop and not bool(tree.active.any())):
            break
        before = clock()
        tokens, log_probs = drafter.draft(req_indices, tree.frontier)
        drafting += clock() - before
        tree = scheduler.grow(tree, tokens, log_probs, beam=tier.beam)
    if scheduler.trims:
        tree = scheduler.trim(tree, tier, num_other_tokens)
    packed = scheduler.pack(tree)
    planned = clock()
    sampled = target.verify(req_indices, packed)
    verified = clock()
    accepted = accept(packed, sampled, eos_tokens=eos_tokens, max_new_tokens=max_new_tokens)
    history = history.observe(req_indices, packed, accepted)
    judged = clock()
    target.compact(req_indices, packed, accepted)
    kept = clock()
    if drafter is not None:
        drafter.extend(req_indices, packed, accepted)
    seconds = Seconds(
        draft=drafting + clock() - kept,
        scheduling=planned - start - drafting + judged - verified,
        verify=verified - planned + kept - judged,
    )
    gated = scheduler.gate is not None
    return Step(tree, packed, accepted, sampled, req_indices, tier, seconds, gated), history


@dataclass
class _Answer:
    """A running request: its prompt, tokens to emit, and next root (``fresh``: not emitted yet)."""

    prompt: int
    remaining: int
    root: int
    fresh: bool = True


def decode(
    scheduler: ElasticBudgetScheduler,
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Tensor],
    *,
    max_num_reqs: int,
    max_new_tokens: int | Sequence[int],
    eos_token: int | Sequence[int] | None = None,
    max_verify_tokens_per_req: int | None = None,
    early_stop: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Step]:
    """Answer all prompts with continuous batching: when a request ends, the next is admitted.

    The host chooses each step's tier from what it read after the step before: emitted tokens and
    history. With ``early_stop=False`` nothing else waits for the device.

    Args:
        scheduler, target, drafter, early_stop: as in :func:`speculate`.
        prompts: int64 [length] each.
        max_num_reqs: requests decoded together.
        max_new_tokens: of each answer; one number, or one for each prompt.
        eos_token: ends an answer, itself included; several where the model has several.
        max_verify_tokens_per_req: of a request. Defaults to the scheduler's.
        device: where the step's tensors live.

    Yields:
        A :class:`Step` for each step. The token that prefill sampled is the first of a request's
        first ``emitted``.

    Raises:
        EchoError: an argument of the wrong kind or out of range; and at the end, when all other
            prompts are answered, naming each prompt whose answer is unfinished because the target
            had no number for its next token (:attr:`Step.failed`).

    Example:
        >>> from echo.testing import TabularDrafter, TabularTarget, table
        >>> own, prompts = table(9, seed=3), [torch.tensor([1, 2]), torch.tensor([4])]
        >>> scheduler = ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4)
        >>> models = TabularTarget(own), TabularDrafter(own, k=3)
        >>> steps = list(decode(scheduler, *models, prompts, max_num_reqs=2, max_new_tokens=5))
        >>> sum(len(tokens) for step in steps for tokens in step.emitted)
        10
    """
    max_num_reqs = checks.integer("max_num_reqs", max_num_reqs, 1)
    given = () if eos_token is None else checks.integers("eos_token", eos_token, 0).ravel().tolist()
    ends = frozenset(given)
    eos_tokens = torch.tensor(sorted(ends), device=device) if ends else None
    limits, most = _limits(prompts, max_new_tokens), scheduler.max_verify_tokens_per_req
    if max_verify_tokens_per_req is not None:
        most = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    history, known = scheduler.history(max_num_reqs, device), scheduler.history(max_num_reqs)
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, _Answer] = {}
    steps, failed, faults = 0, list[int](), list[str]()
    while waiting or running:
        free = [index for index in range(max_num_reqs) if index not in running][: len(waiting)]
        if free:
            indices = torch.tensor(free, device=device)
            admitted = [waiting.pop() for _ in free]
            texts = [prompts[number].to(device) for number in admitted]
            first = target.admit(indices, texts)
            checks.tensor("target.admit()", first, [len(free)], torch.int64)
            history = history.reset(indices)
            known, (sampled,) = _on_host(history, first)
            for index, number, token in zip(free, admitted, sampled, strict=True):
                if token < 0:
                    failed.append(number)
                    faults.append(f"prompt {number} at its end")
                else:
                    running[index] = _Answer(number, limits[number], token)
            begun = [row for row, token in enumerate(sampled) if token >= 0]
            if drafter is not None and begun:
                indices = torch.tensor([free[row] for row in begun], device=device)
                first = torch.tensor([sampled[row] for row in begun], device=device)
                drafter.admit(indices, [texts[row] for row in begun], first)
        live = sorted(running)
        if not live:
            continue
        answers = [running[index] for index in live]
        missing = [0 if a.fresh and a.root in ends else a.remaining - a.fresh for a in answers]
        remaining = torch.tensor(missing, device=device)
        # where at most one token is missing, nothing is gained by drafting
        step, history = speculate(
            scheduler,
            target,
            drafter,
            torch.tensor(live, device=device),
            torch.tensor([answer.root for answer in answers], device=device),
            history,
            verify_limits=torch.where(remaining > 1, most, 1),
            early_stop=early_stop,
            tier=scheduler.choose_tier(known, live),
            eos_tokens=eos_tokens,
            max_new_tokens=remaining,
        )
        steps += 1
        values = step.accepted.tokens, step.accepted.num_emitted
        known, (tokens, lengths) = _on_host(history, *values)
        emitted, finished = [], []
        for index, answer, row, length in zip(live, answers, tokens, lengths, strict=True):
            number, new = answer.prompt, [answer.root] * answer.fresh + row[:length]
            answer.remaining, answer.fresh = answer.remaining - len(new), False
            emitted.append(tuple(new))
            if not answer.remaining or (new and new[-1] in ends):
                finished.append(number)
            elif not length:
                failed.append(number)
                done = limits[number] - answer.remaining
                faults.append(f"prompt {number} after {done} tokens of its answer, in step {steps}")
            else:
                answer.root = row[length - 1]
                continue
            del running[index]
        yield replace(
            step,
            requests=tuple(answer.prompt for answer in answers),
            emitted=tuple(emitted),
            finished=tuple(finished),
            failed=tuple(failed),
        )
        failed = []
    if faults:
        missed = "; ".join(faults)
        raise EchoError(f"target: expected a number in the row of each root, got none for {missed}")


def _on_host(history: History, *values: Tensor) -> tuple[History, list[Any]]:
    """History and ``values`` on the host: the one device-to-host sync of :func:`decode`."""
    return history.to("cpu"), [value.tolist() for value in values]


def _limits(prompts: Sequence[Tensor], max_new_tokens: object) -> list[int]:
    """Tokens of each answer at most. Checks both arguments."""
    given = checks.integers("max_new_tokens", max_new_tokens, 1)
    limits: list[int] = (given.repeat(len(prompts)) if given.ndim == 0 else given).tolist()
    if len(limits) != len(prompts):
        expected = f"one number for each of {len(prompts)} prompts"
        raise EchoError(f"max_new_tokens: expected {expected}, got {len(limits)}")
    for number, prompt in enumerate(prompts):
        if len(checks.tensor(f"prompts[{number}]", prompt, ["length"], torch.int64)) == 0:
            raise EchoError(f"prompts[{number}]: expected at least one token, got none")
    return limits
