"""Gates: once a layer is scored, which requests draft deeper? B requests, M nodes a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.gating.calibration import Calibration
from echo.gating.histograms import MAX_WEIGHT
from echo.gating.thresholds import check_thresholds


class LayerStatistics(Protocol):
    """What a gate reads of a scored layer."""

    @property
    def depth(self) -> int:
        """1 for the first draft layer."""

    @property
    def score(self) -> Tensor:
        """float32 [B, M]: path log-probabilities; -inf: no candidate."""

    @property
    def drafted(self) -> Tensor:
        """bool [B]: whether the request drafted the layer."""

    @property
    def log_confidence(self) -> Tensor:
        """float32 [B]: greatest path log-probability in the layer."""

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log of the summed path probabilities of the ``beam`` best nodes."""


class Gate(Protocol):
    """A function from a layer's statistics to bool [B], or None: all requests pass, at no cost."""

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """Return bool [B], whether each request passes ``layer``; sync-free, of fixed shapes."""


@dataclass(frozen=True)
class SparseGate:
    """The paper's gate: g[i, d] = c[i, d] > tau[d] at gate depths; all requests pass elsewhere.

    Args:
        thresholds: a :class:`Calibration`, or a mapping of depth to tau in [0, 1].

    Raises:
        EchoError: a depth below 1 or a threshold outside [0, 1].

    Example:
        >>> SparseGate({1: 0.2, 4: 0.5}).depths, SparseGate.fixed(0.3, [1, 3]).depths
        ((1, 4), (1, 3))
        >>> from echo.gating import WarmupLog, calibrate
        >>> log = WarmupLog.from_arrays([1, 2, 3] * 2, [0.9] * 3 + [0.2] * 3, [1] * 3 + [0] * 3)
        >>> SparseGate(calibrate(log)).depths, SparseGate.dense(calibrate(log)).depths
        ((1, 3), (1, 2, 3))
    """

    thresholds: Calibration | Mapping[int, float]
    log_tau: dict[int, float] = field(init=False, repr=False, compare=False)
    """log tau by gate depth, rounded to float32 once here: no device takes a logarithm."""

    def __post_init__(self) -> None:
        given = self.thresholds
        taus = given.thresholds if isinstance(given, Calibration) else given
        checks.instance("thresholds", taus, Mapping)  # type: ignore[type-abstract]
        pairs = sorted(check_thresholds("thresholds", taus).items())
        logs = {d: float(np.float32(math.log(t))) if t > 0 else -math.inf for d, t in pairs}
        object.__setattr__(self, "log_tau", logs)

    @classmethod
    def dense(cls, calibration: Calibration) -> SparseGate:
        """The paper's ablation: a gate at every depth of ``calibration``, each with its tau."""
        return cls({d.depth: d.threshold for d in calibration.depths})

    @classmethod
    def fixed(cls, tau: float, depths: Sequence[int]) -> SparseGate:
        """The paper's ablation: one threshold ``tau`` in [0, 1] for all gate ``depths``."""
        return cls(dict.fromkeys(depths, tau))

    @property
    def depths(self) -> tuple[int, ...]:
        """The gate depths."""
        return tuple(self.log_tau)

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """Return bool [B] at a gate depth, None elsewhere."""
        tau = self.log_tau.get(layer.depth)
        return None if tau is None else layer.log_confidence > tau


@dataclass(frozen=True)
class BeamMassGate:
    """DDD's gate (arXiv 2409.00142): at a few depths, stop where the beam has little probability.

    Args:
        depths: gate depths; the paper's are 5, 7 and 9.
        log_tau: a request passes if the log of its beam's probability mass is above it.
        beam: number of nodes in the beam.

    Raises:
        EchoError: no depths, one below 1, or a log_tau that is not finite.

    Example:
        >>> BeamMassGate((5, 7, 9), log_tau=-1.0, beam=8).depths
        (5, 7, 9)
    """

    depths: tuple[int, ...]
    log_tau: float
    beam: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", checks.ints("depths", self.depths, 1))
        if not self.depths:
            raise EchoError("depths: expected at least one depth, got none")
        checks.real_field(self, "log_tau", -1e9, math.log(1e6))
        checks.integer_field(self, "beam", 1)

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """Return bool [B] at a gate depth, None elsewhere."""
        return layer.log_mass(self.beam) > self.log_tau if layer.depth in self.depths else None


@dataclass(frozen=True, eq=False)
class ExploringGate:
    """Open a gate to random requests, so that the resulting log calibrates without bias.

    With probability epsilon, one coin a request and step, all gates are open to it. Rows that the
    gates would have kept from verification weigh 1 / epsilon (Horvitz and Thompson 1952), all
    others 1. (One coin per gate would give epsilon^-2, ...: the same mean, far more variance.)

    It holds for one step: ``replace(scheduler, gate=ExploringGate(gate, 0.05, uniforms))`` with
    fresh uniforms, then ``step.log(weights=exploring.weights(step.tree.layers))``. What the
    *budget* keeps from verification stays missing: explore with verify tokens to spare.

    Args:
        gate: the gate to wrap; it sees the same layers as without exploring.
        epsilon: probability of exploring, from 1/1024 to 1.
        uniforms: float [B], uniform on [0, 1): the step's randomness, the same on every rank.

    Raises:
        EchoError: epsilon out of range, or uniforms of another shape or dtype.

    Example:
        >>> gate = ExploringGate(SparseGate({1: 0.5}), 0.1, torch.tensor([0.03, 0.7]))
        >>> gate.explores.tolist()
        [True, False]
        >>> from echo.tree import SuperTree
        >>> tree = SuperTree.from_paths(torch.tensor([7, 9]), [[[1], [2], [3]]] * 2)  # 1/4 each
        >>> gate.weights(tree.layers)  # of depths 0 and 1, which the inner gate closed to both
        tensor([[ 1., 10.],
                [ 1.,  0.]])
    """

    gate: Gate
    epsilon: float
    uniforms: Tensor

    def __post_init__(self) -> None:
        checks.real_field(self, "epsilon", 1.0 / MAX_WEIGHT, 1.0)
        checks.tensor("uniforms", self.uniforms, ["B"], (*checks.FLOATS, torch.float64))

    @property
    def explores(self) -> Tensor:
        """bool [B]: whether all gates are open to the request in this step."""
        return self.uniforms < self.epsilon

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """Return bool [B] where the inner gate does, None elsewhere."""
        verdict = self.gate(layer)
        return None if verdict is None else verdict | self.explores

    def weights(self, layers: Sequence[LayerStatistics]) -> Tensor:
        """Return inverse-probability weights of a finished step, float32 [B, deepest depth + 1].

        1 if the inner gate passed at this depth and all above; else 1 / epsilon if the request
        explored; else 0, not to be logged: such a layer is verified only if budget remains.

        Args:
            layers: the step's layers, ``tree.layers``; roots are skipped.
        """
        passed = torch.ones_like(self.explores)
        stopped = self.explores.float() * (1.0 / self.epsilon)
        columns = [torch.ones_like(stopped)]
        for layer in layers:
            if layer.depth < 1:
                continue
            verdict = self.gate(layer)
            passed = passed if verdict is None else passed & verdict
            columns.append(torch.where(passed, 1.0, stopped))
        return torch.stack(columns, dim=1)
