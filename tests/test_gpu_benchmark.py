"""The GPU benchmark's path runs on the CPU, refuses a wrong kernel, and its peers are set up right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        assert case["echo"]["error"] < 1e-6 and case["sdpa with mask"]["error"] < 1e-5
        assert not any("failed" in entry for entry in case.values() if isinstance(entry, dict))
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
