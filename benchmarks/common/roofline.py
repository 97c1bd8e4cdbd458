"""What a step should cost, from a model's shape and a machine's data sheet: for planning, not for
serving.

Each layer's matrix products take the longer of their arithmetic and of reading their weights;
attention reads the keys and values of the whole context; two all-reduces a layer join the devices;
every kernel has a fixed cost. A mixture of experts reads the experts that some row is routed to,
``E * (1 - (1 - k/E)^N)`` of E when N rows choose k each (routing taken as uniform), so its curve
rises early where a dense one is flat. Rows fill tiles of 64, which is what makes curves of real
machines stairs.

What it leaves out: routing that is not uniform (rows of one tree share experts, so verification of
few requests is cheaper than this), clocks under load, the engine's own host time.

Sources. Roofline: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009. Splitting of layers,
two all-reduces each: Shoeybi et al., "Megatron-LM", arXiv 1909.08053. Drafter: Li et al.,
"EAGLE-3", arXiv 2503.01840: one decoder layer that reads a fused feature beside the embedding, over
a reduced vocabulary of 32,000. Shapes of models: the ``config.json`` published with each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo import CostModel, EchoError
from echo import _checks as checks
from echo.cost.fit import rounded

BYTES = 2
"""Of a weight, an activation and a cached number: bfloat16."""
TILE = 64
"""Rows of a tensor-core tile (Hopper's smallest M)."""
DRAFT_VOCAB = 32_000


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads.
        ffn: width of the gated feed-forward part, of one expert where there are experts.
        vocab: output vocabulary.
        head_dim: width of a head.
        experts: experts of a layer; 0: dense.
        active: experts that a row is routed to.
        draft_ffn: feed-forward width of its EAGLE-3 drafter, which is dense; 0: as ``ffn``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 128
    experts: int = 0
    active: int = 0
    draft_ffn: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "head_dim"):
            checks.integer_field(self, name, 1)
        checks.integer_field(self, "experts", 0)
        checks.integer_field(self, "active", 1 if self.experts else 0, self.experts)

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def ffn_weights(self) -> int:
        """Of one layer, or of one expert of a layer."""
        return 3 * self.hidden * self.ffn

    @property
    def weights(self) -> int:
        """Of the whole model, embedding and output layer apart (``Qwen3-235B-A22B``: 235
        billion).
        """
        per_layer = self.attention_weights + max(1, self.experts) * self.ffn_weights
        return self.layers * per_layer + 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Hardware:
    """One device and its links, with the shares of the data sheet that real kernels reach.

    Attributes:
        flops: peak bfloat16 operations a second, without sparsity.
        bandwidth: peak bytes a second of its memory.
        link: bytes a second of an all-reduce's bus bandwidth between the devices, as measured.
        compute_share: share of ``flops`` that large matrix products reach.
        memory_share: share of ``bandwidth`` that reading weights reaches.
        hop: seconds of the smallest all-reduce.
        layer: seconds of a decoder layer's kernels beyond their work: launches within a CUDA graph,
            norms, rotations, writes.
        route: seconds that a layer of experts adds to that: scores, choice, sorting, grouped
            products.
        step: seconds of a step beyond its layers: sampling, acceptance, the engine's own.
    """

    flops: float
    bandwidth: float
    link: float
    compute_share: float = 0.65
    memory_share: float = 0.80
    hop: float = 8e-6
    layer: float = 15e-6
    route: float = 40e-6
    step: float = 500e-6

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "link"):
            checks.real_field(self, name, 1.0)
        for name in ("compute_share", "memory_share"):
            checks.real_field(self, name, 0.01, 1.0)
        for name in ("hop", "layer", "route", "step"):
            checks.real_field(self, name, 0.0)


H100 = Hardware(flops=989.4e12, bandwidth=3.35e12, link=366e9)
"""NVIDIA H100 SXM 80 GB. Peaks: its data sheet. Link: bus bandwidth of large all-reduces measured
with nccl-tests on four of them over NVLink 4 (about 77% of 450 GB/s one way). The shares and fixed
costs are our assumptions: matrix products of such devices are seen at 600 to 700 TFLOP/s, one-shot
all-reduces of a few kilobytes over eight of them at 6 to 12 microseconds."""

MODELS: dict[str, Architecture] = {
    "LLaMA-3.1-8B": Architecture(32, 4096, 32, 8, 14336, 128256),
    "LLaMA-3.3-70B": Architecture(80, 8192, 64, 8, 28672, 128256),
    "Qwen3-8B": Architecture(36, 4096, 32, 8, 12288, 151936),
    "Qwen3-32B": Architecture(64, 5120, 64, 8, 25600, 151936),
    "Qwen3-235B-A22B": Architecture(
        94, 4096, 64, 4, 1536, 151936, experts=128, active=8, draft_ffn=12288
    ),
    "Vicuna-13B": Architecture(40, 5120, 40, 40, 13824, 32000),
}
"""Five models that the paper's figures name, and Vicuna-13B, on which EAGLE-3 was published."""


def plan(
    model: Architecture | str,
    hardware: Hardware | None = None,
    *,
    tensor: int = 8,
    expert: int = 1,
    most_rows: int = 4096,
    tiers: Sequence[int] = (),
) -> CostModel:
    """An analytic model for planning, before anything is measured.

    Args:
        model: what is served; a name stands for one of ``MODELS``.
        hardware: on what; ``H100`` where not given.
        tensor: devices that share each layer, a whole copy of the model together.
        expert: of those, groups that share out whole experts; the devices of a group
            split each of theirs.
        most_rows: last knot of the curve.
        tiers: of the cost model.

    Raises:
        EchoError: an unknown name, or a number out of range.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise EchoError(
                f"model: expected an Architecture or one of {', '.join(MODELS)}, got {model!r}"
            )
        model = MODELS[model]
    machine = H100 if hardware is None else hardware
    tensor = checks.integer("tensor", tensor, 1)
    expert = checks.integer("expert", expert, 1, tensor)
    most_rows = checks.integer("most_rows", most_rows, 2)
    if tensor % expert:
        raise EchoError(f"expert: expected a divisor of tensor ({tensor}), got {expert}")
    rows = np.unique(
        np.concatenate(
            [
                np.geomspace(1, most_rows, 40).round(),
                np.arange(TILE, min(most_rows, 1024) + 1, TILE),
            ]
        )
    ).astype(int)
    seconds = np.maximum.accumulate(
        _step_seconds(model, machine, rows.astype(np.float64), tensor, expert)
    )
    draft = replace(
        model,
        layers=1,
        ffn=model.draft_ffn or model.ffn,
        experts=0,
        active=0,
        vocab=min(DRAFT_VOCAB, model.vocab),
    )
    # A drafter's layer also reads the feature beside the embedding: queries, keys and values are
    # made from twice the width.
    weights = (
        draft.attention_weights
        + draft.hidden * draft.head_dim * (draft.heads + 2 * draft.kv_heads)
        + draft.ffn_weights
    )
    weights += draft.vocab * draft.hidden
    draft_layer = (
        weights * BYTES / (tensor * machine.bandwidth * machine.memory_share) + machine.layer
    )
    draft_layer += 2 * _reduce(machine, np.ones(1), draft.hidden, tensor)[0]
    draft_row = 2 * weights / (tensor * machine.flops * machine.compute_share)
    keys = 2 * BYTES * model.layers * model.kv_heads * model.head_dim / min(tensor, model.kv_heads)
    context_token = keys / (machine.bandwidth * machine.memory_share)
    draft_layer, draft_row, context_token = rounded([draft_layer, draft_row, context_token], 6)
    tiers = tuple(int(t) for t in tiers)
    return CostModel(
        tuple(rows.tolist()),
        rounded(seconds, 6),
        draft_layer,
        draft_row,
        tiers,
        context_token=context_token,
    )


def _step_seconds(
    model: Architecture, machine: Hardware, rows: NDArray[np.float64], tensor: int, expert: int
) -> NDArray[np.float64]:
    """Seconds of a forward pass of each row count, without the context's keys and values (they
    are the cost model's own slope).
    """
    attention = _product(machine, model.attention_weights / tensor, rows)
    ffn = (
        _experts(model, machine, rows, tensor, expert)
        if model.experts
        else _product(machine, model.ffn_weights / tensor, rows)
    )
    fixed = machine.layer + (machine.route if model.experts else 0.0)
    layer = attention + ffn + 2 * _reduce(machine, rows, model.hidden, tensor) + fixed
    return (
        model.layers * layer
        + _product(machine, model.vocab * model.hidden / tensor, rows)
        + machine.step
    )


def _product(machine: Hardware, weights: float, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """A matrix product with that many weights: the longer of arithmetic and reading."""
    tiles = np.ceil(rows / TILE) * TILE
    compute = 2 * weights * tiles / (machine.flops * machine.compute_share)
    return np.maximum(compute, weights * BYTES / (machine.bandwidth * machine.memory_share))


def _experts(
    model: Architecture, machine: Hardware, rows: NDArray[np.float64], tensor: int, expert: int
) -> NDArray[np.float64]:
    """A layer of experts: those hit are read; each computes whole tiles; the fullest of the
    groups is waited for.
    """
    chosen = rows * model.active
    hit = model.experts * (1.0 - (1.0 - model.active / model.experts) ** rows)
    tiles = np.maximum(
        chosen / hit, TILE / 4
    )  # grouped products use tiles of 16 rows where an expert has few
    group = chosen / expert
    crowd = (
        1.0
        if expert == 1
        else 1.0 + math.sqrt(2 * math.log(expert)) / np.sqrt(np.maximum(group, 1.0))
    )
    share = model.ffn_weights / tensor
    compute = 2 * share * hit * tiles * crowd / (machine.flops * machine.compute_share)
    return np.maximum(compute, share * hit * BYTES / (machine.bandwidth * machine.memory_share))


def _reduce(
    machine: Hardware, rows: NDArray[np.float64], hidden: int, tensor: int
) -> NDArray[np.float64]:
    """An all-reduce of the rows' residual stream."""
    if tensor == 1:
        return np.zeros_like(rows)
    return machine.hop + rows * hidden * BYTES * 2 * (tensor - 1) / tensor / machine.link
