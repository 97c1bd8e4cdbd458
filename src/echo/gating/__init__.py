"""Gates, and the calibration of their thresholds from warm-up logs."""

from echo.gating.calibration import Calibration, DepthCalibration, calibrate
from echo.gating.drift import DepthDrift, DriftMonitor, DriftReport
from echo.gating.gates import BeamMassGate, ExploringGate, Gate, LayerStatistics, SparseGate
from echo.gating.histograms import ConfidenceHistograms, LiveHistograms
from echo.gating.logs import WarmupLog
from echo.gating.statistics import (
    CalibrationError,
    Separability,
    calibration_error,
    look_up,
    separability,
)
from echo.gating.thresholds import GateReport, Objective, report, throughput_optimal

__all__ = [
    "BeamMassGate",
    "Calibration",
    "CalibrationError",
    "ConfidenceHistograms",
    "DepthCalibration",
    "DepthDrift",
    "DriftMonitor",
    "DriftReport",
    "ExploringGate",
    "Gate",
    "GateReport",
    "LayerStatistics",
    "LiveHistograms",
    "Objective",
    "Separability",
    "SparseGate",
    "WarmupLog",
    "calibrate",
    "calibration_error",
    "look_up",
    "report",
    "separability",
    "throughput_optimal",
]
