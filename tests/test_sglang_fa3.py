"""SGLang's FlashAttention backend with the plugin's ragged trees and chains, without a GPU.

Real, from the wheel: its registry, ``FlashAttentionBackend``'s metadata and buffers, the kernel of
page tables. FA3 itself is a reference in torch, called by its own signature.
"""

from __future__ import annotations

import copy
import inspect
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import echo
from echo.kernels import tree_attention
from forests import forest
from sglang_server import (
    Opaque,
    sglang_engine,  # noqa: F401
    sglang_folder,  # noqa: F401
)

pytestmark = pytest.mark.peers
HEADS, KV_HEADS, DIM, LENGTHS = 4, 2, 16, (5, 0, 33)


def flash(q, keys, values, table, lengths, indptr, scale, softcap):
    """What FA3 computes over a paged prefix that is not causal: out [N, H, D], lse [H, N].

    Rows of no request are not written: NaN.
    """
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:2], torch.nan).T.contiguous()
    for b, (first, end) in enumerate(indptr.unfold(0, 2, 1).tolist()):
        own = [cache[table[b].long()].flatten(0, 1)[: int(lengths[b])] for cache in (keys, values)]
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in own)
        scores = torch.einsum("nhd,mhd->hnm", q[first:end], k) * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        lse[:, first:end] = scores.logsumexp(-1)
        out[first:end] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
    return out, lse


@pytest.fixture
def fa3(engine, monkeypatch):
    """SGLang's FlashAttention backend, built by its registry as the target's; calls are checked
    against FA3's own signature.
    """
    attention = import_module("sglang.kernels.ops.attention.flash_attention")
    backends = import_module("sglang.srt.layers.attention.attention_registry")
    module = import_module("sglang.srt.layers.attention.flashattention_backend")
    signature, calls = inspect.signature(attention.flash_attn_with_kvcache), []

    def kernel(**given):
        own = SimpleNamespace(**signature.bind(**given).arguments)
        assert own.ver == 3 and own.causal is False and own.return_softmax_lse
        assert own.k_cache.shape[1] * own.page_table.shape[1] >= int(own.cache_seqlens.max())
        assert own.max_seqlen_q >= int(own.cu_seqlens_q.diff().max())
        calls.append(own)
        return *flash(
            own.q, own.k_cache, own.v_cache, own.page_table, own.cache_seqlens, own.cu_seqlens_q,
            own.softmax_scale, own.softcap,
        ), None  # fmt: skip

    locations = import_module("sglang.srt.mem_cache.memory_pool").KVWriteLoc
    monkeypatch.setattr(locations, "for_batch", lambda batch, **_: batch.out_cache_loc)
    monkeypatch.setattr(attention, "flash_attn_with_kvcache", Opaque(kernel))
    monkeypatch.setenv("ECHO_RAGGED", "1")

    def build(page_size):
        pool = SimpleNamespace(cache=torch.randn(2, 400, KV_HEADS, DIM))

        def store(_, where, k, v):
            pool.cache[0, where], pool.cache[1, where] = k, v

        pool.set_kv_buffer, pool.get_kv_buffer = store, lambda _: tuple(pool.cache)
        table = torch.randperm(400 // page_size)[: 3 * (96 // page_size)].view(3, -1)
        table = table[..., None] * page_size + torch.arange(page_size)
        backend = object.__new__(module.FlashAttentionBackend)
        none = dict.fromkeys(("_get_scheduler_metadata", "local_attn_builder", "_verify_mask"))
        off = ("use_mla", "use_sliding_window_kv_pool", "has_swa", "is_encoder_decoder",
               "skip_prefill", "is_draft_runner")  # fmt: skip
        vars(backend).update(
            none, **dict.fromkeys(off, False), req_to_token=table.flatten(1).int(), device="cpu",
            page_size=page_size, token_to_kv_pool=pool, num_splits=0, fa_impl_ver=3, topk=3,
            speculative_num_draft_tokens=20, speculative_num_steps=5, max_context_len=96,
            speculative_step_id=0,
        )  # fmt: skip
        monkeypatch.setattr(module, "FlashAttentionBackend", lambda _: backend)
        monkeypatch.setattr(backends, "get_device_capability", lambda: (9, 0))
        kinds = {"is_draft_worker": False, "use_mla_backend": False}
        assert backends.ATTENTION_BACKENDS["fa3"](SimpleNamespace(**kinds)) is backend
        return backend, pool, calls

    monkeypatch.setattr(
        import_module("sglang.srt.layers.attention.flashattention_backend"), "paged_kv_view",
        lambda cache, size, heads, dim: cache.view(-1, size, heads, dim),
    )  # fmt: skip
    return build


def verify_batch(backend, packed, slots, lengths=LENGTHS):
    """A narrow verify batch, as a graph's view pads it to ``slots``."""
    modes = import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    layout = SimpleNamespace(graph_num_tokens=packed.num_rows)
    info = SimpleNamespace(draft_token_num=20, ragged_verify_layout=layout, echo_packed=packed)
    pad = slots - packed.batch
    request = packed.request.clamp(max=packed.batch - 1).long()
    at = torch.tensor(lengths)[request] + packed.local_row
    where = backend.req_to_token[request, at].long()
    return SimpleNamespace(
        forward_mode=modes.TARGET_VERIFY, spec_info=info, batch_size=slots,
        seq_lens=torch.tensor([*lengths, *[1] * pad]), _attn_output=None,
        req_pool_indices=torch.tensor([*range(packed.batch), *[0] * pad]),
        out_cache_loc=torch.where(packed.request < packed.batch, where, 399),
    )  # fmt: skip


def layer_of(cap):
    return SimpleNamespace(
        layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS,
        qk_head_dim=DIM, v_head_dim=DIM, head_dim=DIM, scaling=DIM**-0.5, logit_cap=cap,
        sliding_window_size=-1, is_cross_attention=False,
    )  # fmt: skip


def expected(backend, pool, packed, q, k, v, cap):
    size = backend.page_size
    pages = (backend.req_to_token[:, ::size] // size).int()
    keys, values = pool.cache.view(2, -1, size, KV_HEADS, DIM)
    tree = k, v, packed.request, packed.indptr, packed.mask
    lengths = torch.tensor(LENGTHS).int()
    return tree_attention(q, keys, values, pages, lengths, *tree, softcap=cap or None)[0].flatten(1)


@pytest.fixture
def rows():
    return lambda packed: [
        torch.randn(packed.num_rows, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize(("page_size", "cap"), [(1, 0.0), (4, 0.0), (16, 3.0)])
def test_ragged_trees_on_fa3_are_the_reference(fa3, rows, page_size, cap):
    """FA3 over the prefix joined with the tree part, any page size; keys and values are kept."""
    backend, pool, calls = fa3(page_size)
    packed = forest(3, 3, 20, empty=False, pads=2).packed
    batch, (q, k, v) = verify_batch(backend, packed, 3), rows(packed)
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(q.flatten(1), k, v, layer_of(cap), batch)
    torch.testing.assert_close(
        out, expected(backend, pool, packed, q, k, v, cap), atol=2e-5, rtol=2e-5
    )
    real = packed.request < 3
    assert torch.equal(pool.cache[0, batch.out_cache_loc[real]], k[real]) and len(calls) == 1
    with pytest.raises(echo.EchoError, match=r"expected plain attention layers, got \['sinks'\]"):
        backend.forward_extend(q, k, v, layer_of(cap), batch, sinks=torch.ones(HEADS))


def test_one_captured_pass_serves_any_raggedness(fa3, rows, monkeypatch):
    """Recorded once, replayed for other trees; kernels' arguments lie where they lay. A uniform pass
    afterwards is SGLang's own.
    """
    backend, pool, calls = fa3(4)
    backend.init_cuda_graph_state(6, 6 * 20)
    static, inputs = None, []
    for seed in range(4):
        packed = forest(seed, 3, 20, empty=False, pads=0).packed
        packed = forest(seed, 3, 20, empty=False, pads=44 - packed.num_rows).packed
        batch, new = verify_batch(backend, packed, 6), rows(packed)
        if static is None:
            static, inputs = copy.copy(batch), [torch.zeros_like(x) for x in new]
            static.out_cache_loc = torch.full_like(batch.out_cache_loc, 399)
            backend.init_forward_metadata_out_graph(static, in_capture=True)
            with Opaque.record() as recording:
                backend.init_forward_metadata_in_graph(static)
                out = backend.forward_extend(*inputs, layer_of(0.0), static)
        for buffer, value in zip(
            (*inputs, static.out_cache_loc), (*new, batch.out_cache_loc), strict=True
        ):
            buffer.copy_(value)
        backend.init_forward_metadata_out_graph(batch)
        recording.replay()
        real, own = packed.request < 3, expected(backend, pool, packed, *new, 0.0)
        torch.testing.assert_close(out[real], own[real], atol=2e-5, rtol=2e-5)
        assert bool(out.isfinite().all())
        assert torch.equal(pool.cache[0, batch.out_cache_loc[real]], new[1][real])
    kernel = [[own.page_table.data_ptr(), own.cu_seqlens_q.data_ptr()] for own in calls]
    assert len(kernel) == 5 and len({tuple(each) for each in kernel}) == 1
    plain, uniform = [], type(backend).__bases__[1]
    monkeypatch.setattr(
        uniform, "init_forward_metadata_out_graph", lambda *a, **_: plain.append(a[1])
    )
    batch.spec_info.ragged_verify_layout = None
    backend.init_forward_metadata_out_graph(batch)
    assert plain == [batch] and backend.echo_step is None


@pytest.mark.parametrize("page_size", [1, 4])
def test_fa3_reads_a_chains_layout_itself(fa3, engine, page_size):
    """SGLang's own metadata, of MHA and of MLA: where rows begin, what each sees, and its pages."""
    backend, _, _ = fa3(page_size)
    own = object.__new__(type(backend).__bases__[1])
    pool = SimpleNamespace(req_to_token=backend.req_to_token)
    still = SimpleNamespace(is_translating=False)
    vars(own).update(vars(backend), topk=1, req_to_token_pool=pool, kv_index_translator=still)
    policy = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=9, max_depth=4)
    tree = policy.begin(torch.arange(3), num_verify_tokens=9)
    odds = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.2, 0.2, 0.2, 0.2], [0.99, 0.9, 0.9, 0.1]])
    drafts = torch.zeros(3, 4, 1, dtype=torch.int64)
    packed = policy.pack(policy.grow_positions(tree, drafts, odds.log()[..., None]))
    modes = import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    batch = SimpleNamespace(
        forward_mode=modes.TARGET_VERIFY, seq_lens=torch.tensor(LENGTHS), seq_lens_cpu=None,
        batch_size=3, req_pool_indices=torch.arange(3), encoder_lens=None,
    )  # fmt: skip
    info = SimpleNamespace(draft_token_num=5, prepared_out_cache_loc=None)
    batch.spec_info = engine.ragged.narrow(info, batch, packed, own.req_to_token)
    own.init_forward_metadata(batch)
    read, lens = own.forward_metadata, packed.indptr.diff()
    assert lens.tolist() == [4, 1, 4] and read.cu_seqlens_q.tolist() == [0, 4, 5, 9]
    assert torch.equal(read.cache_seqlens_int32, torch.tensor(LENGTHS).int() + lens)
    pages = own.req_to_token[:, ::page_size] // page_size
    assert torch.equal(read.page_table, pages[:, : read.page_table.shape[1]])
