"""A trimmed step launches the verify tokens that pay for the drafts that it has."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION, grow_all
from echo import kernels
from echo.budget import Tier, step
from echo.budget.throughput import FEW, WORTH
from echo.testing import (
    RefuseSyncs,
    TabularDrafter,
    TabularTarget,
    Trace,
    replay,
    table,
)
from test_scheduler import observed

DEAR = echo.CostModel((1, 4, 64), (1.0, 1.8, 9.0), draft_layer=0.01)
"""As a mixture of experts at one request: each row costs."""
OPTIMAL = echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, DEAR, beam=2, trims=True)
WEIGHTS = torch.tensor([1.0, 0.25, 0.5, 1.0])


def best_rows(scheduler, tree, tier, other=0):
    """The exact answer: every number of tokens is tried."""
    probability = scheduler.rule.acceptance_probability(tree)
    live = int(tree.layers[0].committed.sum())
    least, values = max(1, int(tree.num_committed.sum())), []
    for n in range(least, tree.num_verify_tokens + 1):
        left = min(int(tree.num_remaining), n - int(tree.num_committed.sum()))
        cut = replace(tree, num_verify_tokens=n, num_remaining=torch.tensor(left))
        accepts = float(probability[scheduler.select(cut)].double().sum())
        seconds = scheduler.budget(n + other, num_reqs=max(1, live))
        drafting = scheduler.budget.draft_seconds(tier.depth, max(1, live), tier.beam or 2)
        value = accepts / (seconds + drafting)
        values.append(accepts - tier.rate * seconds if tier.rate else value)
    return least, np.array(values)


def check(seed, batch, rate, other, ties):
    live = torch.arange(batch) != seed % 5
    begun = {"live": live, "num_verify_tokens": 24}
    shape = {"k": 3, "seed": seed, "spoil": 0.1, "ties": ties}
    tree, tier = grow_all(OPTIMAL, torch.arange(batch), **shape, **begun), Tier(3, 24, 2, rate)
    trimmed = OPTIMAL.trim(tree, tier, other)
    least, values = best_rows(OPTIMAL, tree, tier, other)
    n = trimmed.num_verify_tokens
    assert values[n - least] >= values.max() - 1e-5 * abs(values).max()
    packed, whole = OPTIMAL.pack(trimmed), OPTIMAL.pack(tree)
    assert packed.num_rows == n and packed.acceptance_histogram is not None
    nodes, all_nodes = (
        {pair for pair in zip(p.request.tolist(), p.node.tolist(), strict=True) if pair[0] < batch}
        for p in (packed, whole)
    )
    assert len(nodes) == int(packed.indptr[-1]) <= n and nodes <= all_nodes


@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 4),
    rate=st.sampled_from([0.0, 0.7, 1.5, 4.0]),
    other=st.sampled_from([0, 3]),
    ties=st.booleans(),
)
def test_no_other_number_of_tokens_is_worth_more(seed, batch, rate, other, ties):
    check(seed, batch, rate, other, ties)


def test_kernels_trim_alike():
    pytest.importorskip("triton")
    with kernels.using("triton"):
        check(7, 2, 1.5, 3, ties=True)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    "rule", [echo.GlobalRank(2), echo.TwoLevel(2, 3), echo.PerRequest(5, 2, CALIBRATION)]
)
def test_any_rule_is_trimmed_and_keeps_what_it_committed(rule, weights):
    scheduler = echo.ElasticBudgetScheduler(rule, None, DEAR, 3, trims=True)
    for seed in range(6):
        begun = {"num_verify_tokens": 24, "request_weights": weights}
        tree = grow_all(scheduler, torch.arange(4), k=3, seed=seed, **begun)
        for rate in (0.0, 9.0):
            trimmed = scheduler.trim(tree, Tier(3, 24, 2, rate))
            least = int(tree.num_committed.sum())
            assert least <= trimmed.num_verify_tokens <= 24
            selected = scheduler.select(trimmed)
            assert (selected | ~tree.committed).all() and (scheduler.select(tree) | ~selected).all()
            assert selected.sum() <= trimmed.num_verify_tokens
        assert trimmed.num_verify_tokens == least  # seconds are dearer than any draft


def test_a_trimmed_step_is_a_tier_and_other_tokens_fill_it():
    tiers = replace(DEAR, tiers=(2, 6, 12, 24, 40))
    scheduler = replace(OPTIMAL, budget=tiers)
    for seed in range(8):
        tree = grow_all(scheduler, torch.arange(2), k=3, seed=seed, num_verify_tokens=24)
        for other in (0, 4):
            n = scheduler.trim(tree, Tier(3, 24, 2, 1.0), other).num_verify_tokens
            assert n + other in tiers.tiers or n == 24


def test_the_bound_of_a_trimmed_step_is_a_tier_with_room_to_spare():
    tiers, ids = (2, 6, 12, 24, 40), torch.arange(2)
    cost = echo.CostModel((1, 4, 64), (1.0, 1.1, 6.0), tiers=tiers)
    scheduler = replace(OPTIMAL, budget=cost, max_depth=4, rule=echo.GlobalRank(3))
    history = scheduler.history(2)
    for seed in range(8):
        history = observed(scheduler, history, ids, depth=4, seed=seed, accepted=3)
    plain = replace(scheduler, trims=False).choose_tier(history, ids)
    tier = scheduler.choose_tier(history, ids)
    assert tier.depth and tier.rate > 0 and tier.num_verify_tokens in tiers
    assert plain.num_verify_tokens <= tier.num_verify_tokens <= tiers[-1]


def test_what_is_read_is_made_without_a_sync_and_small():
    tree = grow_all(OPTIMAL, torch.arange(4), k=3, seed=1, num_verify_tokens=24)
    with RefuseSyncs():
        gains = step.gains(OPTIMAL.rule, tree, 64)
    assert gains.dtype == torch.float32 and len(gains) <= 3 + 24
    assert gains[:3].tolist() == [4.0, 4.0, 4.0] and (gains[3:].diff() <= 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_workspace_trims_as_the_scheduler_does(backend):
    with kernels.using(backend):
        space = echo.Workspace(OPTIMAL, 4, k=3, num_verify_tokens=24)
        for seed in range(4 if backend == "torch" else 1):
            space.set_num_verify_tokens(20)
            alone = OPTIMAL.begin(torch.arange(4), num_verify_tokens=20)
            tree, generator = space.begin(torch.arange(4)), torch.Generator().manual_seed(seed)
            for _ in range(3):
                shape = (*tree.frontier.token.shape, 3)
                scores = torch.randn(shape, generator=generator).log_softmax(-1)
                tokens = torch.randint(0, 20, shape, generator=generator)
                tree, alone = space.grow(tree, tokens, scores), OPTIMAL.grow(alone, tokens, scores)
            tier = Tier(3, 20, 2, 4.0)
            trimmed, expected = space.trim(tree, tier), OPTIMAL.trim(alone, tier)
            assert trimmed.num_verify_tokens == expected.num_verify_tokens < 20
            assert trimmed.num_remaining.data_ptr() == tree.num_remaining.data_ptr()
            one, two = space.pack(trimmed), OPTIMAL.pack(expected)
            assert torch.equal(one.tokens, two.tokens) and torch.equal(one.mask, two.mask)


def drafted_while_deeper(scheduler, tier, seed, batch, **begun):
    """A step's tree, and of each layer the probability that a node of its frontier is accepted."""
    generator, found = torch.Generator().manual_seed(seed), []
    tree = scheduler.begin(torch.arange(batch), num_verify_tokens=24, **begun)
    while scheduler.deeper(tree, tier):
        shape = (*tree.frontier.token.shape, 3)
        scores = (2 * torch.randn(shape, generator=generator)).log_softmax(-1)
        tokens = torch.randint(0, 20, shape, generator=generator)
        tree = scheduler.grow(tree, tokens, scores, beam=tier.beam)
        probability = scheduler.rule.acceptance_probability(tree)
        nodes = probability.gather(1, sum(tree.sizes[:-1]) + tree.frontier.index)
        found.append(float(nodes[tree.frontier.active].double().sum()))
    return tree, found


@given(
    seed=st.integers(0, 99),
    rate=st.floats(0.05, 400.0),
    batch=st.integers(1, FEW),
    depth=st.integers(1, 3),
    beam=st.integers(1, 2),
    empty=st.integers(0, 1),
)
def test_another_layer_is_drafted_while_it_pays(seed, rate, batch, depth, beam, empty):
    cost = replace(DEAR, draft_layer=0.01, draft_token=0.002)
    live = torch.arange(batch) >= empty
    scheduler, tier = replace(OPTIMAL, budget=cost), Tier(depth, 24, beam, rate)
    tree, found = drafted_while_deeper(scheduler, tier, seed, batch, live=live)
    *pays, last = [WORTH * each > rate * (0.01 + 0.002 * batch * beam) for each in found]
    assert all(pays) and tree.depth <= min(depth + 1, scheduler.max_depth)
    assert not last or tree.depth == min(depth + 1, scheduler.max_depth)


@pytest.mark.parametrize(
    ("trims", "batch", "rate"),
    [(False, 1, 1e9), (True, FEW + 1, 1e9), (True, 1, 0.0)],  # 0: a probe, or nothing is known
)
def test_the_tier_says_how_deep_where_nothing_is_read(trims, batch, rate):
    scheduler = replace(OPTIMAL, trims=trims)
    with RefuseSyncs():
        tree = scheduler.begin(torch.arange(batch), num_verify_tokens=24)
        for depth in range(OPTIMAL.max_depth):
            asked = [scheduler.deeper(tree, Tier(d, 24, 2, rate)) for d in (0, depth, depth + 1)]
            assert asked == [False, False, True]
            scores = torch.zeros(*tree.frontier.token.shape, 3)
            tree = scheduler.grow(tree, scores.long(), scores - 2)


def test_a_probe_is_drafted_to_full_depth():
    scheduler, ids, probes = replace(OPTIMAL, probe_interval=10), torch.arange(1), 0
    history = scheduler.history(1)
    for seed in range(60):
        history = observed(scheduler, history, ids, depth=3, seed=seed, accepted=1)
        tier = scheduler.choose_tier(history, ids)
        if seed > 20 and history.num_steps % 10 == 0:
            tree, _ = drafted_while_deeper(scheduler, tier, seed, 1)
            assert tree.depth == tier.depth == scheduler.max_depth
            probes += 1
        elif seed > 20:
            assert tier.rate > 0
    assert probes == 4


@pytest.mark.filterwarnings("ignore:log")  # the drafter's floor leaves out deep layers
def test_trimmed_steps_write_more_tokens_a_second_where_rows_are_dear():
    """The shipped drafts; seconds as measured of Qwen3-235B's share at one request."""
    path = Path(__file__).parents[1] / "benchmarks" / "traces" / "smollm2.npz"
    trace, logs = Trace.load(path).texts(range(0, 64, 8)), []
    whole = echo.ElasticBudgetScheduler(echo.TwoLevel(4, 0), None, 1024, trace.depth)
    label = lambda r: logs.append(echo.loop.warmup_log(r.tree, r.packed, r.accepted))
    replay(trace, whole, DEAR, batch=16, observe=label)
    histograms = echo.gating.ConfidenceHistograms.of(echo.WarmupLog.concat(logs))
    seconds = 1.0, 1.33, 1.63, 1.79, 2.02, 2.25, 2.8, 3.3
    cost = echo.CostModel((1, 2, 3, 4, 6, 8, 16, 32), seconds, draft_layer=0.018)
    found = {}
    for trims in (False, True):
        make, rows = echo.ElasticBudgetScheduler.throughput_optimal, []
        scheduler = make(echo.calibrate(histograms), cost, trims=trims)
        see = lambda record, rows=rows: rows.append(record.packed.num_rows)
        found[trims] = replay(trace, scheduler, cost, batch=1, observe=see)
        assert sum(rows) == found[trims].verify_tokens + found[trims].padding
    assert found[True].tokens == found[False].tokens  # the same texts
    assert found[True].throughput > 1.02 * found[False].throughput


def test_ranks_that_agreed_on_a_depth_draft_it():
    """Each by its own drafts would hang where a layer is a collective of all."""
    history, curves = OPTIMAL.history(1), []
    for seed in range(40):
        history = observed(OPTIMAL, history, torch.arange(1), depth=3, seed=seed, accepted=1)
    alone = OPTIMAL.choose_tier(history, [0])
    curves = np.stack([OPTIMAL.tier_curve(history, [0])] * 2)
    for rank, score in enumerate((-0.01, -4.0)):
        tier = OPTIMAL.agree_on_tier(curves, rank)
        tree = OPTIMAL.begin(torch.arange(1), num_verify_tokens=tier.num_verify_tokens)
        while OPTIMAL.deeper(tree, tier):
            tokens = torch.zeros(*tree.frontier.token.shape, 1).long()
            tree = OPTIMAL.grow(tree, tokens, tokens + score, beam=tier.beam)
        assert tree.depth == tier.depth > 0 and alone.rate > 0


def test_decode_trims():
    own, prompts = table(30, seed=3, sharpness=2.5), [torch.tensor([i]) for i in range(4)]
    models = TabularTarget(own), TabularDrafter(own, k=3)
    found = []
    for trims in (False, True):
        limits = {"max_num_reqs": 1, "max_new_tokens": 24}
        steps = list(echo.decode(replace(OPTIMAL, trims=trims), *models, prompts, **limits))
        found.append([token for s in steps for token in s.emitted[0]])
        below = [s.packed.num_rows < s.tier.num_verify_tokens for s in steps if s.tier.depth]
        assert any(below) is trims
    assert found[0] == found[1]


def test_what_cannot_be_trimmed_is_named():
    tree = OPTIMAL.begin(torch.arange(2), num_verify_tokens=4)
    assert OPTIMAL.trim(tree, Tier(0, 4)) is tree
    with pytest.raises(echo.EchoError, match="budget: expected a CostModel"):
        replace(OPTIMAL, budget=8, trims=False).trim(tree, Tier(0, 4))
    with pytest.raises(echo.EchoError, match="trims: expected a CostModel as budget, got 8"):
        replace(OPTIMAL, budget=8)
    with pytest.raises(echo.EchoError, match="tier"):
        OPTIMAL.trim(tree, 4)
    with pytest.raises(echo.EchoError, match="num_other_tokens"):
        OPTIMAL.trim(tree, Tier(0, 4), -1)
    with pytest.raises(echo.EchoError, match="context_tokens"):
        OPTIMAL.trim(tree, Tier(0, 4), context_tokens=-1.0)


def test_a_trimmed_tier_stays_within_the_samples_of_its_context():
    tokens = np.array([4, 128, 512, 8, 32, 40] * 3)
    reqs = np.array([4, 4, 4, 8, 8, 8] * 3)
    context = reqs * np.tile([100, 100, 100, 8000, 8000, 8000], 3)
    seconds = 0.01 + 1e-6 * tokens + 1e-9 * context
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cost = echo.CostModel.from_samples(tokens, seconds, num_reqs=reqs, context_tokens=context)
    load = {"context_tokens": 8 * 8000.0}
    for trims in (False, True):
        scheduler = echo.ElasticBudgetScheduler(
            echo.GlobalRank(2), None, cost, max_depth=6, trims=trims
        )
        history = scheduler.history(8)
        for seed in range(12):
            history = observed(scheduler, history, torch.arange(8), depth=6, seed=seed, accepted=5)
        tier = scheduler.choose_tier(history, range(8), **load)
        assert tier.depth and not cost.extrapolated(tier.num_verify_tokens, num_reqs=8, **load)
        assert scheduler.choose_tier(history, [], context_tokens=0) == Tier(0, 0)
        assert scheduler.choose_tier(scheduler.history(1), [], context_tokens=0) == Tier(0, 0)


def test_a_workspace_trims_within_the_steps_tokens():
    cost = echo.CostModel((1, 4, 64), (1.0, 1.0, 1.0), tiers=(4, 8))  # all rows are free
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, cost, 1, trims=True)
    space = echo.Workspace(scheduler, 1, k=4, num_verify_tokens=8)
    space.set_num_verify_tokens(3)
    tokens = torch.arange(4)[None, None]
    log_probs = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    tree = space.grow(space.begin(torch.tensor([7])), tokens, log_probs)
    assert space.trim(tree, Tier(1, 3)).num_verify_tokens == 3
