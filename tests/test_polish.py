"""What a newcomer meets: what a page, a message and a folder say where the everyday case ends."""

import dataclasses
import hashlib
import os
import re

import click.testing
import markupsafe
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.to_half import ToHalf

import qgraph
from qgraph import html, labels, options, outcome, registry, words
from qgraph.audit import Audit
from qgraph.cli import main
from qgraph.complaints import complaint
from qgraph.deploy import deploy
from qgraph.errors import DataError, OptionError
from qgraph.plots import tradeoff
from qgraph.qconfigs import with_qconfig
from qgraph.report import Budget, Candidate, Footprint, Report, Sensitivity
from qgraph.targets.openvino import openvino
from qgraph.targets.qnn import qnn
from qgraph.targets.webgpu import webgpu
from qgraph.trials import Trial


def run(*arguments):
    found = click.testing.CliRunner().invoke(main, [str(a) for a in arguments], terminal_width=200)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


GOOD = ("--data", "d.npz", "--bench-seconds", 0)


# -- nodes that are in half precision, or cross to it ---------------------------------------------------------------

IF = """g (float[n, 16] x, bool c) => (float[n, 4] y) {
    h = MatMul (x, A)
    k = NonZero (h)
    y = If (c) <then_branch = one () => (float[n, 4] a) { a = MatMul (h, B) },
                else_branch = two () => (float[n, 4] b) { t = MatMul (h, B) b = Relu (t) }>
}"""


def test_crossings_and_bodies_of_a_graph_in_halves(model_kit):
    def nodes(**options):
        model = model_kit.text(IF, A=model_kit.normal(16, 32), B=model_kit.normal(32, 4))
        Canonicalize(17)(model)
        ToHalf(**options)(model)
        return model, {one.name: one for one in outcome.nodes(model, Audit({}, {}, {}))}

    model, found = nodes()
    inside = [node.name for node in model.graph.all_nodes() if node.graph is not model.graph]
    casts = [node.name for node in model.graph if node.op_type == "Cast"]
    assert casts and all(found[name].reason == "it was put in where float32 and fp16 meet" for name in casts)
    halved = [name for name in inside if found[name].op_type != "Cast"]
    assert len(halved) == 3 and all(found[name].scheme == "fp16" for name in halved)
    _, kept = nodes(keep={"Relu": "asked for"})
    assert [one.reason for one in kept.values() if one.op_type == "Relu"] == ["asked for"]


def test_only_what_is_in_a_body_is_said_to_be_in_one(net):
    assert {one.reason for one in outcome.nodes(net, Audit({}, {}, {}))} == {"it was put in for the kernels beside it"}


# -- what is planned, for which target ------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "scheme"), [("x86-vnni", "int8"), ("webgpu", "auto"), ("coreml", "auto")])
def test_inspect_takes_a_scheme_that_the_target_has(work, target, scheme):
    np.savez("one.npz", x=np.zeros((1, 16), np.float32))
    code, told = run("inspect", "m.onnx", "--target", target, "--data", "one.npz")
    assert code == 0 and f"planned for target {target}, scheme {scheme}" in told


def test_inspect_says_what_is_in_a_body(model_kit, tmp_path):
    ir.save(model_kit.text(IF, A=model_kit.normal(16, 32), B=model_kit.normal(32, 4)), tmp_path / "if.onnx")
    code, told = run("inspect", tmp_path / "if.onnx", "--nodes")
    assert code == 0 and "not looked at" not in told and "inside a body of If, Loop or Scan" in told


@pytest.mark.parametrize("target", ["qnn", "nnapi", "coreml", "tensorrt"])
def test_bits_per_weight_where_there_are_no_blocks(work, target):
    code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, "--target", target, "--bits-per-weight", 4)
    assert code == 1 and "--bits-per-weight choose" in told and "Its schemes are: auto, " in told
    assert "Unknown" not in told


@pytest.mark.parametrize(
    ("operator", "words_of"),
    [
        ("Conv", "OpenVINO has no convolution with quantized"),
        ("Sin", "the scheme is about weights alone"),
    ],
)
def test_a_target_that_borrows_kernels_refuses_in_its_own_name(model_kit, operator, words_of):
    weight = ", W" if operator == "Conv" else ""
    text = f"g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {{ y = {operator} (x{weight}) }}"
    model = model_kit.text(text, W=model_kit.normal(4, 4, 1, 1))
    target = openvino()
    found = target.kernel(model.graph[0], target.scheme("int4"))
    assert words_of in found.reason and "CPU" not in found.reason


def test_costs_that_are_no_times_are_not_told_as_times(net, work, model_kit):
    assert qnn().ordinal and not webgpu().ordinal
    code, told = run("sensitivity", "m.onnx", "--data", "d.npz", "--target", "qnn", "--exact", 0)
    assert code == 0 and "an order of preference" in told and not re.search(r"\d m?u?s (estimated|measured)", told)
    code, told = run("sensitivity", "m.onnx", "--data", "d.npz", "--exact", 0)
    assert code == 0 and "by the target's costs" in told and re.search(r"\d m?u?s estimated", told)


@pytest.mark.parametrize(
    ("assignment", "ordinal", "idle"),
    [
        ({}, False, True),
        ({"move": "int8"}, False, False),
        ({"move": "int8"}, True, True),
        ({"move": "int8", "layer": "int8"}, True, False),
    ],
)
def test_moving_codes_about_is_no_quantization_where_nothing_is_timed(assignment, ordinal, idle):
    target = qnn() if ordinal else registry.target("x86-vnni")
    assert outcome.idle(assignment, [("layer", "int8"), ("other", "int8")], target) is idle
    assert outcome.idle({"move": "int8"}, [], qnn()) is False, "a model without layers"


def test_reasons_are_told_where_no_weight_has_a_kernel(work):
    for asked in (("--scheme", "int2"), ("--bits-per-weight", 3)):
        code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, *asked)
        assert code == 1 and "its 16 rows are less than one block of 128" in told, asked
    assert not (work / "o.onnx").exists()


# -- reports --------------------------------------------------------------------------------------------------------


def page(work, *arguments):
    code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, "--report", "r.html", *arguments)
    assert code == 0, told
    return told, (work / "r.html").read_text()


def test_sizes_are_told_without_timing(work):
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


# -- deployment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.json", "r.html"])
def test_a_report_travels_with_its_own_model_only(work, model_kit, name):
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
def test_results_of_a_kit_that_are_none(work, content, words_of):
    if content is not None:
        (work / "r.json").write_bytes(content)
    code, told = run("profile", "--import", "r.json", "--target", "phone")
    assert code == 1 and "'r.json'" in told and words_of in told and "qgraph profile --export" in told
    assert "Errno" not in told and "char 0" not in told


# -- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "writes", "words_of"),
    [
        ((), False, "nothing was written."),
        (("--state", "s.json"), False, "nothing was measured yet that could be kept in s.json"),
        (("--state", "old.json"), False, "What was kept before is still there, in old.json."),
        (("--state", "s.json"), True, ", in s.json, from which the next run goes on"),
    ],
)
def test_an_interrupt_says_what_is_left(work, monkeypatch, arguments, writes, words_of):
    def interrupted(*_, **__):
        if writes:
            (work / "s.json").write_text("{}")
        raise KeyboardInterrupt

    (work / "old.json").write_text("{}")
    monkeypatch.setattr(qgraph, "optimize", interrupted)
    code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, *arguments)
    assert code == 1 and "Interrupted before a first candidate" in told and words_of in told


# -- what is asked for wrongly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--report", "--save-ranges", "--state", "--save-config", None])
def test_nothing_takes_the_place_of_a_device(work, option):
    os.mkfifo("pipe")
    code, told = run("optimize", "m.onnx", *(["pipe"] if option is None else ["o.onnx", option, "pipe"]), *GOOD)
    assert code == 1 and "name a plain file" in told
    assert (work / "pipe").is_fifo() and not (work / "o.onnx").exists()
    for path in ("/dev/null", "/dev/stdout"):
        with pytest.raises(OptionError, match=f"'{path}' does not allow"):
            options.refuse_overwriting({"output": path}, {})


@pytest.mark.parametrize("option", ["--state", "--save-ranges", None])
def test_nothing_is_written_over_the_weights_of_the_input(net, work, option):
    ir.save(net, "e.onnx", external_data="e.data", size_threshold_bytes=0)
    before = (work / "e.data").read_bytes()
    code, told = run("optimize", "e.onnx", *(["e.data"] if option is None else ["o.onnx", option, "e.data"]), *GOOD)
    assert code == 1 and ("holds weights of the input" in told or "state of a search" in told)
    assert (work / "e.data").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"bench_seconds": float("inf")}, {"bench_seconds": float("nan")}, {"time_limit": float("nan")}, {"memory": 0}],
)
def test_times_that_are_none(wrong):
    with pytest.raises(OptionError, match="must be positive"):
        qgraph.Options(**wrong)


def test_a_qconfig_and_an_observer_exclude_each_other():
    with pytest.raises(OptionError, match="either the qconfig or an observer"):
        qgraph.Options(qconfig="fbgemm", observer="minmax")


def test_an_error_of_the_system_is_a_message(work):
    code, told = run("optimize", "m.onnx", "a" * 300 + ".onnx", *GOOD)
    assert code == 1 and told.startswith("Error: The system cannot use 'aaa") and "Traceback" not in told


def test_words_of_the_runtime_have_no_places_in_its_source():
    place = "/onnxruntime_src/onnxruntime/core/graph/model_load_utils.h:46 void onnxruntime::f(const std::map<int>&) "
    assert complaint(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {place}Opset 99 is not known")) == (
        "Opset 99 is not known"
    )
    told = complaint(
        RuntimeError("1 : FAIL : Load model from /tmp/x/model.onnx failed:Foo(-1) is not a registered function/op")
    )
    assert told.startswith("Foo(-1) is not a registered") and "libraries of your own" in told


# -- models that are no everyday ones -------------------------------------------------------------------------------

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 16])


def saved(nodes, inputs, outputs, **weights):
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "odd.onnx")


def test_a_model_without_outputs(work):
    saved([helper.make_node("Relu", ["x"], ["y"])], [X], [])
    for command in (["optimize", "odd.onnx", "o.onnx"], ["inspect", "odd.onnx"], ["deploy", "odd.onnx", "--to", "d"]):
        code, told = run(*command)
        assert code == 1 and "'odd.onnx' has no outputs" in told


def test_a_model_whose_outputs_are_no_tensors(work):
    out = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["b", 16])
    saved([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("SequenceConstruct", ["y"], ["s"])], [X], [out])
    for command in (["optimize", "odd.onnx", "o.onnx", *GOOD], ["validate", "odd.onnx", "odd.onnx", *GOOD[:2]]):
        code, told = run(*command)
        assert code == 1 and "no output that is a tensor of numbers" in told


def test_a_model_that_takes_sequences(work):
    given = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["b", 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 16])
    saved([helper.make_node("SequenceAt", ["s", "i"], ["y"])], [given], [out], i=np.int64(0))
    for command in (["optimize", "odd.onnx", "o.onnx"], ["deploy", "odd.onnx", "--to", "d"]):
        code, told = run(*command)
        assert code == 1 and "Input 's' is not a tensor with a known type" in told


def test_a_model_that_takes_text(work):
    given = [helper.make_tensor_value_info(name, TensorProto.STRING, ["b", 3]) for name in "tu"]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])
    nodes = [helper.make_node("Equal", ["t", "u"], ["e"]), helper.make_node("Cast", ["e"], ["y"], to=1)]
    saved(nodes, given, [out])
    np.savez("text.npz", t=np.array([["a", "b", "c"]] * 6), u=np.array([["a", "x", "c"]] * 6))
    np.savez("numbers.npz", t=np.zeros((6, 3)), u=np.zeros((6, 3)))
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "text.npz")
    assert code == 0 and "identical" in told
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "numbers.npz")
    assert code == 1 and "but the model takes text" in told


def test_a_model_that_takes_nothing(work):
    saved(
        [helper.make_node("MatMul", ["A", "B"], ["y"])],
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        A=np.ones((4, 4), np.float32),
        B=np.ones((4, 4), np.float32),
    )
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "d.npz")
    assert code == 1 and "It takes no inputs: leave the data out" in told


def test_a_batch_of_no_samples(net):
    with pytest.raises(DataError, match="All outputs of the original are empty"):
        qgraph.optimize(net, data=[{"x": np.zeros((0, 16), np.float32)}], bench_seconds=0)


# -- Relu6 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [6.0, 60.0])
def test_relu6_goes_where_the_codes_end_within_it(model_kit, top):
    """Its bounds are those of the codes, or lie beyond them; what the codes reach further for, stays."""
    model = model_kit.text(
        "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { a = Conv (x, W) c = Clip (a, lo, hi) y = Conv (c, V) }",
        W=model_kit.normal(4, 4, 1, 1, scale=4.0),
        V=model_kit.normal(4, 4, 1, 1),
        lo=np.float32(0),
        hi=np.float32(top),
    )
    feeds = model_kit.feeds(model)
    done = model_kit.static(model.clone(), feeds)
    assert "Clip" not in model_kit.ops(done) and model_kit.sqnr(model, done, feeds) > 30
    quantizer = next(n for n in done.graph if n.op_type == "QuantizeLinear" and n.inputs[0].producer() is not None)
    assert quantizer.inputs[0].producer().op_type == "Conv"
    scale, zero = (value.const_value.numpy() for value in quantizer.inputs[1:])
    assert zero == 0 and 255 * float(scale) <= top + 0.51 * float(scale)


def test_relu6_stays_before_codes_that_reach_beyond_it(model_kit):
    """Codes of seven bits are written in eight, which reach twice as far: there the Clip does something."""
    model = model_kit.text(
        "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { a = Conv (x, W) c = Clip (a, lo, hi) y = Conv (c, V) }",
        W=model_kit.normal(4, 4, 1, 1, scale=4.0),
        V=model_kit.normal(4, 4, 1, 1),
        lo=np.float32(0),
        hi=np.float32(6),
    )
    feeds = model_kit.feeds(model)
    done = model_kit.static(model.clone(), feeds, with_qconfig(model_kit.free(), "fbgemm"))
    clip = next(node for node in done.graph if node.op_type == "Clip")
    quantizer = next(
        node for node in done.graph if node.op_type == "QuantizeLinear" and node.inputs[0] is clip.outputs[0]
    )
    assert 255 * float(quantizer.inputs[1].const_value.numpy()) > 6.1
