"""One speculative step composed from the parts, and a continuous-batching loop around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from echo import checks, kernels
from echo.budget.goodput import Forecast
from echo.budget.history import History
from echo.budget.rules import place
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.errors import EchoError
from echo.logs import WarmupLog
from echo.tree.accepted import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import Frontier, SuperTree, bits


class Target(Protocol):
    """The large model with its cache and its sampler. Requests live in slots; ``slots`` int64 [B] says where."""

    def admit(self, slots: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Prefills ``prompts`` (int64 [length] each) into ``slots``; int64 [B], the first token sampled after each."""

    def verify(self, slots: Tensor, packed: PackedTree, /) -> Tensor:
        """One forward pass over the rows of ``packed``; int64 [N], the token sampled after each row (pads: anything)."""

    def keep(self, slots: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Makes ``accepted.rows`` of ``packed``, in order, the new end of each request's cache, and drops the others."""


class Drafter(Protocol):
    """What proposes tokens, in the target's ``slots``. Its state must depend on nothing but the emitted text."""

    def admit(self, slots: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """New requests, right after the target admitted their ``prompts``; ``first`` int64 [B], their first tokens."""

    def draft(self, slots: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Candidates after each node of the ``frontier``: tokens int64 [B, W, k] and log-probabilities float [B, W, k].

        Slots with fewer than k candidates are filled with -inf. k may differ from depth to depth. A step's first frontier is of depth
        0, or of depth 1 where ``plant`` was given a first layer.
        """

    def keep(self, slots: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """The step is over: of ``packed``, ``accepted.rows`` stay, and ``accepted.tokens`` were emitted."""


@dataclass(frozen=True)
class Seconds:
    """Wall time of a step by part, on the host's clock.

    Attributes:
        draft: the drafter's calls.
        control: planning, packing, judging.
        verify: the target's forward pass and its cache.
    """

    draft: float = 0.0
    control: float = 0.0
    verify: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.draft + self.control + self.verify


@dataclass(frozen=True)
class Step:
    """What happened in one step.

    Attributes:
        tree, packed, accepted: the values of the step.
        sampled: int64 [N], the target's tokens.
        slots: int64 [B].
        forecast: depth and rows planned.
        seconds: where the time went.
        gated: a gate kept nodes from being drafted.
        requests: for steps of :func:`decode`, which prompt each of the B requests answers.
        emitted: for steps of :func:`decode`, the tokens each emitted, cut at its end.
        finished: for steps of :func:`decode`, the prompts answered in full with this step.
    """

    tree: SuperTree
    packed: PackedTree
    accepted: Accepted
    sampled: Tensor
    slots: Tensor
    forecast: Forecast
    seconds: Seconds
    gated: bool
    requests: tuple[int, ...] = ()
    emitted: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()

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
        return warmup_rows(self.tree, self.packed, self.accepted, first_step, weights=weights)


def warmup_rows(
    tree: SuperTree, packed: PackedTree, accepted: Accepted, first_step: int = 0, *, weights: Tensor | None = None
) -> WarmupLog:
    """Each verified drafted node with its path probability, its rank in its layer, and whether its whole path was accepted.

    Nodes that no row was spent on are missing, not rejected: warm up with a rule that buys the best of every layer.

    Args:
        tree, packed, accepted: of one step.
        first_step: id of this step's first request-step; the next B - 1 ids are used too.
        weights: float [B, depths + 1], inverse-probability weights by request and depth (:meth:`echo.ExploringGate.weights`); rows of
            weight 0 are left out. None: all 1, for steps drafted without a gate.

    Raises:
        EchoError: weights of another shape or dtype.
    """
    rank, taken = outcomes(tree, packed, accepted)
    kept = packed.depth > 0
    weight = torch.ones(packed.rows, dtype=torch.float32, device=kept.device)
    if weights is not None:
        checks.tensor("weights", weights, [tree.batch, "depths + 1"], checks.FLOATS, kept.device)
        if weights.shape[1] <= tree.depth:
            raise EchoError(f"weights: expected a column for each depth from 0 to {tree.depth}, got {weights.shape[1]} columns")
        weight = weights.detach()[packed.request.long().clamp(max=tree.batch - 1), packed.depth.long()].float()
        kept = kept & (weight > 0)
    return WarmupLog.from_arrays(
        depth=packed.depth[kept].cpu().numpy(),
        confidence=packed.score[kept].exp().cpu().numpy(),
        accepted=taken[kept].cpu().numpy(),
        rank=rank[kept].cpu().numpy(),
        weight=weight[kept].cpu().numpy(),
        step=(first_step + packed.request[kept].long()).cpu().numpy(),
    )


def outcomes(tree: SuperTree, packed: PackedTree, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """The labels of a step's rows, on the device and without a read-back: what :meth:`echo.LiveHistograms.update` counts.

    Args:
        tree, packed, accepted: the values of one step.

    Returns:
        rank int64 [N], each row's place among its request's candidates of its depth, by path probability (0 on roots and pads); and
        bool [N], whether the target accepted the whole path to it.
    """
    checks.instance("tree", tree, SuperTree)
    extra = checks.instance("packed", packed, PackedTree).rows  # "no row", -1, falls on one row more, that is cut off
    rows = torch.where(accepted.rows < 0, extra, accepted.rows).flatten()
    taken = torch.zeros(packed.rows + 1, dtype=torch.bool, device=packed.tokens.device).index_fill(0, rows, True)
    ranks = torch.cat([place(bits(layer.score).long()) for layer in tree.layers], dim=1).flatten()
    drafted = packed.depth > 0
    return torch.where(drafted, ranks[packed.node.clamp(0, len(ranks) - 1)], 0), taken[:-1] & drafted


def verify(packed: PackedTree, target_tokens: Tensor | None = None, *, logits: Tensor | None = None, backend: str = "auto") -> Accepted:
    """Accepts, from each root down, the child that equals the target's own token.

    Lossless for greedy decoding and for sampling, whatever was drafted and selected: every emitted token is the target's.

    Args:
        packed: the step.
        target_tokens: int64 [N], the token that the engine sampled after each row.
        logits: float [N, V] instead, for greedy decoding; NaN never wins.
        backend: "auto", "torch" or "triton", as in :mod:`echo.kernels`; both give the same bits.

    Raises:
        EchoError: neither or both were given, shapes or dtypes that do not fit, or a backend that is not there.
    """
    if (target_tokens is None) == (logits is None):
        raise EchoError("target_tokens, logits: expected exactly one of them")
    device = checks.instance("packed", packed, PackedTree).tokens.device
    links = packed.parent, packed.indptr, packed.tokens
    if logits is not None:
        checks.tensor("logits", logits, [packed.rows, "V"], checks.FLOATS, device)
        rows, emitted, lengths = kernels.accept_greedy(*links, logits, packed.max_depth, backend=backend)
    else:
        tokens = checks.tensor("target_tokens", target_tokens, [packed.rows], torch.int64, device)
        rows, emitted, lengths = kernels.accept(*links, tokens, packed.max_depth, backend=backend)
    return Accepted(emitted, rows, lengths, emitted.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0])


def speculate(
    scheduler: ElasticBudgetScheduler,
    target: Target,
    drafter: Drafter | None,
    slots: Tensor,
    root_tokens: Tensor,
    history: History,
    *,
    capacity: Tensor | None = None,
    base_rows: int = 0,
    peek: bool = True,
) -> tuple[Step, History]:
    """One step: forecast, plant, grow, pack, target, verify, keep.

    Args:
        scheduler: the policy.
        target, drafter: the engine's models; no drafter drafts nothing.
        slots: int64 [B].
        root_tokens: int64 [B], each request's last emitted token.
        history: of all slots.
        capacity: int64 [B], as in :meth:`ElasticBudgetScheduler.plant`.
        base_rows: rows that prefill takes of the same forward pass.
        peek: stop drafting once no request is active. It reads one flag back a layer; a host inside a CUDA graph must not.

    Returns:
        The step, and the history after it.
    """
    clock, drafting = time.perf_counter, 0.0
    start = clock()
    plan = scheduler.forecast(history, slots, base_rows)
    tree = scheduler.plant(root_tokens, capacity=capacity, rows=plan.rows)
    for _ in range(plan.depth if drafter is not None else 0):
        if drafter is None or (peek and not bool(tree.active.any())):
            break
        before = clock()
        tokens, log_probs = drafter.draft(slots, tree.frontier)
        drafting += clock() - before
        tree = scheduler.grow(tree, tokens, log_probs)
    packed = scheduler.pack(tree)
    planned = clock()
    sampled = target.verify(slots, packed)
    verified = clock()
    accepted = verify(packed, sampled)
    history = history.observe(slots, packed, accepted)
    judged = clock()
    target.keep(slots, packed, accepted)
    kept = clock()
    if drafter is not None:
        drafter.keep(slots, packed, accepted)
    end = clock()
    seconds = Seconds(
        draft=drafting + end - kept,
        control=planned - start - drafting + judged - verified,
        verify=verified - planned + kept - judged,
    )
    return Step(tree, packed, accepted, sampled, slots, plan, seconds, scheduler.gate is not None), history


def decode(
    scheduler: ElasticBudgetScheduler,
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Tensor],
    *,
    slots: int,
    max_new_tokens: int | Sequence[int],
    eos_token: int | Sequence[int] | None = None,
    capacity: int | None = None,
    peek: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Step]:
    """Answers all prompts with continuous batching: a request that ends leaves, the next one takes its slot.

    Args:
        scheduler, target, drafter, peek: as in :func:`speculate`.
        prompts: int64 [length] each.
        slots: requests decoded together at most.
        max_new_tokens: tokens of each answer at most; one number, or one for each prompt.
        eos_token: ends an answer, itself included; several where the model has several.
        capacity: rows that a request may get at most.
        device: where the step's tensors live.

    Yields:
        A :class:`Step` for each step. The token that prefill sampled is the first of the request's first ``emitted``.

    Raises:
        EchoError: an argument of the wrong kind or out of range.
    """
    checks.integer("slots", slots, 1)
    ends = {eos_token} if isinstance(eos_token, int) else set(eos_token or ())
    limits = _limits(prompts, max_new_tokens)
    history = scheduler.history(slots, device)
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, int] = {}  # slot -> prompt
    roots: dict[int, int] = {}
    counts = [0] * len(prompts)
    fresh: dict[int, int] = {}  # slot -> token sampled by prefill, not emitted yet
    while waiting or running:
        free = [slot for slot in range(slots) if slot not in running][: len(waiting)]
        if free:
            where = torch.tensor(free, device=device)
            chosen = [waiting.pop() for _ in free]
            texts = [prompts[i].to(device) for i in chosen]
            first = checks.tensor("target.admit()", target.admit(where, texts), [len(free)], torch.int64)
            if drafter is not None:
                drafter.admit(where, texts, first)
            history = history.reset(where)
            running.update(zip(free, chosen, strict=True))
            fresh.update(zip(free, first.tolist(), strict=True))
            roots.update(fresh)
        live = sorted(running)
        where = torch.tensor(live, device=device)
        left = torch.tensor([limits[running[s]] - counts[running[s]] - (s in fresh) for s in live], device=device)
        # Whoever needs one token more, or is at its end already, has nothing to gain from drafting.
        room = torch.where(left > 1, scheduler.max_tree_rows if capacity is None else capacity, 1)
        roots_now = torch.tensor([roots[s] for s in live], device=device)
        step, history = speculate(scheduler, target, drafter, where, roots_now, history, capacity=room, peek=peek)
        emitted, finished = [], []
        requests = tuple(running[s] for s in live)
        for slot, request, tokens, length in zip(
            live, requests, step.accepted.tokens.tolist(), step.accepted.lengths.tolist(), strict=True
        ):
            new = ([fresh.pop(slot)] if slot in fresh else []) + tokens[:length]
            new = new[: limits[request] - counts[request]]
            new = new[: next((i + 1 for i, token in enumerate(new) if token in ends), len(new))]
            counts[request] += len(new)
            roots[slot] = tokens[length - 1]
            emitted.append(tuple(new))
            if counts[request] == limits[request] or new[-1] in ends:
                finished.append(request)
                del running[slot]
        yield replace(step, requests=requests, emitted=tuple(emitted), finished=tuple(finished))


def _limits(prompts: Sequence[Tensor], max_new_tokens: int | Sequence[int]) -> list[int]:
    """Tokens of each answer at most. Checks both arguments."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise EchoError(f"max_new_tokens: expected one number for each of {len(prompts)} prompts, got {len(limits)}")
    for limit in limits:
        checks.integer("max_new_tokens", limit, 1)
    for number, prompt in enumerate(prompts):
        if len(checks.tensor(f"prompts[{number}]", prompt, ["length"], torch.int64)) == 0:
            raise EchoError(f"prompts[{number}]: expected at least one token, got none")
    return limits
