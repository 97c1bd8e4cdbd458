"""Launches of the tree attention kernels. The twin is in :mod:`echo.kernels.reference`, the contract in :mod:`echo.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels import attention_kernels as jit
from echo.kernels import launch
from echo.kernels.inputs import Attention, AttentionPlan, Planning, merge_shapes, taking

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels were loaded for Triton's interpreter, which runs them on the CPU."""


class Sizes(NamedTuple):
    """What a work list is cut to: the tile, the items of a balanced split, and room for all items and, in tiles, for partial results."""

    tile: launch.Tile
    target: int
    items: int
    slots: int


def _sizes(call: Planning) -> Sizes:
    s = call.shapes
    mean = s.rows / max(s.batch, 1) if s.splits is None else launch.FIXED_ROWS
    tile = launch.tile(
        s.group, s.dim, s.itemsize, s.cached, s.page, mean, launch.generation(s.device)
    )
    tiles = launch.most_tiles(s.rows, s.batch, s.group, tile.rows)
    target = launch.target_items(s.device, s.kv_heads, tile)
    if s.splits is None:
        return Sizes(tile, target, tiles + target, 2 * target)
    pieces = min(s.splits, -(-s.longest // tile.keys) - (-s.rows // tile.keys))
    return Sizes(
        tile,
        target,
        tiles * pieces,
        -(-s.rows * s.group * pieces // tile.rows) if pieces > 1 else 0,
    )


def _plan(call: Planning) -> AttentionPlan:
    s, indptr = call.shapes, call.indptr
    sizes = _sizes(call)
    lengths = indptr if call.mode == "tree" or call.prefix_lens is None else call.prefix_lens
    work, spans = indptr.new_empty(sizes.items, jit.FIELDS.value), indptr.new_empty(s.batch + 1, 2)
    jit.plan[(s.batch + 1,)](
        indptr.contiguous(), lengths.contiguous(), work, spans, s.batch, s.longest, sizes.items, sizes.target, call.splits or 0,
        GROUP=s.group, ROWS=sizes.tile.rows, KEYS=sizes.tile.keys, WINDOW=call.window or 0, MIN=launch.MIN_BLOCKS, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return AttentionPlan(s, sizes.tile, work, spans)


@launch.on_its_device
@taking(Planning)
def plan_attention(call: Planning) -> AttentionPlan:
    """As :func:`echo.kernels.plan_attention`."""
    return _plan(call)


@launch.on_its_device
@taking(Attention)
def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention`; tensors on a CUDA device, or anywhere under the interpreter.

    Raises:
        EchoError: as there; also a last dimension that is not contiguous, or head dimensions beyond 16 to 256.
    """
    s, q, tree_key, tree_value, indptr = (
        call.planning.shapes,
        call.q,
        call.tree_key,
        call.tree_value,
        call.indptr,
    )
    if not 16 <= s.dim <= 256:
        raise EchoError(
            f"q: expected head dimensions from 16 to 256 for the Triton kernel, got {s.dim}"
        )
    # Without a context nothing of these is read; they stand for pointers.
    keys, values, table, _ = call.cache or (tree_key[None], tree_value[None], indptr[None], indptr)
    named = {
        "q": q,
        "tree_key": tree_key,
        "tree_value": tree_value,
        "key_cache": keys,
        "value_cache": values,
        "page_table": table,
    }
    for name, value in named.items():
        if value.stride(-1) != 1 and value.numel():
            raise EchoError(
                f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}"
            )
    if q.is_cuda and torch.float8_e4m3fn in (keys.dtype, values.dtype):
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise EchoError(
                f"key_cache: expected float8_e5m2 on compute capability {capability}, got float8_e4m3fn"
            )

    sizes = _sizes(call.planning)
    tile = sizes.tile
    out, lse = (
        q.new_empty(s.rows, s.heads, s.dim),
        q.new_empty(s.rows, s.heads, dtype=torch.float32),
    )
    if s.rows == 0:
        return out, lse
    plan = _plan(call.planning) if call.plan is None else call.plan
    if plan.tile != tile:
        raise EchoError(
            f"plan: expected one made by the Triton kernel for {tile}, got one for {plan.tile}"
        )
    work = checks.tensor(
        "plan.work", plan.work, [sizes.items, jit.FIELDS.value], torch.int32, q.device
    )
    spans = checks.tensor("plan.spans", plan.spans, [s.batch + 1, 2], torch.int32, q.device)
    partial, partial_lse = (
        lse.new_empty(sizes.slots * tile.rows, s.kv_heads, s.dim),
        lse.new_empty(sizes.slots * tile.rows, s.kv_heads),
    )
    indptr, mask, request = indptr.contiguous(), call.mask.contiguous(), call.request.contiguous()
    depth = indptr if call.depth is None else call.depth.contiguous()
    key_scale, value_scale = (
        lse if scales is None else scales.contiguous()
        for scales in (call.key_scale, call.value_scale)
    )
    cap = 1.0 if call.softcap is None else float(call.softcap)
    narrow = q.dtype == torch.bfloat16 and keys.element_size() == 1 and values.element_size() == 1
    shape = {
        "GROUP": s.group, "DIM": s.dim, "WIDTH": launch.power_of_two(s.dim), "CAPPED": call.softcap is not None,
    }  # fmt: skip
    jit.attend[(sizes.items * s.kv_heads,)](
        q, keys, values, table, tree_key, tree_value, mask, depth, key_scale, value_scale,
        work, out, lse, partial, partial_lse, call.factor, cap, keys.shape[0],
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], table.stride(0),
        tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1), mask.shape[1],
        **shape, HEADS=s.kv_heads, ROWS=tile.rows, KEYS=tile.keys, PAGE=s.page or 1, PREFIX=call.cache is not None, WINDOW=call.window or 0,
        KEY_SCALED=call.key_scale is not None, VALUE_SCALED=call.value_scale is not None, NARROW=narrow, DOT=_dot_type(q.dtype),
        STAGES=tile.own_stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    members = launch.power_of_two(s.group)
    jit.merge[(s.rows, s.kv_heads)](
        q, tree_key, tree_value, request, indptr, spans, out, lse, partial, partial_lse, call.factor, cap, s.batch,
        q.stride(0), q.stride(1), tree_key.stride(0), tree_key.stride(1), tree_value.stride(0), tree_value.stride(1),
        **shape, MEMBERS=members, PARTS=max(1, launch.MERGED // (members * launch.power_of_two(s.dim))), num_warps=4,
    )  # fmt: skip
    return out, lse


def _dot_type(dtype: torch.dtype) -> Any:
    """Triton's type of the matrix products. The interpreter computes bfloat16 wrongly, so there it is float32."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[
        dtype
    ]


@launch.on_its_device
def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`."""
    n, heads, dim = merge_shapes(o1, lse1, o2, lse2)
    out, lse, rows = o1.new_empty(n, heads, dim), lse1.new_empty(n, heads), 16
    if n * heads:
        jit.join[(-(-n * heads // rows),)](
            o1.contiguous(), lse1.contiguous(), o2.contiguous(), lse2.contiguous(), out, lse, n * heads,
            DIM=dim, WIDTH=launch.power_of_two(dim), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return out, lse
