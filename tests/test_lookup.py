"""Prompt lookup: the proposals are those of a plain search, opinions pool as probabilities do, and
nothing else changes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import echo
from conftest import one_graph
from echo import kernels
from echo.kernels import ngram, tiles
from echo.lookup import NO_TOKEN, Texts, blend
from echo.testing import RefuseSyncs, TabularDrafter, TabularTarget, record, replay, table
from echo.testing.toy import blurred
from echo.tree import Frontier

DEVICE = "cpu" if tiles.interpreted() else "cuda"
BACKENDS = ["torch", "triton"] if tiles.interpreted() else ["torch"]


def ends(texts: Texts) -> list[list[int]]:
    """What the rings hold, in order."""
    length = texts.tokens.shape[1]
    return [
        [int(ring[i % length]) for i in range(max(0, n - length), n)]
        for ring, n in zip(texts.tokens, texts.num_tokens.tolist(), strict=True)
    ]


def searched(text: list[int], path: list[int], longest: int) -> tuple[int, int]:
    """What followed the last of the longest matches in ``text`` of the end of the text with the
    path behind it.
    """
    end = text + path
    for n in range(min(longest, len(end)), 0, -1):
        for at in range(len(text) - n - 1, -1, -1):
            if text[at : at + n] == end[-n:]:
                return text[at + n], n
    return NO_TOKEN, 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 9999),
)
def test_votes_are_those_of_a_plain_search_at_every_node_of_a_tree(texts, longest, seed):
    batch = len(texts)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(batch + 2, generator=generator)[:batch]
    kept = Texts.empty(batch + 2, 16).admit(slots, [torch.tensor(text) for text in texts])
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, 99, 3)
    tree = scheduler.begin(torch.tensor([text[-1] for text in texts]))
    match = kept.propose(slots, longest)
    paths = [[[]] for _ in texts]
    for depth in range(4):
        if depth:
            match = match.follow(tree.frontier)
            above = paths
            token = tree.frontier.token.tolist()
            parent = tree.frontier.parent.tolist()
            paths = [
                [[*above[b][p], t] for t, p in zip(token[b], parent[b], strict=True)]
                for b in range(batch)
            ]
        proposal = match.tokens
        run = match.match_lens
        for b, text in enumerate(texts):
            for w, path in enumerate(paths[b]):
                assert (int(proposal[b, w]), int(run[b, w])) == searched(text, path, longest)
        if depth < 3:
            shape = (*tree.frontier.token.shape, 2)
            drawn = torch.rand(shape, generator=generator).log() - 1
            tree = scheduler.grow(tree, torch.randint(0, 3, shape, generator=generator), drawn)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), max_size=4)), max_size=8),
    st.integers(1, 9),
)
def test_texts_keep_the_end_of_what_was_appended(appended, room):
    texts = Texts.empty(3, room).admit(torch.arange(3), [torch.tensor([slot]) for slot in range(3)])
    expected = [[0], [1], [2]]
    for slot, tokens in appended:
        padded = torch.tensor([[*tokens, *[-1] * (5 - len(tokens))]])
        texts = texts.append(torch.tensor([slot]), padded, torch.tensor([len(tokens)]))
        expected[slot] = (expected[slot] + tokens)[-room:]
    assert ends(texts) == expected
    again = texts.admit(
        torch.tensor([1]), [torch.tensor([7])]
    )  # nothing of the former request stays
    assert ends(again) == [expected[0], [7], expected[2]]
    longer = texts.admit(torch.tensor([2]), [torch.arange(room + 3)])
    assert ends(longer)[2] == list(range(3, room + 3))
    assert ends(texts.admit(torch.tensor([], dtype=torch.int64), [])) == expected
    nothing = texts.append(
        torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    )
    assert ends(nothing) == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 12))
def test_a_text_longer_than_the_memory_is_searched_as_its_end_is(text, length, already):
    lookup = echo.PromptLookup(1, length)
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=2, beam=1, max_depth=1)
    already = min(already, len(text))
    lookup.admit(
        torch.zeros(1).long(),
        [torch.tensor(text[: already - 1], dtype=torch.int64)],
        torch.tensor(text[already - 1 : already]),
    )
    for start in range(already, len(text), 3):
        more = text[start : start + 3]
        lookup.texts = lookup.texts.append(
            torch.zeros(1).long(), torch.tensor([[*more, 0, 0]]), torch.tensor([len(more)])
        )
    proposal, run = searched(text[-length:], [], 8)
    tokens, log_probs = lookup.draft(
        torch.zeros(1).long(), scheduler.begin(torch.tensor(text[-1:])).frontier
    )
    assert (int(tokens), log_probs.exp().item()) == (
        max(proposal, 0),
        pytest.approx(lookup.mixing_weights[run].item(), abs=1e-3),
    )


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=14), min_size=1, max_size=3),
    st.integers(0, 9999),
    st.booleans(),
)
def test_a_first_layer_from_elsewhere_is_followed_too(texts, seed, before):
    """The lookup is asked at depth 1 first, in its first step or after one in which it was asked
    for the roots.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(len(texts))
    lookup = echo.PromptLookup(len(texts), 40)
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 20, 4)
    texts = [list(text) for text in texts]
    lookup.admit(
        slots,
        [torch.tensor(text[:-1]) for text in texts],
        torch.tensor([text[-1] for text in texts]),
    )
    for asked in [True] * before + [False]:
        roots = torch.tensor([text[-1] for text in texts])
        first = (
            torch.randint(0, 3, (len(texts), 2), generator=generator),
            -torch.rand(len(texts), 2, generator=generator),
        )
        tree = scheduler.begin(roots, first_layer=None if asked else first)
        paths = [[[]] for _ in texts]
        for _ in range(tree.depth, 3):
            if tree.depth:
                token = tree.frontier.token.tolist()
                parent = tree.frontier.parent.tolist()
                paths = [
                    [[*above[p], t] for t, p in zip(*node, strict=True)]
                    for above, *node in zip(paths, token, parent, strict=True)
                ]
            proposal, weight = lookup.draft(slots, tree.frontier)
            for b, text in enumerate(texts):
                for w, path in enumerate(paths[b]):
                    expected, run = searched(text, path, 8)
                    assert int(proposal[b, w]) == max(expected, 0) and weight[
                        b, w
                    ].exp().item() == pytest.approx(lookup.mixing_weights[run].item(), abs=1e-3)
            shape = (*tree.frontier.token.shape, 2)
            tree = scheduler.grow(
                tree,
                torch.randint(0, 3, shape, generator=generator),
                -torch.rand(shape, generator=generator),
            )
        packed = scheduler.pack(tree)
        accepted = echo.accept(packed, torch.randint(0, 3, (packed.num_rows,), generator=generator))
        lookup.extend(slots, packed, accepted)
        texts = [
            text + new[:n]
            for text, new, n in zip(
                texts, accepted.tokens.tolist(), accepted.num_emitted.tolist(), strict=True
            )
        ]
    fresh = echo.PromptLookup(len(texts), 40)
    with pytest.raises(
        echo.EchoError,
        match="frontier: expected one of depth 0 or 1, or one below the last, got one of depth 3",
    ):
        fresh.draft(slots, tree.frontier)


def test_admission_copies_nothing_from_the_host():
    class Refuse(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.to)
            return func(*args, **(kwargs or {}))

    lookup = echo.PromptLookup(3, 9, device="meta")
    meta = torch.device("meta")
    prompts = [torch.empty(n, dtype=torch.int64, device=meta) for n in (4, 12)]
    slots = torch.empty(2, dtype=torch.int64, device=meta)
    with Refuse():
        lookup.admit(slots, prompts, slots)
    assert lookup.texts.tokens.shape == (3, 9)


@given(st.integers(2, 6), st.floats(0, 0.99), st.integers(0, 9999))
def test_a_whole_vocabulary_stays_a_distribution(vocab, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.softmax(torch.randn(2, 3, vocab, generator=generator), dim=-1)
    proposal = torch.randint(-1, vocab, (2, 3), generator=generator)
    every = torch.arange(vocab).expand(2, 3, -1)
    tokens, pooled = blend(every, q.log(), proposal, torch.full((2, 3), weight))
    shares = torch.where(proposal >= 0, weight, 0.0)[..., None]
    assert torch.equal(tokens, every)
    assert torch.allclose(
        pooled.exp(), (1 - shares) * q + shares * (every == proposal[..., None]), atol=1e-6
    )


def test_a_vote_takes_the_place_of_the_least_likely_only_where_it_is_likelier():
    tokens = torch.tensor([[[5, 6], [5, 6], [5, 6], [5, 6]]])
    q = torch.tensor([[[0.5, 0.2], [0.5, 0.2], [0.0, 0.0], [0.2, 0.5]]])
    proposal = torch.tensor([[9, 9, 9, -1]])
    weight = torch.tensor([[0.25, 0.05, 0.9, 0.9]])
    seen, pooled = blend(tokens, q.log().half(), proposal, weight)
    assert seen.tolist() == [
        [[5, 9], [5, 6], [5, 6], [5, 6]]
    ]  # taken; too doubtful; nothing was drafted; no proposal
    assert pooled.dtype == torch.float16
    assert torch.allclose(
        pooled.float().exp(),
        torch.tensor([[[0.375, 0.25], [0.475, 0.19], [0.0, 0.0], [0.2, 0.5]]]),
        atol=1e-3,
    )
    faulty = blend(tokens, torch.full_like(q, math.nan), proposal, weight)[1]
    assert faulty.isnan().all()  # stays for the plan to count


def test_weights_are_fitted_to_the_likeliest_share():
    """The target follows the proposal with probability 0.7 and its own table otherwise; the draft
    knows that table.
    """
    vocab = 12
    batch = 64
    weight = 0.7
    weights = (0.0, 0.3, 0.9)
    own = table(vocab, 1)
    slots = torch.arange(batch)
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=2, beam=1, max_depth=1)
    for _ in range(6):
        lookup = echo.PromptLookup(
            batch, 256, TabularDrafter(own, vocab), max_ngram=2, mixing_weights=weights
        )
        generator = torch.Generator().manual_seed(0)
        last = torch.randint(0, vocab, (batch,), generator=generator)
        lookup.admit(slots, list(torch.randint(0, vocab, (batch, 40), generator=generator)), last)
        for _ in range(40):
            found = lookup.texts.propose(slots, 2)
            proposal = found.tokens
            run = found.match_lens
            tree = scheduler.begin(last)
            packed = scheduler.pack(scheduler.grow(tree, *lookup.draft(slots, tree.frontier)))
            follows = (torch.rand(batch, generator=generator) < weight) & (run[:, 0] > 0)
            last = torch.where(
                follows, proposal[:, 0], torch.multinomial(own[last], 1, generator=generator)[:, 0]
            )
            accepted = echo.accept(packed, torch.full((packed.num_rows,), -1))
            lookup.extend(
                slots,
                packed,
                replace(
                    accepted, tokens=last[:, None], num_emitted=torch.ones(batch, dtype=torch.int64)
                ),
            )
        weights = lookup.fit_weights()
    assert weights[0] == 0
    assert weights[1:] == pytest.approx((weight, weight), abs=0.03)


def pair(slots: int, lookup: bool):
    own = table(9, 3, sharpness=4.0)
    drafter = TabularDrafter(blurred(own, 4), 3, torch.float16)
    return TabularTarget(own), echo.PromptLookup(slots, 64, drafter) if lookup else drafter


PROMPTS = [torch.tensor([b, (b + 1) % 9, b]) for b in range(7)]


@pytest.mark.parametrize("alone", [False, True])
def test_the_text_is_that_of_plain_decoding_and_takes_fewer_steps(alone):
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=1, max_depth=3)
    found = {}
    for name in ("plain", "draft", "lookup"):
        target, drafter = pair(3, name == "lookup")
        if alone and name == "lookup":
            drafter = echo.PromptLookup(3, 64)
        policy = echo.ElasticBudgetScheduler.autoregressive() if name == "plain" else scheduler
        texts: dict[int, list[int]] = {}
        steps = list(
            echo.decode(policy, target, drafter, PROMPTS, max_num_reqs=3, max_new_tokens=40)
        )
        for step in steps:
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                texts.setdefault(request, []).extend(tokens)
        found[name] = texts, len(steps)
    assert found["plain"][0] == found["draft"][0] == found["lookup"][0]
    assert found["lookup"][1] < found["plain" if alone else "draft"][1]


def test_a_blended_draft_depends_on_the_text_alone_and_replays():
    target, drafter = pair(7, True)
    options = {
        "max_num_reqs": 7,
        "depth": 3,
        "beam": 3,
        "floor": -math.inf,
        "max_new_tokens": 30,
        "max_verify_tokens_per_req": 40,
    }
    *_, trace = record(target, drafter, PROMPTS, ["toy"] * 7, **options)
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3)
    target, drafter = pair(3, True)
    live = list(echo.decode(scheduler, target, drafter, PROMPTS, max_num_reqs=3, max_new_tokens=30))
    report = replay(trace, scheduler, echo.CostModel((1, 9), (1.0, 2.0)), batch=3)
    assert report.misses == 0
    assert report.steps == len(live)


def test_no_operator_reads_back_and_a_draft_is_one_graph():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 2)

    def step(tokens, used, slots, roots, drawn):
        texts = Texts(tokens, used)
        tree = scheduler.begin(roots)
        match = texts.propose(slots, 4)
        for depth in range(2):
            match = match.follow(tree.frontier) if depth else match
            proposal = match.tokens
            run = match.match_lens
            candidates = torch.arange(3).expand(*proposal.shape, 3)
            tree = scheduler.grow(
                tree, *blend(candidates, drawn[:, : proposal.shape[1]], proposal, run / 5)
            )
        packed = scheduler.pack(tree)
        accepted = echo.accept(packed, packed.tokens.roll(-1))
        after = texts.append(slots, accepted.tokens, accepted.num_emitted)
        return packed.tokens, packed.mask, after.tokens, after.num_tokens

    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 3, (6, 20), generator=generator)
        drawn = torch.randn(4, 2, 3, generator=generator).log_softmax(-1)
        return (
            tokens,
            torch.randint(1, 15, (6,), generator=generator),
            torch.randperm(6, generator=generator)[:4],
            tokens[:4, 0],
            drawn,
        )

    with RefuseSyncs():
        step(*case(0))
    one_graph(step, [case(seed) for seed in range(3)])


def test_bad_input():
    for call, says in (
        (lambda: Texts.empty(0, 4), "max_num_reqs: expected an int >= 1, got 0"),
        (
            lambda: Texts.empty(2, 4).admit(torch.arange(2), [torch.arange(3)]),
            r"req_indices: expected int64 \[1\], got int64 \[2\]",
        ),
        (
            lambda: Texts.empty(2, 4).admit(torch.arange(1), [torch.ones(3)]),
            r"texts\[0\]: expected int64 \[n\], got float32 \[3\]",
        ),
        (
            lambda: Texts.empty(2, 4).append(
                torch.arange(2), torch.ones(3, 1).long(), torch.ones(2).long()
            ),
            r"tokens: expected int64 \[2, n\]",
        ),
        (
            lambda: Texts.empty(2, 4).append(
                torch.arange(2), torch.ones(2, 1).long(), torch.ones(2)
            ),
            r"num_tokens: expected int64 \[2\]",
        ),
        (
            lambda: Texts.empty(2, 4).propose(torch.arange(2), 0),
            "max_ngram: expected an int from 1 to 64, got 0",
        ),
        (
            lambda: echo.PromptLookup(2, 8, max_ngram=0),
            "max_ngram: expected an int from 1 to 64, got 0",
        ),
        (
            lambda: echo.PromptLookup(2, 8, mixing_weights=(0.0, 1.0)),
            r"mixing_weights: expected 9 numbers in \[0, 1\), for matches of 0 to 8 tokens",
        ),
        (
            lambda: blend(
                torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(1, 2)
            ),
            r"tokens: expected int64 \[B, W, k\]",
        ),
        (
            lambda: blend(
                torch.zeros(1, 2, 3).long(),
                torch.zeros(1, 2, 3),
                torch.zeros(1, 2).long(),
                torch.zeros(1, 3),
            ),
            r"weight: expected float32 \[1, 2\]",
        ),
    ):
        with pytest.raises(echo.EchoError, match=says):
            call()


def nodes(generator, batch, above, width):
    """A frontier of ``width`` nodes below ``above`` others."""
    shape = batch, width
    parent = torch.randint(0, above, shape, generator=generator).to(DEVICE)
    token = torch.randint(0, 3, shape, generator=generator).to(DEVICE)
    active = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    return Frontier(token, parent, parent, torch.zeros(shape, device=DEVICE), active, 1)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(3, 40), st.integers(1, 8), st.integers(0, 9999))
def test_kernels_propose_what_the_reference_proposes(batch, length, max_ngram, seed):
    """Bit for bit, texts that a ring has lost the beginning of included; a blend to rounding."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randperm(6, generator=generator)[:batch].to(DEVICE)
    found = []
    for backend in ("torch", "triton"):
        generator.manual_seed(seed)
        with kernels.using(backend):
            texts = Texts.empty(6, length, DEVICE)
            for _ in range(5):
                n = int(torch.randint(0, 12, (1,), generator=generator))
                new = torch.randint(0, 3, (batch, n), generator=generator)
                counts = torch.randint(0, n + 1, (batch,), generator=generator)
                texts = texts.append(where, new.to(DEVICE), counts.to(DEVICE), out=texts)
            said = texts.propose(where, max_ngram)
            seen = [*vars(texts).values()]
            for depth in range(3):
                if depth:
                    said = said.follow(nodes(generator, batch, said.tokens.shape[1], 3))
                seen += [said.tails, said.tokens, said.match_lens]
        found.append(seen)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    q = torch.randn(batch, 3, 3, generator=generator).log_softmax(-1)
    odd = torch.rand(q.shape, generator=generator)
    q = q.masked_fill(odd < 0.1, -math.inf).masked_fill(odd > 0.95, math.nan)
    tokens = torch.randint(0, 9, (batch, 3, 1), generator=generator) + torch.arange(3)
    weights = torch.rand(max_ngram + 1, generator=generator) * 0.9
    tokens, q, weights = (value.to(DEVICE) for value in (tokens, q, weights))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        draft = tokens, q.to(dtype)
        ours = ngram.blend(*draft, said.tokens, said.match_lens, weights)
        theirs = blend(*draft, said.tokens, weights[said.match_lens])
        assert torch.equal(ours[0], theirs[0])
        close = 1e-6 if dtype == torch.float32 else 1e-2
        assert torch.allclose(ours[1], theirs[1], atol=close, rtol=close, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lookup_stays_at_its_addresses_and_decodes_the_same_text(backend):
    target, drafter = pair(3, True)
    before = [drafter.texts.tokens.data_ptr(), drafter.texts.num_tokens.data_ptr()]
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3)
    with kernels.using(backend):
        steps = echo.decode(scheduler, target, drafter, PROMPTS, max_num_reqs=3, max_new_tokens=20)
        texts: dict[int, list[int]] = {}
        for step in steps:
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                texts.setdefault(request, []).extend(tokens)
    assert [drafter.texts.tokens.data_ptr(), drafter.texts.num_tokens.data_ptr()] == before
    plain = {}
    policy = echo.ElasticBudgetScheduler.autoregressive()
    for step in echo.decode(
        policy, pair(3, False)[0], None, PROMPTS, max_num_reqs=3, max_new_tokens=20
    ):
        for request, tokens in zip(step.requests, step.emitted, strict=True):
            plain.setdefault(request, []).extend(tokens)
    assert texts == plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draft_of_another_shape_is_named_before_anything_reads_it(backend):
    class Narrow(TabularDrafter):
        def draft(self, req_indices, frontier):
            tokens, log_probs = super().draft(req_indices, frontier)
            return tokens, log_probs[..., :1]

    lookup = echo.PromptLookup(2, 16, Narrow(table(9, 3), 3))
    where = torch.arange(2)
    lookup.admit(where, [torch.tensor([1, 2])] * 2, where)
    tree = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 8, 2).begin(where)
    with (
        kernels.using(backend),
        pytest.raises(echo.EchoError, match=r"log_probs: expected .* \[2, 1, 3\], got"),
    ):
        lookup.draft(where, tree.frontier)
