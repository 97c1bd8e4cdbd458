"""Hypothesis strategies: batches, trees, logs, cost curves. They need the ``kit`` extra (hypothesis) when called, not when imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from echo import _checks as checks
from echo._checks import EchoError
from echo.cost import CostModel
from echo.gating.logs import WarmupLog
from echo.testing.scenarios import Scenario
from echo.tree.supertree import SuperTree

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

VOCAB, CHILDREN, CAPACITY = 4, 3, 12
FAULTS = (float("nan"), float("inf"), float("-inf"), 0.01)
"""Scores that a drafter should not give, and sometimes does."""


def hypothesis() -> Any:
    """The package.

    Raises:
        EchoError: it is not installed.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise EchoError(
            "hypothesis: expected it installed (pip install 'echo-specdec[kit]'), got none"
        ) from error
    return hypothesis


def batches(
    *, max_batch: int = 5, max_depth: int = 4, rows: bool = True
) -> SearchStrategy[Scenario]:
    """Steps of any shape: empty slots, tight capacities, scores with ties, NaN and infinities.

    Args:
        max_batch: most slots.
        max_depth: most layers.
        rows: also draw the rows of the step, from the number of slots up; False: what the scheduler asks for by itself.
    """
    st = hypothesis().strategies
    max_batch = checks.integer("max_batch", max_batch, 1)
    max_depth = checks.integer("max_depth", max_depth, 0)

    size = max_depth * VOCAB * CHILDREN
    slot = st.tuples(
        st.integers(0, VOCAB - 1),
        st.sampled_from([True, True, False]),
        st.integers(0, CAPACITY - 1),
        st.sampled_from([1.0, 0.5, 0.1]),
    )

    def build(
        slots: list[tuple[int, bool, int, float]],
        depth: int,
        k: int,
        spare: int,
        coarse: bool,
        numbers: bytes,
        bad: list[tuple[int, float]],
        weighed: bool,
    ) -> Scenario:
        roots, live, short, weight = (
            torch.from_numpy(np.array(column)) for column in zip(*slots, strict=True)
        )
        flat = scores(np.frombuffer(numbers, ">u2"), coarse=coarse)
        for place, value in bad:
            flat[place] = value
        table = flat.view(max_depth, VOCAB, CHILDREN)
        count = max(len(slots), int(live.sum()) + spare) if rows else None
        return Scenario(
            roots,
            live,
            CAPACITY - short,
            table[:depth, :, :k],
            count,
            weight.float() if weighed else None,
        )

    strategy: SearchStrategy[Scenario] = st.builds(
        build,
        st.lists(slot, min_size=1, max_size=max_batch),
        st.integers(min(1, max_depth), max_depth),
        st.integers(1, CHILDREN),
        st.integers(0, 12),
        st.booleans(),
        st.binary(min_size=2 * size, max_size=2 * size),
        st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from(FAULTS)), max_size=8)
        if size
        else st.just([]),
        st.booleans(),
    )
    return strategy


def scores(numbers: np.typing.NDArray[Any], *, coarse: bool) -> torch.Tensor:
    """Log-probabilities float32 [n] from 16-bit numbers [n], 0 being a half; ``coarse`` makes eighths, so that many are equal."""
    share = 1.0 - (numbers.astype(np.float64) + 32768) % 65536 / 65536
    return torch.from_numpy(np.log(np.ceil(8 * share) / 8 if coarse else share).astype(np.float32))


def trees() -> SearchStrategy[SuperTree]:
    """Ready-made trees for :meth:`~echo.ElasticBudgetScheduler.select` and ``pack``: siblings in any order, empty slots."""
    st = hypothesis().strategies

    def build(draw: Any) -> SuperTree:
        batch = draw(st.integers(1, 4))
        lengths = draw(st.lists(st.integers(0, 12), min_size=batch, max_size=batch))
        nodes = max(1, *lengths)
        parent = [
            [-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]
            for _ in range(batch)
        ]
        share = [[draw(st.integers(1, 8)) / 8 for _ in range(nodes)] for _ in range(batch)]
        token = torch.arange(nodes).expand(batch, -1)  # all of a request differ, and so do siblings
        spare = max(sum(size > 0 for size in lengths), 1) + draw(st.integers(0, 8))
        log_prob = torch.tensor(share, dtype=torch.float32).log()
        return SuperTree.from_arrays(
            token,
            torch.tensor(parent),
            log_prob,
            num_nodes=torch.tensor(lengths),
            num_verify_tokens=spare,
        )

    strategy: SearchStrategy[SuperTree] = st.composite(build)()
    return strategy


def logs() -> SearchStrategy[WarmupLog]:
    """Warm-up logs of any size, the empty one included: confidences with ties, depths without a row."""
    st = hypothesis().strategies
    row = st.tuples(st.integers(1, 4), st.integers(0, 16).map(lambda n: n / 16), st.booleans())

    def build(rows: list[tuple[int, float, bool]]) -> WarmupLog:
        depth, confidence, accepted = (
            (np.array(column) for column in zip(*rows, strict=True)) if rows else ((), (), ())
        )
        return WarmupLog.from_arrays(
            np.asarray(depth, np.int64),
            np.asarray(confidence, np.float64),
            np.asarray(accepted, bool),
        )

    strategy: SearchStrategy[WarmupLog] = st.lists(row, max_size=60).map(build)
    return strategy


def cost_curves() -> SearchStrategy[CostModel]:
    """Cost curves: flat, with a knee, steep, or of one point; with tiers or without; drafting free or dear."""
    st = hypothesis().strategies
    steps = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=6)

    def build(points: list[tuple[int, int]], layer: int, row: int, tiers: set[int]) -> CostModel:
        rows, rises = np.array(points).T
        seconds = 1e-3 * (4 + np.cumsum(rises))
        return CostModel(
            tuple(int(r) for r in np.cumsum(rows)),
            tuple(seconds.tolist()),
            layer * 1e-4,
            row * 1e-5,
            tuple(sorted(tiers)),
        )

    strategy: SearchStrategy[CostModel] = st.builds(
        build, steps, st.integers(0, 9), st.integers(0, 9), st.sets(st.integers(1, 512), max_size=4)
    )
    return strategy
