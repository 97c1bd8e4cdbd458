"""Gates: after a layer is scored, may a request draft deeper?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from echo import checks
from echo.errors import EchoError
from echo.gating.calibration import Calibration


class LayerStatistics(Protocol):
    """What a gate sees of a scored layer."""

    @property
    def depth(self) -> int:
        """1 for the first drafted layer."""

    @property
    def log_confidence(self) -> Tensor:
        """float32 [B]: greatest path log-probability of the layer."""

    def log_mass(self, beam: int) -> Tensor:
        """float32 [B]: log of the summed path probabilities of the ``beam`` best nodes."""


class Gate(Protocol):
    """One small class: statistics of a layer in, bool [B] out. None lets everybody pass at no cost."""

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """bool [B]: who passes; no read-back, no shape that depends on data."""


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

    def __post_init__(self) -> None:
        source = self.thresholds
        taus = source.thresholds if isinstance(source, Calibration) else dict(source)
        for depth, tau in taus.items():
            checks.integer("thresholds.depth", depth, 1)
            checks.real(f"thresholds[{depth}]", tau, 0.0, 1.0)
        # Thresholds are compared as float32 logarithms, computed once here: no device takes a logarithm.
        logs = {d: float(np.float32(math.log(t))) if t > 0 else -math.inf for d, t in sorted(taus.items())}
        object.__setattr__(self, "_log_tau", logs)

    @classmethod
    def dense(cls, calibration: Calibration) -> SparseGate:
        """The paper's ablation: a gate at every calibrated depth, each with its own threshold."""
        return cls({d.depth: d.threshold for d in calibration.depths})

    @classmethod
    def fixed(cls, tau: float, depths: Sequence[int]) -> SparseGate:
        """The paper's ablation: one threshold for all gate depths."""
        return cls(dict.fromkeys(depths, tau))

    @property
    def log_tau(self) -> dict[int, float]:
        """log tau by gate depth, rounded to float32."""
        logs: dict[int, float] = self.__dict__["_log_tau"]
        return logs

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
        if not self.depths:
            raise EchoError("depths: expected at least one depth, got none")
        for depth in self.depths:
            checks.integer("depths", depth, 1)
        checks.real("log_tau", self.log_tau, -1e9, math.log(1e6))
        checks.integer("beam", self.beam, 1)

    def __call__(self, layer: LayerStatistics, /) -> Tensor | None:
        """bool [B] at the depths, None elsewhere."""
        return layer.log_mass(self.beam) > self.log_tau if layer.depth in self.depths else None
