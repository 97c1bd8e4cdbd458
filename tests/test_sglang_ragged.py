"""Ragged chains in SGLang, its depths and what the plugin refuses, without a GPU.

Real, from the wheel: the hook registry, ``EAGLEWorkerV2`` with topk 1, ``DecodeCudaGraphRunner``'s
tiers and admission, ``RaggedVerifyLayout``, DSpark's schedule, the kernel of topk 1.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import echo
from sglang_server import (
    PLUGIN,
    VERSION,
    Server,
    Tables,
    runner_of,
    sglang_engine,  # noqa: F401
    sglang_folder,  # noqa: F401
    texts,
)

pytestmark = pytest.mark.peers
STEPS, WIDTH = 4, 5


@pytest.fixture
def chains(engine, monkeypatch):
    """A server of three chains of four drafts, drafting as it does on CUDA."""
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", "8")
    monkeypatch.setenv("ECHO_RAGGED", "1")
    monkeypatch.setattr(import_module("sglang.srt.speculative.eagle_worker_v2"), "_is_cuda", True)
    return lambda seed=7, count=3: Server(Tables(seed), texts(1, count), topk=1, steps=STEPS)


@pytest.mark.parametrize("graphs", [False, True])
def test_ragged_chains_write_the_targets_own_text(chains, graphs):
    """Greedy identity, with the rows of the budget; in graphs those of the next captured tier."""
    server = chains()
    runner = runner_of(server) if graphs else None
    captured = runner.get_spec_info(10).ragged_verify_layout if graphs else None
    prompts = [list(text) for text in server.texts]
    for _ in range(6):
        _, verified = server.step()
        verified.echo_packed.validate(max_verify_tokens_per_req=WIDTH)
        if graphs:  # what the graph reads is this step's
            lens = verified.echo_packed.indptr.diff()
            assert torch.equal(captured.verify_lens[:3], lens) and captured.bs == 4
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == server.tables.greedy(prompt, len(text) - len(prompt))
    assert sum(map(len, server.texts)) - sum(map(len, prompts)) > 6 * 3 * 1.2
    rows = 10 if graphs else 8
    assert set(server.worker.target_worker.rows) == {rows}
    if graphs:
        assert runner.replayed == [10] * 6
    assert server.worker.target_worker.echo_planner.plan.space.history.num_steps == 6


def test_a_batch_beyond_the_captured_tiers_is_verified_whole(chains):
    server = chains(count=5)
    runner = runner_of(server)
    prompts = [list(text) for text in server.texts]
    for _ in range(2):
        server.step()
    assert set(server.worker.target_worker.rows) == {5 * WIDTH} and not runner.replayed
    runner.ragged_verify_mode = False  # graphs of uniform passes alone
    assert (
        server.worker.target_worker.echo_planner.num_rows(server.worker.target_worker, 2, WIDTH)
        is None
    )
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == server.tables.greedy(prompt, len(text) - len(prompt))


def test_a_chain_ends_where_its_verified_drafts_end(chains):
    """A drafter that is always right: accepted is what was verified, and nothing behind it."""
    server = chains()
    server.tables.before.zero_()
    prompts = [list(text) for text in server.texts]
    for _ in range(4):
        result, verified = server.step()
        assert torch.equal(result.accept_lens, verified.echo_packed.indptr.diff())
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == server.tables.greedy(prompt, len(text) - len(prompt))


def test_a_step_without_drafts_is_a_packed_pass_too(chains):
    """At depth 0, in the graph set that was captured for it."""
    server = chains()
    runner = runner_of(server, width=1)
    prompts = [list(text) for text in server.texts]
    for owner in (server.worker, server.draft):
        owner.speculative_num_steps, owner.speculative_num_draft_tokens = 0, 1
    for _ in range(3):
        server.step()
    assert runner.replayed == [4] * 3 and set(server.worker.target_worker.rows) == {4}
    for text, prompt in zip(server.texts, prompts, strict=True):
        assert text == server.tables.greedy(prompt, 3)
    assert server.worker.target_worker.echo_planner.plan.space.history.num_steps == 3


def test_lengths_are_those_of_sglangs_own_planner(engine):
    """DSpark's schedule on the same probabilities: as many drafts, of the same requests."""
    schedule = import_module("sglang.kernels.ops.speculative.dspark.dspark_schedule")
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        batch, gamma = int(torch.randint(1, 9, (), generator=generator)), 1 + seed % 5
        confidence = torch.rand(batch, gamma, generator=generator)
        budget = int(torch.randint(0, batch * gamma + 1, (), generator=generator))
        own = SimpleNamespace(
            resolved_max_verify_len=lambda most=gamma + 1: most, min_verify_len=1, survival_eps=0.0
        )
        theirs = schedule.ScheduleVerifyLensTopk.execute(
            confidence=confidence, budget=budget, cfg=own
        )
        policy = echo.ElasticBudgetScheduler(
            echo.GlobalRank(1), budget=1, max_depth=gamma, max_verify_tokens_per_req=gamma + 1
        )
        roots = torch.zeros(batch, dtype=torch.int64)
        tree = policy.begin(roots, num_verify_tokens=batch + budget)
        drafts = roots[:, None, None].expand(-1, gamma, 1)
        packed = policy.pack(policy.grow_positions(tree, drafts, confidence.log()[..., None]))
        layout = engine.ragged.narrow(
            SimpleNamespace(draft_token_num=gamma + 1, prepared_out_cache_loc=None),
            SimpleNamespace(seq_lens=roots + 3, req_pool_indices=roots), packed,
            torch.zeros(1, 20).int(),
        ).ragged_verify_layout  # fmt: skip
        assert layout.verify_lens.tolist() == theirs.tolist()
        assert layout.graph_num_tokens == batch + budget


def test_a_chains_probabilities_are_its_drafts_own(chains, engine):
    """Those of the logits that SGLang's kernel reads; the first of the next chain counts as sure
    without the draft extend's graph.
    """
    server = chains()
    for step in range(2):
        last = [text[-1] for text in server.texts]
        tree = server.step()[1].echo_tree
        scores, tokens = tree.score[:, 1:].exp(), tree.forest.token[:, 1:]
        for b, token in enumerate(last):
            path = 1.0
            for d in range(STEPS):
                odds = server.tables.last[token].softmax(-1)
                token = int(odds.argmax())
                path *= 1.0 if step and not d else float(odds.max())
                assert int(tokens[b, d]) == token
                assert float(scores[b, d]) == pytest.approx(path, rel=1e-5)


@pytest.mark.parametrize("num_tokens", [5, 10, 20])
def test_captured_passes_carry_the_tiers_layout(chains, engine, num_tokens):
    """SGLang's own capture layout, on the verify input that it captures with."""
    runner = runner_of(chains())
    spec_info = runner.get_spec_info(num_tokens)
    layout = spec_info.ragged_verify_layout
    assert layout is runner._captured_ragged_layouts[num_tokens]
    assert layout.graph_num_tokens == num_tokens == int(layout.verify_lens.sum())
    assert layout.bs == runner._ragged_capture_slots(num_tokens)
    runner.attn_backend.supports_ragged_verify_graph = False
    with pytest.raises(echo.EchoError, match="SGLANG_RAGGED_VERIFY_MODE: expected static"):
        runner.get_spec_info(num_tokens)
    runner.ragged_verify_mode = False
    assert runner.get_spec_info(num_tokens).ragged_verify_layout is None


def test_which_algorithms_are_ragged(engine, monkeypatch):
    spec = import_module("sglang.srt.speculative.spec_info").SpeculativeAlgorithm
    ragged = lambda: {algorithm.name for algorithm in spec if algorithm.supports_ragged_verify()}
    assert ragged() == {"DSPARK"}
    monkeypatch.setenv("ECHO_RAGGED", "1")
    assert ragged() == {"DSPARK", "EAGLE", "EAGLE3"}
    config = import_module("sglang.srt.runtime_context").get_spec()
    monkeypatch.setattr(config, "enable_multi_layer_eagle", True)
    assert ragged() == {"DSPARK"}


def test_the_table_is_this_release(engine):
    assert engine.misfits() == [] and engine.VERSION == VERSION


def test_another_release_or_signature_is_refused_and_nothing_is_touched(engine, monkeypatch):
    """A parameter renamed, one more that must be given, a name gone, another release."""
    registry = import_module("sglang.srt.plugins.hook_registry").HookRegistry
    workers = import_module("sglang.srt.speculative.eagle_worker_v2").EAGLEWorkerV2
    tiers = import_module("sglang.srt.speculative.ragged_verify")
    backends = import_module("sglang.srt.layers.attention.attention_registry")
    before = {target: list(hooks) for target, hooks in registry._hooks.items()}
    built = dict(backends.ATTENTION_BACKENDS)
    monkeypatch.setattr(workers, "verify", lambda self, batch, stream: None)
    monkeypatch.setattr(tiers, "round_up_grid", lambda total, tiers: None)
    monkeypatch.delattr(workers, "build_adaptive_runtime_state")
    monkeypatch.setattr(import_module("sglang.version"), "__version__", "0.6.0")
    monkeypatch.setenv("ECHO_DEPTHS", "0")
    with pytest.raises(echo.EchoError) as error:
        engine.register()
    for said in (
        "version 0.6.0, not 0.5.23",
        "EAGLEWorkerV2.verify: expected (self, batch), got (self, batch, stream)",
        "round_up_grid: expected (total, grid), got (total, tiers)",
        "build_adaptive_runtime_state: AttributeError",
        "SGLang runs without ECHO",
    ):
        assert said in str(error.value)
    assert registry._hooks == before and built == backends.ATTENTION_BACKENDS


def test_more_optional_parameters_are_no_reason(engine, monkeypatch):
    workers = import_module("sglang.srt.speculative.eagle_worker_v2").EAGLEWorkerV2
    monkeypatch.setattr(workers, "verify", lambda self, batch, stream=None: None)
    monkeypatch.setattr(import_module("sglang.version"), "__version__", f"{VERSION}.post1")
    assert engine.misfits() == []


def test_with_nothing_set_nothing_is_registered(engine, monkeypatch):
    registry = import_module("sglang.srt.plugins.hook_registry").HookRegistry
    monkeypatch.setattr(registry, "register", lambda *_: pytest.fail("registered"))
    monkeypatch.setattr(engine, "misfits", lambda: pytest.fail("looked"))
    engine.register()


def test_idle_ranks_agree_on_the_depth_with_the_busy_ones(engine, monkeypatch):
    """Curves ride in SGLang's own gather, whose columns are as without them; all ranks read the same
    ones and switch to the same graph set.
    """
    sync = import_module("sglang.srt.managers.scheduler_components.dp_attn")
    modes = import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    parallel = SimpleNamespace(
        attn_dp_enabled=True, pp_size=1, num_dp_ranks=3, attn_tp_size=1, attn_cp_size=1, dwdp_size=1,
        tp_group=SimpleNamespace(cpu_group="cpu", active_ranks_cpu=torch.ones(3)),
    )  # fmt: skip
    monkeypatch.setattr(sync, "get_parallel", lambda: parallel)
    context = import_module("sglang.srt.runtime_context")
    monkeypatch.setattr(context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(sync, "_ENABLE_METRICS_DP_ATTENTION", False)
    monkeypatch.setattr(sync, "world_dp_gather_enabled", lambda: False)
    off = SimpleNamespace(get=lambda: False)
    monkeypatch.setattr(sync, "envs", SimpleNamespace(
        SGLANG_SCHEDULER_SKIP_ALL_GATHER=off, SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION=off,
        SGLANG_NCCL_ALL_GATHER_IN_OVERLAP_SCHEDULER_SYNC_BATCH=off,
    ))  # fmt: skip
    local = SimpleNamespace(
        prepare_all_gather=lambda _: (1, 0), compute_output=lambda _: (None, None)
    )
    monkeypatch.setattr(sync, "TboDPAttentionPreparer", lambda: local)
    for name in ("_decode_total_seq_lens", "_local_decode_cuda_graph_vote"):
        monkeypatch.setattr(sync, name, lambda *_, **__: 1)
    monkeypatch.setattr(sync, "_local_prefill_cuda_graph_vote", lambda **_: True)
    monkeypatch.setattr(sync, "check_cuda_graph_backend", lambda *_: False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    policy = echo.ElasticBudgetScheduler(
        echo.GlobalRank(1), budget=echo.CostModel((1, 64), (1.0, 2.0)), max_depth=4,
        max_verify_tokens_per_req=5,
    )  # fmt: skip
    requests = lambda count: [
        SimpleNamespace(kv=SimpleNamespace(req_pool_idx=i)) for i in range(count)
    ]

    def batch_of(count, mode):
        return SimpleNamespace(
            reqs=requests(count), forward_mode=mode, batch_size=lambda: count, spec_info=None,
            seq_lens_sum=10 * count,
        )  # fmt: skip

    idle = batch_of(0, modes.IDLE)
    batches = [batch_of(6, modes.DECODE), None, batch_of(2, modes.DECODE)]
    ranks = [
        engine.Planner(
            engine.draft.Plan(policy, 8, 5, "cpu"),
            torch.zeros(8, dtype=torch.int32),
            depths=(0, 2, 4),
        )
        for _ in batches
    ]
    rows: dict[int, torch.Tensor] = {}

    def all_gather(flat, row, group):
        assert group == "cpu"
        rows[parallel.tp_rank] = row.clone()
        flat.copy_(torch.cat([rows.get(rank, row) for rank in range(3)]))

    monkeypatch.setattr(sync, "all_gather_single", all_gather)

    def step(depths):
        """All ranks' tiers: each asks, then each reads what all have asked."""
        rows.clear()
        for reads in (False, True):
            for parallel.tp_rank, (planner, batch) in enumerate(zip(ranks, batches, strict=True)):
                planner.depths = depths
                runner = SimpleNamespace(
                    echo_planner=planner, spec_algorithm=None, model_config=None
                )
                ready = sync.prepare_mlp_sync_batch_raw(
                    batch, model_runner=runner, get_idle_batch=lambda: idle,
                    disable_cuda_graph=False, require_mlp_tp_gather=True,
                    disable_overlap_schedule=False, offload_tags=set(),
                )  # fmt: skip
                if reads:
                    assert ready.global_num_tokens == [6, 0, 2]
                    assert ready.can_run_dp_draft_cuda_graph and not ready.is_extend_in_batch
                    planner.choose_tier(ready)
                    yield planner.tier.depth, planner.get_steps_for_batch(len(ready.reqs))

    agreed = set(step((0, 2, 4)))
    assert len(agreed) == 1 and agreed.pop()[1] > 0
    widths, curves = {len(row) for row in rows.values()}, ranks[0].curves
    assert len(widths) == 1 and 11 < widths.pop() <= 11 + 128  # at most 1 kB behind SGLang's own
    bits = lambda curve: curve.contiguous().view(torch.int32)  # NaN: nothing known yet
    assert all(torch.equal(bits(planner.curves), bits(curves)) for planner in ranks)
    assert torch.equal(bits(curves[2]), bits(ranks[2].curve))
    assert curves[:, 1].tolist() == [6, 0, 2]
    list(step((4,)))  # with one depth nothing rides along
    assert {len(row) for row in rows.values()} == {11}


def test_what_a_registered_algorithm_lacks_is_what_the_page_says(engine):
    """examples/sglang/UPSTREAM.md, against the published classes."""
    registry = import_module("sglang.srt.speculative.spec_registry")
    spec = import_module("sglang.srt.speculative.spec_info").SpeculativeAlgorithm
    methods = {name for name, member in vars(spec).items() if inspect.isfunction(member)}
    own = {name for name in methods if not name.startswith("_")} - {"get_platform_worker_cls"}
    lacking = own - set(dir(registry.CustomSpecAlgo))
    assert lacking == {"create_future_map", "need_topk", "carries_draft_hidden_states"}
    page = (PLUGIN / "UPSTREAM.md").read_text()
    assert all(f"`{name}`" in page for name in lacking)
