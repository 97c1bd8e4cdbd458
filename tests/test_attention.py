"""The reference tree attention against dense masked attention, the definition of both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import echo
from conftest import grow_all
from echo.kernels import tree_attention


def packed_batch(max_tree_rows=64):
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(3), budget=60, max_depth=4, max_verify_tokens_per_req=max_tree_rows
    )
    tree = grow_all(scheduler, torch.arange(3), k=4, seed=3)
    return scheduler.pack(tree, num_verify_tokens=64)


@pytest.mark.parametrize(("page", "heads", "kv_heads"), [(1, 4, 4), (16, 6, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_dense_attention(page, heads, kv_heads, window):
    packed, dim = packed_batch(), 16
    context = torch.tensor([5, 0, 37], dtype=torch.int32)
    pages = 120
    k_cache, v_cache = torch.randn(2, pages, page, kv_heads, dim)
    table = torch.randperm(pages)[: 3 * 37].view(3, 37).int()
    q = torch.randn(packed.num_rows, heads, dim)
    k, v = torch.randn(2, packed.num_rows, kv_heads, dim)
    out, lse = tree_attention(
        q,
        k_cache,
        v_cache,
        table,
        context,
        k,
        v,
        packed.request,
        packed.indptr,
        packed.mask,
        window=window,
        depth=packed.depth,
    )
    for b in range(3):
        first, end, length = int(packed.indptr[b]), int(packed.indptr[b + 1]), int(context[b])
        at = torch.arange(length)
        where = table[b, at // page].long() * page + at % page
        keys = torch.cat([k_cache.flatten(0, 1)[where], k[first:end]])
        values = torch.cat([v_cache.flatten(0, 1)[where], v[first:end]])
        visible = packed.visible()[first:end, : end - first]
        mask = torch.cat([torch.ones(end - first, length, dtype=torch.bool), visible], 1)
        position = torch.cat([at, length + packed.depth[first:end]])
        if window:
            mask &= position > (length + packed.depth[first:end])[:, None] - window
        expand = lambda x: x.repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
        dense = F.scaled_dot_product_attention(
            q[first:end].transpose(0, 1), expand(keys), expand(values), attn_mask=mask
        )
        assert torch.allclose(out[first:end], dense.transpose(0, 1), atol=1e-5)
        scores = torch.einsum("nhd,hsd->nhs", q[first:end], expand(keys)) / dim**0.5
        assert torch.allclose(
            lse[first:end], scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1), atol=1e-5
        )
    pads = slice(int(packed.indptr[-1]), None)
    assert torch.allclose(out[pads], v[pads].repeat_interleave(heads // kv_heads, 1), atol=1e-6)


def test_softcap_bounds_scores():
    packed = packed_batch()
    empty = torch.zeros(1, 1, 1, 8)
    table, context = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    q, k, v = 100 * torch.randn(3, packed.num_rows, 1, 8)
    _, lse = tree_attention(
        q,
        empty,
        empty,
        table,
        context,
        k,
        v,
        packed.request,
        packed.indptr,
        packed.mask,
        softcap=2.0,
    )
    assert (lse <= 2.0 + packed.visible().sum(1, keepdim=True).log() + 1e-5).all()


def test_bad_input():
    packed = packed_batch()
    q = torch.zeros(packed.num_rows, 3, 8)
    cache = torch.zeros(1, 1, 2, 8)
    table, context = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    kv = torch.zeros(packed.num_rows, 2, 8)
    with pytest.raises(
        echo.EchoError, match="q: expected a multiple of the 2 heads of tree_key, got 3 heads"
    ):
        tree_attention(
            q, cache, cache, table, context, kv, kv, packed.request, packed.indptr, packed.mask
        )
    with pytest.raises(echo.EchoError, match="mask: expected int32"):
        tree_attention(
            q[:, :2],
            cache,
            cache,
            table,
            context,
            kv,
            kv,
            packed.request,
            packed.indptr,
            packed.mask.long(),
        )
