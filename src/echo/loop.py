"""One speculative step composed from the parts, and a continuous-batching loop around it."""

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
    """The large model with its cache and its sampler. Requests live in slots; ``slots`` int64 [B] says where."""

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Prefills ``prompts`` (int64 [length] each) into ``req_indices``; int64 [B], the first token sampled after each."""

    def verify(self, req_indices: Tensor, packed: PackedTree, /) -> Tensor:
        """One forward pass over the rows of ``packed``; int64 [N], the token sampled after each row (pads: anything)."""

    def compact(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Makes ``accepted.rows`` of ``packed``, in order, the new end of each request's cache, and drops the others."""


class Drafter(Protocol):
    """What proposes tokens, in the target's ``slots``. Its state must depend on nothing but the emitted text."""

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """New requests, right after the target admitted their ``prompts``; ``first`` int64 [B], their first tokens."""

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Candidates after each node of the ``frontier``: tokens int64 [B, W, k] and log-probabilities float [B, W, k].

        Slots with fewer than k candidates are filled with -inf. k may differ from depth to depth. A step's first frontier is of depth
        0, or of depth 1 where ``plant`` was given a first layer.
        """

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """The step is over: of ``packed``, ``accepted.rows`` stay, and ``accepted.tokens`` were emitted."""


@dataclass(frozen=True)
class Seconds:
    """Wall time of a step by part, on the host's clock.

    Attributes:
        draft: the drafter's calls.
        scheduling: planning, packing, judging.
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
        tier: depth and rows planned.
        seconds: where the time went.
        gated: a gate kept nodes from being drafted.
        requests: for steps of :func:`decode`, which prompt each of the B requests answers.
        emitted: for steps of :func:`decode`, the tokens each emitted: its row of ``accepted.tokens``, in its first step behind the
            token that prefill sampled.
        finished: for steps of :func:`decode`, the prompts answered in full with this step.
        failed: for steps of :func:`decode`, the prompts whose answers end here unfinished: the target had no number for their next token.
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
        """Warm-up rows of this step; see :func:`warmup_rows` for the arguments.

        Raises:
            EchoError: the step was drafted behind a gate and has no weights: what the gate stopped would be missing, and the log
                biased; or weights of another shape.
        """
        if self.gated and weights is None:
            raise EchoError(
                "log: expected a step drafted without a gate, or weights, got one behind a gate: its rows would be biased (ExploringGate)"
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
    """Each judged drafted node with its path probability, its rank in its layer, and whether its whole path was accepted.

    Nodes that no row was spent on are missing, not rejected: warm up with a rule that buys the best of every layer. So are those that
    the target did not judge (:attr:`Accepted.num_accepted_drafts`).

    Args:
        tree, packed, accepted: of one step.
        first_step: id of this step's first request-step; the next B - 1 ids are used too.
        weights: float [B, depths + 1], inverse-probability weights by request and depth (:meth:`echo.gating.ExploringGate.weights`); rows of
            weight 0 are left out. None: all 1, for steps drafted without a gate.

    Raises:
        EchoError: weights of another shape or dtype.
    """
    rank, taken = draft_labels(tree, packed, accepted)
    kept = (packed.depth > 0) & (rank >= 0)
    weight = torch.ones(packed.num_rows, dtype=torch.float32, device=kept.device)
    if weights is not None:
        checks.tensor("weights", weights, [tree.batch, "depths + 1"], checks.FLOATS, kept.device)
        if weights.shape[1] <= tree.depth:
            raise EchoError(
                f"weights: expected a column for each depth from 0 to {tree.depth}, got {weights.shape[1]} columns"
            )
        weight = weights.detach()[
            packed.request.long().clamp(max=tree.batch - 1), packed.depth.long()
        ].float()
        kept = kept & (weight > 0)
    return WarmupLog.from_arrays(
        depth=packed.depth[kept].cpu().numpy(),
        confidence=packed.score[kept].exp().cpu().numpy(),
        accepted=taken[kept].cpu().numpy(),
        rank=rank[kept].cpu().numpy(),
        weight=weight[kept].cpu().numpy(),
        step=(first_step + packed.request[kept].long()).cpu().numpy(),
    )


def draft_labels(tree: SuperTree, packed: PackedTree, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """The labels of a step's rows, on the device and without a read-back: what :meth:`echo.gating.LiveHistograms.update` counts.

    Args:
        tree, packed, accepted: the values of one step.

    Returns:
        rank int64 [N], each row's place among its request's candidates of its depth, by path probability (0 on roots and pads); -1 on
        rows that the target did not judge (:attr:`Accepted.num_accepted_drafts`). And bool [N], whether the target accepted the whole path to it.
    """
    checks.instance("tree", tree, SuperTree)
    extra = checks.instance(
        "packed", packed, PackedTree
    ).num_rows  # "no row", -1, falls on one row more, that is cut off
    drafts, path = accepted.num_accepted_drafts, accepted.rows.flatten()
    rows = path if accepted.cut_row is None else torch.cat([path, accepted.cut_row])
    rows = torch.where(rows < 0, extra, rows)
    taken = torch.zeros(
        packed.num_rows + 1, dtype=torch.bool, device=packed.tokens.device
    ).index_fill(0, rows, True)
    deepest = F.pad(torch.where(drafts < accepted.num_emitted, packed.max_depth, drafts), (0, 1))
    rank = torch.cat(
        [ranks(cost_bits(layer.score).long()) for layer in tree.layers], dim=1
    ).flatten()
    rank = F.pad(rank, (0, 1))[packed.node]  # pads: the last
    drafted = packed.depth > 0
    return rank.masked_fill(~drafted, 0).masked_fill(
        packed.depth > deepest[packed.request], -1
    ), taken[:-1] & drafted


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
    """One step: forecast, plant, grow, pack, target, verify, keep. All tensors on one device.

    Args:
        scheduler: the policy.
        target, drafter: the engine's models; no drafter drafts nothing.
        req_indices: int64 [B].
        root_tokens: int64 [B], each request's last emitted token.
        history: of all slots.
        verify_limits: int64 [B], as in :meth:`ElasticBudgetScheduler.begin`.
        num_other_tokens: rows that prefill takes of the same forward pass.
        early_stop: stop drafting once no request is active. It waits for one flag a layer; a host inside a CUDA graph must not.
        tier: made by the scheduler from what the host knows. Defaults to one made here, for which slots and history are copied to
            the host: on a GPU the step then begins with a wait.
        eos_tokens, max_new_tokens: where answers end, as in :meth:`Accepted.truncate`.

    Returns:
        The step, and the history after it.
    """
    clock, drafting = time.perf_counter, 0.0
    start = clock()
    plan = (
        scheduler.choose_tier(history.to("cpu"), req_indices.cpu(), num_other_tokens)
        if tier is None
        else tier
    )
    tree = scheduler.begin(
        root_tokens, verify_limits=verify_limits, num_verify_tokens=plan.num_verify_tokens
    )
    for _ in range(plan.depth if drafter is not None else 0):
        if drafter is None or (early_stop and not bool(tree.active.any())):
            break
        before = clock()
        tokens, log_probs = drafter.draft(req_indices, tree.frontier)
        drafting += clock() - before
        tree = scheduler.grow(tree, tokens, log_probs)
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
    end = clock()
    seconds = Seconds(
        draft=drafting + end - kept,
        scheduling=planned - start - drafting + judged - verified,
        verify=verified - planned + kept - judged,
    )
    return Step(
        tree, packed, accepted, sampled, req_indices, plan, seconds, scheduler.gate is not None
    ), history


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
    """Answers all prompts with continuous batching: a request that ends leaves, the next one takes its slot.

    The host plans each step from what it read after the one before: the emitted tokens and the history. With ``early_stop=False`` nothing
    else waits for the device.

    Args:
        scheduler, target, drafter, early_stop: as in :func:`speculate`.
        prompts: int64 [length] each.
        max_num_reqs: requests decoded together at most.
        max_new_tokens: tokens of each answer at most; one number, or one for each prompt.
        eos_token: ends an answer, itself included; several where the model has several.
        max_verify_tokens_per_req: rows that a request may get at most.
        device: where the step's tensors live.

    Yields:
        A :class:`Step` for each step. The token that prefill sampled is the first of the request's first ``emitted``.

    Raises:
        EchoError: an argument of the wrong kind or out of range; and at the end, when all other prompts are answered, naming each
            prompt whose answer is unfinished because the target had no number for its next token (:attr:`Step.failed`).
    """
    max_num_reqs = checks.integer("max_num_reqs", max_num_reqs, 1)
    ends = frozenset(
        () if eos_token is None else checks.integers("eos_token", eos_token, 0).ravel().tolist()
    )
    eos_tokens = torch.tensor(sorted(ends), device=device) if ends else None
    limits = _limits(prompts, max_new_tokens)
    most = (
        scheduler.max_verify_tokens_per_req
        if max_verify_tokens_per_req is None
        else checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    )
    history = scheduler.history(max_num_reqs, device)
    known = scheduler.history(max_num_reqs)
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, int] = {}  # slot -> prompt
    roots: dict[int, int] = {}
    counts = [0] * len(prompts)
    fresh: dict[int, int] = {}  # slot -> token sampled by prefill, not emitted yet
    steps, failed, faults = 0, list[int](), list[str]()
    while waiting or running:
        free = [slot for slot in range(max_num_reqs) if slot not in running][: len(waiting)]
        if free:
            where = torch.tensor(free, device=device)
            chosen = [waiting.pop() for _ in free]
            texts = {slot: prompts[i].to(device) for slot, i in zip(free, chosen, strict=True)}
            first = checks.tensor(
                "target.admit()",
                target.admit(where, list(texts.values())),
                [len(free)],
                torch.int64,
            )
            history = history.reset(where)
            known, (sampled,) = _on_host(history, first)
            for slot, i, token in zip(free, chosen, sampled, strict=True):
                if token < 0:
                    failed.append(i)
                    faults.append(f"prompt {i} at its end")
                else:
                    running[slot], fresh[slot], roots[slot] = i, token, token
            begun = [slot for slot in free if slot in running]
            if drafter is not None and begun:
                where, first = (
                    torch.tensor([number[slot] for slot in begun], device=device)
                    for number in (range(max_num_reqs), fresh)
                )
                drafter.admit(where, [texts[slot] for slot in begun], first)
        live = sorted(running)
        if not live:
            continue
        where = torch.tensor(live, device=device)
        missing = [
            0 if fresh.get(s) in ends else limits[running[s]] - counts[running[s]] - (s in fresh)
            for s in live
        ]
        left = torch.tensor(missing, device=device)
        # A request that needs one token more, or is at its end already, has nothing to gain from drafting.
        room = torch.where(left > 1, most, 1)
        roots_now = torch.tensor([roots[s] for s in live], device=device)
        options: dict[str, Any] = {
            "verify_limits": room,
            "early_stop": early_stop,
            "tier": scheduler.choose_tier(known, live),
        }
        ending: dict[str, Any] = {"eos_tokens": eos_tokens, "max_new_tokens": left}
        step, history = speculate(
            scheduler, target, drafter, where, roots_now, history, **options, **ending
        )
        steps += 1
        known, (tokens, lengths) = _on_host(
            history, step.accepted.tokens, step.accepted.num_emitted
        )
        emitted, finished = [], []
        requests = tuple(running[s] for s in live)
        for slot, request, row, length in zip(live, requests, tokens, lengths, strict=True):
            new = ([fresh.pop(slot)] if slot in fresh else []) + row[:length]
            counts[request] += len(new)
            emitted.append(tuple(new))
            if counts[request] == limits[request] or (new and new[-1] in ends):
                finished.append(request)
            elif not length:
                failed.append(request)
                faults.append(
                    f"prompt {request} after {counts[request]} tokens of its answer, in step {steps}"
                )
            else:
                roots[slot] = row[length - 1]
                continue
            del running[slot]
        yield replace(
            step,
            requests=requests,
            emitted=tuple(emitted),
            finished=tuple(finished),
            failed=tuple(failed),
        )
        failed = []
    if faults:
        raise EchoError(
            f"target: expected a number in the row of each root, got none for {'; '.join(faults)}"
        )


def _on_host(history: History, *values: Tensor) -> tuple[History, list[Any]]:
    """What :func:`decode` reads after an admission or a step, the history and some values: the one place where it waits for the device."""
    return history.to("cpu"), [value.tolist() for value in values]


def _limits(prompts: Sequence[Tensor], max_new_tokens: object) -> list[int]:
    """Tokens of each answer at most. Checks both arguments."""
    given = checks.integers("max_new_tokens", max_new_tokens, 1)
    limits: list[int] = (given.repeat(len(prompts)) if given.ndim == 0 else given).tolist()
    if len(limits) != len(prompts):
        raise EchoError(
            f"max_new_tokens: expected one number for each of {len(prompts)} prompts, got {len(limits)}"
        )
    for number, prompt in enumerate(prompts):
        if len(checks.tensor(f"prompts[{number}]", prompt, ["length"], torch.int64)) == 0:
            raise EchoError(f"prompts[{number}]: expected at least one token, got none")
    return limits
