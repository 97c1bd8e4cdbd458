"""Tree attention against dense masked attention and other kernels' prefix, which define it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import echo
import trees
from conftest import grow_all
from echo.kernels import merge_attention, tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
try:
    import triton  # noqa: F401

    BACKENDS = ["torch", "triton"]
except ImportError:
    BACKENDS = ["torch"]
SHAPES = {
    "SmolLM2": {"heads": 9, "kv_heads": 3, "dim": 64},
    "a share of eight": {"heads": 8, "kv_heads": 1, "dim": 128},
    "a group of 16": {"heads": 16, "kv_heads": 1, "dim": 64},
}


def packed_batch(max_tree_rows=64):
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(3), budget=60, max_depth=4, max_verify_tokens_per_req=max_tree_rows
    )
    tree = grow_all(scheduler, torch.arange(3), k=4, seed=3)
    return scheduler.pack(tree, num_verify_tokens=64)


@pytest.mark.parametrize(("page", "heads", "kv_heads"), [(1, 4, 4), (16, 6, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_dense_attention(page, heads, kv_heads, window):
    packed, dim = packed_batch(), 16
    context = torch.tensor([5, 0, 37], dtype=torch.int32)
    pages = 120
    k_cache, v_cache = torch.randn(2, pages, page, kv_heads, dim)
    table = torch.randperm(pages)[: 3 * 37].view(3, 37).int()
    q = torch.randn(packed.num_rows, heads, dim)
    k, v = torch.randn(2, packed.num_rows, kv_heads, dim)
    out, lse = tree_attention(
        q,
        k_cache,
        v_cache,
        table,
        context,
        k,
        v,
        packed.request,
        packed.indptr,
        packed.mask,
        window=window,
        depth=packed.depth,
    )
    for b in range(3):
        first, end, length = int(packed.indptr[b]), int(packed.indptr[b + 1]), int(context[b])
        at = torch.arange(length)
        where = table[b, at // page].long() * page + at % page
        keys = torch.cat([k_cache.flatten(0, 1)[where], k[first:end]])
        values = torch.cat([v_cache.flatten(0, 1)[where], v[first:end]])
        visible = packed.visible()[first:end, : end - first]
        mask = torch.cat([torch.ones(end - first, length, dtype=torch.bool), visible], 1)
        position = torch.cat([at, length + packed.depth[first:end]])
        if window:
            mask &= position > (length + packed.depth[first:end])[:, None] - window
        expand = lambda x: x.repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
        dense = F.scaled_dot_product_attention(
            q[first:end].transpose(0, 1), expand(keys), expand(values), attn_mask=mask
        )
        assert torch.allclose(out[first:end], dense.transpose(0, 1), atol=1e-5)
        scores = torch.einsum("nhd,hsd->nhs", q[first:end], expand(keys)) / dim**0.5
        assert torch.allclose(
            lse[first:end], scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1), atol=1e-5
        )
    pads = slice(int(packed.indptr[-1]), None)
    assert torch.allclose(out[pads], v[pads].repeat_interleave(heads // kv_heads, 1), atol=1e-6)


def test_softcap_bounds_scores():
    packed = packed_batch()
    empty = torch.zeros(1, 1, 1, 8)
    table, context = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    q, k, v = 100 * torch.randn(3, packed.num_rows, 1, 8)
    _, lse = tree_attention(
        q,
        empty,
        empty,
        table,
        context,
        k,
        v,
        packed.request,
        packed.indptr,
        packed.mask,
        softcap=2.0,
    )
    assert (lse <= 2.0 + packed.visible().sum(1, keepdim=True).log() + 1e-5).all()


def test_bad_input():
    packed = packed_batch()
    q = torch.zeros(packed.num_rows, 3, 8)
    cache = torch.zeros(1, 1, 2, 8)
    table, context = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    kv = torch.zeros(packed.num_rows, 2, 8)
    with pytest.raises(
        echo.EchoError, match="q: expected a multiple of the 2 heads of tree_key, got 3 heads"
    ):
        tree_attention(
            q, cache, cache, table, context, kv, kv, packed.request, packed.indptr, packed.mask
        )
    with pytest.raises(echo.EchoError, match="mask: expected int32"):
        tree_attention(
            q[:, :2],
            cache,
            cache,
            table,
            context,
            kv,
            kv,
            packed.request,
            packed.indptr,
            packed.mask.long(),
        )


def paged(name, rows=(7, 0, 21, 1), contexts=(40, 3, 90, 17), dtype=torch.float32, **options):
    shape = {"page": 16, "dtype": dtype} | SHAPES[name] | options
    return trees.attention(list(rows), list(contexts), **shape, device=DEVICE)


def prefix_only(args, window=None):
    """What a prefix kernel without a mask gives: every row sees its request's prefix; where
    ``window`` is given, as causal kernels count it: by the row within the request.
    """
    q, keys, values = args["q"].double(), args["key_cache"], args["value_cache"]
    group, page = q.shape[1] // keys.shape[2], keys.shape[1]
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], -torch.inf).to(q)
    for n, b in enumerate(args["request"].tolist()):
        if b == len(args["prefix_lens"]):
            lse[n] = torch.nan  # pad rows may hold anything
            continue
        length = int(args["prefix_lens"][b])
        first = 0 if window is None else length + n - int(args["indptr"][b]) - window + 1
        at = torch.arange(min(max(first, 0), length), length, device=q.device)
        if not len(at):
            continue
        pages = args["page_table"][b, at // page].long()
        k, v = (x[pages, at % page].double().repeat_interleave(group, 1) for x in (keys, values))
        score = torch.einsum("hd,shd->hs", q[n], k) * q.shape[-1] ** -0.5
        out[n], lse[n] = torch.einsum("hs,shd->hd", score.softmax(-1), v), score.logsumexp(-1)
    return out.to(args["q"].dtype), lse.float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": True}])
def test_the_tree_joined_behind_another_kernel_is_the_whole(name, options, backend):
    """One launch; the lse as FlashAttention lays it out, head by head, and a strided output."""
    args = paged(name)
    if "sinks" in options:
        options = {"sinks": torch.randn(args["q"].shape[1], device=DEVICE)}
    whole = tree_attention(**args, **options, backend="torch")
    context = {"mask": torch.zeros_like(args["mask"])}
    scores = {k: v for k, v in options.items() if k == "softcap"}
    before = tree_attention(**(args | context), **scores, backend="torch")
    if not scores:
        theirs = prefix_only(args)
        real = args["request"] < 4
        assert torch.allclose(theirs[0][real].nan_to_num(), before[0][real], atol=1e-5)
        before = theirs
    by_head, wide = (
        before[1].T.contiguous().T,
        torch.cat([before[0]] * 2, 2)[..., : args["q"].shape[2]],
    )
    joined = tree_attention(
        **args, **options, mode="tree", prefix_out=wide, prefix_lse=by_head, backend=backend
    )
    for one, two in zip(joined, whole, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_tree_part_is_one_launch_whose_bits_are_a_request_s_own(monkeypatch):
    """However many launches there could be; with ``splits`` a request alone has the same bits."""
    pytest.importorskip("triton")
    from echo.kernels import attention, join, schedule

    for module, name in ((schedule, "_plan"), (attention, "_attend"), (attention, "_merge")):
        monkeypatch.setattr(module, name, None)
    launches, kernel = [], join._add
    count = type(
        "Count", (), {"__getitem__": lambda _, grid: launches.append(grid) or kernel[grid]}
    )
    monkeypatch.setattr(join, "_add", count())
    args = paged("a share of eight", dtype=torch.float16, rows=(3, 0, 21, 1, 5), contexts=(9,) * 5)
    options = {"mode": "tree", "splits": 2, "backend": "triton"}
    before = prefix_only(args)
    both = tree_attention(**args, **options, prefix_out=before[0], prefix_lse=before[1])
    assert len(launches) == 1
    for b in (0, 2, 3, 4):
        single, rows = trees.alone(args, b)
        own = {"prefix_out": before[0][rows], "prefix_lse": before[1][rows]}
        one, two = tree_attention(**single, **options, **own)[0], both[0][rows]
        if b == 0 or DEVICE == "cuda":  # NumPy's products depend on where in a tile a row is
            assert torch.equal(one, two)
        assert torch.allclose(one, two, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_joining_is_the_tree_part_and_a_merge(backend):
    args = paged("SmolLM2", dtype=torch.float16, contexts=(40, 3, 0, 17))
    before = prefix_only(args)
    nothing = before[1] == -torch.inf
    assert nothing.any()
    parts = tree_attention(**args, mode="tree", backend=backend)
    real = int(args["indptr"][-1])
    joined = tree_attention(
        **args, mode="tree", prefix_out=before[0], prefix_lse=before[1], backend=backend
    )
    merged = merge_attention(*before, *parts, backend=backend)
    for one, two in zip(joined, merged, strict=True):
        assert torch.allclose(one[:real], two[:real], atol=2e-3)
    for one, two in zip(joined, parts, strict=True):
        assert torch.equal(one[real:], two[real:]) and one[real:].isfinite().all()
    positive = before[1].masked_fill(nothing, torch.inf)  # as FlashAttention 2 has it
    again = tree_attention(
        **args, mode="tree", prefix_out=before[0], prefix_lse=positive, backend=backend
    )
    assert all(torch.equal(one, two) for one, two in zip(again, joined, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_models(name, splits, backend):
    args = paged(name, dtype=torch.float16)
    out, lse = tree_attention(**args, splits=splits, backend=backend)
    whole, whole_lse = tree_attention(**args, splits=splits, backend="torch")
    assert float((out - whole).float().norm() / whole.float().norm()) < 2e-3
    assert torch.allclose(lse, whole_lse, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"splits": 3}, {"window": 9}, {"mode": "tree"}])
def test_a_sink_is_a_key_without_a_value(options, backend):
    """Its logit joins the sum of every real row, once however the keys are cut."""
    args = paged("SmolLM2")
    out, lse = tree_attention(**args, **options, backend="torch")
    sinks = torch.linspace(-3, 40, args["q"].shape[1], device=DEVICE)  # the last ones take all
    got, got_lse = tree_attention(**args, **options, sinks=sinks, backend=backend)
    real = int(args["indptr"][-1])
    total = torch.logaddexp(lse, sinks)
    assert torch.allclose(got_lse[:real], total[:real], atol=1e-4)
    assert torch.allclose(got[:real], (out * (lse - total).exp()[..., None])[:real], atol=1e-5)
    assert torch.allclose(got[real:], out[real:], atol=1e-6)
    none = torch.full_like(sinks, -torch.inf)
    same = tree_attention(**args, **options, sinks=none, backend=backend)
    plain = tree_attention(**args, **options, backend=backend)
    assert torch.equal(same[0], plain[0]) and torch.equal(same[1], plain[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 4, 30])
def test_a_window_goes_by_depth(window, backend):
    """Every row is what the last row of its path is under a kernel that windows by row; behind such
    a kernel's prefix, the tree part is right for chains and wrong for trees.
    """
    args = paged("SmolLM2", rows=(9, 5), contexts=(40, 23))
    out, lse = tree_attention(**args, window=window, backend=backend)
    for n in range(14):
        b = int(args["request"][n])
        first, length = int(args["indptr"][b]), int(args["prefix_lens"][b])
        bits = int(args["mask"][n, 0]) & 0xFFFFFFFF
        path = [first + i for i in range(32) if bits >> i & 1]
        chain = {name: args[name][path] for name in ("q", "tree_key", "tree_value")}
        steps = torch.arange(len(path), device=DEVICE, dtype=torch.int32)
        links = {
            "request": torch.zeros_like(steps), "depth": steps,
            "indptr": torch.tensor([0, len(path)], device=DEVICE, dtype=torch.int32),
            "mask": ((2 << steps) - 1).int()[:, None],
            "prefix_lens": torch.tensor([length], device=DEVICE, dtype=torch.int32),
            "page_table": args["page_table"][b : b + 1],
        }  # fmt: skip
        alone = args | chain | links
        before = prefix_only(alone, window)
        one = tree_attention(
            **alone, window=window, mode="tree", prefix_out=before[0], prefix_lse=before[1],
            backend=backend,
        )  # fmt: skip
        assert torch.allclose(out[n], one[0][-1], atol=1e-5), n
        assert torch.allclose(lse[n], one[1][-1], atol=1e-4), n
    before = prefix_only(args, window)
    by_row = tree_attention(
        **args, window=window, mode="tree", prefix_out=before[0], prefix_lse=before[1],
        backend=backend,
    )  # fmt: skip
    assert not torch.allclose(by_row[0][:14], out[:14], atol=1e-3) or window == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_lse": None}, r"prefix_lse: expected a tensor float32 \[31, 9\], got NoneType"),
        ({"prefix_out": None}, r"prefix_out: expected a tensor .* \[31, 9, 64\], got NoneType"),
        ({"mode": "whole"}, "prefix_out: expected mode \"tree\" with it, got 'whole'"),
        ({"sinks": torch.zeros(3, device=DEVICE)}, r"sinks: expected float32 \[9\]"),
    ],
)
def test_bad_prefix_and_sinks(change, message):
    args = paged("SmolLM2")
    out, lse = prefix_only(args)
    with pytest.raises(echo.EchoError, match=message):
        tree_attention(**(args | {"mode": "tree", "prefix_out": out, "prefix_lse": lse} | change))
