"""Tools for the unit tests of policies: invariants of a plan, and toy models with exact probabilities."""

from echo.testing.invariants import check_plan
from echo.testing.replay import Answer, Record, Report, replay
from echo.testing.toy import TabularDrafter, TabularTarget, blurred, table
from echo.testing.trace import Trace, record

__all__ = ["Answer", "Record", "Report", "TabularDrafter", "TabularTarget", "Trace", "blurred", "check_plan", "record", "replay", "table"]
