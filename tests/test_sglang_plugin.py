"""The SGLang plugin (examples/sglang) inside the engine's own code: its hook registry, EAGLE worker, samplers and Triton kernels.

    ECHO_PEERS=install pytest -m peers tests/test_sglang_plugin.py

Real, from the wheel: the registry, ``EAGLEWorkerV2`` and its draft worker from the draft to the draft-extend, ``run_eagle_verify``,
greedy acceptance, cache moves, and ``TritonAttnBackend``. Stand-ins: model runners (a toy model), the batch, memory pools, contexts.
"""

from __future__ import annotations

import contextlib
import re
import sys
from enum import IntEnum, auto
from functools import total_ordering
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import echo
from echo.kernels.reference import tree_attention
from echo.tree import layouts
from engines import around, definitions, sources
from forests import forest

VERSION = "0.5.23"
PLUGIN = Path(__file__).parents[1] / "examples" / "sglang"
REAL = ("sglang.srt.speculative.", "sglang.srt.plugins", "sglang.kernels.ops.speculative.", "sglang.kernels.ops.attention.")
REAL += ("sglang.srt.layers.attention.triton_backend",)
TOPK, STEPS, N, VOCAB, WIDTH = 3, 3, 10, 40, 200
pytestmark = pytest.mark.peers


class Tables:
    """A target whose next token depends on the last two, and a draft model that knows of the last one only."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.before, self.last = (scale * torch.randn(VOCAB, VOCAB, generator=generator) for scale in (1.0, 2.0))

    def target(self, before, token):
        return self.before[before] + self.last[token]

    def greedy(self, text, count):
        text = list(text)
        for _ in range(count):
            text.append(int(self.target(text[-2], text[-1]).argmax()))
        return text


class Pool:
    """Slots that hold the token whose keys and values an engine would hold."""

    page_size = 1

    def __init__(self, size):
        self.token = torch.full((size,), -1)

    def get_kvcache(self):
        return self

    def move_kv_cache(self, target, source):
        self.token[target] = self.token[source].clone()


class TargetWorker:
    """Reads each row's predecessor through the mask it is given, and writes the rows' tokens into their slots."""

    def __init__(self, tables, pool, req_to_token):
        self.tables, self.pool, self.rows = tables, pool, []
        backend = SimpleNamespace(verify_mask=None, max_context_len=WIDTH, echo_packed=None)
        spec = SimpleNamespace(is_standalone=lambda: False)
        config = SimpleNamespace(vocab_size=VOCAB, model_is_mrope=False)
        pools = SimpleNamespace(req_to_token=req_to_token)
        self.model_runner = SimpleNamespace(
            attn_backend=backend, decode_cuda_graph_runner=None, req_to_token_pool=pools, spec_algorithm=spec, model_config=config,
            watermark_state=None, kv_index_translator=None,
        )  # fmt: skip

    def forward_batch_generation(self, batch, forward_batch=None, pp_proxy_tensors=None, is_verify=False):
        info, ids = forward_batch.spec_info, forward_batch.input_ids.long()
        self.rows.append(len(ids))
        self.pool.token[forward_batch.out_cache_loc] = ids
        lengths, slots = forward_batch.seq_lens, self.model_runner.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        last = self.pool.token[slots.gather(1, lengths[:, None] - 1)[:, 0]]
        above = torch.empty_like(ids)
        if len(ids) == info.draft_token_num * len(lengths):
            n, at = info.draft_token_num, 0
            for b, length in enumerate(lengths.tolist()):
                seen = info.custom_mask[at : at + n * (length + n)].view(n, length + n)
                assert bool(seen[:, :length].all())
                at += seen.numel()
                self.follow(ids, above, range(b * n, b * n + n), seen[:, length:], forward_batch.positions - length, last[b])
        else:
            packed = info.echo_packed
            for b, (first, end) in enumerate(packed.indptr.unfold(0, 2, 1).tolist()):
                self.follow(ids, above, range(first, end), packed.visible()[first:end], packed.depth, last[b])
            above[int(packed.indptr[-1]) :] = 0
        self.logits = logits = SimpleNamespace(next_token_logits=self.tables.target(above, ids), hidden_states=None)
        return SimpleNamespace(logits_output=logits, routed_experts_output=None, indexer_topk_output=None)

    @staticmethod
    def follow(ids, above, rows, seen, depth, last):
        for i, row in enumerate(rows):
            parents = [j for j, other in enumerate(rows) if seen[i, j] and depth[other] == depth[row] - 1]
            above[row] = ids[rows[parents[0]]] if parents else last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sources("sglang", VERSION, tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    """SGLang's modules with the plugin installed and loaded by its own ``load_plugins``; yields the plugin's module."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton is imported without its interpreter: run this file in a process of its own")
    with pytest.MonkeyPatch.context() as patch, around(folder, ("sglang", "msgspec"), REAL):
        patch.syspath_prepend(str(PLUGIN))
        patch.syspath_prepend(installed(tmp_path_factory.mktemp("site")))
        for name in ("sglang.srt.utils", "sglang.srt.utils.common"):
            utils = import_module(name)
            for kind in ("cpu", "cuda", "hip", "musa", "npu", "gfx95_supported", "gfx942_supported", "gfx1250_supported"):
                setattr(utils, f"is_{kind}", lambda *_: False)
            utils.is_xpu, utils.next_power_of_2, utils.get_device_core_count = lambda: True, triton.next_power_of_2, lambda *_: 1
            utils.fast_topk = lambda x, k, dim: x.topk(k, dim=dim)
        envs = import_module("sglang.srt.environ").envs
        envs.SGLANG_SIMULATE_ACC_LEN.get.return_value = -1
        envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.get.return_value = False
        envs.SGLANG_PLUGINS.get.return_value, envs.SGLANG_PLATFORM.get.return_value = "echo", ""
        spec = SimpleNamespace(speculative_use_rejection_sampling=False)
        alone = SimpleNamespace(tp_group=SimpleNamespace(world_size=1), pp_size=1)
        context = import_module("sglang.srt.runtime_context")
        context.get_spec, context.get_parallel = lambda: spec, lambda: alone
        context.get_exec = lambda: SimpleNamespace(mamba=SimpleNamespace(enable_mamba_extra_buffer=False))
        import_module("sglang.kernels.ops.sampling").softmax = lambda logits, **_: logits.softmax(-1)
        import_module("sglang.srt.configs.hybrid_arch").mambaish_config = lambda _: None
        batches = import_module("sglang.srt.model_executor.forward_batch_info")
        kinds = {"IntEnum": IntEnum, "auto": auto, "total_ordering": total_ordering}
        definitions(folder / "sglang/srt/model_executor/forward_batch_info.py", ("ForwardMode", "CaptureHiddenMode"), kinds)
        vars(batches).update(kinds, ForwardBatch=ForwardBatch)
        import_module("sglang.srt.managers.tp_worker").TpModelWorker = type("TpModelWorker", (TargetWorker,), {})
        import_module("sglang.srt.plugins").load_plugins()
        registry = import_module("sglang.srt.plugins.hook_registry").HookRegistry
        assert len(registry._hooks) == 8 and registry._patched == set(registry._hooks)
        yield sys.modules["echo_sglang"]
        del sys.modules["echo_sglang"]


def installed(site):
    """A site folder in which the plugin is installed, as far as entry points go."""
    text = (PLUGIN / "pyproject.toml").read_text()
    group, name, value = re.search(r'entry-points\."([^"]+)"\]\n(\w+) = "([^"]+)"', text).groups()
    info = site / "echo_sglang-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-sglang\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return str(site)


class ForwardBatch(SimpleNamespace):
    """What the worker hands to a model runner."""

    @classmethod
    def init_new(cls, batch, runner, **_):
        return cls(
            forward_mode=batch.forward_mode, batch_size=len(batch.seq_lens), input_ids=batch.input_ids, seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens_cpu,
            req_pool_indices=batch.req_pool_indices, out_cache_loc=batch.out_cache_loc, spec_info=batch.spec_info,
            positions=getattr(batch.spec_info, "positions", None), sampling_info=batch.sampling_info, forward_metadata_ready=False,
        )  # fmt: skip

    def mark_forward_metadata_ready(self):
        self.forward_metadata_ready = True


class Server:
    """A batch that decodes through ``EAGLEWorkerV2.forward_batch_generation``, as SGLang's scheduler would drive it."""

    def __init__(self, tables, texts):
        module = import_module("sglang.srt.speculative.eagle_worker_v2")
        self.modes, self.texts, self.batch = module.ForwardMode, [list(text) for text in texts], len(texts)
        pool = Pool(self.batch * WIDTH + 1)
        table = 1 + torch.randperm(self.batch * WIDTH).view(self.batch, WIDTH)
        self.pool, self.slots = pool, torch.randperm(self.batch)
        self.table = torch.empty_like(table).index_copy_(0, self.slots, table)
        for b, text in enumerate(texts):
            pool.token[self.table[self.slots[b], : len(text) - 1]] = torch.tensor(text[:-1])
        target = import_module("sglang.srt.managers.tp_worker").TpModelWorker(tables, pool, self.table)
        runner = SimpleNamespace(
            forward=lambda batch: SimpleNamespace(
                logits_output=SimpleNamespace(next_token_logits=tables.last[batch.input_ids], hidden_states=None)
            ),
            canary_manager=None, model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["Toy"]), model_is_mrope=False),
            spec_algorithm=target.model_runner.spec_algorithm, attn_backend=SimpleNamespace(init_forward_metadata=lambda _: None),
        )  # fmt: skip
        draft = type("Draft", (module.EagleDraftWorker,), {"__abstractmethods__": frozenset(), "draft_runner": runner})
        worker = type("Worker", (module.EAGLEWorkerV2,), {"target_worker": target, "draft_worker": object.__new__(draft)})
        worker.__abstractmethods__ = frozenset()
        shared = {"topk": TOPK, "speculative_num_steps": STEPS, "speculative_num_draft_tokens": N, "device": "cpu", "plan_stream": None}
        shared |= {"plan_stream_ctx": contextlib.nullcontext(), "req_to_token_pool": target.model_runner.req_to_token_pool}
        shared |= {"target_worker": target, "token_to_kv_pool_allocator": pool, "_topk1_parents_prealloc": torch.empty(0)}
        self.worker = object.__new__(worker)
        vars(self.worker).update(shared, adaptive_controller=None)
        self.draft = draft = worker.draft_worker
        self.worker._target_worker, self.worker._draft_worker = target, draft
        backend = SimpleNamespace(init_forward_metadata=lambda _: None, attn_backends=[None] * STEPS)
        masks = import_module("sglang.kernels.ops.speculative.spec_tree").TreeMaskMode
        vars(draft).update(
            shared, cuda_graph_runner=None, cuda_graph_runner_for_draft_extend=None, seed_dsa_topk_from_draft_extend=False,
            hot_token_id=None, index_share_for_mtp_iteration=False, draft_attn_backend=backend, parallel_layout=None,
            tree_mask_mode=masks.FULL_MASK,
        )  # fmt: skip
        for name in ("draft_tp_context", "speculative_moe_backend_context", "speculative_moe_a2a_backend_context", "spec_stage_span"):
            setattr(module, name, lambda *_: contextlib.nullcontext())
        first = tables.last[torch.tensor([text[-1] for text in texts])].softmax(-1).topk(TOPK)
        self.state = SimpleNamespace(bonus_tokens=torch.tensor([text[-1] for text in texts]).int(), topk_p=first[0], topk_index=first[1])
        self.state.hidden_states = None

    def step(self):
        """One decode step; the worker's result and verify input."""
        module = import_module("sglang.srt.speculative.eagle_info")
        lengths = torch.tensor([len(text) - 1 for text in self.texts])
        requests = [SimpleNamespace(kv=SimpleNamespace(req_pool_idx=int(slot))) for slot in self.slots]
        info = module.EagleDraftInput(**vars(self.state))
        batch = SimpleNamespace(
            forward_mode=self.modes.DECODE, is_extend_in_batch=False, spec_info=info, seq_lens=lengths, seq_lens_cpu=lengths,
            seq_lens_sum=int(lengths.sum()), req_pool_indices=self.slots, reqs=requests, device="cpu", has_grammar=False,
            sampling_info=SimpleNamespace(
                is_all_greedy=True, acc_additive_penalties=None, acc_scaling_penalties=None, logit_bias=None, has_watermark_candidates=False
            ),
            return_logprob=False, hisparse_coordinator=None, model_config=self.worker.target_worker.model_runner.model_config,
            token_to_kv_pool_allocator=self.pool, multimodal_inputs=[None] * self.batch, input_ids=None, out_cache_loc=None,
            req_to_token_pool=self.worker.req_to_token_pool, mamba_track_indices=None, extend_num_tokens=0, prefix_lens=None,
        )  # fmt: skip
        seen = []
        verify = type(self.worker).verify
        self.worker.verify = lambda batch, **kwargs: (seen.append(batch.spec_info), verify(self.worker, batch, **kwargs))[1]
        result = self.worker.forward_batch_generation(batch)
        path = result.next_token_ids.view(self.batch, -1)
        for b, (text, length) in enumerate(zip(self.texts, result.accept_lens.tolist(), strict=True)):
            text.extend(path[b, :length].tolist())
            cached = self.pool.token[self.table[self.slots[b], : len(text) - 1]]
            assert cached.tolist() == text[:-1], "the cache must hold the text up to its last token"
        next_input = result.next_draft_input
        self.state = SimpleNamespace(**{name: getattr(next_input, name) for name in ("bonus_tokens", "topk_p", "topk_index")})
        self.state.hidden_states = None
        return result, seen[0]


def texts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (4 + 3 * b,), generator=generator).tolist() for b in range(count)]


@pytest.mark.parametrize("ragged", [False, True])
def test_planned_steps_write_the_targets_own_text(engine, monkeypatch, ragged):
    monkeypatch.setenv("ECHO_ROWS", "14")
    monkeypatch.setenv("ECHO_RAGGED", str(int(ragged)))
    tables, prompts = Tables(7), texts(1, 3)
    server = Server(tables, prompts)
    for _ in range(5):
        result, verified = server.step()
        packed, logits = verified.echo_packed, server.worker.target_worker.logits.next_token_logits
        packed.validate(max_rows=N)
        ours = echo.verify(packed, logits=layouts.unpad(packed, logits.view(3, N, VOCAB)))
        theirs = engine.accept(packed, result, N)
        for name in ("tokens", "rows", "lengths", "bonus"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))
    emitted = sum(map(len, server.texts)) - sum(map(len, prompts))
    assert emitted > 5 * 3 * 1.3
    assert set(server.worker.target_worker.rows) == ({14} if ragged else {3 * N})
    steps = server.worker.target_worker.echo_planner.history.steps
    assert steps.tolist() == [5, 5, 5]


def test_with_nothing_asked_for_the_trees_are_eagles_own(engine, monkeypatch):
    """The same drafts through SGLang's own selection and tree builder, and through ours."""
    prompts, steps = texts(2, 4), []
    ours = Server(Tables(3), prompts)
    for _ in range(3):
        steps.append(ours.step())
    module = import_module("sglang.srt.speculative.eagle_worker_v2")
    for name in ("organize_draft_results", "build_eagle_verify_input"):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
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
    links = layouts.SGLangLinks(
        verified.draft_token, verified.positions, verified.retrieve_index, verified.retrieve_next_token, verified.retrieve_next_sibling
    )
    packed = layouts.from_sglang(links)
    for b in range(len(verified.draft_token) // n):
        first, end = packed.indptr[b : b + 2].tolist()
        text = []
        for row in range(first, end):
            up = int(packed.parent[row])
            text.append([*(text[up] if up >= 0 else []), int(packed.tokens[row])])
        yield sorted(text)


@pytest.mark.parametrize(("seconds", "off"), [((1.0, 64.0), True), ((1.0, 1.0), False)])
def test_the_forecast_picks_the_graph_set(engine, monkeypatch, tmp_path, seconds, off):
    """Where rows are dear it ends at depth 0, through SGLang's own plain step; where they cost nothing it stays deep."""
    calibration = echo.calibrate(warmup(engine, monkeypatch, tmp_path), min_rows=5)
    calibration.save(tmp_path / "calibration.json")
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), seconds).to_json())
    monkeypatch.setenv("ECHO_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
    monkeypatch.setenv("ECHO_DEPTHS", "0,2")
    tables, prompts = Tables(7), texts(5, 3)
    server = Server(tables, prompts)
    built = []

    def build(depth, n):
        built.append((depth, n))
        state = import_module("sglang.srt.speculative.adaptive_runtime_state").SpecRuntimeState
        return state(
            depth, n, server.draft.draft_attn_backend, None, server.worker.target_worker.model_runner.attn_backend, None, None, None
        )

    server.worker.build_adaptive_runtime_state = build
    server.draft.draft_extend_attn_backend = server.draft.draft_runner.draft_attn_backend = None
    server.draft._rebuild_topk1_chain_buffers = lambda: None
    engine.capture(None, server.worker)
    assert built == [(0, 1), (2, N)]
    widths = [server.step()[1].draft_token_num for _ in range(8)]
    assert (widths[-1] == 1) == off and widths[0] == N
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))


def test_every_rank_follows_the_plan_of_rank_0(engine, monkeypatch):
    tables, prompts = Tables(7), texts(1, 3)
    wire = Server(Tables(8), prompts).step()[1].echo_packed.wire()  # another draft's
    parallel = SimpleNamespace(tp_group=SimpleNamespace(world_size=2, broadcast=lambda _, src: wire if src == 0 else None), pp_size=1)
    monkeypatch.setattr(import_module("sglang.srt.runtime_context"), "get_parallel", lambda: parallel)
    server = Server(tables, prompts)
    _, verified = server.step()
    assert torch.equal(verified.echo_packed.wire(), wire)
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))


def test_a_prefill_forgets_what_the_slots_former_owners_did(engine):
    server = Server(Tables(7), texts(1, 3))
    server.step()
    planner = server.worker.target_worker.echo_planner
    prefill = SimpleNamespace(
        forward_mode=server.modes.EXTEND, is_extend_in_batch=True, req_pool_indices=server.slots[:1], reqs=[], seq_lens=torch.tensor([4])
    )
    before = engine.before_draft(lambda *_: "prefilled", server.worker, prefill)
    assert before == "prefilled"
    assert planner.history.steps[server.slots].tolist() == [0, 1, 1]


def test_plans_are_made_from_two_steps_ago(engine):
    server = Server(Tables(7), texts(1, 2))
    for _ in range(3):
        server.step()
    planner = server.worker.target_worker.echo_planner
    assert [int(history.tick) for history, _ in planner.seen] == [2, 3]


def warmup(engine, monkeypatch, tmp_path):
    """The warm-up file that a server writes."""
    monkeypatch.setenv("ECHO_WARMUP", str(tmp_path / "warmup.npz"))
    monkeypatch.setattr(engine, "WARMUP_STEPS", 6)
    server = Server(Tables(7), texts(4, 4))
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
        torch.cat([table[b, :length] for b, length in zip(req_pool_indices, seq_lens.tolist(), strict=True)], out=out)

    pool.set_kv_buffer = store
    module.KVWriteLoc.for_batch = lambda batch, **_: batch.out_cache_loc
    kernel = import_module("sglang.kernels.ops.attention.extend_attention").extend_attention_fwd
    backend = object.__new__(type("Backend", (module.TritonAttnBackend,), {"__abstractmethods__": frozenset()}))
    vars(backend).update(
        dllm_attention=None, window_kv_indptr=None, device="cpu", sliding_window_size=None, use_sliding_window_kv_pool=False, dcp_size=1,
        mask_indptr=torch.zeros(len(context) + 1, dtype=torch.int64), kv_indptr=torch.zeros(len(context) + 1, dtype=torch.int32),
        enable_deterministic=False, use_verify_shared_kv=False, use_verify_splitkv=False, use_dense_fp8_chunked_prefill=False,
        use_mla=False, page_size=1, token_to_kv_pool=pool, kv_index_translator=SimpleNamespace(pack_read_stream=read),
        extend_attention_fwd=kernel,
    )  # fmt: skip
    layer = SimpleNamespace(
        qk_head_dim=DIM, v_head_dim=DIM, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, layer_id=0, k_scale=None, v_scale=None,
        attn_type=None, logit_cap=cap, logit_capping_method="tanh", scaling=DIM**-0.5, is_cross_attention=False, sliding_window_size=-1,
        xai_temperature_len=-1,
    )  # fmt: skip
    return backend, layer, pool


def attend(backend, layer, packed, context, table, n, q, k, v, ragged):
    """One verify forward pass of a layer over the packed rows, or over n rows of every request."""
    module = import_module("sglang.srt.model_executor.forward_batch_info")
    size = int((n * (context + n)).sum())
    mask = layouts.sglang_mask(packed, n, "FULL_MASK", context=context, size=size)
    info = SimpleNamespace(num_tokens_per_req=n, draft_token_num=n, custom_mask=mask, echo_packed=packed, echo_ragged=ragged)
    where = torch.where(packed.request < packed.batch, table[packed.request.clamp(max=packed.batch - 1).long(), 60 + packed.local], 0)
    batch = SimpleNamespace(
        forward_mode=module.ForwardMode.TARGET_VERIFY, batch_size=packed.batch, spec_info=info, req_pool_indices=torch.arange(packed.batch),
        seq_lens=context, seq_lens_sum=int(context.sum()), kv_loc_plan=None, input_ids=packed.tokens, out_cache_loc=where,
        mha_one_shot=False, extend_seq_lens_cpu=None,
    )  # fmt: skip
    backend.init_forward_metadata(batch)
    return backend.forward_extend(q.flatten(1), k, v, layer, batch).view(-1, HEADS, DIM), where


@pytest.mark.filterwarnings("ignore:divide by zero")  # a request without a context, in the interpreter
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_ragged_attention_on_a_uniform_tree_is_its_own(engine, cap):
    packed, context = forest(1, 3, 9, empty=False, exact=True).packed, torch.tensor([5, 0, 33])
    table = 1 + torch.randperm(SLOTS - 1)[: 3 * 53].view(3, 53)
    table = torch.cat([table[:, :33], torch.zeros(3, 27, dtype=torch.int64), table[:, 33:]], dim=1)
    q, k, v = torch.randn(27, HEADS, DIM), torch.randn(27, KV_HEADS, DIM), torch.randn(27, KV_HEADS, DIM)
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
    shape = packed.rows
    q, k, v = torch.randn(shape, HEADS, DIM), torch.randn(shape, KV_HEADS, DIM), torch.randn(shape, KV_HEADS, DIM)
    backend, layer, pool = attention(context, table, 0.0)
    out, where = attend(backend, layer, packed, context, table, 20, q, k, v, ragged=True)
    cache = pool.cache[:, :, None]
    expected, _ = tree_attention(q, cache[0], cache[1], table.int(), context.int(), k, v, packed.request, packed.indptr, packed.mask)
    assert float((out - expected).norm() / expected.norm()) < 1e-5
    real = packed.request < packed.batch
    assert torch.equal(pool.cache[0, where[real]], k[real])  # kept for the next step
