"""Kernels compile for three generations of GPUs, without spills, onto wide matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = os.environ | {
    "TRITON_INTERPRET": "0",  # the interpreter and the compiler do not share a process
    "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]),
}


def test_a_representative_subset_compiles_well():
    command = [sys.executable, str(BENCHMARKS / "compile_kernels.py"), "--quick"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "0 faults" in result.stdout


def test_the_check_finds_spills_and_narrow_instructions():
    code = (
        "import compile_kernels as ck, torch; from echo.kernels import schedule, tiles\n"
        "schedule.tile = lambda *_: tiles.Tile(128, 64, 4, 2, 2)\n"
        "entry = ck.measure(ck.attention(ck.Case(128, torch.bfloat16, 4, 16), 80)['attend'], 80)\n"
        "assert 'spill' in ck.faults(entry, 64, True)[0], entry\n"
        "entry['buffers'] = 2\n"
        "fine = entry | {'spills': 0, 'stack': 0, 'planned': entry['blocks']}\n"
        "found = ck.faults(fine | {'arch': 'sm_90'}, 64, True)\n"
        "assert found == ['HMMA instead of HGMMA'], entry\n"
        "assert 'shared memory' in ck.faults(fine | {'shared': 170_000}, 64, True)[0]\n"
        "assert '1 buffers' in ck.faults(fine | {'buffers': 1}, 64, True)[0]\n"
        "assert '9 planned' in ck.faults(fine | {'planned': 9}, 64, True)[0]"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_another_batch_compiles_nothing_anew():
    """Other requests, rows, mask words and pages: the same signature, constants and hints."""
    code = (
        "import compile_kernels as ck, torch\n"
        "def launches(batch, rows):\n"
        "    found = ck.attention(ck.Case(128, torch.bfloat16, 4, rows, batch=batch), 90)\n"
        "    found |= {k: r for k, _, r in ck.others(batch, 128256)}\n"
        "    sources = {name: ck.source(recorder)[0] for name, recorder in found.items()}\n"
        "    return {name: (s.signature, s.constants, s.attrs) for name, s in sources.items()}\n"
        "first = launches(8, 16)\n"
        "assert len(first) == 7, first.keys()\n"
        "for sizes in ((1, 16), (16, 12), (37, 13)): assert launches(*sizes) == first, sizes"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_the_committed_table_has_no_faults_and_is_of_the_shipped_launches():
    """Every head dimension on every architecture, made with the constants of the launcher. Only
    attention keeps something on the stack, between its loops.
    """
    from echo.kernels import schedule, tiles

    table = json.loads((BENCHMARKS / "results" / "compile.json").read_text())
    assert {k: v for k, v in vars(tiles).items() if k.isupper() and len(k) > 1} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in table["launch"].items()
    }
    kernels = table["kernels"]
    for dim in tiles.HEAD_DIMS:
        own = [
            columns["arch"]
            for case, columns in kernels["attend"].items()
            if case.startswith(f"D={dim} ")
        ]
        assert set().union(*own) == {"sm_80", "sm_90", "sm_100"}
    assert not any(
        spills
        for name, cases in kernels.items()
        for columns in cases.values()
        for spills in columns["spills"] + columns["stack"] * (name not in ("attend", "add"))
    )
    for case, columns in kernels["attend"].items():
        words = dict(word.split("=") for word in case.split() if "=" in word)
        dim, group, rows, page = (int(words[name]) for name in ("D", "group", "rows", "page"))
        itemsize = 4 if "float32" in case else 2
        kind = group, dim, itemsize, 1 if "float8" in case else itemsize, page
        mean = tiles.FIXED_ROWS if "splits" in words else rows
        for arch, *tile in zip(columns["arch"], columns["ROWS"], columns["KEYS"], strict=True):
            assert schedule.tile(*kind, mean, int(arch[3:]) // 10)[:2] == tuple(tile)


def test_a_serving_run_compiles_few_variants():
    """108 tiers of up to 256 requests, two policies: what changes with the tier is a number."""
    code = (
        "import launch; found = launch.variants(); print(found)\n"
        "assert found.keys() >= {'begin', 'grow', 'rank', 'share', 'pack', 'accept', 'observe'}\n"
        "assert found.total() <= 18"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_a_step_compiles_side_by_side_and_only_once():
    code = (
        "import launch, torch\n"
        "from triton.compiler import CompiledKernel\n"
        "from triton.runtime import driver\n"
        "from triton.runtime.jit import JITFunction\n"
        "from echo import kernels\n"
        "from echo.kernels import acceptance, grow, observe, pack, select, tiles\n"
        "driver.set_active(launch.Card())\n"
        "tiles.interpreted = lambda: True\n"
        "scheduler = launch.policies()['two-level, two gates']\n"
        "def step():\n"
        "    with kernels.using('triton'), kernels.compiling(2):\n"
        "        launch.Step(scheduler, 4, 1, 8).settle()\n"
        "step()\n"
        "modules = acceptance, grow, observe, pack, select\n"
        "compiled = [kernel for module in modules for f in vars(module).values()\n"
        "            if isinstance(f, JITFunction) for kernel in f.device_caches[0][0].values()]\n"
        "assert len(compiled) == 8 and all(type(k) is CompiledKernel for k in compiled), compiled\n"
        "assert all(k.asm['cubin'] and k.metadata.target.arch == 90 for k in compiled)\n"
        "def again(*_): raise AssertionError('compiled twice')\n"
        "JITFunction._do_compile = again\n"
        "step()"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
