"""SGLang's EAGLE worker, scheduled by ECHO: a plugin that SGLang's registry finds (docs/sglang.md).

Eight hooks, no patch. Before the draft the scheduler chooses the tier, whose depth picks one of the
captured graph sets. After it what was drafted is scored, gated and packed, and becomes the verify
input. After verify the history observes. SGLang samples and accepts; with ``ECHO_RAGGED`` the
target's forward pass has the packed rows only (:mod:`echo_sglang_ragged`).

Environment, all optional; with none of them its trees are EAGLE's own:

- ``ECHO_CALIBRATION``, ``ECHO_COST``: JSON of :class:`echo.Calibration`, :class:`echo.CostModel`;
- ``ECHO_VERIFY_TOKENS``: verify tokens of a step, roots included;
- ``ECHO_DEPTHS``: depths to capture beside ``--speculative-num-steps``, such as "0,2";
- ``ECHO_RAGGED=1``; ``ECHO_WARMUP``: a file for the warm-up log.

B requests, k = ``topk``, n = ``draft_token_num``.
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

    around, after = HookType.AROUND, HookType.AFTER
    speculative, worker = "sglang.srt.speculative", "eagle_worker_v2.EAGLEWorkerV2"
    backend = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"
    tp_worker = "sglang.srt.managers.tp_worker.TpModelWorker"
    for target, hook, kind in (
        (f"{speculative}.{worker}.init_cuda_graphs", capture, after),
        (f"{speculative}.{worker}.forward_batch_generation", before_draft, around),
        (f"{speculative}.eagle_utils.organize_draft_results", keep_candidates, around),
        (f"{speculative}.eagle_worker_common.build_eagle_verify_input", after_draft, around),
        (f"{speculative}.{worker}.verify", after_verify, around),
        (f"{tp_worker}.forward_batch_generation", ragged.forward, around),
        (f"{backend}.init_forward_metadata", ragged.metadata, after),
        (f"{backend}._forward_extend_kernel", ragged.attention, around),
    ):
        HookRegistry.register(target, hook, kind)


@dataclass
class Planner:
    """What a worker keeps between steps.

    Attributes:
        scheduler: the policy.
        history: by ``req_pool_indices``, on the device.
        generation: int32 [max_num_reqs], the history's, as the host knows it.
        lagged: histories on their way to the host, oldest first. A step reads that of two steps
            ago, whose copy is over: every rank reads the same one.
        states: captured graph sets (SGLang's ``SpecRuntimeState``) by depth.
        tier: of this step.
        ragged: the target verifies packed rows instead of n for every request.
        warmup, logs: the warm-up file, until it is written, and what goes into it.
    """

    scheduler: echo.ElasticBudgetScheduler
    history: echo.History
    generation: Tensor
    lagged: deque[tuple[echo.History, Any]] = field(default_factory=lambda: deque(maxlen=2))
    states: dict[int, Any] = field(default_factory=dict)
    tier: echo.budget.Tier | None = None
    ragged: bool = False
    warmup: Path | None = None
    logs: list[echo.WarmupLog] = field(default_factory=list)

    @classmethod
    def of(cls, worker: Any) -> Planner:
        """The planner of an ``EAGLEWorkerV2``, held by its target worker, which all hooks know."""
        target = worker.target_worker
        if not hasattr(target, "echo_planner"):
            steps, n = worker.speculative_num_steps, worker.speculative_num_draft_tokens
            policy, warmup = scheduler(worker.topk, steps, n), os.environ.get("ECHO_WARMUP")
            packs = os.environ.get("ECHO_RAGGED", "") not in ("", "0")
            if packs:
                ragged.supported(target.model_runner.attn_backend)
            if warmup and policy.gate is not None:
                expected = "a policy without a gate, which would bias the log"
                raise echo.EchoError(f"ECHO_WARMUP: expected {expected}; unset ECHO_CALIBRATION")
            table = target.model_runner.req_to_token_pool.req_to_token
            history = policy.history(len(table), table.device)
            generation = torch.zeros(len(table), dtype=torch.int32)
            file = Path(warmup) if warmup else None
            target.echo_planner = cls(policy, history, generation, ragged=packs, warmup=file)
        return target.echo_planner

    def admit(self, batch: Any) -> None:
        """Forgets the requests that had these ``req_pool_indices`` before."""
        self.history = self.history.reset(batch.req_pool_indices.long())
        ones = torch.ones(len(batch.reqs), dtype=torch.int32)
        self.generation = self.generation.index_add(0, host_indices(batch), ones)

    def choose_tier(self, worker: Any, batch: Any) -> None:
        """Chooses the step's tier, and the shallowest captured graph set that is deep enough."""
        empty = self.scheduler.history(len(self.generation)), None
        history, copied = self.lagged[0] if self.lagged else empty
        if copied is not None:
            copied.synchronize()
        known = history.without_stale(self.generation)
        context = getattr(batch, "seq_lens_sum", None)
        self.tier = self.scheduler.choose_tier(known, host_indices(batch), context_tokens=context)
        deep_enough = [depth for depth in self.states if depth >= self.tier.depth]
        if deep_enough:
            worker.apply_runtime_state(self.states[min(deep_enough)])

    def observe(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Updates the history, and starts its copy to the host."""
        self.history = self.history.observe(req_indices, packed, accepted)
        self.lagged.append(to_host(self.history))


def scheduler(topk: int, num_steps: int, n: int) -> echo.ElasticBudgetScheduler:
    """The policy of the environment; EAGLE's own by default.

    Args:
        topk, num_steps, n: ``--speculative-eagle-topk``, ``--speculative-num-steps`` and
            ``--speculative-num-draft-tokens``.
    """
    make, names = echo.ElasticBudgetScheduler, ("CALIBRATION", "COST", "VERIFY_TOKENS")
    calibration, cost, tokens = (os.environ.get(f"ECHO_{name}") for name in names)
    fitted = echo.Calibration.load(calibration) if calibration else None
    if fitted is not None and cost:
        model = echo.CostModel.from_json(Path(cost).read_text())
        policy = make.throughput_optimal(fitted, model, beam=topk)
    elif fitted is not None and tokens:
        policy = make.paper(fitted, k_max=int(tokens), beam=topk, max_extra_tokens=n)
    elif tokens:
        policy = make(echo.GlobalRank(topk), budget=int(tokens))
    else:
        policy = make.eagle(max_verify_tokens_per_req=n, beam=topk)
    return replace(policy, max_depth=num_steps, max_verify_tokens_per_req=n)


def host_indices(batch: Any) -> Tensor:
    """``req_pool_indices`` int64 [B] on the host, without a device-to-host sync."""
    return torch.tensor([request.kv.req_pool_idx for request in batch.reqs], dtype=torch.int64)


def to_host(history: echo.History) -> tuple[echo.History, Any]:
    """A copy in pinned memory and the event after it; of a history on the host itself and None."""
    if history.generation.device.type == "cpu":
        return history, None
    parts = {f.name: getattr(history, f.name) for f in fields(history)}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    pinned = {
        name: torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
        for name, part in tensors.items()
    }
    copied = torch.cuda.Event()
    copied.record()
    return replace(history, **pinned), copied


def capture(_: Any, worker: Any) -> None:
    """After SGLang captured its graphs: captures those of ``ECHO_DEPTHS``."""
    from sglang.srt.speculative import eagle_worker_v2 as engine

    planner, deepest = Planner.of(worker), worker.speculative_num_steps
    n, k = worker.speculative_num_draft_tokens, worker.topk
    depths = {int(depth) for depth in os.environ.get("ECHO_DEPTHS", "").split(",") if depth}
    scopes = engine.speculative_moe_backend_context, engine.speculative_moe_a2a_backend_context
    for depth in sorted(depths - {deepest}):
        candidates = k + (depth - 1) * k**2 if depth else 0
        with engine.draft_tp_context(worker.draft_parallel_layout), scopes[0](), scopes[1]():
            state = worker.build_adaptive_runtime_state(depth, min(n, 1 + candidates))
            planner.states[depth] = state
    if planner.states:
        draft, runner = worker.draft_worker, worker.target_worker.model_runner
        planner.states[deepest] = engine.SpecRuntimeState(
            deepest, n, draft.draft_attn_backend, draft.cuda_graph_runner, runner.attn_backend,
            runner.decode_cuda_graph_runner, draft.draft_extend_attn_backend,
            draft.cuda_graph_runner_for_draft_extend,
        )  # fmt: skip


def before_draft(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Prefill: new requests. Decode: the tier."""
    planner = Planner.of(worker)
    if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
        planner.admit(batch)
    elif not batch.forward_mode.is_idle():
        planner.choose_tier(worker, batch)
    return original(worker, batch, *args, **kwargs)


def keep_candidates(
    original: Any, score_list: Any, token_list: Any, parents_list: Any, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All candidates in place of EAGLE's best n - 1: ``plan``'s parents, scores, tokens.

    It runs inside the captured draft graph, so the selection waits until the graph is over.
    """
    if score_list[0].shape[-1] == 1:
        return original(score_list, token_list, parents_list, n)
    scores = torch.cat([layer.flatten(1) for layer in score_list], dim=1)
    above = parents_list[:-1] if len(parents_list) > 1 else [parents_list[0][:, :1]]
    return torch.cat(above, dim=1), scores, torch.cat(token_list, dim=1)


def plan(
    policy: echo.ElasticBudgetScheduler, bonus_tokens: Tensor, parents: Tensor, scores: Tensor,
    tokens: Tensor, depth: int, num_verify_tokens: int, n: int,
) -> tuple[echo.SuperTree, echo.PackedTree]:  # fmt: skip
    """Grows a tree from a beam that is drafted already, gates and commits included, and packs it.

    Args:
        policy: the scheduler.
        bonus_tokens: int64 [B], the roots.
        parents: int64 [B, blocks], the candidate that a block of k follows; -1: the root.
        scores, tokens: float and int64 [B, T], path probabilities and tokens, block after block.
        depth: layers to grow.
        num_verify_tokens, n: of the step, and of a request at most.
    """
    limits, total = torch.full_like(bonus_tokens, n), max(1, num_verify_tokens)
    tree = policy.begin(bonus_tokens, verify_limits=limits, num_verify_tokens=total)
    k = scores.shape[1] // parents.shape[1]
    path = scores.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    node = torch.full_like(tree.frontier.token, -1)
    for _ in range(depth):
        follows = parents[:, None] == node[..., None]
        block = follows.int().argmax(dim=-1, keepdim=True)
        below = (block * k + torch.arange(k, device=block.device)).flatten(1)
        above = torch.where(node < 0, 0.0, path.gather(1, node.clamp(min=0)))
        log_probs = path.gather(1, below).view(*node.shape, k) - above[..., None]
        log_probs = torch.where(follows.any(dim=-1, keepdim=True), log_probs, -torch.inf)
        tree = policy.grow(tree, tokens.gather(1, below).view(log_probs.shape), log_probs)
        node = below.gather(1, tree.frontier.index)
    return tree, policy.pack(tree)


def after_draft(
    original: Any, batch: Any, draft_input: Any, parents: Tensor, scores: Tensor, tokens: Tensor,
    draft_probs: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Packs the step; then SGLang's verify input of n rows a request.

    A chain (topk 1) has no probabilities: it stays SGLang's.
    """
    if batch.forward_mode.is_idle() or kwargs["topk"] == 1:
        return original(batch, draft_input, parents, scores, tokens, draft_probs, **kwargs)
    target, n = kwargs["target_worker"], kwargs["num_draft_tokens"]
    planner: Planner = target.echo_planner
    roots = draft_input.bonus_tokens.long()
    depth = min(planner.scheduler.max_depth, kwargs["num_steps"])
    total = len(roots) * n
    if planner.ragged:
        total = min(planner.tier.num_verify_tokens, total)
    tree, packed = plan(planner.scheduler, roots, parents, scores, tokens, depth, total, n)
    packed = of_rank_0(packed)
    spec_info = verify_input(batch, packed, target, n, kwargs)
    spec_info.echo_packed, spec_info.echo_tree = packed, tree
    spec_info.echo_ragged = planner.ragged
    return spec_info


def verify_input(
    batch: Any, packed: echo.PackedTree, target: Any, n: int, drafted: dict[str, Any]
) -> Any:
    """SGLang's ``EagleVerifyInput``, its mask in the attention backend's buffer if it has one."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    backend = target.model_runner.attn_backend
    buffer, mode = backend.verify_mask, drafted["tree_mask_mode"]
    out = buffer.buffer if buffer is not None and buffer.fits(packed.batch) else None
    mode = (mode if buffer is None else buffer.mode).name
    if mode == "FULL_MASK":
        total = batch.seq_lens_sum
        total = packed.batch * backend.max_context_len if total is None else total
        size = n * (total + n * packed.batch) if out is None else out.numel()
        mask = layouts.sglang_mask(packed, n, mode, prefix_lens=batch.seq_lens, size=size, out=out)
    else:
        mask = layouts.sglang_mask(packed, n, mode).flatten()
        mask = mask if out is None else out[: mask.numel()].copy_(mask)
    links = layouts.sglang(packed, n, batch.seq_lens)
    return EagleVerifyInput(
        draft_token=links.draft_tokens, custom_mask=mask, positions=links.positions,
        retrieve_index=links.retrive_index, retrieve_next_token=links.retrive_next_token,
        retrieve_next_sibling=links.retrive_next_sibling, retrieve_cum_len=None,
        spec_steps=drafted["num_steps"], topk=drafted["topk"], draft_token_num=n,
        capture_hidden_mode=None, seq_lens_sum=None, seq_lens_cpu=None,
    )  # fmt: skip


def of_rank_0(packed: echo.PackedTree) -> echo.PackedTree:
    """The plan that all tensor-parallel ranks follow."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return packed
    return echo.PackedTree.from_buffer(
        group.broadcast(packed.to_buffer(), src=0), batch=packed.batch, num_rows=packed.num_rows,
        words=packed.mask.shape[1], max_depth=packed.max_depth,
    )  # fmt: skip


def after_verify(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """What SGLang accepted: updates the history, and the warm-up log if asked for."""
    spec_info, planner = batch.spec_info, Planner.of(worker)
    result = original(worker, batch, *args, **kwargs)
    if batch.forward_mode.is_idle():
        return result
    req_indices, packed = batch.req_pool_indices.long(), getattr(spec_info, "echo_packed", None)
    if packed is None and spec_info.draft_token_num > 1:  # a chain
        return result
    if packed is None:  # nothing was drafted: a step all the same
        roots, policy = torch.zeros_like(req_indices), planner.scheduler
        packed = policy.pack(policy.begin(roots, num_verify_tokens=max(1, len(roots))))
    accepted = accept(packed, result, spec_info.draft_token_num)
    planner.observe(req_indices, packed, accepted)
    tree, logs = getattr(spec_info, "echo_tree", None), planner.logs
    if planner.warmup is not None and tree is not None:
        logs.append(echo.loop.warmup_log(tree, packed, accepted, len(logs) * 4096))
        if len(logs) == WARMUP_STEPS:
            echo.WarmupLog.concat(logs).save(planner.warmup)
            planner.warmup, planner.logs = None, []
    return result


def accept(packed: echo.PackedTree, result: Any, n: int) -> echo.tree.Accepted:
    """SGLang's ``accept_index`` and tokens as :class:`Accepted`; a path lies first among its n."""
    index, accept_lens = result.accept_index.long(), result.accept_lens.long()
    steps = torch.arange(index.shape[1], device=index.device)
    valid = (steps < accept_lens[:, None]) & (index >= 0)
    tokens = torch.where(valid, result.next_token_ids.view(-1, n)[:, : len(steps)].long(), -1)
    rows = torch.where(valid, index % n + packed.indptr[:-1, None], -1)
    return echo.tree.Accepted.of(tokens, rows, accept_lens)
