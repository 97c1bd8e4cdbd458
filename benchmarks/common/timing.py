"""Times on a GPU: CUDA graphs over inputs that exceed the L2 cache, contenders in alternation.

A *timer* takes calls by name, several of each over other inputs, and gives the seconds of one call
in every round; tests put one in that needs no GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Call = Callable[[], object]
Timer = Callable[[Mapping[str, list[Call]]], Mapping[str, list[float]]]
ROUNDS, COLD = 50, 48
"""Rounds, and most copies of the inputs."""


def graph(calls: Iterable[Call]) -> Call:
    """The calls as one CUDA graph's replay; as they are where there is no CUDA."""
    calls = list(calls)
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


def seconds(replay: Call) -> float:
    """Of one replay, by the device's clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def alternating(contenders: Mapping[str, list[Call]]) -> dict[str, list[float]]:
    """Seconds of a call of each contender, round by round; every other round in reverse order."""
    graphs = {name: graph(calls) for name, calls in contenders.items()}
    rounds = ROUNDS if torch.cuda.is_available() else 2
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(-(rounds // 5), rounds):
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            taken = seconds(graphs[name]) / len(contenders[name])
            if number >= 0:
                found[name].append(taken)
    return found


def summary(samples: list[float], floor: float = 0.0) -> dict[str, float]:
    """Median, spread and share of the floor, times in microseconds."""
    ordered = sorted(samples)
    at = lambda share: ordered[min(int(share * len(ordered)), len(ordered) - 1)]
    median = statistics.median(ordered)
    found = {"us": median, "p10_us": at(0.1), "p90_us": at(0.9), "p99_us": at(0.99)}
    found = {name: round(1e6 * value, 2) for name, value in found.items()}
    return found | ({"share": round(floor / median, 4)} if floor else {})


def median(call: Call) -> float:
    """Seconds of one call."""
    return statistics.median(alternating({"": [call]})[""])


def copies(moved: int, device: torch.device) -> int:
    """How many inputs of so many bytes exceed the L2 cache twice."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(1, min(COLD, 1 + 2 * l2 // max(moved, 1)))


def floors(device: torch.device) -> tuple[float, float]:
    """Bytes a second that a large sum reads, and operations of a large 16-bit matrix product."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (128, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    big: Any = torch.zeros((1 << 27) if cuda else 1 << 12, dtype=torch.int64, device=device)
    return 8 * big.numel() / median(big.sum), 2 * n**3 / median(lambda: a @ b)
