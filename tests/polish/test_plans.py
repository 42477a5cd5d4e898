"""What is planned, for which target: crossings, bodies, borrowed kernels, costs that are no times."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.to_half import ToHalf

from qgraph import outcome, registry
from qgraph.audit import Audit
from qgraph.targets.openvino import openvino
from qgraph.targets.qnn import qnn
from qgraph.targets.webgpu import webgpu

GOOD = ("--data", "d.npz", "--bench-seconds", 0)
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


@pytest.mark.parametrize(("target", "scheme"), [("x86-vnni", "int8"), ("webgpu", "auto"), ("coreml", "auto")])
def test_inspect_takes_a_scheme_that_the_target_has(run, work, target, scheme):
    np.savez("one.npz", x=np.zeros((1, 16), np.float32))
    code, told = run("inspect", "m.onnx", "--target", target, "--data", "one.npz")
    assert code == 0 and f"planned for target {target}, scheme {scheme}" in told


def test_inspect_says_what_is_in_a_body(model_kit, run, tmp_path):
    ir.save(model_kit.text(IF, A=model_kit.normal(16, 32), B=model_kit.normal(32, 4)), tmp_path / "if.onnx")
    code, told = run("inspect", tmp_path / "if.onnx", "--nodes")
    assert code == 0 and "not looked at" not in told and "inside a body of If, Loop or Scan" in told


@pytest.mark.parametrize("target", ["qnn", "nnapi", "coreml", "tensorrt"])
def test_bits_per_weight_where_there_are_no_blocks(run, work, target):
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


def test_costs_that_are_no_times_are_not_told_as_times(run, net, work, model_kit):
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


def test_reasons_are_told_where_no_weight_has_a_kernel(run, work):
    for asked in (("--scheme", "int2"), ("--bits-per-weight", 3)):
        code, told = run("optimize", "m.onnx", "o.onnx", *GOOD, *asked)
        assert code == 1 and "its 16 rows are less than one block of 128" in told, asked
    assert not (work / "o.onnx").exists()
