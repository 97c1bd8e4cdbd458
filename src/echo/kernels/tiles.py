"""Every choice of a launch: tiles, warps, stages, splits; and whether it compiles or runs."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

compiles_only = ContextVar("echo.kernels.tiles.compiles_only", default=False)
"""Whether launches compile, and launch nothing."""

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dimensions that are compiled and checked; any from 16 to 256 runs."""
MIN_BLOCKS = 2
"""Fewest key blocks of a program: fewer cost more in partial results than they gain."""
HOPPER = 9
"""Major compute capability of H100 and H200."""
FIXED_ROWS = 16
"""Rows of a request that the tile is chosen for with fixed ``splits``: the same in every batch."""
MERGE_ELEMENTS = 4096
"""Partial results that a program of the merge loads at once."""
VOCABULARY_CHUNK = 16384
"""Fewest logits of a program of the arg-max."""
VOCABULARY_BLOCK = 4096
"""Logits that it loads at once."""
VOCABULARY_PARTS = 16
"""Most chunks of a row of logits."""
ACCEPT_ROWS = 64
"""Rows of a request that acceptance loads before its first step."""
PAIRS = 2048
"""Pairs of a request's candidates that are compared at once."""
REQUESTS = 256
"""Requests that a program reads at once where it counts what comes before its own."""
CANDIDATES = 1024
"""Candidates of other requests read at once to learn what they commit: 2,048 spill."""
SEARCHES = 4096
"""Binary searches that the search for the cutoff runs at once: more spill."""


class Tile(NamedTuple):
    """Tile and compile options: ``rows`` of queries times heads of a group, by ``keys``.

    ``tree_stages`` are those of the loop over a request's own rows, which is short.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tree_stages: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def lanes(nodes: int) -> tuple[int, int]:
    """Lanes for so many nodes, and how many of them are compared with all at once."""
    block = max(16, power_of_two(nodes))
    return block, max(1, min(block, PAIRS // block))


def requests_at_once(batch: int) -> int:
    """Requests among which the cutoff is searched: powers of four, so that few are compiled."""
    return max(16, 1 << -(-(batch - 1).bit_length() // 2) * 2)


def cutoff_bits(group: int) -> int:
    """Bits of the cutoff found in a round of the search among so many requests."""
    return max(1, min(3, (SEARCHES // group).bit_length() - 1))


def other_requests(block: int) -> int:
    """Requests of so many lanes each that a program reads at once."""
    return max(1, min(REQUESTS, CANDIDATES // block))


def warps(block: int) -> int:
    """Warps of a program of so many lanes."""
    return max(1, min(8, block // 32))


def tile(
    group: int,
    dim: int,
    itemsize: int,
    cache_itemsize: int,
    page_size: int,
    rows: float,
    generation: int,
) -> Tile:
    """The tile for a group of query heads: one that the rows fill, of those that do not spill.

    Measured in ``benchmarks/results/compile.md``. On Hopper 64 rows by 64 keys on its wide matrix
    instruction take fewer instructions a key than 32 by 32, even half empty, and with 8-bit keys
    fewer than 16 by 32. Elsewhere 64 keys spill. A taller tile reads a KV head's keys fewer times;
    more than 128 rows of 16 bits, or 64 of a head dimension of 256 (after Hopper, of 64), spill,
    and so do other ``tree_stages``.

    Args:
        group: query heads of a KV head.
        dim: head dimension.
        itemsize, cache_itemsize: bytes of an element of the queries and of the cache.
        page_size: 0 without a prefix.
        rows: rows of a request that the host expects: the mean, or the same in every batch.
        generation: major compute capability of the device.
    """
    wide = dim > 128
    padded = dim < power_of_two(dim)
    if itemsize == 4:  # exact products on the ordinary units: small tiles, for registers
        return Tile(16, 16, 8 if wide else 4, 2, 1 if dim <= 64 else 3)
    tallest = 64 if wide or (generation > HOPPER and dim == 64) else 128
    height = min(max(power_of_two(round(group * rows)), 16), tallest)
    if generation == HOPPER and page_size and not wide and (height > 16 or cache_itemsize == 1):
        return Tile(max(height, 64), 64, 8 if height == 128 else 4, 3, 1)
    low = generation > HOPPER and height == 16 and padded  # four stages spill there
    large = height == 128 or (wide and height > 16)
    scattered = page_size % 64 != 0 and padded
    deep = generation < HOPPER and not (wide and height == 16) and not scattered
    stages = 2 if deep or (generation > HOPPER and height == 32 and not padded) else 1
    return Tile(height, 32, 8 if large else 4, 3 if wide or low else 4, stages)


@functools.lru_cache
def generation(device: torch.device) -> int:
    """Major compute capability of a CUDA device; 0 elsewhere."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 elsewhere: the interpreter has splits to merge."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def vocabulary_chunk(vocabulary: int) -> int:
    """Logits of a program of the arg-max."""
    return max(VOCABULARY_CHUNK, power_of_two(-(-vocabulary // VOCABULARY_PARTS)))


def max_row_tiles(rows: int, batch: int, group: int, height: int) -> int:
    """Most row tiles over all ways to share ``rows`` among ``batch`` requests."""
    folded = (rows * group + min(batch, rows) * (height - 1)) // height
    return min(folded, rows * -(-group // height))


@functools.lru_cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on its first tensor's device; within :func:`echo.kernels.compiling` only
    compile it.
    """
    first = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device(first.get_device()):  # -1, of a CPU tensor: stay
        if compiles_only.get():
            kernel.warmup(*args, grid=grid, **options)
        else:
            kernel[grid](*args, **options)


def as_bytes(value: Tensor) -> Tensor:
    """Booleans as the kernels read and write them."""
    return value.view(torch.uint8)


def by_rows(value: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, however far apart they lie."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()
