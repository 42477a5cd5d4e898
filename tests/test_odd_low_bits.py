"""Low bits on odd models: what was once wrong stays mended."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import NothingQuantizedError, OptionError, QuantizationError

QUICK = {"bench_seconds": 0.0}


def product(kit, weight, kind="float"):
    inner, columns = weight.shape
    text = f"g ({kind}[n, {inner}] x) => ({kind}[n, {columns}] y) {{ y = MatMul (x, W) }}"
    return kit.text(text, W=weight)


def test_a_scheme_asked_for_by_name_that_nothing_can_have_is_told(model_kit):
    """Not a float model that looks like success; it says why."""
    model = product(model_kit, model_kit.normal(64, 16).astype(np.float64), "double")
    with pytest.raises(NothingQuantizedError, match="scheme 'int4', nothing"):
        qgraph.optimize(model, scheme="int4", **QUICK)
    found = qgraph.optimize(model, scheme="int4", force=True, **QUICK)
    assert any("'int4' quantizes nothing here" in note for note in found.report.notes)
    assert any("computes in double" in str(node.reason) for node in found.report.refused)


def test_a_weight_that_is_not_finite_is_named(model_kit):
    weight = model_kit.normal(256, 16)
    weight[3, 3] = np.inf
    samples = [{"x": model_kit.normal(4, 256, seed=i)} for i in range(4)]
    model = product(model_kit, weight)
    for data in (None, samples):
        with pytest.raises(QuantizationError, match=r"Weight 'W' .*finite|MatMul: its weight holds NaN or infinity"):
            qgraph.optimize(model, data=data, scheme="int4", **QUICK)


def test_weights_that_end_at_the_threshold_of_external_data(model_kit, tmp_path):
    """Those of exactly 1024 bytes were mapped while the file was written."""
    model = model_kit.text(
        "g (float[n, 256] x) => (float[n, 256] y) { y = Gemm (x, W, b) }",
        W=model_kit.normal(256, 256),
        b=model_kit.normal(256),
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    for scheme in ("int4", "int8-weights"):
        found = qgraph.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, force=True, **QUICK)
        assert [node.op_type for node in found.model.graph] == ["MatMulNBits"]


def test_packed_files_have_shapes_that_onnx_can_infer(model_kit, tmp_path):
    weight = np.sign(model_kit.normal(256, 64)).astype(np.float32) * 0.1
    weight[::3] = 0
    qgraph.optimize(product(model_kit, weight), tmp_path / "o.onnx", scheme="int4", pack=True, force=True, **QUICK)
    packed = onnx.load(tmp_path / "o.onnx")
    assert len(packed.graph.node) > 1, "there is something to unpack"
    onnx.shape_inference.infer_shapes(packed, strict_mode=True)
    again = qgraph.optimize(product(model_kit, weight), scheme="int4", pack=True, check="parts")
    assert any("1 of its 1 quantized nodes" in note for note in again.report.notes)


def test_parts_of_halves_are_checked_in_halves(model_kit):
    found = qgraph.optimize(product(model_kit, model_kit.normal(128, 64)), target="cuda", scheme="int4", check="parts")
    ((one,),) = [found.report.sensitivity]
    assert 0 < one.noise < 0.05


def test_no_budget_no_choice_of_the_fewest_bits(model_kit):
    with pytest.raises(OptionError, match="say which bits"):
        qgraph.optimize(product(model_kit, model_kit.normal(128, 64)), scheme="weights", check="parts")


def test_layers_without_a_code_learned_are_told(model_kit):
    samples = [{"x": model_kit.normal(4, 256, seed=i)} for i in range(8)]
    model = product(model_kit, model_kit.normal(256, 64))
    late = qgraph.optimize(model, data=samples, scheme="int4", time_limit=0.0, force=True, **QUICK)
    assert any("time limit was reached before the codes of 1 weights" in note for note in late.report.notes)
    good = qgraph.optimize(model, data=samples, scheme="int4", force=True, **QUICK)
    assert not any("time limit" in note for note in good.report.notes)


def test_what_was_in_halves_before_stays_so(model_kit):
    model = model_kit.text(
        "g (float[n, 64] x) => (float[n, 64] y, float16[n, 64] h) { h = Cast <to = 10> (x) y = MatMul (x, W) }",
        W=model_kit.normal(64, 64),
    )
    samples = [{"x": model_kit.normal(4, 64, seed=i)} for i in range(4)]
    found = qgraph.optimize(model, data=samples, target="cuda", scheme="fp16", force=True, **QUICK)
    assert [value.dtype for value in found.model.graph.outputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT16]


def test_bodies_of_what_stays_in_float_meet_it_in_float(model_kit):
    """The If reaches beyond float16, so it stays; its branches hold products that do not."""
    model = model_kit.text(
        """g (bool c, float[4, 64] x) => (float[4, 64] z, float[4, 64] y) {
            z = If (c) <
                then_branch = t () => (float[4, 64] a) { b = MatMul (x, W) a = Mul (b, big) },
                else_branch = e () => (float[4, 64] d) { d = MatMul (x, W) }
            >
            y = MatMul (x, W)
        }""",
        W=model_kit.normal(64, 64),
        big=np.array(30000.0, np.float32),
    )
    samples = [{"c": np.array(True), "x": model_kit.normal(4, 64, seed=i)} for i in range(4)]
    found = qgraph.optimize(model, data=samples, target="cuda", scheme="fp16", force=True, **QUICK)
    assert found.report.fidelity.worst.sqnr > 40
