"""SGLang's EAGLE worker, scheduled by ECHO: trees, and the chains of MTP and EAGLE with topk 1.

Before the draft the scheduler chooses the tier, whose depth picks one of the captured graph sets.
In the draft's graph what was drafted is scored, gated and packed (:mod:`echo_sglang_draft`), and
becomes the verify input. After verify the history observes. SGLang samples and accepts; with
``ECHO_RAGGED`` the target's forward pass has the packed rows only (:mod:`echo_sglang_ragged`).
``SEAMS`` lists all that is touched.

Environment; with none of them set nothing is touched:

- ``ECHO_CALIBRATION``, ``ECHO_COST``: JSON of :class:`echo.Calibration`, :class:`echo.CostModel`;
- ``ECHO_VERIFY_TOKENS``: verify tokens of a step, roots included;
- ``ECHO_DEPTHS``: depths to capture beside ``--speculative-num-steps``, such as "0,2";
- ``ECHO_RAGGED=1``; ``ECHO_WARMUP``: a file for the warm-up log.

B requests, k = ``topk``, n = ``draft_token_num``.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections import deque
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import echo_sglang_draft as draft
import echo_sglang_ragged as ragged
import torch
from torch import Tensor

import echo

WARMUP_STEPS = 500  # decode steps in a warm-up file
SETTINGS = "CALIBRATION", "COST", "VERIFY_TOKENS", "DEPTHS", "RAGGED", "WARMUP"


@dataclass
class Planner:
    """What a worker keeps between steps.

    Attributes:
        plan: buffers of the step's plan, and the history by ``req_pool_indices``, on the device.
        generation: int32 [max_num_reqs], the history's, as the host knows it.
        lagged: histories on their way to the host, oldest first. A step reads that of two steps
            ago, whose copy is over: every rank reads the same one.
        depths: with a captured graph set, ascending.
        tier: of this step.
        curve, curves: what drafting would bring this rank, float32 [n], and all, [ranks, n], as
            SGLang's gather of their batches has brought them.
        ragged: the target verifies packed rows instead of n for every request.
        warmup, logs: the warm-up file, until it is written, and what goes into it.
    """

    plan: draft.Plan
    generation: Tensor
    lagged: deque[tuple[echo.History, Any]] = field(default_factory=lambda: deque(maxlen=2))
    depths: tuple[int, ...] = ()
    tier: echo.budget.Tier | None = None
    curve: Tensor | None = None
    curves: Tensor | None = None
    ragged: bool = False
    warmup: Path | None = None
    logs: list[echo.WarmupLog] = field(default_factory=list)

    @classmethod
    def of(cls, worker: Any) -> Planner:
        """The planner of an ``EAGLEWorkerV2``, held by its target worker, which all hooks know."""
        from sglang.srt.runtime_context import get_parallel
        from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

        target = worker.target_worker
        if not hasattr(target, "echo_planner"):
            if get_parallel().pp_size > 1:
                raise echo.EchoError("--pp-size: expected 1 with ECHO, got more; unset ECHO_*")
            if not isinstance(worker.draft_worker, EagleDraftWorker):
                expected = f"EAGLE, EAGLE3 or NEXTN with ECHO, got {type(worker).__name__}'s"
                raise echo.EchoError(f"--speculative-algorithm: expected {expected}; unset ECHO_*")
            steps, n = worker.speculative_num_steps, worker.speculative_num_draft_tokens
            policy, warmup = scheduler(worker.topk, steps, n), os.environ.get("ECHO_WARMUP")
            if ragged.wanted():
                ragged.check(worker)
            if warmup and policy.gate is not None:
                expected = "a policy without a gate, which would bias the log"
                raise echo.EchoError(f"ECHO_WARMUP: expected {expected}; unset ECHO_CALIBRATION")
            table = target.model_runner.req_to_token_pool.req_to_token
            plan = draft.Plan(policy, len(table), n, table.device)
            generation = torch.zeros(len(table), dtype=torch.int32)
            file = Path(warmup) if warmup else None
            target.echo_planner = cls(
                plan, generation, depths=(steps,), ragged=ragged.wanted(), warmup=file
            )
            target.model_runner.echo_planner = target.echo_planner
        return target.echo_planner

    @property
    def scheduler(self) -> echo.ElasticBudgetScheduler:
        """The policy."""
        return self.plan.space.scheduler

    def admit(self, batch: Any) -> None:
        """Forgets the requests that had these ``req_pool_indices`` before."""
        space = self.plan.space
        space.history = space.history.reset(batch.req_pool_indices.long(), out=space.history)
        ones = torch.ones(len(batch.reqs), dtype=torch.int32)
        self.generation = self.generation.index_add(0, host_indices(batch), ones)

    def known(self) -> echo.History:
        """The history of two steps ago, on the host."""
        if not self.lagged:
            return self.scheduler.history(len(self.generation))
        history, copied = self.lagged[0]
        if copied is not None:
            copied.synchronize()
        return history.without_stale(self.generation)

    def choose_tier(self, batch: Any) -> None:
        """Chooses the step's tier; with attention data parallelism all ranks choose together."""
        from sglang.srt.runtime_context import get_parallel

        context = getattr(batch, "seq_lens_sum", None)
        if get_parallel().attn_dp_enabled and len(self.depths) > 1:
            rank = get_parallel().tp_rank
            self.tier = self.scheduler.agree_on_tier(self.curves.numpy(), rank)
        else:
            requests = host_indices(batch)
            self.tier = self.scheduler.choose_tier(self.known(), requests, context_tokens=context)

    def num_rows(self, target: Any, batch: int, n: int) -> int | None:
        """Packed rows that the step's pass has; None: it has all B * n."""
        if not self.ragged:
            return None
        wanted = min(self.tier.num_verify_tokens, batch * n)
        return ragged.tier(target.model_runner.decode_cuda_graph_runner, batch, wanted)

    def roots(self, tokens: Tensor, num_rows: int | None) -> echo.PackedTree:
        """A step without drafts, of as many rows or one a request."""
        total = max(1, len(tokens)) if num_rows is None else num_rows
        return self.scheduler.pack(self.scheduler.begin(tokens, num_verify_tokens=total))

    # SGLang's AdaptiveSpecPolicy: its AdaptiveController asks before every decode step.

    @property
    def candidate_steps(self) -> list[int]:
        """Depths with a captured graph set."""
        return list(self.depths)

    def get_steps_for_batch(self, batch_size: int) -> int:
        """The shallowest captured depth that the step's tier fits in."""
        asked = 0 if self.tier is None else self.tier.depth
        return min((d for d in self.depths if d >= asked), default=self.depths[-1])

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        """Nothing: every set has all batch sizes."""

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """None: all of them."""

    def on_verify_complete(self, num_correct_drafts: list[int], batch_size: int) -> int | None:
        """None: :meth:`observe` knows, without a sync."""

    def observe(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Updates the history, and starts its copy to the host."""
        history = self.plan.space.history
        history = history.observe(req_indices, packed, accepted, out=history)
        self.plan.space.history = history
        self.lagged.append(to_host(history))


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
    """A copy, from a GPU in pinned memory, and the event after it; None on the host."""
    there = history.generation.is_cuda
    parts = {f.name: getattr(history, f.name) for f in fields(history)}
    copies = {
        name: torch.empty_like(part, device="cpu", pin_memory=there).copy_(part, non_blocking=True)
        for name, part in parts.items()
        if isinstance(part, Tensor)
    }
    copied = torch.cuda.Event() if there else None
    if copied is not None:
        copied.record()
    return replace(history, **copies), copied


voting: Planner | None = None
"""Whose curve rides in SGLang's next gather of what its data-parallel ranks run."""


def before_gather(local_batch: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """Before that gather: this rank's curve, which is that of no requests unless it decodes."""
    global voting  # noqa: PLW0603
    planner = getattr(model_runner, "echo_planner", None)
    voting = planner if planner is not None and len(planner.depths) > 1 else None
    if voting is not None:
        decodes = local_batch is not None and local_batch.forward_mode.is_decode()
        requests = host_indices(local_batch) if decodes else torch.empty(0, dtype=torch.int64)
        context = getattr(local_batch, "seq_lens_sum", None) if decodes else 0
        curve = voting.scheduler.tier_curve(voting.known(), requests, context_tokens=context)
        voting.curve = torch.from_numpy(curve)


def gather(original: Any, global_flat: Tensor, local_row: Tensor, group: Any) -> None:
    """SGLang's gather of an int64 row of each rank, with the curve's bits behind the row."""
    if voting is None:
        return original(global_flat, local_row, group=group)
    size, width = len(voting.curve), len(local_row)
    bits = torch.nn.functional.pad(voting.curve, (0, size % 2)).view(torch.int64)
    row = torch.cat([local_row, bits.to(local_row.device)])
    rows = row.new_empty(len(global_flat) // width, len(row))
    original(rows.view(-1), row, group=group)
    global_flat.copy_(rows[:, :width].flatten())
    voting.curves = rows[:, width:].cpu().contiguous().view(torch.float32)[:, :size]
    return None


def capture(original: Any, worker: Any) -> None:
    """SGLang captures its graphs, with the plan; then those of ``ECHO_DEPTHS``, among which the
    planner chooses, through the controller that SGLang has for it.
    """
    from sglang.srt.layers.dp_attention import world_dp_gather_enabled
    from sglang.srt.managers.scheduler_components.dp_attn import should_skip_scheduler_all_gather
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.speculative import eagle_worker_v2 as engine

    planner, deepest = Planner.of(worker), worker.speculative_num_steps
    original(worker)
    n, k = worker.speculative_num_draft_tokens, worker.topk
    asked = os.environ.get("ECHO_DEPTHS", "").split(",")
    depths = sorted({int(depth) for depth in asked if depth} - {deepest})
    if not depths:
        return
    if worker.adaptive_controller is not None:
        raise echo.EchoError("ECHO_DEPTHS: expected no --speculative-adaptive, got both; drop one")
    if get_parallel().attn_dp_enabled:
        if not isinstance(planner.scheduler.budget, echo.CostModel):
            raise echo.EchoError("ECHO_DEPTHS: expected ECHO_COST with attention data parallelism")
        if should_skip_scheduler_all_gather(2) or world_dp_gather_enabled():
            expected = "SGLang's gather of data-parallel ranks within one group"
            raise echo.EchoError(f"ECHO_DEPTHS: expected {expected}, got none; unset it")
    controller = engine.AdaptiveController(worker, planner)
    scopes = engine.speculative_moe_backend_context, engine.speculative_moe_a2a_backend_context
    for depth in depths:
        candidates = k + (depth - 1) * k**2 if depth else 0
        with engine.draft_tp_context(worker.draft_parallel_layout), scopes[0](), scopes[1]():
            width = min(n, 1 + candidates)
            controller.register(worker.build_adaptive_runtime_state(depth, width))
    own, runner = worker.draft_worker, worker.target_worker.model_runner
    controller.register(engine.SpecRuntimeState(
        deepest, n, own.draft_attn_backend, own.cuda_graph_runner, runner.attn_backend,
        runner.decode_cuda_graph_runner, own.draft_extend_attn_backend,
        own.cuda_graph_runner_for_draft_extend,
    ))  # fmt: skip
    planner.depths, worker.adaptive_controller = tuple(sorted((*depths, deepest))), controller


def before_draft(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Prefill: new requests. Decode: the tier; afterwards the next chain's first probability."""
    planner = Planner.of(worker)
    if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
        planner.admit(batch)
        return original(worker, batch, *args, **kwargs)
    planner.choose_tier(batch)
    result = original(worker, batch, *args, **kwargs)
    graphs = worker.draft_worker.cuda_graph_runner_for_draft_extend
    first = getattr(graphs, "echo_first", None)
    if first is not None:
        result.next_draft_input.topk_p, graphs.echo_first = first, None
    return result


def around_verify(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Narrows the pass if asked to; then updates the history, and the warm-up log, with what SGLang
    accepted.
    """
    spec_info, planner = batch.spec_info, Planner.of(worker)
    if batch.forward_mode.is_idle():
        return original(worker, batch, *args, **kwargs)
    req_indices, n = batch.req_pool_indices.long(), spec_info.draft_token_num
    packed = getattr(spec_info, "echo_packed", None)
    if packed is None and n > 1:  # another's verify input
        return original(worker, batch, *args, **kwargs)
    if packed is None:  # nothing was drafted: a step all the same
        rows = planner.num_rows(worker.target_worker, len(req_indices), n)
        packed = planner.roots(spec_info.draft_token.long(), rows)
        spec_info.echo_narrows = rows is not None
    if spec_info.echo_narrows:
        table = worker.target_worker.model_runner.req_to_token_pool.req_to_token
        spec_info.echo_rows = ragged.narrow(spec_info, batch, packed, table)
    result = original(worker, batch, *args, **kwargs)
    accepted = accept(packed, result, n)
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


EAGLE, RUN = "sglang.srt.speculative", "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
WORKER = f"{EAGLE}.eagle_worker_v2"
SYNC = "sglang.srt.managers.scheduler_components.dp_attn"
GRAPHS, KERNELS = f"{RUN}.DecodeCudaGraphRunner", "sglang.kernels.ops"
EXTEND = f"{EAGLE}.eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner"
FLASH = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"

VERSION = "0.5.23"
SEAMS: tuple[tuple[str, str, str, Any], ...] = (
    # target, parameters that it must have ("...": these among others), kind of hook, hook
    (f"{WORKER}.EAGLEWorkerV2.init_cuda_graphs", "self", "around", capture),
    (f"{WORKER}.EAGLEWorkerV2.forward_batch_generation", "self batch", "around", before_draft),
    (f"{WORKER}.EAGLEWorkerV2.verify", "self batch", "around", around_verify),
    (f"{WORKER}.EagleDraftWorker.draft", "self batch", "around", draft.start),
    (f"{WORKER}.EagleDraftWorker.draft_forward", "self forward_batch", "around",
     draft.around_draft),
    (f"{KERNELS}.speculative.topk1.draft_topk1_postprocess", "next_token_logits positions", "after",
     draft.keep_probability),
    (f"{EXTEND}.capture_one_shape", "self size forward", "around", draft.capture_first),
    (f"{EXTEND}.execute", "self forward_batch select_index", "after", draft.keep_first),
    (f"{EAGLE}.eagle_utils.organize_draft_results",
     "score_list token_list parents_list num_draft_token", "around", draft.keep_candidates),
    (f"{EAGLE}.eagle_worker_common.build_eagle_verify_input",
     "batch draft_input parent_list top_scores_index draft_tokens draft_probs target_worker topk "
     "num_steps num_draft_tokens tree_mask_mode device", "around", draft.after_draft),
    (f"{EAGLE}.eagle_utils.eagle_prepare_for_verify",
     "verify_input req_to_token_pool batch target_worker", "around", ragged.prepare),
    (f"{EAGLE}.eagle_utils.eagle_sample", "verify_input batch logits_output grammar_mask", "around",
     ragged.sample),
    (f"{EAGLE}.spec_info.SpeculativeAlgorithm.supports_ragged_verify", "self", "around",
     ragged.supports),
    (f"{GRAPHS}.get_spec_info", "self num_tokens", "after", ragged.capture_layout),
    (f"{SYNC}.prepare_mlp_sync_batch_raw", "... local_batch model_runner", "before", before_gather),
    (f"{SYNC}.exchange_sync_rows", "global_flat local_row group", "around", gather),
    # called
    (f"{SYNC}.should_skip_scheduler_all_gather", "num_dp_ranks", "", None),
    (f"{WORKER}.EAGLEWorkerV2.build_adaptive_runtime_state",
     "self speculative_num_steps speculative_num_draft_tokens", "", None),
    (f"{EAGLE}.adaptive_runtime_state.AdaptiveController", "worker policy", "", None),
    (f"{EAGLE}.adaptive_runtime_state.AdaptiveController.register", "self state", "", None),
    (f"{EAGLE}.adaptive_runtime_state.SpecRuntimeState",
     "speculative_num_steps speculative_num_draft_tokens draft_attn_backend cuda_graph_runner "
     "target_attn_backend target_graph_runner draft_extend_attn_backend "
     "cuda_graph_runner_for_draft_extend", "", None),
    (f"{EAGLE}.ragged_verify.RaggedVerifyLayout.from_verify_lens_device",
     "verify_lens graph_num_tokens", "", None),
    (f"{EAGLE}.ragged_verify.round_up_grid", "total grid", "", None),
    (f"{GRAPHS}._capture_ragged_verify_layout", "self num_tokens", "", None),
    (f"{KERNELS}.speculative.spec_tree.verify_tree_greedy_func",
     "predicts accept_index accept_token_num candidates retrieve_index retrieve_next_token "
     "retrieve_next_sibling target_predict topk", "", None),
    ("sglang.srt.layers.attention.attention_registry.register_attention_backend", "name", "", None),
    (f"{FLASH}.init_cuda_graph_state", "self max_bs max_num_tokens", "", None),
    (f"{FLASH}.init_forward_metadata_out_graph", "self forward_batch in_capture", "", None),
    (f"{FLASH}.forward_extend", "self q k v layer forward_batch save_kv_cache", "", None),
    (f"{FLASH}.get_paged_mha_kv_cache", "self layer", "", None),
    (f"{KERNELS}.attention.flash_attention.flash_attn_with_kvcache",
     "... q k_cache v_cache page_table cache_seqlens cu_seqlens_q max_seqlen_q softmax_scale "
     "causal softcap return_softmax_lse num_splits ver", "", None),
    (f"{KERNELS}.attention.trtllm_mha_page_table.build_trtllm_mha_page_table",
     "req_to_token req_pool_indices cache_seqlens page_table page_size", "", None),
)  # fmt: skip
"""All that the plugin touches in SGLang, as VERSION has it."""


def misfits() -> list[str]:
    """What this SGLang has otherwise than the table says."""
    from sglang.version import __version__ as version

    found = [] if version.split(".post")[0] == VERSION else [f"version {version}, not {VERSION}"]
    for target, wanted, _, _ in SEAMS:
        try:
            there = inspect.signature(pkgutil.resolve_name(target)).parameters
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            found.append(f"{target}: {type(error).__name__}: {error}")
            continue
        names, own = wanted.split(), list(there)
        if {p.kind.name for p in there.values()} >= {"VAR_POSITIONAL", "VAR_KEYWORD"}:
            continue
        if names[0] == "...":
            fits = {*names[1:]} <= {*own}
        else:
            rest = [there[name] for name in own[len(names) :]]
            fits = own[: len(names)] == names and all(p.default is not p.empty for p in rest)
        if not fits:
            found.append(f"{target}: expected ({', '.join(names)}), got ({', '.join(own)})")
    return found


def register() -> None:
    """The entry point: called by SGLang's plugin loader in every process.

    Raises:
        EchoError: this SGLang is not what the table says. It is left as it was.
    """
    if not any(os.environ.get(f"ECHO_{name}") for name in SETTINGS):
        return
    found = misfits()
    if found:
        raise echo.EchoError(f"sglang: {'; '.join(found)}. SGLang runs without ECHO")
    from sglang.srt.layers.attention import attention_registry as backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, _, kind, hook in SEAMS:
        if hook is not None:
            HookRegistry.register(target, hook, HookType(kind))
    for name, trees in (("fa3", ragged.FlashTrees), ("triton", ragged.TritonTrees)):
        built = backends.ATTENTION_BACKENDS[name]
        backends.register_attention_backend(name)(ragged.create(built, trees))
