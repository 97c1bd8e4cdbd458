"""Counters of a serving loop: what they count, that they add up, that nothing is read back
before somebody asks.
"""

from __future__ import annotations

import itertools
import urllib.request
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from conftest import grow_all, policies
from echo.testing import TabularDrafter, TabularTarget, blurred, table


def observed(scheduler, tree, target=None):
    packed = scheduler.pack(tree)
    accepted = echo.accept(
        packed, torch.zeros(packed.num_rows, dtype=torch.int64) if target is None else target
    )
    return packed, accepted, echo.StepStats.empty().observe(packed, accepted).read()


def layer(*log_probs):
    return torch.tensor(log_probs)[:, None]


def test_released_tokens_are_reassigned_where_the_budget_is_shared():
    """12 rows for 3 requests: a share of 4. The third fails the gate; of its 3 released rows
    both others take one each, one is a pad.
    """
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 0), echo.SparseGate({1: 0.5}), budget=12, max_depth=2
    )
    tree = scheduler.begin(torch.tensor([1, 2, 3]))
    tree = scheduler.grow(
        tree,
        torch.tensor([[[4, 5]], [[4, 5]], [[4, 5]]]),
        layer([-0.1, -2.4], [-0.2, -2.0], [-1.5, -1.6]),
    )
    tree = scheduler.grow(
        tree, torch.tensor([[[6, 7], [8, 9]]] * 3), torch.tensor([[[-0.1, -2.0], [-0.3, -1.0]]] * 3)
    )
    packed, _, counts = observed(scheduler, tree)
    assert packed.indptr.diff().tolist() == [5, 5, 1]
    assert (counts.steps, counts.layers, counts.requests) == (1, 2, 3)
    assert (counts.verify_tokens, counts.draft_tokens, counts.pad_tokens) == (11, 8, 1)
    assert (counts.truncated, counts.starved) == (1, 0)
    assert (counts.released, counts.reassigned) == (3, 2)


def test_a_budget_for_each_request_reassigns_nothing():
    scheduler = echo.ElasticBudgetScheduler(
        echo.PerRequest(3, 2), echo.BeamMassGate((1,), -0.5, 1), None, 2
    )
    tree = scheduler.begin(torch.tensor([1, 2]))
    tree = scheduler.grow(tree, torch.tensor([[[4]], [[4]]]), layer([-0.1], [-0.9]))
    tree = scheduler.grow(tree, torch.tensor([[[6]]] * 2), layer([-0.1], [-0.1]))
    packed, _, counts = observed(scheduler, tree)
    assert packed.indptr.diff().tolist() == [3, 2]
    assert (counts.truncated, counts.released, counts.reassigned, counts.pad_tokens) == (1, 1, 0, 1)


def test_the_remainder_of_an_even_split_is_not_called_reassigned():
    """5 rows for 2 requests: a share of 2, one row over. The gate stops the first one; the
    second's third row is the one left over.
    """
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 0), echo.SparseGate({1: 0.5}), budget=5, max_depth=1
    )
    tree = scheduler.begin(torch.tensor([1, 2]))
    tree = scheduler.grow(
        tree, torch.tensor([[[4, 5]], [[4, 5]]]), layer([-1.4, -1.5], [-0.1, -2.5])
    )
    packed, _, counts = observed(scheduler, tree)
    assert packed.indptr.diff().tolist() == [1, 3]
    assert (counts.released, counts.reassigned, counts.pad_tokens) == (1, 0, 1)


def test_starved_invalid_and_empty_requests():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(1, 0), budget=4, max_depth=1)
    tree = scheduler.begin(torch.tensor([1, 2, 3, 4]), live=torch.tensor([True, True, True, False]))
    scores = layer([-0.1, float("nan")], [-0.2, -3.0], [-0.3, -3.0], [-0.1, -3.0])
    tree = scheduler.grow(tree, torch.tensor([[[4, 5]]] * 4), scores)
    _, accepted, counts = observed(scheduler, tree, torch.tensor([4, 0, 0, 0]))
    assert accepted.num_emitted.tolist() == [2, 1, 1, 0]
    assert (counts.requests, counts.starved, counts.invalid) == (3, 2, 1)
    assert (counts.accepted_drafts, counts.emitted_tokens, counts.tokens_per_step) == (1, 4, 4 / 3)


@given(policies(), st.integers(0, 1000), st.sampled_from([0.0, 0.2]))
def test_what_holds_of_every_step(policy, seed, spoil):
    scheduler, batch = policy
    live = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) < 0.8
    tree = grow_all(scheduler, torch.arange(batch), k=2, seed=seed, spoil=spoil, live=live)
    packed, accepted, counts = observed(
        scheduler, tree, torch.randint(0, 1000, (scheduler.pack(tree).num_rows,))
    )
    assert counts.verify_tokens + counts.pad_tokens == packed.num_rows
    assert counts.requests == int(live.sum())
    assert counts.emitted_tokens == int(accepted.num_emitted.sum())
    assert 0 <= counts.accepted_drafts <= counts.draft_tokens
    assert 0 <= counts.reassigned <= counts.released <= counts.reassigned + counts.pad_tokens
    assert counts.truncated + counts.starved <= counts.requests
    if scheduler.gate is None:
        assert counts.truncated == counts.released == 0


def test_an_idle_rank_counts_its_pads():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 8, 2)
    _, _, counts = observed(scheduler, scheduler.begin(torch.empty(0, dtype=torch.int64)))
    assert counts == echo.stats.StepCounts(steps=1, pad_tokens=8)
    assert counts.tokens_per_step == 0.0


def toy_steps():
    law = table(40, seed=1)
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), echo.SparseGate({1: 0.2}), 24, 3)
    target, drafter = TabularTarget(law), TabularDrafter(blurred(law, seed=2), k=3)
    return echo.decode(
        scheduler,
        target,
        drafter,
        [torch.tensor([t]) for t in range(9)],
        max_num_reqs=4,
        max_new_tokens=9,
    )


def test_counters_add_up_over_steps_and_ranks():
    whole = one = two = echo.StepStats.empty()
    tokens = steps = 0
    for number, step in enumerate(toy_steps()):
        whole = whole.observe(step.packed, step.accepted)
        one, two = (
            s.observe(step.packed, step.accepted) if number % 2 == rank else s
            for rank, s in enumerate((one, two))
        )
        tokens += int(step.accepted.num_emitted.sum())
        steps += 1
    assert whole.read() == echo.StepStats(one.counts + two.counts).read()
    assert (whole.read().emitted_tokens, whole.read().steps) == (tokens, steps)


def test_counters_of_another_batch_are_refused():
    scheduler = echo.ElasticBudgetScheduler.autoregressive()
    one, two = (scheduler.pack(scheduler.begin(torch.arange(n))) for n in (1, 2))
    with pytest.raises(
        echo.EchoError, match=r"accepted.num_emitted: expected int64 \[2\], got int64 \[1\]"
    ):
        echo.StepStats.empty().observe(two, echo.accept(one, torch.tensor([1])))


def test_prometheus_scrapes_what_was_counted(monkeypatch):
    """Over HTTP, parsed by the official client; nothing is read between two scrapes."""
    prometheus = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    from prometheus_stats import METRICS, EchoCollector

    steps = toy_steps()
    newest = [echo.StepStats.empty()]
    registry = prometheus.CollectorRegistry()
    registry.register(EchoCollector(lambda: newest[0], {"model": "toy"}))
    server, thread = prometheus.start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        for _ in range(2):
            for step in itertools.islice(steps, 3):
                newest[0] = newest[0].observe(step.packed, step.accepted)
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
                families = {
                    family.name: family.samples
                    for family in text_string_to_metric_families(answer.read().decode())
                }
            counts = newest[0].read()
            assert set(families) == {f"echo_{name}" for name in METRICS}
            assert [sample.labels for samples in families.values() for sample in samples] == [
                {"model": "toy"}
            ] * len(METRICS)
            expected = {name: getattr(counts, name) for name in METRICS}
            assert {name: families[f"echo_{name}"][0].value for name in expected} == expected
            assert counts.accepted_drafts and counts.reassigned
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
