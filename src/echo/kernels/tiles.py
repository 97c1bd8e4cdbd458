"""Every choice of a launch in one place: tiles, warps, stages, splits.

Host arithmetic only; nothing here imports Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dimensions that are compiled and checked; any from 16 to 256 runs."""

ROUNDS = 2
"""Work items that a balanced split aims at, as multiples of the programs that are at work at once, all KV heads together."""

MIN_BLOCKS = 2
"""KV blocks that a piece has at least: shorter ones cost more in partial results than they gain in parallel reads."""

HOPPER = 9
"""Major compute capability of H100 and H200."""

FIXED_ROWS = 16
"""Rows of a request that the tile is chosen for where ``splits`` is fixed: the same in every batch."""

MERGED = 4096
"""Numbers of partial results that one program of the merge reads at once."""

VOCABULARY_CHUNK = 16384
"""Logits that one program of the arg-max reads, at least."""

VOCABULARY_BLOCK = 4096
"""Logits that it reads at once."""

VOCABULARY_PARTS = 16
"""Chunks of a row, at most."""

WALKED = 64
"""Rows of a request that the walk has at hand from the start."""

COMPARED = 2048
"""Pairs of a request's candidates that are compared at once."""

REQUESTS = 256
"""Requests that a program looks at at once, where it counts what comes before its own."""

SEEN = 1024
"""Candidates of other requests that a program looks at at once, where it needs to know what they buy: 2,048 spill."""

SEARCHED = 4096
"""Binary searches that the program which finds the cutoff runs at once: more spill."""


class Tile(NamedTuple):
    """How one program works: ``rows`` of queries times heads of a group, ``keys`` a step, and its compile options.

    ``own_stages`` are those of the loop over a request's own rows, which is short.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    own_stages: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def lanes(nodes: int) -> tuple[int, int]:
    """Lanes for so many nodes, and how many of them are compared with all at once."""
    block = max(16, power_of_two(nodes))
    return block, max(1, min(block, COMPARED // block))


def cutoff_bits(group: int) -> int:
    """Bits of the cutoff found in a round of the search among so many requests: as many as there are searches for."""
    return max(1, min(4, (SEARCHED // group).bit_length() - 1))


def others(block: int) -> int:
    """Requests of so many lanes each that a program looks at at once."""
    return max(1, min(REQUESTS, SEEN // block))


def warps(block: int) -> int:
    """Warps for so many lanes of one program of a step's kernels."""
    return max(1, min(8, block // 32))


def tile(
    group: int, dim: int, itemsize: int, cached: int, page: int, rows: float, generation: int
) -> Tile:
    """The tile for a group of query heads: one that the rows fill, in a table of tiles that compile without spills.

    Why these is in ``benchmarks/results/compile.md``. On Hopper 64 rows by 64 keys on its wide matrix instruction take fewer
    instructions a key than 32 by 32, even half empty, and with 8-bit keys fewer than 16 by 32. Elsewhere, and where blocks of 64 keys do
    not lie within pages, 64 keys spill. A taller tile reads a KV head's keys fewer times; more than 128 rows of 16 bits, or 64 of a
    head dimension of 256 (after Hopper, of 64), spill, and so do more or fewer ``own_stages`` than these.

    Args:
        group: query heads of a KV head.
        dim: head dimension.
        itemsize: bytes of a query element.
        cached: bytes of an element of the cache.
        page: tokens of a page; 0 without a context.
        rows: rows of a request, as far as the host knows: the mean, or a fixed number for the same tile in every batch.
        generation: major compute capability of the device.
    """
    wide = dim > 128
    if itemsize == 4:  # exact products on the ordinary units: small tiles, for registers
        return Tile(16, 16, 8 if wide else 4, 2, 1 if dim <= 64 else 3)
    height = min(
        max(power_of_two(round(group * rows)), 16),
        64 if wide or (generation > HOPPER and dim == 64) else 128,
    )
    if (
        generation == HOPPER
        and page
        and page % 64 == 0
        and not wide
        and (height > 16 or cached == 1)
    ):
        return Tile(max(height, 64), 64, 8 if height == 128 else 4, 3, 1)
    low = (
        generation > HOPPER and height == 16 and dim < power_of_two(dim)
    )  # four stages spill there
    large = height == 128 or (wide and height > 16)
    scattered = page % 64 != 0 and dim < power_of_two(dim)
    deep = generation < HOPPER and not (wide and height == 16) and not scattered
    own = 2 if deep or (generation > HOPPER and height == 32 and dim == power_of_two(dim)) else 1
    return Tile(height, 32, 8 if large else 4, 3 if wide or low else 4, own)


@functools.lru_cache
def generation(device: torch.device) -> int:
    """Major compute capability of a CUDA device; 0 elsewhere."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 elsewhere, so that the interpreter has splits to merge."""
    return (
        int(torch.cuda.get_device_properties(device).multi_processor_count)
        if device.type == "cuda"
        else 4
    )


def target_items(device: torch.device, kv_heads: int, tile: Tile) -> int:
    """Work items that a balanced split aims at: programs of taller tiles hold more registers, so fewer are at work at once."""
    resident = max(1, min(4, 128 // tile.rows))
    return max(1, -(-ROUNDS * resident * multiprocessors(device) // kv_heads))


def vocabulary_chunk(vocabulary: int) -> int:
    """Logits that one program of the arg-max reads."""
    return max(VOCABULARY_CHUNK, power_of_two(-(-vocabulary // VOCABULARY_PARTS)))


def most_tiles(rows: int, batch: int, group: int, height: int) -> int:
    """A bound of row tiles over all ways to share ``rows`` among ``batch`` requests."""
    return min(
        (rows * group + min(batch, rows) * (height - 1)) // height, rows * -(-group // height)
    )


@functools.lru_cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a launcher with the device of its first argument as the current one: Triton launches there, wherever the tensors are."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device(
            args[0].get_device() if isinstance(args[0], torch.Tensor) else -1
        ):  # -1: leave it
            return function(*args, **options)

    return call
