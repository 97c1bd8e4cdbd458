"""The checks find seeded bugs, pass what is right, and show a plan that a person can read."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import CALIBRATION
from echo.budget.rules import select_cheapest
from echo.kernels.codes import UNSELECTABLE
from echo.testing import (
    PlanError,
    Scenario,
    check_plan,
    check_scheduler,
    check_step,
    scenarios,
)
from echo.testing.check import DEFAULT
from echo.tree.supertree import SuperTree, cost_bits

DEPTH_FIRST = (*DEFAULT, "depth_first")
ALONE = (*DEFAULT, "batch_invariant")
RANKED = (*DEFAULT, "work_conserving", "optimal")
COST = echo.CostModel((1, 8, 64), (1.0, 1.0, 4.0), 0.02, tiers=(4, 8, 16, 32, 64))
POLICIES = {
    "paper": (echo.ElasticBudgetScheduler.paper(CALIBRATION, k_max=12, beam=2), DEPTH_FIRST),
    "narrow": (echo.ElasticBudgetScheduler(echo.TwoLevel(1, 0), None, 12, 4), DEPTH_FIRST),
    "global": (echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3), RANKED),
    "calibrated": (
        echo.ElasticBudgetScheduler(echo.GlobalRank(3, CALIBRATION), None, 12, 3),
        RANKED,
    ),
    "throughput-optimal": (
        echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, COST),
        RANKED,
    ),
    "eagle": (
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5, beam=2, max_depth=3),
        ALONE,
    ),
    "ddd": (
        echo.ElasticBudgetScheduler(
            echo.PerRequest(5, 2), echo.BeamMassGate((2,), -1.0, 2), None, 3
        ),
        ALONE,
    ),
    "small masks": (
        echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3, max_verify_tokens_per_req=3),
        RANKED,
    ),
    "plain": (echo.ElasticBudgetScheduler.autoregressive(), ALONE),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_librarys_own_policies_pass(name):
    scheduler, claims = POLICIES[name]
    check_scheduler(scheduler, claims=claims, examples=20)


class Overshoot(echo.TwoLevel):
    """The published pseudo-code: a request that finds any budget left takes a whole layer."""

    def commit(self, layer, passed, limits, num_remaining):
        return super().commit(
            layer,
            passed,
            limits,
            torch.where(num_remaining > 0, num_remaining + self.beam - 1, num_remaining),
        )


class WidthFirst(echo.TwoLevel):
    """Half of the budget is kept back for breadth."""

    def commit(self, layer, passed, limits, num_remaining):
        return super().commit(layer, passed, limits, num_remaining // 2)


class UnstableTie(echo.GlobalRank):
    """Equal candidates in the order that a sort happened to leave them in: here the last first."""

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        forest = tree.forest
        late = 64 * forest.depth + 63 - torch.arange(len(forest.depth)) % 64
        cost = torch.where(
            torch.isfinite(forest.score), cost_bits(forest.score) + late, UNSELECTABLE
        )
        return select_cheapest(tree, cost.int(), limits, num_remaining, num_verify_tokens)


class Orphan(echo.GlobalRank):
    """Nodes ranked by their own probability, not by their path's."""

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        forest = tree.forest
        own = forest.score - forest.score.gather(1, forest.parent)
        return select_cheapest(
            tree,
            cost_bits(torch.where(forest.depth > 0, own, 0.0)),
            limits,
            num_remaining,
            num_verify_tokens,
        )


class LostRoot(echo.ElasticBudgetScheduler):
    """Requests that got nothing are num_remaining out of the step."""

    def select(self, tree):
        selected = super().select(tree)
        return selected & (selected.sum(dim=1, keepdim=True) > 1)


class Moody(echo.GlobalRank):
    """Decides otherwise every other time."""

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return super().select(
            tree, limits, num_remaining - self.__dict__["calls"] % 2, num_verify_tokens
        )


class Peeking(echo.TwoLevel):
    """Syncs what remains to the host."""

    def commit(self, layer, passed, limits, num_remaining):
        return (
            super().commit(layer, passed, limits, num_remaining)
            if int(num_remaining)
            else torch.zeros_like(layer.committed)
        )


class Greedy(echo.GlobalRank):
    """Does not know of limits, and believes a NaN."""

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        wanted = ~tree.forest.committed & tree.layers[0].drafted[:, None]
        return wanted & (wanted.flatten().cumsum(0).view_as(wanted) <= num_remaining)


class FirstCome(echo.GlobalRank):
    """Serves request 0 first, whatever the scores."""

    def select(self, tree, limits, num_remaining, num_verify_tokens):
        wanted = ~tree.forest.committed & torch.isfinite(tree.forest.score)
        wanted &= wanted.cumsum(1) <= limits[:, None]
        return wanted & (wanted.flatten().cumsum(0).view_as(wanted) <= num_remaining)


class Clumsy(echo.GlobalRank):
    """Raises where a layer is narrow."""

    def frontier(self, layer):
        index = layer.score.topk(self.beam, dim=1).indices.sort(dim=1).values
        return index, torch.isfinite(layer.score.gather(1, index))


def scheduler_of(rule):
    return echo.ElasticBudgetScheduler(rule, echo.SparseGate({1: 0.4}), 12, 3)


@pytest.mark.parametrize(
    ("scheduler", "invariant"),
    [
        (scheduler_of(Overshoot(2, 4)), "budget"),
        (LostRoot(echo.TwoLevel(2, 4), None, 12, 3), "roots"),
        (scheduler_of(UnstableTie(2)), "ties"),
        (scheduler_of(WidthFirst(2, 4)), "depth_first"),
        (scheduler_of(Orphan(2)), "closed|budget"),
        (scheduler_of(Moody(2)), "layout|deterministic"),
        (scheduler_of(Peeking(2, 4)), "sync_free"),
        (scheduler_of(Greedy(2)), "limits|finite"),
        (scheduler_of(FirstCome(2)), "permutation"),
        (scheduler_of(Clumsy(2)), "runs"),
    ],
    ids=lambda value: type(getattr(value, "rule", value)).__name__,
)
def test_seeded_bugs_are_found(scheduler, invariant):
    with pytest.raises(PlanError) as caught:
        check_scheduler(scheduler, claims=DEPTH_FIRST)
    assert caught.value.invariant in invariant.split("|")
    assert caught.value.scenario.batch <= 3, "not shrunk"
    with pytest.raises(PlanError):  # the step that is handed back shows it again
        check_step(scheduler, caught.value.scenario, claims=DEPTH_FIRST)


def test_the_report_is_a_small_table():
    with pytest.raises(PlanError) as caught:
        check_scheduler(scheduler_of(Overshoot(2, 4)))
    report = str(caught.value).splitlines()
    print(caught.value)
    assert report[0] == "budget: expected at most num_verify_tokens nodes selected"
    assert report[1].strip().startswith("got ")
    assert report[6] == "request  row  token  parent  depth  path p  during  status"
    assert sum("<- budget" in line for line in report) == 1
    assert len(report) < 16


@pytest.mark.parametrize(
    ("scheduler", "claim"),
    [
        (scheduler_of(echo.TwoLevel(1, 0)), "work_conserving"),
        (scheduler_of(echo.TwoLevel(2, 4)), "optimal"),
        (scheduler_of(echo.TwoLevel(2, 4)), "batch_invariant"),
        (echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3), "batch_invariant"),
    ],
)
def test_false_claims_are_refuted(scheduler, claim):
    with pytest.raises(PlanError) as caught:
        check_scheduler(scheduler, claims=(claim,))
    assert caught.value.invariant == claim


@pytest.mark.parametrize(
    "make",
    [
        scenarios.burst,
        scenarios.one_confident_many_doubtful,
        scenarios.all_equal,
        scenarios.nan_storm,
    ],
)
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_scenarios_are_planned_right(make, batch):
    check_step(scheduler_of(echo.TwoLevel(2, 4)), make(batch), claims=DEPTH_FIRST)
    check_step(
        echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3), make(batch), claims=RANKED
    )


def test_scenarios_are_what_they_say():
    rank = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 12, 3)
    served = scenarios.one_confident_many_doubtful(8).plan(rank).selected.sum(1).tolist()
    assert served[0] == max(served) > max(served[1:])
    # nine tokens beyond the roots, of depth 1: three candidates each of the first three requests
    assert scenarios.all_equal(8).plan(rank).selected.sum(1).tolist() == [4, 4, 4, 1, 1, 1, 1, 1]
    assert int(scenarios.burst(8).plan(rank).selected.sum()) == 9
    storm = scenarios.nan_storm(8).plan(rank)
    assert (
        int(storm.tree.invalid.sum()) > 0
        and torch.isfinite(storm.tree.forest.score[storm.selected]).all()
    )


@st.composite
def trees(draw):
    """Whole trees: siblings in any order, empty lanes."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    nodes = range(max([1, *sizes]))
    above = [st.integers(min(node - 1, 0), node - 1) for node in nodes]  # a root's is -1
    parent = torch.tensor([[draw(each) for each in above] for _ in sizes])
    p = torch.tensor([[draw(st.integers(1, 8)) / 8 for _ in nodes] for _ in sizes])
    token = torch.arange(len(nodes)).expand(len(sizes), -1)  # siblings differ
    count = max(sum(size > 0 for size in sizes), 1) + draw(st.integers(0, 8))
    limits = {"num_nodes": torch.tensor(sizes), "num_verify_tokens": count}
    return SuperTree.from_arrays(token, parent, p.log(), **limits)


@st.composite
def logs(draw):
    """Warm-up logs of any size, also empty: confidences with ties, depths without an entry."""
    entry = st.tuples(st.integers(1, 4), st.integers(0, 16), st.booleans())
    columns = np.array(draw(st.lists(entry, max_size=60)), dtype=np.int64).reshape(-1, 3).T
    return echo.WarmupLog.from_arrays(columns[0], columns[1] / 16, columns[2] > 0)


@st.composite
def cost_curves(draw):
    """Flat, with a knee, steep, of one point; with tiers, or free drafts, or not."""
    step = st.tuples(st.integers(1, 64), st.integers(0, 8))
    tokens, rises = np.array(draw(st.lists(step, min_size=1, max_size=6))).cumsum(axis=0).T
    seconds = (1e-3 * (4 + rises)).tolist()
    layer, token = draw(st.integers(0, 9)) * 1e-4, draw(st.integers(0, 9)) * 1e-5
    tiers = sorted(draw(st.sets(st.integers(1, 512), max_size=4)))
    return echo.CostModel(tuple(tokens.tolist()), tuple(seconds), layer, token, tuple(tiers))


@given(trees(), st.sampled_from([echo.GlobalRank(2), echo.TwoLevel(2, 3)]))
def test_drawn_trees_are_planned_right(tree, rule):
    check_plan(tree, echo.ElasticBudgetScheduler(rule, budget=64).pack(tree))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda x: x + 1),
        ("tokens", lambda x: x.flip(0)),
        ("node", lambda x: x.roll(1)),
        ("node", lambda x: x.masked_fill(x == x.max(), 63)),
        ("score", lambda x: x - 0.1),
        ("committed", lambda x: ~x),
        ("depth", lambda x: x + 1),
        ("parent", lambda x: x.clamp(max=0)),
        ("mask", lambda x: x | 2),
        ("indptr", lambda x: x.clamp(max=6)),
    ],
)
def test_a_step_that_is_not_the_plan_of_its_tree_is_refused(name, change):
    plan = replace(scenarios.one_confident_many_doubtful(3), num_verify_tokens=12).plan(
        scheduler_of(echo.TwoLevel(2, 4))
    )
    check_plan(plan.tree, plan.packed)
    with pytest.raises(echo.EchoError, match=r"^[\w., ]+: "):
        check_plan(plan.tree, replace(plan.packed, **{name: change(getattr(plan.packed, name))}))
    fewer = replace(plan.tree, verify_limits=plan.tree.verify_limits.clamp(max=1))
    with pytest.raises(echo.EchoError, match=r"^packed.indptr: expected what the tree says"):
        check_plan(fewer, plan.packed)


@given(logs())
def test_drawn_logs_survive_the_round_trip_through_histograms(log):
    counts = echo.gating.ConfidenceHistograms.of(log)
    assert counts.rows == len(log)


@given(cost_curves(), st.integers(1, 400))
def test_drawn_cost_curves_never_fall(cost, rows):
    assert cost(rows + 1) >= cost(rows) > 0
    assert cost.round_up(rows) >= rows
    assert echo.CostModel.from_json(cost.to_json()) == cost


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.skipif(TORCH < (2, 13), reason="vmap lacks a rule for view(dtype)")
def test_fuzzing_finds_what_check_scheduler_finds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    fuzz = importlib.import_module("fuzz")
    monkeypatch.setattr(fuzz, "ROUND", 64)
    rng = np.random.default_rng(0)
    maps = fuzz.calibration(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            fuzz.Round.draw(rng, maps).check()
        tight = [
            r
            for r in (fuzz.Round.draw(rng, maps) for _ in range(40))
            if r.budget is not None and 0 < r.budget - r.live.shape[1] < 3
        ]
        monkeypatch.setattr(
            fuzz, "check_step", lambda *_, **__: None
        )  # the masks alone, which see all plans
        bugged = [
            replace(
                r,
                scheduler=replace(r.scheduler, rule=Overshoot(3, 2), max_verify_tokens_per_req=70),
            )
            for r in tight
        ]
        with pytest.raises(AssertionError, match=r"^budget: "):
            any(drawn.check() for drawn in bugged)


def test_bad_input_names_the_argument(monkeypatch):
    scheduler = scheduler_of(echo.TwoLevel(2, 4))
    with pytest.raises(
        echo.EchoError, match=r"claims: expected some of .*'depth_first'.*, got 'fair'"
    ):
        check_scheduler(scheduler, claims=("fair",))
    with pytest.raises(echo.EchoError, match=r"examples: expected an int >= 1, got 0"):
        check_scheduler(scheduler, examples=0)
    with pytest.raises(echo.EchoError, match=r"root_tokens, log_probs: expected tokens .* V = 2"):
        replace(scenarios.burst(2), log_probs=torch.zeros(1, 2, 3))
    with pytest.raises(echo.EchoError, match=r"live: expected bool \[2\]"):
        Scenario(
            torch.zeros(2, dtype=torch.int64),
            torch.ones(2),
            torch.ones(2, dtype=torch.int64),
            torch.zeros(1, 2, 1),
        )
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(
        echo.EchoError,
        match=r"hypothesis: expected it installed \(pip install 'echo-specdec\[kit\]'\)",
    ):
        check_scheduler(scheduler)
