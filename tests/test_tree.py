"""Trees that no beam drafted, the step in an engine's cache, and its broadcast."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION, grow_all, policies
from echo import kernels
from echo.kernels import tiles
from echo.testing import TabularDrafter, check_plan, table
from echo.tree import Template, buffer_size, compact, layouts, slot_mapping
from forests import forest

PATHS = "tokens", "rows"
NO_RULE = echo.ElasticBudgetScheduler(
    echo.GlobalRank(4), budget=64, max_depth=6, max_verify_tokens_per_req=70
)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 40), st.booleans())
def test_a_custom_tree_is_selected_from_as_a_drafted_one(seed, batch, more, two_level):
    """The best rows by path probability, whichever way the tree came in."""
    case = forest(seed, batch, 40)
    rule = echo.TwoLevel(2, 5) if two_level else echo.GlobalRank(4)
    scheduler = echo.ElasticBudgetScheduler(rule, budget=1, max_verify_tokens_per_req=70)
    live = sum(map(bool, case.tokens))
    tree = dataclasses.replace(
        case.tree, num_verify_tokens=batch + more, num_remaining=torch.tensor(batch + more - live)
    )
    packed = scheduler.pack(tree)
    check_plan(tree, packed)
    packed.validate()
    scores = []
    for b, tokens in enumerate(case.tokens):
        own = sorted(
            (case.score(b, case.path(b, column)) for column in range(1, len(tokens))), reverse=True
        )
        scores += own[:5] if two_level else own
    best = sorted(scores, reverse=True)[: batch + more - live]
    assert sorted(packed.score[packed.depth > 0].tolist(), reverse=True) == pytest.approx(best)


def test_verify_limits_and_the_schedulers_own_limit_hold():
    tokens, parents = torch.arange(100)[None], torch.arange(-1, 99)[None]
    tree = echo.SuperTree.from_arrays(tokens, parents, torch.full((1, 100), -0.1))
    assert int(NO_RULE.select(tree).sum()) == 70
    limited = echo.SuperTree.from_arrays(
        tokens, parents, torch.full((1, 100), -0.1), verify_limits=torch.tensor([66])
    )
    packed = NO_RULE.pack(limited)
    assert int(packed.indptr[-1]) == 66 and packed.mask.shape == (100, 3)
    packed.validate(chain=True)


BAD = {
    "cycle": (
        [1, 2, 3],
        [-1, 2, 1],
        r"parent: request 1, row 1: expected a row before its child, got 2, a cycle",
    ),
    "child first": (
        [1, 2, 3],
        [-1, 2, 0],
        r"parent: request 1, row 1: expected a row before its child, got 2$",
    ),
    "own parent": (
        [1, 2, 3],
        [-1, 0, 2],
        r"parent: request 1, row 2: expected a row before its child, got 2, a cycle",
    ),
    "another request": (
        [1, 2, 3],
        [-1, 0, 3],
        r"parent: request 1, row 2: expected a row of the same request, 0 to 2, got 3",
    ),
    "two roots": (
        [1, 2, 3],
        [-1, 0, -1],
        r"parent: request 1, row 2: expected a row of the same request, 0 to 2, got -1",
    ),
    "no root": ([1, 2, 3], [0, 0, 0], r"parent: request 1, row 0: expected -1 for the root, got 0"),
    "equal siblings": (
        [1, 2, 2],
        [-1, 0, 0],
        r"token: request 1, row 2: expected siblings that differ, got 2 twice under row 0",
    ),
    "negative": ([1, -2, 3], [-1, 0, 0], r"token: request 1, row 1: expected a token >= 0, got -2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_name_the_request_and_the_row(name):
    token, parent, message = BAD[name]
    good = [[1, 2, 3], [-1, 0, 1]]
    with pytest.raises(echo.EchoError, match=message):
        echo.SuperTree.from_arrays(
            torch.tensor([good[0], token]), torch.tensor([good[1], parent]), torch.zeros(2, 3)
        )


def test_bad_scores_depths_and_lengths():
    token, parent = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 0, 1]])
    build = echo.SuperTree.from_arrays
    with pytest.raises(
        echo.EchoError, match=r"log_prob: request 0, row 2: expected a log-probability, got nan"
    ):
        build(token, parent, torch.tensor([[0.0, -1.0, torch.nan]]))
    with pytest.raises(
        echo.EchoError, match=r"depth: request 0, row 2: expected 2, one below its parent, got 1"
    ):
        build(token, parent, torch.zeros(1, 3), torch.tensor([[0, 1, 1]]))
    with pytest.raises(echo.EchoError, match=r"num_nodes: request 0: expected 0 to 3 nodes, got 4"):
        build(token, parent, torch.zeros(1, 3), num_nodes=torch.tensor([4]))
    with pytest.raises(
        echo.EchoError, match=r"parent: expected int64 or int32 \[1, 3\], got int64 \[1, 2\]"
    ):
        build(token, parent[:, :2], torch.zeros(1, 3))
    with pytest.raises(echo.EchoError, match=r"num_verify_tokens: expected an int >= 1, got 0"):
        build(token, parent, torch.zeros(1, 3), num_verify_tokens=0)


# Drafters that are not beams: one call each.


def test_chain_drafter():
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(1, 0), echo.SparseGate({2: 0.5}), budget=8, max_depth=3
    )
    tokens, q = (
        torch.tensor([[[1], [2], [3]], [[4], [5], [6]]]),
        torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.3, 0.9]]).log()[..., None],
    )
    tree = scheduler.grow_positions(scheduler.begin(torch.tensor([7, 8])), tokens, q)
    packed = scheduler.pack(tree)
    assert packed.tokens.tolist() == [7, 1, 2, 3, 8, 4, 0, 0]  # request 1 fails the gate at depth 2
    packed.validate(chain=True)
    assert layouts.chains(packed).verify_lens.tolist() == [4, 2]


def test_per_position_drafter_gives_every_node_the_same_candidates():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(4), budget=5, max_depth=2)
    tokens, q = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
    tree = scheduler.grow_positions(scheduler.begin(torch.tensor([7])), tokens, q)
    packed = scheduler.pack(tree)
    assert packed.render(0).splitlines() == [
        "7         1.000  root",
        "├─ 1      0.600  width",
        "│  └─ 3   0.540  width",
        "└─ 2      0.400  width",
        "   └─ 3   0.360  width",
    ]


def test_static_template():
    template = Template.from_choices([[1], [0], [0, 1], [0, 0], [0, 0, 0]])
    assert template.parents == (-1, -1, 0, 0, 2)
    heads = torch.tensor([[[10, 11], [20, 21], [30, 31]]])
    scheduler = echo.ElasticBudgetScheduler(echo.PerRequest(6, 1))
    tree = template.fill(
        scheduler.begin(torch.tensor([7])), heads, torch.full(heads.shape, 0.5).log()
    )
    packed = scheduler.pack(tree)
    assert packed.tokens.tolist() == [7, 10, 11, 20, 21, 30]
    assert packed.parent.tolist() == [-1, 0, 0, 1, 1, 3]
    own = template.fill(
        scheduler.begin(torch.tensor([7])),
        torch.tensor([[10, 11, 20, 21, 30]]),
        torch.full((1, 5), 0.5).log(),
    )
    assert torch.equal(scheduler.pack(own).tokens, packed.tokens)
    any_order = Template(
        (-1, 0, -1, 2, 1)
    )  # children of the second root child are drafted before those of the first
    tree = any_order.fill(
        scheduler.begin(torch.tensor([7])), torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5)
    )
    scheduler.pack(tree).validate()
    for make in (torch.tensor, np.array, list):
        assert (
            Template.from_choices(
                [make(choice) for choice in ([1], [0], [0, 1], [0, 0], [0, 0, 0])]
            )
            == template
        )
        assert hash(Template(make(template.parents), make(template.candidates))) == hash(template)
    with pytest.raises(
        echo.EchoError, match="parents: node 1: expected -1 or a node before it, got 1"
    ):
        Template((-1, 1))
    with pytest.raises(echo.EchoError, match=r"choices: expected distinct paths .* got \[0, 0\]"):
        Template.from_choices([[1], [0, 0]])
    with pytest.raises(
        echo.EchoError, match=r"tokens: expected \[B, 3, 2\] or more, got \[1, 2, 2\]"
    ):
        template.fill(scheduler.begin(torch.tensor([7])), heads[:, :2], torch.zeros(1, 2, 2))


def test_ngram_trie_merges_prefixes():
    tree = echo.SuperTree.from_paths(
        torch.tensor([7, 8, 9]),
        [[[1, 2], [1, 3], [4]], [], [[5]]],
        weights=[[2, 1, 1], [], [1]],
        prior=1.0,
    )
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=1)
    packed = scheduler.pack(tree)
    assert packed.tokens.tolist() == [7, 1, 4, 2, 3, 8, 9, 5]
    assert packed.score.exp().tolist() == pytest.approx(
        [1, 3 / 5, 1 / 5, 3 / 5 * 2 / 4, 3 / 5 / 4, 1, 1, 1 / 2]
    )
    rows = (
        [torch.tensor([[1, 2], [1, 3]]), [np.array([4]), [torch.tensor(4), np.int32(5)]]],
        [torch.tensor([2.0, 1.0]), [1.0, 1.0]],
    )
    plain = [[[1, 2], [1, 3]], [[4], [4, 5]]], [[2.0, 1.0], [1.0, 1.0]]
    one, two = (
        echo.SuperTree.from_paths(torch.tensor([7, 8]), paths, weights=weights)
        for paths, weights in (rows, plain)
    )
    assert torch.equal(one.forest.token, two.forest.token) and torch.equal(one.score, two.score)
    for bad in ([[1.5]], torch.tensor([1, 2]), [["a"]]):
        with pytest.raises(echo.EchoError, match=r"paths\[0\]: expected ints"):
            echo.SuperTree.from_paths(torch.tensor([7]), [bad])
    with pytest.raises(echo.EchoError, match="weights: request 0: expected 1 weights, got 2"):
        echo.SuperTree.from_paths(torch.tensor([7]), [[[1]]], weights=[[1, 2]])


@given(policies(), st.integers(0, 10_000))
def test_a_ready_made_tree_grows_as_a_drafted_one(policy, seed):
    """Any policy, gates and commitments included: the complete tree at once gives the plan of
    the drafter.
    """
    scheduler, batch = policy
    scheduler = dataclasses.replace(scheduler, max_depth=min(scheduler.max_depth, 3))
    drafter, roots = TabularDrafter(table(20, seed), k=2), torch.arange(batch)
    drafted = scheduler.begin(roots)
    for _ in range(scheduler.max_depth):
        drafted = scheduler.grow(drafted, *drafter.draft(roots, drafted.frontier))
    tokens, parents, q = roots[:, None], [-1], torch.zeros(batch, 1)
    for node in range(7):
        children, log_probs = drafter.probabilities[tokens[:, node]].topk(2, dim=-1).indices, None
        log_probs = drafter.probabilities[tokens[:, node]].gather(1, children).log().float()
        tokens, q, parents = (
            torch.cat([tokens, children], 1),
            torch.cat([q, log_probs], 1),
            [*parents, node, node],
        )
    ready = echo.SuperTree.from_arrays(tokens, torch.tensor(parents).expand(batch, -1), q)
    grown = scheduler.grow_from(scheduler.begin(roots), ready, k=2)
    one, two = scheduler.pack(drafted), scheduler.pack(grown)
    check_plan(grown, two)
    for name in ("tokens", "parent", "indptr", "committed", "status"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.allclose(one.score, two.score)


def test_a_ready_made_tree_may_be_ragged():
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 0), echo.SparseGate({1: 0.4}), budget=9, max_depth=4
    )
    ready = echo.SuperTree.from_paths(
        torch.tensor([7, 8, 9]), [[[1, 2, 3]], [[4], [5], [6]], []], prior=1.0
    )
    grown = scheduler.grow_from(scheduler.begin(torch.tensor([7, 8, 9])), ready, k=4)
    packed = scheduler.pack(grown)
    assert packed.tokens.tolist() == [7, 1, 2, 3, 8, 9, 0, 0, 0]
    assert packed.status.tolist() == [
        echo.tree.Status.ACTIVE,
        echo.tree.Status.TRUNCATED,
        echo.tree.Status.EXHAUSTED,
    ]
    assert packed.invalid.tolist() == [0, 0, 0]
    with pytest.raises(echo.EchoError, match=r"tree.depth: expected an int equal to 0, got 3"):
        scheduler.grow_from(grown, ready, k=4)
    with pytest.raises(echo.EchoError, match=r"ready.batch: expected an int equal to 2, got 3"):
        scheduler.grow_from(scheduler.begin(torch.tensor([7, 8])), ready, k=4)


def test_a_first_layer_that_is_scored_already():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), budget=12, max_depth=3)
    drafter = TabularDrafter(table(20, seed=1), k=3)
    plain = scheduler.begin(torch.tensor([3, 4]))
    tokens, q = drafter.draft(torch.arange(2), plain.frontier)
    plain = scheduler.grow(plain, tokens, q)
    ahead = scheduler.begin(torch.tensor([3, 4]), first_layer=(tokens[:, 0], q[:, 0]))
    assert torch.equal(scheduler.select(plain), scheduler.select(ahead))
    with pytest.raises(
        echo.EchoError,
        match=r"first_layer\[1\]: expected float32 .* \[2, 3\], got float32 \[2, 2\]",
    ):
        scheduler.begin(torch.tensor([3, 4]), first_layer=(tokens[:, 0], q[:, 0, :2]))


def test_state_travels_with_the_frontier():
    """A drafter's own path, carried by the reorder list, is the tree's path."""
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=24, max_depth=3)
    drafter, tree = TabularDrafter(table(20, seed=1), k=4), scheduler.begin(torch.tensor([3, 4]))
    state = tree.frontier.token[..., None]
    for _ in range(3):
        tree = scheduler.grow(tree, *drafter.draft(torch.arange(2), tree.frontier))
        state = torch.cat([tree.frontier.inherit(state), tree.frontier.token[..., None]], dim=-1)
    for b in range(2):
        for w, place in enumerate(tree.frontier.index[b].tolist()):
            path, index = [], place
            for layer in reversed(tree.layers):
                path.append(int(layer.token[b, index]))
                index = int(layer.parent[b, index])
            assert state[b, w].tolist() == path[::-1]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 30))
def test_layer_statistics_are_the_best_path_and_the_mass_of_the_best(seed, batch, beam):
    """What gates see, from the paths themselves."""
    case = forest(seed, batch, 30)
    for layer in case.tree.layers:
        for b in range(batch):
            paths = [case.path(b, column) for column in range(len(case.tokens[b]))]
            scores = sorted(
                (case.score(b, path) for path in paths if len(path) == layer.depth + 1),
                reverse=True,
            )
            assert float(layer.log_confidence[b]) == (scores[0] if scores else -torch.inf)
            mass = sum(math.exp(score) for score in scores[:beam])
            assert float(layer.log_mass(beam)[b].exp()) == pytest.approx(mass, rel=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_an_engines_handles_reach_the_packed_rows(seed, batch):
    """Whatever an engine keeps for each node of the forest (a KV slot, a hidden-state row),
    gathered by ``packed.node``.
    """
    case = forest(seed, batch, 30, pads=2)
    nodes = case.tree.forest
    handles = torch.arange(nodes.token.numel()).view_as(nodes.token) * 7  # [B, T]
    real = case.packed.request < batch
    rows, request = case.packed.node[real], case.packed.request[real].long()
    assert torch.equal(handles.flatten()[rows] // 7, rows)
    assert torch.equal(rows // nodes.token.shape[1], request)
    assert torch.equal(nodes.token.flatten()[rows], case.packed.tokens[real])
    above = nodes.parent.flatten()[rows] + request * nodes.token.shape[1]
    first = case.packed.indptr[request].long()
    drafted = case.packed.depth[real] > 0
    assert torch.equal(
        above[drafted], case.packed.node[(first + case.packed.parent[real])[drafted]]
    )


# The step in an engine's cache.


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.data())
def test_slots_and_compaction_leave_exactly_the_accepted_text(seed, batch, page, data):
    case = forest(seed, batch, 30, pads=3)
    packed, context = (
        case.packed,
        torch.tensor([data.draw(st.integers(0, 20)) for _ in range(batch)]),
    )
    target = packed.tokens.clone()
    for row in range(packed.num_rows):
        below = [
            c
            for c in range(packed.num_rows)
            if packed.request[c] == packed.request[row]
            and packed.parent[c] == packed.local_row[row]
        ]
        target[row] = (
            packed.tokens[data.draw(st.sampled_from(below))]
            if below and packed.request[row] < batch
            else 5000
        )
    accepted = echo.accept(packed, target)
    pages = 64 // page
    page_table = (torch.randperm(batch * pages) + 1).view(batch, pages).int()
    assert page_table.min() == 1  # page 0 is the padding's
    cache = torch.full(((batch * pages + 1) * page,), -1)
    for b in range(batch):
        before = slot_mapping(torch.arange(int(context[b])), torch.tensor(b), page_table, page, 0)
        cache[before] = 10_000 + torch.arange(int(context[b]))
    slot = packed.slot_mapping(context, page_table, page, 0)
    assert (slot[packed.request == batch] == 0).all() and len(
        set(slot[packed.request < batch].tolist())
    ) == int(packed.indptr[-1])
    cache[slot] = packed.tokens
    position = packed.positions(context)
    lists = compact(packed, accepted, context, page_table=page_table, page_size=page, pad_slot_id=0)
    written = cache.clone()  # by an engine that writes rows where they belong, and copies none
    written[lists.target.flatten()] = packed.tokens[lists.gather.flatten()]
    cache[lists.target.flatten()] = cache[lists.source.flatten()]
    assert torch.equal(written[1:], cache[1:])  # slot 0 is pad_slot_id
    flat = compact(packed, accepted, context)
    assert (flat.source >= flat.target).all()
    own = torch.full(
        (batch, 64), -1
    )  # a contiguous cache of each request, filled and moved as the docstring says
    for b in range(batch):
        own[b, : context[b]] = 10_000 + torch.arange(int(context[b]))
    real = packed.request < batch
    own[
        packed.request[real].long(), (context[packed.request[real].long()] + packed.local_row[real])
    ] = packed.tokens[real]
    spare = compact(packed, accepted, context, pad_slot_id=63)
    written = own.scatter(1, spare.target, packed.tokens[spare.gather])
    own.scatter_(1, flat.target, own.gather(1, flat.source))
    assert torch.equal(written[:, :63], own[:, :63])
    assert torch.equal(lists.accept_index.long(), accepted.rows)
    assert torch.equal(lists.prefix_lens, context + accepted.num_emitted)
    for b in range(batch):
        rows = [row for row in accepted.rows[b].tolist() if row >= 0]
        text = [10_000 + i for i in range(int(context[b]))] + packed.tokens[rows].tolist()
        where = slot_mapping(
            torch.arange(int(lists.prefix_lens[b])), torch.tensor(b), page_table, page, 0
        )
        assert cache[where].tolist() == text
        assert own[b, : len(text)].tolist() == text
        assert lists.positions[b, : len(rows)].tolist() == position[rows].tolist()
        assert lists.gather[b, : len(rows)].tolist() == rows and lists.valid[b].sum() == len(rows)


@pytest.mark.parametrize("backend", ["torch", "triton"] if tiles.interpreted() else ["torch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_keep_their_dtype_from_step_to_step(dtype, backend):
    """Attention takes int32 only: what ``compact`` returns goes into the next step as it is."""
    case = forest(3, 3, 20, empty=False)
    accepted = echo.accept(case.packed, case.packed.tokens.roll(-1))
    lens = torch.tensor([4, 0, 9], dtype=dtype)
    space = echo.Workspace(NO_RULE, 3, k=1, num_verify_tokens=64)
    with kernels.using(backend):
        moves = compact(case.packed, accepted, lens)
        assert moves.prefix_lens.dtype == dtype
        assert torch.equal(moves.prefix_lens, (lens + accepted.num_emitted).to(dtype))
        out = dataclasses.replace(moves, prefix_lens=torch.full_like(lens, 99))
        assert compact(case.packed, accepted, lens, out=out).prefix_lens is out.prefix_lens
        assert torch.equal(out.prefix_lens, moves.prefix_lens)
        step = dataclasses.replace(accepted, **{n: getattr(accepted, n)[:, :7] for n in PATHS})
        assert torch.equal(space.compact(case.packed, step, lens).prefix_lens, moves.prefix_lens)
        other = torch.int64 if dtype == torch.int32 else torch.int32
        wrong = dataclasses.replace(out, prefix_lens=out.prefix_lens.to(other))
        with pytest.raises(echo.EchoError, match=r"out\.prefix_lens: expected int"):
            compact(case.packed, accepted, lens, out=wrong)


def test_slots_beyond_the_page_table_are_pad_slot_id():
    case = forest(3, 2, 20, empty=False)
    slot = case.packed.slot_mapping(torch.tensor([3, 3]), torch.tensor([[1], [2]]), 4, 0)
    assert slot.tolist() == [
        4 * (1 + int(b)) + 3 if local == 0 else 0
        for b, local in zip(case.packed.request, case.packed.local_row, strict=True)
    ]
    with pytest.raises(
        echo.EchoError, match=r"page_table: expected int64 or int32 \[B, pages\], got float32 \[2\]"
    ):
        case.packed.slot_mapping(torch.tensor([3, 3]), torch.zeros(2), 4, 0)
    with pytest.raises(
        echo.EchoError, match=r"prefix_lens: expected int64 or int32 \[2\], got int64 \[3\]"
    ):
        case.packed.positions(torch.arange(3))


def test_slots_to_reserve_before_the_step():
    assert (
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5).num_lookahead_slots(8) == 5
    )
    assert echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), budget=32).num_lookahead_slots(8) == 32
    assert echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), budget=512).num_lookahead_slots(8) == 64


def through_a_buffer(packed):
    words = packed.mask.shape[1]
    buffer = packed.to_buffer()
    assert buffer.dtype == torch.int32 and buffer.is_contiguous()
    back = echo.PackedTree.from_buffer(
        buffer,
        batch=packed.batch,
        num_rows=packed.num_rows,
        words=words,
        max_depth=packed.max_depth,
    )
    for field in dataclasses.fields(packed):
        one, two = getattr(packed, field.name), getattr(back, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two) and one.dtype == two.dtype, field.name
        else:
            assert one == two
    with pytest.raises(echo.EchoError, match="buffer: expected int32"):
        echo.PackedTree.from_buffer(
            buffer[1:],
            batch=packed.batch,
            num_rows=packed.num_rows,
            words=words,
            max_depth=packed.max_depth,
        )
    return buffer


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_buffer_carries_every_bit(seed, batch):
    packed = forest(seed, batch, 80, pads=2).packed
    assert len(through_a_buffer(packed)) == buffer_size(
        batch, packed.num_rows, packed.mask.shape[1]
    )


def test_a_buffer_carries_the_histogram_that_later_steps_are_planned_from():
    scheduler = echo.ElasticBudgetScheduler.throughput_optimal(
        CALIBRATION, echo.CostModel([1, 8, 16, 32], [1.0, 1.1, 1.5, 2.0]), beam=2
    )
    packed = scheduler.pack(grow_all(scheduler, torch.arange(3), k=3, seed=0, num_verify_tokens=12))
    assert packed.acceptance_histogram is not None and packed.acceptance_histogram.sum() > 0
    through_a_buffer(packed)


def test_ranks_whose_scores_differ_follow_one_plan():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=9, max_depth=3)
    first, second = (grow_all(scheduler, torch.arange(3), k=3, seed=seed) for seed in (1, 2))
    sent = []
    led = scheduler.pack(first, sync=lambda buffer: sent.append(buffer) or buffer)
    followed = scheduler.pack(second, sync=lambda _: sent[0])
    assert torch.equal(led.tokens, followed.tokens) and torch.equal(led.mask, followed.mask)
    assert torch.equal(led.tokens, scheduler.pack(first).tokens)


def test_an_idle_rank_takes_part_with_pads():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 2), budget=4, max_depth=2)
    tree = scheduler.grow(
        scheduler.begin(torch.zeros(0, dtype=torch.int64)),
        torch.zeros(0, 1, 3, dtype=torch.int64),
        torch.zeros(0, 1, 3),
    )
    packed = scheduler.pack(tree)
    packed.validate()
    assert packed.num_rows == 4 and packed.batch == 0
    context = torch.zeros(0, dtype=torch.int64)
    assert (
        packed.positions(context).tolist()
        == packed.slot_mapping(context, torch.zeros(0, 3).int(), 4, 0).tolist()
        == [0] * 4
    )
    assert layouts.flashinfer(packed, context, 4).indptr.tolist() == [0]
    assert layouts.sglang(packed, 4, context).retrive_index.shape == (0, 4)
    assert layouts.chains(packed).tokens.tolist() == [0] * 4
    accepted = echo.accept(packed, torch.zeros(4, dtype=torch.int64))
    assert accepted.tokens.shape == accepted.rows.shape == (
        0,
        2,
    ) and accepted.num_emitted.shape == accepted.bonus.shape == (0,)
    assert compact(packed, accepted, context).source.shape == (0, 2)


def test_a_layer_without_candidates_is_not_attached():
    none = torch.zeros(1, 0, dtype=torch.int64)
    roots = echo.SuperTree.from_paths(torch.tensor([7]), [[]])
    with pytest.raises(echo.EchoError, match=r"tokens.shape\[1\]: expected an int >= 1, got 0"):
        roots.attach([(none, none, none.float())])
