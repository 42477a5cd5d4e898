"""A report with something in every field, its page, and what a browser would make of a page."""

import math
from html.parser import HTMLParser

import pytest

from qgraph import html
from qgraph.placement import Left, Placement
from qgraph.report import (
    Budget,
    Candidate,
    Fidelity,
    Footprint,
    Latency,
    Layer,
    NodeReport,
    OperatorTime,
    OutputError,
    Report,
    Sensitivity,
    Speed,
    Step,
    ValueHistogram,
)

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes and texts; an error where tags do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)
        elif tag == "br":
            self.handle_data(" ")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag, **wanted):
        """Texts of the elements of a tag, with these attributes."""
        return [
            " ".join("".join(text).replace("\xa0", " ").split())
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def rows(self, heading):
        """Cells of the table's rows that stand under the <h2>, each with its text."""
        start = next(k for k, (tag, at, _) in enumerate(self.elements) if tag == "h2" and at.get("id") == heading)
        found = []
        for tag, _, text in self.elements[start + 1 :]:
            if tag == "h2":
                break
            if tag == "tr":
                found.append([])
            elif tag in ("td", "th"):
                found[-1].append(" ".join("".join(text).replace("\xa0", " ").split()))
        return found


def latency(median):
    return Latency(median, median * 0.9, median * 1.1)


@pytest.fixture
def full():
    """A report with something in every field."""
    return filled()


def filled():
    return Report(
        source="models/digits.onnx",
        target="x86-vnni",
        scheme="int8",
        runtime="onnxruntime 1.2",
        output="out/digits-int8.onnx",
        calibration_samples=27,
        seconds=6.54,
        steps=[Step("FuseLayers", 0.0257, {"BatchNormalization": -52, "Conv": 3}), Step("Annotate", 1.5, {})],
        nodes=[
            *(NodeReport(f"/conv.{k}", "Conv", kernel="QLinearConv") for k in range(3)),
            NodeReport("flat", "Flatten", kernel="Flatten"),
            *(
                NodeReport(f"/soft.{k}", "Softmax", reason=f"the integer kernel is slower by about {k}.5 us")
                for k in range(300)
            ),
            NodeReport("clip", "Clip", reason="no kernel"),
        ],
        notes=["A first result ran at 0.87x."],
        fidelity=Fidelity(
            5,
            False,
            {"logits": OutputError(31.04, 0.9996, 0.25, 0.9876), "boxes": OutputError(math.inf, 1.0, 0.0)},
            [Layer(f"/l/{k}/out", "Conv", 50.0 - k) for k in range(20)],
            {"selected": "shapes (1, 3) and (1, 4)"},
        ),
        speed=[
            Speed(1, latency(0.00763), latency(0.00338), 2.26, 2.2, 2.33, 3),
            Speed(2, latency(0.0132), latency(0.0141), 0.94, 0.9, 1.02, 3),
        ],
        before=Footprint(14_200_000, 0.169, 52_400_000),
        after=Footprint(3_900_000, 0.0735, 24_100_000),
        budget=Budget("1 - cosine", 0.01, "cosine >= 0.99"),
        candidates=[
            Candidate("safe", {"int8": 40}, 0.002, 25.0, {"1": 1.5, "2": 1.4}, 7_000_000, "within"),
            Candidate("all", {"int8": 60, "int4": 3}, 0.0142, 16.1, {"1": 2.4, "2": 2.3}, 3_300_000, "loses too much"),
            Candidate("middle", {"int8": 60}, 0.0088, 18.4, {"1": 2.3, "2": 2.2}, 4_100_000, "chosen"),
            Candidate("never ran", {}, None, None, {}, None, "the runtime refused it"),
        ],
        sensitivity=[
            Sensitivity("quiet", "Conv", "int8", 0.0001, False, 2e-4),
            Sensitivity("loud", "Gemm", "int8", 0.004, True, 1e-4),
            Sensitivity("loud", "Gemm", "int4", 0.02, False, 1.5e-4),
        ],
        histograms=[
            ValueHistogram("act", [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0], [1, 10, 100, 80, 9], -2.0, 1.0, 22.0),
        ],
        operators=[OperatorTime("Conv", 0.0061, 0.0004), OperatorTime("QLinearConv", 0.0, 0.0024)],
        placement=Placement(
            "FarExecutionProvider",
            "far 1.0",
            {"FarExecutionProvider": 9, "CPUExecutionProvider": 1},
            0.9,
            0.9987,
            [Left("/flat", "Flatten", "CPUExecutionProvider")],
            0.003,
            0.01,
            30.5,
            0.9995,
            2,
        ),
    )


@pytest.fixture(scope="session")
def text():
    """The page of that report."""
    return html.render(filled())


@pytest.fixture(scope="session")
def page(text):
    """The same, parsed."""
    return Page(text)


@pytest.fixture
def parsed():
    """Parser of any page, see `Page`."""
    return Page


@pytest.fixture
def anchors():
    """Gives the sections of a page, as headed and as listed at the top."""

    def found(page):
        heads = [at["id"] for tag, at, _ in page.elements if tag == "h2"]
        assert heads == [at["href"][1:] for tag, at, _ in page.elements if tag == "a"]
        return heads

    return found
