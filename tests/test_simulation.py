"""The raised trace, the paper's bench and the service: invariants, determinism, each in small."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import echo
from echo.testing import TabularDrafter, TabularTarget, Trace, record, replay, table

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from common import roofline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FREE, COST = echo.CostModel((1,), (1.0,)), roofline.plan("LLaMA-3.3-70B", tensor=4)


@pytest.fixture(scope="module", autouse=True)
def _path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(Path(__file__).parent)
        yield
        for name in (
            "common",
            "common.machines",
            "common.policies",
            "common.raised",
            "common.replays",
            "paper",
            "service",
        ):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def raised():
    from common.raised import raised

    return raised


@pytest.fixture(scope="module")
def trace():
    """40 toy texts, whose drafter is right half of the time."""
    target = table(60, seed=1)
    pair = (
        TabularTarget(target),
        TabularDrafter((target + table(60, seed=2)) / 2, k=3, dtype=torch.float16),
    )
    prompts = [torch.tensor([t]) for t in range(40)]
    *_, found = record(
        *pair, prompts, ["even", "odd"] * 20, max_num_reqs=40, depth=4, beam=3, max_new_tokens=20
    )
    return found


@pytest.mark.parametrize("odds", [1.0, 3.0, 40.0])
def test_a_raised_trace_is_a_trace_of_the_same_texts(raised, trace, odds):
    better = raised(trace, odds)
    assert np.array_equal(better.text, trace.text) and np.array_equal(better.indptr, trace.indptr)
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=60, max_depth=4)
    report = replay(better, scheduler, FREE, batch=10)
    assert report.misses == 0
    assert sum(a.tokens for a in report.answers) == trace.positions - 40
    known = np.isfinite(better.log_prob[:, 0, 0].astype(np.float32))
    mass = np.where(known, np.exp(better.log_prob[:, 0, 0].astype(np.float32)), 0).sum(1)
    before = np.where(known, np.exp(trace.log_prob[:, 0, 0].astype(np.float32)), 0).sum(1)
    assert (mass <= 1.01).all() and (mass >= before - 0.01).all()
    for siblings in better.token[known.all(1)][:, 0, 0]:
        assert len(set(siblings.tolist())) == 3


def test_acceptance_rises_with_the_odds_and_odds_of_one_change_nothing(raised, trace):
    assert raised(trace, 1.0) is trace
    eagle = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=8, beam=3, max_depth=4)
    found = [
        replay(raised(trace, odds), eagle, FREE, batch=10).tokens_per_step
        for odds in (1.0, 5.0, 50.0, 1e6)
    ]
    assert found == sorted(found)
    assert found[-1] > 4.0 > found[0]


def test_a_most_probable_child_is_right_as_often_as_its_raised_odds_say(raised, trace):
    inside = np.ones(trace.positions, dtype=bool)
    inside[trace.indptr[1:] - 1] = False
    following, best = np.roll(trace.text, -1), trace.log_prob[:, 0, 0].astype(np.float64).argmax(1)
    at = np.arange(trace.positions)
    q = np.exp(trace.log_prob[at, 0, 0, best].astype(np.float64))
    right = trace.token[at, 0, 0, best] == following
    expected = right + ~right * (4.0 * q / (1 + 4.0 * q))  # odds times 5: (p - q) / (1 - q)
    better = np.stack(
        [raised(trace, 5.0, seed).token[at, 0, 0, best] == following for seed in range(5)]
    )
    error = np.sqrt((expected * (1 - expected))[inside].sum() / 5) / inside.sum()
    assert better[:, inside].mean() == pytest.approx(expected[inside].mean(), abs=4 * error)


def test_raising_is_deterministic_by_seed(raised, trace):
    same = [raised(trace, 5.0, seed=3) for _ in range(2)]
    assert np.array_equal(same[0].token, same[1].token) and np.array_equal(
        same[0].expanded, same[1].expanded
    )
    assert not np.array_equal(same[0].token, raised(trace, 5.0, seed=4).token)


def test_a_cut_trace_replays_exactly(trace):
    pytest.importorskip("simpy")
    from service import cut

    short = cut(trace, 6)
    assert (np.diff(short.indptr) == 6).all()
    report = replay(
        short,
        echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=60, max_depth=4),
        FREE,
        batch=10,
    )
    assert report.misses == 0
    assert sum(a.tokens for a in report.answers) == 5 * len(short.kind)


def test_the_papers_bench_in_small():
    from common.machines import measured
    from common.replays import calibrate, halves, warm_up
    from paper import Q235, SEVENTY, Bench

    tune, test = halves(Trace.load(BENCHMARKS / "traces" / "smollm2.npz").texts(range(0, 64, 8)))
    known = calibrate(tune), warm_up(tune).log
    machines = {name: measured()[name] for name in (Q235, SEVENTY)}
    together = list(Bench(tune, test, *known, batch=8, share=0.01).cells(machines))
    alone = [
        c
        for name in machines
        for c in Bench(tune, test, *known, batch=8, share=0.01).cells({name: machines[name]})
    ]
    assert together == alone  # a model's figures do not depend on those before it
    cells = {c["policy"]: c for c in together if c["model"] == SEVENTY}
    assert cells["EAGLE-3, default"]["rows"] == 8 * 8 and cells["EAGLE-3, matched"]["rows"] == 5 * 8
    for cell in cells.values():
        assert (
            cell["low"] <= cell["tokens_per_second"] * (1 + 1e-9) and cell["tokens_per_step"] >= 1
        )
    assert cells["oracle"]["tokens_per_second"] >= cells["oracle"]["plain"]
    assert cells["oracle"]["rows"] < cells["EAGLE-3, matched"]["rows"]


@pytest.fixture(scope="module")
def steps(trace):
    pytest.importorskip("simpy")
    import service
    from service import CHUNK, replayed

    service.SECONDS, service.SETTLE = 20.0, 4.0
    eagle = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=3, max_depth=3)
    plain = echo.ElasticBudgetScheduler.autoregressive()
    return {
        name: {
            (b, beside): replayed(trace, scheduler, b, CHUNK * beside, share=0.1)
            for b in service.STEPS
            for beside in (False, True)
        }
        for name, scheduler in {"eagle": eagle, "off": plain}.items()
    }


def test_the_service_is_deterministic_by_seed(steps):
    from service import Load, simulate

    first, again, other = (
        simulate(steps["eagle"], COST, Load(6.0, "bursty"), 2, seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_the_service_keeps_its_books(steps, monkeypatch):
    """No request, token or byte is lost; off is never quicker than a step."""
    import service

    monkeypatch.setattr(service, "CACHE", 9000)
    cached = []

    class Watched(service.Replica):
        def leave(self):
            super().leave()
            every = self.requests
            cached.append(self.cached)
            assert (
                self.cached
                == int((every.prompt + every.output)[self.running].sum())
                <= service.CACHE
            )
            assert (every.prefilled[self.running] <= every.prompt[self.running]).all()

    monkeypatch.setattr(service, "Replica", Watched)
    found = service.simulate(steps["off"], COST, service.Load(1.5, "poisson"), 1)
    assert max(cached) > 4500
    assert found["tpot_50"] >= COST(1)
    assert (
        0 <= found["attained_20"] <= found["attained_40"] <= 1 and found["tokens_per_second"] > 100
    )


def test_more_load_serves_no_request_better(steps):
    from service import Load, simulate

    attained = [
        simulate(steps["eagle"], COST, Load(rate, "poisson"), 1)["attained_40"]
        for rate in (1.0, 12.0, 60.0)
    ]
    assert attained[0] > 0.95 and attained[0] >= attained[1] >= attained[2] and attained[2] < 0.2
