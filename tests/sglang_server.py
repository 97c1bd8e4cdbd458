"""A toy server around SGLang's EAGLE worker: model runners, pools and batches of small tables, for the worker's own code."""

from __future__ import annotations

import contextlib
from importlib import import_module
from types import SimpleNamespace

import torch

TOPK, STEPS, N, VOCAB, WIDTH = 3, 3, 10, 40, 200


class Tables:
    """A target whose next token depends on the last two, and a draft model that knows of the last one only."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.before, self.last = (
            scale * torch.randn(VOCAB, VOCAB, generator=generator) for scale in (1.0, 2.0)
        )

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
        backend = SimpleNamespace(
            verify_mask=None, max_context_len=WIDTH, _forward_extend_kernel=None
        )
        spec = SimpleNamespace(is_standalone=lambda: False)
        config = SimpleNamespace(vocab_size=VOCAB, model_is_mrope=False)
        pools = SimpleNamespace(req_to_token=req_to_token)
        self.model_runner = SimpleNamespace(
            attn_backend=backend, decode_cuda_graph_runner=None, req_to_token_pool=pools, spec_algorithm=spec, model_config=config,
            watermark_state=None, kv_index_translator=None,
        )  # fmt: skip

    def forward_batch_generation(
        self, batch, forward_batch=None, pp_proxy_tensors=None, is_verify=False
    ):
        info, ids = forward_batch.spec_info, forward_batch.input_ids.long()
        self.rows.append(len(ids))
        self.pool.token[forward_batch.out_cache_loc] = ids
        lengths, slots = (
            forward_batch.seq_lens,
            self.model_runner.req_to_token_pool.req_to_token[forward_batch.req_pool_indices],
        )
        last = self.pool.token[slots.gather(1, lengths[:, None] - 1)[:, 0]]
        above = torch.empty_like(ids)
        if len(ids) == info.draft_token_num * len(lengths):
            n, at, buffer = info.draft_token_num, 0, self.model_runner.attn_backend.verify_mask
            for b, length in enumerate(lengths.tolist()):
                context = 0 if buffer is not None and buffer.mode.name == "QLEN_ONLY" else length
                seen = info.custom_mask[at : at + n * (context + n)].view(n, context + n)
                assert bool(seen[:, :context].all())
                at += seen.numel()
                self.follow(
                    ids,
                    above,
                    range(b * n, b * n + n),
                    seen[:, context:],
                    forward_batch.positions - length,
                    last[b],
                )
        else:
            packed = info.echo_packed
            for b, (first, end) in enumerate(packed.indptr.unfold(0, 2, 1).tolist()):
                self.follow(
                    ids,
                    above,
                    range(first, end),
                    packed.visible()[first:end],
                    packed.depth,
                    last[b],
                )
            above[int(packed.indptr[-1]) :] = 0
        self.logits = logits = SimpleNamespace(
            next_token_logits=self.tables.target(above, ids), hidden_states=None
        )
        return SimpleNamespace(
            logits_output=logits, routed_experts_output=None, indexer_topk_output=None
        )

    @staticmethod
    def follow(ids, above, rows, seen, depth, last):
        for i, row in enumerate(rows):
            parents = [
                j for j, other in enumerate(rows) if seen[i, j] and depth[other] == depth[row] - 1
            ]
            above[row] = ids[rows[parents[0]]] if parents else last


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

    def __init__(self, tables, texts, mask=None):
        module = import_module("sglang.srt.speculative.eagle_worker_v2")
        self.modes, self.texts, self.batch = (
            module.ForwardMode,
            [list(text) for text in texts],
            len(texts),
        )
        pool = Pool(self.batch * WIDTH + 1)
        table = 1 + torch.randperm(self.batch * WIDTH).view(self.batch, WIDTH)
        self.pool, self.slots = pool, torch.randperm(self.batch)
        self.table = torch.empty_like(table).index_copy_(0, self.slots, table)
        for b, text in enumerate(texts):
            pool.token[self.table[self.slots[b], : len(text) - 1]] = torch.tensor(text[:-1])
        target = import_module("sglang.srt.managers.tp_worker").TpModelWorker(
            tables, pool, self.table
        )
        masks = import_module("sglang.kernels.ops.speculative.spec_tree").TreeMaskMode
        if mask is not None:  # a buffer that the attention backend owns, of unknown content
            buffer = torch.rand(self.batch * N * (WIDTH + N)) < 0.5
            target.model_runner.attn_backend.verify_mask = SimpleNamespace(
                buffer=buffer, mode=masks[mask], fits=lambda _: True
            )
        runner = SimpleNamespace(
            forward=lambda batch: SimpleNamespace(
                logits_output=SimpleNamespace(next_token_logits=tables.last[batch.input_ids], hidden_states=None)
            ),
            canary_manager=None, model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["Toy"]), model_is_mrope=False),
            spec_algorithm=target.model_runner.spec_algorithm, attn_backend=SimpleNamespace(init_forward_metadata=lambda _: None),
        )  # fmt: skip
        draft = type(
            "Draft",
            (module.EagleDraftWorker,),
            {"__abstractmethods__": frozenset(), "draft_runner": runner},
        )
        worker = type(
            "Worker",
            (module.EAGLEWorkerV2,),
            {"target_worker": target, "draft_worker": object.__new__(draft)},
        )
        worker.__abstractmethods__ = frozenset()
        shared = {
            "topk": TOPK,
            "speculative_num_steps": STEPS,
            "speculative_num_draft_tokens": N,
            "device": "cpu",
            "plan_stream": None,
        }
        shared |= {
            "plan_stream_ctx": contextlib.nullcontext(),
            "req_to_token_pool": target.model_runner.req_to_token_pool,
        }
        shared |= {
            "target_worker": target,
            "token_to_kv_pool_allocator": pool,
            "_topk1_parents_prealloc": torch.empty(0),
        }
        self.worker = object.__new__(worker)
        vars(self.worker).update(shared, adaptive_controller=None)
        self.draft = draft = worker.draft_worker
        self.worker._target_worker, self.worker._draft_worker = target, draft
        backend = SimpleNamespace(
            init_forward_metadata=lambda _: None, attn_backends=[None] * STEPS
        )
        vars(draft).update(
            shared, cuda_graph_runner=None, cuda_graph_runner_for_draft_extend=None, seed_dsa_topk_from_draft_extend=False,
            hot_token_id=None, index_share_for_mtp_iteration=False, draft_attn_backend=backend, parallel_layout=None,
            tree_mask_mode=masks.FULL_MASK,
        )  # fmt: skip
        for name in (
            "draft_tp_context",
            "speculative_moe_backend_context",
            "speculative_moe_a2a_backend_context",
            "spec_stage_span",
        ):
            setattr(module, name, lambda *_: contextlib.nullcontext())
        first = tables.last[torch.tensor([text[-1] for text in texts])].softmax(-1).topk(TOPK)
        self.state = SimpleNamespace(
            bonus_tokens=torch.tensor([text[-1] for text in texts]).int(),
            topk_p=first[0],
            topk_index=first[1],
        )
        self.state.hidden_states = None

    def step(self):
        """One decode step; the worker's result and verify input."""
        module = import_module("sglang.srt.speculative.eagle_info")
        lengths = torch.tensor([len(text) - 1 for text in self.texts])
        requests = [
            SimpleNamespace(kv=SimpleNamespace(req_pool_idx=int(slot))) for slot in self.slots
        ]
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
        self.worker.verify = lambda batch, **kwargs: (
            seen.append(batch.spec_info),
            verify(self.worker, batch, **kwargs),
        )[1]
        result = self.worker.forward_batch_generation(batch)
        path = result.next_token_ids.view(self.batch, -1)
        for b, (text, length) in enumerate(
            zip(self.texts, result.accept_lens.tolist(), strict=True)
        ):
            text.extend(path[b, :length].tolist())
            cached = self.pool.token[self.table[self.slots[b], : len(text) - 1]]
            assert cached.tolist() == text[:-1], "the cache must hold the text up to its last token"
        next_input = result.next_draft_input
        self.state = SimpleNamespace(
            **{name: getattr(next_input, name) for name in ("bonus_tokens", "topk_p", "topk_index")}
        )
        self.state.hidden_states = None
        return result, seen[0]


def texts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, VOCAB, (4 + 3 * b,), generator=generator).tolist() for b in range(count)
    ]
