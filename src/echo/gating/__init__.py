"""Calibration of warm-up logs, and gates."""

from echo.gating.calibration import Calibration, DepthCalibration, calibrate
from echo.gating.gates import BeamMassGate, Gate, LayerStatistics, SparseGate
from echo.gating.separability import Separability, separability

__all__ = [
    "BeamMassGate",
    "Calibration",
    "DepthCalibration",
    "Gate",
    "LayerStatistics",
    "Separability",
    "SparseGate",
    "calibrate",
    "separability",
]
