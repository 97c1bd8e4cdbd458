"""Histograms: exact sums, bounded binning error, and the same counts on the device."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import echo
from echo.gating import ConfidenceHistograms, LiveHistograms, separability
from echo.gating.histograms import (
    BINS,
    LOWER,
    MIDDLE,
    PER_OCTAVE,
    ROWS,
    UNIT,
    UPPER,
    WEIGHT,
)
from echo.testing import RefuseSyncs, TabularDrafter, TabularTarget, table

UNIT_FLOATS = st.floats(0, 1, width=32)


WEIGHTS = st.just(0.0) | st.floats(1 / 64, 1024, width=32)


@st.composite
def logs(draw, weighted=None):
    n = draw(st.integers(1, 60))
    weight = (
        draw(hnp.arrays(np.float32, n, elements=WEIGHTS))
        if weighted is None and draw(st.booleans())
        else None
    )
    return echo.WarmupLog.from_arrays(
        draw(hnp.arrays(np.int32, n, elements=st.integers(1, 5))),
        draw(hnp.arrays(np.float32, n, elements=UNIT_FLOATS)),
        draw(hnp.arrays(np.bool_, n)),
        rank=draw(hnp.arrays(np.int32, n, elements=st.integers(0, 6))),
        weight=weight,
    )


def rows_of(n, *, depth=1, seed=0, coarse=None):
    random = np.random.default_rng(seed)
    confidence = (
        random.random(n) ** 2 if coarse is None else np.round(random.random(n) * coarse) / coarse
    )
    return echo.WarmupLog.from_arrays(
        np.full(n, depth), confidence, random.random(n) < 0.2 + 0.6 * confidence
    )


@given(UNIT_FLOATS)
def test_each_confidence_lies_within_its_bin(c):
    counted = ConfidenceHistograms.of(echo.WarmupLog.from_arrays([1], [c], [1])).mass[ROWS, 0, 0, 1]
    place = int(counted.argmax())
    assert counted.sum() == 1
    assert LOWER[place] <= np.float32(abs(c)) <= UPPER[place]


def test_edges_are_bfloat16_numbers():
    edges = LOWER
    assert len(edges) == BINS == 24 * PER_OCTAVE + 2
    assert edges[1] == 2.0**-24 and edges[-1] == 1.0
    assert (torch.from_numpy(edges).bfloat16().float().numpy() == edges).all()
    assert (np.diff(edges) > 0).all()
    assert (
        edges[2:] / edges[1:-1]
    ).max() <= 1 + 1 / 128  # the relative width that the error bound rests on
    scores = MIDDLE[1:-1]
    assert (scores > np.log(edges[1:-1])).all() and (scores < np.log(edges[2:])).all()


@given(st.lists(logs(), min_size=1, max_size=4), st.randoms())
def test_merging_is_counting_all_rows_in_any_order(parts, random):
    whole = ConfidenceHistograms.of(echo.WarmupLog.concat(parts))
    assert ConfidenceHistograms.of(parts) == whole
    random.shuffle(parts)
    merged = ConfidenceHistograms.empty(1)
    for part in parts:
        merged = (
            ConfidenceHistograms.of(part).merge(merged)
            if random.random() < 0.5
            else merged.add(part)
        )
    deepest = whole.max_depth
    assert np.array_equal(merged.mass[:, :deepest], whole.mass)


def test_columns_may_be_views_that_torch_does_not_take():
    depth, confidence, accepted = np.array([1, 2, 1]), np.array([0.9, 0.5, 0.3]), [1, 0, 1]
    backward = [np.asarray(x)[::-1] for x in (depth, confidence.astype(np.float32), accepted)]
    log = echo.WarmupLog.from_arrays(*backward)
    packed = np.array([*zip(depth, confidence, accepted, strict=True)], "i1, f4, ?")
    fields = echo.WarmupLog.from_arrays(*(packed[name] for name in packed.dtype.names))
    for column in (fields.depth, fields.confidence):
        column.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ConfidenceHistograms.of(log) == ConfidenceHistograms.of(fields)


@given(logs(), logs(), logs())
def test_merge_is_associative_and_since_undoes_it(one, two, three):
    a, b, c = (ConfidenceHistograms.of(log) for log in (one, two, three))
    assert a.merge(b).merge(c) == a.merge(b.merge(c)) == c.merge(b).merge(a)
    undone = a.merge(b).since(b)
    assert np.array_equal(undone.mass[:, : a.max_depth], a.mass) and undone.rows == a.rows


def test_merge_then_calibrate_is_calibrate_all_bit_for_bit():
    random = np.random.default_rng(3)
    parts = []
    for seed in range(5):
        log = echo.WarmupLog.concat(
            [rows_of(700, depth=d, seed=10 * seed + d) for d in range(1, 5)]
        )
        parts.append(
            echo.WarmupLog.from_arrays(
                log.depth, log.confidence, log.accepted, weight=random.uniform(0.1, 9, len(log))
            )
        )
    whole = echo.calibrate(echo.WarmupLog.concat(parts))
    merged = ConfidenceHistograms.of(parts[4])
    for log in parts[:4]:
        merged = ConfidenceHistograms.of(log).merge(merged)
    again = echo.calibrate(merged)
    assert again == whole
    assert (
        again.to_json() == whole.to_json() == echo.Calibration.from_json(whole.to_json()).to_json()
    )
    assert whole.refit(merged) == whole


@given(logs(weighted=False))
def test_auc_of_bins_is_within_its_stated_bound(log):
    """|binned - exact| <= half the share of pairs within a bin; worst if an ulp apart."""
    path = (log.rank == 0) & (log.depth == 1)
    exact = separability(log.confidence[path], log.accepted[path]).auc
    if np.isnan(exact) or len(np.unique(log.accepted)) < 2:
        return
    binned = echo.calibrate(log, min_rows=1).depths[0]
    assert abs(binned.auc - exact) <= binned.auc_error + 1e-12


def test_the_bound_is_reached_by_an_adversary_and_small_on_smooth_rows():
    within = np.nextafter(np.float32(0.5), np.float32(1)), np.float32(0.5)
    bad = echo.calibrate(
        echo.WarmupLog.from_arrays([1] * 40, np.repeat(within, 20), [1] * 20 + [0] * 20), min_rows=1
    ).depths[0]
    assert (bad.auc, bad.auc_error) == (0.5, 0.5)  # the exact AUC is 1
    log = rows_of(20_000)
    smooth = echo.calibrate(log).depths[0]
    exact = separability(log.confidence, log.accepted)
    assert smooth.auc_error < 0.004
    assert abs(smooth.auc - exact.auc) < 1e-4
    assert (smooth.auc_low, smooth.auc_high) == pytest.approx((exact.low, exact.high), abs=2e-4)


def test_thresholds_of_bins_stop_exactly_what_they_report():
    log = rows_of(5000)
    d = echo.calibrate(log).depths[0]
    stopped = log.confidence <= d.threshold
    assert d.stopped == stopped.sum() and d.stopped_accepted == (stopped & log.accepted).sum()
    exact = separability(log.confidence, log.accepted)
    assert 0 <= exact.youden - d.youden < 0.005


def test_auc_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    for coarse in (None, 7):
        log = rows_of(3000, coarse=coarse)
        weight = np.random.default_rng(1).random(len(log))
        ours = separability(log.confidence, log.accepted, weight).auc
        assert (
            abs(
                ours
                - metrics.roc_auc_score(
                    log.accepted, log.confidence.astype(float), sample_weight=weight
                )
            )
            < 1e-12
        )
        ours = separability(log.confidence, log.accepted).auc
        assert abs(ours - metrics.roc_auc_score(log.accepted, log.confidence)) < 1e-12


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.sampled_from([-0.0, 0.0, 0.25, 0.5, 1.0, 7.0]) | UNIT_FLOATS,
    ),
    st.randoms(),
)
def test_separability_of_float32_rows_is_that_of_the_same_numbers_in_float64(score, random):
    """Float32 rows without weights are sorted as integers; anything else goes the general way."""
    label = [random.random() < 0.5 for _ in score]
    found = separability(score, label)
    for other in (
        separability(score.astype(np.float64), label),
        separability(score, label, np.ones(len(score))),
    ):
        for name in ("auc", "low", "high", "threshold", "youden"):
            assert getattr(found, name) == pytest.approx(
                getattr(other, name), abs=1e-12, nan_ok=True
            )


def test_interval_covers_the_truth_from_histograms_with_and_without_weights():
    """Weights of 1 and 8 by confidence: DeLong with squared weights still covers at 95%."""
    from scipy.stats import norm

    truth, hits = norm.cdf(2 * 0.7 / np.sqrt(2)), np.zeros(2)
    for seed in range(400):
        random = np.random.default_rng(seed)
        accepted = random.random(600) < 0.5
        confidence = 1 / (1 + np.exp(-(random.normal(size=600) + 0.7 * (2 * accepted - 1))))
        seen = (confidence > 0.5) | (random.random(600) < 1 / 8)
        weight = np.where(confidence > 0.5, 1.0, 8.0)
        for case, keep in enumerate((np.arange(600) < 200, seen)):
            w = weight[keep] if case else None
            log = echo.WarmupLog.from_arrays(
                np.ones(keep.sum()), confidence[keep], accepted[keep], weight=w
            )
            d = echo.calibrate(log).depths[0]
            hits[case] += d.auc_low <= truth <= d.auc_high
    assert ((hits / 400 >= 0.92) & (hits / 400 <= 0.98)).all(), hits


def test_perfect_separation_is_not_certainty():
    d = echo.calibrate(
        echo.WarmupLog.from_arrays([1] * 70, [0.9] * 20 + [0.1] * 50, [1] * 20 + [0] * 50),
        min_rows=10,
    ).depths[0]
    assert d.auc == 1.0 and d.auc_low == pytest.approx(0.025 ** (1 / 20)) and d.auc_high == 1.0


def test_histogram_files(tmp_path):
    histograms = ConfidenceHistograms.of(rows_of(50))
    path = tmp_path / "h.npz"
    histograms.save(path)
    assert ConfidenceHistograms.load(path) == histograms
    assert [p.name for p in tmp_path.iterdir()] == ["h.npz"]
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(echo.EchoError, match="expected histograms in"):
        ConfidenceHistograms.load(path)
    np.savez(path, version=9, mass=histograms.mass)
    with pytest.raises(echo.EchoError, match=r"version 1 .* got version 9"):
        ConfidenceHistograms.load(path)


@pytest.mark.parametrize("in_place", [False, True])
def test_live_update_counts_what_the_host_counts_and_is_sync_free(in_place):
    random = np.random.default_rng(0)
    n = 4000
    log = echo.WarmupLog.from_arrays(
        random.integers(1, 6, n),
        random.random(n) ** 3,
        random.random(n) < 0.4,
        rank=random.integers(0, 7, n),
        weight=random.choice([1, 4, 10], n),
    )
    score = torch.from_numpy(np.log(log.confidence.astype(np.float64))).float()
    log = echo.WarmupLog.from_arrays(
        log.depth, score.exp().numpy(), log.accepted, rank=log.rank, weight=log.weight
    )
    columns = [torch.from_numpy(c) for c in (log.depth, log.accepted, log.rank, log.weight)]
    live = ConfidenceHistograms.empty(5).live()
    with RefuseSyncs():
        for part in (slice(0, 1500), slice(1500, n)):
            depth, accepted, rank, weight = (c[part] for c in columns)
            live = live.update(depth, score[part], accepted, rank, weight, in_place=in_place)
    assert live.snapshot() == ConfidenceHistograms.of(log)


def test_live_update_ignores_rows_that_are_none():
    live = ConfidenceHistograms.empty(2).live()
    depth = torch.tensor([0, 3, 1, 1, 1, 1, 2], dtype=torch.int32)
    score = torch.tensor([0.0, -1.0, torch.nan, 0.5, -1.0, -torch.inf, 0.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    counted = live.update(
        depth, score, torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.int64), weight
    ).snapshot()
    assert (
        counted.rows == 2
    )  # a probability of 0 is one, at depth 1; and a certain token, at depth 2
    assert counted.mass[WEIGHT, 0, 0, 1, 0] == counted.mass[WEIGHT, 1, 0, 1, -1] == UNIT
    assert live.snapshot().rows == 0  # a value: the first is as it was


def test_live_update_compiles_to_one_graph():
    live = ConfidenceHistograms.empty(3).live()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda m, *rows: LiveHistograms(m).update(*rows).mass, fullgraph=True, backend="eager"
    )
    rows = (
        torch.tensor([1, 2, 0]),
        torch.tensor([-0.5, -2.0, 0.0]),
        torch.tensor([True, False, False]),
        torch.tensor([0, 1, 0]),
    )
    assert torch.equal(compiled(live.mass, *rows), live.update(*rows).mass)


def test_a_decoding_step_counts_live_what_its_log_says():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=40, max_depth=3)
    model = table(30, 0)
    live, logs_ = ConfidenceHistograms.empty(3).live(), []
    steps = echo.decode(
        scheduler,
        TabularTarget(model),
        TabularDrafter(model, k=3),
        [torch.tensor([t]) for t in range(6)],
        max_num_reqs=3,
        max_new_tokens=9,
    )
    for step in steps:
        with RefuseSyncs():
            rank, accepted = echo.loop.draft_labels(step.tree, step.packed, step.accepted)
            live = live.update(step.packed.depth, step.packed.score, accepted, rank)
        logs_.append(step.log())
    assert live.snapshot() == ConfidenceHistograms.empty(3).merge(ConfidenceHistograms.of(logs_))
    assert sum(log.accepted.sum() for log in logs_) > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConfidenceHistograms.of([]), "logs: expected at least one WarmupLog, got none"),
        (
            lambda: ConfidenceHistograms.of(echo.WarmupLog.from_arrays([99], [0.5], [1])),
            "log.depth: expected at most 64, got 99 in row 0",
        ),
        (
            lambda: ConfidenceHistograms.of(
                echo.WarmupLog.from_arrays([1, 1], [0.5] * 2, [1, 0], weight=[1, 2000])
            ),
            "log.weight: expected 0 or from 0.015625 to 1024, got 2000 in row 1",
        ),
        (
            lambda: ConfidenceHistograms.of(
                echo.WarmupLog.from_arrays([1, 1], [0.5] * 2, [1, 0], weight=[1, 0.001])
            ),
            "log.weight: expected 0 or from 0.015625 to 1024, got 0.001 in row 1",
        ),
        (
            lambda: ConfidenceHistograms(np.zeros((3, 1, 4, 2, 7), np.int64)),
            r"mass: expected int64 \[3, 1..64, 2, 2, 3074\]",
        ),
        (
            lambda: ConfidenceHistograms.empty(1).since(ConfidenceHistograms.of(rows_of(5))),
            r"earlier: expected an earlier state of these histograms \(0 rows\)",
        ),
        (
            lambda: echo.calibrate(ConfidenceHistograms.empty(3)),
            "log: expected rows, got an empty log",
        ),
        (
            lambda: (
                ConfidenceHistograms.empty(1)
                .live()
                .update(torch.ones(2), torch.zeros(2), torch.zeros(2) > 0, torch.zeros(2))
            ),
            r"depth: expected int64 or int32 \[N\], got float32 \[2\]",
        ),
        (
            lambda: separability([0.5], [True, False]),
            "confidence, accepted, weight: expected one length, got 1, 2, 1",
        ),
        *(
            (
                lambda kind=kind, bad=bad: separability(np.array([0.9, bad], kind), [1, 0]),
                f"confidence: .* finite, got {bad} in row 1",
            )
            for kind in (np.float32, np.float64)
            for bad in (np.nan, np.inf)
        ),
        (lambda: separability(["a", "b"], [1, 0]), "confidence: expected numbers, got <U1"),
        *(
            (
                lambda bad=bad: separability([0.9, 0.8, 0.1], [1, bad, 0]),
                f"accepted: expected values 0 or 1, got {bad} in row 1",
            )
            for bad in (2, -1, 0.5, np.nan)
        ),
        *(
            (
                lambda bad=bad: separability([0.9, 0.8], [1, 0], [1, bad]),
                f"weight: expected values finite and >= 0, got {bad} in row 1",
            )
            for bad in (-1.0, np.nan, np.inf)
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(echo.EchoError, match=message):
        call()


@pytest.mark.parametrize("given", [None, 3, [None], ["log.npz"]])
def test_what_is_no_log_is_named(given):
    with pytest.raises(echo.EchoError, match="logs: expected a WarmupLog, got"):
        ConfidenceHistograms.of(given)
    if not isinstance(given, list):
        with pytest.raises(echo.EchoError, match="logs: expected a WarmupLog, got"):
            ConfidenceHistograms.empty(1).add(given)
