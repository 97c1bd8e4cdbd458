"""The GPU benchmark runs on the CPU, refuses a wrong kernel, and sets its peers up right."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import echo
from echo import kernels
from echo.kernels.tiles import Tile

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TILES = [Tile(16, 16, 4, 2, 1), Tile(16, 32, 4, 2, 1), Tile(16, 128, 4, 2, 1)]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def run(benchmarks, monkeypatch, capsys):
    """The command's exit status and what it wrote."""
    import gpu

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        return gpu.main(), *capsys.readouterr()

    return main


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter only")
def test_dry_run(run):
    status, out, _ = run("--dry-run")
    assert status == 0
    report = json.loads(out.splitlines()[-1])
    for case in report["attention"]:
        assert all(
            case[name]["error"] < 1e-6 for name in ("echo", "sdpa with mask", "flex attention")
        )
    assert report["accept"] and all(report["step"][name]["us"] > 0 for name in ("fused", "torch"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run in full")
def test_without_a_device_it_says_so(run):
    status, out, err = run()
    assert status == 2 and "no CUDA device" in out and not err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter only")
def test_a_wrong_kernel_is_not_timed(run, monkeypatch):
    import gpu

    right = kernels.tree_attention
    wrong = lambda **options: (1.001 * right(**options)[0], None)
    monkeypatch.setattr(kernels, "tree_attention", wrong)
    monkeypatch.setattr(gpu, "step", None)
    status, out, _ = run("--dry-run")
    assert status == 1 and "our kernel is wrong" in out
    assert "us" not in json.loads(out.splitlines()[-2])["echo"]


@pytest.mark.parametrize(
    "shape", [(3, 4, 37, False, 16), (3, 5, 20, True, 16), (2, 16, 50, False, 1)]
)
@pytest.mark.parametrize("peer", ["sdpa with mask", "flex attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter only")
def test_peers_agree_with_the_kernel_on_the_same_ragged_trees(shape, peer, benchmarks):
    import gpu
    from common import peers

    batch, rows, context, elastic, page = shape
    args = gpu.inputs(gpu.Case("tiny", batch, rows, context, elastic, page), torch.device("cpu"), 0)
    theirs = peers.PEERS[peer](args)()
    ours = kernels.tree_attention(**args, backend="triton")[0][: len(theirs)]
    assert float((theirs - ours).norm() / ours.norm()) < 1e-6
    assert gpu.wrong(args, ours) < 1e-6


def stands_in(q, caches, table, lengths, starts, visible, **_):
    """What paged peers document: the tree is in the cache, and ``visible`` [N, rows] masks."""
    out = torch.empty_like(q)
    page = caches[0].shape[1]
    group = q.shape[1] // caches[0].shape[2]
    for b, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        at = torch.arange(int(lengths[b]))
        keys, values = (
            cache[table[b, at // page].long(), at % page]
            .repeat_interleave(group, 1)
            .transpose(0, 1)
            for cache in caches
        )
        mask = torch.ones(end - first, len(at), dtype=torch.bool)
        mask[:, len(at) - (end - first) :] = visible[first:end, : end - first]
        out[first:end] = F.scaled_dot_product_attention(
            q[first:end].transpose(0, 1), keys, values, attn_mask=mask
        ).transpose(0, 1)
    return out


def xqa_stands_in(
    q, caches, workspace, table, lengths, most, *, mask, q_len_per_req, q_cu_seq_lens, **options
):
    assert mask.dtype == torch.uint16 and mask.shape == (len(q), -(-q_len_per_req // 32) * 2)
    bit = torch.arange(16 * mask.shape[1])
    return stands_in(
        q,
        caches,
        table,
        lengths,
        q_cu_seq_lens,
        (mask.int()[:, bit // 16] >> bit % 16 & 1).bool(),
        **options,
    )


def prefix_stands_in(q, caches, table, lengths, starts):
    """Attention over the prefix alone, and its lse in natural log [N, Hq]."""
    lse = torch.empty(q.shape[:2])
    page = caches[0].shape[1]
    group = q.shape[1] // caches[0].shape[2]
    nothing = torch.zeros(len(q), 0, dtype=torch.bool)
    for b, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        at = torch.arange(int(lengths[b]))
        keys = caches[0][table[b, at // page].long(), at % page].repeat_interleave(group, 1)
        score = torch.einsum("nhd,shd->nhs", q[first:end], keys) * q.shape[-1] ** -0.5
        lse[first:end] = score.logsumexp(-1)
    full = torch.cat([nothing, torch.ones(len(q), 99, dtype=torch.bool)], 1)
    return stands_in(q, caches, table, lengths, starts, full), lse


def flash_stands_in(
    q, keys, values, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, causal,
    return_softmax_lse=False, **options,
):  # fmt: skip
    if return_softmax_lse:  # the prefix, every row alike, and the lse by head
        assert not causal
        caches = keys, values
        out, lse = prefix_stands_in(q, caches, page_table, cache_seqlens, cu_seqlens_q)
        return out, lse.T.contiguous()
    assert causal
    local = torch.cat([torch.arange(n) for n in cu_seqlens_q.diff().tolist()])
    return stands_in(
        q,
        (keys, values),
        page_table,
        cache_seqlens,
        cu_seqlens_q,
        torch.arange(max_seqlen_q) <= local[:, None],
        **options,
    )


class Wrapper:
    """FlashInfer's paged prefill without a mask, its lse of base 2."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, qo, starts, indices, last, heads, kv_heads, dim, page, *, causal, **dtypes):
        assert not causal
        used = starts.diff()
        self.lengths = (used - 1) * page + last
        self.starts = qo
        self.table = torch.zeros(len(used), int(used.max()), dtype=torch.int32)
        for b, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
            self.table[b, : end - first] = indices[first:end]

    def run(self, q, caches, *, out, lse, return_lse):
        found, natural = prefix_stands_in(q, caches, self.table, self.lengths, self.starts)
        out.copy_(found)
        lse.copy_(natural / math.log(2))
        return out, lse


@pytest.mark.parametrize(
    "shape", [(3, 4, 37, False, 16), (3, 5, 20, True, 16), (2, 40, 50, False, 64)]
)
@pytest.mark.parametrize(
    "peer",
    [
        "flashinfer xqa",
        "flash attention 3, causal",
        "echo behind flash attention 3",
        "echo behind flashinfer",
    ],
)
def test_peers_that_need_a_device_are_called_as_documented(shape, peer, benchmarks, monkeypatch):
    """Against a stand-in that keeps to their documentation, and float64."""
    import gpu
    from common import peers

    for name in ("flashinfer", "flashinfer.decode", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flashinfer.decode"].xqa_batch_decode_with_kv_cache = xqa_stands_in
    sys.modules["flash_attn_interface"].flash_attn_with_kvcache = flash_stands_in
    sys.modules["flashinfer"].BatchPrefillWithPagedKVCacheWrapper = Wrapper
    batch, rows, context, elastic, page = shape
    args = gpu.inputs(gpu.Case("tiny", batch, rows, context, elastic, page), torch.device("cpu"), 0)
    args = peers.chained(args) if peer in peers.CAUSAL else args
    assert gpu.wrong(args, (peers.PEERS | peers.CAUSAL)[peer](args)()) < 1e-6


def test_the_table_has_the_bar_first_and_ratios_to_it(benchmarks):
    import gpu

    entry = {
        "model": "m",
        "batch": 8,
        "rows": 4,
        "context": 99,
        "elastic": True,
        "cache": "bfloat16",
    }
    entry |= {"floor_us": 8.0, "flash attention 3, causal": {"us": 10.0}, "echo": {"us": 12.5}}
    head, line = gpu.ratios([entry | {"flashinfer": {"absent": "none"}}])
    assert head.index("flash attention 3") < head.index("echo")
    assert "10.0 us 1.00x" in line and "12.5 us 1.25x" in line and line.count("-") >= 2


def test_contenders_alternate_and_their_spread_is_told(benchmarks, monkeypatch):
    from common import timing

    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    contenders = {name: [lambda name=name: order.append(name)] for name in "abc"}
    times = timing.alternating(contenders)
    assert order[:3] == ["a", "b", "c"]  # once each, before what is timed
    assert {tuple(order[i : i + 3]) for i in range(3, len(order), 3)} == {
        ("a", "b", "c"), ("c", "b", "a")
    }  # fmt: skip
    assert all(len(samples) == len(times["a"]) for samples in times.values())
    told = timing.summary([1e-6 * i for i in range(1, 101)], floor=2e-6)
    assert told == {"us": 50.5, "p10_us": 11.0, "p90_us": 91.0, "p99_us": 100.0, "share": 0.0396}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would time for real")
def test_the_library_reads_what_the_tuner_writes(benchmarks, monkeypatch, tmp_path):
    """With a timer that says which tile is fastest."""
    from common import timing, tuning
    from echo.kernels import schedule, tiles

    asked = []

    def timer(contenders):
        asked.append(list(contenders))
        return {
            name: [20.0, 9.0 - i, 1.0] for i, name in enumerate(contenders)
        }  # the last one wins

    monkeypatch.setattr(tiles, "generation", lambda device: 8)
    monkeypatch.setattr(timing, "copies", lambda moved, device: 1)
    monkeypatch.setattr(tuning, "candidates", lambda folded, itemsize: TILES)
    shape = {"caches": ("bfloat16",), "batch": 1, "context": 3}
    rows = tuning.tune((2, 1, 16), torch.device("cpu"), timer, **shape)
    assert [len(names) for names in asked] == [3, 3, 3] and all(
        row[:4] == [8, 16, 2, 2] for row in rows
    )
    tuning.write(tmp_path / "tiles.json", "a card", rows)
    monkeypatch.setenv("ECHO_TILES", str(tmp_path / "tiles.json"))
    schedule.table.cache_clear()
    try:
        assert schedule.measured(2, 16, 2, 2, 128, 4, 8) == TILES[2]
        assert schedule.measured(2, 16, 2, 2, 64, 4, 8) == TILES[1]
        assert schedule.measured(2, 16, 2, 2, 1, 4, 8) is None  # blocks do not lie within pages
        assert schedule.measured(2, 32, 2, 2, 64, 4, 8) is None  # another head dimension
        assert schedule.measured(2, 16, 2, 2, 64, 129, 8) is None  # more rows than were timed
        (tmp_path / "tiles.json").write_text("[]")
        schedule.table.cache_clear()
        with pytest.raises(
            echo.EchoError, match=r"a table of tiles in .*tiles.json, got TypeError"
        ):
            schedule.table()
    finally:
        monkeypatch.undo()
        schedule.table.cache_clear()


def test_the_check_shares_tests_out_and_counts_failures(run, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_one(n): assert n != 3\n"
    )
    status, out, _ = run("--check", str(tmp_path / "test_some.py"), "--processes", "1")
    assert status == 1 and "1 shares failed" in out
    assert "test_one[3]" in out and "1 failed, 3 passed" in out
    assert out.count("not timed") + out.count("by the clock") == 8
