"""Timing a step of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError


def profile(
    step: Callable[[int], object],
    num_tokens: Iterable[int],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Times ``step(num_tokens)`` for each row count: ``warmup`` untimed rounds over all counts, then ``repeats`` timed ones.

    Rounds are interleaved so that a slow moment of the machine does not fall on one row count alone; the fits that take the samples
    are robust, as a median is. On CUDA the device's own events are the clock.

    Args:
        step: runs one step of that many rows; on CUDA it need not wait for the device, but must use the current stream.
        num_tokens: row counts, at least 1.
        repeats: timed calls of each.
        warmup: untimed calls of each: compilation, graph capture, clocks.
        device: where the step runs.

    Returns:
        Samples for :meth:`CostModel.from_samples` or :func:`line`: rows int64 [n * repeats] and seconds float64 [n * repeats].

    Raises:
        EchoError: no row counts, or an argument out of range.
    """
    counts = [checks.integer("rows", r, 1) for r in num_tokens]
    repeats = checks.integer("repeats", repeats, 1)
    warmup = checks.integer("warmup", warmup, 0)
    if not counts:
        raise EchoError("rows: expected at least one row count, got none")
    for count in counts * warmup:
        step(count)
    clock = _device_clock if torch.device(device).type == "cuda" else _host_clock
    return np.array(counts * repeats, dtype=np.int64), np.array(
        [clock(step, count) for count in counts * repeats]
    )


def _host_clock(step: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    step(count)
    return time.perf_counter() - start


def _device_clock(step: Callable[[int], object], count: int) -> float:
    """Between two events of the stream, the second awaited before the next step: what a step takes when nothing runs before it."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step(count)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
