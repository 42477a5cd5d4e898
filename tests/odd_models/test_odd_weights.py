"""Weights wherever they come from: shared, computed, of zeros, or inputs with a default."""

import numpy as np
import onnx_ir as ir
import pytest

pytestmark = pytest.mark.usefixtures("model_free_cpu")
CONV = "Conv <pads = [1, 1, 1, 1]>"


def test_weight_shared_by_two_layers_is_stored_once(model_kit, compiled):
    model = model_kit.text(
        """g (float[4, 64] x) => (float[4, 64] y) {
            h = MatMul (x, W)
            y = MatMul (h, W)
        }""",
        W=model_kit.normal(64, 64, scale=0.2),
    )
    result = compiled(model)
    big = [v for v in result.model.graph.initializers.values() if v.const_value.size == 64 * 64]
    assert [v.dtype for v in big] == [ir.DataType.INT8]


def test_weight_shared_by_an_integer_and_a_float_reader(model_kit, compiled):
    model = model_kit.text(
        """g (float[4, 64] x) => (float[4, 64] y) {
            h = MatMul (x, W)
            t = Transpose <perm = [1, 0]> (W)
            u = MatMul (h, W)
            y = Add (u, row)
        }""",
        W=model_kit.normal(64, 64, scale=0.2),
        row=model_kit.normal(64),
    )
    compiled(model)


def test_weights_in_constant_nodes(model_kit, kernels, compiled):
    model = model_kit.text(
        """g (float[4, 2] x) => (float[4, 3] y) {
            W = Constant <value = float[2, 3] {1.0, -2.0, 0.5, 0.25, 3.0, -1.0}> ()
            y = MatMul (x, W)
        }"""
    )
    assert kernels(compiled(model))


def test_weights_from_constant_of_shape(model_kit, kernels, compiled):
    model = model_kit.text(
        """g (float[4, 8] x) => (float[4, 3] y) {
            W = ConstantOfShape <value = float[1] {0.5}> (shape)
            y = MatMul (x, W)
        }""",
        shape=np.array([8, 3]),
    )
    assert kernels(compiled(model))


def test_weight_behind_transpose_or_reshape(model_kit, compiled):
    model = model_kit.text(
        """g (float[4, 8] x) => (float[4, 16] y) {
            T = Transpose <perm = [1, 0]> (W)
            y = MatMul (x, T)
        }""",
        W=model_kit.normal(16, 8),
    )
    result = compiled(model)
    assert [node.op_type for node in result.report.nodes] == ["MatMul"]


def test_weight_of_zeros_and_dead_channel(model_kit, compiled):
    weight = model_kit.normal(4, 3, 3, 3)
    weight[1] = 0
    model = model_kit.text(
        f"g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{ y = {CONV} (x, W, b) }}", W=weight, b=model_kit.normal(4)
    )
    compiled(model)


def test_bias_far_larger_than_the_products(model_kit, compiled):
    weight = model_kit.normal(4, 3, 3, 3, scale=1e-6)
    model = model_kit.text(
        f"g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{ y = {CONV} (x, W, b) }}",
        W=weight,
        b=np.array([100, -100, 50, 1], np.float32),
    )
    compiled(model, least=40)


@pytest.mark.parametrize("listed", [("W", "b"), ("W",), ("b",)], ids=["all", "weight", "bias"])
def test_initializers_that_are_also_inputs(model_kit, compiled, listed):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, V)  p = Gemm (h, W, b)  y = Relu (p) }",
        W=n(16, 16),
        b=n(16),
        V=n(16, 16, seed=2),
    )
    for name in [*listed, *(["V"] if len(listed) == 2 else [])]:
        model.graph.inputs.append(model.graph.initializers[name])
    result = compiled(model)
    gemm = next(node for node in result.report.nodes if node.op_type == "Gemm")
    if len(listed) == 2:
        assert gemm.kernel == "QGemm"
        assert [v.name for v in result.model.graph.inputs] == ["x"]
    else:
        assert "may be overridden" in gemm.reason
        assert [v.name for v in result.model.graph.inputs] == ["x", *listed]


def test_input_with_default_keeps_its_default_and_can_be_overridden(model_kit, compiled, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, V)  r = Tanh (h)  y = Add (r, shift) }",
        V=n(16, 16),
        shift=n(16),
    )
    model.graph.inputs.append(model.graph.initializers["shift"])
    compiled(model)
    feed = {"x": n(4, 16, seed=5), "shift": np.full(16, 3, np.float32)}
    found = model_kit.run(tmp_path / "out.onnx", feed)["y"]
    expected = model_kit.run(tmp_path / "in.onnx", feed)["y"]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
