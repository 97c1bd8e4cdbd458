"""Other libraries' attention of ragged trees over a paged cache, and attention in float64.

Setting a peer up is not timed.

A peer is a function of our arguments that returns a call without arguments, whose result is [N,
Hq, D]. It raises ImportError where its library is not installed and UnfitError where it does not
take the case. Pad rows are left out of every peer's work.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from echo import kernels

Args = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]


class UnfitError(Exception):
    """The peer does not take this case."""


def visible(args: Args, b: int) -> torch.Tensor:
    """bool [rows, context + rows] of one request."""
    first, end, length = (
        int(args["indptr"][b]),
        int(args["indptr"][b + 1]),
        int(args["prefix_lens"][b]),
    )
    bit = torch.arange(end - first, device=args["q"].device)
    own = ((args["mask"][first:end][:, bit // 32] >> (bit % 32)) & 1).bool()
    return torch.cat([own.new_ones(end - first, length), own], 1)


def gathered(args: Args, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, [context + rows, Hkv, D] each, in the queries' kind."""
    first, end, length = (
        int(args["indptr"][b]),
        int(args["indptr"][b + 1]),
        int(args["prefix_lens"][b]),
    )
    page = args["key_cache"].shape[1]
    at = torch.arange(length, device=args["q"].device)
    pages, slots = args["page_table"][b, at // page].long(), at % page
    kind = args["q"].dtype
    return tuple(  # type: ignore[return-value]
        torch.cat([args[f"{name}_cache"][pages, slots].to(kind), args[f"tree_{name}"][first:end]])
        for name in ("key", "value")
    )


def exact(args: Args, row: int) -> torch.Tensor:
    """float64 [Hq, D]: attention of one row."""
    b = int(args["request"][row])
    key, value = gathered(args, b)
    seen = visible(args, b)[row - int(args["indptr"][b])]
    key, value = key[seen].double(), value[seen].double()
    query = args["q"][row].double().unflatten(0, (key.shape[1], -1))
    score = torch.einsum("hgd,shd->hgs", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hgs,shd->hgd", score.softmax(-1), value).flatten(0, 1)


def padded(
    args: Args, least: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense q [B, Hq, R, D], k and v [B, Hkv, S, D], mask [B, 1, R, S]; real rows in [B * R]; R is
    at least ``least``.
    """
    rows, context = args["indptr"].diff().long(), args["prefix_lens"].long()
    batch, most, longest = len(rows), max(int(rows.max()), least), int((rows + context).max())
    if batch * most * longest > 1 << 28:
        raise UnfitError("the dense mask would be larger than 256 MiB")
    _, heads, dim = args["q"].shape
    kv_heads = args["tree_key"].shape[1]
    q = args["q"].new_zeros(batch, most, heads, dim)
    k, v = args["q"].new_zeros(2, batch, longest, kv_heads, dim)
    mask = torch.zeros(batch, 1, most, longest, dtype=torch.bool, device=q.device)
    mask[..., 0] = True  # a row that sees nothing would be NaN
    place = []
    for b in range(batch):
        first, number = int(args["indptr"][b]), int(rows[b])
        key, value = gathered(args, b)
        q[b, :number] = args["q"][first : first + number]
        k[b, : len(key)], v[b, : len(key)] = key, value
        mask[b, 0, :number] = False
        mask[b, 0, :number, : len(key)] = visible(args, b)
        place.append(b * most + torch.arange(number, device=q.device))
    return (
        q.transpose(1, 2).contiguous(),
        k.transpose(1, 2).contiguous(),
        v.transpose(1, 2).contiguous(),
        mask,
        torch.cat(place),
    )


def packed(out: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[B, Hq, R, D] back to the packed rows."""
    return out.transpose(1, 2).flatten(0, 1)[place]


def sdpa(args: Args) -> Call:
    """PyTorch's attention with a dense mask, over keys gathered outside the timing."""
    q, k, v, mask, place = padded(args)
    return lambda: packed(
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        ),
        place,
    )


@lru_cache
def compiled() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled once: its second shape makes the sizes dynamic."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # type: ignore[return-value]


def flex(args: Args) -> Call:
    """FlexAttention with a dense mask, over keys gathered outside the timing; compiled on CUDA."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, mask, place = padded(args, 2)  # of one row it copies from the host, in torch 2.11
    blocks = create_block_mask(
        lambda b, h, i, j: mask[b, 0, i, j],
        len(q),
        None,
        q.shape[2],
        k.shape[2],
        device=str(q.device),
        BLOCK_SIZE=128,
    )
    attend = compiled() if q.is_cuda else flex_attention
    return lambda: packed(
        attend(q, k, v, enable_gqa=q.shape[1] != k.shape[1], block_mask=blocks), place
    )


def in_cache(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both caches with each tree's rows right behind its context."""
    if args["key_cache"].dtype != args["q"].dtype:
        raise UnfitError("an 8-bit cache would hold the tree's keys in 8 bits too")
    page = args["key_cache"].shape[1]
    real = args["request"] < len(args["prefix_lens"])
    b = args["request"][real].long()
    local = torch.arange(len(real), device=real.device)[real] - args["indptr"].long()[b]
    at = args["prefix_lens"].long()[b] + local
    where = args["page_table"][b, at // page].long() * page + at % page
    caches = args["key_cache"].clone(), args["value_cache"].clone()
    for cache, own in zip(caches, (args["tree_key"], args["tree_value"]), strict=True):
        cache.flatten(0, 1)[where] = own[real]
    return caches


@lru_cache
def workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's, for all calls one after the other."""
    return torch.zeros(256 << 20, dtype=torch.uint8, device=device)


def flashinfer(args: Args) -> Call:
    """FlashInfer's paged prefill with a custom mask, the tree in the cache; its plan not timed."""
    import flashinfer as library

    caches, q = in_cache(args), args["q"][: int(args["indptr"][-1])]
    page, (_, heads, dim) = args["key_cache"].shape[1], args["q"].shape
    rows, context = args["indptr"].diff(), args["prefix_lens"]
    used = -(-(context + rows) // page)
    indices = torch.cat([args["page_table"][b, : int(n)] for b, n in enumerate(used.tolist())])
    starts = torch.cat([used.new_zeros(1), used.cumsum(0)]).int()
    mask = torch.cat([visible(args, b).flatten() for b in range(len(rows))])
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace(q.device), "NHD")
    out = torch.empty_like(q)
    uniform = {"uniform_q_len": int(rows[0])} if (rows == rows[0]).all() else {}
    known = inspect.signature(wrapper.plan).parameters
    wrapper.plan(
        args["indptr"], starts, indices, (context + rows - 1) % page + 1, heads,
        args["tree_key"].shape[1], dim, page, custom_mask=mask, q_data_type=args["q"].dtype,
        kv_data_type=args["key_cache"].dtype, **{k: v for k, v in uniform.items() if k in known},
    )  # fmt: skip
    return lambda: wrapper.run(q, caches, out=out)


def join(args: Args, before: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Call:
    """Our tree part behind another kernel's prefix of the real rows, without a copy."""
    count = int(args["indptr"][-1])
    names = "q", "tree_key", "tree_value", "request", "indptr", "mask"
    own = {name: args[name] if name == "indptr" else args[name][:count] for name in names}
    none = dict.fromkeys(("key_cache", "value_cache", "page_table", "prefix_lens"))

    def call() -> torch.Tensor:
        out, lse = before()
        return kernels.tree_attention(
            **own, **none, mode="tree", prefix_out=out, prefix_lse=lse, backend="triton"
        )[0]

    return call


def behind_flashinfer(args: Args) -> Call:
    """FlashInfer over the prefix, without a mask, and our tree part behind it."""
    import flashinfer as library

    q, caches = args["q"][: int(args["indptr"][-1])], (args["key_cache"], args["value_cache"])
    page, (_, heads, dim), context = caches[0].shape[1], q.shape, args["prefix_lens"]
    used = -(-context // page)
    indices = torch.cat([args["page_table"][b, : int(n)] for b, n in enumerate(used.tolist())])
    starts = torch.cat([used.new_zeros(1), used.cumsum(0)]).int()
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace(q.device), "NHD")
    wrapper.plan(
        args["indptr"], starts, indices, (context - 1) % page + 1, heads, args["tree_key"].shape[1],
        dim, page, causal=False, q_data_type=q.dtype, kv_data_type=caches[0].dtype,
    )  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)

    def before() -> tuple[torch.Tensor, torch.Tensor]:
        wrapper.run(q, caches, out=out, lse=lse, return_lse=True)
        return out, lse * math.log(2)  # its lse is of base 2

    return join(args, before)


def behind_flash3(args: Args) -> Call:
    """FlashAttention 3 over the prefix, not causal, and our tree part behind it."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

    if args["key_cache"].dtype != args["q"].dtype:
        raise UnfitError("its 8-bit path takes 8-bit queries")
    q = args["q"][: int(args["indptr"][-1])].contiguous()
    most = int(args["indptr"].diff().max())

    def before() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = flash_attn_with_kvcache(
            q, args["key_cache"], args["value_cache"], cache_seqlens=args["prefix_lens"],
            page_table=args["page_table"], cu_seqlens_q=args["indptr"], max_seqlen_q=most,
            softmax_scale=q.shape[-1] ** -0.5, causal=False, return_softmax_lse=True,
        )  # fmt: skip
        return out, lse.T  # [Hq, N]

    return join(args, before)


def xqa(args: Args) -> Call:
    """FlashInfer's XQA with ragged queries and our mask words, the tree in the cache; Hopper on."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    page, rows, count = args["key_cache"].shape[1], args["indptr"].diff(), int(args["indptr"][-1])
    most = int(rows.max())
    if page not in (16, 32, 64, 128) or most < 2:
        raise UnfitError("it takes pages of 16 to 128 tokens, and more than one row")
    mask = args["mask"][:count, : -(-most // 32)].contiguous().view(torch.uint16)
    q, caches, lengths = (
        args["q"][:count].contiguous(),
        in_cache(args),
        (args["prefix_lens"] + rows).to(torch.uint32),
    )
    table, out, scale = args["page_table"], torch.empty_like(q), q.shape[-1] ** -0.5
    return lambda: xqa_batch_decode_with_kv_cache(
        q, caches, workspace(q.device), table, lengths, table.shape[1] * page, bmm1_scale=scale,
        out=out, q_len_per_req=most, mask=mask, q_cu_seq_lens=args["indptr"],
    )  # fmt: skip


def sglang(args: Args) -> Call:
    """SGLang's Triton extend attention with a byte mask, over the same pages."""
    try:  # where it lies since 0.5.23, and where it lay before
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError:
        from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

    if args["key_cache"].dtype != args["q"].dtype:
        raise UnfitError("its 8-bit path takes other scales")
    page, count = args["key_cache"].shape[1], int(args["indptr"][-1])
    rows, context = args["indptr"].diff().long(), args["prefix_lens"].long()
    slots = []
    for b, length in enumerate(context.tolist()):
        at = torch.arange(length, device=args["q"].device)
        slots.append(args["page_table"][b, at // page].long() * page + at % page)
    starts = torch.cat([context.new_zeros(1), context.cumsum(0)]).int()
    mask = torch.cat([visible(args, b).flatten() for b in range(len(rows))])
    mask_starts = torch.cat([rows.new_zeros(1), (rows * (rows + context)).cumsum(0)])
    q, k, v = args["q"][:count], args["tree_key"][:count], args["tree_value"][:count]
    out, indices, most = torch.empty_like(q), torch.cat(slots), int(rows.max())
    flat = args["key_cache"].flatten(0, 1), args["value_cache"].flatten(0, 1)

    def call() -> torch.Tensor:
        extend_attention_fwd(
            q,
            k,
            v,
            out,
            *flat,
            args["indptr"],
            starts,
            indices,
            mask,
            True,
            mask_starts,
            most,
            1.0,
            1.0,
            sm_scale=q.shape[-1] ** -0.5,
        )
        return out

    return call


def chained(args: Args) -> Args:
    """The same rows as chains: every row sees those before it. The work of causal attention."""
    count, words = args["mask"].shape
    local = torch.arange(count, device=args["mask"].device)
    real = args["request"] < len(args["prefix_lens"])
    local = torch.where(
        real,
        local
        - args["indptr"].long()[args["request"].long().clamp(max=len(args["prefix_lens"]) - 1)],
        0,
    )
    bits = (local[:, None] + 1 - 32 * torch.arange(words, device=local.device)).clamp(0, 32)
    return args | {"mask": ((1 << bits) - 1).to(torch.int32)}


def flash3(args: Args) -> Call:
    """FlashAttention 3, causal, over the same pages."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

    rows, count = args["indptr"].diff(), int(args["indptr"][-1])
    q, (keys, values), lengths, most = (
        args["q"][:count].contiguous(),
        in_cache(args),
        args["prefix_lens"] + rows,
        int(rows.max()),
    )
    return lambda: flash_attn_with_kvcache(
        q, keys, values, cache_seqlens=lengths, page_table=args["page_table"],
        cu_seqlens_q=args["indptr"], max_seqlen_q=most, softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
    )  # fmt: skip


def flash2(args: Args) -> Call:
    """FlashAttention 2, causal, as in PyTorch, over keys gathered outside the timing."""
    from torch.nn.attention.varlen import varlen_attn

    if not args["q"].is_cuda:
        raise UnfitError("it runs on CUDA devices only")
    rows, count = args["indptr"].diff(), int(args["indptr"][-1])
    keys, values = (
        torch.cat(parts)
        for parts in zip(*(gathered(args, b) for b in range(len(rows))), strict=True)
    )
    ends = torch.cat([rows.new_zeros(1), (args["prefix_lens"] + rows).cumsum(0)]).int()
    q, most, longest = (
        args["q"][:count].contiguous(),
        int(rows.max()),
        int((args["prefix_lens"] + rows).max()),
    )
    group = {"enable_gqa": q.shape[1] != keys.shape[1]}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        group = {}
    return lambda: varlen_attn(
        q, keys, values, args["indptr"], ends, most, longest, window_size=(-1, 0), **group
    )


PEERS = {
    "echo behind flash attention 3": behind_flash3,
    "echo behind flashinfer": behind_flashinfer,
    "flashinfer": flashinfer,
    "flashinfer xqa": xqa,
    "sglang extend": sglang,
    "flex attention": flex,
    "sdpa with mask": sdpa,
}
CAUSAL = {"flash attention 3, causal": flash3, "flash attention 2, causal": flash2}
"""Of chains, not of trees: what attention of as many rows costs without a mask."""
