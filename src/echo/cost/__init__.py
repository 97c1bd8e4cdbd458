"""What a step costs: rows, requests and context of the target's forward pass -> seconds; drafting, and coming back to it."""

from echo.cost.fit import Knee, line
from echo.cost.model import CostModel
from echo.cost.profiling import profile

__all__ = ["CostModel", "Knee", "line", "profile"]
