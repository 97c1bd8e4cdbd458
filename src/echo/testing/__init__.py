"""Tools for the unit tests of policies: invariants of a plan, and toy models with exact probabilities."""

from echo.testing.invariants import check_plan
from echo.testing.toy import TabularDrafter, TabularTarget, blurred, table

__all__ = ["TabularDrafter", "TabularTarget", "blurred", "check_plan", "table"]
