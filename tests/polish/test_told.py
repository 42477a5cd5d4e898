"""What reports and pages say, and where they may travel."""

import dataclasses
import hashlib

import markupsafe
import pytest

import qgraph
from qgraph import html, labels, words
from qgraph.deploy import deploy
from qgraph.errors import OptionError
from qgraph.plots import tradeoff
from qgraph.report import Budget, Candidate, Footprint, Report, Sensitivity
from qgraph.trials import Trial

GOOD = ("--data", "d.npz", "--bench-seconds", 0)


def test_sizes_are_told_without_timing(page, work):
    told, text = page(work)
    before, after = (work / "m.onnx").stat().st_size, (work / "o.onnx").stat().st_size
    for number in (before, after):
        assert words.size(number) in told and words.size(number).replace(" ", "\xa0") in text
    assert words.smaller(before, after) in told
    assert '<h2 id="cost">Size</h2>' in text and "resident, to load and run" not in text
    assert " speed " not in told.split("nodes quantized")[0], "no column where nothing was timed"


def test_sizes_are_told_where_only_parts_are_checked(net, work):
    report = qgraph.optimize("m.onnx", "p.onnx", scheme="int8-dynamic", check="none", choices={"Gemm": "int8-dynamic"})
    assert report.report.after == Footprint((work / "p.onnx").stat().st_size)


def test_a_file_that_grew_is_not_called_smaller():
    assert words.smaller(300, 100) == "3.00x smaller" and words.smaller(100, 250) == "2.50x larger"
    assert words.milliseconds(2.5e-7) == "0.25 us" and words.milliseconds(2.5e-4) == "0.25 ms"


def budgets():
    candidates = [
        Candidate("fastest, none", {"int8": 2}, 2e-4, 37.0, {"1": 2.0}, 100, "chosen"),
        Candidate("mixed 3, learned", {"int8": 1}, 2e-5, 47.0, {"1": 1.5}, 200, "within"),
        Candidate("fp32", {}, 0.0, float("inf"), {"1": 1.0}, 300, "within"),
    ]
    return candidates, Budget("sqnr", 10**-3.5, "SQNR at least 35 dB"), Budget("cosine", 0.01, "at most 1 %")


def test_a_budget_in_decibels_is_told_in_decibels():
    candidates, decibels, shares = budgets()
    assert decibels.decibels == pytest.approx(35) and shares.decibels is None
    report = Report("m.onnx", "t", "int8", "r", budget=decibels, candidates=candidates)
    text = html.render(report)
    assert "it has 37.0 dB" in text and ">loss<" not in text and "0.0002" not in text
    assert ">loss<" in html.render(dataclasses.replace(report, budget=shares))
    drawn = tradeoff(decibels, candidates)
    assert "37.0 dB, chosen" in drawn and ">SQNR<" in drawn and ">loss<" not in drawn
    trial = Trial("mixed 1", {"a": "int8"}, 2e-4, 0.7, 37.0, 0.0)
    assert trial.words("sqnr") == "mixed 1 has 37.0 dB" and "0.0002 of cosine" in trial.words("cosine")


def test_names_of_candidates_are_explained_in_the_page():
    candidates, _, shares = budgets()
    told = dict(labels.candidates(one.name for one in candidates))
    assert set(told) == {"fp32", "fastest", "none", "mixed", "learned"}
    text = html.render(Report("m.onnx", "t", "int8", "r", budget=shares, candidates=candidates))
    assert all(f"<dt>{name}</dt><dd>{markupsafe.escape(what)}</dd>" in text for name, what in told.items())
    every = ["4.5 bits", "all layers, folded", "fastest, explicit", "mixed 1 (2)"]
    assert {"bits", "all layers", "folded", "explicit", "(2)"} <= set(dict(labels.candidates(every)))


def test_kernels_are_named_once():
    assert labels.kernel("Conv", "Conv (fp16)") == "Conv (fp16)"
    assert labels.kernel("Conv", "QLinearConv") == "Conv as QLinearConv" and labels.kernel("Conv", "Conv") == "Conv"


def test_a_page_without_times_has_no_column_for_them():
    found = [Sensitivity("a", "Conv", "int8", 1e-3, True, None)]
    text = html.render(Report("m.onnx", "t", "int8", "r", sensitivity=found))
    assert ">saves<" not in text and "an order of preference" in text
    assert ">saves<" in html.render(
        Report("m.onnx", "t", "int8", "r", sensitivity=[dataclasses.replace(found[0], saved=1e-3)])
    )


@pytest.mark.parametrize("name", ["r.json", "r.html"])
def test_a_report_travels_with_its_own_model_only(run, work, model_kit, name):
    assert run("optimize", "m.onnx", "o.onnx", *GOOD, "--report", name)[0] == 0
    assert hashlib.sha256((work / "o.onnx").read_bytes()).hexdigest() in (work / name).read_text()
    deploy("o.onnx", "good", report=name)
    assert (work / "good" / f"report{name[1:]}").read_bytes() == (work / name).read_bytes()
    with pytest.raises(OptionError, match=r"report of another model, or of m\.onnx before it was changed"):
        deploy("m.onnx", "bad", report=name)


@pytest.mark.parametrize("text", [b"hello", b"[1]", b'{"sha256": 3}', b"{}", b"\xff\x00\xfe", b"<html></html>"])
def test_what_is_no_report_does_not_travel(work, text):
    (work / "r.json").write_bytes(text)
    with pytest.raises(OptionError, match=r"'r\.json' is no report of an optimization.*--report"):
        deploy("m.onnx", "bad", report="r.json")
    assert not (work / "bad").exists()


@pytest.mark.parametrize(
    ("content", "words_of"),
    [(None, "No such file"), (b"nonsense", "no JSON"), (b"\xff\xfe\x00", "no JSON"), (b"[1]", "not written by a kit")],
)
def test_results_of_a_kit_that_are_none(run, work, content, words_of):
    if content is not None:
        (work / "r.json").write_bytes(content)
    code, told = run("profile", "--import", "r.json", "--target", "phone")
    assert code == 1 and "'r.json'" in told and words_of in told and "qgraph profile --export" in told
    assert "Errno" not in told and "char 0" not in told
