"""A workspace plans as the scheduler does, bit for bit, at addresses that never change, and its
parts can be captured.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import echo
from addresses import checked
from conftest import CALIBRATION, one_graph, policies
from echo import kernels
from echo.testing import RecordedGraphs, RefuseSyncs
from echo.testing.graphs import Recording
from echo.tree import compact
from test_plan_kernels import same

K = 3
PAGE = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COST = echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0))
SCHEDULERS = {
    "paper": echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 3), echo.SparseGate({1: 0.1, 2: 0.05}), 40, 3
    ),
    "ranking": echo.ElasticBudgetScheduler(
        echo.GlobalRank(2), None, 40, 3, max_verify_tokens_per_req=33
    ),
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5, beam=2, max_depth=3),
    "throughput": echo.ElasticBudgetScheduler.throughput_optimal(CALIBRATION, COST, beam=2),
    "uncalibrated": echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, COST, 3),
}


def drafts(scheduler, batch, seed):
    """Candidates for each layer of a step, as the frontiers of the rule ask for them."""
    generator = torch.Generator().manual_seed(seed)
    width = 1
    made = []
    for _ in range(scheduler.max_depth):
        shape = batch, width, K
        scores = (1.5 * torch.randn(shape, generator=generator)).log_softmax(-1)
        made.append((torch.randint(0, 20, shape, generator=generator), scores))
        width = min(scheduler.rule.beam, width * K)
    return made


def data(scheduler, lanes, seed):
    generator = torch.Generator().manual_seed(seed)
    made = {
        "roots": torch.randint(0, 20, (lanes,), generator=generator),
        "live": torch.rand(lanes, generator=generator) < 0.9,
        "verify_limits": torch.randint(1, 9, (lanes,), generator=generator),
        "drafts": drafts(scheduler, lanes, seed),
        "target": torch.randint(0, 20, (64,), generator=generator),
        "prefix_lens": torch.randint(0, 9, (lanes,), generator=generator),
        "table": torch.randperm(40 * lanes, generator=generator).view(lanes, 40).int(),
    }
    return torch.utils._pytree.tree_map(lambda value: value.to(DEVICE), made)


def eager(scheduler, inputs, depth, rows, history, stats):
    """A step by the scheduler's own calls."""
    tree = scheduler.begin(
        inputs["roots"],
        live=inputs["live"],
        verify_limits=inputs["verify_limits"],
        num_verify_tokens=rows,
    )
    for tokens, log_probs in inputs["drafts"][:depth]:
        tree = scheduler.grow(tree, tokens, log_probs)
    packed = scheduler.pack(tree)
    accepted = echo.accept(packed, inputs["target"][:rows])
    lists = compact(
        packed,
        accepted,
        inputs["prefix_lens"],
        page_table=inputs["table"],
        page_size=PAGE,
        pad_slot_id=0,
    )
    lanes = torch.arange(len(inputs["roots"]), device=DEVICE)
    return (
        packed,
        accepted,
        lists,
        history.observe(lanes, packed, accepted),
        stats.observe(packed, accepted),
    )


class Parts:
    """The three captures of a step around a workspace, their inputs at fixed addresses."""

    def __init__(self, scheduler, lanes, rows):
        self.space = echo.Workspace(scheduler, lanes, k=K, num_verify_tokens=rows, device=DEVICE)
        self.inputs = data(scheduler, lanes, 0)

    def fill(self, inputs):
        for name, value in inputs.items():
            mine = self.inputs[name]
            for old, new in (
                [(mine, value)]
                if name != "drafts"
                else [p for pair in zip(mine, value, strict=True) for p in zip(*pair, strict=True)]
            ):
                old[: len(new)] = new

    def draft(self, lanes, depth):
        i = self.inputs
        tree = self.space.begin(
            i["roots"][:lanes], live=i["live"][:lanes], verify_limits=i["verify_limits"][:lanes]
        )
        for tokens, log_probs in i["drafts"][:depth]:
            tree = self.space.grow(tree, tokens[:lanes], log_probs[:lanes])
        return tree

    def plan(self, tree, rows):
        return self.space.pack(tree, rows)

    def accept(self, packed):
        lanes = packed.batch
        i = self.inputs
        accepted = self.space.accept(packed, i["target"][: packed.num_rows])
        pages = {"page_table": i["table"][:lanes], "page_size": PAGE, "pad_slot_id": 0}
        lists = self.space.compact(packed, accepted, i["prefix_lens"][:lanes], **pages)
        self.space.observe(torch.arange(lanes, device=DEVICE), packed, accepted)
        return accepted, lists

    def step(self, graphs, lanes, depth, rows):
        self.space.set_num_verify_tokens(rows)
        tree = graphs(("draft", lanes, depth), lambda: self.draft(lanes, depth))
        packed = graphs(("plan", lanes, depth, rows), lambda: self.plan(tree, rows))
        return packed, *graphs(("accept", lanes, rows), lambda: self.accept(packed))


def cut(value, depth):
    """Lists as long as the deepest walk, without what lies below ``depth`` layers."""
    return {k: v[:, : depth + 1] if v.dim() > 1 else v for k, v in vars(value).items()}


def check(scheduler, lanes, rows, steps, graphs, seed=0):
    """Steps of a workspace against the scheduler's, with one history and one counter each:
    ``steps`` are (lanes, depth, rows).
    """
    parts = Parts(scheduler, lanes, rows)
    history = scheduler.history(lanes, DEVICE)
    stats = echo.StepStats.empty(DEVICE)
    for turn, (n, depth, count) in enumerate(steps):
        inputs = data(scheduler, n, seed + turn)
        wanted = eager(scheduler, inputs, depth, count, history, stats)
        history, stats = wanted[3:]
        parts.fill(inputs)
        packed, accepted, lists = parts.step(graphs, n, depth, count)
        fair = packed.acceptance_histogram is None or not depth
        assert int(packed.num_layers) == depth
        columns = {
            k: v
            for k, v in vars(packed).items()
            if k not in ("max_depth", "num_layers", "acceptance_histogram", "expected")
        }
        same({k: columns[k] for k in columns}, {k: getattr(wanted[0], k) for k in columns})
        if not fair:
            same(
                (packed.acceptance_histogram[:, :depth], packed.expected[:, :depth]),
                (wanted[0].acceptance_histogram, wanted[0].expected),
            )
        same(cut(accepted, depth), vars(wanted[1]))
        same(cut(lists, depth), vars(wanted[2]))
        assert not accepted.rows[:, depth + 1 :].ge(0).any()
        same({"history": parts.space.history}, {"history": history})
        assert torch.equal(parts.space.stats.counts, stats.counts)
    return parts


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_tier_plans_as_the_scheduler_does(name, backend):
    """Prefixes of the lanes, other depths, other numbers of rows, in the same buffers one after
    another; on a GPU as CUDA graphs from the second time on.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    steps = [(4, 3, 40), (2, 1, 7), (4, 2, 16), (1, 3, 30), (3, 3, 3), (4, 3, 40)]
    steps += [(4, 3, 40)] * (DEVICE == "cuda")
    with kernels.using(backend):
        check(SCHEDULERS[name], 4, 40, steps, echo.workspace.Graphs(DEVICE))


@settings(max_examples=25)
@given(policies(), st.integers(0, 1000), st.data())
def test_any_policy(policy, seed, drawn):
    scheduler, lanes = policy
    rows = lanes + 20
    tier = st.tuples(
        st.integers(1, lanes), st.integers(1, scheduler.max_depth), st.integers(lanes, rows)
    )
    check(
        scheduler,
        lanes,
        rows,
        drawn.draw(st.lists(tier, min_size=1, max_size=3)),
        echo.workspace.Graphs("cpu"),
        seed,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_recorded_steps_run_again_on_other_data(name, backend):
    """As CUDA graphs do: the operations of one step, at its addresses, give what an eager step
    gives on other data and budgets.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    graphs = RecordedGraphs()
    steps = [(4, 3, 16), (4, 3, 16), (2, 2, 8), (4, 3, 40), (2, 2, 8), (2, 3, 8), (2, 2, 8)]
    with kernels.using(backend), torch.inference_mode():
        check(SCHEDULERS[name], 4, 40, steps, graphs)
    assert graphs.runs["draft", 4, 3] == graphs.runs["plan", 2, 2, 8] == 1
    assert graphs.runs["accept", 2, 8] == 2, "acceptance is one graph for every depth"


def test_a_stale_host_number_is_found():
    """The rehearsal finds what a captured graph would get wrong."""
    graphs = RecordedGraphs()
    wanted = 0
    total = torch.zeros(())
    for turn in range(4):
        graphs("stale", lambda turn=turn: total.add_(turn))
        wanted += turn
    assert total.item() != wanted
    graphs("reads", lambda: 0)
    with pytest.raises(echo.EchoError, match="_local_scalar_dense"):
        graphs("reads", total.item)
    graphs("constant", lambda: 0)
    with pytest.raises(echo.EchoError, match="constants from the host"):
        graphs("constant", lambda: torch.tensor([1, 2]))


ALLOWED = {"exp", "zero_"}
"""Operations of a step's plan that are torch's own, all of them into buffers."""


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_kernels_nothing_is_allocated(name):
    pytest.importorskip("triton")
    scheduler = SCHEDULERS[name]
    parts = Parts(scheduler, 4, 40)
    with kernels.using("triton"):
        parts.step(echo.workspace.Graphs("cpu"), 4, 3, 40)
        recording = Recording()
        with recording.launches(), recording, RefuseSyncs():
            tree = parts.draft(4, 3)
            packed = parts.plan(tree, 40)
    launched = [name for name in recording.operations if name.startswith("kernel")]
    assert set(recording.operations) - set(launched) <= ALLOWED, recording.operations
    assert len(recording.operations) <= 10, recording.operations
    assert packed.tokens.data_ptr() == parts.plan(tree, 8).tokens.data_ptr()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_kernels_touch_nothing_but_the_workspace(name):
    """Columns of wide buffers, prefixes of lanes: every address is an element of what a launch
    was given.
    """
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        pytest.skip("addresses are checked in the interpreter")
    parts = Parts(SCHEDULERS[name], 4, 40)
    with kernels.using("triton"), checked() as seen:
        for lanes, depth, rows in ((4, 3, 40), (3, 1, 5), (2, 0, 2)):
            parts.step(echo.workspace.Graphs("cpu"), lanes, depth, rows)
    assert seen.launches > 20


def test_addresses_never_change():
    scheduler = SCHEDULERS["paper"]
    parts = Parts(scheduler, 4, 40)
    graphs = echo.workspace.Graphs("cpu")
    seen = set()
    for turn in range(3):
        parts.fill(data(scheduler, 4, turn))
        packed, accepted, lists = parts.step(graphs, 4, 3, 40)
        values = [
            *vars(packed).values(),
            *vars(accepted).values(),
            *vars(lists).values(),
            *vars(parts.space.history).values(),
        ]
        seen.add(tuple(value.data_ptr() for value in values if isinstance(value, torch.Tensor)))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["paper", "throughput"])
def test_each_part_compiles_whole(name):
    scheduler = SCHEDULERS[name]
    parts = Parts(scheduler, 4, 40)

    def run(*inputs):
        parts.inputs = dict(zip(parts.inputs, inputs, strict=True))
        tree = parts.draft(4, 3)
        packed = parts.plan(tree, 40)
        accepted, lists = parts.accept(packed)
        return (
            packed.tokens.clone(),
            packed.mask.clone(),
            accepted.tokens.clone(),
            lists.target.clone(),
        )

    one_graph(run, [tuple(data(scheduler, 4, seed).values()) for seed in range(3)])


def test_bad_arguments():
    scheduler = SCHEDULERS["paper"]
    with pytest.raises(echo.EchoError, match="num_verify_tokens: expected an int >= 1, got 0"):
        echo.Workspace(scheduler, 4, k=2, num_verify_tokens=0)
    with pytest.raises(
        echo.EchoError, match="k: expected one number, or one for each of 3 depths, got 2 numbers"
    ):
        echo.Workspace(scheduler, 4, k=[2, 2], num_verify_tokens=8)
    with pytest.raises(echo.EchoError, match="scheduler: expected an ElasticBudgetScheduler"):
        echo.Workspace(None, 4, k=2, num_verify_tokens=8)
    space = echo.Workspace(scheduler, 4, k=2, num_verify_tokens=8)
    with pytest.raises(
        echo.EchoError, match="num_verify_tokens: expected an int from 1 to 8, got 9"
    ):
        space.set_num_verify_tokens(9)
    with pytest.raises(
        echo.EchoError, match=r"len\(root_tokens\): expected an int from 0 to 4, got 5"
    ):
        space.begin(torch.arange(5))
    tree = space.begin(torch.arange(2))
    with pytest.raises(
        echo.EchoError, match=r"tokens: expected int64 \[2, 1, 2\], got int64 \[2, 1, 3\]"
    ):
        space.grow(tree, torch.zeros(2, 1, 3, dtype=torch.int64), torch.zeros(2, 1, 3))
    with pytest.raises(
        echo.EchoError, match="num_verify_tokens: expected an int from 1 to 8, got 9"
    ):
        space.pack(tree, 9)


def test_k_by_depth_and_zero_depth():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, 12, 2)
    space = echo.Workspace(scheduler, 2, k=[4, 2], num_verify_tokens=12)
    tree = space.begin(torch.tensor([1, 2]))
    plain = scheduler.begin(torch.tensor([1, 2]))
    for shape in ((2, 1, 4), (2, 3, 2)):
        tokens = torch.randint(0, 9, shape)
        log_probs = torch.randn(shape).log_softmax(-1)
        tree = space.grow(tree, tokens, log_probs)
        plain = scheduler.grow(plain, tokens, log_probs)
    one = space.pack(tree)
    two = scheduler.pack(plain)
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.mask, two.mask)
    nothing = space.pack(space.begin(torch.tensor([5, 6])), 2)
    assert nothing.tokens.tolist() == [5, 6] and nothing.indptr.tolist() == [0, 1, 2]


def test_what_it_weighs():
    space = echo.Workspace(SCHEDULERS["throughput"], 4, k=3, num_verify_tokens=40)
    more = echo.Workspace(SCHEDULERS["throughput"], 8, k=3, num_verify_tokens=40)
    assert 4 * 40 < space.nbytes < more.nbytes < 2 * space.nbytes


def test_a_workspace_can_be_walked_while_it_is_compiled():
    """Its buffers begin as zeros, so what a step reads by its own results is there."""
    pytest.importorskip("triton")
    parts = Parts(SCHEDULERS["paper"], 4, 40)
    lens, table = (torch.zeros(shape, dtype=torch.int64, device=DEVICE) for shape in (4, (4, 9)))
    with kernels.using("triton"), kernels.compiling(), kernels.compiling():
        packed = parts.plan(parts.draft(4, 3), 40)
        assert packed.positions(lens).max() == 0
        packed.slot_mapping(lens, table, 16, pad_slot_id=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["ranking", "paper"])
def test_a_tiers_beam_is_drafted_in_the_same_buffers(name, backend):
    """Narrow steps and wide ones in turn, as eagerly, in graphs kept by beam."""
    if backend == "triton":
        pytest.importorskip("triton")
    scheduler = SCHEDULERS[name]
    lanes = 3
    roots = torch.tensor([4, 5, 6])
    with kernels.using(backend):
        space = echo.Workspace(scheduler, lanes, k=K, num_verify_tokens=20)
        graphs = RecordedGraphs()
        wide = drafts(scheduler, lanes, 0)
        given = {}
        for seed, beam in enumerate((1, 2, 1, None, 1, 2)):
            if beam not in given:  # inputs at fixed addresses, as wide as the frontier
                widths = [1] + [min(beam or 2, K)] * 2
                given[beam] = [
                    tuple(x[:, :w].clone() for x in layer)
                    for layer, w in zip(wide, widths, strict=True)
                ]
            for layer, new in zip(given[beam], drafts(scheduler, lanes, seed), strict=True):
                for old, value in zip(layer, new, strict=True):
                    old.copy_(value[:, : old.shape[1]])

            def draft(space=space, beam=beam):
                tree = space.begin(roots)
                for tokens, log_probs in given[beam]:
                    tree = space.grow(tree, tokens, log_probs, beam=beam)
                return tree

            tree = graphs(("draft", beam), draft)
            packed = graphs(("plan", beam), lambda tree=tree: space.pack(tree, 20))
            alone = scheduler.begin(roots, num_verify_tokens=20)
            for tokens, log_probs in given[beam]:
                alone = scheduler.grow(alone, tokens, log_probs, beam=beam)
            same(replace(packed, num_layers=None), scheduler.pack(alone))
        tree = space.grow(space.begin(roots), *given[1][0], beam=1)
        with pytest.raises(echo.EchoError, match="beam: expected that of the layers before, got 2"):
            space.grow(space.grow(tree, *given[1][1], beam=1), *given[1][2], beam=2)
        with pytest.raises(echo.EchoError, match="beam: expected an int from 1 to 2, got 3"):
            space.grow(space.begin(roots), *given[1][0], beam=3)
