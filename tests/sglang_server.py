"""SGLang's own modules from the wheel with the plugin in them, and a toy server around its EAGLE
worker: model runners, pools, batches of small tables.
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
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from echo.testing.graphs import Recording
from engines import around, definitions, sources

TOPK, STEPS, N, VOCAB, WIDTH = 3, 3, 10, 40, 200


VERSION = "0.5.23"
PLUGIN = Path(__file__).parents[1] / "examples" / "sglang"
REAL = (
    "sglang.srt.speculative.",
    "sglang.srt.plugins",
    "sglang.kernels.ops.speculative.",
    "sglang.kernels.ops.attention.",
)
REAL += tuple(
    f"sglang.srt.{name}"
    for name in (
        "layers.attention.triton_backend",
        "layers.attention.flashattention_backend",
        "layers.attention.trtllm_mla_backend",
        "layers.attention.attention_registry",
        "mem_cache.layout.paged_view",
        "model_executor.input_buffers",
        "model_executor.runner.base_cuda_graph_runner",
        "model_executor.runner.base_runner",
        "model_executor.runner.decode_cuda_graph_runner",
        "model_executor.runner.shape_key",
        "model_executor.runner_backend.base_cuda_graph_backend",
        "model_executor.runner_backend.full_cuda_graph_backend",
        "managers.scheduler_components.dp_attn",
        "managers.tp_worker",
    )
)
PACKAGES = "sglang", "msgspec", "sgl_kernel"


class Tables:
    """A target whose next token depends on the last two; a draft model that sees one of them."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.before, self.last = torch.randn(2, VOCAB, VOCAB, generator=generator)
        self.last *= 2

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
    """Finds each row's predecessor through the mask, and writes tokens into their slots."""

    def __init__(self, tables, pool, req_to_token, topk):
        self.tables, self.pool, self.rows = tables, pool, []
        ragged = import_module("echo_sglang_ragged")
        fields = {"supports_ragged_verify_graph": topk == 1}
        kinds = SimpleNamespace if topk == 1 else ragged.TritonTrees, SimpleNamespace
        backend = type("FlashAttentionBackend", tuple(dict.fromkeys(kinds)), fields)(
            verify_mask=None, max_context_len=WIDTH
        )
        spec = SimpleNamespace(is_standalone=lambda: False)
        config = SimpleNamespace(vocab_size=VOCAB, model_is_mrope=False)
        pools = SimpleNamespace(req_to_token=req_to_token)
        self.model_runner = SimpleNamespace(
            attn_backend=backend, decode_cuda_graph_runner=None, req_to_token_pool=pools,
            spec_algorithm=spec, model_config=config, watermark_state=None,
            kv_index_translator=None if topk == 1 else SimpleNamespace(is_translating=False),
            kv_cache_dtype=torch.bfloat16,
        )  # fmt: skip

    def forward_batch_generation(
        self, batch, forward_batch=None, pp_proxy_tensors=None, is_verify=False
    ):
        ids = forward_batch.input_ids.long()
        self.rows.append(len(ids))
        self.pool.token[forward_batch.out_cache_loc] = ids
        logits = self.forward(forward_batch, ids)
        self.logits = SimpleNamespace(next_token_logits=logits, hidden_states=None)
        none = {"routed_experts_output": None, "indexer_topk_output": None}
        return SimpleNamespace(logits_output=self.logits, **none)

    def forward(self, forward_batch, ids):
        """Logits of every row."""
        info = forward_batch.spec_info
        lengths, table = forward_batch.seq_lens, self.model_runner.req_to_token_pool.req_to_token
        slots = table[forward_batch.req_pool_indices]
        last = self.pool.token[slots.gather(1, lengths[:, None] - 1)[:, 0]]
        above = torch.empty_like(ids)
        if getattr(info, "echo_window", None) is None:
            n, at, buffer = info.draft_token_num, 0, self.model_runner.attn_backend.verify_mask
            for b, length in enumerate(lengths.tolist()):
                context = 0 if buffer is not None and buffer.mode.name == "QLEN_ONLY" else length
                seen = info.custom_mask[at : at + n * (context + n)].view(n, context + n)
                assert bool(seen[:, :context].all())
                at += seen.numel()
                rows, depth = range(b * n, b * n + n), forward_batch.positions - length
                self.follow(ids, above, rows, seen[:, context:], depth, last[b])
        else:
            packed = info.echo_packed
            for b, (first, end) in enumerate(packed.indptr.unfold(0, 2, 1).tolist()):
                seen = packed.visible()[first:end]
                self.follow(ids, above, range(first, end), seen, packed.depth, last[b])
            above[int(packed.indptr[-1]) :] = 0
        return self.tables.target(above, ids)

    @staticmethod
    def follow(ids, above, rows, seen, depth, last):
        for i, row in enumerate(rows):
            up = depth[row] - 1
            parents = [other for j, other in enumerate(rows) if seen[i, j] and depth[other] == up]
            above[row] = ids[parents[0]] if parents else last


class ForwardBatch(SimpleNamespace):
    """What the worker hands to a model runner."""

    @classmethod
    def init_new(cls, batch, runner, **_):
        same = ("forward_mode", "input_ids", "seq_lens", "seq_lens_cpu", "req_pool_indices")
        same += ("out_cache_loc", "spec_info", "sampling_info", "seq_lens_sum")
        none = "replace_embeds rids_int bootstrap_room_ids_int extend_seq_lens extend_seq_lens_cpu"
        none += " mamba_track_indices kv_loc_plan kv_loc_cols out_cache_loc_virtual encoder_lens"
        none += " attn_attend_prefix_cache"
        positions = getattr(batch.spec_info, "positions", None)
        if positions is None and batch.input_ids is not None:
            positions = torch.zeros_like(batch.input_ids)
        return cls(
            **{name: getattr(batch, name) for name in same}, batch_size=len(batch.seq_lens),
            positions=positions, forward_metadata_ready=False,
            **dict.fromkeys(none.split()), capture_hidden_mode=0, can_run_decode_cuda_graph=True,
        )  # fmt: skip

    def mark_forward_metadata_ready(self):
        self.forward_metadata_ready = True


class Server:
    """A batch that decodes through ``EAGLEWorkerV2.forward_batch_generation``."""

    logit_bias = None

    def __init__(self, tables, texts, mask=None, topk=TOPK, steps=STEPS):
        module = import_module("sglang.srt.speculative.eagle_worker_v2")
        self.modes, self.texts = module.ForwardMode, [list(text) for text in texts]
        self.tables = tables
        self.batch, nothing = len(texts), contextlib.nullcontext
        n = N if topk > 1 else steps + 1
        pool = Pool(self.batch * WIDTH + 1)
        table = 1 + torch.randperm(self.batch * WIDTH).view(self.batch, WIDTH)
        self.pool, self.req_pool_indices = pool, torch.randperm(self.batch)
        self.table = torch.empty_like(table).index_copy_(0, self.req_pool_indices, table)
        for b, text in enumerate(texts):
            pool.token[self.table[self.req_pool_indices[b], : len(text) - 1]] = torch.tensor(
                text[:-1]
            )
        workers = import_module("sglang.srt.managers.tp_worker")
        target = workers.TpModelWorker(tables, pool, self.table, topk)
        masks = import_module("sglang.kernels.ops.speculative.spec_tree").TreeMaskMode
        if mask is not None:  # a buffer that the attention backend owns, of unknown content
            buffer = torch.rand(self.batch * n * (WIDTH + n)) < 0.5
            own = SimpleNamespace(buffer=buffer, mode=masks[mask], fits=lambda _: True)
            target.model_runner.attn_backend.verify_mask = own
        config = SimpleNamespace(architectures=["Toy"])
        logits = lambda batch: {"next_token_logits": tables.last[batch.input_ids]}
        output = lambda batch: SimpleNamespace(**logits(batch), hidden_states=None)
        runner = SimpleNamespace(
            forward=lambda batch: SimpleNamespace(logits_output=output(batch)),
            model_config=SimpleNamespace(hf_config=config, model_is_mrope=False),
            spec_algorithm=target.model_runner.spec_algorithm, canary_manager=None,
            attn_backend=SimpleNamespace(init_forward_metadata=lambda _: None),
        )  # fmt: skip
        fields = {"__abstractmethods__": frozenset(), "draft_runner": runner}
        draft = object.__new__(type("Draft", (module.EagleDraftWorker,), fields))
        fields = {"target_worker": target, "draft_worker": draft}
        worker = type("Worker", (module.EAGLEWorkerV2,), fields)
        worker.__abstractmethods__ = frozenset()
        shared = {
            "topk": topk,
            "speculative_num_steps": steps,
            "speculative_num_draft_tokens": n,
            "device": "cpu",
            "plan_stream": None,
            "plan_stream_ctx": nothing(),
            "req_to_token_pool": target.model_runner.req_to_token_pool,
            "target_worker": target,
            "token_to_kv_pool_allocator": pool,
        }
        self.worker = object.__new__(worker)
        vars(self.worker).update(shared, adaptive_controller=None)
        self.draft = draft
        self.worker._target_worker, self.worker._draft_worker = target, draft
        backends = {"attn_backends": [None] * steps}
        backend = SimpleNamespace(init_forward_metadata=lambda _: None, **backends)
        vars(draft).update(
            shared, cuda_graph_runner=None, cuda_graph_runner_for_draft_extend=None,
            seed_dsa_topk_from_draft_extend=False, hot_token_id=None, draft_attn_backend=backend,
            index_share_for_mtp_iteration=False, parallel_layout=None,
            tree_mask_mode=masks.FULL_MASK,
        )  # fmt: skip
        self.chain_buffers()
        moe = "speculative_moe_backend_context", "speculative_moe_a2a_backend_context"
        for name in ("draft_tp_context", "spec_stage_span", *moe):
            setattr(module, name, lambda *_: nothing())
        last = torch.tensor([text[-1] for text in texts])
        top = tables.last[last].softmax(-1).topk(topk)
        state = {"bonus_tokens": last.int(), "topk_p": top[0], "topk_index": top[1]}
        self.state = SimpleNamespace(**state, hidden_states=None)

    def chain_buffers(self):
        """What ``_rebuild_topk1_chain_buffers`` makes, for as many requests."""
        rows, steps = self.batch * (self.draft.topk == 1), self.draft.speculative_num_steps
        width = steps if steps > 1 else 0
        self.draft._topk1_parents_prealloc = torch.arange(-1, width - 1).repeat(rows, 1)
        self.draft._topk1_score_indices_prealloc = torch.arange(steps).repeat(rows, 1)

    def step(self):
        """One decode step; the worker's result and verify input."""
        module = import_module("sglang.srt.speculative.eagle_info")
        lengths = torch.tensor([len(text) - 1 for text in self.texts])
        kv = [SimpleNamespace(req_pool_idx=int(index)) for index in self.req_pool_indices]
        requests = [SimpleNamespace(kv=own) for own in kv]
        info = module.EagleDraftInput(**vars(self.state))
        sampling = SimpleNamespace(
            is_all_greedy=True, acc_additive_penalties=None, acc_scaling_penalties=None,
            logit_bias=self.logit_bias, has_watermark_candidates=False,
        )  # fmt: skip
        batch = SimpleNamespace(
            forward_mode=self.modes.DECODE, is_extend_in_batch=False, spec_info=info,
            seq_lens=lengths, seq_lens_cpu=lengths, seq_lens_sum=int(lengths.sum()),
            req_pool_indices=self.req_pool_indices, reqs=requests, device="cpu", has_grammar=False,
            sampling_info=sampling, return_logprob=False, hisparse_coordinator=None,
            model_config=self.worker.target_worker.model_runner.model_config, prefix_lens=None,
            token_to_kv_pool_allocator=self.pool, multimodal_inputs=[None] * self.batch,
            input_ids=None, out_cache_loc=None, req_to_token_pool=self.worker.req_to_token_pool,
            mamba_track_indices=None, extend_num_tokens=0,
        )  # fmt: skip
        seen = []
        verify = type(self.worker).verify

        def recording(batch, **kwargs):
            seen.append(batch.spec_info)
            return verify(self.worker, batch, **kwargs)

        self.worker.verify = recording
        result = self.worker.forward_batch_generation(batch)
        path = result.next_token_ids.view(self.batch, -1)
        lengths = result.accept_lens.tolist()
        for b, (text, length) in enumerate(zip(self.texts, lengths, strict=True)):
            text.extend(path[b, :length].tolist())
            cached = self.pool.token[self.table[self.req_pool_indices[b], : len(text) - 1]]
            assert cached.tolist() == text[:-1], "the cache must hold the text up to its last token"
        names = ("bonus_tokens", "topk_p", "topk_index")
        state = {name: getattr(result.next_draft_input, name) for name in names}
        self.state = SimpleNamespace(**state, hidden_states=None)
        return result, seen[0]


class Opaque:
    """A kernel's reference in torch, which reads on the host: one operation of a recording."""

    recording: ClassVar[Recording | None] = None

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, **given):
        if Opaque.recording is None:
            return self.kernel(**given)
        with _disable_current_modes():
            made = self.kernel(**given)
        Opaque.recording._steps.append(lambda: self.again(given, made))
        return made

    def again(self, given, made):
        own = self.kernel(**given)
        pairs = [(made, own)] if isinstance(made, torch.Tensor) else zip(made, own, strict=True)
        for old, new in pairs:
            if old is not None:
                old.copy_(new)

    @classmethod
    @contextlib.contextmanager
    def record(cls):
        """What runs within, as a CUDA graph would hold it."""
        recording = Recording()
        with mock.patch.object(cls, "recording", recording), recording.launches(), recording:
            yield recording


def runner_of(server, bs=(1, 2, 4), width=None):
    """SGLang's decode graph runner as it decides: what it would replay is its last key."""
    module = import_module("sglang.srt.model_executor.runner.decode_cuda_graph_runner")
    steps = server.draft.speculative_num_steps
    width = width or steps + 1
    runner = object.__new__(module.DecodeCudaGraphRunner)
    target = server.worker.target_worker.model_runner
    target.is_draft_worker = False
    spec = import_module("sglang.srt.speculative.spec_info").SpeculativeAlgorithm
    target.spec_algorithm = spec.EAGLE
    vars(runner).update(
        ragged_verify_mode=True, capture_bs=list(bs), max_bs=max(bs), captured_req_width=width,
        attn_backend=target.attn_backend, model_runner=target, require_mlp_sync=False,
        is_encoder_decoder=False, capture_hidden_mode=0, _captured_ragged_layouts={},
        device="cpu", replayed=[], speculative_num_steps=steps,
        speculative_num_draft_tokens=width, buffers=SimpleNamespace(custom_mask=None),
    )  # fmt: skip
    target.model_config.hidden_size, target.dtype, target.device = 4, torch.float32, "cpu"
    runner.capture_num_tokens = runner._build_ragged_verify_token_buckets()

    def load_batch(batch):
        layout = import_module("sglang.srt.speculative.ragged_verify").resolve_ragged_verify_layout(
            batch
        )
        key = runner._ragged_graph_num_tokens(layout.graph_num_tokens)
        assert key == layout.graph_num_tokens == len(batch.input_ids) == len(batch.out_cache_loc)
        runner._stage_ragged_verify_layout(layout, key)
        runner.replayed.append(key)

    runner.load_batch = load_batch
    target.decode_cuda_graph_runner = runner
    return runner


def texts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    sizes = [4 + 3 * b for b in range(count)]
    return [torch.randint(0, VOCAB, (size,), generator=generator).tolist() for size in sizes]


@pytest.fixture(name="folder", scope="module")
def sglang_folder(tmp_path_factory):
    return sources("sglang", VERSION, tmp_path_factory.mktemp("sglang"))


@pytest.fixture(name="engine", scope="module")
def sglang_engine(folder, tmp_path_factory):
    """SGLang's modules with the plugin, loaded by ``load_plugins``; yields the plugin's module."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton is imported without its interpreter: run this file by itself")
    with pytest.MonkeyPatch.context() as patch, around(folder, PACKAGES, REAL):
        patch.syspath_prepend(str(PLUGIN))
        patch.syspath_prepend(installed(tmp_path_factory.mktemp("site")))
        kinds = ("cpu", "cuda", "hip", "musa", "npu")
        kinds += ("gfx95_supported", "gfx942_supported", "gfx1250_supported")
        for name in ("sglang.srt.utils", "sglang.srt.utils.common"):
            utils = import_module(name)
            for kind in kinds:
                setattr(utils, f"is_{kind}", lambda *_: False)
            utils.is_xpu, utils.get_device_core_count = lambda: True, lambda *_: 1
            utils.next_power_of_2 = triton.next_power_of_2
            utils.is_flashinfer_available = lambda: False
            utils.fast_topk = lambda x, k, dim: x.topk(k, dim=dim)
            for kind in ("gathered_buffer", "mlp_sync", "mlp_tp_gather", "attn_tp_gather"):
                setattr(utils, f"require_{kind}", lambda: False)
        envs = import_module("sglang.srt.environ").envs
        envs.SGLANG_SIMULATE_ACC_LEN.get.return_value = -1
        envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.get.return_value = False
        envs.SGLANG_TEST_RAGGED_VERIFY_FORCE_UNIFORM_CAPTURE.get.return_value = False
        envs.SGLANG_PLUGINS.get.return_value, envs.SGLANG_PLATFORM.get.return_value = "echo", ""
        spec = SimpleNamespace(
            speculative_use_rejection_sampling=False, enable_multi_layer_eagle=False,
            speculative_eagle_topk=4,
        )  # fmt: skip
        group = SimpleNamespace(world_size=1)
        alone = SimpleNamespace(tp_group=group, pp_size=1, attn_dp_enabled=False)
        context = import_module("sglang.srt.runtime_context")
        context.get_spec, context.get_parallel = lambda: spec, lambda: alone
        mamba = SimpleNamespace(enable_mamba_extra_buffer=False)
        off = ("disable_cuda_graph_padding", "enable_profile_cuda_graph", "enable_cudagraph_gc")
        graph = SimpleNamespace(**dict.fromkeys(off, False), cuda_graph_config=None)
        fixed = SimpleNamespace(enable_deterministic_inference=False)
        running = SimpleNamespace(mamba=mamba, graph=graph, deterministic=fixed)
        context.get_exec = lambda: running
        context.get_flags = lambda: SimpleNamespace(
            capture=SimpleNamespace(enable_torch_compile=False)
        )
        runners = import_module("sglang.srt.model_executor.runner")
        runners.ShapeKey = import_module(f"{runners.__name__}.shape_key").ShapeKey
        runners.DecodeCudaGraphRunner = import_module(
            f"{runners.__name__}.decode_cuda_graph_runner"
        ).DecodeCudaGraphRunner
        runners.get_batch_sizes_to_capture = lambda *_: ([1, 2, 4], [])
        runners._grouped_foreach_copy_ = lambda to, of: [
            x.copy_(y) for x, y in zip(to, of, strict=True)
        ]
        sampling = import_module("sglang.kernels.ops.sampling")
        sampling.softmax = lambda logits, **_: logits.softmax(-1)
        import_module("sglang.srt.configs.hybrid_arch").mambaish_config = lambda _: None
        batches = import_module("sglang.srt.model_executor.forward_batch_info")
        kinds = {"IntEnum": IntEnum, "auto": auto, "total_ordering": total_ordering}
        source = folder / "sglang/srt/model_executor/forward_batch_info.py"
        definitions(source, ("ForwardMode", "CaptureHiddenMode"), kinds)
        vars(batches).update(kinds, ForwardBatch=ForwardBatch)
        workers = import_module("sglang.srt.managers.tp_worker")
        workers.TpModelWorker = type("TpModelWorker", (TargetWorker,), {})
        import_module("sglang.version").__version__ = VERSION
        load = import_module("sglang.srt.plugins").load_plugins
        registry = import_module("sglang.srt.plugins.hook_registry").HookRegistry
        patch.setenv("ECHO_VERIFY_TOKENS", "14")
        load()
        patch.delenv("ECHO_VERIFY_TOKENS")
        plugin = sys.modules["echo_sglang"]
        hooked = {target for target, _, _, hook in plugin.SEAMS if hook is not None}
        assert registry._patched == set(registry._hooks) == hooked
        yield plugin
        for name in ("echo_sglang", "echo_sglang_draft", "echo_sglang_ragged"):
            del sys.modules[name]


def installed(site):
    """A site folder in which the plugin is installed, as far as entry points go."""
    text = (PLUGIN / "pyproject.toml").read_text()
    group, name, value = re.search(r'entry-points\."([^"]+)"\]\n(\w+) = "([^"]+)"', text).groups()
    info = site / "echo_sglang-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-sglang\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return str(site)
