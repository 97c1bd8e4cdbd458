"""ECHO: composable primitives for elastic speculative decoding."""

from echo.budget import (
    ElasticBudgetScheduler,
    GlobalRank,
    History,
    PerRequest,
    Rule,
    Tier,
    TwoLevel,
)
from echo.cost import CostModel, Knee, profile
from echo.decode import (
    Drafter,
    Seconds,
    Step,
    Target,
    accept,
    decode,
    draft_labels,
    speculate,
    warmup_log,
)
from echo.errors import EchoError
from echo.gating import (
    BeamMassGate,
    Calibration,
    ConfidenceHistograms,
    DriftMonitor,
    ExploringGate,
    Gate,
    LiveHistograms,
    SparseGate,
    calibrate,
)
from echo.logs import WarmupLog
from echo.lookup import PromptLookup
from echo.stats import StepCounts, StepStats
from echo.tree import (
    Accepted,
    Compaction,
    Frontier,
    PackedTree,
    Status,
    SuperTree,
    Template,
    compact,
    layouts,
)
from echo.workspace import Graphs, Workspace

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "BeamMassGate",
    "Calibration",
    "Compaction",
    "ConfidenceHistograms",
    "CostModel",
    "Drafter",
    "DriftMonitor",
    "EchoError",
    "ElasticBudgetScheduler",
    "ExploringGate",
    "Frontier",
    "Gate",
    "GlobalRank",
    "Graphs",
    "History",
    "Knee",
    "LiveHistograms",
    "PackedTree",
    "PerRequest",
    "PromptLookup",
    "Rule",
    "Seconds",
    "SparseGate",
    "Status",
    "Step",
    "StepCounts",
    "StepStats",
    "SuperTree",
    "Target",
    "Template",
    "Tier",
    "TwoLevel",
    "WarmupLog",
    "Workspace",
    "accept",
    "calibrate",
    "compact",
    "decode",
    "draft_labels",
    "layouts",
    "profile",
    "speculate",
    "warmup_log",
]
