"""How many kernels does a step launch, begin to observe, part by part?

    python benchmarks/operations.py          into benchmarks/results/operations.json; needs no GPU

Counted are torch operations that compute or copy (views and empty buffers do nothing on a device;
sorts and selections are more than one kernel) and launches of the fused kernels, which run in
Triton's interpreter. No count depends on the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import echo
from common.replays import write
from echo import kernels
from echo.kernels import acceptance, grow, ngram, observe, pack, select
from host import calibration

BATCH, DEPTH, CANDIDATES, BEAM = 2, 6, 4, 4
RESULTS = Path(__file__).parent / "results"
IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "detach")


class Operations(TorchDispatchMode):
    """Counts by name what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IDLE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def policies() -> dict[str, echo.ElasticBudgetScheduler]:
    """The rules of the replay's table that differ in what they compute."""
    make, maps = echo.ElasticBudgetScheduler, calibration()
    return {
        "global ranking": make(echo.GlobalRank(BEAM), None, 4 * BATCH, DEPTH),
        "global ranking, calibrated": make(echo.GlobalRank(BEAM, maps), None, 4 * BATCH, DEPTH),
        "two-level, sparse gate": make(
            echo.TwoLevel(2, 4), echo.SparseGate({1: 0.1, 3: 0.05}), 4 * BATCH, DEPTH
        ),
        "throughput-optimal": make(
            echo.GlobalRank(BEAM, maps),
            None,
            echo.CostModel((1, 1024, 4096), (1.0, 1.0, 4.0)),
            DEPTH,
        ),
    }


class Launched:
    """Counts a kernel's launches, and hides its operations from :class:`Operations`."""

    def __init__(self, kernel: Any, name: str, counted: Operations) -> None:
        self.kernel, self.name, self.counted = kernel, name, counted

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Within another kernel."""
        return self.kernel(*args, **options)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.counted.count[f"kernel {self.name}"] += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return launch


@contextlib.contextmanager
def counting() -> Iterator[Operations]:
    """Counts operations and launches within it."""
    operations, modules = Operations(), (acceptance, grow, ngram, select, pack, observe)
    found = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if hasattr(kernel, "run") and hasattr(kernel, "fn")
    ]
    try:
        for module, name, kernel in found:
            setattr(module, name, Launched(kernel, name.strip("_"), operations))
        with operations:
            yield operations
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)


def drafts(tree: echo.SuperTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates for every node of the frontier."""
    shape = (*tree.frontier.token.shape, CANDIDATES)
    return torch.randint(0, 1000, shape), torch.randn(shape).log_softmax(-1)


def step(scheduler: echo.ElasticBudgetScheduler, backend: str) -> dict[str, Counter[str]]:
    """What each part of one step launches: by torch, by kernels, or by kernels in a workspace."""
    counts: dict[str, Counter[str]] = {}
    roots, rows = torch.arange(BATCH), 4 * BATCH
    target, context, table = (
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(BATCH).int(),
        torch.arange(32 * BATCH).int().view(BATCH, 32),
    )
    device = roots.device
    space = echo.Workspace(scheduler, BATCH, k=CANDIDATES, num_verify_tokens=rows, device=device)
    history, owned = space.history, backend == "workspace"

    def part(name: str, call: Any) -> Any:
        with kernels.using("torch" if backend == "torch" else "triton"), counting() as operations:
            value = call()
        counts[name] = counts.get(name, Counter()) + operations.count
        return value

    def begin() -> echo.SuperTree:
        return space.begin(roots) if owned else scheduler.begin(roots, num_verify_tokens=rows)

    def observe(packed: echo.PackedTree, accepted: echo.tree.Accepted) -> None:
        if owned:
            space.observe(roots, packed, accepted)
        else:
            history.observe(roots, packed, accepted)

    def whole() -> None:
        tree, planner = part("begin", begin), space if owned else scheduler
        for _ in range(scheduler.max_depth):
            drafted = drafts(tree)
            tree = part("grow", lambda tree=tree, drafted=drafted: planner.grow(tree, *drafted))
        packed = part("select, pack", lambda: planner.pack(tree))
        accepted = part("accept", lambda: (space if owned else echo).accept(packed, target))
        to = {"page_table": table, "page_size": 64, "pad_slot_id": 0}
        part("compact", lambda: (space if owned else echo).compact(packed, accepted, context, **to))
        part("observe", lambda: observe(packed, accepted))

    whole()  # tables are copied to the device once
    counts.clear()
    whole()
    return counts


def main() -> None:
    """Prints and writes."""
    report: dict[str, Any] = {
        "depth": DEPTH,
        "beam": BEAM,
        "candidates": CANDIDATES,
        "torch": torch.__version__,
        "steps": {},
    }
    for name, scheduler in policies().items():
        for backend in ("torch", "triton", "workspace"):
            counts = step(scheduler, backend)
            totals = {part: sum(count.values()) for part, count in counts.items()}
            report["steps"].setdefault(name, {})[backend] = totals | {"all": sum(totals.values())}
            print(
                name,
                backend,
                report["steps"][name][backend],
                dict(sum(counts.values(), Counter()).most_common(8)),
                flush=True,
            )
    write(RESULTS / "operations.json", report)


if __name__ == "__main__":
    main()
