"""Lossless acceptance: exact enumeration, and defined behaviour on every fault."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

import echo
from conftest import grow_all, policies
from echo.kernels import reference
from echo.testing import TabularDrafter, TabularTarget, blurred, table

V = 3


@pytest.mark.parametrize("rule", [echo.TwoLevel(2, 2), echo.GlobalRank(2), echo.PerRequest(5, 2)])
def test_sampling_is_lossless_by_exact_enumeration(rule):
    """Every outcome of the target's sampler at every row, weighted by its probability: the
    emitted text has the target's law.
    """
    target = table(V, seed=1)
    drafter = TabularDrafter(blurred(target, seed=2), k=2)
    budget = None if rule.default_budget(1) else 5
    scheduler = echo.ElasticBudgetScheduler(rule, budget=budget, max_depth=2)
    tree = scheduler.begin(torch.tensor([1]))
    for _ in range(2):
        tree = scheduler.grow(tree, *drafter.draft(torch.arange(1), tree.frontier))
    packed = scheduler.pack(tree)
    laws = target[packed.tokens]
    emitted: dict[tuple[int, ...], float] = {}
    for outcome in itertools.product(range(V), repeat=packed.num_rows):
        accepted = echo.accept(packed, torch.tensor(outcome))
        text = tuple(accepted.tokens[0, : int(accepted.num_emitted[0])].tolist())
        weight = float(torch.stack([laws[row, token] for row, token in enumerate(outcome)]).prod())
        emitted[text] = emitted.get(text, 0.0) + weight
    assert sum(emitted.values()) == pytest.approx(1.0)
    assert max(len(text) for text in emitted) == 3, "the test needs drafts that are accepted"
    for text, probability in emitted.items():
        expected, last = 1.0, 1
        for token in text:
            expected, last = expected * float(target[last, token]), token
        assert probability == pytest.approx(expected, abs=1e-12)


def arrays(nodes):
    """int64 [T, nodes]: every tree with that many nodes, each in every order that puts parents
    first.
    """
    return torch.tensor(list(itertools.product([-1], *[range(i) for i in range(1, nodes)])))


def contexts(parents, tokens, vocabulary):
    """int64 [T, n]: the text from the root to each node as a number: 1, then digits."""
    text = torch.ones_like(parents)
    for i in range(1, parents.shape[1]):
        text[:, i] = text.gather(1, parents[:, i : i + 1])[:, 0] * vocabulary + tokens[:, i]
    return text


def followed(law, text, tokens):
    """The probability of each emitted text [M, steps] after ``text``, and the text as a number."""
    probability = torch.ones(len(tokens), dtype=torch.float64)
    for token in tokens.T:
        there = token >= 0
        probability = torch.where(there, probability * law[text, token.clamp(min=0)], probability)
        text = torch.where(there, text * law.shape[1] + token, text)
    return probability, text


def deviation(parents, tokens, vocabulary):
    """Over all outcomes of the sampler at all rows: how far the law of what is emitted is from
    the target's, at most.
    """
    trees, nodes = parents.shape
    law = (
        torch.rand(
            2 * vocabulary**nodes,
            vocabulary,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(nodes),
        )
        + 0.05
    )
    law /= law.sum(1, keepdim=True)  # of the next token after any text, whatever it is
    outcome = torch.cartesian_prod(*[torch.arange(vocabulary)] * nodes).view(-1, nodes)
    count = trees * len(outcome)
    sampled, each = outcome.repeat(trees, 1), torch.arange(trees).repeat_interleave(len(outcome))
    text = contexts(parents, tokens, vocabulary)
    weight = law[text[each], sampled].prod(1)
    indptr = (nodes * torch.arange(count + 1)).int()
    _, emitted, lengths, *_ = reference.accept(
        parents[each].flatten().int(), indptr, tokens[each].flatten(), sampled.flatten(), nodes - 1
    )
    assert int(lengths.min()) == 1 and int(lengths.max()) == nodes
    expected, written = followed(law, torch.ones(count, dtype=torch.int64), emitted)
    _, group = torch.stack([each, written], 1).unique(dim=0, return_inverse=True)
    found = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, weight)
    assert torch.allclose(
        torch.zeros(trees, dtype=torch.float64).index_add_(0, each, weight),
        torch.ones(trees, dtype=torch.float64),
    )
    return float((found[group] - expected).abs().max())


@pytest.mark.parametrize("nodes", range(1, 7))
def test_every_small_tree_is_lossless_by_exact_enumeration(nodes):
    """Two tokens: every tree with every labelling, duplicate siblings too."""
    parents = arrays(nodes)
    labels = torch.cartesian_prod(*[torch.arange(2)] * nodes).view(-1, nodes)[
        : 2 ** (nodes - 1)
    ]  # the root's own token is no matter
    each = torch.arange(len(parents)).repeat_interleave(len(labels))
    assert deviation(parents[each], labels.repeat(len(parents), 1), 2) < 1e-12


@pytest.mark.parametrize("nodes", range(2, 7))
def test_every_small_tree_of_different_siblings_is_lossless_by_exact_enumeration(nodes):
    """As many tokens as the widest tree has siblings."""
    parents, shapes = [], set()
    for tree in arrays(nodes).tolist():
        below = [()] * nodes
        for i in range(nodes - 1, 0, -1):
            below[tree[i]] = tuple(sorted([*below[tree[i]], below[i]]))
        if below[0] not in shapes:  # one order of each
            shapes.add(below[0])
            parents.append(tree)
    assert len(parents) == [1, 2, 4, 9, 20][nodes - 2]
    tokens = [[tree[:i].count(tree[i]) for i in range(nodes)] for tree in parents]
    assert deviation(torch.tensor(parents), torch.tensor(tokens), max(2, nodes - 1)) < 1e-12


def surprise(law, emitted):
    """Chi-square of every token emitted after a text that occurred often: probability of a value
    as large.
    """
    value, freedom = 0.0, 0
    text = torch.ones(len(emitted), dtype=torch.int64)
    for token in emitted.T:
        for after in text[token >= 0].unique().tolist():
            seen = token[(text == after) & (token >= 0)]
            expected = law[after] * len(seen)
            if float(expected.min()) >= 10:
                count = torch.bincount(seen, minlength=law.shape[1])
                value, freedom = (
                    value + float(((count - expected) ** 2 / expected).sum()),
                    freedom + law.shape[1] - 1,
                )
        text = torch.where(token >= 0, text * law.shape[1] + token, 0)
    assert freedom > 20, "the test needs drafts that are accepted"
    return float(chi2.sf(value, freedom))


@pytest.mark.parametrize("nodes", [24, 64])
def test_larger_trees_are_lossless_by_chi_square(nodes):
    vocabulary, runs, generator = 4, 8000, torch.Generator().manual_seed(nodes)
    parents = torch.full((1, nodes), -1)
    tokens = torch.zeros(1, nodes, dtype=torch.int64)
    for i in range(
        1, nodes
    ):  # bushy and shallow: four children at most, in the order of their tokens
        parents[0, i], tokens[0, i] = (i - 1) // vocabulary, (i - 1) % vocabulary
    text = contexts(parents, tokens, vocabulary)[0]
    law = (
        torch.rand(
            int(text.max()) * vocabulary + vocabulary,
            vocabulary,
            dtype=torch.float64,
            generator=generator,
        )
        + 0.2
    )
    law /= law.sum(1, keepdim=True)
    sampled = torch.multinomial(law[text].repeat(runs, 1), 1, generator=generator)[:, 0]
    indptr = (nodes * torch.arange(runs + 1)).int()
    walked = lambda target: reference.accept(
        parents[0].repeat(runs).int(), indptr, tokens[0].repeat(runs), target, 4
    )[1]
    assert surprise(law, walked(sampled)) > 1e-3
    biased = torch.where(torch.rand(len(sampled), generator=generator) < 0.1, 0, sampled)
    assert surprise(law, walked(biased)) < 1e-6, "the test must notice a bias of a tenth"


def walk(packed, target):
    """The rule in plain Python: from the root to the first child that equals the target's token."""
    result = []
    for b in range(packed.batch):
        first, end = int(packed.indptr[b]), int(packed.indptr[b + 1])
        row, rows = (first, []) if end > first else (None, [])
        while row is not None:
            rows.append(row)
            children = [
                c
                for c in range(first, end)
                if int(packed.parent[c]) == row - first and packed.tokens[c] == target[row]
            ]
            row = children[0] if children else None
        result.append(rows)
    return result


@given(policies(), st.integers(0, 10_000))
def test_the_walk_is_the_rule(policy, seed):
    scheduler, batch = policy
    tree = grow_all(scheduler, torch.arange(batch), k=3, seed=seed, live=torch.arange(batch) != 1)
    packed = scheduler.pack(tree)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 1000, (packed.num_rows,), generator=generator)
    for row in range(
        packed.num_rows
    ):  # make acceptance likely: a child's token, where there is one
        children = (
            (packed.request == packed.request[row])
            & (packed.parent == packed.local_row[row])
            & (packed.depth > 0)
        ).nonzero()[:, 0]
        if len(children) and torch.rand(1, generator=generator) < 0.7:
            target[row] = packed.tokens[
                children[int(torch.randint(0, len(children), (1,), generator=generator))]
            ]
    accepted = echo.accept(packed, target)
    expected = walk(packed, target)
    assert accepted.num_emitted.tolist() == [len(rows) for rows in expected]
    for b, rows in enumerate(expected):
        assert accepted.rows[b].tolist() == rows + [-1] * (packed.max_depth + 1 - len(rows))
        assert accepted.tokens[b, : len(rows)].tolist() == target[rows].tolist()
        assert int(accepted.bonus[b]) == (int(target[rows[-1]]) if rows else -1)


def test_greedy_logits_and_tokens_agree():
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=2, max_depth=3)
    packed = scheduler.pack(grow_all(scheduler, torch.arange(3), k=2, seed=0))
    logits = torch.randn(packed.num_rows, 1000)
    one, two = echo.accept(packed, logits=logits), echo.accept(packed, logits.argmax(-1))
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.rows, two.rows)


def test_nan_logits_never_win():
    logits = torch.tensor(
        [
            [float("nan"), 1.0, 2.0],
            [float("nan")] * 3,
            [0.0, float("-inf"), float("nan")],
            [float("-inf")] * 3,
        ]
    )
    assert reference.argmax_tokens(logits).tolist() == [2, -1, 0, -1]


def test_duplicate_siblings_and_broken_links_end_in_defined_walks():
    tokens = torch.tensor([5, 7, 7, 8, 9, 1])
    indptr = torch.tensor([0, 5, 6], dtype=torch.int32)
    parent = torch.tensor(
        [-1, 0, 0, 1, 77, -1], dtype=torch.int32
    )  # row 4 points beyond its request
    rows, emitted, lengths, *_ = reference.accept(
        parent, indptr, tokens, torch.tensor([7, 8, 0, 9, 0, 1]), 3
    )
    assert rows.tolist() == [
        [0, 1, 3, -1],
        [5, -1, -1, -1],
    ]  # of the two 7s the first row; 9 hangs nowhere
    assert emitted.tolist() == [[7, 8, 9, -1], [1, -1, -1, -1]]
    assert lengths.tolist() == [3, 1]
    loop = torch.tensor([-1, 1, 1, 3, 3, -1], dtype=torch.int32)  # rows that are their own parents
    assert reference.accept(loop, indptr, tokens, torch.full((6,), 7), 3)[2].tolist() == [1, 1]


def test_bad_input():
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=2, beam=1, max_depth=1)
    packed = scheduler.pack(grow_all(scheduler, torch.arange(2), k=1, seed=0))
    with pytest.raises(echo.EchoError, match="exactly one of them"):
        echo.accept(packed)
    with pytest.raises(
        echo.EchoError, match=r"target_tokens: expected int64 \[4\], got int64 \[3\]"
    ):
        echo.accept(packed, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(echo.EchoError, match=r"logits: expected .* \[4, V\], got float32 \[5, 2\]"):
        echo.accept(packed, logits=torch.zeros(5, 2))


def answers(scheduler, *, max_num_reqs, prompts, limit, eos=None, drafter=True):
    probabilities = table(20, seed=3, sharpness=3.0)
    target = TabularTarget(probabilities)
    draft = TabularDrafter(blurred(probabilities, seed=4, noise=0.3), k=3) if drafter else None
    texts = [[] for _ in prompts]
    for step in echo.decode(
        scheduler,
        target,
        draft,
        prompts,
        max_num_reqs=max_num_reqs,
        max_new_tokens=limit,
        eos_token=eos,
    ):
        for request, tokens in zip(step.requests, step.emitted, strict=True):
            texts[request] += tokens
    return texts


@given(policies(), st.integers(1, 4), st.integers(1, 15), st.booleans())
def test_greedy_decoding_is_lossless_under_every_policy(policy, max_num_reqs, limit, stop):
    scheduler, _ = policy
    prompts = [torch.tensor([7 * i % 20, i % 20]) for i in range(6)]
    limits = [max(1, limit - i) for i in range(6)]
    eos = 5 if stop else None
    plain = answers(
        echo.ElasticBudgetScheduler.autoregressive(),
        max_num_reqs=1,
        prompts=prompts,
        limit=limits,
        eos=eos,
        drafter=False,
    )
    assert (
        answers(scheduler, max_num_reqs=max_num_reqs, prompts=prompts, limit=limits, eos=eos)
        == plain
    )
    assert all(len(text) <= n for text, n in zip(plain, limits, strict=True))
    assert all(5 not in text[:-1] for text in plain) or not stop


def test_any_of_several_tokens_ends_an_answer():
    scheduler, prompts = (
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=2, max_depth=2),
        [torch.tensor([t]) for t in range(12)],
    )
    whole = answers(scheduler, max_num_reqs=4, prompts=prompts, limit=12)
    ends = {whole[0][3], whole[1][5]}
    cut = [
        text[: next((i + 1 for i, t in enumerate(text) if t in ends), len(text))] for text in whole
    ]
    assert cut != whole
    assert answers(scheduler, max_num_reqs=4, prompts=prompts, limit=12, eos=sorted(ends)) == cut


def test_decode_refills_slots_and_leaves_the_target_with_the_text():
    probabilities = table(20, seed=3)
    target, drafter = TabularTarget(probabilities), TabularDrafter(probabilities, k=2)
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), budget=12, max_depth=3)
    prompts = [torch.tensor([i]) for i in range(5)]
    steps = list(echo.decode(scheduler, target, drafter, prompts, max_num_reqs=2, max_new_tokens=9))
    assert max(len(step.requests) for step in steps) == 2
    assert sorted(request for step in steps for request in step.finished) == list(range(5))
    assert all(step.seconds.total > 0 for step in steps)
    texts: dict[int, list[int]] = {i: [] for i in range(5)}
    for step in steps:
        for request, tokens in zip(step.requests, step.emitted, strict=True):
            texts[request] += tokens
    assert all(len(text) == 9 for text in texts.values())


def test_a_step_makes_warmup_rows_and_a_gated_one_refuses():
    probabilities = table(20, seed=3)
    target, drafter = (
        TabularTarget(probabilities),
        TabularDrafter(blurred(probabilities, seed=4), k=3),
    )
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 0), budget=64, max_depth=3)
    prompts = [torch.tensor([i]) for i in range(4)]
    steps = list(
        echo.decode(scheduler, target, drafter, prompts, max_num_reqs=4, max_new_tokens=12)
    )
    log = echo.WarmupLog.concat([step.log() for step in steps])
    for step in steps:
        rows, drafts = step.log(), step.accepted.num_accepted_drafts
        known = torch.where(drafts < step.accepted.num_emitted, 3, drafts).repeat_interleave(
            step.packed.indptr.diff()
        )  # not what is behind the end
        assert len(rows) == int(
            (
                (step.packed.depth > 0)
                & (step.packed.depth <= F.pad(known, (0, step.packed.num_rows - len(known))))
            ).sum()
        )
        assert int(rows.accepted.sum()) == int(drafts.sum())
        for depth in set(rows.depth.tolist()):
            first = rows.rank[rows.depth == depth] == 0
            assert first.sum() <= step.packed.batch
            best = step.tree.layers[depth].log_confidence.exp()
            assert all(
                c in best.tolist() for c in rows.confidence[rows.depth == depth][first].tolist()
            )
    assert len(set(log.step.tolist())) == sum(len(set(s.log().step.tolist())) for s in steps)
    gated = echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 0), echo.SparseGate({1: 0.1}), budget=64, max_depth=3
    )
    step = next(
        iter(echo.decode(gated, target, drafter, prompts, max_num_reqs=4, max_new_tokens=12))
    )
    with pytest.raises(echo.EchoError, match="behind a gate"):
        step.log()


def test_decode_refuses_bad_prompts():
    scheduler, target = (
        echo.ElasticBudgetScheduler.autoregressive(),
        TabularTarget(table(5, seed=0)),
    )
    with pytest.raises(echo.EchoError, match=r"prompts\[1\]: expected at least one token"):
        list(
            echo.decode(
                scheduler,
                target,
                None,
                [torch.tensor([1]), torch.empty(0, dtype=torch.int64)],
                max_num_reqs=1,
                max_new_tokens=2,
            )
        )
    with pytest.raises(
        echo.EchoError, match=r"max_new_tokens: expected one number for each of 1 prompts, got 2"
    ):
        list(
            echo.decode(
                scheduler, target, None, [torch.tensor([1])], max_num_reqs=1, max_new_tokens=[1, 2]
            )
        )
