"""The GPU benchmark's path runs on the CPU, refuses a wrong kernel, and its peers are set up right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from echo import kernels

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments, code=None):
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *(["-c", code] if code else [str(BENCHMARKS / "gpu.py")]), *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)


def test_dry_run():
    result = run("--dry-run")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    for case in report["attention"]:
        assert all(case[name]["error"] < 1e-6 for name in ("echo", "sdpa with mask", "flex attention"))
    assert report["accept"] and report["step"]["us"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run in full")
def test_without_a_device_it_says_so():
    result = run()
    assert result.returncode == 2 and "no CUDA device" in result.stdout and not result.stderr


def test_a_wrong_kernel_is_not_timed():
    code = (
        "import sys, gpu; from echo import kernels; right = kernels.tree_attention\n"
        "kernels.tree_attention = lambda **options: (1.001 * right(**options)[0], None)\n"
        "sys.exit(gpu.main())"
    )
    result = run("--dry-run", code=code)
    assert result.returncode == 1 and "our kernel is wrong" in result.stdout
    assert "us" not in json.loads(result.stdout.splitlines()[-2])["echo"]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Stub(ModuleType):
    """Any name is a function that says no."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: False


@pytest.fixture
def sglang_kernels(monkeypatch):
    """SGLang's Triton files alone, from its wheel without dependencies (``pip install --no-deps sglang==0.5.23``)."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("sglang is not installed")
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention", "sglang.srt"):
        module = ModuleType(name)
        module.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", Stub("sglang.srt.utils"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize("shape", [(3, 4, 37, False, 16), (3, 5, 20, True, 16), (2, 16, 50, False, 1)])
@pytest.mark.parametrize("peer", ["sdpa with mask", "flex attention", "sglang extend"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter only")
def test_peers_agree_with_the_kernel_on_the_same_ragged_trees(shape, peer, benchmarks, request):
    import gpu
    import peers

    if peer.startswith("sglang"):
        request.getfixturevalue("sglang_kernels")
    batch, rows, context, dealt, page = shape
    args = gpu.inputs(gpu.Case("tiny", batch, rows, context, dealt, page), torch.device("cpu"), 0)
    theirs = peers.PEERS[peer](args)()
    ours = kernels.tree_attention(**args, backend="triton")[0][: len(theirs)]
    assert float((theirs - ours).norm() / ours.norm()) < 1e-6
    assert gpu.wrong(args, ours) < 1e-6
