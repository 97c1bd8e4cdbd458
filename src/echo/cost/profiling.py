"""Timing of a custom step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError

TICK = 1e-12
"""Minimum seconds of a step; below it, the clock is too coarse."""


def profile(
    step: Callable[[int], object],
    num_tokens: Iterable[int],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Time ``step(count)`` for each token count: ``warmup`` untimed rounds, then ``repeats``.

    A round runs all counts, so that a slow moment of the machine does not affect only one.

    Args:
        step: runs one step of that many tokens; on CUDA, on the current stream.
        num_tokens: token counts, at least 1.
        repeats: timed calls per count.
        warmup: untimed calls per count, for compilation, graph capture and clocks.
        device: where the step runs; on CUDA it is timed by events.

    Returns:
        Token counts int64 and seconds float64 [n * repeats], for :meth:`CostModel.from_samples`.

    Raises:
        EchoError: no token counts, an argument out of range, or a step that took no time.

    Example:
        >>> counts, seconds = profile(lambda count: sum(range(count)), [1, 8], repeats=2)
        >>> counts.tolist(), seconds.shape
        ([1, 8, 1, 8], (4,))
    """
    counts = list(checks.ints("num_tokens", num_tokens, 1))
    repeats = checks.integer("repeats", repeats, 1)
    warmup = checks.integer("warmup", warmup, 0)
    if not counts:
        raise EchoError("num_tokens: expected at least one token count, got none")
    for count in counts * warmup:
        step(count)
    seconds = [seconds_of(step, (count,), device) for count in counts * repeats]
    return np.array(counts * repeats, dtype=np.int64), np.array(seconds)


def seconds_of(
    step: Callable[..., object],
    load: tuple[int, ...],
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time ``step(*load)`` in seconds by ``clock``.

    On CUDA by two events of the stream, synchronized: the step starts on an idle device.
    """
    if torch.device(device).type != "cuda":
        start = clock()
        step(*load)
        seconds = clock() - start
    else:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        step(*load)
        end.record()
        end.synchronize()
        seconds = float(begin.elapsed_time(end)) / 1e3
    return checks.real("seconds of a step", seconds, TICK)
