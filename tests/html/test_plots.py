"""Plots, colours and words."""

import math
import re
from importlib import resources
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import plots, svg, words
from qgraph.report import Budget, Candidate

INF = math.inf


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), max_size=12))
def test_front_is_what_no_other_beats(points):
    def beats(one, other):
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    best = [points[position] for position in plots.front(points)]
    assert set(best) == {point for point in points if not any(beats(other, point) for other in points)}
    assert all(one[0] < other[0] and one[1] < other[1] for one, other in pairwise(best))


@pytest.mark.parametrize("losses", [(0.0, 1e-5, 3.0), (1e-4, 2e-4, 3e-4), (-30.0, -20.0, 0.0), (0.0, 0.0, 0.0)])
def test_losses_of_any_range_can_be_drawn(losses):
    found = [Candidate(f"c{k}", {}, loss, None, {"4": 1.0 + k}, None, "within") for k, loss in enumerate(losses)]
    for budget in (None, Budget("m", losses[1], "b"), Budget("m", INF, "b")):
        drawn = plots.tradeoff(budget, found)
        assert drawn is not None
        assert drawn.count("</title>") == 2 * len(losses)
        assert ("budget</text>" in drawn) == (budget is not None and math.isfinite(budget.limit))


def test_plots_take_their_colours_from_the_page(text):
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert drawn.count("var(--main)") >= 8
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    assert "font-family" not in drawn


def themes():
    """Light, dark and printed: variable -> colour."""
    css = (resources.files("qgraph") / "templates" / "report.css").read_text()
    return [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]


def luminance(colour):
    """Relative luminance, WCAG 2.1."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_theme_has_every_colour_and_can_be_read():
    found = themes()
    assert len(found) == 3
    assert {name: found[0][name] for name in svg.COLOURS} == svg.COLOURS
    for theme, under, over in product(found, ("paper", "panel"), ("ink", "quiet", "main", "warn", "good", "other")):
        low, high = sorted((luminance(theme[under]), luminance(theme[over])))
        # Text needs 4.5, a mark 3.
        assert (high + 0.05) / (low + 0.05) >= (3.0 if over == "other" else 4.5), (under, over)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(999), "999 B"),
        (words.size(14_216_192), "14.2 MB"),
        (words.size(3 * 10**9), "3.00 GB"),
        (words.milliseconds(0.00338), "3.38 ms"),
        (words.milliseconds(1.4504), "1.45 s"),
        (words.decibels(INF), "identical"),
        (words.decibels(15.45), "15.4 dB"),
        (words.times(0.5), "0.50x slower"),
    ],
)
def test_words(said, expected):
    assert said == expected
