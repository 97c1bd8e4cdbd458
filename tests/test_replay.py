"""Replay gives the steps of a live decode, counts what it must, and reads and writes its traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import echo
from conftest import CALIBRATION
from echo.testing import TabularDrafter, TabularTarget, Trace, blurred, record, replay, table

TARGET = table(30, seed=3, sharpness=2.5)
COST = echo.CostModel((1, 16, 64), (1.0, 1.0, 4.0), draft_layer=0.02, draft_token=0.001)
POLICIES = {
    "plain": echo.ElasticBudgetScheduler.autoregressive(),
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=3, max_depth=4),
    "echo": echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 3), echo.SparseGate({1: 0.2, 3: 0.2}), 20, 4
    ),
    "global": echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, 18, 3),
    "ddd": echo.ElasticBudgetScheduler(
        echo.PerRequest(8, 3), echo.BeamMassGate((2, 3), -1.0, 3), None, 4
    ),
    "throughput-optimal": echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, COST, beam=3),
    "trimmed": echo.ElasticBudgetScheduler.throughput_optimal(
        CALIBRATION, COST, beam=3, trims=True
    ),
}


def pair():
    return TabularTarget(TARGET), TabularDrafter(
        blurred(TARGET, seed=4, noise=0.3), k=3, dtype=torch.float16
    )


PROMPTS = [torch.tensor([i]) for i in range(12)]


@pytest.fixture(scope="module")
def trace() -> Trace:
    *counts, result = record(
        *pair(),
        PROMPTS,
        ["odd" if i % 2 else "even" for i in range(12)],
        max_num_reqs=4,
        depth=4,
        beam=3,
        max_new_tokens=17,
        eos_token=5,
    )
    assert counts == sorted(counts)
    assert isinstance(result, Trace)
    return result


def live_steps(scheduler, batch):
    return [
        (
            step.requests,
            [len(t) - (f == 0) for t, f in zip(step.emitted, firsts, strict=True)],
            step.packed,
        )
        for step, firsts in _first_flags(
            echo.decode(
                scheduler, *pair(), PROMPTS, max_num_reqs=batch, max_new_tokens=17, eos_token=5
            )
        )
    ]


def _first_flags(steps):
    seen: dict[int, int] = {}
    for step in steps:
        yield step, [seen.get(r, 0) for r in step.requests]
        for request in step.requests:
            seen[request] = seen.get(request, 0) + 1


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_replay_equals_live_decoding(trace, name, batch):
    scheduler, replayed = POLICIES[name], []
    report = replay(trace, scheduler, COST, batch=batch, observe=replayed.append)
    live = live_steps(scheduler, batch)
    assert report.misses == 0
    assert len(live) == len(replayed) == report.steps
    for (requests, emitted, packed), mine in zip(live, replayed, strict=True):
        assert list(requests) == mine.requests.tolist()
        assert emitted == mine.emitted.tolist()
        assert torch.equal(packed.tokens, mine.packed.tokens)
        assert torch.equal(packed.parent, mine.packed.parent)
        assert torch.equal(packed.indptr, mine.packed.indptr)
    assert report.tokens == sum(
        len(trace.text[a:b]) - 1 for a, b in zip(trace.indptr, trace.indptr[1:], strict=False)
    )


def test_a_policy_wider_than_the_record_is_counted_as_missing(trace):
    wide = echo.ElasticBudgetScheduler(echo.GlobalRank(9), None, 60, 4)
    assert replay(trace, wide, COST, batch=4).misses > 0
    with pytest.raises(
        echo.EchoError, match=r"scheduler: expected max_depth of at most the trace's 4, got 5"
    ):
        replay(
            trace,
            echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=2, max_depth=5),
            COST,
            batch=4,
        )


def test_plain_decoding_costs_one_step_a_token(trace):
    report = replay(trace, POLICIES["plain"], COST, batch=4)
    assert report.tokens_per_step == 1.0
    assert report.verify_tokens == report.request_steps == report.tokens
    assert report.seconds == pytest.approx(report.steps)
    assert len(report.answers) == 12
    assert sum(answer.tokens for answer in report.answers) == report.tokens


def test_figures_of_the_answers_add_up(trace):
    report = replay(trace, POLICIES["echo"], COST, batch=4)
    assert sorted(answer.kind for answer in report.answers) == ["even"] * 6 + ["odd"] * 6
    assert sum(answer.verify_tokens for answer in report.answers) == report.verify_tokens
    each = [answer.tokens / answer.steps for answer in report.answers]
    assert min(each) <= report.tokens_per_step <= max(each)
    assert 0 < report.acceptance <= 1


def test_charges(trace):
    scheduler = POLICIES["eagle"]
    seen = []
    full = replay(trace, scheduler, COST, batch=4, observe=seen.append)
    expected = sum(
        COST(r.tier.num_verify_tokens) + COST.draft_seconds(r.tier.depth, len(r.requests), 3)
        for r in seen
    )
    assert full.seconds == pytest.approx(expected)
    assert replay(trace, scheduler, COST, batch=4, compact=True).seconds < full.seconds
    assert replay(trace, scheduler, COST, batch=4, prefill_tokens=50).seconds > full.seconds


def test_refill_goes_on_forever_where_steps_are_given(trace):
    report = replay(trace, POLICIES["global"], COST, batch=5, steps=100)
    assert report.steps == 100
    assert report.request_steps == 500


def test_lag_changes_nothing_but_the_plan(trace):
    for lag in (0, 1, 2):
        report = replay(trace, POLICIES["throughput-optimal"], COST, batch=4, lag=lag)
        assert report.tokens == sum(np.diff(trace.indptr) - 1)


def test_rank_says_what_a_chain_would_have_accepted(trace):
    rank, seen = trace.rank, []
    assert {-2, 0, 1} <= set(np.unique(rank)) <= {-2, -1, 0, 1, 2}
    replay(
        trace,
        echo.ElasticBudgetScheduler(echo.TwoLevel(1, 0), None, 20, 4),
        COST,
        batch=4,
        observe=seen.append,
    )
    for step in seen:
        at = trace.indptr[step.requests] + step.position
        firsts = (rank[at] == 0).cumprod(axis=1).sum(axis=1)
        assert (step.accepted.num_accepted_drafts.numpy() == firsts).all()


def test_a_cost_model_that_is_wrong_learns_from_the_steps(trace):
    wrong = echo.CostModel(
        (1, 64), (1.0, 1.0), draft_layer=0.02
    )  # tokens beyond 16 are free, it believes
    scheduler = echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, wrong, beam=3)
    stubborn, learning = (
        replay(trace, scheduler, COST, batch=8, steps=300, update_rate=rate) for rate in (0.0, 0.2)
    )
    assert learning.throughput > 1.1 * stubborn.throughput
    assert learning.misses == 0


def test_probes_of_a_drafter_with_a_costly_extend_cost_less_than_a_percent(trace):
    """Each token costs, so nothing pays; one of an extend is a thirtieth of one decoded plainly."""
    cost = echo.CostModel((1, 64), (1.0, 64.0), draft_layer=0.5, extend_token=0.03)
    scheduler, read = echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, cost, beam=3), []
    report = replay(
        trace,
        scheduler,
        cost,
        batch=4,
        steps=1000,
        lag=1,
        observe=lambda record: read.append(record.num_unprocessed_tokens),
    )
    plain = replay(trace, echo.ElasticBudgetScheduler.autoregressive(), cost, batch=4, steps=1000)
    assert report.layers > 0  # it did look
    assert sum(count > 0 for count in read) >= 2
    assert 0.99 <= report.throughput / plain.throughput < 1


def test_where_nothing_was_drafted_nothing_is_recorded(trace):
    for begin, end, limit in zip(trace.indptr, trace.indptr[1:], trace.limit, strict=False):
        assert (trace.log_prob[end - 1] == -np.inf).all()  # the last token
        if end - begin == limit:  # one token more ends the answer: capacity 1
            assert (trace.log_prob[end - 2] == -np.inf).all()
            assert (trace.log_prob[end - 3, 0, 0] > -np.inf).all()


def test_files(trace, tmp_path):
    path = tmp_path / "trace.npz"
    trace.save(path)
    again = Trace.load(path)
    for name in ("text", "indptr", "kind", "limit", "token", "log_prob", "expanded"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(echo.EchoError, match="path: expected a trace"):
        Trace.load(path)
    np.savez(path, version=np.array(9))
    with pytest.raises(echo.EchoError, match="path: expected a trace of version 2, got version 9"):
        Trace.load(path)


def test_faults_are_named_with_their_place(trace):
    from dataclasses import replace

    log_prob = trace.log_prob.copy()
    log_prob[7, 1, 2, 0] = np.nan
    with pytest.raises(
        echo.EchoError,
        match=r"log_prob: expected a value in range, got nan at position 7, index \(1, 2, 0\)",
    ):
        replace(trace, log_prob=log_prob)
    expanded = trace.expanded.copy()
    expanded[3, 0, 1] = 99
    with pytest.raises(echo.EchoError, match=r"expanded: .* got 99 at position 3, index \(0, 1\)"):
        replace(trace, expanded=expanded)
    with pytest.raises(echo.EchoError, match="indptr: expected 13 values"):
        replace(trace, indptr=trace.indptr[:-1])


def test_part_of_a_trace(trace):
    part = trace.texts([3, 1])
    assert part.kind.tolist() == ["odd", "odd"]
    assert part.text.tolist() == [
        *trace.text[trace.indptr[3] : trace.indptr[4]],
        *trace.text[trace.indptr[1] : trace.indptr[2]],
    ]
    assert replay(part, POLICIES["eagle"], COST, batch=2).misses == 0


def test_record_wants_half_precision():
    target, _ = pair()
    with pytest.raises(echo.EchoError, match="float16"):
        list(
            record(
                target,
                TabularDrafter(TARGET, k=2),
                PROMPTS,
                [""] * 12,
                max_num_reqs=2,
                depth=2,
                beam=2,
                max_new_tokens=4,
            )
        )


def test_records_are_closed_under_narrower_frontiers(trace):
    """Any frontier of at most ``beam`` nodes, each layer its own, replays without a miss."""

    class Erratic(echo.GlobalRank):
        def frontier(self, layer):
            index, active = super().frontier(layer)
            generator = torch.Generator().manual_seed(layer.depth + int(layer.token.sum()))
            count = torch.randint(1, self.beam + 1, (len(index), 1), generator=generator)
            rank = (
                layer.score.gather(1, index)
                .argsort(dim=1, descending=True, stable=True)
                .argsort(dim=1)
            )
            return index, active & (rank < count)

    for beam in (1, 2, 3):
        assert (
            replay(
                trace, echo.ElasticBudgetScheduler(Erratic(beam), None, 30, 4), COST, batch=4
            ).misses
            == 0
        )


def test_the_shipped_trace_replays_without_a_miss():
    path = Path(__file__).parents[1] / "benchmarks" / "traces" / "smollm2.npz"
    shipped = Trace.load(path)
    assert path.stat().st_size < 3e6
    assert shipped.positions >= 6000
    assert shipped.depth == 8
    assert shipped.beam >= 6
    assert set(shipped.kind) == {"code", "reasoning", "summary", "chat"}
    for scheduler in (
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=60, beam=6, max_depth=8),
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5, beam=1, max_depth=4),
        echo.ElasticBudgetScheduler(echo.TwoLevel(3, 8), echo.SparseGate({1: 0.3, 4: 0.3}), 90, 8),
        echo.ElasticBudgetScheduler(
            echo.GlobalRank(6), None, echo.CostModel((1, 200), (1.0, 1.5)), 8
        ),
    ):
        report = replay(shipped, scheduler, COST, batch=32, steps=60)
        assert report.misses == 0
        assert report.tokens_per_step > 1.3


def test_a_load_that_falls_ends_texts_and_one_that_rises_admits(trace):
    levels, live = iter([1] * 3 + [4] * 6 + [2] * 200), []
    wanted = []

    def load():
        wanted.append(next(levels))
        return wanted[-1]

    replay(
        trace,
        POLICIES["plain"],
        COST,
        batch=4,
        steps=60,
        load=load,
        observe=lambda record: live.append(len(record.requests)),
    )
    assert live[:9] == wanted[:9] == [1] * 3 + [4] * 6  # at once
    assert (np.diff(live[9:]) <= 0).all() and live[-1] == 2  # as texts end
