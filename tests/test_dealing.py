"""Dealing rows: the partial selections against a plain loop over all nodes in the declared order."""

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


def dealt(tree, cost, cap, left):
    """One node after the other: cheapest first, then the shallower, the lower request, the earlier candidate."""
    forest = tree.forest
    costs, depths, bought = cost.tolist(), forest.depth.tolist(), forest.committed.tolist()
    nodes = [(costs[b][t], depths[t], b, t) for b in range(tree.batch) for t in range(len(depths))]
    caps, rest, chosen = cap.tolist(), int(left), torch.zeros_like(forest.committed)
    for price, _, b, t in sorted(nodes):
        if price < UNSELECTABLE and not bought[b][t] and rest > 0 and caps[b] > 0:
            chosen[b, t] = True
            caps[b], rest = caps[b] - 1, rest - 1
    return chosen


@st.composite
def forests(draw):
    """A grown forest with ties, faults, dead requests and purchases, and the cost that a rule gives its nodes."""
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
    caps = torch.tensor(draw(st.lists(st.integers(-2, 40), min_size=batch, max_size=batch)))
    return tree, rank.cost(tree), caps.clamp(max=tree.max_verify_tokens_per_req)


@given(forests(), st.integers(-2, 80), st.integers(0, 90))
def test_deals_as_one_node_after_the_other(case, left, slack):
    tree, cost, cap = case
    rows = max(left, 1) + slack
    assert torch.equal(
        select_cheapest(tree, cost, cap, torch.tensor(left), rows), dealt(tree, cost, cap, left)
    )


@given(forests(), st.integers(0, 80))
def test_what_is_dealt_is_closed_under_parents_with_what_is_bought(case, left):
    tree, cost, cap = case
    held = select_cheapest(tree, cost, cap, torch.tensor(left), left + 1) | tree.forest.committed
    assert torch.equal(held & held.gather(1, tree.forest.parent), held)


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
    cost, cap = scheduler.rule.cost(tree), torch.arange(64) % 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chosen = select_cheapest(tree, cost, cap, tree.num_remaining, tree.num_verify_tokens)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(chosen, dealt(tree, cost, cap, tree.num_remaining))
    dead = scheduler.begin(torch.arange(0))
    assert select_cheapest(
        replace(dead, num_verify_tokens=4),
        torch.zeros(0, 1, dtype=torch.int32),
        cap[:0],
        dead.num_remaining,
        4,
    ).shape == (0, 1)
