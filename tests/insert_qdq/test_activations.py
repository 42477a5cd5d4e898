"""Relu and Clip go where the codes clip; what the runtime would take along is shielded."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.targets import KERNEL, REASON

Q, DQ = "QuantizeLinear", "DequantizeLinear"
CONV = "Conv <pads = [1, 1, 1, 1]>"


def between(model, first, second):
    """The operators from the node called `first` to `second`, following the first consumer."""
    node = next(n for n in model.graph if n.name == first)
    found = []
    while node.name != second:
        node = node.outputs[0].consumers()[0]
        found.append(node.op_type)
    return found


def test_conv_relu_conv(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W, b)
            r = Relu (c)
            y = {CONV} (r, V)
        }}""",
        W=n(4, 3, 3, 3),
        b=n(4),
        V=n(4, 4, 3, 3),
    )
    after = quantized(model)
    assert Counter(model_kit.ops(after)) == {Q: 3, DQ: 3 + 2 + 1, "Conv": 2}
    assert between(after, "c_Conv", "y_Conv") == [Q, DQ, "Conv"]
    assert [v.name for v in after.graph.outputs] == ["y"]
    assert after.graph.outputs[0].producer().op_type == DQ
    names = {node.name for node in after.graph}
    assert {"x_QuantizeLinear", "r_QuantizeLinear", "y_QuantizeLinear"} <= names
    assert {"x_scale", "x_zero_point", "r_scale"} <= set(after.graph.initializers)
    # Equalization may have made new weights of them.
    scales = {name for name in after.graph.initializers if name.endswith("_scale")}
    assert {name.removesuffix("_scale").removesuffix("_scaled") for name in scales} >= {"W", "V"}


def test_clip_goes_where_the_codes_clip(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            r = Clip (c, zero, six)
            y = {CONV} (r, V)
        }}""",
        W=n(4, 3, 3, 3, scale=3),
        V=n(4, 4, 3, 3),
        zero=np.array(0, np.float32),
        six=np.array(6, np.float32),
    )
    after = quantized(model, observer="minmax")
    assert "Clip" not in model_kit.ops(after)
    assert after.graph.initializers["r_zero_point"].const_value.numpy() == 0


@pytest.mark.parametrize("top, shared", [(6.0, True), (30.0, False)])
def test_values_with_other_bounds_are_not_given_one_range(model_kit, quantized, top, shared):
    # With one range for both, the codes of the first would reach beyond its Clip, which then would have to stay and
    # keep its convolution in float.
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 8, 8, 8] y) {{
            c = {CONV} (x, W)
            r = Clip (c, zero, six)
            d = {CONV} (x, V)
            s = Clip (d, zero, top)
            y = Concat <axis = 1> (r, s)
        }}""",
        W=n(4, 3, 3, 3, scale=3),
        V=n(4, 3, 3, 3, scale=3, seed=1),
        zero=np.array(0, np.float32),
        six=np.array(6, np.float32),
        top=np.array(top, np.float32),
    )
    after = quantized(model, observer="minmax")
    assert "Clip" not in model_kit.ops(after)
    found = model_kit.tensors(after)
    assert (found["r_scale"] == found["s_scale"]) == shared


def test_relu_read_twice(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            r = Relu (c)
            d = {CONV} (r, V)
            e = {CONV} (r, U)
            y = Add (d, e)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
        U=n(4, 4, 3, 3, seed=1),
    )
    after = quantized(model)
    assert "Relu" not in model_kit.ops(after)
    r = next(node for node in after.graph if node.name == "r_QuantizeLinear")
    assert len(r.outputs[0].consumers()) == 2


def test_relu_that_is_an_output(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] r, float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            r = Relu (c)
            y = {CONV} (r, V)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    after = quantized(model)
    assert [v.name for v in after.graph.outputs] == ["r", "y"]
    assert "Relu" not in model_kit.ops(after)
    assert [v.type for v in after.graph.outputs] == [ir.TensorType(ir.DataType.FLOAT)] * 2


def test_relu_whose_input_is_read_too_stays(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            r = Relu (c)
            d = {CONV} (r, V)
            y = Add (c, d)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    quantized(model)


def test_relu_between_gemms(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 8] y) { h = Gemm (x, W, b)  r = Relu (h)  y = Gemm (r, V) }",
        W=n(16, 16),
        b=n(16),
        V=n(16, 8),
    )
    assert "Relu" not in model_kit.ops(quantized(model))


def test_gelu_between_products_stays_in_float(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 8] y) { h = MatMul (x, W)  e = Gelu (h)  y = MatMul (e, V) }",
        W=n(16, 16),
        V=n(16, 8),
    )
    assert between(quantized(model), "h_MatMul", "y_MatMul") == ["Gelu", Q, DQ, "MatMul"]


GREEDY = {
    "Add": "Add (c, d)",
    "AveragePool": "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)",
    "Concat": "Concat <axis = 1> (c, d)",
    "LeakyRelu": "LeakyRelu (c)",
    "MatMul": "MatMul (c, d)",
    "Mul": "Mul (c, d)",
    "ReduceMean": "ReduceMean <keepdims = 1> (c, axes)",
    "GlobalAveragePool": "GlobalAveragePool (c)",
    "Sigmoid": "Sigmoid (c)",
    "Softmax": "Softmax (c)",
    "Where": "Where (flag, c, d)",
}


@pytest.mark.parametrize("followed", [False, True], ids=["", "Relu"])
@pytest.mark.parametrize("operator", GREEDY)
def test_float_nodes_between_integers_are_shielded(model_kit, quantized, operator, followed):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x, bool flag) => (float[1, 4, h, w] y) {{
            c = {CONV} (x, W)
            d = {CONV} (x, V)
            s = {GREEDY[operator]}
            r = {"Relu" if followed else "Erf"} (s)
            y = {CONV} ({"r" if followed else "s"}, U)
        }}""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
        U=n(4, 8 if operator == "Concat" else 4, 3, 3, seed=2),
        **({"axes": np.array([2, 3])} if operator == "ReduceMean" else {}),
    )
    after = quantized(model, keep_float=(operator,))
    kept = next(node for node in after.graph if node.op_type == operator)
    assert KERNEL not in kept.meta
    sums = [node for node in after.graph if node.op_type == "Sum"]
    assert len(sums) == 1 and len(sums[0].inputs) == 1 and sums[0].meta[REASON]
    if operator == "MatMul":
        assert kept.inputs[0] is sums[0].outputs[0]
    else:
        assert sums[0].outputs[0].consumers()[0].op_type == Q


@pytest.mark.parametrize("tail", ["y = Erf (s)", "y = Neg (s)  z = Erf (c)"])
def test_float_nodes_that_are_read_in_float_need_no_shield(model_kit, quantized, tail):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{ c = {CONV} (x, W)  s = Softmax (c)  {tail} }}",
        W=n(4, 4, 3, 3),
    )
    assert "Sum" not in model_kit.ops(quantized(model))


def test_only_the_quantized_reader_gets_the_shield(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {{
            c = {CONV} (x, W)
            s = Softmax (c)
            y = {CONV} (s, V)
            z = Erf (s)
        }}""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
    )
    after = quantized(model)
    assert next(node for node in after.graph if node.op_type == "Erf").inputs[0].producer().op_type == "Softmax"


def test_without_a_target_nothing_is_shielded(model_kit):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{ c = {CONV} (x, W)  s = Softmax (c)  y = {CONV} (s, W) }}",
        W=n(4, 4, 3, 3),
    )
    target = model_kit.free()
    target.greedy_fusions = frozenset()
    assert "Sum" not in model_kit.ops(model_kit.static(model, target=target))
