"""The GPU benchmark runs on the CPU, refuses a wrong kernel, and sets its peers up right."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from echo import kernels

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments, code=None):
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        *(["-c", code] if code else [str(BENCHMARKS / "gpu.py")]),
        *arguments,
    ]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_dry_run():
    result = run("--dry-run")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    for case in report["attention"]:
        assert all(
            case[name]["error"] < 1e-6 for name in ("echo", "sdpa with mask", "flex attention")
        )
    assert report["accept"] and all(report["step"][name]["us"] > 0 for name in ("fused", "torch"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run in full")
def test_without_a_device_it_says_so():
    result = run()
    assert result.returncode == 2 and "no CUDA device" in result.stdout and not result.stderr


def test_a_wrong_kernel_is_not_timed():
    code = (
        "import sys, gpu; from echo import kernels; right = kernels.tree_attention\n"
        "kernels.tree_attention = lambda **options: (1.001 * right(**options)[0], None)\n"
        "gpu.step = None\n"
        "sys.exit(gpu.main())"
    )
    result = run("--dry-run", code=code)
    assert result.returncode == 1 and "our kernel is wrong" in result.stdout
    assert "us" not in json.loads(result.stdout.splitlines()[-2])["echo"]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


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
    page, group = caches[0].shape[1], q.shape[1] // caches[0].shape[2]
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


def flash_stands_in(
    q, keys, values, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, causal, **options
):
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


@pytest.mark.parametrize(
    "shape", [(3, 4, 37, False, 16), (3, 5, 20, True, 16), (2, 40, 50, False, 64)]
)
@pytest.mark.parametrize("peer", ["flashinfer xqa", "flash attention 3, causal"])
def test_peers_that_need_a_device_are_called_as_documented(shape, peer, benchmarks, monkeypatch):
    """Against a stand-in that keeps to their documentation, and float64."""
    import gpu
    from common import peers

    for name in ("flashinfer", "flashinfer.decode", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flashinfer.decode"].xqa_batch_decode_with_kv_cache = xqa_stands_in
    sys.modules["flash_attn_interface"].flash_attn_with_kvcache = flash_stands_in
    batch, rows, context, elastic, page = shape
    args = gpu.inputs(gpu.Case("tiny", batch, rows, context, elastic, page), torch.device("cpu"), 0)
    args = peers.chained(args) if peer in peers.CAUSAL else args
    assert gpu.wrong(args, (peers.PEERS | peers.CAUSAL)[peer](args)()) < 1e-6
