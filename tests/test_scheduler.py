"""What every plan keeps, what each rule chooses, and what bad input says."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION, grow_all, policies
from echo.budget.throughput import ThroughputOptimal
from echo.lookup import blend
from echo.testing import Scenario, check_plan, check_step, scenarios
from echo.tree.supertree import path_score


def claims(rule):
    if isinstance(rule, echo.TwoLevel):
        return "ties", "permutation", "padding", "depth_first"
    own = "work_conserving" if rule.max_verify_tokens_per_req is None else "batch_invariant"
    return "ties", "permutation", "padding", own


@given(policies(), st.data())
def test_every_plan_keeps_the_invariants_and_what_its_rule_claims(policy, data):
    scheduler, batch = policy
    steps = scenarios.batches(
        max_batch=batch, max_depth=scheduler.max_depth, budget=scheduler.budget is not None
    )
    step = data.draw(steps)
    check_step(scheduler, step, claims=claims(scheduler.rule))
    tree = step.grow(scheduler)
    check_plan(tree, scheduler.pack(tree, num_verify_tokens=tree.num_verify_tokens + 7))


@given(policies(), st.integers(0, 10_000), st.booleans())
def test_tokens_remain_only_if_no_node_is_selectable(policy, seed, ties):
    scheduler, batch = policy
    tree = grow_all(scheduler, torch.arange(batch), k=3, seed=seed, ties=ties)
    selected = scheduler.select(tree)
    limits = tree.verify_limits - selected.sum(1)
    if isinstance(scheduler.rule, echo.TwoLevel):
        limits = torch.minimum(
            limits, scheduler.rule.max_extra_tokens - (selected & ~tree.forest.committed).sum(1)
        )
    elif scheduler.rule.max_verify_tokens_per_req is not None:
        limits = torch.minimum(limits, scheduler.rule.max_verify_tokens_per_req - selected.sum(1))
    selectable = (torch.isfinite(tree.forest.score) & ~selected).any(1) & (limits > 0)
    assert int(selected.sum()) == tree.num_verify_tokens or not selectable.any()
    assert (
        int(tree.num_remaining) == 0 or not (tree.status == echo.tree.Status.STARVED).any()
    )  # a passing request that found nothing left


@given(policies(), st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_permuting_requests_permutes_the_plan(policy, seed, random):
    scheduler, batch = policy
    turn = random.sample(range(batch), batch)
    log_probs = (
        1.5 * torch.randn(scheduler.max_depth, 40, 3, generator=torch.Generator().manual_seed(seed))
    ).log_softmax(-1)
    step = Scenario(
        torch.arange(batch),
        torch.ones(batch, dtype=torch.bool),
        torch.full((batch,), 64),
        log_probs,
    )
    plan, other = step.plan(scheduler), step.take(turn).plan(scheduler)
    drafted = plan.tree.forest.score[:, 1:]
    drafted = drafted[torch.isfinite(drafted)]
    assume(len(drafted.unique()) == len(drafted))  # ties go to the earlier request
    assert [other.paths(i) for i in range(batch)] == [plan.paths(b) for b in turn]


@functools.cache
def closed_subsets(parent: tuple[int, ...]) -> np.ndarray:
    """bool [S, T]: every choice of nodes that holds the root and the parent of each of its
    nodes."""
    nodes = len(parent)
    chosen = (np.arange(1 << nodes)[:, None] >> np.arange(nodes)) & 1 == 1
    return chosen[chosen[:, 0] & (~chosen | chosen[:, list(parent)]).all(axis=1)]


def best_value(value: np.ndarray, parent: list[list[int]], extra: int, limits: list[int]) -> float:
    """Brute force: the greatest value of ``extra`` nodes beyond the roots, over every closed choice
    within the limits of the requests."""
    total = np.full(extra + 1, -np.inf)
    total[0] = 0.0
    for b, up in enumerate(parent):
        chosen = closed_subsets(tuple(up))
        worth, count = (chosen * value[b]).sum(axis=1), chosen.sum(axis=1) - 1
        best = np.full(extra + 1, -np.inf)
        for n in range(min(extra, len(up) - 1) + 1):
            fits = count == n
            if fits.any() and n + 1 <= limits[b]:
                best[n] = worth[fits].max()
        total = np.array([(total[: n + 1] + best[n::-1]).max() for n in range(extra + 1)])
    return float(total.max())


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("weighting", ["alike", "weights"])
def test_global_rank_is_optimal_among_all_closed_subsets(calibrated, weighting):
    """Over every ancestor-closed choice of as many nodes, limits, weights and ties included: a
    thousand small forests in all."""
    reliability = CALIBRATION if calibrated else None
    for seed in range(170):
        rng = np.random.default_rng(seed)
        batch, extra, beam = (
            int(rng.integers(1, 4)),
            int(rng.integers(1, 10)),
            int(rng.integers(1, 3)),
        )
        limits = rng.integers(1, 9, batch)
        weights = (
            torch.tensor(rng.uniform(0.1, 3.0, batch), dtype=torch.float32)
            if weighting == "weights"
            else None
        )
        scheduler = echo.ElasticBudgetScheduler(
            echo.GlobalRank(beam, reliability), budget=batch + extra, max_depth=2
        )
        tree = grow_all(
            scheduler,
            torch.arange(batch),
            k=3,
            seed=seed,
            ties=bool(seed % 2),
            verify_limits=torch.from_numpy(limits),
            request_weights=weights,
        )
        value = scheduler.rule.acceptance_probability(tree).double().numpy() * (
            1 if weights is None else weights.double().numpy()[:, None]
        )
        value[:, 0] = 0
        value[~torch.isfinite(tree.forest.score).numpy()] = -np.inf
        expected = best_value(
            np.where(np.isfinite(value), value, -1e9),
            tree.forest.parent.tolist(),
            extra,
            limits.tolist(),
        )
        selected = scheduler.select(tree).numpy()
        assert (selected.sum(axis=1) <= limits).all()
        assert selected.sum() <= batch + extra
        assert (np.where(selected, value, 0)).sum() == pytest.approx(
            expected, abs=2e-6 if weights is not None else 1e-9
        )


def test_weights_move_tokens_to_the_better_service():
    for rule in (echo.TwoLevel(1, 8), echo.GlobalRank(1)):
        scheduler = echo.ElasticBudgetScheduler(rule, budget=4, max_depth=2)
        drafts = [0.8, 0.8], [0.6, 0.9]
        assert (
            scheduler.pack(chains(scheduler, *drafts)).indptr.tolist() == [0, 3, 4]
            if rule == echo.GlobalRank(1)
            else True
        )
        weighed = scheduler.pack(
            chains(scheduler, *drafts, request_weights=torch.tensor([1.0, 2.0]))
        )
        # twice 0.6 and twice 0.54 beat 0.8; level by level request 1 is first too, and its second
        # layer comes before none of request 0's
        assert weighed.indptr.tolist() == ([0, 1, 4] if rule == echo.GlobalRank(1) else [0, 2, 4])


def chains(scheduler, *probabilities, **weighting):
    """A tree of chains: each request's draft gives one candidate a layer with these conditional
    probabilities."""
    tree = scheduler.begin(torch.arange(len(probabilities)), **weighting)
    for depth in range(scheduler.max_depth):
        p = torch.tensor([request[depth] for request in probabilities])
        tree = scheduler.grow(tree, torch.full((len(p), 1, 1), 10 + depth), p.log()[:, None, None])
    return tree


def test_budget_moves_from_the_doubtful_to_the_confident():
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(1, 8), echo.SparseGate({1: 0.5}), budget=6, max_depth=4
    )
    tree = chains(scheduler, [0.9, 0.9, 0.9, 0.9], [0.3, 0.9, 0.9, 0.9])
    packed = scheduler.pack(tree)
    # 6 tokens = 2 roots + request 0's four layers; request 1 fails the root gate (0.3 <= 0.5) and
    # keeps its root
    assert packed.indptr.tolist() == [0, 5, 6]
    assert packed.depth.tolist() == [0, 1, 2, 3, 4, 0]
    assert packed.status.tolist() == [echo.tree.Status.FINISHED, echo.tree.Status.TRUNCATED]


def test_remaining_tokens_widen_a_lone_request():
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(1, 8), echo.SparseGate({2: 0.5}), budget=6, max_depth=2
    )
    tree = scheduler.begin(torch.tensor([7]))
    tree = scheduler.grow(
        tree, torch.tensor([[[1, 2, 3]]]), torch.tensor([[[0.6, 0.3, 0.1]]]).log()
    )
    tree = scheduler.grow(
        tree, torch.tensor([[[4, 5, 6]]]), torch.tensor([[[0.7, 0.2, 0.1]]]).log()
    )
    packed = scheduler.pack(tree)
    # depth 1 commits token 1 (0.6); depth 2 has confidence 0.42 <= 0.5: truncated. 4 of 6 remain: 4
    # (0.42), 2 (0.3), 5 (0.12), 3 (0.1)
    assert packed.tokens.tolist() == [7, 1, 2, 3, 4, 5]
    assert packed.parent.tolist() == [-1, 0, 0, 0, 1, 1]
    assert packed.status.tolist() == [echo.tree.Status.TRUNCATED]


def test_confident_requests_commit_first_and_the_last_gets_a_part():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 8), budget=3 + 3, max_depth=2)
    tree = scheduler.begin(torch.tensor([7, 8, 9]))
    p = torch.tensor([[[0.5, 0.4]], [[0.8, 0.1]], [[0.7, 0.2]]])
    tree = scheduler.grow(tree, torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]]), p.log())
    # 3 tokens beyond the roots: request 1 (0.8) commits two, request 2 (0.7) one, request 0 (0.5)
    # passes and finds none
    assert tree.layers[1].committed.tolist() == [[False, False], [True, True], [True, False]]
    assert tree.status.tolist() == [
        echo.tree.Status.STARVED,
        echo.tree.Status.ACTIVE,
        echo.tree.Status.ACTIVE,
    ]
    assert tree.frontier.active.tolist() == [[False, False], [True, True], [True, False]]


def test_first_layer_is_not_committed_by_request_index():
    """The paper's pseudo-code gave the first 64 of 256 requests everything; committing after
    scoring goes by confidence."""
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(4, 4), budget=512, max_depth=1)
    generator = torch.Generator().manual_seed(1)
    tree = scheduler.begin(torch.arange(256))
    log_probs = torch.randn(256, 1, 4, generator=generator).log_softmax(-1)
    tree = scheduler.grow(tree, torch.randint(0, 9, (256, 1, 4), generator=generator), log_probs)
    committing = tree.layers[1].committed.any(1)
    confidence = tree.layers[1].log_confidence
    assert int(committing.sum()) == 64
    assert confidence[committing].min() >= confidence[~committing].max()


def test_per_request_is_eagle_rerank():
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=2, max_depth=2)
    tree = grow_all(scheduler, torch.arange(3), k=3, seed=5)
    selected = scheduler.select(tree)
    for b in range(3):
        ranked = tree.forest.score[b].sort(descending=True).indices[:4].tolist()
        assert sorted(ranked) == selected[b].nonzero()[:, 0].tolist()


def test_calibrated_rank_never_rises_along_a_path():
    rule = echo.GlobalRank(3, CALIBRATION)
    scheduler = echo.ElasticBudgetScheduler(rule, budget=20, max_depth=3)
    tree = grow_all(scheduler, torch.arange(2), k=3, seed=2)
    cost = rule.cost(tree)
    assert (cost >= cost.gather(1, tree.forest.parent)).all()
    check_plan(tree, scheduler.pack(tree))


@pytest.mark.parametrize("name", ["probabilities", "logits"])
def test_what_is_no_log_probability_is_counted_and_never_selected(name):
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=6, max_depth=1)
    q = torch.tensor([0.02, 0.03, 0.05, 0.9])
    wrong = {"probabilities": q, "logits": q.log() + 10}[name]
    tree = scheduler.grow(
        scheduler.begin(torch.tensor([7, 8])),
        torch.arange(8).view(2, 1, 4),
        torch.stack([q.log(), wrong])[:, None],
    )
    packed = scheduler.pack(tree)
    assert packed.invalid.tolist() == [0, 4]
    assert packed.indptr.tolist() == [0, 5, 6] and packed.status[1] == echo.tree.Status.EXHAUSTED
    arrays = (
        torch.tensor([[7, 1, 2, 3, 4]]),
        torch.tensor([[-1, 0, 0, 0, 0]]),
        torch.cat([torch.zeros(1), wrong])[None],
    )
    hint = {
        "probabilities": r"probabilities\? take their logarithm",
        "logits": r"logits\? take their log-softmax",
    }[name]
    with pytest.raises(
        echo.EchoError,
        match=rf"log_prob: request 0, row 1: expected a log-probability, got .* \({hint}\)",
    ):
        echo.SuperTree.from_arrays(*arrays)
    score = packed.score.clone()
    score[1:5] = wrong
    with pytest.raises(
        echo.EchoError,
        match=rf"score: request 0, row 1: expected at most its parent's 0.0, got .* \({hint}\)",
    ):
        replace(packed, score=score).validate()


@given(
    st.lists(st.floats(-60, 60), min_size=3, max_size=6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_rounding_above_zero_is_no_fault(logits, dtype):
    """A log-softmax by subtraction, in float32 or float16, and the logarithm of rounded
    probabilities."""
    x = torch.tensor(logits)
    own = x.bfloat16() if dtype == torch.bfloat16 else x.to(dtype)
    total = own.float().logsumexp(-1)
    found = (
        own.float().sub(total).exp().bfloat16().mul(1 + 2.0**-7).log()
        if dtype == torch.bfloat16
        else own - total.to(dtype)
    )
    assert (
        int(
            path_score(torch.zeros(1, 1), found.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool))[
                2
            ]
        )
        == 0
    )


def test_gradients_are_left_behind():
    scheduler, drawn = (
        echo.ElasticBudgetScheduler.throughput_optimal(
            CALIBRATION, echo.CostModel((1, 9), (1.0, 2.0)), beam=2
        ),
        torch.randn(3, 3, 2),
    )

    def step(raw, probability):
        log_probs = raw.log_softmax(-1)
        tree = scheduler.begin(
            torch.arange(3), num_verify_tokens=9, request_weights=probability[:, 0]
        )
        tree = scheduler.grow_positions(tree, torch.arange(18).view(3, 3, 2), log_probs)
        packed = scheduler.pack(tree)
        accepted = echo.accept(
            packed,
            logits=torch.cat([raw.flatten(), raw.flatten()])[: packed.num_rows, None]
            * torch.arange(4.0),
        )
        history = scheduler.history(3).observe(torch.arange(3), packed, accepted)
        logged = echo.loop.warmup_log(tree, packed, accepted, weights=probability)
        columns = (
            packed.depth,
            packed.score,
            packed.committed,
            packed.node,
            probability[:, 0].repeat(3),
        )
        counted = echo.gating.ConfidenceHistograms.empty(3).live().update(*columns)
        blended = blend(
            torch.zeros(3, 3, 2).long(), log_probs, torch.ones(3, 3).long(), probability[:, :3] / 4
        )
        ready = echo.SuperTree.from_arrays(
            torch.arange(3)[None], torch.arange(-1, 2)[None], log_probs[:1, :, 0].clamp(max=0)
        )
        found = [
            value for part in (packed, accepted, history, counted) for value in vars(part).values()
        ]
        found += [*blended, ready.score, tree.request_weights]
        return [x for x in found if isinstance(x, torch.Tensor)] + [torch.from_numpy(logged.weight)]

    kept = step(drawn.clone().requires_grad_(), torch.full((3, 4), 2.0, requires_grad=True))
    plain = step(drawn, torch.full((3, 4), 2.0))
    assert not any(x.requires_grad for x in kept)
    assert all(torch.equal(one, two) for one, two in zip(kept, plain, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_their_requests_own(bad):
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=6, max_depth=1)
    first = torch.arange(6).view(3, 2), torch.tensor([[0.5, 0.4]]).log().expand(3, -1)
    packed = scheduler.pack(
        scheduler.begin(
            torch.arange(3), request_weights=torch.tensor([1.0, bad, 4.0]), first_layer=first
        )
    )
    assert packed.indptr.diff().tolist() == [2, 1, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_faulty_scores_are_counted_and_touch_no_other_request(bad):
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=8, max_depth=1)
    roots, tokens = torch.tensor([1, 2]), torch.arange(6).view(2, 1, 3)
    clean = torch.tensor([[[0.5, 0.3, 0.2]], [[0.6, 0.3, 0.1]]]).log()
    dirty = clean.clone()
    dirty[1] = bad
    tree = scheduler.grow(scheduler.begin(roots), tokens, dirty)
    packed = scheduler.pack(tree)
    assert packed.invalid.tolist() == [0, 3]
    assert packed.indptr.tolist() == [0, 4, 5]  # request 1 keeps its root alone
    assert packed.status.tolist() == [echo.tree.Status.FINISHED, echo.tree.Status.EXHAUSTED]
    alone = scheduler.pack(scheduler.grow(scheduler.begin(roots[:1]), tokens[:1], clean[:1]))
    assert packed.tokens[:4].tolist() == alone.tokens[:4].tolist()


def test_capacity_of_one_is_an_opt_out_and_an_empty_slot_costs_nothing():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=9, max_depth=2)
    tree = grow_all(
        scheduler,
        torch.arange(3),
        k=2,
        seed=0,
        live=torch.tensor([True, False, True]),
        verify_limits=torch.tensor([1, 64, 64]),
    )
    packed = scheduler.pack(tree)
    assert packed.indptr.diff().tolist()[:2] == [1, 0]
    assert packed.status.tolist()[:2] == [echo.tree.Status.EXHAUSTED, echo.tree.Status.EMPTY]


def test_no_tier_speculates_where_the_budget_leaves_nothing():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=16, max_depth=4)
    history = scheduler.history(32)
    assert scheduler.choose_tier(history, torch.arange(4)) == echo.budget.Tier(4, 16)
    assert scheduler.choose_tier(history, torch.arange(4), num_other_tokens=10) == echo.budget.Tier(
        4, 6
    )
    assert scheduler.choose_tier(history, torch.arange(16)) == echo.budget.Tier(0, 16)
    assert scheduler.choose_tier(history, torch.arange(32)) == echo.budget.Tier(0, 32)


COST = echo.CostModel((1, 32, 256), (1.0, 1.0, 8.0), draft_layer=0.02)


def observed(scheduler, history, req_indices, *, depth, seed, accepted=2):
    """One step of random drafts for ``req_indices``, of which the first ``accepted`` of each
    request's best path are accepted."""
    batch = len(req_indices)
    tree = scheduler.begin(torch.arange(batch), num_verify_tokens=8 * batch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(depth):
        shape = (*tree.frontier.token.shape, 3)
        tree = scheduler.grow(
            tree,
            torch.arange(3).expand(shape),
            (2 * torch.randn(shape, generator=generator)).log_softmax(-1),
        )
    packed = scheduler.pack(tree)
    lengths = torch.full((batch,), 1 + min(accepted, depth))
    return history.observe(
        req_indices,
        packed,
        replace(echo.accept(packed, torch.full((packed.num_rows,), -1)), num_emitted=lengths),
    )


OPTIMAL = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, COST, 4)


def test_history_is_a_value_and_forgets_on_reset():
    empty, req_indices = OPTIMAL.history(5), torch.tensor([4, 1])
    after = observed(OPTIMAL, empty, req_indices, depth=2, seed=0)
    assert not empty.steps.any() and not empty.acceptance_histogram.any() and empty.num_steps == 0
    assert after.num_steps == 1
    assert (
        after.steps[:2].tolist() == [[0, 1, 0, 0, 1, 2]] * 2
    )  # own steps at each depth, then those of all requests
    assert after.accepted[:2].tolist() == [[0, 1, 0, 0, 1, 2]] * 2
    assert not after.steps[2:].any()  # deeper layers were not drafted, and no request had stopped
    again = after.reset(torch.tensor([4]))
    assert again.steps[0].tolist() == [0, 1, 0, 0, 0, 2]
    assert again.generation.tolist() == [0, 0, 0, 0, 1]
    # a lagged copy: what it knows of an index that has another request by now is not of that
    # request
    lagged = after.without_stale(again.generation)
    assert torch.equal(lagged.steps, again.steps) and torch.equal(
        lagged.acceptance_histogram, again.acceptance_histogram
    )
    assert torch.equal(
        after.without_stale(after.generation).acceptance_histogram, after.acceptance_histogram
    )
    assert after.to("meta").acceptance_histogram.is_meta and after.to("meta").num_steps == 1


def test_a_request_that_stopped_drafting_has_no_deeper_layer():
    tree = OPTIMAL.begin(torch.arange(2))
    log_probs = torch.tensor([[[-0.1, -3.0, -4.0]], [[-torch.inf, -torch.inf, -torch.inf]]])
    packed = OPTIMAL.pack(OPTIMAL.grow(tree, torch.arange(3).expand(2, 1, 3), log_probs))
    after = OPTIMAL.history(2).observe(
        torch.arange(2), packed, echo.accept(packed, torch.full((packed.num_rows,), 9))
    )
    assert after.steps.T.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [2, 1, 1, 1]]


def test_what_is_observed_of_a_request_fades_towards_the_mean_of_all():
    history = OPTIMAL.history(4)
    for seed in range(20):
        history = observed(OPTIMAL, history, torch.tensor([0]), depth=4, seed=seed, accepted=0)
        history = observed(OPTIMAL, history, torch.tensor([1, 2]), depth=4, seed=seed, accepted=3)
    doubtful, good, fresh = (
        float(history.predict(torch.tensor([index]))[1].max()) for index in (0, 1, 3)
    )
    assert doubtful < fresh < good
    plain = OPTIMAL.pack(OPTIMAL.begin(torch.arange(1)))
    off, one = history, echo.accept(plain, torch.full((plain.num_rows,), 9))
    for _ in range(100):
        off = off.observe(torch.tensor([0]), plain, one)
    assert float(off.predict(torch.tensor([0]))[1].max()) == pytest.approx(fresh, rel=0.05)


def test_a_prediction_is_the_shrunk_sum_over_requests_layers_and_likelier_bins():
    history = OPTIMAL.history(5)
    for seed in range(12):
        history = observed(
            OPTIMAL,
            history,
            torch.tensor([0, 3, seed % 2 + 1]),
            depth=2 + 2 * (seed % 3 > 0),
            seed=seed,
            accepted=seed % 4,
        )
    req_indices = torch.tensor([4, 1, 0])
    drafts, accepts = history.predict(req_indices)
    steps, expected, accepted, histogram = (
        x.double()
        for x in (history.steps, history.expected, history.accepted, history.acceptance_histogram)
    )
    mean = histogram[:, -1] / steps[:, -1:]
    ratio = (accepted[:, -1] + 1) / (expected[:, -1] + 1)
    for depth in range(4):
        for bins in range(33):
            sums = [0.0, 0.0]
            for d, index, b in itertools.product(
                range(depth + 1), req_indices.tolist(), range(32 - bins, 32)
            ):
                nodes = (histogram[d, index, b] + 2 * mean[d, b]) / (steps[d, index] + 2)
                scale = min(
                    float((accepted[d, index] + 4 * ratio[d]) / (expected[d, index] + 4)), 2.0
                )
                sums[0] += float(nodes)
                sums[1] += float(nodes) * scale * ((b + 2.5) / 34) ** 2
            assert [drafts[depth, bins], accepts[depth, bins]] == pytest.approx(
                sums, rel=1e-5, abs=1e-6
            )
    assert (np.diff(drafts) >= 0).all() and (np.diff(accepts) >= 0).all()


def test_a_tier_expands_a_node_for_every_four_tokens_and_no_more_than_the_rule():
    cost = echo.CostModel((1, 64, 256), (1.0, 1.0, 1.4), draft_token=0.01)
    wide = replace(OPTIMAL, budget=cost, rule=echo.GlobalRank(3))
    for batch in (1, 2, 4, 8, 16):
        history, req_indices = wide.history(batch), torch.arange(batch)
        for seed in range(6):
            history = observed(wide, history, req_indices, depth=4, seed=seed, accepted=2)
        tier = wide.choose_tier(history, req_indices)
        assert tier.depth > 0
        assert tier.beam == min(3, -(-tier.num_verify_tokens // (4 * batch)))


@given(st.integers(1, 3), st.integers(0, 99))
def test_a_narrower_beam_grows_what_a_narrower_rule_grows(beam, seed):
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = (
        echo.ElasticBudgetScheduler(echo.GlobalRank(n), budget=12, max_depth=3) for n in (3, beam)
    )
    trees = [scheduler.begin(torch.arange(2)) for scheduler in (wide, narrow)]
    for _ in range(3):
        shape = *trees[0].frontier.token.shape, 4
        tokens = torch.randint(99, shape, generator=generator)
        log_probs = -torch.rand(shape, generator=generator)
        trees = [
            wide.grow(trees[0], tokens, log_probs, beam=beam),
            narrow.grow(trees[1], tokens, log_probs),
        ]
        assert trees[0].frontier.index.equal(trees[1].frontier.index)
    assert wide.pack(trees[0]).tokens.equal(narrow.pack(trees[1]).tokens)
    with pytest.raises(echo.EchoError, match=r"beam: expected an int .* got 4"):
        wide.grow(wide.begin(torch.arange(1)), tokens[:1, :1], log_probs[:1, :1], beam=4)


def test_tier_of_a_cost_model():
    req_indices = torch.arange(4)
    history = OPTIMAL.history(4)
    assert OPTIMAL.choose_tier(history, req_indices) == echo.budget.Tier(
        4, 32, beam=2
    )  # nothing known: the deepest tree, at the knee
    assert OPTIMAL.choose_tier(history, req_indices[:0]) == echo.budget.Tier(0, 0)
    good = bad = history
    for seed in range(6):
        good, bad = (
            observed(OPTIMAL, h, req_indices, depth=4, seed=seed, accepted=n)
            for h, n in ((good, 4), (bad, 0))
        )
    # tokens up to the knee cost nothing
    assert 32 <= OPTIMAL.choose_tier(good, req_indices).num_verify_tokens < 36
    assert OPTIMAL.choose_tier(good, req_indices).depth >= 3
    assert (
        12 <= OPTIMAL.choose_tier(good, req_indices, num_other_tokens=20).num_verify_tokens < 32
    )  # prefill takes of the flat part
    assert OPTIMAL.choose_tier(
        replace(bad, num_steps=1), req_indices, num_other_tokens=200
    ) == echo.budget.Tier(0, 4)
    assert (
        OPTIMAL.choose_tier(replace(bad, num_steps=100), req_indices, num_other_tokens=200).depth
        > 0
    )  # a probe
    plans = [
        OPTIMAL.choose_tier(replace(bad, num_steps=n), req_indices, num_other_tokens=200).depth
        for n in range(1000)
    ]
    assert sum(depth > 0 for depth in plans) == 10


def test_draft_extend_is_of_the_requests_that_are_still_there():
    history, req_indices = OPTIMAL.history(5), torch.tensor([3, 0])
    for seed in range(2):
        history = observed(OPTIMAL, history, req_indices, depth=4, seed=seed, accepted=2)
    assert not history.num_unprocessed_tokens.any() and history.num_idle_steps == 0
    plain = OPTIMAL.pack(OPTIMAL.begin(torch.arange(2)))
    one = echo.accept(plain, torch.full((plain.num_rows,), 9))
    for _ in range(3):
        history = history.observe(req_indices, plain, one)
    assert (history.num_unprocessed_tokens.tolist(), history.num_idle_steps) == ([3, 0, 0, 3, 0], 3)
    fresh = history.reset(torch.tensor([3]))
    assert fresh.num_unprocessed_tokens.tolist() == [3, 0, 0, 0, 0]
    assert torch.equal(
        history.without_stale(fresh.generation).num_unprocessed_tokens, fresh.num_unprocessed_tokens
    )
    assert (
        observed(OPTIMAL, fresh, req_indices, depth=1, seed=0).num_unprocessed_tokens.tolist()
        == [0] * 5
    )


def test_a_probe_waits_until_draft_extend_is_cheap_beside_the_time_off():
    """Draft extend of 4 * 60 tokens costs 0.02 + 0.48 s; a step of 204 tokens takes 6.4 s, and 0.5%
    of 16 of them is as much."""
    scheduler = replace(OPTIMAL, budget=replace(COST, extend_token=0.002), probe_interval=10)
    history, req_indices = scheduler.history(4), torch.arange(4)
    for seed in range(6):
        history = observed(scheduler, history, req_indices, depth=4, seed=seed, accepted=0)
    off = replace(history, num_steps=1, num_unprocessed_tokens=torch.full((4,), 60))
    plans = {
        idle: scheduler.choose_tier(
            replace(off, num_idle_steps=idle), req_indices, num_other_tokens=200
        ).depth
        for idle in range(1, 400)
    }
    assert 0.5 / (0.005 * COST(204)) == pytest.approx(15.6, abs=0.1)
    assert [idle for idle, depth in plans.items() if depth] == list(range(20, 400, 10))
    costly = replace(
        scheduler, budget=replace(COST, extend_token=10.0)
    )  # it comes back all the same
    assert [
        idle
        for idle in range(1, 400)
        if costly.choose_tier(
            replace(off, num_idle_steps=idle), req_indices, num_other_tokens=200
        ).depth
    ] == [160, 320]
    free = replace(scheduler, budget=COST)  # draft extend costs nothing
    assert [
        idle
        for idle in range(1, 40)
        if free.choose_tier(
            replace(off, num_idle_steps=idle), req_indices, num_other_tokens=200
        ).depth
    ] == [10, 20, 30]


def test_rounding_costs_no_token():
    """The order of requests changes the last digits of a sum; the tokens to verify must not
    change."""
    optimal = OPTIMAL._throughput_optimal
    drafted, accepted = (
        np.array([[0.0, 40.0]] * 4, np.float32),
        np.array([[0.0, 39.0]] * 4, np.float32),
    )
    plans = {
        optimal._best(drafted * np.float32(1 + noise), accepted, 4, 4, 4, 1, 0, 0)[:2]
        for noise in (-4e-7, 0.0, 4e-7)
    }
    assert plans == {(1, 44)}


@pytest.mark.parametrize("other", [0, 5, 30])
def test_a_choice_fills_a_tier(other):
    tiers = (4, 16, 48, 200, 256)
    scheduler = replace(OPTIMAL, budget=replace(COST, tiers=tiers))
    req_indices, history = torch.arange(4), scheduler.history(4)
    plans = [scheduler.choose_tier(history, req_indices, other)]
    for seed in range(8):
        history = observed(scheduler, history, req_indices, depth=4, seed=seed, accepted=4)
        plans.append(scheduler.choose_tier(history, req_indices, other))
    assert plans[-1].depth > 0
    assert all(plan.num_verify_tokens + other in tiers for plan in plans if plan.depth)


def test_where_context_costs_most_drafts_are_nearly_free():
    """Reading a long context dwarfs what more tokens cost; one rank or several see it alike."""
    steep = echo.CostModel((1, 256), (1.0, 60.0), draft_layer=0.02, context_token=1e-4)
    scheduler, req_indices = replace(OPTIMAL, budget=steep, max_depth=3), torch.arange(4)
    history = scheduler.history(4)
    for seed in range(6):
        history = observed(scheduler, history, req_indices, depth=3, seed=seed, accepted=3)
    history = replace(history, num_steps=1)
    tokens = {}
    for context in (None, 0.0, 1e6):
        tier = scheduler.choose_tier(history, req_indices, context_tokens=context)
        curve = scheduler.tier_curve(history, req_indices, context_tokens=context)
        agreed = scheduler.agree_on_tier(np.stack([curve, curve]), 0)
        tokens[context] = tier.num_verify_tokens, agreed.num_verify_tokens
    assert tokens[None] == tokens[0.0]  # this model was not measured at any context
    assert all(long > 2 * short for short, long in zip(tokens[0.0], tokens[1e6], strict=True))
    with pytest.raises(echo.EchoError, match=r"context_tokens: expected a number >= 0\.0, got -1"):
        scheduler.choose_tier(history, req_indices, context_tokens=-1)


def test_ranks_agree_on_what_is_best_for_all():
    req_indices, history = torch.arange(4), OPTIMAL.history(4)
    for seed in range(6):
        history = observed(OPTIMAL, history, req_indices, depth=4, seed=seed, accepted=3)
    history = replace(history, num_steps=1)
    base = [0, 9, 40, 0]
    curves = np.stack(
        [
            OPTIMAL.tier_curve(history, req_indices[: 4 * (rank < 3)], rows)
            for rank, rows in enumerate(base)
        ]
    )
    assert curves.nbytes <= 4 * 1024
    plans = [OPTIMAL.agree_on_tier(curves, rank) for rank in range(4)]
    assert len({plan.depth for plan in plans}) == 1
    assert {plan.num_verify_tokens + rows for plan, rows in zip(plans, base, strict=True)} == {
        plans[0].num_verify_tokens
    }  # one shape, prefill included
    alone = OPTIMAL.agree_on_tier(curves[:1], 0)
    assert alone.depth > 0
    assert alone.num_verify_tokens == pytest.approx(
        OPTIMAL.choose_tier(history, req_indices).num_verify_tokens, rel=0.1
    )
    idle = np.stack([OPTIMAL.tier_curve(history, req_indices[:0])] * 2)
    assert OPTIMAL.agree_on_tier(idle, 1) == echo.budget.Tier(0, 0)
    with pytest.raises(
        echo.EchoError, match=r"curves: expected float32 \[ranks, \d+\], got \[2, 5\]"
    ):
        OPTIMAL.agree_on_tier(idle[:, :5], 0)
    with pytest.raises(
        echo.EchoError, match=r"history: expected one on cpu \(see History.to\), got one on meta"
    ):
        OPTIMAL.choose_tier(history.to("meta"), req_indices)
    with pytest.raises(echo.EchoError, match="budget: expected a CostModel"):
        SCHEDULER.tier_curve(history, req_indices)


SCHEDULER = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=8, max_depth=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SCHEDULER.begin(torch.arange(9)),
            r"num_verify_tokens: expected at least one for each of 9 requests, got 8",
        ),
        (
            lambda: SCHEDULER.begin(torch.arange(2), num_verify_tokens=0),
            r"num_verify_tokens: expected at least one for each of 2 requests, got 0",
        ),
        (
            lambda: SCHEDULER.begin(torch.arange(2), num_verify_tokens=-1),
            r"num_verify_tokens: expected an int >= 0, got -1",
        ),
        (
            lambda: SCHEDULER.begin(torch.zeros(2)),
            r"root_tokens: expected int64 \[B\], got float32 \[2\]",
        ),
        (lambda: SCHEDULER.begin([1, 2]), r"root_tokens: expected a tensor int64 \[B\], got list"),
        (
            lambda: SCHEDULER.begin(torch.arange(2), live=torch.ones(3, dtype=torch.bool)),
            r"live: expected bool \[2\], got bool \[3\]",
        ),
        (
            lambda: SCHEDULER.begin(torch.arange(2), verify_limits=torch.ones(2)),
            r"verify_limits: expected int64 \[2\], got float32 \[2\]",
        ),
        (
            lambda: SCHEDULER.grow(
                SCHEDULER.begin(torch.arange(2)),
                torch.zeros(2, 1, 3, dtype=torch.int64),
                torch.zeros(2, 1, 4),
            ),
            r"log_probs: expected float32 or bfloat16 or float16 \[2, 1, 3\], got float32 \[2, 1, 4\]",
        ),
        (
            lambda: SCHEDULER.grow(
                SCHEDULER.begin(torch.arange(2)),
                torch.zeros(2, 2, 3, dtype=torch.int64),
                torch.zeros(2, 2, 3),
            ),
            r"tokens: expected int64 \[2, 1, k\], got int64 \[2, 2, 3\]",
        ),
        (
            lambda: SCHEDULER.pack(SCHEDULER.begin(torch.arange(2)), num_verify_tokens=4),
            r"num_verify_tokens: expected an int >= 8, got 4",
        ),
        (
            lambda: SCHEDULER.pack(SCHEDULER.begin(torch.arange(2)), num_verify_tokens=0),
            r"num_verify_tokens: expected an int >= 8, got 0",
        ),
        (lambda: echo.TwoLevel(0, 4), r"beam: expected an int >= 1, got 0"),
        (lambda: echo.TwoLevel(2, -1), r"max_extra_tokens: expected an int >= 0, got -1"),
        (lambda: echo.PerRequest(0, 2), r"max_verify_tokens_per_req: expected an int >= 1, got 0"),
        (lambda: echo.GlobalRank(1.5), r"beam: expected an int >= 1, got 1.5"),
        (
            lambda: echo.ElasticBudgetScheduler(echo.GlobalRank(2)),
            r"budget: expected an int or a CostModel",
        ),
        (
            lambda: echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=0),
            r"budget: expected an int >= 1, got 0",
        ),
        (
            lambda: echo.ElasticBudgetScheduler(echo.PerRequest(100, 10)),
            r"max_verify_tokens_per_req: expected at least the 100 of the rule, got 64",
        ),
        (lambda: echo.SparseGate({0: 0.5}), r"thresholds.depth: expected an int >= 1, got 0"),
        (
            lambda: echo.SparseGate({1: 1.5}),
            r"thresholds\[1\]: expected a number from 0.0 to 1.0, got 1.5",
        ),
        (lambda: echo.BeamMassGate((), 0.0, 2), r"depths: expected at least one depth, got none"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()


@pytest.mark.parametrize(
    "rule", [echo.GlobalRank(2), echo.GlobalRank(2, max_verify_tokens_per_req=5)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_no_tokens_are_launched_that_no_request_can_use(rule, batch):
    """Tokens up to 512 are free, before anything is known and after."""
    scheduler = echo.ElasticBudgetScheduler(
        rule, None, echo.CostModel((1, 512, 1024), (1.0, 1.0, 2.0)), 3, max_verify_tokens_per_req=8
    )
    history, req_indices, limits = (
        scheduler.history(batch),
        torch.arange(batch),
        batch * scheduler.num_lookahead_slots(batch),
    )
    assert scheduler.choose_tier(history, req_indices).num_verify_tokens <= limits
    for seed in range(12):
        packed = scheduler.pack(
            grow_all(
                scheduler,
                req_indices,
                k=3,
                seed=seed,
                num_verify_tokens=scheduler.choose_tier(history, req_indices).num_verify_tokens,
            )
        )
        history = history.observe(req_indices, packed, echo.accept(packed, packed.tokens.roll(-1)))
        assert batch < scheduler.choose_tier(history, req_indices).num_verify_tokens <= limits


def test_a_beam_beyond_the_candidates_takes_what_there_is():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(50, 0), budget=64, max_depth=2)
    tree = grow_all(scheduler, torch.arange(1), k=2, seed=0)
    assert [layer.token.shape[1] for layer in tree.layers] == [1, 2, 4]
    assert tree.forest.committed.all()


def test_a_tree_deeper_than_planned_is_refused():
    tree = grow_all(SCHEDULER, torch.arange(2), k=2, seed=0)
    width = tree.frontier.token.shape[1]
    with pytest.raises(
        echo.EchoError,
        match=r"tree: expected fewer than max_depth = 2 layers, got 2",
    ):
        SCHEDULER.grow(tree, torch.zeros(2, width, 1, dtype=torch.int64), torch.zeros(2, width, 1))


def test_no_requests_have_no_weights():
    scheduler, none = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=4), torch.zeros(0)
    tree = scheduler.begin(none.long(), request_weights=none)
    assert scheduler.pack(tree).tokens.tolist() == [0] * 4


def test_what_whole_tokens_bring_is_compared():
    """One request of a mixture of experts, where a second token pays and a third does not: none of
    the prediction's points is a whole draft token.
    """
    cost = echo.CostModel((1, 2, 3, 8), (1.0, 1.1, 9.0, 20.0), draft_layer=0.01)
    optimal = ThroughputOptimal(cost, 3, 2, 8, probe_interval=100, margin=0.02)
    drafts = np.array([[0.0, 0.6, 1.4, 2.5], [0.0, 0.7, 1.9, 4.1]])
    accepts = np.array([[0.0, 0.5, 0.8, 0.9], [0.0, 0.5, 0.9, 1.1]])
    steps = {"num_steps": 7, "num_idle_steps": 0, "num_unprocessed": 0}
    assert optimal._best(drafts, accepts, 1, 1, 1, **steps)[:2] == (1, 2)
    assert optimal._best(drafts, np.zeros_like(accepts), 1, 1, 1, **steps)[:2] == (0, 1)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("context", [None, 64.0])
def test_no_tokens_are_chosen_far_beyond_the_samples(trims, context):
    """The model continues its last slope there: nothing says that 64 tokens cost what 16 do."""
    tokens, reqs = [1, 2, 4, 8, 16, 4, 8, 16, 24, 32], [1] * 5 + [4] * 5
    cost = echo.CostModel.from_samples(tokens, [1.0] * 10, num_reqs=reqs)
    scheduler = replace(OPTIMAL, budget=cost, trims=trims)
    req_indices, history = torch.arange(4), scheduler.history(4)
    for seed in range(8):
        history = observed(scheduler, history, req_indices, depth=4, seed=seed, accepted=4)
        for ids, most in (([0, 1, 2, 3], 40), ([0], 20), ([0, 1], 26)):
            load = {"context_tokens": context}
            tier = scheduler.choose_tier(history, ids, **load)
            assert tier.depth > 0 and tier.num_verify_tokens <= most
            if context is None:
                assert not cost.extrapolated(tier.num_verify_tokens, num_reqs=len(ids))
    assert scheduler.choose_tier(history, [0, 1, 2, 3], num_other_tokens=90).depth == 0


def walked(scheduler, history, steps, p, length=4):
    """The history after ``steps`` of chains whose every draft is accepted with chance ``p``."""
    ids = torch.arange(length)
    depths = []
    for _ in range(steps):
        tier = scheduler.choose_tier(history, ids)
        tree = scheduler.begin(ids, num_verify_tokens=tier.num_verify_tokens)
        for _ in range(tier.depth):
            shape = tree.frontier.token.shape
            tokens = torch.ones(*shape, 1, dtype=torch.int64)
            tree = scheduler.grow(tree, tokens, torch.full((*shape, 1), float(np.log(p))))
        packed = scheduler.pack(tree)
        sampled = torch.where(torch.rand(packed.num_rows) < p, 1, 5)
        history = history.observe(ids, packed, echo.accept(packed, sampled))
        depths.append(tier.depth)
    return history, depths


def test_a_probe_drafts_to_full_depth_so_that_speculation_comes_back():
    """Where any draft costs a jump, one layer never pays, and six do."""
    torch.manual_seed(0)
    cost = echo.CostModel((4, 5, 64), (1.0, 2.5, 2.51), draft_layer=0.1)
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(1), None, cost, max_depth=6, probe_interval=10
    )
    history, hard = walked(scheduler, scheduler.history(4), 100, 0.02)
    assert set(hard[-50:]) == {0, 6}
    _, easy = walked(scheduler, history.reset(torch.arange(4)), 400, 0.97)
    assert set(easy[-50:]) == {6}


def test_what_samples_reach_cuts_the_tokens_and_not_their_worth():
    cost = echo.CostModel((1, 400), (1.0, 1.4), draft_layer=0.01)
    rule = echo.GlobalRank(4)
    free = echo.ElasticBudgetScheduler(rule, None, cost, max_depth=4)
    history, _ = walked(free, free.history(4), 30, 0.9)
    measured = replace(cost, measured=((1.0, 1.0, 16.0, 0.0, 0.0),))  # 20 tokens are within reach
    wall = echo.CostModel((1, 20, 21, 400), (1.0, 1.019, 99.0, 99.4), draft_layer=0.01)
    bound, walled = (
        replace(free, budget=own).choose_tier(history, range(4)) for own in (measured, wall)
    )
    assert bound.depth and (bound.depth, bound.num_verify_tokens) == (walled.depth, 20)
    tiers = replace(measured, tiers=(4, 8, 16, 32))
    assert replace(free, budget=tiers).choose_tier(history, range(4)).num_verify_tokens <= 16
    with pytest.raises(echo.EchoError, match="history: expected one of max_depth 2, got one of 4"):
        replace(free, max_depth=2).choose_tier(history, range(4))


class Widest:
    """A rule of a fixed beam, as a plain class."""

    beam = 2
    ranking = echo.GlobalRank(2)

    def __getattr__(self, name):
        return getattr(self.ranking, name)


def test_a_rule_without_a_beam_to_set_keeps_its_own():
    scheduler = echo.ElasticBudgetScheduler(Widest(), None, 6, max_depth=1)
    tokens = torch.arange(3)[None, None]
    tree = scheduler.grow(scheduler.begin(torch.tensor([7])), tokens, tokens * -0.5 - 1.0, beam=1)
    assert tree.frontier.token.shape == (1, 2)
