"""Requests that move take their history along, and new ones begin with that of their kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import echo
from conftest import CALIBRATION
from echo.budget import History
from echo.testing import RefuseSyncs, TabularDrafter, TabularTarget, table

COST = echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0))
SCHEDULER = echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, COST, beam=2)
NAMES = ("steps", "expected", "accepted", "acceptance_histogram")


def served(steps=30):
    """A history of four requests: those of even index accept their drafts, the others do not."""
    law, history = table(60, seed=1), SCHEDULER.history(6)
    target, drafter = TabularTarget(law), TabularDrafter(law, k=3)
    ids = torch.arange(4)
    roots = target.admit(ids, [torch.tensor([7 * b + 1]) for b in range(4)])
    for _ in range(steps):
        tree = SCHEDULER.begin(roots, num_verify_tokens=24)
        for _ in range(SCHEDULER.max_depth):
            tokens, log_probs = drafter.draft(ids, tree.frontier)
            tree = SCHEDULER.grow(tree, tokens, log_probs)
        packed = SCHEDULER.pack(tree)
        sampled = target.verify(ids, packed)
        odd = packed.request % 2 == 1
        sampled = torch.where(odd, (sampled + 1) % 60, sampled)
        accepted = echo.accept(packed, sampled)
        history = history.observe(ids, packed, accepted)
        roots = accepted.bonus
    return history


HISTORY = served()


def column(history, index):
    return [getattr(history, name)[:, index] for name in NAMES]


def test_the_two_kinds_differ():
    good, bad = HISTORY.predict([0, 2]), HISTORY.predict([1, 3])
    assert good[1][-1, -1] > 2 * bad[1][-1, -1]


@pytest.mark.parametrize("to", [0, 3, 5])
def test_a_request_that_moves_is_predicted_as_before(to):
    index, moved = torch.tensor([2]), torch.tensor([to])
    with RefuseSyncs():
        rows = HISTORY.export(index)
        after = HISTORY.restore(moved, rows)
    assert rows.shape == (1, 35 * SCHEDULER.max_depth + 1)
    for own, new in zip(HISTORY.predict([2]), after.predict([to]), strict=True):
        assert np.array_equal(own, new)
    assert int(after.generation[to]) == int(HISTORY.generation[to]) + 1
    others = [b for b in range(7) if b != to]  # the sums over all requests too
    for before, now in zip(column(HISTORY, others), column(after, others), strict=True):
        assert torch.equal(before, now)


def test_another_engine_gets_the_sums_bit_for_bit():
    rows = HISTORY.export(torch.tensor([3, 0]))
    sent = torch.frombuffer(bytearray(rows.numpy().tobytes()), dtype=torch.float32)
    after = SCHEDULER.history(3).restore(torch.tensor([1, 2]), sent.view(2, -1))
    for source, target in ((3, 1), (0, 2)):
        for own, new in zip(column(HISTORY, source), column(after, target), strict=True):
            assert torch.equal(own, new)
    assert not after.steps[:, 0].any()


def test_tokens_that_wait_for_draft_extend_move_too():
    history = History.empty(3, 2)
    history = History(**{**vars(history), "num_unprocessed_tokens": torch.tensor([5, 0, 9])})
    moved = history.restore(torch.tensor([1]), history.export(torch.tensor([2])))
    assert moved.num_unprocessed_tokens.tolist() == [5, 9, 9]


@pytest.mark.parametrize("kind", [(0, 2), (1, 3)])
def test_a_new_request_begins_as_its_kind(kind):
    """Closer to what its kind does than a request of which nothing is known."""
    rows = HISTORY.export(torch.tensor(kind))
    row = HISTORY.prior(rows, num_steps=8.0)
    known = HISTORY.restore(torch.tensor([4]), row.expand(1, -1))
    expected = sum(HISTORY.predict([b])[1][-1, -1] for b in kind) / 2
    mean, new = (h.predict([4])[1][-1, -1] for h in (HISTORY.reset(torch.tensor([4])), known))
    assert abs(new - expected) < 0.5 * abs(mean - expected)
    assert torch.allclose(known.steps[:, 4], torch.full((SCHEDULER.max_depth,), 8.0))


def test_a_prior_has_no_more_steps_than_were_seen_and_an_empty_one_none():
    rows = HISTORY.export(torch.tensor([0]))
    assert torch.allclose(HISTORY.prior(rows, num_steps=1e6)[:-1], rows[0, :-1])
    assert not HISTORY.prior(rows[:0]).any() and not HISTORY.prior(rows, num_steps=0.0).any()


def test_a_history_without_depths_moves():
    history = History.empty(2, 0)
    rows = history.export(torch.tensor([1]))
    assert rows.shape == (1, 1) and history.prior(rows).shape == (1,)
    assert history.restore(torch.tensor([0]), rows).generation.tolist() == [1, 0]


def test_what_does_not_fit_is_named():
    one = torch.tensor([0])
    width = HISTORY.export(one).shape[1]
    for says, call in {
        "req_indices: expected int64": lambda: HISTORY.export(one.int()),
        rf"rows: expected float32 \[1, {width}\]": lambda: HISTORY.restore(one, torch.zeros(1, 3)),
        "num_steps: expected a number >= 0": lambda: HISTORY.prior(HISTORY.export(one), -1.0),
    }.items():
        with pytest.raises(echo.EchoError, match=says):
            call()


def test_a_row_that_is_no_history_says_nothing():
    """A damaged row must not stop planning for the others."""
    ids, rows = torch.tensor([4, 5]), HISTORY.export(torch.tensor([0, 2]))
    rows[0, 3] = torch.nan
    restored = HISTORY.restore(ids, rows)
    assert all((part[..., :] == 0).all() for part in column(restored, 4))
    for own, whole in zip(column(restored, 5), column(HISTORY, 2), strict=True):
        assert torch.equal(own, whole)
    assert SCHEDULER.choose_tier(restored, [0, 1, 4, 5]).depth > 0


def test_history_is_restored_in_place_for_captured_graphs():
    space = echo.Workspace(SCHEDULER, 4, k=3, num_verify_tokens=24, max_num_reqs=6)
    before, rows = space.history.steps.data_ptr(), HISTORY.export(torch.tensor([2]))
    space.history = space.history.restore(torch.tensor([1]), rows, out=space.history)
    assert space.history.steps.data_ptr() == before
    for own, whole in zip(column(space.history, 1), column(HISTORY, 2), strict=True):
        assert torch.equal(own, whole)
    space.history = space.history.reset(torch.tensor([1]), out=space.history)
    assert space.history.steps.data_ptr() == before
    assert space.history.generation.tolist() == [0, 2, 0, 0, 0, 0]
    assert not any(part.any() for part in column(space.history, 1))


@pytest.mark.parametrize("index", [6, 1 << 40, -1])
def test_an_index_that_a_history_does_not_have_is_named(index):
    """However large: nothing is allocated by it."""
    with pytest.raises(echo.EchoError, match="req_indices: expected ints from 0 to 5"):
        HISTORY.predict([0, index])
