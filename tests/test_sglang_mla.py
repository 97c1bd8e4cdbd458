"""A DeepSeek-V3 model verifies the plugin's chains in SGLang, without a GPU.

Real, from the wheel: ``EAGLEWorkerV2``, the MLA halves of ``FlashAttentionBackend`` and
``TRTLLMMLABackend``, their metadata, captured or not, and page tables, the runner's tiers, slots and
layouts, and the Triton kernels that pad queries. Real,
from transformers: the model (tiny, random weights, a mixture of experts), whose own generation is
the reference. In between latents are absorbed and cached in pages as engines do. The two attention
kernels are references in torch, called as the wheel calls them.
"""

from __future__ import annotations

import copy
import inspect
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sglang_server import (
    VOCAB,
    Opaque,
    Server,
    runner_of,
    sglang_engine,  # noqa: F401
    sglang_folder,  # noqa: F401
    texts,
)

pytestmark = pytest.mark.peers
HEADS, LATENT, ROPE, NOPE, VALUE, STEPS, LENGTH = 4, 32, 8, 16, 16, 4, 256


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    torch.manual_seed(3)
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=24, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE,
        qk_nope_head_dim=NOPE, v_head_dim=VALUE, max_position_embeddings=LENGTH,
        initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval().requires_grad_(False)


def generated(model, text, count):
    """The model's own greedy continuation, by transformers."""
    ids = torch.tensor([text])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
    return out[0].tolist()


def softmax_of(query, keys, scale):
    """Attention of [H, D] over cached latents and keys [n, D]: [H, latent]."""
    return torch.softmax(query @ keys.T * scale, dim=-1) @ keys[:, :LATENT]


def trtllm(*, query, kv_cache, block_tables, seq_lens, max_seq_len, bmm1_scale, kv_lora_rank,
           qk_rope_head_dim, qk_nope_head_dim, **_):  # fmt: skip
    """``trtllm_batch_decode_with_kv_cache_mla``: of q rows a request the last sees all keys."""
    assert (kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim) == (LATENT, ROPE, NOPE)
    assert int(seq_lens.max()) <= max_seq_len
    out = torch.full((*query.shape[:3], LATENT), torch.nan)
    for b, length in enumerate(seq_lens.tolist()):
        pages = block_tables[b, : -(-length // kv_cache.shape[2])].long()
        keys = kv_cache[pages, 0].flatten(0, 1)
        for i in range(query.shape[1]):
            seen = keys[: length - query.shape[1] + i + 1]
            out[b, i] = softmax_of(query[b, i], seen, bmm1_scale)
    return out


def fa3(**given):
    """FA3 with ``qv``: causal over a page table, rows of each request from ``cu_seqlens_q`` on."""
    own = SimpleNamespace(**given)
    assert own.causal and own.ver == 3 and own.max_seqlen_q >= int(own.cu_seqlens_q.diff().max())
    query = torch.cat([own.qv, own.q], dim=-1)
    out = torch.full_like(own.qv, torch.nan)
    cache = torch.cat([own.v_cache, own.k_cache], dim=-1)
    for b, (first, end) in enumerate(own.cu_seqlens_q.unfold(0, 2, 1).tolist()):
        keys = cache[own.page_table[b].long()].flatten(0, 2)
        for i in range(first, end):
            seen = keys[: int(own.cache_seqlens[b]) - end + i + 1]
            out[i] = softmax_of(query[i], seen, own.softmax_scale)
    return out


def absorbed(attend):
    """``DeepseekV3Attention.forward`` of packed rows: queries in the latents' space, one latent and
    one key a row in the cache.
    """
    deepseek = import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")

    def forward(self, hidden_states, position_embeddings, **_):
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.view(1, -1, HEADS, NOPE + ROPE).transpose(1, 2)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split([LATENT, ROPE], dim=-1)
        rotate = deepseek.apply_rotary_pos_emb_interleave
        q_rope, key = rotate(q[..., NOPE:], key[:, None], *position_embeddings)
        up = self.kv_b_proj.weight.view(HEADS, NOPE + VALUE, LATENT)
        q_latent = torch.einsum("hnd,hdr->nhr", q[0, ..., :NOPE], up[:, :NOPE])
        out = attend(
            self, q_latent, q_rope[0].transpose(0, 1), self.kv_a_layernorm(latent)[0], key[0, 0]
        )
        out = torch.einsum("nhr,hvr->nhv", out.view(-1, HEADS, LATENT), up[:, NOPE:])
        return self.o_proj(out.flatten(1)[None]), None

    return forward


class Target:
    """The model behind SGLang's target worker: its cache, its layers, its attention backend."""

    def __init__(self, model, backend, size):
        self.model, self.backend = model, backend
        self.cache = torch.full((len(model.model.layers), size, 1, LATENT + ROPE), torch.nan)
        backend.token_to_kv_pool = SimpleNamespace(
            get_key_buffer=lambda layer: self.cache[layer], set_mla_kv_buffer=self.store
        )

    def store(self, layer, slots, latent, key):
        self.cache[layer.layer_id, slots] = torch.cat([latent, key], dim=-1)

    def run(self, ids, positions, attend):
        model, layers = self.model.model, self.model.model.layers
        try:
            for layer in layers:
                layer.self_attn.forward = absorbed(attend).__get__(layer.self_attn)
            with torch.no_grad():
                hidden = model.embed_tokens(ids)[None]
                turns = model.rotary_emb(hidden, positions[None])
                for layer in layers:
                    hidden = layer(hidden, position_embeddings=turns)
                return self.model.lm_head(model.norm(hidden))[0]
        finally:
            for layer in layers:
                del layer.self_attn.forward

    def prefill(self, text, slots):
        def attend(module, q_latent, q_rope, latent, key):
            keys, query = torch.cat([latent, key], dim=-1), torch.cat([q_latent, q_rope], dim=-1)
            self.cache[module.layer_idx, slots, 0] = keys
            rows = range(len(query))
            return torch.stack([softmax_of(query[i], keys[: i + 1], module.scaling) for i in rows])

        self.run(torch.tensor(text), torch.arange(len(text)), attend)

    def verify(self, forward_batch, ids):
        """SGLang's pass: its metadata, then its ``forward_extend`` in every layer."""
        self.backend.init_forward_metadata(forward_batch)
        return self.forward(forward_batch, ids)

    def forward(self, forward_batch, ids):
        def attend(module, q_latent, q_rope, latent, key):
            layer = SimpleNamespace(
                layer_id=module.layer_idx, tp_q_head_num=HEADS, tp_k_head_num=1, tp_v_head_num=1,
                head_dim=LATENT + ROPE, v_head_dim=LATENT, scaling=module.scaling, logit_cap=0.0,
                sliding_window_size=-1, is_cross_attention=False, attn_type=None, k_scale=None,
            )  # fmt: skip
            return self.backend.forward_extend(
                q_latent.flatten(1), latent[:, None], latent[:, None], layer, forward_batch,
                q_rope=q_rope, k_rope=key[:, None],
            )  # fmt: skip

        return self.run(ids, forward_batch.positions, attend)


class Captured:
    """The target's pass in one recorded graph for each tier of rows, as SGLang's runner would have
    it: the runner's tiers, slots and layouts, and the backend's own captured metadata.
    """

    def __init__(self, target, runner):
        self.target, self.runner, self.graphs = target, runner, {}
        target.backend.init_cuda_graph_state(runner.max_bs, max(runner.capture_num_tokens))

    def verify(self, forward_batch, ids):
        rows = forward_batch.spec_info.ragged_verify_layout.graph_num_tokens
        if rows not in self.graphs:
            self.graphs[rows] = self.capture(rows, forward_batch)
            layout = forward_batch.spec_info.ragged_verify_layout  # staged already from then on
            self.runner._stage_ragged_verify_layout(layout, rows)
        static, recording, logits = self.graphs[rows]
        static.seq_lens.fill_(1)
        static.req_pool_indices.zero_()
        for name in ("input_ids", "positions", "out_cache_loc", "seq_lens", "req_pool_indices"):
            value = getattr(forward_batch, name)
            getattr(static, name)[: len(value)].copy_(value)
        live = copy.copy(static)
        live.spec_info = forward_batch.spec_info
        self.target.backend.init_forward_metadata_out_graph(live)
        recording.replay()
        return logits.clone()

    def capture(self, rows, like):
        slots = self.runner._ragged_capture_slots(rows)
        static = copy.copy(like)
        vars(static).update(
            batch_size=slots, spec_info=self.runner.get_spec_info(rows), seq_lens_cpu=None,
            seq_lens=torch.ones(slots, dtype=torch.int64),
            req_pool_indices=torch.zeros(slots, dtype=torch.int64),
            **{name: torch.zeros(rows, dtype=torch.int64)
               for name in ("input_ids", "positions", "out_cache_loc")},
        )  # fmt: skip
        backend = self.target.backend
        backend.init_forward_metadata_out_graph(static, in_capture=True)
        with Opaque.record() as recording:
            backend.init_forward_metadata_in_graph(static)
            logits = self.target.forward(static, static.input_ids)
        return static, recording, logits


@pytest.fixture
def serve(engine, model, monkeypatch):
    """A server of three MTP-like chains whose target is the model, on one of SGLang's backends."""
    eagle = import_module("sglang.srt.speculative.eagle_worker_v2")
    monkeypatch.setattr(eagle, "_is_cuda", True)
    context = import_module("sglang.srt.runtime_context")
    monkeypatch.setattr(context.get_parallel(), "dcp_enabled", False, raising=False)
    locations = import_module("sglang.srt.mem_cache.memory_pool").KVWriteLoc
    for name in ("for_batch", "for_layer"):
        monkeypatch.setattr(
            locations, name, lambda batch, *_, **__: batch.out_cache_loc, raising=False
        )
    still = SimpleNamespace(is_translating=False, reads_are_translated=False)

    def flash(table, page_size):
        module = import_module("sglang.srt.layers.attention.flashattention_backend")
        attention = import_module("sglang.kernels.ops.attention.flash_attention")
        signature = inspect.signature(attention.flash_attn_with_kvcache)
        kernel = lambda **given: fa3(**signature.bind(**given).arguments)
        monkeypatch.setattr(module, "flash_attn_with_kvcache", Opaque(kernel))
        monkeypatch.setattr(module, "is_cp_active", lambda _: False)
        monkeypatch.setattr(module, "maybe_create_verify_mask", lambda **_: None)
        paged = import_module("sglang.srt.mem_cache.layout.paged_view").paged_view
        monkeypatch.setattr(module, "paged_view", paged)
        backend = object.__new__(module.FlashAttentionBackend)
        none = dict.fromkeys(("_get_scheduler_metadata", "local_attn_builder", "_verify_mask"))
        off = ("use_sliding_window_kv_pool", "has_swa", "is_encoder_decoder", "skip_prefill",
               "is_draft_runner", "fa_skip_kv_cache", "kv_cache_is_mxfp8")  # fmt: skip
        vars(backend).update(
            none, **dict.fromkeys(off, False), use_mla=True, fa_impl_ver=3, topk=1, num_splits=0,
            speculative_num_steps=STEPS, speculative_step_id=0, max_num_pages=LENGTH // page_size, kv_cache_dtype_str="auto",
            req_to_token_pool=SimpleNamespace(req_to_token=table), speculative_num_draft_tokens=STEPS + 1,
        )  # fmt: skip
        return backend

    def blackwell(table, page_size):
        module = import_module("sglang.srt.layers.attention.trtllm_mla_backend")
        decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache_mla=Opaque(trtllm))
        monkeypatch.setattr(module, "flashinfer", SimpleNamespace(decode=decode), raising=False)
        monkeypatch.setattr(module, "maybe_create_verify_mask", lambda **_: None)
        concat = lambda nope, rope: torch.cat([nope, rope], dim=-1)
        monkeypatch.setattr(module, "concat_mla_absorb_q_general", concat)
        backend = object.__new__(module.TRTLLMMLABackend)
        none = ("_kv_shard_pool", "padded_q_buffer", "unpad_output_buffer",
                "_multi_ctas_kv_counter_buffer", "workspace_buffer", "_verify_mask")  # fmt: skip
        vars(backend).update(
            dict.fromkeys(none), num_draft_tokens=STEPS + 1, data_type=torch.float32,
            backend="trtllm-gen", qk_nope_head_dim=NOPE, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE,
            disable_chunked_prefix_cache=False, forward_prefill_metadata=None,
            decode_cuda_graph_metadata={}, init_cuda_graph_state=lambda *_: None,  # FlashInfer's too
            init_forward_metadata_in_graph=lambda _: None,
        )  # fmt: skip
        blocks = torch.full((4, LENGTH // page_size), -1, dtype=torch.int32)
        backend.decode_cuda_graph_kv_indices = blocks
        return backend

    def build(kind, page_size, prompts, drafts, graphs):
        server = Server(drafts, prompts, topk=1, steps=STEPS)
        pages = (1 + torch.randperm(3 * LENGTH // page_size)).view(3, -1)  # page 0 is SGLang's pad
        slots = pages[..., None] * page_size + torch.arange(page_size)
        server.table = slots.flatten(1).int()
        server.worker.req_to_token_pool.req_to_token = server.table
        size = 4 * LENGTH
        server.pool.token = torch.full((size,), -1)
        backend = {"fa3": flash, "trtllm_mla": blackwell}[kind](server.table, page_size)
        vars(backend).update(
            req_to_token=server.table, device="cpu", page_size=page_size, kv_index_translator=still,
            max_context_len=LENGTH,
        )  # fmt: skip
        worker = server.worker.target_worker
        target = Target(model, backend, size)
        for text, index in zip(prompts, server.req_pool_indices, strict=True):
            where = server.table[index, : len(text) - 1].long()
            server.pool.token[where] = torch.tensor(text[:-1])
            target.prefill(text[:-1], where)
        worker.model_runner.attn_backend = backend
        worker.forward = Captured(target, runner_of(server)).verify if graphs else target.verify
        return server

    return build


@pytest.mark.parametrize(("ragged", "graphs"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("kind", "page_size"), [("fa3", 1), ("fa3", 16), ("trtllm_mla", 32)])
def test_chains_write_what_the_model_generates(
    serve, model, monkeypatch, kind, page_size, ragged, graphs
):  # fmt: skip
    """Greedy identity of verified chains and plain decoding, at uniform and at ragged lengths, and
    where the whole pass is replayed.
    """
    monkeypatch.setenv("ECHO_RAGGED", str(int(ragged)))
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", "9")
    prompts, steps = texts(2, 3), 6
    wanted = [generated(model, text, steps * (STEPS + 1)) for text in prompts]
    follows = torch.zeros(VOCAB, VOCAB)  # a drafter that has seen the texts, word by word
    for text in wanted:
        for before, after in pairwise(text):
            follows[before, after] += 2
    drafts = SimpleNamespace(last=follows + torch.rand(VOCAB, VOCAB))
    server = serve(kind, page_size, prompts, drafts, graphs)
    lengths = set()
    for _ in range(steps):
        _, verified = server.step()
        lengths.add(tuple(verified.echo_packed.indptr.diff().tolist()))
    for text, own in zip(server.texts, wanted, strict=True):
        assert text == own[: len(text)]
    emitted = sum(map(len, server.texts)) - sum(map(len, prompts))
    assert emitted > steps * 3 * 1.3
    rows = 10 if graphs else 9 if ragged else 3 * (STEPS + 1)  # a captured tier, the budget, all
    assert set(server.worker.target_worker.rows) == {rows}
    assert len(lengths) > 1 or not ragged
