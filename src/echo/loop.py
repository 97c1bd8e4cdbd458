"""One speculative step composed of the library's parts, and a continuous-batching loop around it.

B requests, W nodes of a frontier, k candidates of a node, N packed rows.
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
from echo.tree.sampling import by_node
from echo.tree.supertree import Frontier, SuperTree, cost_bits


class Target(Protocol):
    """The target model, with its KV cache and sampler.

    ``req_indices`` int64 [B], below ``max_num_reqs``, identify each request's state.
    """

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], /) -> Tensor:
        """Prefill the ``prompts``, int64 [length] each; return their first tokens, int64 [B]."""

    def verify(self, req_indices: Tensor, packed: PackedTree, /) -> Tensor:
        """Run one forward pass over ``packed``; return the token sampled at each row, int64 [N]."""

    def compact(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Keep the KV entries of ``accepted.rows``, in order; drop the others of ``packed``."""


class Drafter(Protocol):
    """The draft model. ``req_indices`` are the target's; state depends on the emitted text only."""

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor, /) -> None:
        """Start new requests after the target's prefill of ``prompts``, int64 [length] each.

        ``first`` int64 [B] are the tokens sampled after the prompts.
        """

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        """Propose k candidates per node of ``frontier``: int64 tokens, float log-probs [B, W, k].

        -inf pads nodes with fewer than k; k may differ by depth. A step's first frontier has depth
        0, or 1 if :meth:`ElasticBudgetScheduler.begin` was given a first layer.
        """

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, /) -> None:
        """Draft extend: keep ``accepted.rows`` of ``packed``; ``accepted.tokens`` were emitted."""


@dataclass(frozen=True)
class Seconds:
    """Wall time of a step's parts, on the host's clock.

    Attributes:
        draft: drafter calls, draft extend included.
        scheduling: choosing the tier, growing, packing, accepting.
        verify: the target's forward pass and cache compaction.
    """

    draft: float = 0.0
    scheduling: float = 0.0
    verify: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.draft + self.scheduling + self.verify


@dataclass(frozen=True)
class Step:
    """The results of one step.

    Attributes:
        tree, packed, accepted: the step's values; ``accepted`` is truncated where answers end.
        sampled, req_indices: int64 [N], the target's token at each row, and int64 [B].
        tier: the chosen depth and number of verify tokens.
        seconds: wall time by part.
        gated: whether the scheduler has a gate.
        requests: with :func:`decode`, as below, the prompt that each of the B requests answers.
        emitted: the tokens that each request emitted: its row of ``accepted.tokens``, preceded in
            its first step by the token that prefill sampled.
        finished, failed: prompts whose answers this step completed, or that it left unfinished
            because the target has no next token.
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
        """Return the warm-up log of this step, as :func:`warmup_log`.

        Raises:
            EchoError: a gated step without weights (a biased log), or weights of another shape.
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
    """Log each judged draft token: path probability, rank in its layer, whether it was accepted.

    Unverified nodes are missing, not rejected, so warm up with a rule that commits the best of
    every layer. So are nodes that were not judged (:attr:`Accepted.num_accepted_drafts`).

    Args:
        tree, packed, accepted: the values of one step.
        first_step: id of this step's first request-step; the others take the next B - 1 ids.
        weights: float [B, depths + 1], inverse-probability weights by request and depth
            (:meth:`echo.gating.ExploringGate.weights`); tokens of weight 0 are left out. Defaults
            to 1, for steps without a gate.

    Raises:
        EchoError: values of different steps, or weights of another shape or dtype.
    """
    rank, taken = draft_labels(tree, packed, accepted)
    kept = (packed.depth > 0) & (rank >= 0)
    weight = torch.ones(packed.num_rows, dtype=torch.float32, device=kept.device)
    if weights is not None and tree.batch:
        checks.tensor("weights", weights, [tree.batch, "depths + 1"], checks.FLOATS, kept.device)
        count = weights.shape[1]
        if count <= tree.depth:
            expected = f"a column for each depth from 0 to {tree.depth}"
            raise EchoError(f"weights: expected {expected}, got {count} columns")
        request = packed.request.long().clamp(max=tree.batch - 1)
        weight = weights.detach()[request, packed.depth.long()].float()
        kept = kept & (weight > 0)
    columns: dict[str, Tensor] = {
        "depth": packed.depth,
        "confidence": packed.score.exp(),
        "accepted": taken,
        "rank": rank,
        "weight": weight,
        "step": first_step + packed.request.long(),
    }
    arrays: dict[str, Any] = {name: x[kept].cpu().numpy() for name, x in columns.items()}
    return WarmupLog.from_arrays(**arrays)


def draft_labels(tree: SuperTree, packed: PackedTree, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """Label a step's rows for :meth:`echo.gating.LiveHistograms.update`. Sync-free.

    Args:
        tree, packed, accepted: the values of one step; else an EchoError.

    Returns:
        rank int64 [N] by path probability among the request's candidates of that depth (0 on roots
        and pads), -1 where the target did not judge (:attr:`Accepted.num_accepted_drafts`); and
        bool [N], whether the whole path to a row was accepted.
    """
    batch = checks.instance("tree", tree, SuperTree).batch
    num_rows = checks.instance("packed", packed, PackedTree).num_rows
    emitted = checks.instance("accepted", accepted, Accepted).num_emitted
    checks.integer("packed.batch", packed.batch, batch, batch)
    most = tree.depth if packed.num_layers is None else None  # a workspace's is a bound
    checks.integer("packed.max_depth", packed.max_depth, tree.depth, most)
    checks.tensor("accepted.rows", accepted.rows, [batch, packed.max_depth + 1], torch.int64)
    drafts = accepted.num_accepted_drafts
    ends = [] if accepted.cut_row is None else [accepted.cut_row]
    rows = torch.cat([accepted.rows.flatten(), *ends])
    rows = torch.where(rows < 0, num_rows, rows)  # -1 (no row) marks an extra entry, cut off below
    taken = torch.zeros(num_rows + 1, dtype=torch.bool, device=packed.tokens.device)
    with checks.reading("accepted.rows: expected rows of packed"):
        taken = taken.index_fill(0, rows, True)[:-1]
    deepest = F.pad(torch.where(drafts < emitted, packed.max_depth, drafts), (0, 1))
    by_layer = [ranks(cost_bits(layer.score).long()) for layer in tree.layers]
    rank = by_node(packed, tree, torch.cat(by_layer, dim=1), 0)
    drafted = packed.depth > 0
    judged = packed.depth <= deepest[packed.request]
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
    """Run one step: begin, draft and grow, pack, verify, accept, compact. Tensors share a device.

    Args:
        scheduler: the policy.
        target, drafter: the engine's models; without a drafter nothing is drafted.
        req_indices, root_tokens: int64 [B], the latter each request's last emitted token.
        history: acceptance history of all requests.
        verify_limits: int64 [B], as in :meth:`ElasticBudgetScheduler.begin`.
        num_other_tokens: prefill tokens in the same forward pass.
        early_stop: stop drafting once no request is active, which reads one flag per layer from the
            device; must be False inside a CUDA graph.
        tier: from :meth:`ElasticBudgetScheduler.choose_tier`. Defaults to one chosen here from host
            copies of indices and history, which on a GPU is a sync.
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
        >>> len(step.log()), warmup_log(*values).accepted.tolist()  # one row per draft token
        (3, [True, False, True])
        >>> rank, taken = draft_labels(*values)  # on the device, of all rows
        >>> rank.tolist(), taken.tolist()
        ([0, 0, 1, 0], [False, True, False, True])
    """
    drafting = 0.0
    start = time.perf_counter()
    if tier is None:
        tier = scheduler.choose_tier(history.to("cpu"), req_indices.cpu(), num_other_tokens)
    checks.instance("tier", tier, Tier)
    count = tier.num_verify_tokens
    tree = scheduler.begin(root_tokens, verify_limits=verify_limits, num_verify_tokens=count)
    while drafter is not None and scheduler.deeper(tree, tier):
        if early_stop and not bool(tree.active.any()):
            break
        before = time.perf_counter()
        tokens, log_probs = drafter.draft(req_indices, tree.frontier)
        drafting += time.perf_counter() - before
        tree = scheduler.grow(tree, tokens, log_probs, beam=tier.beam)
    if scheduler.trims:
        tree = scheduler.trim(tree, tier, num_other_tokens)
    packed = scheduler.pack(tree)
    planned = time.perf_counter()
    sampled = target.verify(req_indices, packed)
    verified = time.perf_counter()
    accepted = accept(packed, sampled, eos_tokens=eos_tokens, max_new_tokens=max_new_tokens)
    history = history.observe(req_indices, packed, accepted)
    judged = time.perf_counter()
    target.compact(req_indices, packed, accepted)
    kept = time.perf_counter()
    if drafter is not None:
        drafter.extend(req_indices, packed, accepted)
    seconds = Seconds(
        draft=drafting + time.perf_counter() - kept,
        scheduling=planned - start - drafting + judged - verified,
        verify=verified - planned + kept - judged,
    )
    gated = scheduler.gate is not None
    return Step(tree, packed, accepted, sampled, req_indices, tier, seconds, gated), history


@dataclass
class _Answer:
    """A running request: prompt, tokens still to emit, next root (``fresh``: not emitted yet)."""

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

    The host chooses each step's tier from the emitted tokens and history of the previous step. With
    ``early_stop=False`` there is no other sync.

    Args:
        scheduler, target, drafter, early_stop: as in :func:`speculate`.
        prompts: int64 [length] each.
        max_num_reqs: maximum number of requests decoded together.
        max_new_tokens: limit of each answer: one number, or one per prompt.
        eos_token: token or tokens that end an answer, as its last token.
        max_verify_tokens_per_req: defaults to the scheduler's.
        device: of the step's tensors.

    Yields:
        One :class:`Step` per step. A request's first ``emitted`` begins with prefill's token.

    Raises:
        EchoError: an argument of the wrong kind or out of range; or, once all other prompts are
            answered, the unfinished ones (:attr:`Step.failed`).

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
    limits = _limits(prompts, max_new_tokens)
    max_tokens = scheduler.max_verify_tokens_per_req
    if max_verify_tokens_per_req is not None:
        max_tokens = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    history = scheduler.history(max_num_reqs, device)
    known = scheduler.history(max_num_reqs)
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, _Answer] = {}
    failed: list[int] = []
    faults: list[str] = []
    steps = 0
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
                kept = torch.tensor(begun, device=device)
                drafter.admit(indices[kept], [texts[row] for row in begun], first[kept])
        live = sorted(running)
        if not live:
            continue
        answers = [running[index] for index in live]
        missing = [0 if a.fresh and a.root in ends else a.remaining - a.fresh for a in answers]
        remaining = torch.tensor(missing, device=device)
        # a request with at most one token to go gains nothing from drafting
        step, history = speculate(
            scheduler,
            target,
            drafter,
            torch.tensor(live, device=device),
            torch.tensor([answer.root for answer in answers], device=device),
            history,
            verify_limits=torch.where(remaining > 1, max_tokens, 1),
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
            number = answer.prompt
            new = [answer.root] * answer.fresh + row[:length]
            answer.remaining -= len(new)
            answer.fresh = False
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
        expected = "target: expected a number in the row of each root"
        raise EchoError(f"{expected}, got none for {'; '.join(faults)}")


def _on_host(history: History, *values: Tensor) -> tuple[History, list[Any]]:
    """History and ``values`` on the host: the one device-to-host sync of :func:`decode`."""
    return history.to("cpu"), [value.tolist() for value in values]


def _limits(prompts: Sequence[Tensor], max_new_tokens: object) -> list[int]:
    """Check both arguments; return the maximum number of tokens of each answer."""
    given = checks.integers("max_new_tokens", max_new_tokens, 1)
    limits: list[int] = (given.repeat(len(prompts)) if given.ndim == 0 else given).tolist()
    if len(limits) != len(prompts):
        expected = f"one number for each of {len(prompts)} prompts"
        raise EchoError(f"max_new_tokens: expected {expected}, got {len(limits)}")
    for number, prompt in enumerate(prompts):
        if len(checks.tensor(f"prompts[{number}]", prompt, ["length"], torch.int64)) == 0:
            raise EchoError(f"prompts[{number}]: expected at least one token, got none")
    return limits
