"""The SGLang plugin (examples/sglang) inside the engine's own code.

    ECHO_PEERS=install pytest -m peers tests/test_sglang_plugin.py  # and _ragged, _fa3, _graphs

Real, from the wheel: the hook registry, ``EAGLEWorkerV2`` and its draft worker from draft to draft
extend, ``run_eagle_verify``, greedy acceptance, cache moves, and ``TritonAttnBackend``. Stand-ins:
model runners (a toy model), the batch, memory pools, contexts.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import echo
from echo.kernels import tree_attention
from echo.testing import importers
from echo.tree import layouts
from forests import forest
from sglang_server import (
    STEPS,
    TOPK,
    VOCAB,
    N,
    Server,
    Tables,
    sglang_engine,  # noqa: F401
    sglang_folder,  # noqa: F401
    texts,
)

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("ragged", "mask", "biased"),
    [
        (False, None, False),
        (False, "FULL_MASK", False),
        (False, "QLEN_ONLY", False),
        (True, None, False),
        (True, None, True),
    ],
)
def test_planned_steps_write_the_targets_own_text(engine, monkeypatch, ragged, mask, biased):
    """Logits of a packed pass are spread over n rows a request only where more than their argmax
    is read.
    """
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", "14")
    monkeypatch.setenv("ECHO_RAGGED", str(int(ragged)))
    tables, prompts = Tables(7), texts(1, 3)
    server = Server(tables, prompts, mask)
    server.logit_bias = torch.zeros(3, VOCAB) if biased else None
    for _ in range(5):
        result, verified = server.step()
        packed, logits = verified.echo_packed, server.worker.target_worker.logits.next_token_logits
        packed.validate(max_verify_tokens_per_req=N)
        wide = biased or not ragged
        assert len(logits) == (3 * N if wide else 14)
        own = layouts.unpad(packed, logits.view(3, N, VOCAB)) if wide else logits
        ours, theirs = echo.accept(packed, logits=own), engine.accept(packed, result, N)
        for name in ("tokens", "rows", "num_emitted", "bonus"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))
    emitted = sum(map(len, server.texts)) - sum(map(len, prompts))
    assert emitted > 5 * 3 * 1.3
    assert set(server.worker.target_worker.rows) == ({14} if ragged else {3 * N})
    assert server.worker.target_worker.echo_planner.plan.space.history.num_steps == 5


def test_a_narrow_pass_has_the_packed_rows_and_gives_back_uniform_ones(engine):
    """Pads write to the pad slot; outputs lie where SGLang's sampler looks for them, slots where
    draft extend does.
    """
    packed, n, ragged = forest(2, 3, 8, empty=False, pads=3).packed, 9, engine.ragged
    lengths, table = torch.tensor([5, 1, 7]), torch.randperm(5 * 30).view(5, 30).int()
    requests = torch.tensor([4, 0, 2])
    batch = SimpleNamespace(seq_lens=lengths, req_pool_indices=requests)
    links = layouts.sglang(packed, n, lengths)
    info = SimpleNamespace(
        draft_token=links.draft_tokens, positions=links.positions, draft_token_num=n,
        prepared_out_cache_loc=None, kv_loc_plan="planned",
    )  # fmt: skip
    rows = ragged.narrow(info, batch, packed, table)
    real = packed.request < 3
    assert torch.equal(rows.draft_token, packed.tokens) and rows.kv_loc_plan is None
    assert torch.equal(rows.positions[real], packed.positions(lengths)[real])
    slots = [
        table[r, length : length + n].tolist() for r, length in zip(requests, lengths, strict=True)
    ]
    at = zip(packed.request[real], packed.local_row[real], strict=True)
    expected = [slots[b][i] for b, i in at]
    assert rows.prepared_out_cache_loc[real].tolist() == expected
    assert (~real).sum() == 3 and not rows.prepared_out_cache_loc[~real].any()
    layout = rows.ragged_verify_layout
    assert torch.equal(layout.verify_lens, packed.indptr.diff())
    assert (layout.graph_num_tokens, layout.qo_indptr_device.tolist()) == (
        packed.num_rows, packed.indptr.tolist(),
    )  # fmt: skip

    info.echo_rows, seen = rows, []

    def prepared(verify_input, _pool, inside, _worker):
        seen.append((verify_input, inside.spec_info))
        inside.out_cache_loc = verify_input.prepared_out_cache_loc

    batch.spec_info = info
    ragged.prepare(prepared, info, None, batch, None)
    assert seen == [(rows, rows)] and batch.spec_info is info
    assert batch.out_cache_loc.tolist() == [slot for each in slots for slot in each]
    own = torch.arange(packed.num_rows)
    output = SimpleNamespace(next_token_logits=own[:, None], hidden_states=2 * own[:, None])
    batch.sampling_info, batch.return_logprob = SimpleNamespace(
        acc_additive_penalties=None, acc_scaling_penalties=None, logit_bias=None,
        has_watermark_candidates=False, is_all_greedy=False,
    ), False  # fmt: skip
    sampled = ragged.sample(lambda _, __, output, *___: output, info, batch, output)
    logits, hidden = sampled.next_token_logits.view(3, n), sampled.hidden_states.view(3, n)
    for b, (first, end) in enumerate(packed.indptr.unfold(0, 2, 1).tolist()):
        assert logits[b, : end - first].tolist() == list(range(first, end))
        assert torch.equal(hidden, 2 * logits)


def test_with_nothing_asked_for_the_trees_are_eagles_own(engine, monkeypatch):
    """The same drafts through SGLang's own selection and tree builder, and through ours."""
    prompts, steps = texts(2, 4), []
    ours = Server(Tables(3), prompts)
    for _ in range(3):
        steps.append(ours.step())
    module = import_module("sglang.srt.speculative.eagle_worker_v2")
    for name in ("organize_draft_results", "build_eagle_verify_input"):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    worker = module.EagleDraftWorker
    monkeypatch.setattr(worker, "draft_forward", worker.draft_forward.__wrapped__)
    theirs = Server(Tables(3), prompts)
    for own, own_input in steps:
        result, verified = theirs.step()
        assert not hasattr(verified, "echo_packed")
        assert torch.equal(own.accept_lens, result.accept_lens)
        for mine, its in zip(paths(own_input), paths(verified), strict=True):
            assert mine == its
    assert ours.texts == theirs.texts


def paths(verified):
    """Every row's tokens from the root down, sorted, for each request."""
    n = verified.draft_token_num
    names = ("draft_token", "positions", "retrieve_index", "retrieve_next_token")
    names += ("retrieve_next_sibling",)
    links = layouts.SGLangLinks(*(getattr(verified, name) for name in names))
    packed = importers.from_sglang(links)
    for b in range(len(verified.draft_token) // n):
        first, end = packed.indptr[b : b + 2].tolist()
        text = []
        for row in range(first, end):
            up = int(packed.parent[row])
            text.append([*(text[up] if up >= 0 else []), int(packed.tokens[row])])
        yield sorted(text)


@pytest.mark.parametrize("topk", [1, TOPK])
@pytest.mark.parametrize(("seconds", "off"), [((1.0, 64.0), True), ((1.0, 1.0), False)])
def test_the_forecast_picks_the_graph_set(engine, monkeypatch, tmp_path, seconds, off, topk):
    """Where tokens cost much it ends at depth 0, in SGLang's own plain step; else it stays deep."""
    monkeypatch.setattr(import_module("sglang.srt.speculative.eagle_worker_v2"), "_is_cuda", True)
    log = warmup(engine, monkeypatch, tmp_path, topk)
    calibration = echo.calibrate(log, min_rows=5, beam=topk)
    calibration.save(tmp_path / "calibration.json")
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), seconds).to_json())
    monkeypatch.setenv("ECHO_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
    monkeypatch.setenv("ECHO_DEPTHS", "0,2")
    tables, prompts = Tables(7), texts(5, 3)
    server, n = Server(tables, prompts, topk=topk), N if topk > 1 else STEPS + 1
    built = []

    def build(depth, n):
        built.append((depth, n))
        state = import_module("sglang.srt.speculative.adaptive_runtime_state").SpecRuntimeState
        backend = server.worker.target_worker.model_runner.attn_backend
        draft = server.draft.draft_attn_backend
        return state(depth, n, draft, None, backend, None, None, None)

    server.worker.build_adaptive_runtime_state = build
    server.draft.draft_extend_attn_backend = server.draft.draft_runner.draft_attn_backend = None
    server.draft._rebuild_topk1_chain_buffers = server.chain_buffers
    ready = lambda worker: built.append(worker.target_worker.echo_planner.depths)
    engine.capture(ready, server.worker)  # SGLang's own captures hold the plan: it is there
    assert built.pop(0) == (server.worker.speculative_num_steps,)
    assert built == [(0, 1), (2, min(n, 3) if topk == 1 else n)]
    widths = [server.step()[1].draft_token_num for _ in range(8)]
    assert (widths[-1] == 1) == off and widths[0] == n
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))


def test_every_rank_follows_the_plan_of_rank_0(engine, monkeypatch):
    tables, prompts = Tables(7), texts(1, 3)
    buffer = Server(Tables(8), prompts).step()[1].echo_packed.to_buffer()  # another draft's
    broadcast = lambda _, src: buffer if src == 0 else None
    group = SimpleNamespace(world_size=2, broadcast=broadcast)
    context = import_module("sglang.srt.runtime_context")
    parallel = SimpleNamespace(tp_group=group, pp_size=1, attn_dp_enabled=False)
    monkeypatch.setattr(context, "get_parallel", lambda: parallel)
    server = Server(tables, prompts)
    _, verified = server.step()
    assert torch.equal(verified.echo_packed.to_buffer(), buffer)
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))


@pytest.mark.parametrize(
    ("topk", "where", "name", "value", "wanted"),
    [
        (1, "runner", "attn_backend", SimpleNamespace(), "fa3, trtllm_mha or trtllm_mla"),
        (3, "runner", "attn_backend", SimpleNamespace(), "fa3 or triton"),
        (3, "runner", "kv_cache_dtype", torch.float8_e4m3fn, "a cache of 16 bits"),
        (3, "runner", "kv_index_translator", SimpleNamespace(is_translating=True), "one memory"),
        (
            1,
            "runner",
            "decode_cuda_graph_runner",
            SimpleNamespace(ragged_verify_mode=False),
            "SGLANG_RAGGED_VERIFY_MODE=compact",
        ),
        (1, "config", "model_is_mrope", True, "positions of one axis"),
        (1, "spec", "speculative_use_rejection_sampling", True, "no rejection sampling"),
        (3, "parallel", "attn_dp_enabled", True, "no attention data parallelism"),
    ],
)
def test_what_cannot_be_ragged_is_said_at_the_start(
    engine, monkeypatch, topk, where, name, value, wanted
):
    monkeypatch.setenv("ECHO_RAGGED", "1")
    server = Server(Tables(7), texts(1, 2), topk=topk)
    runner = server.worker.target_worker.model_runner
    context = import_module("sglang.srt.runtime_context")
    spec, parallel = context.get_spec(), context.get_parallel()
    places = {"runner": runner, "config": runner.model_config, "spec": spec, "parallel": parallel}
    monkeypatch.setattr(places[where], name, value)
    with pytest.raises(echo.EchoError, match=f"ECHO_RAGGED: expected {wanted}"):
        server.step()


def test_other_workers_are_left_alone(engine):
    """Multi-layer EAGLE and UNO share the functions that make a verify input, not the planner."""
    module = import_module("sglang.srt.speculative.eagle_utils")
    scores, tokens = [torch.rand(2, 1, 3), torch.rand(2, 3, 3)], [torch.arange(6).view(2, 3)] * 4
    parents = [torch.zeros(2, 4).long(), torch.zeros(2, 3).long()]
    own = module.organize_draft_results(scores, tokens, parents, 5)
    theirs = module.organize_draft_results.__wrapped__(scores, tokens, parents, 5)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    assert own[1].shape == (2, 4)
    given = {"target_worker": SimpleNamespace(), "num_draft_tokens": 5, "topk": 3}
    made = engine.draft.after_draft(lambda *_, **__: "theirs", None, *[None] * 5, **given)
    assert made == "theirs"


def test_what_cannot_have_depths_is_said_at_the_start(engine, monkeypatch):
    server = Server(Tables(7), texts(1, 2))
    parallel = import_module("sglang.srt.runtime_context").get_parallel()
    monkeypatch.setenv("ECHO_DEPTHS", "0")
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "pp_size", 2)
        with pytest.raises(echo.EchoError, match="--pp-size: expected 1"):
            engine.capture(lambda _: None, server.worker)
    with monkeypatch.context() as patch:
        patch.setattr(type(server.worker), "draft_worker", SimpleNamespace())
        with pytest.raises(echo.EchoError, match="--speculative-algorithm: expected EAGLE"):
            engine.capture(lambda _: None, server.worker)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "attn_dp_enabled", True)
        with pytest.raises(echo.EchoError, match="ECHO_DEPTHS: expected ECHO_COST"):
            engine.capture(lambda _: None, server.worker)
        space = server.worker.target_worker.echo_planner.plan.space
        costly = replace(space.scheduler, budget=echo.CostModel((1, 64), (1.0, 2.0)))
        patch.setattr(space, "scheduler", costly)
        sync = import_module("sglang.srt.managers.scheduler_components.dp_attn")
        patch.setattr(sync.envs.SGLANG_SCHEDULER_SKIP_ALL_GATHER, "get", lambda: True)
        with pytest.raises(echo.EchoError, match="ECHO_DEPTHS: expected SGLang's gather"):
            engine.capture(lambda _: None, server.worker)
    server.worker.adaptive_controller = "SGLang's"
    with pytest.raises(echo.EchoError, match="ECHO_DEPTHS: expected no --speculative-adaptive"):
        engine.capture(lambda _: None, server.worker)


def test_a_prefill_resets_the_history_of_its_requests(engine):
    server = Server(Tables(7), texts(1, 3))
    server.step()
    planner = server.worker.target_worker.echo_planner
    request = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=int(server.req_pool_indices[0])))
    prefill = SimpleNamespace(
        forward_mode=server.modes.EXTEND, is_extend_in_batch=True, reqs=[request],
        req_pool_indices=server.req_pool_indices[:1],
    )  # fmt: skip
    assert engine.before_draft(lambda *_: "prefilled", server.worker, prefill) == "prefilled"
    # A tier that is chosen from an older history leaves the request out.
    assert planner.generation[server.req_pool_indices].tolist() == [1, 0, 0]
    assert torch.equal(planner.plan.space.history.generation, planner.generation)


def test_plans_are_made_from_two_steps_ago(engine):
    server = Server(Tables(7), texts(1, 2))
    for _ in range(3):
        server.step()
    planner = server.worker.target_worker.echo_planner
    assert [int(history.num_steps) for history, _ in planner.lagged] == [2, 3]


def warmup(engine, monkeypatch, tmp_path, topk):
    """The warm-up file that a server writes."""
    monkeypatch.setenv("ECHO_WARMUP", str(tmp_path / "warmup.npz"))
    monkeypatch.setattr(engine, "WARMUP_STEPS", 6)
    server = Server(Tables(7), texts(4, 4), topk=topk)
    for _ in range(6):
        server.step()
    monkeypatch.delenv("ECHO_WARMUP")
    return echo.WarmupLog.load(tmp_path / "warmup.npz")


HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 160


def attention(context, table, cap):
    """SGLang's Triton backend over a pool of keys and values, and a layer."""
    module = import_module("sglang.srt.layers.attention.triton_backend")
    pool = SimpleNamespace(cache=torch.randn(2, SLOTS, KV_HEADS, DIM))
    pool.get_key_buffer, pool.get_value_buffer = lambda _: pool.cache[0], lambda _: pool.cache[1]

    def store(_, where, k, v):
        pool.cache[0, where], pool.cache[1, where] = k, v

    def read(_, req_pool_indices, seq_lens, indptr, out):
        lengths = zip(req_pool_indices, seq_lens.tolist(), strict=True)
        torch.cat([table[b, :length] for b, length in lengths], out=out)

    pool.set_kv_buffer = store
    module.KVWriteLoc.for_batch = lambda batch, **_: batch.out_cache_loc
    kernel = import_module("sglang.kernels.ops.attention.extend_attention").extend_attention_fwd
    fields = {"__abstractmethods__": frozenset()}
    ragged = import_module("echo_sglang_ragged")
    served = ragged.serve(module.TritonAttnBackend, ragged.TritonTrees)
    backend = object.__new__(type("Backend", (served,), fields))
    zeros = torch.zeros(len(context) + 1, dtype=torch.int64)
    vars(backend).update(
        dllm_attention=None, window_kv_indptr=None, device="cpu", sliding_window_size=None,
        use_sliding_window_kv_pool=False, dcp_size=1, mask_indptr=zeros, kv_indptr=zeros.int(),
        enable_deterministic=False, use_verify_shared_kv=False, use_verify_splitkv=False,
        use_dense_fp8_chunked_prefill=False, use_mla=False, page_size=1, token_to_kv_pool=pool,
        kv_index_translator=SimpleNamespace(pack_read_stream=read), extend_attention_fwd=kernel,
    )  # fmt: skip
    layer = SimpleNamespace(
        qk_head_dim=DIM, v_head_dim=DIM, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, layer_id=0,
        k_scale=None, v_scale=None, attn_type=None, logit_cap=cap, logit_capping_method="tanh",
        scaling=DIM**-0.5, is_cross_attention=False, sliding_window_size=-1,
        xai_temperature_len=-1,
    )  # fmt: skip
    return backend, layer, pool


def attend(backend, layer, packed, context, table, n, q, k, v, ragged):
    """One verify forward pass of a layer over the packed rows, or over n rows of every request."""
    module = import_module("sglang.srt.model_executor.forward_batch_info")
    size = int((n * (context + n)).sum())
    mask = layouts.sglang_mask(packed, n, "FULL_MASK", prefix_lens=context, size=size)
    info = SimpleNamespace(
        num_tokens_per_req=n, draft_token_num=n, custom_mask=None if ragged else mask, echo_packed=packed,
        ragged_verify_layout=packed if ragged else None,
    )  # fmt: skip
    real, request = packed.request < packed.batch, packed.request.clamp(max=packed.batch - 1).long()
    where = torch.where(real, table[request, 60 + packed.local_row], 0)
    batch = SimpleNamespace(
        forward_mode=module.ForwardMode.TARGET_VERIFY, batch_size=packed.batch, spec_info=info,
        req_pool_indices=torch.arange(packed.batch), seq_lens=context, kv_loc_plan=None,
        seq_lens_sum=int(context.sum()), input_ids=packed.tokens, out_cache_loc=where,
        mha_one_shot=False, extend_seq_lens_cpu=None,
    )  # fmt: skip
    backend.init_forward_metadata(batch)
    return backend.forward_extend(q.flatten(1), k, v, layer, batch).view(-1, HEADS, DIM), where


@pytest.mark.filterwarnings("ignore:divide by zero")  # an empty prefix, in the interpreter
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_ragged_attention_on_a_uniform_tree_is_its_own(engine, cap):
    packed, context = forest(1, 3, 9, empty=False, exact=True).packed, torch.tensor([5, 0, 33])
    table = 1 + torch.randperm(SLOTS - 1)[: 3 * 53].view(3, 53)
    table = torch.cat([table[:, :33], torch.zeros(3, 27, dtype=torch.int64), table[:, 33:]], dim=1)
    q, k, v = (torch.randn(27, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    backend, layer, _ = attention(context, table, cap)
    own, _ = attend(backend, layer, packed, context, table, 9, q, k, v, ragged=False)
    ours, _ = attend(backend, layer, packed, context, table, 9, q, k, v, ragged=True)
    assert backend.forward_metadata.custom_mask is None
    assert float((ours - own).norm() / own.norm()) < 1e-5


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("seed", [0, 1])
def test_ragged_attention_on_ragged_trees_is_the_reference(engine, seed):
    packed, context = forest(seed, 3, 20, empty=False, pads=2).packed, torch.tensor([5, 0, 33])
    table = 1 + torch.randperm(SLOTS - 1)[: 3 * 53].view(3, 53)
    table = torch.cat([table[:, :33], torch.zeros(3, 27, dtype=torch.int64), table[:, 33:]], dim=1)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(packed.num_rows, each, DIM) for each in heads)
    backend, layer, pool = attention(context, table, 0.0)
    out, where = attend(backend, layer, packed, context, table, 20, q, k, v, ragged=True)
    cache = pool.cache[:, :, None]
    tree = k, v, packed.request, packed.indptr, packed.mask
    expected, _ = tree_attention(q, cache[0], cache[1], table.int(), context.int(), *tree)
    assert float((out - expected).norm() / expected.norm()) < 1e-5
    real = packed.request < packed.batch
    assert torch.equal(pool.cache[0, where[real]], k[real])  # kept for the next step
