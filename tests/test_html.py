import dataclasses
import math
import re
import sys
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise, product

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import html, plots, svg, words
from qgraph.errors import ModelError, OptionError
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
NAN, INF = math.nan, math.inf
NONE = "\N{EN DASH}"
EMPTY = Report("model.onnx", "cpu", "int8", "onnxruntime 1.2")


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
            {"logits": OutputError(31.04, 0.9996, 0.25, 0.9876), "boxes": OutputError(INF, 1.0, 0.0)},
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


@pytest.fixture(scope="module")
def text():
    return html.render(filled())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_headline(page):
    assert page.all("h1") == ["digits-int8.onnx"]
    assert page.all("title")[0] == "digits-int8.onnx · qgraph"
    assert "target x86-vnni, scheme int8, onnxruntime 1.2, 27 calibration runs, 6.5 s" in page.all("p")[1]
    assert page.all("dd", **{"class": "big good-text"}) == ["2.26x faster", "90 % of the nodes"]
    assert page.all("dd", **{"class": "big warn-text"}) == ["0.94x slower"]
    # The worst output's, not the first's or the identical one's.
    assert page.all("dd", **{"class": "big"}) == ["31.0 dB", "3.64x smaller", "4 of 305"]
    assert page.all("li")[0] == "A first result ran at 0.87x."


@pytest.mark.parametrize(
    ("loss", "mark", "start"),
    [(0.0088, "good", "✓ Within"), (0.02, "warn", "✗ Beyond"), (NAN, "warn", "✗ Beyond"), (None, "", "Budget: cosine")],
)
def test_verdict(full, loss, mark, start):
    chosen = dataclasses.replace(full.candidates[2], loss=loss, speed={})
    report = dataclasses.replace(EMPTY, budget=full.budget, candidates=[chosen])
    (words,) = Page(html.render(report)).all("p", **{"class": f"verdict {mark}"})
    assert words.startswith(start)
    assert "cosine >= 0.99" in words


def test_verdict_where_nothing_was_chosen(full):
    report = dataclasses.replace(EMPTY, budget=full.budget)
    assert Page(html.render(report)).all("p", **{"class": "verdict "}) == ["Budget: cosine >= 0.99"]
    report.candidates = [full.candidates[3]]
    expected = "✗ No candidate is faster and within the budget: cosine >= 0.99"
    assert Page(html.render(report)).all("p", **{"class": "verdict warn"}) == [expected]


def test_speed_and_size(page):
    assert page.rows("cost")[1:] == [
        ["1 thread", "7.63 ms", "3.38 ms", "2.26x faster 2.20 to 2.33 in 3 measurements"],
        ["2 threads", "13.2 ms", "14.1 ms", "0.94x slower 0.90 to 1.02 in 3 measurements, within noise of 1x"],
        ["size", "14.2 MB", "3.9 MB", "3.64x smaller"],
        ["memory", "52.4 MB", "24.1 MB", "resident, to load and run"],
        ["load", "169 ms", "73.5 ms", ""],
    ]


def test_candidates_chosen_first_then_the_fastest(page):
    assert page.rows("tradeoff")[1:] == [
        ["1", "middle", "60 int8", "2.30x", "2.20x", "0.0088", "18.4 dB", "4.1 MB", "★ chosen"],
        ["2", "all", "60 int8, 3 int4", "2.40x", "2.30x", "0.0142", "16.1 dB", "3.3 MB", "✖ loses too much"],
        ["3", "safe", "40 int8", "1.50x", "1.40x", "0.002", "25.0 dB", "7.0 MB", "● within"],
        ["4", "never ran", "", NONE, NONE, NONE, NONE, NONE, "the runtime refused it"],
    ]


def test_tradeoff_plot_has_all_measured_candidates_on_hover(page):
    titles = page.all("title")[1:]
    for title in ("1. middle: 2.30x, loss 0.0088, chosen", "2. all: 2.30x, loss 0.0142, loses too much"):
        # For each of two widths.
        assert titles.count(title) == 2
    assert not [title for title in titles if "never ran" in title]
    words = next(at["aria-label"] for tag, at, _ in page.elements if tag == "svg")
    assert words == "Speed against loss (1 - cosine) of 4 candidates; middle is chosen. The budget is cosine >= 0.99."


def test_faithfulness(page):
    rows = page.rows("faithfulness")
    assert rows[1:3] == [
        ["logits", "31.0 dB", "0.999600", "0.25", "98.76 %"],
        ["boxes", "identical", "1.000000", "0", NONE],
    ]
    # The worst twelve, worst first; then all twenty in order.
    assert rows[4] == ["1", "/l/19/out", "Conv", "31.0 dB"]
    assert rows[15] == ["12", "/l/8/out", "Conv", "42.0 dB"]
    assert [row[1] for row in rows[17:]] == [f"/l/{k}/out" for k in range(20)]
    assert "not compared: selected, which has shapes (1, 3) and (1, 4)" in page.all("p")
    assert "On 5 runs, which calibration has seen; SQNR" in " ".join(page.all("p"))
    assert page.all("title").count("/l/3/out (Conv): 47.0 dB") == 2


def test_sensitivity_bars_are_as_long_as_the_noise(text, page):
    rows = [[*row[:3], *row[3:]] for row in page.rows("sensitivity")[1:]]
    assert rows == [
        ["loud Gemm", "int4", "2 %", "estimated", "0.15 ms"],
        ["", "int8", "0.4 %", "measured", "0.1 ms"],
        ["quiet Conv", "int8", "0.01 %", "estimated", "0.2 ms"],
    ]
    bars = [(at.get("class"), at["style"]) for tag, at, _ in page.elements if tag == "i" and "style" in at][:3]
    assert bars == [("estimated", "width:100.00%"), (None, "width:20.00%"), ("estimated", "width:0.50%")]


def test_histogram(page):
    (caption,) = [words for words in page.all("figcaption") if words.startswith("act")]
    # 10 of 200 values lie in bins outside of [-2, 1].
    assert caption == "act 22.0 dB, codes from -2 to 1, 5 % cut"


def test_operators(page):
    assert page.rows("operators")[1:] == [
        ["Conv", "6.1 ms", "0.4 ms", ""],
        ["QLinearConv", NONE, "2.4 ms", ""],
        ["all", "6.1 ms", "2.8 ms", ""],
    ]


def test_hundreds_of_nodes_are_a_few_lines(page):
    summaries = page.all("summary")[-4:]
    assert summaries == [
        "3Conv as QLinearConv",
        "1Flatten",
        "300the integer kernel is slower by about … us300 Softmax",
        "1no kernel1 Clip",
    ]
    assert "/soft.7 Softmax: the integer kernel is slower by about 7.5 us" in page.all("li")
    # Said once, in the heading.
    assert "clip Clip" in page.all("li")


def test_steps(page):
    assert page.rows("steps")[1:] == [
        ["FuseLayers", "25.7 ms", "-52 BatchNormalization, +3 Conv"],
        ["Annotate", "1.50 s", "no change in number"],
    ]


def test_on_the_target(full):
    page = Page(html.render(full))
    assert "99.9 % of the multiplications, numbers are right" in page.all("dd")
    assert page.rows("provider")[1:] == [["FarExecutionProvider", "9"], ["CPUExecutionProvider", "1"]]
    assert "/flat Flatten CPUExecutionProvider" in page.all("li")
    wrong = dataclasses.replace(full, placement=dataclasses.replace(full.placement, error=3.3))
    page = Page(html.render(wrong))
    assert "99.9 % of the multiplications, numbers are WRONG" in page.all("dd")
    assert "90 % of the nodes" in page.all("dd", **{"class": "big warn-text"})


# -- what it leaves out ------------------------------------------------------------------------------------------------

SECTIONS = {
    "cost": ["speed", "before", "after"],
    "tradeoff": ["candidates"],
    "provider": ["placement"],
    "faithfulness": ["fidelity"],
    "sensitivity": ["sensitivity"],
    "ranges": ["histograms"],
    "operators": ["operators"],
    "nodes": ["nodes"],
    "steps": ["steps"],
}


def anchors(page):
    """Sections, as headed and as listed at the top."""
    heads = [at["id"] for tag, at, _ in page.elements if tag == "h2"]
    assert heads == [at["href"][1:] for tag, at, _ in page.elements if tag == "a"]
    return heads


def test_sections_in_their_order(page):
    assert anchors(page) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_there_if_and_only_if_its_data_is(full, section):
    data = {field: getattr(full, field) for field in SECTIONS[section]}
    assert anchors(Page(html.render(dataclasses.replace(EMPTY, **data)))) == [section]


def test_empty_report():
    page = Page(html.render(EMPTY))
    assert anchors(page) == []
    assert page.all("h1") == ["model.onnx"]
    assert not [tag for tag, _, _ in page.elements if tag in ("nav", "dl", "table", "svg", "ul")]


@pytest.mark.parametrize("field", ["source", "output"])
def test_a_name_without_a_last_part(field):
    report = dataclasses.replace(EMPTY, **{"source": "", field: "/"})
    assert Page(html.render(report)).all("h1") == ["qgraph"]


# -- a page that is closed in itself -----------------------------------------------------------------------------------


def check_closed(page):
    """Nothing is loaded or run; every reference has its one target."""
    ids = [at["id"] for _, at, _ in page.elements if "id" in at]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action", "data", "xlink:href")
            if name in ("href", "aria-labelledby"):
                assert value.removeprefix("#") in ids
            if name in ("style", "clip-path"):
                assert all(target in ids for target in re.findall(r"url\((?!#)|url\(#(.*?)\)", value or ""))
    styles = "".join(page.all("style"))
    assert "url(" not in styles and "@import" not in styles


def test_nothing_from_elsewhere(text, page):
    check_closed(page)
    assert "http:" not in text and "https:" not in text
    policy = [at["content"] for tag, at, _ in page.elements if at.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; style=x",
    "</title></svg><b>",
    "{{ 7 * 7 }}{% raw %}",
    r"$\frac{x$ \u1234 ^_",
    "中文 \N{GRINNING FACE} \x00 \x0b",
    "https://example.org/" + "long" * 100,
    "]]> <!-- &amp; %s {0}",
    "\ud800 alone",
]


def poison(value, name):
    """A report with every text in it replaced."""
    if isinstance(value, str):
        return name
    if isinstance(value, list):
        return [poison(item, name) for item in value]
    if isinstance(value, dict):
        return {poison(key, name): poison(item, name) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {f.name: poison(getattr(value, f.name), name) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(full, name, tmp_path):
    html.save(poison(full, name), tmp_path / "out.html")
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    check_closed(page)
    assert not {tag for tag, _, _ in page.elements} & {"img", "b", "script"} - {"b"}
    expected = name.replace("\x00", "").replace("\ud800", "").split()
    shown = page.all("li")[0].replace("\x00", "").replace("\ufffd", "").split()
    assert shown == expected


# -- numbers that are none ---------------------------------------------------------------------------------------------


def spoil(value, number):
    """A report with every float in it replaced."""
    if isinstance(value, float):
        return number
    if isinstance(value, list):
        return [spoil(item, number) for item in value]
    if isinstance(value, dict):
        return {key: spoil(item, number) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: spoil(getattr(value, f.name), number) for f in dataclasses.fields(value)})
    return value


@pytest.mark.parametrize("number", [NAN, INF, -INF, 0.0, -1.0, 1e300, 5e-324])
def test_any_number(full, number):
    text = html.render(spoil(full, number))
    page = Page(text)
    check_closed(page)
    assert anchors(page) == list(SECTIONS)
    for style in re.findall(r'style="width:([^"]*)"', text):
        assert 0 <= float(style.removesuffix("%")) <= 100
    for numbers in re.findall(r' (?:d|x|y|viewBox|transform)="([^"]*)"', text):
        assert "nan" not in numbers and "inf" not in numbers


def test_what_has_no_number_is_worst(full):
    full.fidelity.layers[4] = Layer("lost", "Conv", NAN)
    full.fidelity.outputs["odd"] = OutputError(NAN, NAN, NAN)
    full.sensitivity.append(Sensitivity("unknown", "Conv", "int8", NAN, True, 1e-4))
    page = Page(html.render(full))
    assert page.rows("faithfulness")[5][1:] == ["lost", "Conv", "nan dB"]
    assert page.all("dd", **{"class": "big"})[0] == "nan dB"
    assert page.rows("sensitivity")[1][:3] == ["unknown Conv", "int8", "nan %"]


@pytest.mark.parametrize(
    "histogram",
    [
        ValueHistogram("v", [0.0, 1.0], [0], 0.0, 1.0, 9.0),
        ValueHistogram("v", [], [], 0.0, 1.0, 9.0),
        ValueHistogram("v", [1.0, 1.0], [5], 1.0, 1.0, 9.0),
        ValueHistogram("v", [0.0, INF], [5], 0.0, 1.0, 9.0),
    ],
)
def test_a_histogram_of_nothing_has_no_plot(histogram):
    page = Page(html.render(dataclasses.replace(EMPTY, histograms=[histogram])))
    assert page.all("figcaption")[-1].startswith("v 9.0 dB, codes from ")
    assert plots.histogram(histogram, 0) is None


# -- the same bytes ----------------------------------------------------------------------------------------------------


def test_same_report_same_bytes_whatever_matplotlib_is_set_to(full, text):
    with mpl.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert html.render(full) == text
        assert dict(mpl.rcParams) == before
    assert not re.search(r"\b20\d\d-\d\d-\d\d", text)


def test_fewer_than_500_kb_for_a_large_model(full):
    full.fidelity = dataclasses.replace(
        full.fidelity, layers=[Layer(f"/model/layers.{k}/out_0", "MatMul", 20 + k % 37) for k in range(1500)]
    )
    full.histograms *= 12
    text = html.render(full)
    assert len(text.encode()) < 500_000
    # A mark for each run of neighbours, in two widths.
    assert sum(title.startswith("/model/layers") for title in Page(text).all("title")) <= 2 * 240
    assert "/model/layers.37/out_0 (MatMul): 20.0 dB" in Page(text).all("title")


# -- files and libraries -----------------------------------------------------------------------------------------------


def test_save_replaces_and_leaves_nothing_beside(full, tmp_path, text):
    path = tmp_path / "out.html"
    path.write_text("old")
    html.save(full, path)
    assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ModelError, match="Cannot write the report to"):
        html.save(EMPTY, tmp_path / "nowhere" / "out.html")
    folder = tmp_path / "out.html"
    folder.mkdir()
    with pytest.raises(ModelError, match="Cannot write the report to"):
        html.save(EMPTY, folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_says_how_to_install_it(full, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    path = tmp_path / "out.html"
    path.write_text("old")
    for ask in (html.require, lambda: html.save(full, path)):
        with pytest.raises(OptionError, match=rf'needs {library}: pip install "qgraph\[report\]"'):
            ask()
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.html", True),
        ("a.HTM", True),
        ("x/a.b.Html", True),
        ("a.json", False),
        ("html", False),
        ("a.html.json", False),
    ],
)
def test_is_page(name, expected):
    assert html.is_page(name) is expected


# -- plots and colours -------------------------------------------------------------------------------------------------


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
