"""A page is closed in itself, holds any name and number, and is the same bytes again."""

import dataclasses
import math
import re

import matplotlib as mpl
import pytest

from qgraph import html, plots
from qgraph.report import Layer, OutputError, Report, Sensitivity, ValueHistogram

NAN, INF = math.nan, math.inf
EMPTY = Report("model.onnx", "cpu", "int8", "onnxruntime 1.2")


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
def test_hostile_names_stay_text(parsed, full, name, tmp_path):
    html.save(poison(full, name), tmp_path / "out.html")
    page = parsed((tmp_path / "out.html").read_text(encoding="utf-8"))
    check_closed(page)
    assert not {tag for tag, _, _ in page.elements} & {"img", "b", "script"} - {"b"}
    expected = name.replace("\x00", "").replace("\ud800", "").split()
    shown = page.all("li")[0].replace("\x00", "").replace("\ufffd", "").split()
    assert shown == expected


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
def test_any_number(parsed, anchors, full, page, number):
    text = html.render(spoil(full, number))
    spoilt = parsed(text)
    check_closed(spoilt)
    assert anchors(spoilt) == anchors(page), "all sections"
    for style in re.findall(r'style="width:([^"]*)"', text):
        assert 0 <= float(style.removesuffix("%")) <= 100
    for numbers in re.findall(r' (?:d|x|y|viewBox|transform)="([^"]*)"', text):
        assert "nan" not in numbers and "inf" not in numbers


def test_what_has_no_number_is_worst(parsed, full):
    full.fidelity.layers[4] = Layer("lost", "Conv", NAN)
    full.fidelity.outputs["odd"] = OutputError(NAN, NAN, NAN)
    full.sensitivity.append(Sensitivity("unknown", "Conv", "int8", NAN, True, 1e-4))
    page = parsed(html.render(full))
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
def test_a_histogram_of_nothing_has_no_plot(parsed, histogram):
    page = parsed(html.render(dataclasses.replace(EMPTY, histograms=[histogram])))
    assert page.all("figcaption")[-1].startswith("v 9.0 dB, codes from ")
    assert plots.histogram(histogram, 0) is None


def test_same_report_same_bytes_whatever_matplotlib_is_set_to(full, text):
    with mpl.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert html.render(full) == text
        assert dict(mpl.rcParams) == before
    assert not re.search(r"\b20\d\d-\d\d-\d\d", text)


def test_fewer_than_500_kb_for_a_large_model(parsed, full):
    full.fidelity = dataclasses.replace(
        full.fidelity, layers=[Layer(f"/model/layers.{k}/out_0", "MatMul", 20 + k % 37) for k in range(1500)]
    )
    full.histograms *= 12
    text = html.render(full)
    assert len(text.encode()) < 500_000
    # A mark for each run of neighbours, in two widths.
    assert sum(title.startswith("/model/layers") for title in parsed(text).all("title")) <= 2 * 240
    assert "/model/layers.37/out_0 (MatMul): 20.0 dB" in parsed(text).all("title")
