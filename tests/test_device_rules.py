"""From begin to accept a step is sync-free and no shape depends on data."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import echo
from conftest import CALIBRATION, one_graph
from echo.testing import RefuseSyncs, TabularDrafter, table
from echo.tree import Template, compact, layouts

POLICIES = {
    "paper": echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), echo.SparseGate(CALIBRATION), 24, 3),
    "calibrated": echo.ElasticBudgetScheduler(echo.GlobalRank(2, CALIBRATION), None, 24, 3),
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5, beam=2, max_depth=3),
    "throughput": echo.ElasticBudgetScheduler.throughput_optimal(
        CALIBRATION, echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0)), beam=2
    ),
    "ddd": echo.ElasticBudgetScheduler(
        echo.PerRequest(5, 2), echo.BeamMassGate((2,), -1.0, 2), None, 3
    ),
}


WEIGHTS = {"request_weights": torch.tensor([1.0, 2.0, 1.0, 3.0])}


def step(scheduler, roots, live, tokens, log_probs, target, context, pages, counts, weighting):
    """All that an engine leaves to us between two forwards: gate, commit, select, pack, accept,
    compact, observe, count."""
    tree = scheduler.begin(roots, live=live, num_verify_tokens=24, **weighting)
    for t, q in zip(tokens, log_probs, strict=True):
        tree = scheduler.grow(tree, t, q)
    packed = scheduler.pack(tree)
    accepted = echo.accept(packed, target).truncate(
        eos_tokens=tokens[0][0, 0], max_new_tokens=context
    )
    rank, taken = echo.loop.draft_labels(tree, packed, accepted)
    lists = compact(packed, accepted, context, page_table=pages, page_size=2, pad_slot_id=0)
    history = scheduler.history(8).observe(torch.arange(4), packed, accepted)
    stats = echo.StepStats(counts).observe(packed, accepted)
    planned = (
        packed.tokens,
        packed.mask,
        packed.indptr,
        accepted.tokens,
        accepted.rows,
        accepted.cut_row,
        rank,
        taken,
    )
    return (
        *planned,
        lists.source,
        lists.target,
        lists.accept_index,
        history.steps,
        history.acceptance_histogram,
        history.accepted,
        stats.counts,
    )


class RefuseConstants(RefuseSyncs):
    """Of numbers too that the host would copy to a device in the middle of a step."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.lift_fresh:
            raise echo.EchoError("a tensor is made on the host")
        return super().__torch_dispatch__(func, types, args, kwargs)


def inputs(scheduler, seed, weighting):
    """Arguments of :func:`step`."""
    generator = torch.Generator().manual_seed(seed)
    tree, drafter = (
        scheduler.begin(torch.arange(4), num_verify_tokens=24),
        TabularDrafter(table(30, seed), k=3),
    )
    tokens, log_probs = [], []
    for _ in range(scheduler.max_depth):
        t, q = drafter.draft(torch.arange(4), tree.frontier)
        tokens.append(t)
        log_probs.append(q)
        tree = scheduler.grow(tree, t, q)
    live, target = (
        torch.rand(4, generator=generator) < 0.8,
        torch.randint(0, 30, (scheduler.pack(tree).num_rows,), generator=generator),
    )
    context, counts = (
        torch.randint(0, 9, (4,), generator=generator),
        seed * torch.arange(len(echo.StepStats.empty().counts)),
    )
    return (
        torch.arange(4),
        live,
        tokens,
        log_probs,
        target,
        context,
        torch.arange(80).view(4, 20).int(),
        counts,
        weighting,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_no_operator_syncs(name):
    cases = [inputs(POLICIES[name], 0, weighting) for weighting in ({}, WEIGHTS)]
    step(POLICIES[name], *cases[0])  # tables are copied to the device once
    with RefuseConstants():
        for case in cases:
            step(POLICIES[name], *case)


def test_the_refusing_mode_refuses():
    with RefuseSyncs(), pytest.raises(echo.EchoError, match="device-to-host sync"):
        torch.ones(3).nonzero()
    with RefuseSyncs(), pytest.raises(echo.EchoError, match="device-to-host sync"):
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize("name", POLICIES)
def test_one_graph_and_no_recompile_for_other_values(name):
    scheduler = POLICIES[name]
    cases = [
        inputs(scheduler, seed, {name: values + seed for name, values in WEIGHTS.items()})
        for seed in range(3)
    ]
    one_graph(lambda *data: step(scheduler, *data), cases)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_code_takes_the_same_step():
    scheduler = POLICIES["calibrated"]
    data = inputs(scheduler, 0, {})
    eager, compiled = step(scheduler, *data), torch.compile(step, fullgraph=True)(scheduler, *data)
    assert all(torch.equal(one, two) for one, two in zip(eager, compiled, strict=True))


TEMPLATE = Template.from_choices([[0], [1], [0, 0], [0, 1], [0, 0, 0]])


def whole_engine(scheduler, roots, tokens, log_probs, context, pages):
    """Every drafter that is not a beam, then everything that an engine asks of a packed step."""
    outputs = []
    grown = scheduler.grow_positions(scheduler.begin(roots), tokens, log_probs)
    filled = TEMPLATE.fill(scheduler.begin(roots), tokens, log_probs)
    for tree in (grown, filled, scheduler.grow_from(scheduler.begin(roots), filled, 2)):
        packed = scheduler.pack(tree, sync=lambda buffer: buffer + 0)
        accepted = echo.accept(packed, packed.tokens.roll(-1))
        values = [
            layouts.sglang(packed, 6, context),
            layouts.chains(packed),
            layouts.flashinfer(packed, context, 100),
            layouts.flashinfer(packed, context, 400, bits=False),
            layouts.tensorrt_llm(packed, 6),
            layouts.hugging_face(packed, 6, context, 9, left_padded=False),
            compact(packed, accepted, context),
            compact(packed, accepted, context, past_len=9),
            compact(packed, accepted, context, page_table=pages, page_size=2, pad_slot_id=0),
        ]
        members = [
            getattr(value, field.name) for value in values for field in dataclasses.fields(value)
        ]
        outputs += [x for x in members if isinstance(x, torch.Tensor)]
        outputs += [
            packed.positions(context),
            packed.slot_mapping(context, pages, 2, 0),
            layouts.sglang_mask(packed, 6, "QLEN_ONLY"),
        ]
        outputs += [layouts.sglang_mask(packed, 6, "QLEN_ONLY_BITPACKING")]
        outputs += [layouts.sglang_mask(packed, 6, "FULL_MASK", prefix_lens=context, size=400)]
    return tuple(outputs)


def engine_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (4, 3, 2), generator=generator)
    log_probs = torch.rand(4, 3, 2, generator=generator).log()
    return (
        torch.arange(4),
        tokens,
        log_probs,
        torch.randint(0, 9, (4,), generator=generator),
        torch.arange(40).view(4, 10).int(),
    )


def test_no_exporter_syncs():
    with RefuseSyncs():
        whole_engine(POLICIES["paper"], *engine_inputs(0))


def test_exporters_are_one_graph_without_a_recompile():
    one_graph(lambda *data: whole_engine(POLICIES["paper"], *data), map(engine_inputs, range(3)))


def test_import_is_light():
    code = (
        "import torch, sys; before = set(sys.modules); import echo; new = set(sys.modules) - before;"
        "bad = [m for m in new if m.split('.')[0] in ('triton', 'matplotlib') or m.startswith(('scipy.optimize', 'scipy.stats'))];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
