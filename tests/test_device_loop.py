"""The loops run where the engine's tensors are: nothing but what is documented waits for the
device.

Without a GPU they run on the meta device, which has no values at all: whatever reads one raises.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import echo
import test_device_rules
from echo.testing.invariants import SYNCS

DEVICES = [
    "meta",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
VOCABULARY, SLOTS = 50, 3
POLICIES = test_device_rules.POLICIES | {"plain": echo.ElasticBudgetScheduler.autoregressive()}


class RefuseHost(TorchDispatchMode):
    """Raises on every operator that brings a value from the device to the host, or hands the
    device's work one that lives there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in SYNCS:
            raise echo.EchoError(f"{name} reads back from the device")
        out = func(*args, **(kwargs or {}))
        places = {
            leaf.device.type
            for leaf in tree_leaves((args, kwargs, out))
            if isinstance(leaf, torch.Tensor)
        }
        if len(places) > 1 and not (name == "_to_copy" and not out.is_cpu):
            raise echo.EchoError(f"{name} between {sorted(places)}")
        return out


def following(tokens):
    """The token after each."""
    return (3 * tokens + 1) % VOCABULARY


class Target:
    """Knows what follows by arithmetic, and reads nothing."""

    def admit(self, req_indices, prompts):
        return following(torch.stack([prompt[-1] for prompt in prompts]))

    def verify(self, req_indices, packed):
        return following(packed.tokens)

    def compact(self, req_indices, packed, accepted):
        """There is no cache."""


class Drafter:
    """Says what follows, and something else."""

    def admit(self, req_indices, prompts, first):
        assert req_indices.device == first.device == prompts[0].device

    def draft(self, req_indices, frontier):
        tokens = torch.stack([following(frontier.token), frontier.token], dim=-1)
        return tokens, torch.stack([frontier.score * 0 - 0.2, frontier.score * 0 - 2.0], dim=-1)

    def extend(self, req_indices, packed, accepted):
        """Nothing to remember."""


@dataclass
class OnHost:
    """The one place where the loop may wait: real values where there are any, else ones made up."""

    scheduler: echo.ElasticBudgetScheduler
    calls: int = 0

    def __call__(self, history, *values):
        self.calls += 1
        with _disable_current_modes():
            if not history.steps.is_meta:
                return ORIGINAL(history, *values)
            fake = [
                torch.full(value.shape, 1 if value.dim() == 1 else 7).tolist() for value in values
            ]
            return self.scheduler.history(SLOTS), fake


LOOP = importlib.import_module("echo.loop")  # the name ``echo.decode`` is the function's
ORIGINAL = LOOP._on_host


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
def test_decode_waits_in_one_place(name, device, monkeypatch):
    scheduler, prompts = POLICIES[name], [torch.tensor([t, t + 3]) for t in range(5)]
    host = OnHost(scheduler)
    monkeypatch.setattr(LOOP, "_on_host", host)
    texts, steps, admitted = [[] for _ in prompts], 0, 0
    options = {
        "max_num_reqs": SLOTS,
        "max_new_tokens": 6,
        "eos_token": [44, 45],
        "early_stop": False,
        "device": device,
    }
    with RefuseHost():
        for step in echo.decode(scheduler, Target(), Drafter(), prompts, **options):
            steps += 1
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                admitted += not texts[request]
                texts[request] += tokens
            outcomes = echo.loop.draft_labels(step.tree, step.packed, step.accepted)
            places = (
                *outcomes,
                step.packed.tokens,
                step.accepted.tokens,
                step.sampled,
                step.req_indices,
            )
            assert all(place.device.type == device for place in places)
    assert steps > 1 and steps < host.calls <= 2 * steps  # one a step, and one an admission
    if device == "meta":
        assert all(len(text) == 6 for text in texts)
        return
    for prompt, text in zip(prompts, texts, strict=True):
        token = int(prompt[-1])
        for said in text:
            token = int(following(token))
            assert said == token


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", POLICIES)
def test_the_loop_of_the_readme(name, device):
    """Host ids and a host copy of the history for the choice of the tier; everything else on the
    device."""
    scheduler, ids = POLICIES[name], [2, 0, 7, 5]
    req_indices, root_tokens = (torch.tensor(x, device=device) for x in (ids, [3, 1, 4, 15]))
    history, stats = scheduler.history(8, device), echo.StepStats.empty(device)
    known = scheduler.history(8)
    with RefuseHost():
        for lag in range(3):
            tier = scheduler.choose_tier(known, ids)
            tree = scheduler.begin(root_tokens, num_verify_tokens=tier.num_verify_tokens)
            for _ in range(tier.depth):
                tree = scheduler.grow(tree, *Drafter().draft(req_indices, tree.frontier))
            packed = scheduler.pack(tree)
            accepted = echo.accept(packed, Target().verify(req_indices, packed))
            history = history.observe(req_indices, packed, accepted)
            stats = stats.observe(packed, accepted)
            root_tokens = torch.where(accepted.num_emitted > 0, accepted.bonus, root_tokens)
            if lag and device != "meta":
                with _disable_current_modes():
                    known = history.to("cpu")
    if device != "meta":
        assert stats.read().emitted_tokens >= 12


@pytest.mark.parametrize("device", DEVICES)
def test_speculate_chooses_from_what_the_host_knows(device):
    scheduler, req_indices = POLICIES["throughput"], torch.arange(4, device=device)
    history, known = scheduler.history(4, device), scheduler.history(4)
    options = {
        "early_stop": False,
        "tier": scheduler.choose_tier(known, range(4)),
        "max_new_tokens": torch.full((4,), 2, device=device),
    }
    with RefuseHost():
        step, history = echo.loop.speculate(
            scheduler, Target(), Drafter(), req_indices, req_indices + 5, history, **options
        )
    assert step.tier == options["tier"] and history.steps.device.type == device
    if device == "meta":
        with pytest.raises(
            NotImplementedError, match="Cannot copy out of meta"
        ):  # without one it copies
            echo.loop.speculate(
                scheduler,
                Target(),
                Drafter(),
                req_indices,
                req_indices + 5,
                history,
                early_stop=False,
            )
    else:
        again, _ = echo.loop.speculate(
            scheduler, Target(), Drafter(), req_indices, req_indices + 5, history
        )
        assert again.tier == scheduler.choose_tier(history.to("cpu"), req_indices.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", ["choose_tier", "tier_curve"])
def test_a_tier_is_chosen_on_the_host(call, device):
    scheduler = POLICIES["throughput"]
    plan, history = getattr(scheduler, call), scheduler.history(4)
    with pytest.raises(
        echo.EchoError,
        match=f"req_indices: expected ints from 0 to 3 on the host .* got a tensor on {device}",
    ):
        plan(history, torch.arange(4, device=device))
    with pytest.raises(
        echo.EchoError, match=f"history: expected one on cpu .* got one on {device}"
    ):
        plan(history.to(device), [0, 1])
    same = [
        plan(history, ids)
        for ids in (
            [2, 0],
            (2, 0),
            np.array([2, 0]),
            np.array([2, 0], np.int32),
            torch.tensor([2, 0]),
        )
    ]
    assert all(
        np.array_equal(one, same[0], equal_nan=True) if call == "tier_curve" else one == same[0]
        for one in same
    )
    for wrong in ([4], [0.5], [True], torch.tensor([[1]]), "0", 3, [None], torch.tensor([-1])):
        with pytest.raises(echo.EchoError, match="req_indices: expected"):
            plan(history, wrong)


def test_the_mode_refuses():
    with RefuseHost():
        device = torch.zeros(3, device="meta")
        device + 1
        device.scatter_(0, torch.zeros(1, dtype=torch.int64, device="meta"), 1.0)
        with pytest.raises((echo.EchoError, NotImplementedError)):
            device.tolist()
        with pytest.raises(echo.EchoError, match="between"):
            device * torch.ones(())
        with pytest.raises(echo.EchoError, match="reads back"):
            bool(device[0])
