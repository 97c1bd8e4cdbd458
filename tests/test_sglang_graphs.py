"""The plugin inside SGLang's draft graphs, without a GPU.

Real, from the wheel: ``EAGLEDraftCudaGraphRunner``, ``EAGLEDraftExtendCudaGraphRunner``, the capture
loop of their base, ``FullCudaGraphBackend``, and the worker that replays them. CUDA's graph is a
recording: a replay runs no Python, only what was recorded, at the same addresses.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import torch

import echo
from echo.testing.graphs import Recording
from sglang_server import (
    STEPS,
    TOPK,
    VOCAB,
    Opaque,
    Server,
    Tables,
    sglang_engine,  # noqa: F401
    sglang_folder,  # noqa: F401
    texts,
)

pytestmark = pytest.mark.peers
LARGEST = 4


class Graph:
    """``torch.cuda.CUDAGraph``: records, and counts its replays."""

    made: ClassVar[list[Graph]] = []

    def __init__(self):
        self.recording, self.runs = Recording(), 0
        self.made.append(self)

    @contextlib.contextmanager
    def capture(self):
        with self.recording.launches(), self.recording:
            yield

    def replay(self):
        self.runs += 1
        self.recording.replay()


@pytest.fixture
def captured(engine, monkeypatch):
    """A function that captures a server's graphs, with the plugin's hooks, through SGLang's runners;
    returns them: draft, draft extend.
    """
    eagle = "sglang.srt.speculative"
    draft = import_module(f"{eagle}.eagle_draft_cuda_graph_runner")
    extend = import_module(f"{eagle}.eagle_draft_extend_cuda_graph_runner")
    backends = import_module("sglang.srt.model_executor.runner_backend.full_cuda_graph_backend")
    device = SimpleNamespace(
        synchronize=lambda: None, current_stream=torch.cpu.current_stream,
        graph=lambda cuda_graph, pool, stream: cuda_graph.capture(),
    )  # fmt: skip
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(backends, "GraphPoolPrecarve", mock.MagicMock())
    monkeypatch.setattr(backends.TorchMemorySaverAdapter, "create", lambda **_: None, raising=False)
    for module in (draft, extend):
        monkeypatch.setattr(module, "DeepEPCudaGraphRunnerAdapter", mock.MagicMock())
        monkeypatch.setattr(module, "resolve_decode_backend", backends.FullCudaGraphBackend)
    context = import_module("sglang.srt.runtime_context")
    parallel, spec = context.get_parallel(), context.get_spec()
    group = SimpleNamespace(world_size=1, barrier=lambda: None)
    monkeypatch.setattr(parallel, "tp_group", group)
    monkeypatch.setattr(parallel, "tp_rank", 1, raising=False)  # without a progress bar
    for name in ("get_draft_recurrent_hidden_state_spec", "get_draft_input_from_target_hidden_dim"):
        for module in (draft, extend):
            size = (None, None) if "recurrent" in name else 2
            monkeypatch.setattr(module, name, lambda _, size=size: size, raising=False)
    monkeypatch.setattr(draft, "TOP_K_ALL", 1 << 30)

    def build(server):
        engine.Planner.of(server.worker)
        runner = server.draft.draft_runner
        sizes = {"speculative_eagle_topk": server.draft.topk}
        sizes["speculative_num_steps"] = server.draft.speculative_num_steps
        sizes["speculative_num_draft_tokens"] = server.draft.speculative_num_draft_tokens
        for name, size in sizes.items():
            monkeypatch.setattr(spec, name, size, raising=False)

        def forward(input_ids, positions, batch):
            rows = input_ids[batch.spec_info.select_index]
            logits = server.tables.last[rows]
            return SimpleNamespace(next_token_logits=logits, hidden_states=logits[:, :2])

        backend = {
            name: lambda *_, **__: None
            for name in ("init_cuda_graph_state", "init_forward_metadata_in_graph",
                         "init_forward_metadata_out_graph", "init_forward_metadata",
                         "shared_read_ends")
        }  # fmt: skip
        backend |= {
            "get_cuda_graph_seq_len_fill_value": lambda: 1,
            "on_after_cuda_graph_warmup": None,
        }
        steps = [SimpleNamespace(**backend)] * server.draft.speculative_num_steps
        server.draft.draft_attn_backend = SimpleNamespace(**backend, attn_backends=steps)
        server.draft.draft_extend_attn_backend = SimpleNamespace(**backend)
        buffers = SimpleNamespace(get_logits_buffer=lambda vocab, rows: torch.zeros(rows, vocab))
        translator = SimpleNamespace(bind_runner_slots=lambda _: None)
        vars(runner).update(
            device="cpu", graph_shared_output=buffers, kv_index_translator=translator,
            model=SimpleNamespace(forward=forward, shared_experts_config=None), gpu_id=0,
            shared_read_done_event=None, device_timer=None,
            draft_attn_backend=server.draft.draft_attn_backend,
        )  # fmt: skip
        vars(runner.model_config).update(vocab_size=VOCAB, dtype=torch.float32)
        runner.spec_algorithm.is_eagle = lambda: True
        server.draft.speculative_algorithm = runner.spec_algorithm
        server.draft.cuda_graph_runner = draft.EAGLEDraftCudaGraphRunner(server.draft)
        server.draft.cuda_graph_runner_for_draft_extend = extend.EAGLEDraftExtendCudaGraphRunner(
            server.draft
        )
        return server.draft.cuda_graph_runner, server.draft.cuda_graph_runner_for_draft_extend

    return build


def steps_of(server, count):
    """Steps of a server: what each planned and accepted, as its tensors then were."""
    seen = []
    for _ in range(count):
        result, verified = server.step()
        packed, tree = verified.echo_packed, verified.echo_tree
        parts = {
            f"packed.{name}": x for name, x in vars(packed).items() if isinstance(x, torch.Tensor)
        }
        parts |= {
            f"tree.{name}": getattr(tree, name) for name in ("score", "status", "num_committed")
        }
        parts |= {"accept_lens": result.accept_lens, "first": server.state.topk_p}
        seen.append({name: x.clone() for name, x in parts.items()})
        packed.validate(max_verify_tokens_per_req=verified.draft_token_num)
    return seen


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("topk", [1, TOPK])
@pytest.mark.parametrize("count", [2, 3])
def test_a_replayed_draft_plans_what_an_eager_one_does(
    captured, engine, monkeypatch, count, topk, ragged
):
    """To the last bit, with new inputs in every step and lanes beyond the batch; the text is the
    target's own. From the capture on nothing of ours runs in Python.
    """
    monkeypatch.setattr(
        import_module("sglang.srt.speculative.eagle_worker_v2"), "_is_cuda", topk == 1
    )
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", str(4 * count))
    monkeypatch.setenv("ECHO_RAGGED", str(int(ragged)))
    tables, prompts = Tables(7), texts(1, count)
    eager = Server(tables, prompts, topk=topk)
    captured(eager)
    eager.draft.cuda_graph_runner = None
    wanted = steps_of(eager, 5)
    Graph.made.clear()
    server = Server(tables, prompts, topk=topk)
    draft, extend = captured(server)
    assert len(Graph.made) == 6 and draft.capture_bs == [1, 2, LARGEST]
    monkeypatch.setattr(
        engine.draft.Plan, "draw", lambda *_: pytest.fail("planned beside the graph")
    )
    for name in ("columns", "top_probability"):
        monkeypatch.setattr(engine.draft, name, None)
    got = steps_of(server, 5)
    for step, (own, its) in enumerate(zip(wanted, got, strict=True)):
        assert own.keys() == its.keys()
        for name in own:
            assert torch.equal(own[name], its[name]), (step, name)
    assert server.texts == eager.texts
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))
    assert sum(map(len, server.texts)) > sum(map(len, prompts)) + 5 * count * 1.2
    for runner in (draft, extend):
        runs = {key.size: graph.runs for key, graph in runner.backend._graphs.items()}
        assert runs == {1: 0, 2: 5 * (count == 2), LARGEST: 5 * (count == 3)}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_replayed_plan_is_the_schedulers(engine, backend):
    """Of three or fewer requests in a graph of four, by kernels too; what is over is pads."""
    policy = engine.scheduler(1, STEPS, STEPS + 1)
    plan = engine.draft.Plan(policy, 3, STEPS + 1, "cpu")
    odds, drafts = torch.ones(4, STEPS), torch.zeros(4, STEPS, dtype=torch.int64)
    with echo.kernels.using(backend):
        with Opaque.record() as recording:
            plan.draw(None, odds, drafts, STEPS, STEPS + 1)
        for batch, budget, rows in ((3, 9, 9), (3, 6, 11), (1, 3, 4), (2, 8, 8)):
            odds.uniform_()
            drafts.random_(VOCAB)
            roots = torch.randint(0, VOCAB, (batch,))
            plan.start(roots, budget)
            recording.replay()
            own = plan.packed(batch, STEPS, rows)
            tree = policy.begin(roots, num_verify_tokens=budget)
            log_probs = odds[:batch, :, None].log()
            tree = policy.grow_positions(tree, drafts[:batch, :, None], log_probs)
            wanted = policy.pack(tree, num_verify_tokens=rows)
            own.validate(chain=True)
            assert torch.equal(own.to_buffer(), wanted.to_buffer())
            assert int((own.request == batch).sum()) == rows - budget


def test_the_captured_part_is_the_whole_plan(captured):
    """From the first layer to the packed rows; the drafts' own operations are between."""
    server = Server(Tables(7), texts(1, 3), topk=1)
    draft, _ = captured(server)
    names = draft.backend._graphs[draft._make_graph_key(LARGEST)].recording.operations
    plan = server.worker.target_worker.echo_planner.plan
    odds, tokens = torch.rand(LARGEST, STEPS), torch.ones(LARGEST, STEPS).long()
    with Recording() as recording:
        plan.draw(None, odds, tokens, STEPS, STEPS + 1)
    assert names[-len(recording.operations) - 1 : -1] == recording.operations
    assert names[-1] == "sub_"  # SGLang's, of positions


def test_graph_sets_of_two_depths_share_the_buffers(captured):
    """Steps at either depth, in turns: each plans what a server of that depth alone does."""
    tables, prompts, sets = Tables(7), texts(1, 3), {}
    server = Server(tables, prompts)
    owners = server.worker, server.draft

    def switch(depth):
        for owner in owners:
            owner.speculative_num_steps = depth

    for depth in (STEPS, 2):
        switch(depth)
        sets[depth] = captured(server)
    for depth in (2, STEPS, STEPS, 2, 2, STEPS):
        switch(depth)
        server.draft.cuda_graph_runner, server.draft.cuda_graph_runner_for_draft_extend = sets[
            depth
        ]
        alone = Server(tables, server.texts)
        alone.state, alone.table, alone.req_pool_indices = (
            server.state,
            server.table,
            server.req_pool_indices,
        )
        alone.pool.token.copy_(server.pool.token)
        alone.worker.req_to_token_pool.req_to_token.copy_(server.table)
        for owner in (alone.worker, alone.draft):
            owner.speculative_num_steps = depth
        ours, theirs = server.step()[1].echo_packed, alone.step()[1].echo_packed
        assert ours.max_depth == depth and int(ours.depth.max()) == depth
        assert all(
            torch.equal(getattr(ours, x), getattr(theirs, x)) for x in ("tokens", "parent", "score")
        )
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))


def test_draft_extend_scores_the_next_chains_first_token_in_its_graph(captured, monkeypatch):
    """Its fixed shape holds any accepted lengths; the model runs in no other place."""
    monkeypatch.setattr(import_module("sglang.srt.speculative.eagle_worker_v2"), "_is_cuda", True)
    tables, prompts = Tables(7), texts(1, 3)
    server = Server(tables, prompts, topk=1)
    _, extend = captured(server)
    server.draft.draft_runner.forward = lambda _: pytest.fail("a forward pass beside the graphs")
    lengths = set()
    for _ in range(5):
        result, _ = server.step()
        odds = tables.last[torch.tensor([text[-1] for text in server.texts])].softmax(-1)
        torch.testing.assert_close(server.state.topk_p, odds.amax(-1, keepdim=True))
        lengths.add(tuple(result.accept_lens.tolist()))
    assert len(lengths) > 2 and extend.backend._graphs[extend._make_graph_key(LARGEST)].runs == 5
    assert "forward" in vars(server.draft.draft_runner.model)  # its own again
    assert server.draft.draft_runner.model.forward.__name__ == "forward"


@pytest.mark.parametrize(("topk", "steps"), [(1, 12), (TOPK, STEPS)])
def test_long_texts_through_the_graphs_are_the_targets_own(captured, monkeypatch, topk, steps):
    """Of unequal lengths, with the budget's rows; twelve steps are twelve."""
    eagle = import_module("sglang.srt.speculative.eagle_worker_v2")
    monkeypatch.setattr(eagle, "_is_cuda", topk == 1)
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", "24")
    monkeypatch.setenv("ECHO_RAGGED", "1")
    tables, prompts = Tables(5), texts(4, 3)
    tables.last *= 3  # drafts that are sure of themselves
    server = Server(tables, prompts, topk=topk, steps=steps)
    captured(server)
    deepest = 0
    while max(map(len, server.texts)) < 120:
        packed = server.step()[1].echo_packed
        deepest = max(deepest, int(packed.depth.max()))
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == tables.greedy(prompt, len(text) - len(prompt))
    assert set(server.worker.target_worker.rows) == {24}
    assert deepest == steps or topk > 1


def test_ranks_follow_rank_0_inside_their_graphs(captured, monkeypatch):
    """Its plan reaches the captured buffers of a rank whose drafter says otherwise."""
    group, wire = import_module("sglang.srt.runtime_context").get_parallel().tp_group, []
    monkeypatch.setattr(group, "world_size", 2)

    def send(buffer, src):
        wire.append(wire[-1] if wire and len(wire[-1]) == len(buffer) else torch.empty_like(buffer))
        return wire[-1].copy_(buffer)

    def receive(buffer, src):
        return buffer.copy_(next(own for own in wire if len(own) == len(buffer)))

    tables, noisy, prompts, ranks = Tables(7), Tables(7), texts(1, 3), []
    noisy.last = noisy.last + torch.randn(VOCAB, VOCAB)
    for own, broadcast in ((tables, send), (noisy, receive)):
        monkeypatch.setattr(group, "broadcast", broadcast, raising=False)
        ranks.append(Server(own, prompts))
        captured(ranks[-1])
        ranks[-1].worker.target_worker.tables = tables
    for _ in range(4):
        first, second = (rank.step()[1].echo_packed for rank in ranks)
        own, its = first.to_buffer(), second.to_buffer()
        assert torch.equal(own, its)
    assert ranks[0].texts == ranks[1].texts
