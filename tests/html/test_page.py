"""What a page says of a report, section by section, and what it leaves out."""

import dataclasses
import math

import pytest

from qgraph import html
from qgraph.report import Report

NAN = math.nan
NONE = "\N{EN DASH}"
EMPTY = Report("model.onnx", "cpu", "int8", "onnxruntime 1.2")


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
def test_verdict(parsed, full, loss, mark, start):
    chosen = dataclasses.replace(full.candidates[2], loss=loss, speed={})
    report = dataclasses.replace(EMPTY, budget=full.budget, candidates=[chosen])
    (words,) = parsed(html.render(report)).all("p", **{"class": f"verdict {mark}"})
    assert words.startswith(start)
    assert "cosine >= 0.99" in words


def test_verdict_where_nothing_was_chosen(parsed, full):
    report = dataclasses.replace(EMPTY, budget=full.budget)
    assert parsed(html.render(report)).all("p", **{"class": "verdict "}) == ["Budget: cosine >= 0.99"]
    report.candidates = [full.candidates[3]]
    expected = "✗ No candidate is faster and within the budget: cosine >= 0.99"
    assert parsed(html.render(report)).all("p", **{"class": "verdict warn"}) == [expected]


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
    assert "selected has shapes (1, 3) and (1, 4)" in page.all("p")
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


def test_on_the_target(parsed, full):
    page = parsed(html.render(full))
    assert "99.9 % of the multiplications, numbers are right" in page.all("dd")
    assert page.rows("provider")[1:] == [["FarExecutionProvider", "9"], ["CPUExecutionProvider", "1"]]
    assert "/flat Flatten CPUExecutionProvider" in page.all("li")
    wrong = dataclasses.replace(full, placement=dataclasses.replace(full.placement, error=3.3))
    page = parsed(html.render(wrong))
    assert "99.9 % of the multiplications, numbers are WRONG" in page.all("dd")
    assert "90 % of the nodes" in page.all("dd", **{"class": "big warn-text"})


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


def test_sections_in_their_order(anchors, page):
    assert anchors(page) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_there_if_and_only_if_its_data_is(parsed, anchors, full, section):
    data = {field: getattr(full, field) for field in SECTIONS[section]}
    assert anchors(parsed(html.render(dataclasses.replace(EMPTY, **data)))) == [section]


def test_empty_report(parsed, anchors):
    page = parsed(html.render(EMPTY))
    assert anchors(page) == []
    assert page.all("h1") == ["model.onnx"]
    assert not [tag for tag, _, _ in page.elements if tag in ("nav", "dl", "table", "svg", "ul")]


@pytest.mark.parametrize("field", ["source", "output"])
def test_a_name_without_a_last_part(parsed, field):
    report = dataclasses.replace(EMPTY, **{"source": "", field: "/"})
    assert parsed(html.render(report)).all("h1") == ["qgraph"]
