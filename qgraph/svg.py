"""A figure of matplotlib's as SVG that belongs to a page: its colours, its font, words on hover, no scripts.

Names never reach matplotlib, which would take `$` for a formula and warn of letters that its font lacks: it lays out a
stand-in of the same length.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = ["COLOURS", "Sheet", "drawn", "ticks"]

# The light theme. Each colour becomes a variable of the page's style sheet, which has the dark one; the hues are those
# of Okabe and Ito, Color Universal Design (2008), darkened until text in them can be read on white.
COLOURS = {
    "ink": "#1b1f24", "quiet": "#57616c", "line": "#d5dbe1", "main": "#0068a5",
    "other": "#7d8894", "warn": "#a84300", "good": "#00735a", "paper": "#ffffff",
}  # fmt: skip
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_STYLE = {
    "axes.edgecolor": COLOURS["line"], "axes.grid": True, "axes.labelcolor": COLOURS["quiet"], "axes.labelsize": 12,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 12, "font.size": 12,
    "axes.titlecolor": COLOURS["ink"], "axes.titlelocation": "left", "axes.axisbelow": True,
    "grid.color": COLOURS["line"], "grid.linewidth": 0.7, "svg.fonttype": "none", "text.parse_math": False,
    "text.color": COLOURS["ink"], "xtick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["quiet"],
    "ytick.color": COLOURS["line"], "ytick.labelcolor": COLOURS["quiet"], "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "axes.unicode_minus": True, "lines.markersize": 6,
}  # fmt: skip
_LONGEST = 60


class Sheet:
    """A figure, and what is written into its SVG afterwards: `titles` shown on hover, and `texts` for stand-ins."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        self.titles: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}

    def marks(self, axes: Axes, x: Sequence[float], y: Sequence[float], titles: list[str], **style: Any) -> None:
        """Points with a title each."""
        if not titles:
            return
        name = f"marks{len(self.titles)}"
        self.titles[name] = titles
        axes.plot(x, y, linestyle="none", gid=name, clip_on=False, **style)

    def text(self, axes: Axes, x: float, y: float, words: str, **style: Any) -> None:
        """Words at a point, by `Axes.annotate`."""
        name = f"text{len(self.texts)}"
        self.texts[name] = words[:_LONGEST]
        axes.annotate(
            "n" * len(self.texts[name]), (x, y), gid=name, textcoords="offset points", annotation_clip=False, **style
        )

    def title(self, axes: Axes, words: str) -> None:
        """Words over a plot."""
        name, stand_in = self._stand_in(words)
        axes.set_title(stand_in, gid=name)

    def _stand_in(self, words: str) -> tuple[str, str]:
        name = f"text{len(self.texts)}"
        self.texts[name] = words[:_LONGEST]
        return name, "n" * len(self.texts[name])

    def svg(self, alternative: str, kind: str) -> str:
        """The figure as an element of a page."""
        stream = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(stream, format="svg", metadata=nothing)  # type: ignore[arg-type, unused-ignore]
        root = ET.fromstring(stream.getvalue())
        for element in root.iter():
            # In a page, elements of SVG have no namespace of their own.
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for parent in list(root.iter("defs")):
            for rule in parent.findall("style"):
                # It would hold for the whole page, which says the same.
                parent.remove(rule)
        groups = {element.get("id"): element for element in root.iter()}
        for name, titles in self.titles.items():
            _entitle(groups[name], titles)
        for name, words in self.texts.items():
            next(groups[name].iter("text")).text = words
        root.attrib = {"viewBox": root.attrib["viewBox"], "class": kind, "role": "img", "aria-label": alternative}
        return _lighten(root)


def _entitle(group: ET.Element, titles: list[str]) -> None:
    """A title for each mark; the style, which is the same for all, goes to their group."""
    marks = list(group.iter("use"))
    group.set("style", marks[0].attrib["style"])
    for path in group.iter("path"):
        # The mark's shape would keep its own.
        path.attrib.pop("style", None)
    for mark, title in zip(marks, titles, strict=True):
        del mark.attrib["style"]
        ET.SubElement(mark, "title").text = title


def _lighten(root: ET.Element) -> str:
    """Without ids that nothing refers to (they would repeat over the page), and in the page's colours."""
    used = set(re.findall(r'(?:href="|url\()#(\w+)', ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if (style := element.get("style")) is not None:
            style = re.sub(r"font(-family)?:[^;]*(;|$)", lambda found: _font(found[0]), style)
            element.set("style", re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), style))
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _font(rule: str) -> str:
    """Its size only; the page has the family."""
    found = re.search(r"([\d.]+)px", rule)
    return f"font-size: {found[1]}px;" if found else ""


def drawn(name: str, alternative: str, sizes: Mapping[str, tuple[int, int]], draw: Callable[[Sheet, str], None]) -> str:
    """What `draw` draws for each kind of page, as elements of these classes, one after the other.

    Args:
        name: tells this plot's ids from those of the page's others.
        alternative: what the plot shows, in words.
        sizes: kind of page -> width and height, pixels.
        draw: is given a sheet and the kind.
    """
    # Its stubs know each setting by name.
    settings = cast("dict[str, Any]", mpl.rcParams)
    parts: list[str] = []
    with mpl.rc_context():
        # Neither the user's settings nor the time may change a byte.
        mpl.rcdefaults()
        settings.update(_STYLE)
        for kind, (width, height) in sizes.items():
            settings["svg.hashsalt"] = f"{name} {kind}"
            sheet = Sheet(width, height)
            draw(sheet, kind)
            parts.append(sheet.svg(alternative, kind))
    return "\n".join(parts)


def ticks(words: Callable[[float], str]) -> FuncFormatter:
    """Labels of an axis from its values."""

    def label(value: float, _: int | None) -> str:
        return words(value)

    return FuncFormatter(label)
