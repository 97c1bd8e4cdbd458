"""A verify pass of packed rows in SGLang: ragged chains on its own backends, ragged trees on ours.

The planned step goes to the target as N rows and a ``RaggedVerifyLayout``, in one of the ragged
verify graphs that SGLang captures by N; SGLang's acceptance sees B * n rows, n =
``draft_token_num``. A chain needs the layout only, MLA models too. A tree needs attention besides:
:class:`Trees` joins the backend's kernel over the prefix with ours over each row's ancestors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import echo
from echo import EchoError, kernels
from echo.tree import layouts

PAD_SLOT = 0  # SGLang's allocators hand out slots from 1 on: pads write to slot 0
CHAINS = "FlashAttentionBackend", "TRTLLMHAAttnBackend", "TRTLLMMLABackend"
"""Backends whose verify of ``EagleVerifyInput`` reads a ragged layout."""


def wanted() -> bool:
    """Whether ``ECHO_RAGGED`` asks for packed rows."""
    return os.environ.get("ECHO_RAGGED", "") not in ("", "0")


def check(worker: Any) -> None:
    """Raises :class:`echo.EchoError` for what a ragged verify pass cannot serve."""
    from sglang.srt.runtime_context import get_parallel, get_spec

    runner = worker.target_worker.model_runner
    backend, kind = runner.attn_backend, type(runner.attn_backend).__name__
    graphs = runner.decode_cuda_graph_runner
    for fits, expected, got in (
        (not get_spec().speculative_use_rejection_sampling, "no rejection sampling", "it"),
        (not get_parallel().attn_dp_enabled, "no attention data parallelism", "it"),
        (not runner.model_config.model_is_mrope, "positions of one axis", "mrope"),
        (
            graphs is None or graphs.ragged_verify_mode,
            "SGLANG_RAGGED_VERIFY_MODE=compact or --disable-cuda-graph",
            "static",
        ),
        (worker.topk > 1 or kind in CHAINS, "fa3, trtllm_mha or trtllm_mla", kind),
        (worker.topk == 1 or isinstance(backend, Trees), "fa3 or triton, no MLA", kind),
        (worker.topk == 1 or runner.kv_cache_dtype.itemsize > 1, "a cache of 16 bits", "of 8"),
        (worker.topk == 1 or not runner.kv_index_translator.is_translating, "one memory pool",
         "unified memory"),
    ):  # fmt: skip
        if not fits:
            raise EchoError(f"ECHO_RAGGED: expected {expected}, got {got}; unset it")


def supports(original: Any, algorithm: Any) -> bool:
    """EAGLE, and MTP which is its chain, may carry a ragged layout: SGLang then captures for it."""
    from sglang.srt.runtime_context import get_spec

    ours = wanted() and algorithm.name in ("EAGLE", "EAGLE3")
    return original(algorithm) or (ours and not get_spec().enable_multi_layer_eagle)


def capture_layout(spec_info: Any, runner: Any, num_tokens: int) -> None:
    """What a captured verify pass of ``num_tokens`` rows reads: SGLang's layout of that tier, which
    it refreshes before each replay.
    """
    if spec_info is None or not runner.ragged_verify_mode or spec_info.ragged_verify_layout:
        return
    if not runner.attn_backend.supports_ragged_verify_graph:
        expected = f"static, {type(runner.attn_backend).__name__} has no ragged graphs"
        raise EchoError(f"SGLANG_RAGGED_VERIFY_MODE: expected {expected}, got compact")
    spec_info.ragged_verify_layout = runner._capture_ragged_verify_layout(num_tokens)


def tier(runner: Any, batch: int, num_verify_tokens: int) -> int | None:
    """Rows to plan: the captured tier that holds ``num_verify_tokens``; None where none does."""
    if runner is None:  # no graphs
        return num_verify_tokens
    if not runner.ragged_verify_mode or batch > runner.max_bs:
        return None
    from sglang.srt.speculative.ragged_verify import round_up_grid

    grid = runner.capture_num_tokens
    return int(round_up_grid(num_verify_tokens, grid)) if num_verify_tokens <= grid[-1] else None


def narrow(spec_info: Any, batch: Any, packed: echo.PackedTree, req_to_token: Tensor) -> Any:
    """The verify input of the packed rows alone; its ``echo_window`` is the uniform one's slots."""
    from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

    n, window = spec_info.draft_token_num, spec_info.prepared_out_cache_loc
    if window is None:
        lens = batch.seq_lens.long()[:, None] + torch.arange(n, device=batch.seq_lens.device)
        window = req_to_token[batch.req_pool_indices.long()[:, None], lens].long()
    own = layouts.unpad(packed, window.view(packed.batch, n))
    rows = copy.copy(spec_info)
    rows.draft_token, rows.positions = packed.tokens, packed.positions(batch.seq_lens)
    rows.prepared_out_cache_loc = torch.where(own < 0, PAD_SLOT, own)
    rows.kv_loc_plan = rows.prepared_mrope_positions = None  # those of B * n rows
    rows.ragged_verify_layout = RaggedVerifyLayout.from_verify_lens_device(
        verify_lens=packed.indptr.diff(), graph_num_tokens=packed.num_rows
    )
    rows.echo_packed, rows.echo_window = packed, window.flatten()
    return rows


def cut(spec_info: Any, packed: echo.PackedTree) -> None:
    """Ends each chain of SGLang's verify input behind the drafts that are verified."""
    ends = torch.arange(1, spec_info.draft_token_num + 1, device=packed.indptr.device)
    there = ends < packed.indptr.diff()[:, None]
    spec_info.retrieve_next_token = torch.where(there, spec_info.retrieve_next_token, -1)


def prepare(
    original: Any, verify_input: Any, req_to_token_pool: Any, batch: Any, target_worker: Any
) -> Any:
    """Prepares the forward pass, and its graph, for the packed rows instead of B * n."""
    rows = getattr(verify_input, "echo_rows", None)
    if rows is None:
        return original(verify_input, req_to_token_pool, batch, target_worker)
    batch.spec_info = rows
    prepared = original(rows, req_to_token_pool, batch, target_worker)
    # What SGLang samples from, and what draft extend writes.
    batch.spec_info, batch.out_cache_loc = verify_input, rows.echo_window
    return prepared


def sample(
    original: Any, verify_input: Any, batch: Any, logits_output: Any, grammar_mask: Any = None,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """SGLang's sampler after a packed pass: what it reads is put where it looks, n rows a request.

    Where argmax is all that it reads, token ids are, as it takes them; else the logits.
    """
    rows, info = getattr(verify_input, "echo_rows", None), batch.sampling_info
    if rows is None:
        return original(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    packed, logits = rows.echo_packed, logits_output.next_token_logits
    at = packed.indptr[:-1, None] + torch.arange(verify_input.draft_token_num, device=logits.device)
    at = at.clamp(max=packed.num_rows - 1)
    if logits_output.hidden_states is not None:
        logits_output.hidden_states = logits_output.hidden_states[at.flatten()]
    from sglang.kernels.ops.speculative.spec_tree import verify_tree_greedy_func
    from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN
    from sglang.srt.utils.async_probe import sanitize_nan_logits

    changed = grammar_mask, info.acc_additive_penalties, info.acc_scaling_penalties, info.logit_bias
    others = batch.return_logprob, info.has_watermark_candidates, SIMULATE_ACC_LEN > 0
    others += (torch.version.hip is not None,)  # whose ranks SGLang lets agree
    if not info.is_all_greedy or any(others) or any(x is not None for x in changed):
        logits_output.next_token_logits = logits[at.flatten()]
        return original(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    sanitize_nan_logits(logits, "verify: target model logits")
    empty = partial(torch.full, dtype=torch.int32, device=logits.device)
    predict, index, drafts = verify_tree_greedy_func(
        predicts=empty((at.numel(),), 0), accept_token_num=empty((len(at),), 0),
        accept_index=empty((len(at), verify_input.max_tree_depth), -1),
        candidates=verify_input.draft_token.reshape(at.shape),
        retrieve_index=verify_input.retrieve_index,
        retrieve_next_token=verify_input.retrieve_next_token,
        retrieve_next_sibling=verify_input.retrieve_next_sibling,
        target_predict=logits.argmax(dim=-1)[at], topk=verify_input.tree_topk,
    )  # fmt: skip
    return predict, drafts + 1, index


def create(original: Callable[[Any], Any], mixin: type) -> Callable[[Any], Any]:
    """An attention backend's factory whose backend serves ragged trees to the target too."""
    from sglang.srt.runtime_context import get_spec

    def build(runner: Any) -> Any:
        backend = original(runner)
        chain = (get_spec().speculative_eagle_topk or 1) == 1
        if wanted() and not (chain or runner.is_draft_worker or runner.use_mla_backend):
            backend.__class__ = serve(type(backend), mixin)
        return backend

    return build


def serve(backend: type, mixin: type) -> type:
    """The class ``backend``, with ``mixin`` before it."""
    return type(f"Echo{backend.__name__}", (mixin, backend), {})


@dataclass
class Step:
    """What all layers of one packed pass read: S slots for B requests.

    ``request`` int32 [N], S on pads; ``indptr`` int32 [S + 1]; ``mask`` int32 [N, words];
    ``prefix_lens`` int32 [S]; ``page_table`` int32 [S, pages]; ``width``: most rows of a request.
    """

    request: Tensor
    indptr: Tensor
    mask: Tensor
    prefix_lens: Tensor
    page_table: Tensor | None
    width: int

    def fill(self, packed: echo.PackedTree | None) -> None:
        """Writes a step into captured buffers; None, at capture: pads alone."""
        slots, batch = len(self.prefix_lens), 0 if packed is None else packed.batch
        if packed is None:
            self.indptr.zero_()
            self.request.fill_(slots)
            return
        self.indptr[: batch + 1].copy_(packed.indptr)
        self.indptr[batch + 1 :] = packed.indptr[-1]
        self.request.copy_(packed.request).masked_fill_(packed.request == batch, slots)
        self.mask.copy_(packed.mask[:, : self.mask.shape[1]])


def join(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, lse: Tensor, step: Step, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of the packed rows: that over the prefix, joined with that over their ancestors.

    Args:
        q, k, v: [N, heads, D], of the rows.
        prefix, lse: [N, heads, D] and float32 [N, heads], the engine's; anything on pads.
        step, scale, softcap: of the layer.
    """
    return kernels.tree_attention(
        q, None, None, None, None, k, v, step.request, step.indptr, step.mask, mode="tree",
        scale=scale, softcap=softcap, prefix_out=prefix, prefix_lse=lse,
    )[0]  # fmt: skip


class Trees:
    """Mixin of an attention backend: the target's pass over ragged trees, and all else as it was.

    A subclass says what its kernel gives over the prefix (:meth:`prefix`).
    """

    echo_step: Step | None = None

    def prefix(self, q: Tensor, layer: Any, step: Step) -> tuple[Tensor, Tensor]:
        """The engine's attention over the prefix: [N, heads, D], lse float32 [N, heads]."""
        raise NotImplementedError

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """SGLang's, or the joined attention of a packed pass."""
        step = self.echo_step
        if step is None or not forward_batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, forward_batch, *args, **kwargs)
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        given = [name for name, value in kwargs.items() if value is not None]
        others = sorted({*given} - {"save_kv_cache"})
        window = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        if others or window or layer.is_cross_attention:
            got = others or "a sliding window or cross attention"
            raise EchoError(f"ECHO_RAGGED: expected plain attention layers, got {got}; unset it")
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.reshape(-1, layer.tp_k_head_num, layer.v_head_dim)
        if args[:1] != (False,) and kwargs.get("save_kv_cache", True):
            where = KVWriteLoc.for_batch(forward_batch)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        prefix, lse = self.prefix(q, layer, step)
        out = join(q, k, v, prefix, lse, step, layer.scaling, layer.logit_cap or None).flatten(1)
        given = getattr(forward_batch, "_attn_output", None)
        return out if given is None else given.copy_(out.view_as(given))


class TritonTrees(Trees):
    """On SGLang's Triton kernel: page size 1, without CUDA graphs."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """SGLang's, with ragged query offsets and no mask, which the tree part has."""
        super().init_forward_metadata(forward_batch)
        self.echo_step = None
        packed = packed_of(forward_batch)
        if packed is not None:
            own = self.forward_metadata
            lens, width = forward_batch.seq_lens.int(), forward_batch.spec_info.draft_token_num
            self.forward_metadata = replace(
                own, qo_indptr=packed.indptr, custom_mask=None, mask_indptr=None,
                max_extend_len=min(width, packed.num_rows),
            )  # fmt: skip
            self.echo_step = Step(packed.request, packed.indptr, packed.mask, lens, None, width)

    def prefix(self, q: Tensor, layer: Any, step: Step) -> tuple[Tensor, Tensor]:
        """``extend_attention_fwd`` without its own part; it does not write pads."""
        own, pool = self.forward_metadata, self.token_to_kv_pool
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        out = q.new_zeros(*q.shape[:2], values.shape[-1])
        self.extend_attention_fwd(
            q, keys[:0], values[:0], out, keys, values, own.qo_indptr, own.kv_indptr,
            own.kv_indices, None, False, None, own.max_extend_len, 1.0, 1.0, layer.scaling,
            logit_cap=layer.logit_cap, page_size=self.page_size, lse_extend=lse, skip_extend=True,
        )  # fmt: skip
        return out, lse


class FlashTrees(Trees):
    """On FlashAttention 3, any page size, inside the ragged verify graphs."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """SGLang's buffers, and those that the graphs of all tiers share."""
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.echo_buffers = self.buffers(max_bs, max_num_tokens, self.speculative_num_draft_tokens)

    def buffers(self, slots: int, num_rows: int, width: int) -> Step:
        """A step of pads alone."""
        empty = partial(torch.zeros, dtype=torch.int32, device=self.device)
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        request, mask = empty(num_rows).fill_(slots), empty(num_rows, -(-width // 32))
        return Step(request, empty(slots + 1), mask, empty(slots), empty(slots, pages), width)

    def fill(self, step: Step, forward_batch: Any, packed: echo.PackedTree | None) -> Step:
        """Writes a step and what the prefix kernel reads, all on the device."""
        from sglang.kernels.ops.attention.trtllm_mha_page_table import build_trtllm_mha_page_table

        step.fill(packed)
        step.prefix_lens.copy_(forward_batch.seq_lens[: len(step.prefix_lens)])
        build_trtllm_mha_page_table(
            req_to_token=self.req_to_token, req_pool_indices=forward_batch.req_pool_indices,
            cache_seqlens=step.prefix_lens, page_table=step.page_table, page_size=self.page_size,
        )  # fmt: skip
        return step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """SGLang's, or an eager packed pass."""
        packed = packed_of(forward_batch)
        self.echo_step = None
        if packed is None:
            return super().init_forward_metadata(forward_batch)
        own = self.buffers(packed.batch, packed.num_rows, forward_batch.spec_info.draft_token_num)
        self.echo_step = self.fill(own, forward_batch, packed)
        return None

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """SGLang's, or before the capture and each replay of a packed pass."""
        spec_info = forward_batch.spec_info
        verifies = forward_batch.forward_mode.is_target_verify()
        layout = getattr(spec_info, "ragged_verify_layout", None) if verifies else None
        self.echo_step = None
        if layout is None:
            return super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        own, rows, slots = self.echo_buffers, layout.graph_num_tokens, forward_batch.batch_size
        step = Step(
            own.request[:rows], own.indptr[: slots + 1], own.mask[:rows], own.prefix_lens[:slots],
            own.page_table[:slots], own.width,
        )  # fmt: skip
        packed = None if in_capture else spec_info.echo_packed
        self.echo_step = self.fill(step, forward_batch, packed)
        return None

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """SGLang's; a packed pass needs nothing here."""
        if self.echo_step is None:
            super().init_forward_metadata_in_graph(forward_batch)

    def prefix(self, q: Tensor, layer: Any, step: Step) -> tuple[Tensor, Tensor]:
        """FA3 over the paged prefix: not causal, a request's rows from ``indptr`` on."""
        from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache

        keys, values = self.get_paged_mha_kv_cache(layer)
        out, lse, *_ = flash_attn_with_kvcache(
            q=q.contiguous(), k_cache=keys, v_cache=values, page_table=step.page_table,
            cache_seqlens=step.prefix_lens, cu_seqlens_q=step.indptr, max_seqlen_q=step.width,
            softmax_scale=layer.scaling, causal=False, softcap=layer.logit_cap,
            return_softmax_lse=True, num_splits=self.num_splits, ver=self.fa_impl_ver,
        )  # fmt: skip
        return out, lse.T


def packed_of(forward_batch: Any) -> echo.PackedTree | None:
    """The packed rows of a verify pass of them alone."""
    spec_info = forward_batch.spec_info
    if not forward_batch.forward_mode.is_target_verify():
        return None
    layout = getattr(spec_info, "ragged_verify_layout", None)
    return None if layout is None else spec_info.echo_packed
