"""Learning behind a gate: an exploring gate's log is as good as an ungated one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import echo
from conftest import one_graph
from echo.gating import ConfidenceHistograms, ExploringGate
from echo.gating.histograms import UNIT, WEIGHT
from echo.gating.thresholds import refuse_gated
from echo.testing import RefuseSyncs, TabularDrafter, table

VOCAB, DEPTH = 40, 4
TARGET = table(VOCAB, 0)
DRAFTER = TabularDrafter(0.5 * TARGET + 0.5 * table(VOCAB, 1), k=3)
GATE = echo.SparseGate({1: 0.22, 3: 0.015})
FREE = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 0), None, VOCAB * (1 + 2 * DEPTH), DEPTH)
"""Budget for all requests: only the gate keeps tokens from verification."""


def one_step(gate):
    """All tokens of the vocabulary as roots, one step."""
    scheduler = replace(FREE, gate=gate)
    tree = scheduler.begin(torch.arange(VOCAB))
    for _ in range(DEPTH):
        tree = scheduler.grow(tree, *DRAFTER.draft(torch.arange(VOCAB), tree.frontier))
    packed = scheduler.pack(tree)
    sampled = TARGET[packed.tokens].argmax(dim=-1)
    plan, seconds = echo.budget.Tier(DEPTH, tree.num_verify_tokens), echo.loop.Seconds()
    return echo.loop.Step(
        tree,
        packed,
        echo.accept(packed, sampled),
        sampled,
        torch.arange(VOCAB),
        plan,
        seconds,
        gate is not None,
    )


def explored(epsilon, uniforms):
    gate = ExploringGate(GATE, epsilon, uniforms)
    step = one_step(gate)
    return step, step.log(weights=gate.weights(step.tree.layers))


def weights_of(log):
    """int64 [depths, ranks, kinds, bins]."""
    return ConfidenceHistograms.empty(DEPTH).add(log).mass[WEIGHT]


def test_the_expectation_over_the_coin_is_the_ungated_log_exactly():
    """Epsilon = 1/4: one "all explore" and three "none does" are four ungated histograms."""
    _, all_explore = explored(0.25, torch.zeros(VOCAB))
    _, none_does = explored(0.25, torch.full((VOCAB,), 0.9))
    free = one_step(None).log()
    assert len(none_does) < len(all_explore) == len(free)
    assert set(all_explore.weight) == {1.0, 4.0} and set(none_does.weight) == {1.0}
    one, three, four = (weights_of(log) for log in (all_explore, none_does, free))
    assert np.array_equal(one + 3 * three, 4 * four)


def test_simulated_exploring_logs_are_unbiased_and_gated_ones_are_not():
    """500 steps of 40 requests: weighted sums are the ungated ones within noise, gated not."""
    free = one_step(None).log()
    truth = weights_of(free).sum(axis=(1, 3)) / UNIT  # [depth, kind]
    random = torch.Generator().manual_seed(5)
    logs = [explored(0.2, torch.rand(VOCAB, generator=random))[1] for _ in range(500)]
    sums = np.array([weights_of(log).sum(axis=(1, 3)) / UNIT for log in logs])
    error = sums.std(axis=0) / np.sqrt(len(sums))
    assert (np.abs(sums.mean(axis=0) - truth) <= 4 * error + 1e-9).all()
    gated = explored(0.2, torch.ones(VOCAB))[1]
    seen = weights_of(gated).sum(axis=(1, 3)) / UNIT
    assert (seen < 0.7 * truth).all()


def test_calibrations_agree_from_synthetic_requests():
    """Depth 2 is seen where depth 1 passed or the coin fell: the AUC is as without a gate."""
    random = np.random.default_rng(7)
    n = 40_000
    c1 = random.beta(2, 1.5, n)
    c2 = c1 * random.beta(3, 1.2, n)
    a1 = random.random(n) < 0.1 + 0.8 * c1
    a2 = a1 & (random.random(n) < 0.2 + 0.7 * c2 / c1)
    passed, explores = c1 > 0.5, random.random(n) < 0.1

    def log(second, weight=None):
        depth = np.concatenate([np.ones(n), np.full(second.sum(), 2)])
        weights = None if weight is None else np.concatenate([np.ones(n), weight[second]])
        rows = np.concatenate([c1, c2[second]]), np.concatenate([a1, a2[second]])
        return echo.WarmupLog.from_arrays(depth, *rows, weight=weights)

    free = echo.calibrate(log(np.ones(n, bool))).depths[1]
    weighted = echo.calibrate(log(passed | explores, np.where(passed, 1.0, 10.0))).depths[1]
    with pytest.warns(
        UserWarning, match="log: expected step ids, or weights, where fewer rows are deeper"
    ):
        biased = echo.calibrate(log(passed)).depths[1]
    assert abs(weighted.auc - free.auc) < 0.01 and weighted.auc_low < free.auc < weighted.auc_high
    assert abs(biased.auc - free.auc) > 0.04
    assert (
        weighted.auc_high - weighted.auc_low > free.auc_high - free.auc_low
    )  # and it knows that it is less sure
    assert weighted.effective < weighted.accepted + weighted.rejected
    assert sum(a + r for _, a, r in weighted.profile) == pytest.approx(n, rel=0.03)


def test_a_gated_step_without_weights_is_refused():
    with pytest.raises(echo.EchoError, match="expected a step drafted without a gate, or weights"):
        one_step(GATE).log()
    with pytest.raises(
        echo.EchoError, match="expected inverse-probability weights for rows from behind a gate"
    ):
        echo.WarmupLog.from_arrays([1], [0.5], [1], gated=True)
    step = one_step(GATE)
    with pytest.raises(
        echo.EchoError, match="weights: expected a column for each depth from 0 to 4, got 2 columns"
    ):
        step.log(weights=torch.ones(VOCAB, 2))


def test_a_log_that_bears_the_mark_of_a_gate_is_refused():
    """Rows with step ids give a gate away, an ordinary end of a request does not."""
    random = np.random.default_rng(3)
    n = 400
    c1 = random.random(n)
    c2 = c1 * random.random(n)
    accepted = np.concatenate([random.random(n) < c1, random.random(n) < c2])

    def log(second, weight=None):
        keep = np.concatenate([np.ones(n, bool), second])
        weights = None if weight is None else np.concatenate([np.ones(n), weight])[keep]
        columns = np.repeat([1, 2], n)[keep], np.concatenate([c1, c2])[keep], accepted[keep]
        return echo.WarmupLog.from_arrays(
            *columns, step=np.tile(np.arange(n), 2)[keep], weight=weights
        )

    for harmless in (np.ones(n, bool), random.random(n) < 0.5, random.random(n) < c1, c1 > 0.97):
        assert echo.calibrate(log(harmless)).max_depth == 2
    with pytest.raises(
        echo.EchoError,
        match=r"without a gate, or weights, got \d+ steps that end at depth 1",
    ):
        echo.calibrate(log(c1 > 0.4))
    for hidden in (
        replace(log(c1 > 0.4), step=np.arange(n + int((c1 > 0.4).sum()))),
        ConfidenceHistograms.of(log(c1 > 0.4)),
    ):
        with pytest.warns(
            UserWarning,
            match=rf"deeper, got {(c1 > 0.4).sum()} rows of depth 2 and {n} of depth 1",
        ):
            echo.calibrate(hidden)
    explores = random.random(n) < 0.2
    echo.calibrate(log((c1 > 0.4) | explores, np.where(c1 > 0.4, 1.0, 5.0)))


@pytest.mark.parametrize("order", ["by depth", "shuffled", "by step"])
def test_a_gate_is_found_wherever_the_rows_of_a_step_lie(order):
    """In a log of more rows than are looked at."""
    random, n = np.random.default_rng(5), 300_000
    c1 = random.random(n)
    for passed, found in ((c1 > 0.4, True), (random.random(n) < 0.6, False)):
        depth, step = (
            np.repeat([1, 2], [n, passed.sum()]),
            np.concatenate([np.arange(n), np.flatnonzero(passed)]) * 4096,
        )
        confidence = np.concatenate([c1, (c1 * random.random(n))[passed]])
        turn = {
            "by depth": np.arange(len(depth)),
            "shuffled": random.permutation(len(depth)),
            "by step": step.argsort(kind="stable"),
        }[order]
        log = echo.WarmupLog.from_arrays(
            depth[turn],
            confidence[turn],
            random.random(len(depth)) < confidence[turn],
            step=step[turn],
        )
        if found:
            with pytest.raises(
                echo.EchoError, match="log: expected steps drafted without a gate, or weights"
            ):
                refuse_gated(log)
        else:
            assert refuse_gated(log)
            assert not refuse_gated(replace(log, step=np.arange(len(log))))


@dataclass
class Seen:
    depth: int
    log_confidence: torch.Tensor

    def log_mass(self, beam):
        return self.log_confidence


def test_weights_by_hand():
    layers = [
        Seen(d, torch.tensor(c).log())
        for d, c in (
            (1, [0.9, 0.3, 0.3, 0.9]),
            (2, [0.8, 0.2, 0.2, 0.1]),
            (3, [0.7, 0.2, 0.2, 0.05]),
        )
    ]
    gate = ExploringGate(
        echo.SparseGate({1: 0.5, 3: 0.1}), 0.125, torch.tensor([0.5, 0.5, 0.1, 0.9])
    )
    assert gate.weights(layers).tolist() == [
        [1, 1, 1, 1],  # passes both gates
        [1, 0, 0, 0],  # stopped at depth 1, heads were not thrown
        [1, 8, 8, 8],  # stopped at depth 1, but explores
        [1, 1, 1, 0],  # depth 2 is no gate; stopped at depth 3
    ]
    assert gate(layers[0]).tolist() == [True, False, True, True]
    assert gate(layers[1]) is None
    with RefuseSyncs():
        gate.weights(layers)
        gate(layers[0])


def test_uniforms_are_an_input_of_one_graph():
    """A captured step makes the gate inside, from fresh uniforms each time: one graph."""

    def step(uniforms, tokens, log_probs):
        gate = ExploringGate(GATE, 0.3, uniforms)
        scheduler = replace(FREE, gate=gate, max_depth=1)
        tree = scheduler.grow(scheduler.begin(torch.arange(VOCAB)), tokens, log_probs)
        return scheduler.pack(tree).tokens, gate.weights(tree.layers)

    drafted = DRAFTER.draft(torch.arange(VOCAB), FREE.begin(torch.arange(VOCAB)).frontier)
    uniforms = [
        torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    ]
    seen = one_graph(step, [(drawn, *drafted) for drawn in uniforms])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_epsilon_one_is_no_gate():
    step, log = explored(1.0, torch.rand(VOCAB))
    free = one_step(None)
    assert torch.equal(step.packed.tokens, free.packed.tokens)
    assert set(log.weight) == {1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ExploringGate(GATE, 0.0, torch.rand(3)),
            "epsilon: expected a number from 0.0009765625 to 1.0, got 0.0",
        ),
        (
            lambda: ExploringGate(GATE, 0.1, torch.rand(3, 2)),
            r"uniforms: expected .* \[B\], got float32 \[3, 2\]",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()
