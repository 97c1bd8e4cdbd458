"""What kernels and references may touch: 64-bit strides, tables with holes, other layers' plans.

``ECHO_FUZZ=50`` runs so many times the examples.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import echo
import trees
from addresses import apart, checked
from conftest import CALIBRATION, grow_all
from echo import kernels
from echo.kernels import arguments, reference, tiles
from echo.testing import TabularDrafter, table
from echo.tree import compact
from echo.tree.packed import slot_mapping

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from echo.kernels import attention, schedule  # noqa: E402
from test_plan_kernels import same  # noqa: E402

EXAMPLES = int(os.environ.get("ECHO_FUZZ", "1"))
INTERPRETED = pytest.mark.skipif(
    not tiles.interpreted(), reason="addresses are seen in the interpreter"
)
BACKENDS = ["torch", "triton"] if tiles.interpreted() else ["torch"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(invalid value|All-NaN):RuntimeWarning"
)  # numpy's, in the interpreter
SHAPE = {"page": 16, "heads": 3, "kv_heads": 3, "dim": 32, "dtype": torch.float32}


def close(args, **options):
    """The kernel's result, which is the reference's."""
    out, lse = kernels.tree_attention(**args, **options, backend="triton")
    expected, expected_lse = kernels.tree_attention(**args, **options, backend="torch")
    assert torch.allclose(out, expected, atol=1e-4) and torch.allclose(lse, expected_lse, atol=1e-4)
    return out, lse


# Strides


@INTERPRETED
@pytest.mark.parametrize("stride", [1 << 30, 1 << 33])
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("q", 0),
        ("q", 1),
        ("tree_key", 0),
        ("tree_key", 1),
        ("tree_value", 0),
        ("tree_value", 1),
        ("page_table", 0),
    ]
    + [(name, dim) for name in ("key_cache", "value_cache") for dim in range(3)],
)
def test_attention_reads_at_strides_of_64_bits(name, dim, stride):
    args = trees.attention([3, 2, 1], [20, 4, 0], **SHAPE)
    strides = list(args[name].contiguous().stride())
    strides[dim] = stride
    with checked() as seen:
        close(args | {name: apart(args[name], strides)})
    assert seen.launches == 3 and seen.lanes > 1000


@INTERPRETED
@pytest.mark.parametrize("page", [1, 5, 64])
def test_large_slots_within_a_page(page, monkeypatch):
    """One request's page of many tokens; pages that no block divides; a block of the page's own."""
    args = trees.attention([2], [40], **(SHAPE | {"page": page, "kv_heads": 1, "heads": 1}))
    with checked():
        close(
            args
            | {
                name: apart(args[name], [page << 26, 1 << 26, 64, 1])
                for name in ("key_cache", "value_cache")
            }
        )


@triton.jit
def _slots_of_32_bits(
    cache, page, start, key, by_page, by_slot, KEYS: tl.constexpr, PAGE: tl.constexpr
):
    return cache + (page.to(tl.int64) * by_page + start % PAGE * by_slot) + (key * by_slot)[:, None]


@INTERPRETED
def test_a_planted_offset_of_32_bits_is_found(monkeypatch):
    args = trees.attention([2], [40], **SHAPE)
    args["key_cache"] = apart(args["key_cache"], [1 << 33, 1 << 28, 32, 1])
    monkeypatch.setattr(attention, "_slots", _slots_of_32_bits)
    with (
        checked(),
        pytest.raises(Exception, match=r"attend: key_cache \[5, 16, 3, 32\], strides .*, bytes \["),
    ):
        kernels.tree_attention(**args, backend="triton")


@INTERPRETED
@pytest.mark.parametrize("strides", [(1 << 33, 1 << 30, 1), (8, 1 << 32, 1 << 29)])
def test_drafts_and_logits_at_strides_of_64_bits(strides):
    scheduler, roots = (
        echo.ElasticBudgetScheduler(echo.TwoLevel(4, 3), None, 40, 2),
        torch.arange(3),
    )
    layers = [
        (torch.randint(0, 9, (3, width, 5)), torch.randn(3, width, 5).log_softmax(-1))
        for width in (1, 4)
    ]

    def grown(move):
        tree = scheduler.begin(roots)
        for tokens, log_probs in layers:
            tree = scheduler.grow(tree, move(tokens), move(log_probs))
        return scheduler.pack(tree)

    with kernels.using("triton"), checked():
        fused = grown(lambda x: apart(x, strides))
    same(fused, grown(lambda x: x))
    logits = torch.randn(4, 50)
    with checked():
        assert torch.equal(
            kernels.argmax_tokens(apart(logits, (1 << 30, 1)), backend="triton"), logits.argmax(1)
        )


def test_the_longest_context_keeps_to_int32():
    args = trees.attention([2], [20], **SHAPE)
    table = args["page_table"].expand(1, args["page_table"].shape[1]).repeat(1, 1 << 14)
    cache = args["key_cache"][:1, :1].expand(-1, 1 << 16, -1, -1)
    own = args["prefix_lens"], args["tree_key"], args["indptr"]
    shapes = arguments.attention_shapes(args["q"], cache, table, *own, "whole", None, None)
    assert table.shape[1] << 16 >= 1 << 31 > shapes.max_prefix + 256


# Plans

CHANGES = {
    "window=8": {"window": 8},
    "splits=3": {"splits": 3},
    "mode=tree": {"mode": "tree"},
    "num_rows=8": {"rows": [4, 2]},
    "batch=3": {"rows": [5, 2, 0], "contexts": [9, 30, 0]},
    "max_prefix=48": {"contexts": [9, 40]},
    "num_kv_heads=1": {"kv_heads": 1},
    "itemsize=2": {"dtype": torch.float16},
    "cache_itemsize=1": {"cache": torch.float8_e5m2},
    "page_size=8": {"page": 8, "contexts": [9, 30]},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fact", CHANGES)
def test_a_plan_for_other_layers_is_refused(fact, backend):
    def call(rows=(5, 2), contexts=(9, 30), window=None, splits=None, mode="whole", **shape):
        args = trees.attention(list(rows), list(contexts), **(SHAPE | shape))
        return args, {"window": window, "splits": splits, "mode": mode}

    def planned(args, options):
        named = {
            name: args[name]
            for name in ("q", "key_cache", "page_table", "prefix_lens", "tree_key", "indptr")
        }
        return kernels.plan_attention(**named, **options, backend=backend)

    one, two = call(), call(**CHANGES[fact])
    for args, options in (one, two):
        out = kernels.tree_attention(**args, **options, backend=backend)
        again = kernels.tree_attention(
            **args, **options, plan=planned(args, options), backend=backend
        )
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    with pytest.raises(
        echo.EchoError, match=rf"plan: expected one made for .*{fact}.*, got one for "
    ):
        kernels.tree_attention(**two[0], **two[1], plan=planned(*one), backend=backend)
    with pytest.raises(
        echo.EchoError, match=rf"plan: expected one made for .*, got one for .*{fact}"
    ):
        kernels.tree_attention(**one[0], **one[1], plan=planned(*two), backend=backend)
    with pytest.raises(echo.EchoError, match="plan: expected an AttentionPlan, got tuple"):
        kernels.tree_attention(**one[0], plan=(torch.zeros(1), torch.zeros(1)), backend=backend)


@INTERPRETED
def test_a_plan_of_the_reference_has_no_list_for_the_kernel():
    args = trees.attention([5, 2], [9, 30], **SHAPE)
    named = [
        args[name] for name in ("q", "key_cache", "page_table", "prefix_lens", "tree_key", "indptr")
    ]
    plan = kernels.plan_attention(*named, backend="torch")
    with pytest.raises(
        echo.EchoError, match="plan: expected one made by the Triton kernel for Tile"
    ):
        kernels.tree_attention(**args, plan=plan, backend="triton")
    made = kernels.plan_attention(*named, backend="triton")
    with pytest.raises(echo.EchoError, match=r"plan.work: expected int32"):
        kernels.tree_attention(
            **args, plan=dataclasses.replace(made, work=made.work[1:]), backend="triton"
        )


# Memory of splits


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_take_a_bounded_memory(backend):
    n, heads, dim = 1024, 32, 128
    q, k = (torch.empty(n, h, dim, dtype=torch.bfloat16, device="meta") for h in (heads, 8))
    cache, ints = (
        torch.empty(8, 64, 8, dim, dtype=torch.bfloat16, device="meta"),
        {"dtype": torch.int32, "device": "meta"},
    )
    step = (
        cache,
        torch.empty(256, 2048, **ints),
        torch.empty(256, **ints),
        k,
        torch.empty(257, **ints),
    )
    for splits in (None, 1, 2, 63):
        shapes = arguments.attention_shapes(q, *step, "whole", None, splits)
        partial = 4 * schedule.sizes(shapes).partials * 8 * (dim + 1)
        assert partial <= (100_000_000 if splits is None else arguments.PARTIAL_BYTES) and (
            splits is None or partial <= 4 * n * heads * (dim + 1) * splits * (splits > 1)
        )
    with pytest.raises(
        echo.EchoError,
        match="splits: expected at most 63, whose partial results take 1073741824 bytes, got 64",
    ):
        kernels.plan_attention(
            q, *step, splits=64, backend="torch" if backend == "torch" else "auto"
        )


# Tables


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_are_none_lead_to_the_dummy_slot(backend):
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=1, max_depth=3)
    tree = scheduler.begin(torch.tensor([7]))
    for _ in range(3):
        tree = scheduler.grow(tree, torch.tensor([[[1]]]), torch.tensor([[[-0.1]]]))
    packed, context = scheduler.pack(tree), torch.tensor([14])
    accepted = echo.accept(packed, torch.tensor([1, 1, 1, 1]))
    for pages in (
        torch.tensor([[5, -1, -1]]),
        torch.tensor([[5, -7]], dtype=torch.int32),
        torch.tensor([[5]]),
    ):
        assert packed.slot_mapping(context, pages, page_size=16, pad_slot_id=3).tolist() == [
            94,
            95,
            3,
            3,
        ]
        with kernels.using(backend):
            lists = compact(
                packed, accepted, context, page_table=pages, page_size=16, pad_slot_id=3
            )
        assert lists.source.tolist() == lists.target.tolist() == [[94, 95, 3, 3]]
    place = torch.tensor([-17, -1, 0, 15, 16, 47, 48])
    assert slot_mapping(place, torch.tensor(0), torch.tensor([[-1, 2, 2]]), 16, 9).tolist() == [
        9,
        9,
        9,
        9,
        32,
        47,
        9,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [1, 5, 16, 32])
def test_attention_does_not_see_pages_that_are_none(page, backend):
    args = trees.attention([3, 2], [40, 37], **(SHAPE | {"page": page}))
    pages, whole = len(args["key_cache"]), 20 // page * page
    args["page_table"][0, 20 // page :], args["page_table"][1, ::2] = -1, pages
    args["page_table"][1, 1:4:2] = args["page_table"][1, 1]  # repeated
    out, lse = kernels.tree_attention(**args, backend=backend)
    expected, expected_lse = kernels.tree_attention(
        **(args | {"prefix_lens": torch.tensor([whole, 37]).int()}), backend=backend
    )
    assert (
        torch.allclose(out, expected, atol=1e-6)
        and torch.allclose(lse, expected_lse, atol=1e-5)
        and lse[:5].isfinite().all()
    )
    none = args | {"page_table": torch.full_like(args["page_table"], -1)}
    alone = kernels.tree_attention(**args, mode="tree", backend=backend)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(kernels.tree_attention(**none, backend=backend), alone, strict=True)
    )
    with checked():
        close(args)
        close(none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_of_keys_and_values_have_the_same_pages(backend):
    args = trees.attention([3], [20], **SHAPE)
    with pytest.raises(
        echo.EchoError,
        match=r"value_cache: expected .* \[4, 16, 3, 32\], got float32 \[3, 16, 3, 32\]",
    ):
        kernels.tree_attention(**(args | {"value_cache": args["value_cache"][1:]}), backend=backend)


# Numbers that are none


def sees(args, window=None):
    """bool [N, N]: which rows see which; pads see themselves."""
    bits = torch.arange(32 * args["mask"].shape[1])
    mask, first, count = (
        (args["mask"][:, bits // 32] >> (bits % 32).int()) & 1,
        args["indptr"].long(),
        len(args["request"]),
    )
    seen = torch.eye(count, dtype=torch.bool)
    for b in range(len(first) - 1):
        own = slice(first[b], first[b + 1])
        seen[own, own] = mask[own, : first[b + 1] - first[b]].bool()
        if window is not None:
            seen[own, own] &= args["depth"][own, None] - args["depth"][None, own] < window
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "value", "options"),
    [
        (torch.float32, torch.nan, {}),
        (torch.float16, torch.inf, {}),
        (torch.float32, -torch.inf, {"splits": 3}),
        (torch.float16, torch.nan, {"window": 2}),
        (torch.float32, torch.inf, {"mode": "tree", "softcap": 2.0}),
    ],
)
def test_what_is_not_finite_spoils_what_sees_it(dtype, value, options, backend):
    args = trees.attention([18, 0, 5], [20, 4, 17], **(SHAPE | {"dtype": dtype, "kv_heads": 1}))
    clean, clean_lse = kernels.tree_attention(**args, **options, backend=backend)
    for name, rows in (("tree_value", [1, 3, 17, 19]), ("tree_key", [2, 16, 20]), ("q", [4, 22])):
        spoiled = args[name].clone()
        spoiled[rows, :, 7] = value
        out, lse = kernels.tree_attention(**(args | {name: spoiled}), **options, backend=backend)
        hit = torch.zeros(len(out), dtype=torch.bool)
        hit[rows] = True
        if name != "q":
            hit = sees(args, options.get("window"))[:, rows].any(1)
        assert torch.equal(out[~hit], clean[~hit]) and torch.equal(lse[~hit], clean_lse[~hit])
        if value != value or name == "tree_value":  # noqa: PLR0124
            assert out[hit].isnan().all() and hit.any()


@INTERPRETED
def test_tall_tiles_hide_them_too(monkeypatch):
    monkeypatch.setattr(tiles, "generation", lambda device: tiles.HOPPER)
    args = trees.attention(
        [70], [60], **(SHAPE | {"page": 64, "dtype": torch.float16, "kv_heads": 1})
    )
    clean, spoiled = kernels.tree_attention(**args, backend="triton")[0], args["tree_value"].clone()
    spoiled[[31, 33, 66]] = torch.inf
    out, hit = (
        kernels.tree_attention(**(args | {"tree_value": spoiled}), backend="triton")[0],
        sees(args)[:, [31, 33, 66]].any(1),
    )
    assert torch.equal(out[~hit], clean[~hit]) and out[hit].isnan().all() and 3 <= hit.sum() < 72


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_lies_before_the_window_may_hold_anything(value, backend):
    args = trees.attention([5, 3], [50, 37], **SHAPE)
    clean = kernels.tree_attention(**args, window=9, backend=backend)
    for b, length in enumerate(args["prefix_lens"].tolist()):
        for at in range(length - 8):
            for name in ("key_cache", "value_cache"):
                args[name][args["page_table"][b, at // 16], at % 16] = value
    out = kernels.tree_attention(**args, window=9, backend=backend)
    assert (
        all(torch.equal(a, b) for a, b in zip(out, clean, strict=True)) and out[0].isfinite().all()
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_draft_that_is_no_number_spoils_no_trust(value):
    own, last = table(5, 1), torch.arange(2)

    def learnt(change):
        lookup = echo.PromptLookup(
            2, 32, TabularDrafter(own, 5), max_ngram=2, mixing_weights=(0.0, 0.3, 0.9)
        )
        lookup.admit(last, [torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1, 3, 1, 3])], last)
        scheduler = echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=2, beam=1, max_depth=1
        )
        tree = scheduler.begin(last)
        packed = scheduler.pack(scheduler.grow(tree, *lookup.draft(last, tree.frontier)))
        tokens, log_probs, *vote = lookup._root
        lookup._root = (
            tokens,
            torch.where(torch.tensor([[True], [False]]), change(log_probs), log_probs),
            *vote,
        )
        accepted = echo.accept(packed, torch.full((packed.num_rows,), -1))
        lookup.extend(
            last,
            packed,
            dataclasses.replace(
                accepted, tokens=torch.tensor([[1], [3]]), num_emitted=torch.ones(2).long()
            ),
        )
        return lookup.fit_weights()

    assert learnt(lambda x: torch.full_like(x, value)) == learnt(
        lambda x: torch.full_like(x, -torch.inf)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_keys_may_hold_anything(backend):
    out, lse = torch.randn(5, 2, 16), torch.randn(5, 2)
    none, empty = torch.full_like(lse, -torch.inf), torch.full_like(out, torch.nan)
    for parts in ((out, lse, empty, none), (empty, none, out, lse)):
        merged = kernels.merge_attention(*parts, backend=backend)
        assert torch.allclose(merged[0], out) and torch.allclose(merged[1], lse)
    merged = kernels.merge_attention(empty, none, empty, none, backend=backend)
    assert (merged[0] == 0).all() and (merged[1] == -torch.inf).all()
    assert kernels.merge_attention(empty, lse, out, lse, backend=backend)[0].isnan().all()


# Fuzz


@st.composite
def attention_calls(draw):
    """Arguments and options of an attention call that no engine should make, and some do."""
    rows = draw(st.lists(st.sampled_from([0, 1, 2, 7, 19]), max_size=3))
    dim, kv_heads, group = (
        draw(st.sampled_from([16, 24])),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    shape = {
        "page": draw(st.sampled_from([1, 3, 16, 32])),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "dim": dim,
    }
    seed, pads = draw(st.integers(0, 10_000)), draw(st.integers(0, 2))
    args = trees.attention(
        rows, [0] * len(rows), **shape, dtype=torch.float32, pads=pads, seed=seed
    )
    generator, batch = torch.Generator().manual_seed(seed), len(rows)
    pages = draw(st.integers(0, 4))
    for name in ("key_cache", "value_cache"):
        args[name] = torch.randn(pages, shape["page"], kv_heads, dim, generator=generator)
    width = draw(st.sampled_from([0, 1, 3, 45 // shape["page"]]))
    args["page_table"] = torch.randint(-2, pages + 2, (batch, width), generator=generator).int()
    kinds = torch.tensor([-(1 << 31), -3, 0, 1, 15, 16, 17, 33, 44, 10_000, (1 << 31) - 1])
    args["prefix_lens"] = kinds[torch.randint(0, len(kinds), (batch,), generator=generator)].int()
    options = {
        "splits": draw(st.sampled_from([None, 1, 2, 7])),
        "window": draw(st.sampled_from([None, 1, 9])),
    }
    options |= {
        "softcap": draw(st.sampled_from([None, 3.0])),
        "mode": draw(st.sampled_from(["whole", "whole", "tree"])),
    }
    heads = shape["heads"]
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads, generator=generator)
    if options["mode"] == "tree" and draw(st.booleans()):
        lse = torch.randn(len(args["q"]), heads, generator=generator)
        lse = torch.where(lse > 1, -torch.inf, lse)
        before = torch.randn(args["q"].shape, generator=generator)
        before[lse == -torch.inf] = torch.nan
        if draw(st.booleans()):
            before, lse = apart(before, [1 << 31, 1 << 26, 1]), apart(lse, [1, 1 << 31])
        options |= {"prefix_out": before, "prefix_lse": lse}
    for name in ("q", "tree_key", "tree_value", "key_cache", "value_cache", "page_table"):
        kind, value = draw(st.sampled_from(["as it is", "as it is", "turned", "apart"])), args[name]
        if kind == "turned" and value.dim() > 2:  # heads outermost
            args[name] = value.transpose(0, -2).contiguous().transpose(0, -2)
        elif kind == "apart":
            args[name] = apart(
                value,
                [*(draw(st.sampled_from([1 << 28, 1 << 30, 1 << 31])) for _ in value.shape[1:]), 1],
            )
    return args, options


@INTERPRETED
@settings(max_examples=60 * EXAMPLES)
@given(attention_calls(), st.booleans())
def test_attention_touches_nothing_else(call, planned):
    args, options = call
    named = {
        name: args[name]
        for name in ("q", "key_cache", "page_table", "prefix_lens", "tree_key", "indptr")
    }
    which = {name: options[name] for name in ("splits", "window", "mode")}
    with checked():
        plan = kernels.plan_attention(**named, **which, backend="triton") if planned else None
        out, lse = close(args, **options, plan=plan)
        kernels.merge_attention(out, lse, out, lse, backend="triton")


@INTERPRETED
@settings(max_examples=15 * EXAMPLES)
@given(
    st.lists(st.sampled_from([0, 1, 5, 70]), max_size=4), st.integers(0, 3), st.integers(0, 4),
    st.sampled_from([1, 40, 200]), st.integers(0, 10_000),
)  # fmt: skip
def test_acceptance_touches_nothing_else(rows, pads, max_depth, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows) + pads
    draw = lambda low, high, *shape: torch.randint(
        low, high, shape or (count,), generator=generator
    )
    indptr, parent, tokens = (
        torch.tensor([0, *rows]).cumsum(0).int(),
        draw(-3, 9).int(),
        draw(-1, 3),
    )
    logits = torch.randn(count, vocabulary + 3, generator=generator)[:, 1 : vocabulary + 1]
    links = parent, indptr, tokens
    with checked(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "VOCABULARY_CHUNK", 64)
        patch.setattr(tiles, "VOCABULARY_BLOCK", 64)
        results = (
            kernels.accept(*links, tokens, max_depth, backend="triton"),
            kernels.accept(*links, logits, max_depth, backend="triton"),
        )
        assert torch.equal(
            kernels.argmax_tokens(logits, backend="triton"), reference.argmax_tokens(logits)
        )
    expected = (
        reference.accept(*links, tokens, max_depth),
        reference.accept(*links, logits, max_depth),
    )
    for result in zip(results, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(*result, strict=True))


SCHEDULERS = [
    echo.ElasticBudgetScheduler(
        echo.TwoLevel(2, 3), echo.SparseGate({1: 0.1, 2: 0.05}), 40, 3, max_verify_tokens_per_req=33
    ),
    echo.ElasticBudgetScheduler(echo.GlobalRank(2, CALIBRATION), None, 40, 2),
    echo.ElasticBudgetScheduler.throughput_optimal(
        CALIBRATION, echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0)), beam=2
    ),
]


@INTERPRETED
@settings(max_examples=20 * EXAMPLES)
@given(
    st.sampled_from(SCHEDULERS),
    st.lists(st.booleans(), max_size=5),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_a_step_touches_nothing_else(scheduler, live, page, narrow, seed):
    """Pad requests, empty batches, tables with holes, requests that share an index."""
    generator, batch = torch.Generator().manual_seed(seed), len(live)
    table = torch.randint(
        -2, 5, (batch, int(torch.randint(0, 5, (), generator=generator))), generator=generator
    )
    table = table.int() if narrow else table
    context = torch.randint(-2, 9, (batch,), generator=generator).to(table.dtype)
    alone = torch.randperm(batch, generator=generator)
    where = torch.where(
        torch.tensor(live, dtype=torch.bool),
        alone,
        torch.randint(0, batch + 1, (batch,), generator=generator),
    )

    def run():
        tree = grow_all(
            scheduler,
            torch.arange(batch),
            k=3,
            seed=seed,
            spoil=0.1,
            num_verify_tokens=40,
            live=torch.tensor(live, dtype=torch.bool),
        )
        packed = scheduler.pack(tree)
        accepted = echo.accept(packed, packed.tokens.roll(-1))
        lists = (
            compact(packed, accepted, context, page_table=table, page_size=page, pad_slot_id=77),
            compact(packed, accepted, context),
        )
        history = scheduler.history(batch + 1).observe(where, packed, accepted)
        again = history.observe(where, packed, accepted)
        return {
            "packed": packed,
            "accepted": accepted,
            "lists": lists,
            "history": history,
            "again": again,
        }

    with kernels.using("triton"), checked() as seen:
        fused = run()
    same(fused, run())
    assert seen.launches > 0 or not batch
    own = table[table >= 0]
    allowed = {77} | {int(p) * page + i for p in own.unique() for i in range(page)}
    assert (
        set(fused["lists"][0].source.flatten().tolist())
        | set(fused["lists"][0].target.flatten().tolist())
        <= allowed
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pad_request_takes_nothing_from_the_request_whose_index_it_names(backend):
    scheduler, live = SCHEDULERS[2], torch.tensor([True, False, True, False])
    with kernels.using(backend):
        tree = grow_all(scheduler, torch.arange(4), k=3, seed=0, num_verify_tokens=24, live=live)
        packed = scheduler.pack(tree)
        accepted, history = echo.accept(packed, packed.tokens.roll(-1)), scheduler.history(3)
        once, twice = (
            history.observe(torch.tensor(where), packed, accepted)
            for where in ([1, 2, 0, 2], [1, 1, 0, 0])
        )
        again = [
            x.observe(torch.tensor(where), packed, accepted)
            for x, where in ((once, [1, 2, 0, 2]), (twice, [1, 1, 0, 0]))
        ]
    same({"history": once, "again": again[0]}, {"history": twice, "again": again[1]})
    assert 1.9 < float(again[1].steps[0, 1]) < 2


@INTERPRETED
def test_buffers_with_gaps_are_written_where_they_are():
    """``out`` may be columns of something wider: what lies between is not touched."""

    def gaps(value):
        return (
            torch.full((*value.shape, 2), 99, dtype=value.dtype)[..., 0]
            if isinstance(value, torch.Tensor)
            else value
        )

    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(2), None, echo.CostModel((1, 64), (1.0, 2.0)), 2
    )
    packed = scheduler.pack(grow_all(scheduler, torch.arange(3), k=2, seed=0, num_verify_tokens=12))
    target, where = packed.tokens.roll(-1), torch.arange(3)
    wanted = echo.accept(packed, target)
    history, stats = scheduler.history(3), echo.StepStats.empty()
    with kernels.using("triton"), checked():
        accepted = echo.accept(
            packed, target, out=echo.tree.Accepted(**{k: gaps(v) for k, v in vars(wanted).items()})
        )
        known = history.observe(
            where,
            packed,
            accepted,
            out=dataclasses.replace(history, **{k: gaps(v) for k, v in vars(history).items()}),
        )
        counted = stats.observe(packed, accepted, out=echo.StepStats(gaps(stats.counts)))
    plain = history.observe(where, packed, wanted), stats.observe(packed, wanted)
    same(
        {"accepted": accepted, "history": known, "counts": counted},
        {"accepted": wanted, "history": plain[0], "counts": plain[1]},
    )
    for value in (accepted.tokens, accepted.num_emitted, known.steps, counted.counts):
        assert value._base.select(-1, 1).eq(99).all()
