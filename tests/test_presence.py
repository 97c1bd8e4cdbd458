"""Requests that are not there cost nothing; those that are there are never lost, nor counted
beyond what they said.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION
from echo import kernels
from echo.testing import TabularDrafter, TabularTarget, blurred, table

try:
    import triton  # noqa: F401

    from echo.kernels import tiles

    BACKENDS = ("torch", "triton") if tiles.interpreted() else ("torch",)
except ImportError:
    BACKENDS = ("torch",)

COST = echo.CostModel((1, 8, 64), (1.0, 1.0, 4.0))
POLICIES = {
    "plain": echo.ElasticBudgetScheduler.autoregressive(),
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=2, max_depth=2),
    "rank": echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=8, max_depth=2),
    "calibrated": echo.ElasticBudgetScheduler(
        echo.GlobalRank(2, CALIBRATION), budget=8, max_depth=2
    ),
    "two-level": echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), echo.SparseGate({1: 0.1}), 8, 2),
    "goodput": echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=COST, max_depth=2),
}
NONE = torch.empty(0, dtype=torch.int64)


def grown(scheduler, tree, depth=2):
    for _ in range(min(depth, scheduler.max_depth)):
        shape = *tree.frontier.token.shape, 2
        tree = scheduler.grow(
            tree, torch.tensor([1, 2]).expand(shape), torch.tensor([-0.2, -2.0]).expand(shape)
        )
    return tree


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [None, "forecast", 0, 5])
@pytest.mark.parametrize("name", POLICIES)
def test_zero_requests_are_a_step_of_pads(name, rows, backend):
    scheduler = POLICIES[name]
    with kernels.using(backend):
        history, stats = scheduler.history(4), echo.StepStats.empty()
        plan = scheduler.choose_tier(history, NONE)
        assert plan == scheduler.choose_tier(history, [])
        tree = grown(
            scheduler,
            scheduler.begin(
                NONE, num_verify_tokens=plan.num_verify_tokens if rows == "forecast" else rows
            ),
        )
        packed = scheduler.pack(tree)
        assert (
            packed.batch == 0
            and packed.num_rows == tree.num_verify_tokens
            and (packed.node == -1).all()
        )
        packed.validate()
        for given_ in (
            {"target_tokens": torch.zeros(packed.num_rows, dtype=torch.int64)},
            {"logits": torch.zeros(packed.num_rows, 9)},
        ):
            accepted = echo.accept(packed, **given_).truncate(
                eos_tokens=torch.tensor([2]), max_new_tokens=NONE
            )
            assert accepted.tokens.shape == (
                0,
                tree.depth + 1,
            ) and accepted.bonus.shape == accepted.cut_row.shape == (0,)
        assert echo.compact(packed, accepted, NONE).prefix_lens.shape == (0,)
        assert (
            echo.compact(
                packed,
                accepted,
                NONE,
                page_table=torch.empty(0, 3).int(),
                page_size=2,
                pad_slot_id=7,
            ).source.numel()
            == 0
        )
        after, counts = (
            history.observe(NONE, packed, accepted),
            stats.observe(packed, accepted).read(),
        )
        assert after.num_steps == 1 and not after.steps.any()
        assert counts == echo.stats.StepCounts(
            steps=1, layers=tree.depth, pad_tokens=packed.num_rows
        )
        assert len(echo.loop.warmup_log(tree, packed, accepted)) == 0
        buffer = packed.to_buffer()
        assert torch.equal(
            echo.PackedTree.from_buffer(
                buffer, batch=0, num_rows=packed.num_rows, words=2, max_depth=tree.depth
            ).to_buffer(),
            buffer,
        )


def test_no_prompts_are_no_steps():
    target = TabularTarget(table(5, seed=0))
    assert not list(
        echo.decode(POLICIES["eagle"], target, None, [], max_num_reqs=3, max_new_tokens=5)
    )
    step, history = echo.loop.speculate(
        POLICIES["goodput"], target, None, NONE, NONE, POLICIES["goodput"].history(3)
    )
    assert step.packed.num_rows == 0 and history.num_steps == 1


def test_idle_ranks_agree():
    scheduler = POLICIES["goodput"]
    history = scheduler.history(4)
    idle = scheduler.tier_curve(history, NONE)
    assert scheduler.agree_on_tier(np.stack([idle, idle]), 1) == echo.budget.Tier(0, 0)
    assert scheduler.agree_on_tier(
        np.stack([idle, scheduler.tier_curve(history, [], num_other_tokens=5)]), 0
    ) == echo.budget.Tier(0, 5)
    assert scheduler.agree_on_tier(
        np.stack([idle, scheduler.tier_curve(history, [], num_other_tokens=5)]), 1
    ) == echo.budget.Tier(0, 0)
    busy = scheduler.tier_curve(history, [0, 2])
    plans = [scheduler.agree_on_tier(np.stack([idle, busy]), rank) for rank in (0, 1)]
    assert plans[0] == plans[1] and plans[0].num_verify_tokens >= 2


costs = st.builds(
    lambda rows, seconds, tiers: echo.CostModel(
        tuple(sorted(rows)),
        tuple(np.cumsum(seconds[: len(rows)]).tolist()),
        draft_layer=0.05,
        tiers=tuple(sorted(tiers)),
    ),
    st.sets(st.integers(1, 90), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    st.sets(st.integers(1, 40), max_size=4),
)


@given(
    costs,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=3),
    st.integers(0, 12),
    st.integers(0, 4),
)
def test_a_tier_holds_every_live_request(cost, ranks, learnt, accepted):
    scheduler = replace(POLICIES["goodput"], budget=cost, probe_interval=3)
    history = scheduler.history(9)
    for _ in range(learnt):
        packed = scheduler.pack(
            grown(scheduler, scheduler.begin(torch.arange(9), num_verify_tokens=20))
        )
        one = echo.accept(packed, torch.full((packed.num_rows,), 9))
        history = history.observe(
            torch.arange(9),
            packed,
            replace(one, num_emitted=one.num_emitted * min(1 + accepted, 3), cut_row=None),
        )
    for policy in (scheduler, POLICIES["rank"], POLICIES["eagle"], POLICIES["plain"]):
        for batch, base in ranks:
            assert policy.choose_tier(history, list(range(batch)), base).num_verify_tokens >= batch
    curves = np.stack(
        [scheduler.tier_curve(history, np.arange(batch), base) for batch, base in ranks]
    )
    plans = [scheduler.agree_on_tier(curves, rank) for rank in range(len(ranks))]
    assert (
        len(
            {
                (plan.depth, plan.num_verify_tokens + base)
                for plan, (_, base) in zip(plans, ranks, strict=True)
            }
        )
        == 1
    )
    assert all(
        plan.num_verify_tokens >= batch for plan, (batch, _) in zip(plans, ranks, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("plain", "eagle")])
def test_empty_lanes_need_no_verify_token(name, backend):
    """Two of sixteen lanes are live: 8 verify tokens do, and the plan is that of the two alone."""
    scheduler, live = POLICIES[name], torch.zeros(16, dtype=torch.bool)
    live[[3, 9]] = True
    with kernels.using(backend):
        packed = scheduler.pack(
            grown(scheduler, scheduler.begin(torch.arange(16), live=live, num_verify_tokens=8))
        )
        alone = scheduler.pack(
            grown(scheduler, scheduler.begin(torch.tensor([3, 9]), num_verify_tokens=8))
        )
    assert torch.equal(packed.tokens, alone.tokens) and torch.equal(packed.parent, alone.parent)
    assert packed.indptr.diff()[live].tolist() == alone.indptr.diff().tolist()
    with pytest.raises(
        echo.EchoError,
        match="num_verify_tokens: expected at least one for each of 16 requests, got 8",
    ):
        scheduler.begin(torch.arange(16), num_verify_tokens=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 3, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_more_live_requests_than_verify_tokens_wait_and_are_counted(name, rows, backend):
    scheduler, live = POLICIES[name], torch.arange(12) != 1
    weights = {"request_weights": torch.ones(12)} if name == "two-level" else {}
    history = scheduler.history(12)
    with kernels.using(backend):
        tree = grown(
            scheduler,
            scheduler.begin(torch.arange(12), live=live, num_verify_tokens=rows, **weights),
        )
        packed = scheduler.pack(tree)
        packed.validate()
        served = live & (live.cumsum(0) <= rows)
        assert packed.indptr.diff().tolist() == served.long().tolist()
        accepted = echo.accept(packed, torch.full((rows,), 5))
        assert accepted.num_emitted.tolist() == served.long().tolist()
        assert (
            torch.where(accepted.num_emitted > 0, accepted.bonus, torch.arange(12)).tolist()
            == torch.where(served, 5, torch.arange(12)).tolist()
        )
        counts = echo.StepStats.empty().observe(packed, accepted).read()
        assert (counts.requests, counts.not_scheduled, counts.emitted_tokens, counts.no_output) == (
            rows,
            11 - rows,
            rows,
            0,
        )
        assert (
            echo.compact(packed, accepted, torch.arange(12)).prefix_lens.tolist()
            == (torch.arange(12) + served).tolist()
        )
        after = history.observe(torch.arange(12), packed, accepted)
        assert not (after.steps[:, :-1] > 0)[:, ~served].any()
    assert (packed.status[served] != echo.tree.Status.EMPTY).all() and packed.status[
        1
    ] == echo.tree.Status.EMPTY
    assert (packed.status[live & ~served] == echo.tree.Status.STARVED).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("there", [2, 13])
def test_a_workspace_has_lanes_that_need_no_verify_token(there, backend):
    """Verify tokens for half of its lanes: two live requests get what they get alone; of
    thirteen the first eight get one each.
    """
    scheduler, live = POLICIES["calibrated"], torch.arange(16) >= 16 - there
    with kernels.using(backend):
        space = echo.Workspace(scheduler, 16, k=2, num_verify_tokens=8)
        tree, alone = (
            space.begin(torch.arange(16), live=live),
            scheduler.begin(torch.arange(16), live=live, num_verify_tokens=8),
        )
        for depth in range(2):
            shape = 16, 1 if depth == 0 else 2, 2
            layer = torch.tensor([1, 2]).expand(shape), torch.tensor([-0.2, -2.0]).expand(shape)
            tree, alone = space.grow(tree, *layer), scheduler.grow(alone, *layer)
        packed, expected = space.pack(tree), scheduler.pack(alone)
        accepted = space.accept(packed, torch.full((8,), 5))
        space.observe(torch.arange(16), packed, accepted)
    for name in ("tokens", "parent", "indptr", "status"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name
    served = min(there, 8)
    assert accepted.num_emitted.tolist() == [0] * (16 - there) + [1] * served + [0] * (
        there - served
    )
    counts = space.stats.read()
    assert (counts.requests, counts.not_scheduled, counts.emitted_tokens) == (
        served,
        there - served,
        served,
    )


def test_backends_begin_with_the_same_roots():
    if "triton" not in BACKENDS:
        pytest.skip("needs Triton's interpreter")
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 7, 300):
        live = torch.rand(batch, generator=generator) < 0.7
        for rows in {0, 1, batch // 3, int(live.sum()), batch}:
            trees = []
            for backend in BACKENDS:
                with kernels.using(backend):
                    trees.append(
                        POLICIES["rank"].begin(
                            torch.arange(batch), live=live, num_verify_tokens=rows
                        )
                    )
            one, two = trees
            for name in ("status", "verify_limits", "num_committed", "num_remaining", "invalid"):
                assert torch.equal(getattr(one, name), getattr(two, name)), (batch, rows, name)
            assert torch.equal(one.score, two.score) and torch.equal(one.committed, two.committed)
            assert torch.equal(one.frontier.active, two.frontier.active)
            assert int(one.num_remaining) >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_lane_that_shares_a_request_index_changes_nothing(backend):
    scheduler, live = POLICIES["goodput"], torch.tensor([True, False, True, False])
    with kernels.using(backend):
        packed = scheduler.pack(
            grown(scheduler, scheduler.begin(torch.arange(4), live=live, num_verify_tokens=8))
        )
        accepted = echo.accept(packed, torch.ones(8, dtype=torch.int64))
        history = scheduler.history(3)
        for _ in range(3):
            history = history.observe(torch.tensor([0, 0, 2, 2]), packed, accepted)
        expected = scheduler.history(3)
        alone = scheduler.pack(
            grown(scheduler, scheduler.begin(torch.tensor([0, 2]), num_verify_tokens=8))
        )
        for _ in range(3):
            expected = expected.observe(
                torch.tensor([0, 2]), alone, echo.accept(alone, torch.ones(8, dtype=torch.int64))
            )
    for name in ("steps", "acceptance_histogram", "expected", "accepted", "num_unprocessed_tokens"):
        assert torch.equal(getattr(history, name), getattr(expected, name)), name


def chain():
    """Drafts 2, 40, 41 behind one root."""
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=COST, max_depth=3)
    tree = scheduler.begin(torch.tensor([7]), num_verify_tokens=4)
    for token in (2, 40, 41):
        tree = scheduler.grow(tree, torch.tensor([[[token]]]), torch.tensor([[[-0.1]]]))
    return scheduler, tree, scheduler.pack(tree)


@pytest.mark.parametrize(
    "ends", [{"eos_tokens": torch.tensor([9, 2])}, {"max_new_tokens": torch.tensor([1])}]
)
def test_what_lies_behind_the_end_of_an_answer_counts_nowhere(ends):
    scheduler, tree, packed = chain()
    accepted = echo.accept(packed, torch.tensor([2, 40, 41, 42])).truncate(**ends)
    assert accepted.tokens.tolist() == [[2, -1, -1, -1]] and accepted.rows.tolist() == [
        [0, -1, -1, -1]
    ]
    assert (accepted.num_emitted.tolist(), accepted.bonus.tolist(), accepted.cut_row.tolist()) == (
        [1],
        [2],
        [1],
    )
    counts = echo.StepStats.empty().observe(packed, accepted).read()
    assert (counts.emitted_tokens, counts.accepted_drafts, counts.no_output) == (1, 0, 0)
    log = echo.loop.warmup_log(tree, packed, accepted)
    assert (log.depth.tolist(), log.accepted.tolist()) == (
        [1],
        [True],
    )  # the draft of the last token was right
    history = scheduler.history(1).observe(torch.tensor([0]), packed, accepted)
    assert history.steps.T.tolist() == history.accepted.T.tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("tokens", "ends", "expected"),
    [
        ([2, 40, 41, 42], {}, ([2, 40, 41, 42], -1)),
        ([2, 40, 41, 42], {"max_new_tokens": 0}, ([], -1)),
        ([2, 40, 41, 42], {"max_new_tokens": -3}, ([], -1)),
        ([2, 40, 41, 42], {"max_new_tokens": 3}, ([2, 40, 41], 3)),
        ([2, 40, 41, 42], {"max_new_tokens": 4, "eos": [40]}, ([2, 40], 2)),
        (
            [2, 40, 41, 42],
            {"max_new_tokens": 9, "eos": [42]},
            ([2, 40, 41, 42], -1),
        ),  # the bonus token is the end
        ([2, 40, 8, 42], {"eos": [8, 99]}, ([2, 40, 8], -1)),
        ([2, 40, -1, 42], {"eos": [99]}, ([2, 40], 2)),  # cut by the walk
        ([2, 40, -1, 42], {"eos": [40]}, ([2, 40], 2)),  # by both
        ([2, 40, -1, 42], {"eos": [2]}, ([2], 1)),
        ([-1, 40, 41, 42], {"max_new_tokens": 2, "eos": [2]}, ([], -1)),
    ],
)
def test_where_an_answer_ends(tokens, ends, expected):
    _, _, packed = chain()
    limits = torch.tensor([ends["max_new_tokens"]]) if "max_new_tokens" in ends else None
    eos_tokens = torch.tensor(ends["eos"]) if "eos" in ends else None
    accepted = echo.accept(packed, torch.tensor(tokens)).truncate(
        eos_tokens=eos_tokens, max_new_tokens=limits
    )
    said, beyond = expected
    assert (
        accepted.tokens[0, : len(said)].tolist() == said
        and (accepted.tokens[0, len(said) :] == -1).all()
    )
    assert accepted.rows.tolist() == [[*range(len(said)), *[-1] * (4 - len(said))]]
    assert accepted.num_emitted.tolist() == [len(said)] and accepted.bonus.tolist() == [
        said[-1] if said else -1
    ]
    assert accepted.cut_row.tolist() == [beyond]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_that_discards_what_it_verified(backend):
    scheduler, tree, packed = chain()
    none = torch.full((1, 4), -1)
    accepted = echo.tree.Accepted(none, none, torch.tensor([0]), torch.tensor([-1]))
    counts = echo.StepStats.empty().observe(packed, accepted).read()
    assert (counts.accepted_drafts, counts.emitted_tokens, counts.no_output, counts.requests) == (
        0,
        0,
        1,
        1,
    )
    assert counts.tokens_per_step == 0.0
    with kernels.using(backend):
        history = scheduler.history(1).observe(torch.tensor([0]), packed, accepted)
    assert (
        not history.steps.any()
        and not history.acceptance_histogram.any()
        and not history.expected.any()
    )
    assert len(echo.loop.warmup_log(tree, packed, accepted)) == 0


def test_steps_of_decode_say_what_the_user_saw():
    law = table(30, seed=2, sharpness=3.0)
    target, drafter = TabularTarget(law), TabularDrafter(blurred(law, seed=4, noise=0.1), k=3)
    prompts, seen = [torch.tensor([t]) for t in range(12)], {}
    stats, texts = echo.StepStats.empty(), [[] for _ in prompts]
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=40, max_depth=4)
    ends = [int(law[int(law[t].argmax())].argmax()) for t in range(3)] + [
        int(law[4].argmax())
    ]  # some already by prefill
    for step in echo.decode(
        scheduler,
        target,
        drafter,
        prompts,
        max_num_reqs=4,
        max_new_tokens=[1 + t % 7 for t in range(12)],
        eos_token=ends,
    ):
        stats = stats.observe(step.packed, step.accepted)
        for b, (request, tokens) in enumerate(zip(step.requests, step.emitted, strict=True)):
            own = step.accepted.tokens[b, : int(step.accepted.num_emitted[b])].tolist()
            assert (
                list(tokens)[not texts[request] :] == own
                and (step.accepted.tokens[b, len(own) :] == -1).all()
            )
            assert (step.accepted.rows[b] >= 0).sum() == len(own)
            texts[request] += tokens
            seen[request] = seen.get(request, 0) + int(step.accepted.num_accepted_drafts[b])
        log = step.log()
        assert int(log.accepted.sum()) == int(step.accepted.num_accepted_drafts.sum())
    assert stats.read().emitted_tokens == sum(map(len, texts)) - len(prompts)
    assert stats.read().no_output > 0 and sum(seen.values()) > stats.read().accepted_drafts > 0
    assert all(not set(text[:-1]) & set(ends) for text in texts)
