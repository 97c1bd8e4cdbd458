"""Ragged trees in SGLang: the target's forward pass has packed rows only, not n for every request.

Three of the plugin's hooks (docs/sglang.md). SGLang's sampling, acceptance and cache moves see
B * n rows, n = ``draft_token_num``, before and after, and stay as they are.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from echo import EchoError, kernels
from echo.tree import layouts

PAD_SLOT = 0  # SGLang's allocators hand out slots from 1 on: pads write to slot 0


def supported(backend: Any) -> None:
    """Raises :class:`echo.EchoError` for an attention backend that the hooks do not reach."""
    if not hasattr(backend, "_forward_extend_kernel"):
        got = type(backend).__name__
        raise EchoError(f"ECHO_RAGGED: expected --attention-backend triton, got {got}")


def forward(
    original: Any, worker: Any, batch: Any, forward_batch: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Narrows a verify batch from B * n rows to the packed ones, and widens its outputs again.

    A batch that a CUDA graph was loaded for stays uniform.
    """
    spec_info = getattr(forward_batch, "spec_info", None)
    if not getattr(spec_info, "echo_ragged", False) or forward_batch.forward_metadata_ready:
        return original(worker, batch, forward_batch, *args, **kwargs)
    packed, n = spec_info.echo_packed, spec_info.draft_token_num
    narrow = copy.copy(forward_batch)
    for name in ("input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual"):
        value = getattr(forward_batch, name, None)
        if isinstance(value, Tensor):
            own = layouts.unpad(packed, value.view(packed.batch, n))
            setattr(narrow, name, torch.where(own < 0, PAD_SLOT, own))
    result = original(worker, batch, narrow, *args, **kwargs)
    worker.model_runner.attn_backend.echo_packed = None
    rows = packed.indptr[:-1, None] + torch.arange(n, device=packed.indptr.device)
    rows = rows.clamp(max=packed.num_rows - 1).flatten()
    for name in ("next_token_logits", "hidden_states"):
        value = getattr(result.logits_output, name, None)
        if isinstance(value, Tensor):
            setattr(result.logits_output, name, value[rows])
    return result


def metadata(_: Any, backend: Any, forward_batch: Any) -> None:
    """Ragged query offsets in place of multiples of n; no mask, which the tree part has."""
    spec_info, verifies = forward_batch.spec_info, forward_batch.forward_mode.is_target_verify()
    packed = (
        spec_info.echo_packed if verifies and getattr(spec_info, "echo_ragged", False) else None
    )
    if packed is not None and len(forward_batch.input_ids) != packed.num_rows:
        packed = None
    backend.echo_packed = packed
    if packed is not None:
        longest = min(spec_info.draft_token_num, packed.num_rows)
        fresh = {"custom_mask": None, "mask_indptr": None, "max_extend_len": longest}
        backend.forward_metadata = replace(
            backend.forward_metadata, qo_indptr=packed.indptr, **fresh
        )


def attention(original: Any, backend: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention of packed rows: SGLang's kernel over the prefix, ours over ancestors, merged."""
    packed = getattr(backend, "echo_packed", None)
    if packed is None:
        return original(backend, layer, *args, **kwargs)
    window, others = kwargs.get("sliding_window_size", -1), ("sinks", "score_mod")
    if window > -1 or any(kwargs.get(name) is not None for name in others):
        layers = "layers with a sliding window, sinks or score_mod"
        raise NotImplementedError(f"ragged trees: {layers}; unset ECHO_RAGGED")
    q, k, v, out, *prefix_args, _, _, _, longest, k_scale, v_scale, scale = args
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    prefix = torch.zeros_like(out)  # its kernel does not write pads
    original(
        backend, layer, q, k[:0], v[:0], prefix, *prefix_args, None, False, None, longest, k_scale,
        v_scale, scale, **kwargs, lse_extend=lse, skip_extend=True,
    )  # fmt: skip
    tree, tree_lse = kernels.tree_attention(
        q, None, None, None, None, k, v, packed.request, packed.indptr, packed.mask,
        mode="tree", scale=scale, softcap=kwargs.get("logit_cap") or None,
    )  # fmt: skip
    return out.copy_(kernels.merge_attention(prefix, lse, tree, tree_lse)[0])
