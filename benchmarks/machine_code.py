"""What a compiled kernel's machine code says: resources, and what one turn of its hot loop costs against what memory allows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
"""By architecture: shared memory that a block, and that a multiprocessor has at most; the system keeps 1 KiB of each block's."""
MATRIX = ("UTCHMMA", "HGMMA", "HMMA")
"""Matrix instructions in the machine code, widest first."""
MEMORY = {80: 2.04e12 / 108 / 1.41e9, 90: 3.35e12 / 132 / 1.755e9, 100: 8.0e12 / 148 / 1.85e9}
"""Bytes that memory delivers per multiprocessor and cycle: data sheets of A100 80 GB, H100 SXM and B200."""
ISSUED = 4
"""Instructions that a multiprocessor issues per cycle, one a scheduler."""


def cuobjdump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        calls = ([str(CUOBJDUMP), option, file.name] for option in ("-res-usage", "-sass"))
        usage, sass = (subprocess.run(call, capture_output=True, text=True, check=True).stdout for call in calls)
    assert "EXIT" in sass, "expected a disassembly"
    return usage, sass


def resources(compiled: Any, arch: int, warps: int) -> dict[str, Any]:
    """Registers, spills, shared memory, and how many blocks of a kernel a multiprocessor is predicted to hold."""
    usage, sass = cuobjdump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    # The compiler may add warps of its own (a warp that loads, say): the kernel's real size is in its launch bounds.
    bound = re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"])
    threads = int(bound[1]) if bound else 32 * warps
    shared, (_, whole) = compiled.metadata.shared, SHARED[arch]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * (threads // 32))
    blocks = min(by_registers, whole // (shared + 1024), 2048 // threads, 32)
    return {
        "arch": f"sm_{arch}",
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "stack": stack,
        "shared": shared,
        "threads": threads,
        "blocks": blocks,
        "occupancy": round(blocks * threads / 2048, 3),
        "matrix": next((kind for kind in MATRIX if re.search(rf"\b{kind}\b", sass)), "none"),
    }


def hot_loop(sass: str) -> list[str]:
    """Opcodes of the first loop that copies to shared memory: the one over the context, where there is one."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", sass)
    for at, opcode, operands in lines:
        back = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if back and int(back[1], 16) < int(at, 16):
            body = [name for place, name, _ in lines if int(back[1], 16) <= int(place, 16) <= int(at, 16)]
            if any(name.startswith("LDGSTS") for name in body):
                return body
    return []


def turn(compiled: Any, arch: int, keys: int, width: int, key_bytes: int, found: dict[str, Any]) -> dict[str, Any]:
    """One turn of the hot loop over ``keys`` keys, each ``key_bytes`` of key and value.

    ``buffers``: turns whose keys shared memory holds at once. ``in_flight``: bytes a multiprocessor may have asked for, all its blocks
    together; memory needs about 25 KiB to be busy. ``issue``: instructions over those that fit into the time that memory takes for the
    same keys: above 1, instructions are the limit.
    """
    _, sass = cuobjdump(compiled.asm["cubin"])
    count = Counter(hot_loop(sass))
    total = sum(count.values())
    rings = re.findall(rf"local_alloc : \(\) -> !ttg.memdesc<(\d+)x{keys}x{width}x\w+, [^>]*mutable>", compiled.asm["ttgir"])
    buffers = int(rings[0]) if rings else 1
    starting = lambda *names: sum(n for name, n in count.items() if name.startswith(names))  # noqa: E731
    return {
        "loop": total,
        "copies16": starting("LDGSTS.E.BYPASS.128"),
        "barriers": starting("BAR"),
        "buffers": buffers,
        "in_flight": found["blocks"] * buffers * keys * key_bytes,
        "issue": round(total * found["threads"] / 32 / keys / (ISSUED * key_bytes / MEMORY[arch]), 2),
    }
