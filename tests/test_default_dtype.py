"""Whatever torch's default dtype is, every tensor has its own: the bits and dtypes of a whole
engine are those under float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import echo
import trees
from echo import kernels, layouts
from echo.kernels import tiles
from echo.lookup import Texts, blend
from echo.testing import (
    TabularDrafter,
    TabularTarget,
    blurred,
    check_scheduler,
    importers,
    record,
    replay,
    scenarios,
    table,
)
from echo.tree import Template, compact

CASES = [
    (torch.float64, "torch"),
    (torch.float16, "torch"),
    (torch.bfloat16, "torch"),
    (torch.bfloat16, "triton"),
]


def name(case):
    return f"{case[0]} {case[1]}"


@pytest.fixture(params=CASES, ids=name)
def default(request):
    """Runs a function under float32 and under another default dtype, on a backend."""
    dtype, backend = request.param
    if backend == "triton":
        pytest.importorskip("triton")
        if not tiles.interpreted():
            pytest.skip("the kernels are compiled for a GPU, and these tensors are on the CPU")

    def both(run):
        with kernels.using(backend):
            expected = run()
            torch.set_default_dtype(dtype)
            return expected, run()

    yield both
    torch.set_default_dtype(torch.float32)


def leaves(value, name="value"):
    """All tensors, arrays and numbers in nested values, by name."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return {
            k: v for i, part in enumerate(value) for k, v in leaves(part, f"{name}.{i}").items()
        }
    if dataclasses.is_dataclass(value):
        return leaves(
            {f.name: getattr(value, f.name) for f in dataclasses.fields(value)},
            f"{name}.{type(value).__name__}",
        )
    return {name: value}


def same(expected, found):
    one, two = leaves(expected), leaves(found)
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        assert type(value) is type(other), name
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(
                value.nan_to_num() if value.is_floating_point() else value,
                other.nan_to_num() if value.is_floating_point() else other,
            ), name
        elif isinstance(value, np.ndarray):
            assert value.dtype == other.dtype, name
            assert np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), name
        elif not callable(value):
            assert value == other or value != value, name  # noqa: PLR0124 - NaN


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float32, generator=generator).log_softmax(-1)


def calibration():
    rng = np.random.default_rng(0)
    confidence = rng.random(900)
    log = echo.WarmupLog.from_arrays(
        np.arange(900) % 3 + 1, confidence, rng.random(900) < confidence, step=np.arange(900) // 3
    )
    made = echo.calibrate(log)
    return log, made, made.error(log), made.report(log), made.reliability_table()


def policies():
    _, calibrated, *_ = calibration()
    cost = echo.CostModel.from_samples(
        [1, 8, 16, 32, 64], [1.0, 1.0, 1.0, 2.0, 4.0], draft_layer=0.01
    )
    gate = echo.gating.ExploringGate(
        echo.SparseGate(calibrated), 0.3, torch.tensor([0.1, 0.9, 0.5], dtype=torch.float32)
    )
    make = echo.ElasticBudgetScheduler
    return {
        "paper": make.paper(calibrated, k_max=20, beam=2),
        "throughput": make.throughput_optimal(calibrated, cost, beam=2),
        "eagle": make.eagle(max_verify_tokens_per_req=5, beam=2, max_depth=3),
        "exploring": make(echo.TwoLevel(2, 2), gate, 20, 3),
        "mass": make(echo.GlobalRank(2), echo.BeamMassGate((1, 2), -1.0, 2), 20, 3),
    }


def engine():
    """Everything between begin and the counters, by every policy: all that has a tensor."""
    found = [calibration()]
    context, pages = torch.tensor([3, 5, 2]), torch.arange(30).view(3, 10).int()
    weighed = {"request_weights": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float32)}
    for name, scheduler in policies().items():
        for weighting in ({}, weighed):
            if name not in ("paper", "throughput") and kernels.use_triton(context):
                continue  # the interpreter is slow
            tree, history, stats = (
                scheduler.begin(torch.arange(3), num_verify_tokens=18, **weighting),
                scheduler.history(4),
                echo.StepStats.empty(),
            )
            bare = scheduler.pack(tree)
            for depth in range(3):
                shape = (*tree.frontier.token.shape, 3)
                tree = scheduler.grow(
                    tree, torch.arange(3).expand(shape), drawn(*shape, seed=depth)
                )
            packed = scheduler.pack(tree, sync=lambda wire: wire + 0)
            packed = scheduler.pack(tree, out=packed)
            accepted = echo.accept(packed, packed.tokens.roll(-1))
            greedy = echo.accept(packed, logits=drawn(packed.num_rows, 9))
            history = history.observe(
                torch.arange(3), bare, echo.accept(bare, bare.tokens)
            ).observe(torch.arange(1, 4), packed, accepted)
            for _ in range(4):
                history = history.observe(torch.arange(3), packed, accepted)
            stats = stats.observe(packed, accepted).observe(bare, echo.accept(bare, bare.tokens))
            rank, taken = echo.loop.draft_labels(tree, packed, accepted)
            live = (
                echo.gating.ConfidenceHistograms.empty(3)
                .live()
                .update(packed.depth, packed.score, taken, rank)
            )
            weights = scheduler.gate.weights(tree.layers) if name == "exploring" else None
            log = echo.loop.warmup_log(tree, packed, accepted, weights=weights)
            tier = (
                scheduler.choose_tier(history, torch.arange(3)),
                scheduler.choose_tier(scheduler.history(3), torch.arange(3)),
            )
            found += [
                tree,
                bare,
                packed,
                accepted,
                greedy,
                history,
                stats.read(),
                live.snapshot().mass,
                log,
                tier,
                weights,
            ]
            found += [
                bare.to_buffer(),
                packed.to_buffer(),
                packed.render(0),
                compact(packed, accepted, context),
            ]
            found += [
                compact(packed, accepted, context, page_table=pages, page_size=2, pad_slot_id=0),
                packed.slot_mapping(context, pages, 2, 0),
            ]
    idle = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=2)
    found += [idle.pack(idle.begin(torch.zeros(0, dtype=torch.int64), num_verify_tokens=2))]
    return found


def test_a_step_of_every_policy(default):
    same(*default(engine))


def exported():
    scheduler, template = (
        echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5, beam=2, max_depth=3),
        Template.from_choices([[0], [1], [0, 0], [1, 0]]),
    )
    roots, context = torch.arange(3), torch.tensor([3, 5, 2])
    filled = template.fill(scheduler.begin(roots), torch.arange(12).view(3, 4), drawn(3, 4))
    tries = echo.SuperTree.from_paths(
        roots, [[[1, 2], [1, 3]], [], [[4]]], weights=[[2.0, 1.0], [], [0.5]]
    )
    arrays = echo.SuperTree.from_arrays(
        torch.arange(9).view(3, 3), torch.arange(-1, 2).expand(3, 3), drawn(3, 3)
    )
    first = scheduler.begin(roots, first_layer=(torch.arange(6).view(3, 2), drawn(3, 2)))
    positions = scheduler.grow_positions(
        scheduler.begin(roots), torch.arange(18).view(3, 3, 2), drawn(3, 3, 2)
    )
    found = [
        filled,
        tries,
        arrays,
        first,
        positions,
        scheduler.grow_from(scheduler.begin(roots), tries, 2),
    ]
    for tree in found[:]:
        packed = scheduler.pack(tree)
        one = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=5)
        links, mask = (
            layouts.sglang(packed, 5, context),
            layouts.sglang_mask(packed, 5, "QLEN_ONLY"),
        )
        made = [
            links,
            mask,
            layouts.sglang_mask(packed, 5, "FULL_MASK", prefix_lens=context, size=200),
            layouts.chains(packed),
        ]
        made += [
            layouts.flashinfer(packed, context, 200),
            layouts.tensorrt_llm(packed, 5),
            layouts.flashinfer_xqa(packed).int(),
        ]
        made += [
            layouts.hugging_face(packed, 5, context, 6, left_padded=False, dtype=d)
            for d in (torch.bool, torch.float32, torch.float16)
        ]
        made += [
            layouts.unpad(packed, drawn(3, 5, 2)),
            layouts.qq_bias(one.pack(one.begin(torch.tensor([7]), num_verify_tokens=4))),
        ]
        made += [
            importers.from_sglang(links),
            importers.from_sglang_mask(mask, links.draft_tokens, 5, "QLEN_ONLY"),
        ]
        made += [importers.from_tensorrt_llm(made[5]), importers.from_hugging_face(made[8])]
        found += [packed, made]
    return found


def test_other_drafters_and_every_layout(default):
    same(*default(exported))


def decoded():
    """Toy models with prompt lookup beside the draft: whole answers, and what a replay makes of
    them."""
    own = table(9, 3, sharpness=4.0)
    prompts, found = [torch.tensor([b, (b + 1) % 9, b]) for b in range(5)], []
    for policy in policies().values():
        policy = (
            policy
            if not isinstance(policy.gate, echo.gating.ExploringGate)
            else dataclasses.replace(policy, gate=None)
        )
        drafter = echo.PromptLookup(2, 16, TabularDrafter(blurred(own, 4), 3, torch.float16))
        for step in echo.decode(
            policy, TabularTarget(own), drafter, prompts, max_num_reqs=2, max_new_tokens=20
        ):
            found += [step.emitted, step.tier, step.packed]
        found += [drafter.fit_weights(), drafter.texts]
    options = {"max_num_reqs": 2, "depth": 3, "beam": 2, "max_new_tokens": 12}
    *_, trace = record(
        TabularTarget(own),
        TabularDrafter(blurred(own, 4), 3, torch.float16),
        prompts,
        ["toy"] * 5,
        **options,
    )
    report = replay(
        trace,
        echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 9, 3),
        echo.CostModel((1, 9), (1.0, 2.0)),
        batch=2,
    )
    texts = Texts.empty(2, 5).admit(torch.arange(2), [torch.arange(7), torch.arange(2)])
    tokens, pooled = blend(
        torch.arange(6).view(1, 2, 3),
        drawn(1, 2, 3),
        torch.tensor([[1, 9]]),
        torch.full((1, 2), 0.4, dtype=torch.float32),
    )
    return [found, trace, report, texts, tokens, pooled]


@pytest.mark.parametrize("default", CASES[:3], indirect=True, ids=name)
def test_decoding_with_toy_models(default):
    same(*default(decoded))


def attended():
    args = trees.attention(
        [5, 0, 9], [20, 3, 33], page=16, heads=4, kv_heads=2, dim=32, dtype=torch.float32
    )
    parts = kernels.tree_attention(**(args | {"depth": args["depth"]}), window=9, softcap=2.0)
    tree = kernels.tree_attention(**args, mode="tree")
    return [parts, tree, kernels.merge_attention(*parts, *tree), kernels.argmax_tokens(drawn(4, 9))]


def test_kernels(default, monkeypatch):
    given = trees.attention

    def explicit(*values, **options):
        """Made under float32, whatever the default is."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        made = given(*values, **options)
        torch.set_default_dtype(dtype)
        return made

    monkeypatch.setattr(trees, "attention", explicit)
    same(*default(attended))


def kit():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 3), echo.SparseGate({1: 0.3}), 24, 3)
    check_scheduler(scheduler, examples=15)
    made = (
        scenarios.all_equal,
        scenarios.burst,
        scenarios.one_confident_many_doubtful,
        scenarios.nan_storm,
    )
    return [make(4, 3).plan(scheduler).packed for make in made]


@pytest.mark.parametrize("default", CASES[:3], indirect=True, ids=name)
def test_the_kit(default):
    same(*default(kit))
