"""Rules, the scheduler that asks them, and per-slot history."""

from echo.budget.goodput import Tier
from echo.budget.history import History
from echo.budget.rules import GlobalRank, PerRequest, Rule, TwoLevel
from echo.budget.scheduler import ElasticBudgetScheduler

__all__ = [
    "ElasticBudgetScheduler",
    "GlobalRank",
    "History",
    "PerRequest",
    "Rule",
    "Tier",
    "TwoLevel",
]
