"""The audit reads the runtime's own graph: planned kernels that are not there are found, by name."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import audit
from qgraph.audit import Plan
from qgraph.errors import ExecutionError
from qgraph.targets import KERNEL


@pytest.fixture
def built(model_kit, tmp_path):
    """A quantized CNN on disk, and its plan."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W, b)
            r = Relu (c)
            t = Transpose <perm = [0, 1, 3, 2]> (r)
            d = Conv <pads = [1, 1, 1, 1]> (t, V)
            u = Reshape (d, shape)
            y = Add (u, r)
        }""",
        W=n(4, 3, 3, 3),
        b=n(4),
        V=n(4, 4, 3, 3),
        shape=[4, 8, 8],
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    model = model_kit.static(model)
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    return model, path, audit.plan_of(model)


def test_plan_of(built):
    _, _, plan = built
    assert plan.operators["/net/c"] == ("QLinearConv",)
    assert set(plan.operators) == {"/net/c", "/net/t", "/net/d", "/net/u", "/net/y"}
    assert plan.movers == {"/net/t", "/net/u"}


def test_clean(built, model_kit):
    _, path, plan = built
    found = audit.audit(path, plan, model_kit.free())
    assert found.clean and not found.problems and not found.unfused
    assert found.kernels["/net/c"] == found.kernels["/net/d"] == "QLinearConv"
    assert found.kernels["/net/y"] == "QLinearAdd"
    assert set(found.kernels) == set(plan.operators)


def test_a_layer_in_another_kernel_is_a_problem(built, model_kit):
    _, path, plan = built
    operators = {**plan.operators, "/net/c": ("QGemm",), "/net/none": ("QGemm", "Other")}
    found = audit.audit(path, Plan(operators, plan.movers), model_kit.free())
    assert not found.clean
    assert found.problems["/net/c"] == "runs as QLinearConv, expected QGemm"
    assert "no node of this name; expected QGemm or Other" in found.problems["/net/none"]


def test_a_mover_that_vanished_does_no_work(built, model_kit):
    _, path, plan = built
    found = audit.audit(
        path,
        Plan({**plan.operators, "/net/gone": ("Reshape",)}, plan.movers | {"/net/gone"}),
        model_kit.free(),
    )
    assert found.clean and found.kernels["/net/gone"] == "(no work)"


def test_an_unfused_weight_is_found_with_its_reader(built, model_kit, tmp_path):
    model, _, plan = built
    # Without the QuantizeLinear behind it, the second convolution cannot be an integer one.
    relu = ir.Node("", "Tanh", [next(n for n in model.graph if n.name == "/net/d").outputs[0]], name="tanh")
    conv = relu.inputs[0]
    for user, position in list(conv.uses()):
        if user is not relu:
            user.replace_input_with(position, relu.outputs[0])
    model.graph.insert_after(conv.producer(), relu)
    ir.save(model, tmp_path / "broken.onnx")
    found = audit.audit(tmp_path / "broken.onnx", plan, model_kit.free())
    assert not found.clean
    assert "/net/d" in found.problems
    assert found.unfused == {"V_quantized": ["/net/d"]}


def test_a_float_node_that_runs_in_integers_is_a_problem(built, model_kit):
    _, path, plan = built
    operators = {name: kinds for name, kinds in plan.operators.items() if name != "/net/y"}
    found = audit.audit(path, Plan(operators, plan.movers, floats=frozenset({"/net/y"})), model_kit.free())
    assert found.problems == {"/net/y": "was to stay in float, but runs as QLinearAdd"}


def test_constants_that_were_dequantized_before_are_nobodys_fault(model_kit, tmp_path):
    n = model_kit.normal
    codes = np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8)
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            wd = DequantizeLinear (w, ws, wz)
            r = Tanh (x)
            h = Add (r, wd_row)
            k = MatMul (h, wd)
            y = MatMul (k, V)
        }""",
        w=codes,
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        wd_row=n(8),
        V=n(8, 8),
    )
    after = model_kit.static(model)
    ir.save(after, tmp_path / "m.onnx")
    plan = audit.plan_of(after)
    assert plan.given == {"w"}
    assert audit.audit(tmp_path / "m.onnx", plan, model_kit.free()).clean
    blamed = audit.audit(tmp_path / "m.onnx", dataclasses.replace(plan, given=frozenset()), model_kit.free())
    assert list(blamed.unfused) == ["w"] and len(blamed.unfused["w"]) == 1


def test_all_readers_of_an_unfused_constant_are_listed(model_kit, tmp_path):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            wd = DequantizeLinear (w, ws)
            a = Mul (x, wd)
            b = Add (a, wd)
            y = Neg (b)
        }""",
        w=np.ones(8, np.int8),
        ws=np.array(0.01, np.float32),
    )
    for node in model.graph:
        node.name = f"/net/{node.outputs[0].name}"
    ir.save(model, tmp_path / "m.onnx")
    found = audit.audit(tmp_path / "m.onnx", Plan({}), model_kit.free())
    assert {k: sorted(set(v)) for k, v in found.unfused.items()} == {"w": ["/net/a", "/net/b"]}


def test_a_mover_on_dequantized_values_is_a_problem(built, model_kit, tmp_path):
    model, _, plan = built
    transpose = next(n for n in model.graph if n.name == "/net/t")
    # Its own quantizer gone, it moves floats.
    quantizer = transpose.outputs[0].consumers()[0]
    for reader in quantizer.outputs[0].consumers():
        reader.outputs[0].replace_all_uses_with(transpose.outputs[0])
    ir.save(model, tmp_path / "broken.onnx")
    found = audit.audit(tmp_path / "broken.onnx", plan, model_kit.free())
    assert "dequantized" in found.problems["/net/t"]


def test_a_float_model_has_no_problem_without_a_plan(model_kit, tmp_path):
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=model_kit.normal(8, 8))
    ir.save(model, tmp_path / "m.onnx")
    assert audit.audit(tmp_path / "m.onnx", Plan({}, frozenset()), model_kit.free()).clean


def test_a_model_that_does_not_load_is_an_error(model_kit, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExecutionError, match=r"m\.onnx"):
        audit.audit(tmp_path / "m.onnx", Plan({}, frozenset()), model_kit.free())


def test_a_body_whose_node_has_a_planned_name_is_not_taken_for_it(model_kit, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, bool f) => (float[2, 8] y, float[2, 8] z) {
            y = If (f) <
                then_branch = t () => (float[2, 8] a) { a = MatMul (x, W) },
                else_branch = e () => (float[2, 8] b) { b = Neg (x) }
            >
            z = MatMul (x, W)
        }""",
        W=n(8, 8),
    )
    model.graph[1].name = "same"
    model.graph[0].attributes["then_branch"].as_graph()[0].name = "same"
    after = model_kit.static(model)
    ir.save(after, tmp_path / "m.onnx")
    plan = audit.plan_of(after)
    assert len(plan.operators) == 1
    assert audit.audit(tmp_path / "m.onnx", plan, model_kit.free()).clean


def test_audit_of_a_plan_is_what_annotation_left(built):
    model, _, plan = built
    kernels = {node.name: node.meta[KERNEL] for node in model.graph if KERNEL in node.meta}
    assert {name: kernel.operators for name, kernel in kernels.items()} == dict(plan.operators)
    assert dataclasses.is_dataclass(plan)
