"""A target row without a number: the walk ends before it, and everything that looks at the step
says the same.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import echo
from echo import kernels
from echo.testing import RefuseSyncs, TabularDrafter, TabularTarget, blurred, table

try:
    import triton  # noqa: F401

    from echo.kernels import tiles

    BACKENDS = ("torch", "triton") if tiles.interpreted() else ("torch",)
except ImportError:
    BACKENDS = ("torch",)

NAN = float("nan")


def chain(*tokens, roots=(7,), max_depth=2, budget=None):
    """A step of one chain of drafts behind each root."""
    scheduler = echo.ElasticBudgetScheduler(echo.PerRequest(max_depth + 1, 1), max_depth=max_depth)
    if budget is not None:
        scheduler = replace(scheduler, rule=echo.GlobalRank(1), budget=budget)
    tree = scheduler.begin(torch.tensor(roots), num_verify_tokens=(max_depth + 1) * len(roots))
    for token in tokens:
        shape = len(roots), 1, 1
        tree = scheduler.grow(tree, torch.full(shape, token), torch.full(shape, -0.1))
    return scheduler, tree, scheduler.pack(tree)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["nan", "-inf", "token", "other"])
def test_a_row_inside_the_tree(backend, bad):
    _, _, packed = chain(1, 2)
    logits = torch.zeros(3, 10)
    tokens = torch.tensor([1, -1, 4])
    logits[0, 1] = 5.0
    logits[1] = NAN if bad == "nan" else -torch.inf
    logits[2, 4] = 5.0
    tokens[1] = -1 if bad == "token" else -9
    given = {"logits": logits} if bad in ("nan", "-inf") else {"target_tokens": tokens}
    accepted = echo.accept(packed, **given, backend=backend)
    assert accepted.tokens.tolist() == [[1, -1, -1]] and accepted.rows.tolist() == [[0, -1, -1]]
    assert (accepted.num_emitted.tolist(), accepted.bonus.tolist(), accepted.cut_row.tolist()) == (
        [1],
        [1],
        [1],
    )
    assert echo.compact(packed, accepted, torch.tensor([5])).prefix_lens.tolist() == [6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_root(backend):
    scheduler, tree, packed = chain(1, 2, roots=(7, 8), budget=echo.CostModel((1, 99), (1.0, 2.0)))
    logits = torch.zeros(6, 10)
    logits[0] = NAN
    logits[3:5, 1:3] = torch.eye(2)
    accepted = echo.accept(packed, logits=logits, backend=backend)
    assert accepted.tokens.tolist() == [[-1] * 3, [1, 2, 0]] and accepted.rows.tolist() == [
        [-1] * 3,
        [3, 4, 5],
    ]
    assert (accepted.num_emitted.tolist(), accepted.bonus.tolist(), accepted.cut_row.tolist()) == (
        [0, 3],
        [-1, 0],
        [-1, -1],
    )
    counts = echo.StepStats.empty().observe(packed, accepted).read()
    assert (counts.requests, counts.no_output, counts.accepted_drafts, counts.emitted_tokens) == (
        2,
        1,
        2,
        3,
    )
    lists = echo.compact(packed, accepted, torch.tensor([5, 9]))
    assert lists.prefix_lens.tolist() == [5, 12] and not lists.valid[0].any()
    assert torch.equal(lists.source[0], lists.target[0])
    log = echo.loop.warmup_log(tree, packed, accepted)
    assert log.step.tolist() == [1, 1] and log.accepted.tolist() == [True, True]
    with kernels.using(backend):
        history = scheduler.history(2).observe(torch.arange(2), packed, accepted)
    assert history.steps.T.tolist() == [
        [0, 0],
        [1, 1],
        [1, 1],
    ]  # of slot 0 nothing was learnt: no step, no rejection
    assert history.accepted.T.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert not history.acceptance_histogram[:, 0].any() and not history.expected[:, 0].any()


def test_the_log_takes_the_draft_at_which_a_walk_was_cut_for_accepted_and_leaves_out_what_is_deeper():
    _, tree, packed = chain(1, 2, 3, roots=(7, 8), max_depth=3)
    accepted = echo.accept(packed, torch.tensor([1, 2, -1, 0, 1, 0, 0, 0]))
    assert accepted.num_accepted_drafts.tolist() == [2, 1]
    log = echo.loop.warmup_log(tree, packed, accepted)
    assert list(zip(log.step.tolist(), log.depth.tolist(), log.accepted.tolist(), strict=True)) == [
        (0, 1, True), (0, 2, True), (1, 1, True), (1, 2, False), (1, 3, False)
    ]  # fmt: skip
    with RefuseSyncs():
        rank, taken = echo.loop.draft_labels(tree, packed, accepted)
        live = (
            echo.gating.ConfidenceHistograms.empty(3)
            .live()
            .update(packed.depth, packed.score, taken, rank)
        )
    assert rank.tolist() == [0, 0, 0, -1, 0, 0, 0, 0]
    assert live.snapshot() == echo.gating.ConfidenceHistograms.empty(3).merge(
        echo.gating.ConfidenceHistograms.of([log])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_history_counts_drafts_down_to_the_cut(backend):
    """Of the first request drafts of depths 1 and 2 were accepted and depth 3 was not judged;
    the second fails at depth 2.
    """
    scheduler, _, packed = chain(
        1, 2, 3, roots=(7, 8), max_depth=3, budget=echo.CostModel((1, 99), (1.0, 2.0))
    )
    accepted = echo.accept(packed, torch.tensor([1, 2, -1, 0, 1, 0, 0, 0]))
    with kernels.using(backend):
        history = scheduler.history(2).observe(torch.tensor([1, 0]), packed, accepted)
    assert history.steps.T.tolist() == [[1, 1, 1], [1, 1, 0], [2, 2, 1]]
    assert history.accepted.T.tolist() == [[1, 0, 0], [1, 1, 0], [2, 1, 0]]
    assert (
        history.acceptance_histogram.sum(dim=2) == history.steps
    ).all()  # each depth has one node
    assert ((history.expected > 0) == (history.steps > 0)).all()


def small_trees(nodes, outcomes, labellings=1):
    """Every tree of so many nodes in every order of parents first, labelled with two tokens, in
    all ways or some; some outcomes.
    """
    parents = torch.tensor(list(itertools.product([-1], *[range(i) for i in range(1, nodes)])))
    labels = torch.cartesian_prod(*[torch.arange(2)] * nodes).view(-1, nodes)[
        : 2 ** (nodes - 1) : labellings
    ]
    each = torch.cartesian_prod(
        torch.arange(len(parents)), torch.arange(len(labels)), torch.arange(len(outcomes))
    )
    return parents[each[:, 0]].int(), labels[each[:, 1]], outcomes[each[:, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nodes", range(1, 6))
def test_every_small_tree_with_every_row_spoiled_in_turn(nodes, backend):
    """Every other request is spoiled: it emits the right text up to that row, and its neighbours
    emit what they did.
    """
    every = torch.cartesian_prod(*[torch.arange(2)] * nodes).view(-1, nodes)
    few = every[:1], 1 if nodes < 5 else 5  # all alike: the deepest walks
    parents, labels, target = small_trees(nodes, *((every,) if backend == "torch" else few))
    count = len(parents)
    indptr = (nodes * torch.arange(count + 1)).int()
    links = parents.flatten(), indptr, labels.flatten()
    right = kernels.accept(*links, target.flatten(), nodes - 1, backend="torch")
    assert int(right[2].min()) >= 1 and int(right[2].max()) == nodes and (right[3] == -1).all()
    assert torch.equal(
        right[0],
        kernels.accept(*links, torch.eye(2)[target].flatten(0, 1), nodes - 1, backend=backend)[0],
    )
    for place, value in itertools.product(range(nodes), ("token", "logits")):
        spoiled = torch.arange(count) % 2 == 0
        row = nodes * torch.arange(count)[:, None] + place
        seen = (right[0] == row).cumsum(dim=1) + ~spoiled[
            :, None
        ] * -nodes > 0  # from the spoiled row on
        expected = (
            right[0].masked_fill(seen, -1),
            right[1].masked_fill(seen, -1),
            right[2] - seen.logical_and(right[0] >= 0).sum(dim=1),
        )
        beyond = torch.where(seen.any(dim=1) & (place > 0), row[:, 0], -1)
        if value == "token":
            tokens = target.clone()
            tokens[spoiled, place] = -1 - place
            found = kernels.accept(*links, tokens.flatten(), nodes - 1, backend=backend)
        else:
            logits = torch.eye(2)[target]
            logits[spoiled, place] = NAN if place % 2 else -torch.inf
            found = kernels.accept(*links, logits.flatten(0, 1), nodes - 1, backend=backend)
        assert all(
            torch.equal(one, two) for one, two in zip(found[:4], (*expected, beyond), strict=True)
        )


LAW = table(14, seed=5, sharpness=3.0)
PROMPTS = [torch.tensor([3, t]) for t in (0, 5, 9, 11, 2, 13)]


class Spoiled(TabularTarget):
    """No number after one of the tokens."""

    bad = -1

    def spoil(self, tokens, after):
        return torch.where(tokens == self.bad, -1, after)

    def admit(self, req_indices, prompts):
        return self.spoil(
            torch.stack([p[-1] for p in prompts]), super().admit(req_indices, prompts)
        )

    def verify(self, req_indices, packed):
        assert (packed.tokens >= 0).all()
        return self.spoil(packed.tokens, super().verify(req_indices, packed))


class Watching(TabularDrafter):
    def admit(self, req_indices, prompts, first):
        assert len(req_indices) == len(prompts) == len(first) > 0 and (first >= 0).all()


def right_text(prompt, limit, bad, eos):
    """The answer, and whether it ends for want of a number."""
    text = []
    last = int(prompt[-1])
    while len(text) < limit and last != bad:
        last = int(LAW[last].argmax())
        text.append(last)
        if last == eos:
            return text, False
    return text, len(text) < limit


@pytest.mark.parametrize("max_num_reqs", [1, 2, 4])
@pytest.mark.parametrize("bad", range(-1, 14))
def test_decode_answers_what_is_right_of_each_prompt_and_names_the_others(bad, max_num_reqs):
    target = Spoiled(LAW)
    drafter = Watching(blurred(LAW, seed=6, noise=0.2), k=3)
    target.bad = bad
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(2), None, echo.CostModel((1, 12, 64), (1.0, 1.1, 4.0)), 3
    )
    texts = [[] for _ in PROMPTS]
    finished = []
    failed = []
    stats = echo.StepStats.empty()
    heard = 0
    eos = 4
    steps = echo.decode(
        scheduler,
        target,
        drafter,
        PROMPTS,
        max_num_reqs=max_num_reqs,
        max_new_tokens=9,
        eos_token=eos,
    )
    error = None
    try:
        for step in steps:
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                texts[request] += tokens
            finished += step.finished
            failed += step.failed
            stats = stats.observe(step.packed, step.accepted)
            heard += len(step.log())
    except echo.EchoError as raised:
        error = str(raised)
    expected = [right_text(prompt, 9, bad, eos) for prompt in PROMPTS]
    assert texts == [text for text, _ in expected]
    broken = [number for number, (_, cut) in enumerate(expected) if cut]
    assert sorted(finished) == [number for number, (_, cut) in enumerate(expected) if not cut]
    assert set(failed) <= set(broken) and (error is None) == (not broken)
    for number in (
        broken
    ):  # one whose prompt already has no number after it is in no step, if no step follows
        assert number in failed or not texts[number]
        assert f"prompt {number} " in error
    assert stats.read().emitted_tokens == sum(map(len, texts)) - sum(
        1 for text in texts if text
    )  # prefill's first tokens apart
    assert heard > 0 or not finished


def test_the_error_names_prompt_and_step():
    target = Spoiled(LAW)
    target.bad = int(LAW[3].argmax())
    steps = echo.decode(
        echo.ElasticBudgetScheduler.autoregressive(),
        target,
        None,
        [torch.tensor([3])],
        max_num_reqs=1,
        max_new_tokens=6,
    )
    step = next(steps)
    assert (step.emitted, step.finished, step.failed) == (((target.bad,),), (), (0,))
    message = r"target: expected a number in the row of each root, got none for prompt 0 after 1 tokens of its answer, in step 1"
    with pytest.raises(echo.EchoError, match=message):
        next(steps)
    target.bad = 3
    steps = echo.decode(
        echo.ElasticBudgetScheduler.autoregressive(),
        target,
        None,
        [torch.tensor([3])],
        max_num_reqs=1,
        max_new_tokens=6,
    )
    with pytest.raises(echo.EchoError, match="got none for prompt 0 at its end"):
        next(steps)
