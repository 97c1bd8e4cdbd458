"""Tools for the unit tests of policies: a kit that finds what is wrong with a plan, replay of real drafts, and toy models."""

from echo.testing.kit import PlanError, check_plan, check_scheduler, check_step
from echo.testing.rehearsal import RecordedGraphs
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
