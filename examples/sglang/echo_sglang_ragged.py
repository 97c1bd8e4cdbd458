"""Ragged trees in SGLang: the target's forward pass has the packed rows alone, not n for every request (docs/sglang.md).

Three of the plugin's hooks. Sampling, acceptance and cache moves of SGLang see B * n rows before and after, and stay as they are.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from echo import EchoError, kernels
from echo.tree import layouts

DUMMY = 0  # SGLang's allocators hand out slots from 1 on; slot 0 takes what padding writes


def supported(backend: Any) -> None:
    """Raises :class:`echo.EchoError` for an attention backend that the hooks do not reach."""
    if not hasattr(backend, "_forward_extend_kernel"):
        raise EchoError(
            f"ECHO_RAGGED: expected --attention-backend triton, got {type(backend).__name__}"
        )


def forward(
    original: Any, worker: Any, batch: Any, forward_batch: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Narrows a verify batch from B * n rows to the packed ones, and widens logits and hidden states again.

    SGLang's own sampling, acceptance and cache moves stay as they are. A batch that a CUDA graph was loaded for stays uniform.
    """
    verified = getattr(forward_batch, "spec_info", None)
    if not getattr(verified, "echo_ragged", False) or forward_batch.forward_metadata_ready:
        return original(worker, batch, forward_batch, *args, **kwargs)
    packed, n = verified.echo_packed, verified.draft_token_num
    narrow = copy.copy(forward_batch)
    for name in ("input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual"):
        value = getattr(forward_batch, name, None)
        if isinstance(value, Tensor):
            own = layouts.unpad(packed, value.view(packed.batch, n))
            setattr(narrow, name, torch.where(own < 0, DUMMY, own))
    result = original(worker, batch, narrow, *args, **kwargs)
    worker.model_runner.attn_backend.echo_packed = None
    rows = (
        (packed.indptr[:-1, None] + torch.arange(n, device=packed.indptr.device))
        .clamp(max=packed.num_rows - 1)
        .flatten()
    )
    for name in ("next_token_logits", "hidden_states"):
        value = getattr(result.logits_output, name, None)
        if isinstance(value, Tensor):
            setattr(result.logits_output, name, value[rows])
    return result


def metadata(_: Any, backend: Any, forward_batch: Any) -> None:
    """Ragged query offsets in place of multiples of n, and no mask: the tree part has its own."""
    verified = forward_batch.spec_info
    ragged = forward_batch.forward_mode.is_target_verify() and getattr(
        verified, "echo_ragged", False
    )
    ragged = ragged and len(forward_batch.input_ids) == verified.echo_packed.num_rows
    backend.echo_packed = packed = verified.echo_packed if ragged else None
    if packed is not None:
        longest = min(verified.draft_token_num, packed.num_rows)
        backend.forward_metadata = replace(
            backend.forward_metadata,
            qo_indptr=packed.indptr,
            custom_mask=None,
            mask_indptr=None,
            max_extend_len=longest,
        )


def attention(original: Any, backend: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention of packed rows: SGLang's kernel over the context, ours over each row's ancestors, merged by their log-sums."""
    packed = getattr(backend, "echo_packed", None)
    if packed is None:
        return original(backend, layer, *args, **kwargs)
    if (
        kwargs.get("sliding_window_size", -1) > -1
        or kwargs.get("sinks") is not None
        or kwargs.get("score_mod") is not None
    ):
        raise NotImplementedError(
            "ragged trees: layers with a sliding window, sinks or score_mod; unset ECHO_RAGGED"
        )
    (
        q,
        k,
        v,
        out,
        *caches_and_prefix,
        _mask,
        _causal,
        _mask_indptr,
        longest,
        k_scale,
        v_scale,
        scale,
    ) = args
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    prefix = torch.zeros_like(out)  # its kernel does not write pads
    original(
        backend, layer, q, k[:0], v[:0], prefix, *caches_and_prefix, None, False, None, longest, k_scale, v_scale, scale,
        **kwargs, lse_extend=lse, skip_extend=True,
    )  # fmt: skip
    tree, tree_lse = kernels.tree_attention(
        q, None, None, None, None, k, v, packed.request, packed.indptr, packed.mask,
        mode="tree", scale=scale, softcap=kwargs.get("logit_cap") or None,
    )  # fmt: skip
    return out.copy_(kernels.merge_attention(prefix, lse, tree, tree_lse)[0])
