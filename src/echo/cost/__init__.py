"""Cost of a step: seconds of a forward pass by tokens, requests and context; of drafting."""

from echo.cost.fit import Knee, line
from echo.cost.model import CostModel
from echo.cost.profiling import SpeculationProfile, profile
from echo.cost.samples import Evidence

__all__ = ["CostModel", "Evidence", "Knee", "SpeculationProfile", "line", "profile"]
