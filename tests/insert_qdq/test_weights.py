"""Weights and biases are integers on disk, shared ones once."""

import numpy as np
import onnx_ir as ir
import pytest

Q, DQ = "QuantizeLinear", "DequantizeLinear"
CONV = "Conv <pads = [1, 1, 1, 1]>"


def weights(model):
    """Initializers with more than one dimension, or 16 elements."""
    return {k: v.const_value for k, v in model.graph.initializers.items() if v.const_value.size >= 16}


def test_weights_are_integers_per_channel_and_the_bias_is_int32(model_kit, quantized):
    n = model_kit.normal
    weight = n(4, 3, 3, 3) * np.array([1, 0.01, 30, 0], np.float32).reshape(4, 1, 1, 1)
    model = model_kit.text(
        f"g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{ y = {CONV} (x, W, b) }}", W=weight, b=n(4)
    )
    after = quantized(model)
    assert not [k for k, t in weights(after).items() if t.dtype == ir.DataType.FLOAT]
    conv = next(node for node in after.graph if node.op_type == "Conv")
    codes, scale, zero = (v.const_value.numpy() for v in conv.inputs[1].producer().inputs)
    assert codes.dtype == np.int8 and codes.shape == weight.shape
    assert scale.shape == (4,) and not zero.any()
    assert conv.inputs[1].producer().attributes["axis"].as_int() == 0
    np.testing.assert_array_equal(
        codes, np.clip(np.rint(weight / scale.reshape(4, 1, 1, 1)), -128, 127).astype(np.int8)
    )
    reach = np.abs(codes.reshape(4, -1).astype(int)).max(axis=1)
    assert (reach[:3] >= 127).all() and reach[3] == 0
    bias, bias_scale, bias_zero = (v.const_value.numpy() for v in conv.inputs[2].producer().inputs)
    assert bias.dtype == np.int32 and bias_zero.dtype == np.int32 and not bias_zero.any()
    x_scale = after.graph.initializers["x_scale"].const_value.numpy()
    np.testing.assert_allclose(bias_scale, x_scale * scale, rtol=1e-6)


@pytest.mark.parametrize("transposed, axis", [(0, 1), (1, 0)])
def test_gemm(model_kit, quantized, transposed, axis):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[4, 16] x) => (float[4, 8] y) {{ y = Gemm <transB = {transposed}> (x, W, b) }}",
        W=n(8, 16) if transposed else n(16, 8),
        b=n(8),
    )
    after = quantized(model)
    assert model_kit.ops(after) == [Q, DQ, DQ, DQ, "Gemm"]
    gemm = after.graph[-1]
    assert gemm.inputs[1].producer().attributes["axis"].as_int() == axis
    assert gemm.inputs[1].producer().inputs[1].const_value.shape == (8,)


def test_matmul_writes_float(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text("g (float[4, 16] x) => (float[4, 8] y) { y = MatMul (x, W) }", W=n(16, 8))
    assert model_kit.ops(quantized(model)) == [Q, DQ, DQ, "MatMul"]


def test_a_bias_that_would_overflow_widens_the_weight(model_kit, quantized):
    model = model_kit.text(
        f"g (float[1, 3, 8, 8] x) => (float[1, 2, 8, 8] y) {{ y = {CONV} (x, W, b) }}",
        W=model_kit.normal(2, 3, 3, 3, scale=1e-9),
        b=np.array([1000, -3], np.float32),
    )
    after = quantized(model, least=40)
    conv = next(node for node in after.graph if node.op_type == "Conv")
    bias = conv.inputs[2].producer().inputs[0].const_value.numpy().astype(np.float64)
    assert np.abs(bias).max() < 2**31 - 1
    np.testing.assert_allclose(bias * conv.inputs[2].producer().inputs[1].const_value.numpy(), [1000, -3], rtol=1e-3)


def test_shared_weight_is_one_initializer(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, W)  e = Erf (h)  y = MatMul (e, W) }",
        W=n(16, 16, scale=0.3),
    )
    after = quantized(model)
    assert [(t.dtype, tuple(t.shape)) for t in weights(after).values() if t.size == 256] == [
        (ir.DataType.INT8, (16, 16))
    ]
    readers = [node for node in after.graph if node.op_type == DQ and node.inputs[0].name in weights(after)]
    assert len(readers) == 2


def test_shared_weight_with_a_float_reader_stays_for_it(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[4, 16] x, int64[4] i) => (float[4, 16] y) {
            e = Gather (W, i)
            h = MatMul (x, W)
            y = Mul (h, e)
        }""",
        W=n(16, 16),
    )
    after = quantized(model)
    assert sorted(t.dtype.name for t in weights(after).values() if t.size == 256) == ["FLOAT", "INT8"]


def test_weight_transposed_in_one_layer(model_kit, quantized):
    # One tensor, quantized along two axes: two integer tensors.
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = Gemm (x, W)  y = Gemm <transB = 1> (h, W) }",
        W=n(16, 16, scale=0.3),
    )
    after = quantized(model)
    assert sorted(t.dtype.name for t in weights(after).values() if t.size == 256) == ["INT8", "INT8"]


def test_shared_bias(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = Gemm (x, W, b)  y = Gemm (h, V, b) }",
        W=n(16, 16),
        V=n(16, 16, seed=1),
        b=n(16),
    )
    after = quantized(model)
    assert sum(t.dtype == ir.DataType.INT32 for t in weights(after).values()) >= 2


def test_grouped_and_depthwise_weights(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {
            d = Conv <pads = [1, 1, 1, 1], group = 8> (x, D)
            y = Conv <pads = [1, 1, 1, 1], group = 2> (d, G, b)
        }""",
        D=n(8, 1, 3, 3),
        G=n(8, 4, 3, 3),
        b=n(8),
    )
    quantized(model)


def test_folded_weights_are_computed_when_written(model_kit, tmp_path):
    model = model_kit.text("g (float[4, 64] x) => (float[4, 64] y) { y = MatMul (x, W) }", W=model_kit.normal(64, 64))
    ir.save(model, tmp_path / "m.onnx", external_data="w", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    after = model_kit.static(model, folder=tmp_path)
    (big,) = (v.const_value for v in after.graph.initializers.values() if v.const_value.size == 64 * 64)
    assert isinstance(big, ir.LazyTensor)
    assert big.dtype == ir.DataType.INT8 and big.nbytes == 64 * 64
    assert model_kit.sqnr(tmp_path / "m.onnx", after, model_kit.feeds(after)) > 30
