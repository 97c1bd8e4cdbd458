"""What does launching a step cost the host, and how many variants of its kernels does a serving run
compile?

    python benchmarks/launch.py          into benchmarks/results/launch.json; needs no GPU

Triton's own launch path runs, arguments bound, specialised and looked up; only the compiler and the
driver's call at its end are replaced. So the microseconds are those that Python spends, on this
machine, and a variant is what Triton would compile. CUDA graphs spend neither: a tier is launched
so once, before it is captured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import echo
from common.replays import write
from echo import kernels
from echo.kernels import acceptance, grow, ngram, observe, pack, select, tiles

BEAM, CANDIDATES, DEPTH = 4, 4, 6
LANES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEPTHS = (1, 2, 4, 6)
TOKENS = (2, 4, 8)
"""Verify tokens a request."""
SHAPES = [(batch, depth, n * batch) for batch in LANES for depth in DEPTHS for n in TOKENS]
"""Lanes, layers and verify tokens of the tiers of a serving run."""
RESULTS = Path(__file__).parent / "results"
Scheduler = echo.ElasticBudgetScheduler


class Card:
    """A driver for an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Launches:
    """Kernels compiled and launched, by name."""

    def __init__(self) -> None:
        self.variants: Counter[str] = Counter()
        self.launched = 0


@contextmanager
def without_a_card() -> Iterator[Launches]:
    """Within it kernels are launched on CPU tensors, up to the driver's call."""
    seen, compiler, interpreted = Launches(), JITFunction._do_compile, tiles.interpreted

    def launch(*arguments: Any) -> None:
        seen.launched += 1

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *others: Any) -> Any:
        seen.variants[self.__name__.strip("_")] += 1
        assert self.cache_key  # finds the globals that every launch compares, as compiling does
        empty: Callable[..., None] = lambda *arguments: None
        kernel = SimpleNamespace(launch_metadata=empty, run=launch, function=0, packed_metadata=0)
        self.device_caches[device][0][key] = kernel
        return kernel

    for module in (acceptance, grow, ngram, observe, pack, select):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    driver.set_active(Card())  # type: ignore[arg-type]
    JITFunction._do_compile, tiles.interpreted = compile_nothing, lambda: True
    try:
        with kernels.using("triton"):
            yield seen
    finally:
        JITFunction._do_compile, tiles.interpreted = compiler, interpreted
        driver._active = None


class Step:
    """One step's planning and acceptance on tensors that hold nothing of interest: kernels write
    nothing here.
    """

    def __init__(self, scheduler: Scheduler, batch: int, depth: int, tokens: int) -> None:
        widths = [1] + [BEAM] * (depth - 1)
        self.scheduler, self.tokens = scheduler, tokens
        self.roots = torch.arange(batch)
        shapes = [(batch, width, CANDIDATES) for width in widths]
        self.drafts = [(torch.zeros(s, dtype=torch.int64), torch.zeros(s)) for s in shapes]
        self.target = torch.zeros(tokens, dtype=torch.int64)
        self.prefix_lens = torch.zeros(batch, dtype=torch.int64)
        self.history = scheduler.history(batch)
        self.packed = self.plan()
        for column in (self.packed.indptr, self.packed.request, self.packed.status):
            column.zero_()

    def plan(self) -> echo.PackedTree:
        """begin, grow, pack."""
        tree = self.scheduler.begin(self.roots, num_verify_tokens=self.tokens)
        for draft in self.drafts:
            tree = self.scheduler.grow(tree, *draft)
        return self.scheduler.pack(tree)

    def settle(self) -> None:
        """accept, compact, observe."""
        accepted = echo.accept(self.packed, self.target)
        echo.compact(self.packed, accepted, self.prefix_lens)
        self.history.observe(self.roots, self.packed, accepted)


def microseconds(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Of one call: least and median over rounds of a hundred."""
    for _ in range(20):
        call()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(100):
            call()
        found.append((time.perf_counter() - begin) * 1e4)
    return {"least": round(min(found)), "median": round(statistics.median(found))}


def policies() -> dict[str, Scheduler]:
    """The two shipped rules."""
    gate = echo.SparseGate({2: 0.3, 4: 0.1})
    return {
        "global ranking": Scheduler(echo.GlobalRank(BEAM), None, 1024, DEPTH),
        "two-level, two gates": Scheduler(echo.TwoLevel(BEAM, 8), gate, 1024, DEPTH),
    }


def variants(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Counter[str]:
    """What is compiled for steps of so many lanes, layers and verify tokens, by kernel."""
    with without_a_card() as seen:
        for scheduler in policies().values():
            for shape in shapes:
                Step(scheduler, *shape).settle()
    return seen.variants


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "launch.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"batch": LANES[-1], "depth": DEPTH, "torch": torch.__version__}
    with without_a_card() as seen:
        for name, scheduler in policies().items():
            step, entry = Step(scheduler, LANES[-1], DEPTH, 1024), {}
            for part, call in (("plan", step.plan), ("accept, compact, observe", step.settle)):
                call()
                before = seen.launched
                call()
                entry[part] = {"launches": seen.launched - before}
                entry[part] |= microseconds(call, args.rounds)
                print(f"{name}: {part}: {entry[part]}")
            result[name] = entry
    found = variants()
    result["variants"] = {"shapes": len(SHAPES), "kernels": dict(found)}
    print(f"{found.total()} variants for {len(SHAPES)} shapes of both policies: {dict(found)}")
    write(args.out, result)


if __name__ == "__main__":
    main()
