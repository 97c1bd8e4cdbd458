"""SGLang's EAGLE worker, planned by ECHO: a plugin, found by SGLang's registry once it is installed (docs/sglang.md).

Eight hooks, no patch. Before the draft: depth from the forecast, which picks one of the captured graph sets. After it: what the beam
drafted is scored, gated, bought and packed, and becomes the verify input. After verify: history. SGLang samples and accepts; with
``ECHO_RAGGED`` the target's forward pass has the packed rows alone, and attention is its prefix kernel, our tree part and a merge.

Environment (all optional): ``ECHO_CALIBRATION`` and ``ECHO_COST``, JSON files of an :class:`echo.Calibration` and an
:class:`echo.CostModel`; ``ECHO_ROWS``, rows of a step; ``ECHO_DEPTHS``, depths to capture beside ``--speculative-num-steps``, such as
"0,2"; ``ECHO_RAGGED=1``; ``ECHO_WARMUP``, a file for warm-up rows. With none of them its trees are EAGLE's own.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import echo_sglang_ragged as ragged
import torch
from torch import Tensor

import echo
from echo.tree import layouts

WARMUP_STEPS = 500  # decode steps in a warm-up file


def register() -> None:
    """The entry point: called by SGLang's plugin loader in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    speculative, attention = (
        "sglang.srt.speculative",
        "sglang.srt.layers.attention.triton_backend.TritonAttnBackend",
    )
    hooks = {
        f"{speculative}.eagle_worker_v2.EAGLEWorkerV2.init_cuda_graphs": (capture, HookType.AFTER),
        f"{speculative}.eagle_worker_v2.EAGLEWorkerV2.forward_batch_generation": (
            before_draft,
            HookType.AROUND,
        ),
        f"{speculative}.eagle_utils.organize_draft_results": (keep_candidates, HookType.AROUND),
        f"{speculative}.eagle_worker_common.build_eagle_verify_input": (
            after_draft,
            HookType.AROUND,
        ),
        f"{speculative}.eagle_worker_v2.EAGLEWorkerV2.verify": (after_verify, HookType.AROUND),
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation": (
            ragged.forward,
            HookType.AROUND,
        ),
        f"{attention}.init_forward_metadata": (ragged.metadata, HookType.AFTER),
        f"{attention}._forward_extend_kernel": (ragged.attention, HookType.AROUND),
    }
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(target, hook, kind)


@dataclass
class Planner:
    """What a worker remembers between steps; everything that decides is a value of ECHO's.

    Attributes:
        scheduler: the policy.
        history: by SGLang's request slots (``req_pool_indices``), on the device.
        generation: int32 [slots], its ``generation`` as the host knows it.
        seen: histories on their way to the host, the oldest first. A plan reads the one of two steps ago: its copy is over, and every
            rank reads the same one.
        states: captured graph sets by depth (SGLang's ``SpecRuntimeState``).
        shape: the forecast of this step.
        ragged: the target verifies packed rows instead of n for every request.
        warmup, logs: the file for warm-up rows, until it is written, and what goes into it.
    """

    scheduler: echo.ElasticBudgetScheduler
    history: echo.History
    generation: Tensor
    seen: deque[tuple[echo.History, Any]] = field(default_factory=lambda: deque(maxlen=2))
    states: dict[int, Any] = field(default_factory=dict)
    shape: echo.budget.Tier | None = None
    ragged: bool = False
    warmup: Path | None = None
    logs: list[echo.WarmupLog] = field(default_factory=list)

    @classmethod
    def of(cls, worker: Any) -> Planner:
        """The planner of an ``EAGLEWorkerV2``; its target worker carries it, because both sides of the step know that one."""
        target = worker.target_worker
        if not hasattr(target, "echo_planner"):
            pool = target.model_runner.req_to_token_pool
            policy = scheduler(
                worker.topk, worker.speculative_num_steps, worker.speculative_num_draft_tokens
            )
            warmup, packs = (
                os.environ.get("ECHO_WARMUP"),
                os.environ.get("ECHO_RAGGED", "") not in ("", "0"),
            )
            if packs:
                ragged.supported(target.model_runner.attn_backend)
            if warmup and policy.gate is not None:
                raise echo.EchoError(
                    "ECHO_WARMUP: expected a policy without a gate, which would hide rows; unset ECHO_CALIBRATION"
                )
            history = policy.history(pool.req_to_token.shape[0], pool.req_to_token.device)
            known = torch.zeros(len(history.generation), dtype=torch.int32)
            target.echo_planner = cls(
                policy, history, known, ragged=packs, warmup=Path(warmup) if warmup else None
            )
        return target.echo_planner

    def admit(self, batch: Any) -> None:
        """New requests in these slots: what is known of their former owners is forgotten."""
        self.history = self.history.reset(batch.req_pool_indices.long())
        self.generation = self.generation.index_add(
            0, host_slots(batch), torch.ones(len(batch.reqs), dtype=torch.int32)
        )

    def plan(self, worker: Any, batch: Any) -> None:
        """Depth and rows of this step, from two steps ago; switches to the shallowest captured graph set that is deep enough."""
        history, copied = (
            self.seen[0] if self.seen else (self.scheduler.history(len(self.generation)), None)
        )
        if copied is not None:
            copied.synchronize()
        self.shape = self.scheduler.choose_tier(
            history.without_stale(self.generation), host_slots(batch)
        )
        deep_enough = [depth for depth in self.states if depth >= self.shape.depth]
        if deep_enough:
            worker.apply_runtime_state(self.states[min(deep_enough)])

    def observe(self, slots: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted) -> None:
        """Remembers the step, and starts its copy to the host."""
        self.history = self.history.observe(slots, packed, accepted)
        self.seen.append(to_host(self.history))


def scheduler(topk: int, steps: int, n: int) -> echo.ElasticBudgetScheduler:
    """The policy that the environment asks for, for trees of ``steps`` layers and ``n`` rows; EAGLE's own where it asks for none."""
    calibration, cost, rows = (
        os.environ.get(f"ECHO_{name}") for name in ("CALIBRATION", "COST", "ROWS")
    )
    learnt = echo.Calibration.load(calibration) if calibration else None
    if learnt is not None and cost:
        policy = echo.ElasticBudgetScheduler.throughput_optimal(
            learnt, echo.CostModel.from_json(Path(cost).read_text()), beam=topk
        )
    elif learnt is not None and rows:
        policy = echo.ElasticBudgetScheduler.paper(
            learnt, k_max=int(rows), beam=topk, max_extra_tokens=n
        )
    elif rows:
        policy = echo.ElasticBudgetScheduler(echo.GlobalRank(topk), budget=int(rows))
    else:
        policy = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=n, beam=topk)
    return replace(policy, max_depth=steps, max_verify_tokens_per_req=n)


def host_slots(batch: Any) -> Tensor:
    """int64 [B]: ``req_pool_indices`` without a read-back."""
    return torch.tensor([request.kv.req_pool_idx for request in batch.reqs], dtype=torch.int64)


def to_host(history: echo.History) -> tuple[echo.History, Any]:
    """A copy in pinned memory and the event after it; the history itself where it is on the host already."""
    if history.generation.device.type == "cpu":
        return history, None
    pinned = {
        f.name: torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
        for f in fields(history)
        if isinstance(part := getattr(history, f.name), Tensor)
    }
    copied = torch.cuda.Event()
    copied.record()
    return replace(history, **pinned), copied


def capture(_: Any, worker: Any) -> None:
    """After SGLang captured its own graphs: the graph sets of the other depths, and the one that it starts with."""
    from sglang.srt.speculative import eagle_worker_v2 as engine

    planner, deepest, n = (
        Planner.of(worker),
        worker.speculative_num_steps,
        worker.speculative_num_draft_tokens,
    )
    others = {int(depth) for depth in os.environ.get("ECHO_DEPTHS", "").split(",") if depth} - {
        deepest
    }
    scopes = engine.speculative_moe_backend_context, engine.speculative_moe_a2a_backend_context
    for depth in sorted(others):
        most = 1 + (worker.topk + (depth - 1) * worker.topk**2 if depth else 0)
        with engine.draft_tp_context(worker.draft_parallel_layout), scopes[0](), scopes[1]():
            planner.states[depth] = worker.build_adaptive_runtime_state(depth, min(n, most))
    if others:
        draft, runner = worker.draft_worker, worker.target_worker.model_runner
        planner.states[deepest] = engine.SpecRuntimeState(
            deepest, n, draft.draft_attn_backend, draft.cuda_graph_runner, runner.attn_backend, runner.decode_cuda_graph_runner,
            draft.draft_extend_attn_backend, draft.cuda_graph_runner_for_draft_extend,
        )  # fmt: skip


def before_draft(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Prefill: its request slots have new owners. Decode: the forecast."""
    planner = Planner.of(worker)
    if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
        planner.admit(batch)
    elif not batch.forward_mode.is_idle():
        planner.plan(worker, batch)
    return original(worker, batch, *args, **kwargs)


def keep_candidates(
    original: Any, score_list: Any, token_list: Any, parents_list: Any, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All that was drafted, in place of EAGLE's best n - 1: parents of each block, path probabilities [B, T], tokens [B, T].

    It runs inside the captured draft graph, so the selection itself waits until the graph is over.
    """
    if score_list[0].shape[-1] == 1:
        return original(score_list, token_list, parents_list, n)
    scores = torch.cat([own.flatten(1) for own in score_list], dim=1)
    parents = (
        torch.cat(parents_list[:-1], dim=1) if len(parents_list) > 1 else parents_list[0][:, :1]
    )
    return parents, scores, torch.cat(token_list, dim=1)


def plan(
    policy: echo.ElasticBudgetScheduler,
    roots: Tensor,
    parents: Tensor,
    scores: Tensor,
    tokens: Tensor,
    depth: int,
    rows: int,
    n: int,
) -> tuple[echo.SuperTree, echo.PackedTree]:
    """Plants and packs a tree, and in between grows it from a beam that is drafted already, gates and purchases included.

    Args:
        policy: the scheduler.
        roots: int64 [B].
        parents: int64 [B, blocks], the candidate that each block of k candidates follows; -1: the root.
        scores, tokens: float and int64 [B, T], the candidates' path probabilities and tokens, block after block.
        depth: layers to grow.
        rows, n: rows of the step, and of a request at most.
    """
    tree = policy.begin(
        roots, verify_limits=torch.full_like(roots, n), num_verify_tokens=max(1, rows)
    )
    k = scores.shape[1] // parents.shape[1]
    path = scores.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    node = torch.full_like(tree.frontier.token, -1)
    for _ in range(depth):
        follows = parents[:, None] == node[..., None]
        block = follows.int().argmax(dim=-1, keepdim=True)
        below = (block * k + torch.arange(k, device=block.device)).flatten(1)
        above = torch.where(node < 0, 0.0, path.gather(1, node.clamp(min=0)))
        shape = (*node.shape, k)
        log_probs = torch.where(
            follows.any(dim=-1, keepdim=True),
            path.gather(1, below).view(shape) - above[..., None],
            -torch.inf,
        )
        tree = policy.grow(tree, tokens.gather(1, below).view(shape), log_probs)
        node = below.gather(1, tree.frontier.index)
    return tree, policy.pack(tree)


def after_draft(
    original: Any,
    batch: Any,
    draft_input: Any,
    parents: Tensor,
    scores: Tensor,
    tokens: Tensor,
    draft_probs: Any,
    **kwargs: Any,
) -> Any:
    """Score, gate, buy, deal and pack; then SGLang's verify input of n rows a request. A chain (topk 1) has no probabilities: its own."""
    if batch.forward_mode.is_idle() or kwargs["topk"] == 1:
        return original(batch, draft_input, parents, scores, tokens, draft_probs, **kwargs)
    target, n = kwargs["target_worker"], kwargs["num_draft_tokens"]
    planner: Planner = target.echo_planner
    roots, depth = (
        draft_input.bonus_tokens.long(),
        min(planner.scheduler.max_depth, kwargs["num_steps"]),
    )
    rows = (
        min(planner.shape.num_verify_tokens, len(roots) * n) if planner.ragged else len(roots) * n
    )
    tree, own = plan(planner.scheduler, roots, parents, scores, tokens, depth, rows, n)
    packed = of_rank_0(own)
    made = verify_input(batch, packed, target, n, kwargs)
    made.echo_packed, made.echo_tree, made.echo_ragged = packed, tree, planner.ragged
    return made


def verify_input(
    batch: Any, packed: echo.PackedTree, target: Any, n: int, drafted: dict[str, Any]
) -> Any:
    """SGLang's ``EagleVerifyInput``, its mask in the backend's own buffer where that has one."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    buffer, mode, size = (
        target.model_runner.attn_backend.verify_mask,
        drafted["tree_mask_mode"],
        None,
    )
    out = buffer.buffer if buffer is not None and buffer.fits(packed.batch) else None
    mode = (mode if buffer is None else buffer.mode).name
    if mode == "FULL_MASK":
        total = (
            packed.batch * target.model_runner.attn_backend.max_context_len
            if batch.seq_lens_sum is None
            else batch.seq_lens_sum
        )
        size = n * (total + n * packed.batch) if out is None else out.numel()
        mask = layouts.sglang_mask(packed, n, mode, prefix_lens=batch.seq_lens, size=size, out=out)
    else:
        mask = layouts.sglang_mask(packed, n, mode).flatten()
        mask = mask if out is None else out[: mask.numel()].copy_(mask)
    links = layouts.sglang(packed, n, batch.seq_lens)
    return EagleVerifyInput(
        draft_token=links.draft_tokens, custom_mask=mask, positions=links.positions, retrieve_index=links.retrive_index,
        retrieve_next_token=links.retrive_next_token, retrieve_next_sibling=links.retrive_next_sibling, retrieve_cum_len=None,
        spec_steps=drafted["num_steps"], topk=drafted["topk"], draft_token_num=n, capture_hidden_mode=None, seq_lens_sum=None,
        seq_lens_cpu=None,
    )  # fmt: skip


def of_rank_0(packed: echo.PackedTree) -> echo.PackedTree:
    """The plan that all tensor-parallel ranks follow."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return packed
    sizes = {
        "batch": packed.batch,
        "rows": packed.num_rows,
        "words": packed.mask.shape[1],
        "max_depth": packed.max_depth,
    }
    return echo.PackedTree.from_buffer(group.broadcast(packed.to_buffer(), src=0), **sizes)


def after_verify(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """What SGLang accepted, in packed rows: history, and warm-up rows where asked for."""
    verified, planner = batch.spec_info, Planner.of(worker)
    result = original(worker, batch, *args, **kwargs)
    if batch.forward_mode.is_idle():
        return result
    slots, packed = batch.req_pool_indices.long(), getattr(verified, "echo_packed", None)
    if packed is None and verified.draft_token_num > 1:  # a chain
        return result
    if packed is None:  # nothing drafted: it counts as a step all the same
        packed = planner.scheduler.pack(
            planner.scheduler.begin(torch.zeros_like(slots), num_verify_tokens=max(1, len(slots)))
        )
    accepted = accept(packed, result, verified.draft_token_num)
    planner.observe(slots, packed, accepted)
    if planner.warmup is not None and getattr(verified, "echo_tree", None) is not None:
        planner.logs.append(
            echo.loop.warmup_log(verified.echo_tree, packed, accepted, len(planner.logs) * 4096)
        )
        if len(planner.logs) == WARMUP_STEPS:
            echo.WarmupLog.concat(planner.logs).save(planner.warmup)
            planner.warmup, planner.logs = None, []
    return result


def accept(packed: echo.PackedTree, result: Any, n: int) -> echo.tree.Accepted:
    """SGLang's ``accept_index`` and tokens, whose accepted path lies at the front of each request's n by now, as ours."""
    index, lengths = result.accept_index.long(), result.accept_lens.long()
    steps = torch.arange(index.shape[1], device=index.device)
    kept = (steps < lengths[:, None]) & (index >= 0)
    tokens = torch.where(kept, result.next_token_ids.view(-1, n)[:, : len(steps)].long(), -1)
    rows = torch.where(kept, index % n + packed.indptr[:-1, None], -1)
    return echo.tree.Accepted.of(tokens, rows, lengths)
