"""Pictures share one look, and say what they need."""

from __future__ import annotations

import sys

import pytest
import torch

import echo
from conftest import CALIBRATION
from echo import plot

SCHEDULER = echo.ElasticBudgetScheduler(echo.GlobalRank(1), None, 2, 1)


@pytest.mark.parametrize(
    "draw",
    [
        CALIBRATION.plot,
        echo.CostModel((1, 2), (1.0, 2.0)).plot,
        SCHEDULER.pack(SCHEDULER.begin(torch.tensor([1]))).plot,
    ],
    ids=["calibration", "cost", "packed"],
)
def test_a_plot_without_matplotlib_says_how_to_get_it(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(echo.EchoError, match=r"plot: expected matplotlib \(pip install"):
        draw()


def test_a_policy_has_one_colour_whatever_its_name_says_besides():
    families = [
        ("EAGLE", "EAGLE tree", "EAGLE tree, 8 rows each", "EAGLE-3, matched"),
        ("ECHO", "ECHO (paper)", "ECHO, the paper"),
        ("goodput", "goodput tree"),
        ("global ranking", "global top-K"),
        ("plain", "off", "oracle"),
    ]
    colours = [{plot.of(name) for name in family} for family in families]
    assert all(len(own) == 1 for own in colours)
    assert len(set().union(*colours)) == len(families)


def test_a_picture_leaves_matplotlib_as_it_was():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    CALIBRATION.plot()
    assert dict(matplotlib.rcParams) == before
