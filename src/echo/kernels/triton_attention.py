"""Launches of the tree attention kernels. The twin is in :mod:`echo.kernels.reference`, the contract in :mod:`echo.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import checks
from echo.errors import EchoError
from echo.kernels import attention_kernels as jit
from echo.kernels import launch
from echo.kernels.inputs import Shapes, attention_shapes, merge_shapes, plan_shapes

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels were loaded for Triton's interpreter, which runs them on the CPU."""


class Sizes(NamedTuple):
    """What a work list is cut to: the tile, the items of a balanced split, and room for all items and for split ones."""

    tile: launch.Tile
    target: int
    items: int
    slots: int


def _sizes(s: Shapes, device: torch.device, splits: int | None) -> Sizes:
    mean = s.rows / max(s.batch, 1) if splits is None else launch.FIXED_ROWS
    tile = launch.tile(s.group, s.dim, s.itemsize, s.cached, s.page, mean, launch.generation(device))
    tiles = launch.most_tiles(s.rows, s.batch, s.group, tile.rows)
    target = launch.target_items(device, s.kv_heads, tile)
    return Sizes(tile, target, tiles + target, 2 * target) if splits is None else Sizes(tile, target, tiles * splits, tiles * splits)


def _work(
    s: Shapes, sizes: Sizes, indptr: Tensor, context: Tensor | None, limit: int, window: int | None, splits: int | None
) -> tuple[Tensor, Tensor]:
    """Items int32 [items, FIELDS]; per request int32 [B + 1, 2] of first slot and pieces."""
    work = torch.empty(sizes.items, jit.FIELDS.value, dtype=torch.int32, device=indptr.device)
    spans = torch.empty(s.batch + 1, 2, dtype=torch.int32, device=indptr.device)
    jit.plan[(s.batch + 1,)](
        indptr.contiguous(), (indptr if context is None else context).contiguous(), work, spans, s.batch, limit, sizes.items,
        sizes.target, splits or 0, GROUP=s.group, ROWS=sizes.tile.rows, KEYS=sizes.tile.keys, WINDOW=window or 0,
        MIN=launch.MIN_BLOCKS, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return work, spans


@launch.on_its_device
def plan_attention(
    q: Tensor,
    key_cache: Tensor | None,
    page_table: Tensor | None,
    context: Tensor | None,
    tree_key: Tensor,
    indptr: Tensor,
    *,
    mode: str = "whole",
    window: int | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.plan_attention`."""
    s = plan_shapes(q, key_cache, page_table, context, tree_key, indptr, mode, window, splits)
    whole = mode == "whole" and page_table is not None and key_cache is not None
    limit = page_table.shape[1] * key_cache.shape[1] if whole and page_table is not None and key_cache is not None else 0
    return _work(s, _sizes(s, q.device, splits), indptr, context if whole else None, limit, window, splits)


@launch.on_its_device
def tree_attention(
    q: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    page_table: Tensor | None,
    context: Tensor | None,
    tree_key: Tensor,
    tree_value: Tensor,
    request: Tensor,
    indptr: Tensor,
    mask: Tensor,
    *,
    mode: str = "whole",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    splits: int | None = None,
    plan: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention`; tensors on a CUDA device, or anywhere under the interpreter.

    Raises:
        EchoError: as there; also a last dimension that is not contiguous, or head dimensions beyond 16 to 256.
    """
    s = attention_shapes(
        q, key_cache, value_cache, page_table, context, tree_key, tree_value, request, indptr, mask,
        mode, softcap, window, depth, key_scale, value_scale, splits,
    )  # fmt: skip
    if not 16 <= s.dim <= 256:
        raise EchoError(f"q: expected head dimensions from 16 to 256 for the Triton kernel, got {s.dim}")
    whole = mode == "whole"
    # Without a context nothing of these is read; they stand for pointers.
    keys, values = (key_cache, value_cache) if whole else (tree_key[None], tree_value[None])
    table, lengths = (page_table, context) if whole else (indptr[None], indptr)
    assert keys is not None and values is not None and table is not None and lengths is not None
    named = {"q": q, "tree_key": tree_key, "tree_value": tree_value, "key_cache": keys, "value_cache": values, "page_table": table}
    for name, value in named.items():
        if value.numel() and value.stride(-1) != 1:
            raise EchoError(f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}")
    if q.is_cuda and torch.float8_e4m3fn in (keys.dtype, values.dtype):
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise EchoError(f"key_cache: expected float8_e5m2 on compute capability {capability}, got float8_e4m3fn")

    sizes = _sizes(s, q.device, splits)
    tile = sizes.tile
    out = torch.empty(s.rows, s.heads, s.dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(s.rows, s.heads, dtype=torch.float32, device=q.device)
    if s.rows == 0:
        return out, lse
    page = keys.shape[1] if whole else 1
    limit = table.shape[1] * page if whole else 0  # the page table ends here: no context is read beyond it
    if plan is None:
        work, spans = _work(s, sizes, indptr, lengths, limit, window, splits)
    else:
        work = checks.tensor("plan[0]", plan[0], [sizes.items, jit.FIELDS.value], torch.int32, q.device)
        spans = checks.tensor("plan[1]", plan[1], [s.batch + 1, 2], torch.int32, q.device)
    partial = torch.empty(sizes.slots, s.kv_heads, tile.rows, s.dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(sizes.slots, s.kv_heads, tile.rows, dtype=torch.float32, device=q.device)
    indptr, lengths, mask, request = indptr.contiguous(), lengths.contiguous(), mask.contiguous(), request.contiguous()
    depth = indptr if depth is None else depth.contiguous()
    cap = 1.0 if softcap is None else float(softcap)
    factor = s.dim**-0.5 if scale is None else float(scale)
    narrow = q.dtype == torch.bfloat16 and keys.element_size() == 1 and values.element_size() == 1
    shape = {
        "GROUP": s.group, "ROWS": tile.rows, "DIM": s.dim, "WIDTH": launch.power_of_two(s.dim), "CAPPED": softcap is not None,
    }  # fmt: skip
    jit.attend[(sizes.items * s.kv_heads,)](
        q, keys, values, table, tree_key, tree_value, mask, depth,
        lse if key_scale is None else key_scale.contiguous(), lse if value_scale is None else value_scale.contiguous(),
        work, out, lse, partial, partial_lse, factor, cap,
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], table.stride(0),
        tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1), mask.shape[1],
        **shape, HEADS=s.kv_heads, KEYS=tile.keys, PAGE=page, PREFIX=whole, WINDOW=window or 0, KEY_SCALED=key_scale is not None,
        VALUE_SCALED=value_scale is not None, NARROW=narrow, DOT=_dot_type(q.dtype), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    members = launch.power_of_two(s.group)
    jit.merge[(s.rows, s.kv_heads)](
        q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse, factor, cap, s.batch,
        q.stride(0), q.stride(1), tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1),
        **shape, MEMBERS=members, PARTS=max(1, launch.MERGED // (members * launch.power_of_two(s.dim))), num_warps=4,
    )  # fmt: skip
    return out, lse


def _dot_type(dtype: torch.dtype) -> Any:
    """Triton's type of the matrix products. The interpreter computes bfloat16 wrongly, so there it is float32."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@launch.on_its_device
def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`."""
    n, heads, dim = merge_shapes(o1, lse1, o2, lse2)
    out, lse = torch.empty(n, heads, dim, dtype=o1.dtype, device=o1.device), torch.empty(n, heads, dtype=torch.float32, device=o1.device)
    rows = 16
    if n * heads:
        jit.join[(-(-n * heads // rows),)](
            o1.contiguous(), lse1.contiguous(), o2.contiguous(), lse2.contiguous(), out, lse, n * heads,
            DIM=dim, WIDTH=launch.power_of_two(dim), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out, lse
