"""Cost of a step: seconds of a forward pass by tokens, requests and context; of drafting."""

from echo.cost.fit import Knee, line
from echo.cost.model import CostModel
from echo.cost.profiling import profile
from echo.cost.speculation import SpeculationProfile

__all__ = ["CostModel", "Knee", "SpeculationProfile", "line", "profile"]
