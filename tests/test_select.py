"""Selection of the cheapest nodes against a plain loop over all nodes in the declared order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION, grow_all
from echo.budget.rules import select_cheapest
from echo.kernels.codes import UNSELECTABLE


def selected(tree, cost, limit, remaining):
    """Nodes one by one: by cost, then depth, request, candidate."""
    forest = tree.forest
    costs, depths, committed = cost.tolist(), forest.depth.tolist(), forest.committed.tolist()
    nodes = [(costs[b][t], depths[t], b, t) for b in range(tree.batch) for t in range(len(depths))]
    limits, rest, chosen = limit.tolist(), int(remaining), torch.zeros_like(forest.committed)
    for own, _, b, t in sorted(nodes):
        if own < UNSELECTABLE and not committed[b][t] and rest > 0 and limits[b] > 0:
            chosen[b, t] = True
            limits[b], rest = limits[b] - 1, rest - 1
    return chosen


@st.composite
def forests(draw):
    """A grown forest with ties, faults, pad requests and commits, and its costs by a rule."""
    batch, beam, depth = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rule = draw(
        st.sampled_from(
            [echo.GlobalRank(beam), echo.GlobalRank(beam, CALIBRATION), echo.TwoLevel(beam, 3)]
        )
    )
    rows = batch + draw(st.integers(0, 60))
    scheduler = echo.ElasticBudgetScheduler(
        rule, budget=rows, max_depth=depth, max_verify_tokens_per_req=draw(st.sampled_from([3, 64]))
    )
    live = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    seed, spoil, ties = (
        draw(st.integers(0, 10_000)),
        draw(st.sampled_from([0.0, 0.3])),
        draw(st.booleans()),
    )
    tree = grow_all(
        scheduler, torch.arange(batch), k=3, seed=seed, spoil=spoil, ties=ties, live=live
    )
    rank = rule if isinstance(rule, echo.GlobalRank) else echo.GlobalRank(beam)
    limits = torch.tensor(draw(st.lists(st.integers(-2, 40), min_size=batch, max_size=batch)))
    return tree, rank.cost(tree), limits.clamp(max=tree.max_verify_tokens_per_req)


@given(forests(), st.integers(-2, 80), st.integers(0, 90))
def test_selects_as_one_node_after_the_other(case, remaining, slack):
    tree, cost, limit = case
    rows = max(remaining, 1) + slack
    assert torch.equal(
        select_cheapest(tree, cost, limit, torch.tensor(remaining), rows),
        selected(tree, cost, limit, remaining),
    )


@given(forests(), st.integers(0, 80))
def test_selected_and_committed_nodes_are_closed_under_parents(case, remaining):
    tree, cost, limit = case
    chosen = select_cheapest(tree, cost, limit, torch.tensor(remaining), remaining + 1)
    both = chosen | tree.forest.committed
    assert torch.equal(both & both.gather(1, tree.forest.parent), both)


def test_equal_costs_go_to_the_shallower_then_the_lower_request_then_the_earlier_candidate():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=4 + 9, max_depth=2)
    tree = scheduler.begin(torch.arange(4))
    for _ in range(2):
        tree = scheduler.grow(
            tree,
            torch.arange(2).expand(4, tree.frontier.token.shape[1], 2),
            torch.zeros(4, tree.frontier.token.shape[1], 2),
        )
    # nine rows: all eight of depth 1, then one of depth 2, which is request 0's first
    assert scheduler.select(tree).sum(dim=1).tolist() == [4, 3, 3, 3]
    assert scheduler.select(tree)[0].tolist() == [True, True, True, True, False, False, False]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_large_forests_and_threads(threads, calibration):
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(8, calibration), budget=300, max_depth=3, max_verify_tokens_per_req=20
    )
    tree = grow_all(scheduler, torch.arange(64), k=8, seed=threads, spoil=0.05, ties=True)
    cost, limit = scheduler.rule.cost(tree), torch.arange(64) % 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chosen = select_cheapest(tree, cost, limit, tree.num_remaining, tree.num_verify_tokens)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(chosen, selected(tree, cost, limit, tree.num_remaining))
    dead = scheduler.begin(torch.arange(0))
    assert select_cheapest(
        replace(dead, num_verify_tokens=4),
        torch.zeros(0, 1, dtype=torch.int32),
        limit[:0],
        dead.num_remaining,
        4,
    ).shape == (0, 1)
