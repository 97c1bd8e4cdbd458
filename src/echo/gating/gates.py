"""Gates: after a layer is scored, may a request draft deeper?"""

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


class LayerStatistics(Protocol):
    """What a gate sees of a scored layer."""

    @property
    def depth(self) -> int:
        """1 for the first drafted layer."""

    @property
    def score(self) -> Tensor:
        """float32 [B, M]: path log-probabilities; -inf: no candidate."""

    @property
    def drafted(self) -> Tensor:
        """bool [B]: requests that drafted the layer."""

    @property
    def log_confidence(self) -> Tensor:
        """float32 [B]: greatest path log-probability of the layer."""

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log of the summed path probabilities of the ``beam`` best nodes."""


class Gate(Protocol):
    """One small class: statistics of a layer in, bool [B] out. None lets everybody pass at no cost."""

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """bool [B]: who passes after ``layer``; no read-back, no shape that depends on data."""


@dataclass(frozen=True)
class SparseGate:
    """The paper's gate: g[i, d] = c[i, d] > tau[d] at gate depths; at every other depth everybody passes.

    Args:
        thresholds: a :class:`Calibration` (its gate depths and thresholds), or tau by depth, each in [0, 1].

    Raises:
        EchoError: a depth below 1 or a threshold outside [0, 1].

    Example:
        >>> SparseGate({1: 0.2, 4: 0.5}).depths
        (1, 4)
    """

    thresholds: Calibration | Mapping[int, float]
    log_tau: dict[int, float] = field(init=False, repr=False, compare=False)
    """log tau by gate depth, rounded to float32."""

    def __post_init__(self) -> None:
        taus = (
            self.thresholds.thresholds
            if isinstance(self.thresholds, Calibration)
            else self.thresholds
        )
        checks.instance("thresholds", taus, Mapping)  # type: ignore[type-abstract]
        taus = {
            checks.integer("thresholds.depth", d, 1): checks.real(f"thresholds[{d}]", tau, 0.0, 1.0)
            for d, tau in taus.items()
        }
        # Thresholds are compared as float32 logarithms, computed once here: no device takes a logarithm.
        logs = {
            d: float(np.float32(math.log(t))) if t > 0 else -math.inf
            for d, t in sorted(taus.items())
        }
        object.__setattr__(self, "log_tau", logs)

    @classmethod
    def dense(cls, calibration: Calibration) -> SparseGate:
        """The paper's ablation: a gate at every depth of ``calibration``, each with its own threshold."""
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
        """bool [B] at a gate depth, None elsewhere."""
        tau = self.log_tau.get(layer.depth)
        return None if tau is None else layer.log_confidence > tau


@dataclass(frozen=True)
class BeamMassGate:
    """DDD's rule (arXiv 2409.00142): stop at a few depths where the beam's probability mass is small.

    Args:
        depths: where to look; the paper's are 5, 7 and 9.
        log_tau: drafting goes on while the log of the beam's mass is above.
        beam: nodes that count.

    Raises:
        EchoError: no depths, one below 1, or a log_tau that is no finite number.
    """

    depths: tuple[int, ...]
    log_tau: float
    beam: int

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "depths", tuple(checks.integer("depths", depth, 1) for depth in self.depths)
        )
        if not self.depths:
            raise EchoError("depths: expected at least one depth, got none")
        checks.real_field(self, "log_tau", -1e9, math.log(1e6))
        checks.integer_field(self, "beam", 1)

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """bool [B] at the depths, None elsewhere."""
        return layer.log_mass(self.beam) > self.log_tau if layer.depth in self.depths else None


@dataclass(frozen=True, eq=False)
class ExploringGate:
    """Another gate, that now and then lets a request run through, so that its log can be calibrated from without bias.

    One coin a request and step: with probability epsilon all gates are open to it for this step. A row that the gates would have
    kept from being seen is then in the log with probability epsilon, and weighs 1 / epsilon (Horvitz and Thompson 1952); all other rows
    weigh 1. (A coin at every gate would make weights of epsilon^-2, epsilon^-3, ...: the same mean, far more noise.)

    A value for one step: make it with fresh uniforms for each, ``replace(scheduler, gate=ExploringGate(gate, 0.05, uniforms))``, and
    log the step with ``step.log(weights=exploring.weights(step.tree.layers))``. What the *budget* keeps from being verified stays
    missing: give an exploring run rows enough.

    Args:
        gate: the gate to explore around; it sees the same layers as without exploring.
        epsilon: probability of exploring, from 1/1024 to 1.
        uniforms: float [B], independent and uniform on [0, 1): the randomness of the step. The same on every rank.

    Raises:
        EchoError: epsilon out of range, or uniforms of another shape or dtype.

    Example:
        >>> gate = ExploringGate(SparseGate({1: 0.5}), 0.1, torch.tensor([0.03, 0.7]))
        >>> gate.explores.tolist()
        [True, False]
    """

    gate: Gate
    epsilon: float
    uniforms: Tensor

    def __post_init__(self) -> None:
        checks.real_field(self, "epsilon", 1.0 / MAX_WEIGHT, 1.0)
        checks.tensor("uniforms", self.uniforms, ["B"], (*checks.FLOATS, torch.float64))

    @property
    def explores(self) -> Tensor:
        """bool [B]: who runs through all gates in this step."""
        return self.uniforms < self.epsilon

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """bool [B] where the inner gate looks, None elsewhere."""
        verdict = self.gate(layer)
        return None if verdict is None else verdict | self.explores

    def weights(self, layers: Sequence[LayerStatistics]) -> Tensor:
        """Inverse-probability weights of a finished step, float32 [B, deepest depth + 1], by request and depth.

        1 where the inner gate passed at this depth and all above, 1 / epsilon where it did not and the request explored,
        0, not to be logged, elsewhere: rows of a layer that a request was stopped at are verified only if the budget has rows left, with
        a probability that nobody knows.

        Args:
            layers: the step's layers, ``tree.layers``; roots may be among them.
        """
        passed = torch.ones_like(self.explores)
        otherwise = torch.zeros_like(self.explores, dtype=torch.float32).masked_fill_(
            self.explores, 1.0 / self.epsilon
        )
        columns = [torch.ones_like(otherwise)]
        for layer in layers:
            if layer.depth < 1:
                continue
            verdict = self.gate(layer)
            passed = passed if verdict is None else passed & verdict
            columns.append(torch.where(passed, 1.0, otherwise))
        return torch.stack(columns, dim=1)
