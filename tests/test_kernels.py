"""The Triton kernels against their references: interpreted, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import echo
import trees
from conftest import grow_all
from echo import kernels
from echo.kernels import reference, tiles
from echo.testing import RefuseSyncs

pytest.importorskip("triton")
from echo.kernels import acceptance, attention, join, schedule

DEVICE = "cpu" if tiles.interpreted() else "cuda"
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPE = {"page": 16, "heads": 2, "kv_heads": 1, "dim": 64, "dtype": torch.float32}


pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # of the references, on a GPU
]


def compare(args, **options):
    out, lse = kernels.tree_attention(**args, **options, backend="triton")
    expected, expected_lse = kernels.tree_attention(**args, **options, backend="torch")
    assert out.dtype == args["q"].dtype and lse.dtype == torch.float32
    scale = expected.double().norm().clamp(min=1e-30)
    assert float((out.double() - expected.double()).norm() / scale) < LIMIT[out.dtype]
    assert torch.allclose(lse, expected_lse, atol=1e-4)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "contexts", "shape"),
    [
        (
            [1, 7, 0, 3],
            [0, 1, 9, 17],
            {"heads": 4, "kv_heads": 2},
        ),  # an empty slot, no context, one token, one past a page
        ([63], [16], {}),  # context ends with its page
        ([65], [15], {}),  # three mask words
        ([1, 1, 1], [33, 5, 64], {"page": 1, "heads": 3}),  # roots only, a group of three
        ([2, 5], [70, 31], {"page": 64, "heads": 8, "dim": 128}),  # blocks within a page
        ([4, 33], [3, 0], {"page": 5, "dim": 80, "heads": 1}),  # pages that no block divides
        ([6], [40], {"dim": 96, "page": 32}),
        ([3], [20], {"dim": 256, "page": 256}),
    ],
)
def test_attention_equals_the_twin(dtype, rows, contexts, shape):
    compare(trees.attention(rows, contexts, **(SHAPE | {"dtype": dtype} | shape), device=DEVICE))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 9},
        {"softcap": 1.5},
        {"scale": 0.3},
        {"scale": -0.2},
        {"scale": 0.0, "splits": 2},
        {"mode": "tree"},
        {"mode": "tree", "window": 2, "softcap": 3.0},
        {"splits": 1},
        {"splits": 7},
        {"splits": 3, "window": 20, "softcap": 2.0},
        {"splits": 40},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_equal_the_twin(dtype, options):
    compare(
        trees.attention([5, 1, 18], [0, 50, 37], **(SHAPE | {"dtype": dtype}), device=DEVICE),
        **options,
    )


@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [[5, 0, 33], [70]])
def test_tiles_of_hopper_compute_the_same(rows, cache, monkeypatch):
    """Its tall tiles take 64 keys a step: two mask words, a page."""
    monkeypatch.setattr(tiles, "generation", lambda device: tiles.HOPPER)
    contexts = [150, 4, 63][: len(rows)]
    args = trees.attention(
        rows,
        contexts,
        **(SHAPE | {"dtype": torch.float16, "heads": 4, "page": 64}),
        cache=cache,
        device=DEVICE,
    )
    compare(args)
    compare(args, scale=-0.3, softcap=1.5)
    compare(args | {"page_table": args["page_table"].repeat(1, 2)}, window=40, splits=2)


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_eight_bit_keys_meet_bfloat16_queries_of_any_size(size):
    args = trees.attention(
        [3, 9],
        [35, 20],
        **(SHAPE | {"dtype": torch.bfloat16, "heads": 4, "kv_heads": 2}),
        cache=torch.float8_e4m3fn,
    )
    args = {name: value.to(DEVICE) for name, value in args.items()}
    args["q"][1] = 0
    compare(args | {"q": args["q"] * size}, scale=0.1 / size)
    scales = torch.tensor([-0.5, 0.0], device=DEVICE)
    compare(args | {"q": args["q"] * size}, scale=0.1 / size, key_scale=scales)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn])
def test_a_page_that_is_not_there_counts_for_nothing(cache, page, monkeypatch):
    """In the midst of whole blocks, among scores far below the 0 that keys of zeros would have."""
    monkeypatch.setattr(tiles, "generation", lambda device: tiles.HOPPER)
    shape = SHAPE | {"page": page, "heads": 16, "dtype": torch.bfloat16}
    args = trees.attention([3, 2], [300, 192], **shape, cache=cache, device=DEVICE)
    args["q"].copy_(-8 * args["q"].abs())
    args["tree_key"].copy_(args["tree_key"].abs())
    args["key_cache"] = args["key_cache"].float().abs().to(args["key_cache"].dtype)
    args["page_table"][0, 1:3], args["page_table"][1, 0] = torch.tensor([-1, 1000]), -1
    assert compare(args, scale=1.0)[1][:5].max() < -120


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_caches_with_scales(cache):
    args = trees.attention(
        [3, 9],
        [35, 20],
        **(SHAPE | {"dtype": torch.float16, "heads": 4, "kv_heads": 2}),
        cache=cache,
        device=DEVICE,
    )
    scales = {
        "key_scale": torch.tensor([0.5, 2.0], device=DEVICE),
        "value_scale": torch.tensor([3.0, 0.25], device=DEVICE),
    }
    compare(args, **scales)
    compare(args, **scales, splits=2)


def test_tree_part_needs_no_cache():
    args = trees.attention([5, 1], [20, 3], **SHAPE, device=DEVICE)
    bare = args | dict.fromkeys(["key_cache", "value_cache", "page_table", "prefix_lens"])
    one, two = (
        compare(bare, mode="tree"),
        kernels.tree_attention(**args, mode="tree", backend="triton"),
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_merging_context_and_tree_part_gives_the_whole():
    args = trees.attention([5, 0, 11], [0, 4, 37], **SHAPE, pads=0, device=DEVICE)
    whole, lse = kernels.tree_attention(**args, backend="torch")
    part = kernels.tree_attention(**args, mode="tree", backend="triton")
    nothing = args | {
        "mask": torch.zeros_like(args["mask"])
    }  # rows that see no row see the context only
    context = kernels.tree_attention(**nothing, backend="triton")
    assert (context[1][:5] == -torch.inf).all() and (context[0][:5] == 0).all()
    for backend in ("torch", "triton"):
        merged, merged_lse = kernels.merge_attention(*context, *part, backend=backend)
        assert torch.allclose(merged, whole, atol=1e-5)
        assert torch.allclose(merged_lse, lse, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_merging_parts_without_keys(backend):
    out, lse = torch.ones(17, 2, 80, device=DEVICE), torch.zeros(17, 2, device=DEVICE)
    none = torch.full_like(lse, -torch.inf)
    one = kernels.merge_attention(out, lse, 7 * out, none, backend=backend)
    assert torch.equal(one[0], out) and torch.equal(one[1], lse)
    empty = kernels.merge_attention(out, none, out, none, backend=backend)
    assert (empty[0] == 0).all() and (empty[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_request_at_a_time_equals_the_batch(dtype):
    """To the bit with ``splits``; balanced splits depend on the batch, so their last bits may."""
    args = trees.attention([7, 1, 21], [40, 0, 90], **(SHAPE | {"dtype": dtype}), device=DEVICE)
    fixed = kernels.tree_attention(**args, splits=3, backend="triton")
    balanced = kernels.tree_attention(**args, backend="triton")
    for b in range(3):
        single, rows = trees.alone(args, b)
        one = kernels.tree_attention(**single, splits=3, backend="triton")
        assert torch.equal(one[0], fixed[0][rows]) and torch.equal(one[1], fixed[1][rows])
        other = kernels.tree_attention(**single, backend="triton")
        assert torch.allclose(other[0], balanced[0][rows], atol=10 * LIMIT[dtype])
    again = kernels.tree_attention(**args, backend="triton")
    assert torch.equal(again[0], balanced[0]) and torch.equal(again[1], balanced[1])


@pytest.mark.parametrize("options", [{}, {"splits": 3}, {"mode": "tree"}, {"window": 20}])
def test_one_plan_serves_all_layers(options):
    args = trees.attention([7, 0, 21], [40, 3, 90], **SHAPE, device=DEVICE)
    named = {
        name: args[name]
        for name in ("q", "key_cache", "page_table", "prefix_lens", "tree_key", "indptr")
    }
    plan = kernels.plan_attention(**named, **options, backend="triton")
    for seed in range(2):
        layer = args | {
            "q": torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(seed)).to(
                DEVICE
            )
        }
        one = kernels.tree_attention(**layer, **options, plan=plan, backend="triton")
        two = kernels.tree_attention(**layer, **options, backend="triton")
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert kernels.plan_attention(**named, **options, backend="torch").shapes == plan.shapes
    kernels.tree_attention(**args, **options, plan=plan, backend="torch")


def test_any_mask_and_any_cache_layout():
    """Bits that are no ancestors or beyond the rows; keys by slot first, values by head first."""
    args = trees.attention(
        [5, 40, 3], [18, 33, 0], **(SHAPE | {"heads": 4, "kv_heads": 2}), device=DEVICE
    )
    generator = torch.Generator().manual_seed(1)
    noise = (
        torch.randint(-(1 << 31), 1 << 31, args["mask"].shape, generator=generator).int().to(DEVICE)
    )
    args["value_cache"] = args["value_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    compare(args | {"mask": args["mask"] | noise})
    compare(args | {"mask": torch.full_like(noise, -1)}, splits=2)


def test_pad_rows_may_hold_anything_and_see_themselves():
    args = trees.attention([4, 2], [9, 0], **SHAPE, pads=3, device=DEVICE)
    clean, clean_lse = compare(args)
    assert torch.equal(clean[-3:], args["tree_value"][-3:].expand(-1, 2, -1))
    spoiled = {name: args[name].clone() for name in ("q", "tree_key", "tree_value")}
    for value in spoiled.values():
        value[-3:] = torch.nan
    out, lse = kernels.tree_attention(**(args | spoiled), backend="triton")
    assert torch.equal(out[:-3], clean[:-3]) and torch.equal(lse[:-3], clean_lse[:-3])


def test_empty_steps():
    args = trees.attention([0, 0], [5, 0], **SHAPE, pads=0, device=DEVICE)
    assert kernels.tree_attention(**args, backend="triton")[0].shape == (0, 2, 64)
    compare(trees.attention([0], [5], **SHAPE, pads=3, device=DEVICE))
    assert kernels.argmax_tokens(torch.zeros(0, 5, device=DEVICE), backend="triton").shape == (0,)


def test_context_is_cut_at_the_page_table():
    args = trees.attention([3], [32], **SHAPE, device=DEVICE)
    compare(args | {"prefix_lens": torch.full_like(args["prefix_lens"], 10_000)})
    compare(args | {"prefix_lens": torch.full_like(args["prefix_lens"], -5)})


def test_launchers_are_sync_free(monkeypatch):
    for module, names in (
        (schedule, ["_plan"]),
        (attention, ["_attend", "_merge"]),
        (join, ["_add", "_merge_parts"]),
        (acceptance, ["_chunk_argmax", "_accept", "_argmax"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, mock.MagicMock())
    args = trees.attention([4, 2], [9, 0], **SHAPE, device=DEVICE)
    token, links = (
        torch.zeros(8, dtype=torch.int64, device=DEVICE),
        (args["request"], args["indptr"]),
    )
    with RefuseSyncs():
        out, lse = kernels.tree_attention(**args, window=3, splits=2, backend="triton")
        joined = {"mode": "tree", "prefix_out": out, "prefix_lse": lse}
        kernels.tree_attention(**args, **joined, backend="triton")
        kernels.merge_attention(out, lse, out, lse, backend="triton")
        kernels.accept(*links, token, token, 3, backend="triton")
        kernels.accept(*links, token, out[:, 0], 3, backend="triton")
        kernels.argmax_tokens(out[:, 0], backend="triton")


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([0, 1, 3, 7, 70]), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 6),
    st.integers(0, 10_000),
)
def test_acceptance_equals_the_reference_whatever_the_links_are(rows, pads, max_depth, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows) + pads
    draw = lambda low, high: torch.randint(low, high, (count,), generator=generator).to(DEVICE)
    indptr = torch.tensor([0, *rows]).cumsum(0).int().to(DEVICE)
    parent, tokens, target = draw(-3, 9).int(), draw(-1, 3), draw(-1, 3)
    expected = reference.accept(parent, indptr, tokens, target, max_depth)
    result = kernels.accept(parent, indptr, tokens, target, max_depth, backend="triton")
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(result, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 63, 300])
def test_greedy_acceptance_equals_the_reference(dtype, vocabulary, monkeypatch):
    monkeypatch.setattr(tiles, "VOCABULARY_CHUNK", 128)
    monkeypatch.setattr(tiles, "VOCABULARY_BLOCK", 64)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-2, 3, (20, vocabulary), generator=generator).to(dtype)  # many ties
    for share, value in ((0.3, torch.nan), (0.3, -torch.inf), (0.01, torch.inf)):
        logits[torch.rand(logits.shape, generator=generator) < share] = value
    logits[3], logits[4] = torch.nan, -torch.inf
    logits = logits.to(DEVICE)
    assert torch.equal(
        kernels.argmax_tokens(logits, backend="triton"), reference.argmax_tokens(logits)
    )
    assert kernels.argmax_tokens(logits, backend="triton")[3:5].tolist() == [-1, -1]
    parent, _, _, indptr, _ = trees.links([9, 0, 8], 3, generator, DEVICE)
    tokens = torch.randint(0, min(vocabulary, 4), (20,), generator=generator).to(DEVICE)
    expected = reference.accept(parent, indptr, tokens, logits, 5)
    result = kernels.accept(parent, indptr, tokens, logits, 5, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_verify_gives_the_same_on_both_backends():
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=2, max_depth=3)
    packed = scheduler.pack(grow_all(scheduler, torch.arange(3, device=DEVICE), k=2, seed=0))
    logits = torch.randn(packed.num_rows, 1000, device=DEVICE)
    logits.scatter_(1, packed.tokens.roll(-1)[:, None], 9.0)  # so that something is accepted
    for given_ in ({"logits": logits}, {"target_tokens": logits.argmax(-1)}):
        one, two = (
            echo.accept(packed, **given_, backend="torch"),
            echo.accept(packed, **given_, backend="triton"),
        )
        assert all(
            torch.equal(getattr(one, name), getattr(two, name))
            for name in ("tokens", "rows", "num_emitted", "bonus")
        )
        assert int(one.num_emitted.max()) > 1


def test_a_backend_that_is_not_there_is_an_error(monkeypatch):
    logits = torch.zeros(1, 3, device=DEVICE)
    with pytest.raises(echo.EchoError, match=r"backend: expected one of .* got 'cuda'"):
        kernels.argmax_tokens(logits, backend="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(echo.EchoError, match="backend: expected an installed triton"):
        kernels.argmax_tokens(logits, backend="triton")
    assert kernels.argmax_tokens(logits).tolist() == [0]


def test_triton_on_the_cpu_without_the_interpreter_is_an_error():
    code = (
        "import torch, echo; from echo import kernels\n"
        "assert kernels.argmax_tokens(torch.zeros(1, 3)).tolist() == [0]\n"
        "try: kernels.argmax_tokens(torch.zeros(1, 3), backend='triton')\n"
        "except echo.EchoError as error: assert 'expected CUDA tensors' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "half"}, "mode: expected one of"),
        ({"window": 4, "depth": None}, r"depth: expected a tensor int32 \[8\], got NoneType"),
        ({"softcap": 0.0}, "softcap: expected a number above 0"),
        ({"splits": 0}, "splits: expected an int from 1"),
        ({"key_cache": None}, "key_cache: expected a tensor"),
        (
            {"indptr": torch.zeros(2, dtype=torch.int32, device=DEVICE)},
            r"page_table: expected int32 \[1, max_pages\]",
        ),
        ({"key_scale": torch.ones(2, device=DEVICE)}, r"key_scale: expected float32 \[1\]"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input(change, message, backend):
    args = trees.attention([4, 2], [9, 0], **SHAPE, device=DEVICE)
    with pytest.raises(echo.EchoError, match=message):
        kernels.tree_attention(**(args | change), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_targets(backend):
    links, tokens = (
        torch.zeros(4, dtype=torch.int32, device=DEVICE),
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
    )
    tree, logits = (links, links[:2], tokens), torch.zeros(4, 9, device=DEVICE)
    for function, args, message in [
        (
            kernels.accept,
            (*tree, tokens[:3], 2),
            r"target_tokens: expected int64 \[4\], got int64 \[3\]",
        ),
        (
            kernels.accept,
            (*tree, logits[:3], 2),
            r"logits: expected .* \[4, V\], got float32 \[3, 9\]",
        ),
        (kernels.argmax_tokens, (tokens,), r"logits: expected .* \[N, V\], got int64 \[4\]"),
        (
            kernels.argmax_tokens,
            (logits[:, :0],),
            r"V: expected an int from 1 to 1073741824, got 0",
        ),
    ]:
        with pytest.raises(echo.EchoError, match=message):
            function(*args, backend=backend)


def test_the_kernel_names_layouts_it_does_not_take():
    args = trees.attention([4, 2], [9, 0], **SHAPE, device=DEVICE)
    with pytest.raises(echo.EchoError, match="key_cache: expected a contiguous last dimension"):
        kernels.tree_attention(
            **(
                args | {"key_cache": args["key_cache"].transpose(1, 3).contiguous().transpose(1, 3)}
            ),
            backend="triton",
        )
    small = trees.attention([4, 2], [9, 0], **(SHAPE | {"dim": 8}), device=DEVICE)
    with pytest.raises(echo.EchoError, match="head dimensions from 16 to 256"):
        kernels.tree_attention(**small, backend="triton")
