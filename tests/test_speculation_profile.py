"""Profiling an engine: machines that take what was measured on an H100, with noise, on a fake
clock.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import echo
import measured
from echo.cost import SpeculationProfile

MACHINES = measured.machines()
EXPERTS, BOTH = "qwen3-235b, context 960", "llama-3.1-8b"
IDENTITY = {"model": "shape", "device": "H100"}
LIMITS = {"max_num_reqs": 128, "max_num_tokens": 1024}
CHANCES = np.array([0.5, 0.7, 0.9])


def profiled(machine, profile=None, **options):
    profile = SpeculationProfile(IDENTITY) if profile is None else profile
    given = LIMITS | {"context_lens": machine.contexts, "clock": machine.clock} | options
    return profile.measure(machine, **given)


def kept(machine, cost):
    """Share of the best throughput that decisions by ``cost`` reach: by batch, context, chance."""
    found = []
    for context in machine.contexts:
        for reqs in (1, 4, 16, 64, 128):
            each = np.array([n for n in (1, 2, 3, 4, 6, 8, 16, 32, 64) if n * reqs <= 1024])
            tokens = each * reqs
            emitted = (1 - CHANCES[:, None] ** each) / (1 - CHANCES[:, None])
            believed = emitted / cost(tokens, num_reqs=reqs, context_tokens=reqs * context)
            true = emitted / machine.seconds(reqs, tokens, context)
            own = true[np.arange(len(CHANCES)), believed.argmax(axis=1)]
            found.append(own / true.max(axis=1))
    return np.array(found)


@pytest.mark.parametrize("name", [EXPERTS, BOTH, "llama-3.3-70b, context 960"])
def test_few_loads_decide_as_well_as_all(name):
    """Within a minute, of which capturing each load takes most."""
    for seed in range(2):
        machine = measured.Machine(MACHINES[name], seed=seed)
        profile = profiled(machine)
        assert machine.now < 60 and len(machine.seen) <= 45
        shares = kept(machine, profile.cost())
        assert shares.mean() > 0.985
        every = echo.CostModel.from_samples(**MACHINES[name])
        assert shares.mean() > kept(machine, every).mean() - 0.01


def test_it_measures_where_decisions_are_uncertain():
    """Its loads decide better than as many at random."""
    chosen, random = [], []
    for seed in range(3):
        machine = measured.Machine(MACHINES[EXPERTS], seed=seed)
        profile = profiled(machine)
        chosen.append(kept(machine, profile.cost()).mean())
        rng, samples = np.random.default_rng(seed), []
        for _ in range(len(machine.seen)):
            reqs = int(2 ** rng.integers(0, 8))
            tokens = min(1024, reqs * int(2 ** rng.integers(0, 7)))
            seconds = float(machine.seconds(reqs, tokens, 960).squeeze())
            samples += [(reqs, tokens, 960, seconds * np.exp(0.02 * rng.normal())) for _ in "abc"]
        random.append(kept(machine, SpeculationProfile(IDENTITY, tuple(samples)).cost()).mean())
    assert np.mean(chosen) > np.mean(random)


def test_where_nothing_is_in_doubt_it_stops_at_once():
    machine = measured.Machine(MACHINES[EXPERTS], noise=0.0)
    machine.seconds = lambda reqs, tokens, context: np.array(0.01)  # tokens are free
    profile = profiled(machine)
    assert len(profile.samples) <= 3 * 12
    assert profile.cost()(1024, num_reqs=128) == pytest.approx(0.01)


@pytest.mark.parametrize("limit", [0.0, 1.0, 5.0])
def test_it_ends_in_time_and_is_resumed(limit):
    machine = measured.Machine(MACHINES[BOTH])
    saved = []
    first = profiled(machine, max_seconds=limit, on_sample=lambda p, stake: saved.append(p))
    assert machine.now <= limit + 0.5  # no step is longer
    assert not limit or saved[-1].samples == first.samples[: len(saved[-1].samples)]
    text = first.to_json()
    calls = machine.calls
    whole = profiled(machine, SpeculationProfile.from_json(text, IDENTITY))
    assert whole.samples[: len(first.samples)] == first.samples
    assert kept(machine, whole.cost()).mean() > 0.985
    fresh = measured.Machine(MACHINES[BOTH])
    profiled(fresh)
    assert machine.calls - calls <= fresh.calls + 3 * 4  # three loads again, to compare


def test_what_is_at_stake_is_reported_and_falls():
    stakes = []
    machine = measured.Machine(MACHINES["llama-3.3-70b, context 960"])
    profiled(machine, on_sample=lambda profile, stake: stakes.append(stake))
    known = [stake for stake in stakes if np.isfinite(stake)]
    assert not np.isfinite(stakes[0]) and known[-1] < known[0]


def test_another_machine_is_refused():
    profile = profiled(measured.Machine(MACHINES[BOTH]))
    slower = measured.Machine(MACHINES[BOTH], slower=1.5)
    saved = []
    with pytest.raises(echo.EchoError, match=r"step: .* got 1\.\d+ times as many: another machine"):
        profiled(slower, profile, on_sample=lambda so_far, stake: saved.append(so_far))
    assert not saved  # nothing of it gets into the profile
    as_fast = measured.Machine(MACHINES[BOTH], slower=1.1, seed=9)
    assert profiled(as_fast, profile).samples[: len(profile.samples)] == profile.samples


def test_another_machine_is_refused_at_another_context():
    machine = measured.Machine(MACHINES[BOTH])
    near, far = ({"context_lens": [context]} for context in machine.contexts)
    profile = profiled(machine, **near)
    for limits in ({}, {"max_num_reqs": 2, "max_num_tokens": 8}):
        slower = measured.Machine(MACHINES[BOTH], slower=2.0)
        with pytest.raises(echo.EchoError, match=r"step: .* times as many: another machine"):
            profiled(slower, profile, **far, **limits)
        given = LIMITS | limits
        for reqs, tokens, _ in slower.seen:  # no step is beyond what the engine can run
            assert reqs <= given["max_num_reqs"] and tokens <= given["max_num_tokens"]


def test_a_profile_that_is_done_does_not_grow_when_it_is_resumed():
    """Three of its loads are timed again, to compare."""
    machine = measured.Machine(MACHINES[EXPERTS], noise=0.0)
    machine.seconds = lambda reqs, tokens, context: np.array(0.01)  # tokens are free
    profile = profiled(machine)
    calls = machine.calls
    assert profiled(machine, profile) == profile
    assert machine.calls - calls == 3 * (1 + 3)
    for name in (EXPERTS, BOTH):  # ended because decisions stayed, or nothing is at stake
        machine, saved = measured.Machine(MACHINES[name]), []
        done = profiled(machine, on_sample=lambda p, stake, saved=saved: saved.append(p.to_json()))
        assert machine.now < 60
        for text in (done.to_json(), saved[-1]):
            again = SpeculationProfile.from_json(text, IDENTITY)
            assert profiled(machine, again) == again == done
        more = profiled(machine, done, max_num_reqs=256, max_num_tokens=2048)
        assert len(more.samples) > len(done.samples)  # other limits are other decisions
        assert profiled(machine, done, acceptance=(0.3, 0.8)) != done
    noisy = measured.Machine(MACHINES["llama-3.3-70b, context 960"], noise=0.05)
    found = SpeculationProfile(IDENTITY)
    for _ in range(4):
        found = profiled(noisy, found)
        times = Counter(sample[:3] for sample in found.samples)
        assert max(times.values()) <= 3 * 3


def test_a_clock_that_stands_still_is_refused():
    with pytest.raises(echo.EchoError, match=r"seconds of a step: expected a number >= .* got 0"):
        profiled(measured.Machine(MACHINES[EXPERTS]), clock=lambda: 0.0)


def test_another_models_profile_is_refused():
    text = SpeculationProfile(IDENTITY, ((1, 1, 0, 0.1),)).to_json()
    with pytest.raises(echo.EchoError, match=r"profile: expected one of .*other.*, got one of"):
        SpeculationProfile.from_json(text, IDENTITY | {"model": "other"})
    for wrong in ("{", text.replace('"version": 1', '"version": 9'), text.replace("echo-", "x-")):
        with pytest.raises(echo.EchoError, match="profile: expected the JSON of a profile"):
            SpeculationProfile.from_json(wrong, IDENTITY)


def test_a_profile_knows_what_drafting_costs():
    drafting = {"draft_layer": 0.002, "draft_token": 1e-5}
    costly, free = (
        profiled(measured.Machine(MACHINES[EXPERTS]), SpeculationProfile(IDENTITY, (), own))
        for own in (drafting, {})
    )
    assert costly.cost().draft_layer == 0.002 and free.cost().draft_layer == 0
    again = SpeculationProfile.from_json(costly.to_json(), IDENTITY)
    assert again == costly and json.loads(costly.to_json())["drafting"] == drafting
    assert again.cost() == costly.cost()


def test_what_has_settled_is_json_and_knows_what_drafting_costs():
    limits = {"max_num_reqs": np.int64(128), "max_num_tokens": torch.tensor(1024)}
    machine = measured.Machine(MACHINES[EXPERTS])
    lengths = iter(machine.contexts)
    settled = profiled(machine, context_lens=lengths, **limits, max_seconds=1e9)
    again = SpeculationProfile.from_json(settled.to_json(), IDENTITY)
    assert again == settled and settled.settled["context_lens"] == list(machine.contexts)
    cheaper = replace(settled, drafting={"draft_layer": 1e-9})
    assert profiled(machine, settled, max_seconds=1e9) is settled
    assert profiled(machine, cheaper, max_seconds=1e9).settled["drafting"] == cheaper.drafting


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_num_reqs": 0}, "max_num_reqs: expected an int >= 1"),
        ({"max_num_tokens": 64}, "max_num_tokens: expected an int >= 128"),
        ({"context_lens": []}, "context_lens: expected at least one"),
        ({"acceptance": []}, "acceptance: expected at least one"),
        ({"acceptance": 0.5}, "acceptance: expected numbers"),
        ({"acceptance": [1.5]}, "acceptance: expected a number from"),
        ({"max_seconds": -1}, "max_seconds: expected a number"),
        ({"repeats": 0}, "repeats: expected an int >= 1"),
    ],
)
def test_bad_input_names_the_argument(options, says):
    with pytest.raises(echo.EchoError, match=says):
        profiled(measured.Machine(MACHINES[EXPERTS]), **options)
    with pytest.raises(echo.EchoError, match="drafting: expected draft_layer"):
        SpeculationProfile(IDENTITY, (), {"draft": 1.0})
    with pytest.raises(echo.EchoError, match="samples: expected requests"):
        SpeculationProfile(IDENTITY, ((1, 2),))
    with pytest.raises(echo.EchoError, match=r"samples: expected requests.*out of range"):
        SpeculationProfile(IDENTITY, ((1, 1, 0, 0.0),))
    with pytest.raises(echo.EchoError, match="draft_layer: expected a number >= 0"):
        SpeculationProfile(IDENTITY, (), {"draft_layer": torch.ones(2)})
    with pytest.raises(echo.EchoError, match="identity: expected a dict"):
        SpeculationProfile("llama")
    with pytest.raises(echo.EchoError, match=r"identity: expected strings by name, got .*float16"):
        SpeculationProfile({"dtype": torch.float16})
