"""The step's kernels against PyTorch's operations, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import echo
from addresses import checked
from conftest import CALIBRATION, grow_all, policies
from echo import kernels
from echo.budget.rules import select_cheapest
from echo.tree import compact
from echo.tree.packed import pack
from test_select import forests

pytest.importorskip("triton")
from echo.kernels import select, tiles

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.usefixtures("poisoned", "on_the_device"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # of torch's operations, on a GPU
]


@pytest.fixture
def on_the_device():
    """Tensors without a device are where the kernels run."""
    before = torch.get_default_device()
    torch.set_default_device("cpu" if tiles.interpreted() else "cuda")
    yield
    torch.set_default_device(before)


def tensors(value, name=""):
    """All tensors in nested dataclasses, by name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in tensors(part, key).items()}
    if isinstance(value, tuple):
        return {
            k: v for i, part in enumerate(value) for k, v in tensors(part, f"{name}.{i}").items()
        }
    if dataclasses.is_dataclass(value):
        return {
            k: v
            for f in dataclasses.fields(value)
            for k, v in tensors(getattr(value, f.name), f"{name}.{f.name}").items()
        }
    return {}


def same(fused, plain):
    one = tensors(fused)
    two = tensors(plain)
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        if name.endswith("expected"):  # sums of probabilities, in another order
            assert torch.allclose(value, other, rtol=1e-6), name
            continue
        if (
            name.startswith(("history.", "again.")) and value.dim() > 1
        ):  # sums over all requests, in the last place, are in another order
            assert torch.allclose(value[:, -1], other[:, -1]), name
            value = value[:, :-1]
            other = other[:, :-1]
        assert value.dtype == other.dtype and torch.equal(value, other), name


def step(scheduler, batch, *, pads=0, rows=None, **data):
    """Everything between the roots and the history, and what came of it."""
    tree = grow_all(scheduler, torch.arange(batch), num_verify_tokens=rows, **data)
    packed = scheduler.pack(tree, num_verify_tokens=tree.num_verify_tokens + pads)
    accepted = echo.accept(packed, packed.tokens.roll(-1))
    table = torch.arange(9 * batch).view(batch, 9).int()
    device = torch.get_default_device()
    history = scheduler.history(batch + 3, device).observe(
        torch.arange(batch).flip(0) + 2, packed, accepted
    )
    again = history.observe(torch.arange(batch), packed, accepted)
    where = (
        {},
        {"pad_slot_id": 3, "past_len": batch},
        {"page_table": table, "page_size": 2, "pad_slot_id": 5},
    )
    lists = tuple(compact(packed, accepted, torch.arange(batch), **options) for options in where)
    stats = echo.StepStats.empty(device).observe(packed, accepted).observe(packed, accepted)
    return {
        "tree": tree,
        "packed": packed,
        "accepted": accepted,
        "lists": lists,
        "history": history,
        "again": again,
        "stats": stats,
    }


def compare(scheduler, batch, **data):
    with kernels.using("triton"):
        fused = step(scheduler, batch, **data)
    same(fused, step(scheduler, batch, **data))


@settings(max_examples=12)
@given(policies(), st.integers(0, 10_000), st.sampled_from([0.0, 0.3]), st.booleans(), st.data())
def test_whole_steps(policy, seed, spoil, ties, data):
    scheduler, batch = policy
    live = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    capacity = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch)))
    served = data.draw(st.sampled_from([{}, {"request_weights": torch.arange(batch).float()}]))
    pads = data.draw(st.sampled_from([0, 37]))
    compare(
        scheduler,
        batch,
        pads=pads,
        k=3,
        seed=seed,
        spoil=spoil,
        ties=ties,
        live=live,
        verify_limits=capacity,
        **served,
    )


SCHEDULERS = {
    "two-level": echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 3), echo.SparseGate({1: 0.1, 2: 0.05}), 150, 3
    ),
    "calibrated": echo.ElasticBudgetScheduler(
        echo.GlobalRank(2, CALIBRATION), None, 150, 3, max_verify_tokens_per_req=33
    ),
    "goodput": echo.ElasticBudgetScheduler.throughput_optimal(
        CALIBRATION, echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0)), beam=2
    ),
    "autoregressive": echo.ElasticBudgetScheduler.autoregressive(),
}


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("two-level", 1),
        ("two-level", 64),
        ("calibrated", 3),
        ("goodput", 1),
        ("goodput", 40),
        ("autoregressive", 3),
    ],
)
def test_one_request_and_many(name, batch):
    compare(
        SCHEDULERS[name],
        batch,
        rows=150 if name == "goodput" else None,
        k=3,
        seed=batch,
        ties=batch > 1,
    )


def test_trees_of_three_mask_words():
    compare(
        echo.ElasticBudgetScheduler(echo.GlobalRank(7), None, 200, 3, max_verify_tokens_per_req=90),
        3,
        k=7,
        seed=0,
        pads=5,
    )


@settings(max_examples=12)
@given(forests(), st.integers(-2, 80), st.integers(0, 90))
def test_selects_as_torch_does(case, remaining, slack):
    tree, cost, cap = case
    args = tree, cost, cap, torch.tensor(remaining), max(remaining, 1) + slack
    with kernels.using("triton"):
        fused = select_cheapest(*args)
    assert torch.equal(fused, select_cheapest(*args))


@pytest.mark.parametrize("searches", [16, 64, 4096])
def test_the_cutoff_is_the_same_in_any_number_of_rounds(monkeypatch, searches):
    """One to four bits a round, as batches of 4,096, 1,024 and 256 requests have them."""
    monkeypatch.setattr(tiles, "SEARCHES", searches)
    compare(SCHEDULERS["two-level"], 9, k=3, seed=searches, ties=True)


class Open(echo.SparseGate):
    """Thresholds that it does not ask."""

    def __call__(self, layer):
        return layer.log_confidence > -torch.inf


def test_a_subclass_of_a_gate_is_asked_itself():
    compare(
        echo.ElasticBudgetScheduler(echo.TwoLevel(2, 3), Open({1: 0.99}), 20, 3), 3, k=3, seed=1
    )


def test_costs_of_extreme_scores():
    score = torch.tensor([[0.0, -0.0, -1.5, -3.4e38, -torch.inf, -1e-45]])
    assert torch.equal(
        select.path_cost(score, None, None, [1, 5]), echo.tree.supertree.cost_bits(score)
    )


def test_more_rows_than_fit_are_cut_off():
    tree = grow_all(SCHEDULERS["calibrated"], torch.arange(5), k=3, seed=1)
    chosen = torch.ones_like(tree.forest.committed)
    with kernels.using("triton"):
        fused = pack(tree, chosen, 17, 1)
    same(fused, pack(tree, chosen, 17, 1))


def test_an_idle_rank():
    compare(SCHEDULERS["two-level"], 0, k=3, seed=0)


def test_strided_drafts_and_half_precision():
    scheduler = SCHEDULERS["two-level"]
    roots = torch.arange(3)
    tokens = torch.randint(0, 9, (3, 3, 4)).transpose(0, 1)
    log_probs = torch.randn(3, 4, 3).half().log_softmax(1).transpose(1, 2)

    def grown():
        return scheduler.grow_positions(scheduler.begin(roots), tokens, log_probs)

    with kernels.using("triton"):
        fused = grown()
    same(fused, grown())


def test_where_nothing_is_compiled_nothing_is_launched():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    with kernels.using("triton"), checked() as seen, kernels.compiling():
        kernels.argmax_tokens(logits)
    assert seen.launches == 0
    with kernels.using("triton"):
        assert kernels.argmax_tokens(logits).tolist() == [1]
    with pytest.raises(echo.EchoError, match="max_workers: expected"), kernels.compiling(0):
        pass


def test_a_backend_that_is_not_there():
    with (
        pytest.raises(echo.EchoError, match=r"backend: expected one of .* got 'cuda'"),
        kernels.using("cuda"),
    ):
        pass
    with kernels.using("triton"), kernels.using("torch"):
        assert not kernels.use_triton(torch.zeros(1))
    assert not kernels.use_triton(torch.zeros(1, device="cpu"))


LIMITS = {
    "global ranking": (452, 18, 14),
    "global ranking, calibrated": (480, 20, 15),
    "two-level, sparse gate": (713, 18, 14),
    "throughput-optimal": (560, 22, 17),
}
"""The most operations of a step: torch's, kernels', kernels' in a workspace, counters included."""


def test_a_step_launches_no_more_than_it_did():
    sys.path.insert(0, str(BENCHMARKS))
    import operations

    committed = json.loads((BENCHMARKS / "results" / "operations.json").read_text())["steps"]
    for name, scheduler in operations.policies().items():
        for backend, limit in zip(committed[name], LIMITS[name], strict=True):
            total = sum(
                sum(count.values()) for count in operations.step(scheduler, backend).values()
            )
            assert total <= limit, (name, backend, total)
            assert committed[name][backend]["all"] <= limit


def test_the_committed_table_has_every_kernel_on_every_architecture():
    table = json.loads((BENCHMARKS / "results" / "compile.json").read_text())["kernels"]
    step = "begin grow path_cost rank share pack compact summarize observe count"
    for kernel in step.split():
        own = table[kernel].values()
        assert set().union(*(columns["arch"] for columns in own)) == {"sm_80", "sm_90", "sm_100"}, (
            kernel
        )
        assert not any(spills for columns in own for spills in columns["spills"]), kernel
