"""Testing of policies: invariants of every plan, exact replay of recorded drafts, toy models."""

from echo.testing.check import PlanError, check_scheduler, check_step
from echo.testing.graphs import RecordedGraphs
from echo.testing.invariants import RefuseSyncs, check_plan
from echo.testing.replay import Answer, Record, Report, replay
from echo.testing.scenarios import (
    Plan,
    Scenario,
    all_equal,
    burst,
    nan_storm,
    one_confident_many_doubtful,
)
from echo.testing.toy import TabularDrafter, TabularTarget, blurred, table
from echo.testing.trace import Trace, record

__all__ = [
    "Answer",
    "Plan",
    "PlanError",
    "Record",
    "RecordedGraphs",
    "RefuseSyncs",
    "Report",
    "Scenario",
    "TabularDrafter",
    "TabularTarget",
    "Trace",
    "all_equal",
    "blurred",
    "burst",
    "check_plan",
    "check_scheduler",
    "check_step",
    "nan_storm",
    "one_confident_many_doubtful",
    "record",
    "replay",
    "table",
]
