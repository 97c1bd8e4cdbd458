"""The scheduler, its rules, and the history by which it chooses tiers."""

from echo.budget.history import History
from echo.budget.rules import GlobalRank, PerRequest, Rule, TwoLevel
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.budget.throughput import Tier

__all__ = [
    "ElasticBudgetScheduler",
    "GlobalRank",
    "History",
    "PerRequest",
    "Rule",
    "Tier",
    "TwoLevel",
]
