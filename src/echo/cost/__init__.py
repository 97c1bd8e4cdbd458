"""Cost of a step: tokens, requests and context of a forward pass -> seconds; drafting."""

from echo.cost.fit import Knee, line
from echo.cost.model import CostModel
from echo.cost.profiling import profile

__all__ = ["CostModel", "Knee", "line", "profile"]
