"""ECHO: composable primitives for elastic speculative decoding."""

from echo import kernels, testing
from echo import report as report
from echo._checks import EchoError
from echo.budget import ElasticBudgetScheduler, GlobalRank, History, PerRequest, TwoLevel
from echo.cost import CostModel
from echo.gating import BeamMassGate, Calibration, SparseGate, WarmupLog, calibrate
from echo.lookup import PromptLookup
from echo.loop import Drafter, Target, decode
from echo.stats import StepStats
from echo.tree import PackedTree, SuperTree, accept, compact, layouts
from echo.workspace import Workspace

__version__ = "0.2.0"

__all__ = [
    "BeamMassGate",
    "Calibration",
    "CostModel",
    "Drafter",
    "EchoError",
    "ElasticBudgetScheduler",
    "GlobalRank",
    "History",
    "PackedTree",
    "PerRequest",
    "PromptLookup",
    "SparseGate",
    "StepStats",
    "SuperTree",
    "Target",
    "TwoLevel",
    "WarmupLog",
    "Workspace",
    "accept",
    "calibrate",
    "compact",
    "decode",
    "kernels",
    "layouts",
    "testing",
]
