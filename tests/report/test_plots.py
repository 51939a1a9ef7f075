"""Figures that a strict page can hold, whose numbers are also said."""

import re
from itertools import chain
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from quietstar.evaluation import HeldOutNll, gain_by_difficulty
from quietstar.report import plots

HISTORY = [{"step": step, "base_nll": 3.0, "talk_nll_0": 3 - step / 100, "loss": 1.0} for step in (10, 20, 30)]


def deciles():
    base = torch.arange(40.0).view(2, 20)
    mixed = base - torch.linspace(-1, 2, 40).view(2, 20)
    nll = HeldOutNll(base, mixed, mixed, 0 * mixed, torch.zeros(2, 1, 21, 2))
    return plots.deciles(gain_by_difficulty(nll, base), "note")


FIGURES = {
    "deciles": (deciles, "easiest tenth to the hardest: −0.885, −0.577"),
    "staircase": (
        lambda: plots.staircase([0, 1, 2], [-0.5, 4.5, 99], [float("nan"), 0.2, 0.1], "right (%)", 2, "note"),
        "0 tokens: −0.5, 1 tokens: 4.5, 2 tokens: 99",
    ),
    "weights": (
        lambda: plots.weights(np.append(np.linspace(0, 2, 101), np.nan), "note"),
        "a tenth of the tokens below 0.20, half below 1.00, nine tenths below 1.80",
    ),
    "curves": (
        lambda: plots.curves(HISTORY, "note"),
        "Without thoughts 3.000 at step 10 and 3.000 at step 30; after a thought 2.900 and 2.700.",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_shows_and_needs_nothing(name):
    make, words = FIGURES[name]
    figure = make()
    root = ElementTree.fromstring(figure.svg)
    title, description = list(root)[:2]
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"].split() == [title.attrib["id"], description.attrib["id"]]
    assert title.text == figure.title
    assert words in description.text
    assert not {"width", "height"} & root.attrib.keys()  # as wide as the page has room
    attributes = {key for element in root.iter() for key in element.attrib}
    assert not {key for key in attributes if key == "style" or key.startswith(("on", "{"))}
    assert not [element for element in root.iter() if element.tag in ("style", "script", "image", "metadata")]
    assert not re.search(r"#[0-9a-fA-F]{6}|https?:", figure.svg)  # colours are the page's
    assert "var(--ink)" in figure.svg


def test_names_within_figures_are_apart():
    names = [re.findall(r' id="([^"]*)"', make().svg) for make, _ in FIGURES.values()]
    together = list(chain(*names))
    assert len(together) == len(set(together))
    for (make, _), own in zip(FIGURES.values(), names, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', make().svg)) <= set(own)


def test_bars_are_as_high_as_the_numbers():
    svg = plots.staircase([0, 1], [10.0, 30.0], [0.0, 0.0], "right (%)", 1, "").svg
    heights = {}
    for path, colour in re.findall(r'<path d="([^"]*)"[^>]* fill="var\(--(\w+)\)"', svg):
        points = re.findall(r"[\d.]+ ([\d.]+)", path)
        heights[colour] = max(map(float, points)) - min(map(float, points))
    assert heights["thought"] == pytest.approx(3 * heights["faint"], rel=1e-3)


@pytest.mark.parametrize("history", [[], HISTORY[:1], [{"step": 1, "loss": 2.0}] * 5])
def test_without_logs_there_are_no_curves(history):
    assert plots.curves(history, "") is None
