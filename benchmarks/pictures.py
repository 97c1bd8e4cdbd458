"""Draws the benchmarks' pictures again from their results, all in one look (``echo.style``): ``python benchmarks/pictures.py``."""

from __future__ import annotations

import json
from pathlib import Path

import echo
import gaps_picture
import paper
import plan
import real_data_picture
import replay
import service

RESULTS = Path(__file__).parent / "results"
IMAGES = RESULTS.parents[1] / "docs" / "images"


def main() -> None:
    """Draws."""
    found = {
        name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("gaps", "paper", "plan", "real_data", "replay", "service")
    }
    echo.CostModel.from_json((RESULTS / "cost.json").read_text()).plot().savefig(IMAGES / "cost.png", dpi=150)
    gaps_picture.draw(found["gaps"], IMAGES)
    paper.draw(found["paper"]["cells"], RESULTS / "paper.png")
    plan.plot(found["plan"]["growth"], RESULTS / "plan.png")
    real_data_picture.draw(found["real_data"], IMAGES)
    replay.draw(found["replay"]["cells"], RESULTS / "replay.png")
    service.draw(found["service"], RESULTS / "service.png")


if __name__ == "__main__":
    main()
