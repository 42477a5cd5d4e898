"""Several readers, bodies, outputs, and operators that only move codes."""

import numpy as np
import onnx_ir as ir

Q, DQ = "QuantizeLinear", "DequantizeLinear"
CONV = "Conv <pads = [1, 1, 1, 1]>"


def test_float_readers_of_an_input_keep_the_float(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 16] x) => (float[4, 16] y) { h = MatMul (x, W)  t = Tanh (h)  y = Mul (t, x) }", W=n(16, 16)
    )
    after = quantized(model, keep_float=("y_Mul",))
    assert next(node for node in after.graph if node.op_type == "Mul").inputs[1].name == "x"


def test_float_readers_of_integers_get_one_dequantizer(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {{
            c = {CONV} (x, W)
            y = Tanh (c)
            z = Erf (c)
        }}""",
        W=n(4, 3, 3, 3),
    )
    after = quantized(model)
    assert model_kit.ops(after).count(DQ) == 3


def test_a_body_reads_a_quantized_value(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x, bool f) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {{
            c = {CONV} (x, W)
            z = {CONV} (c, V)
            y = If (f) <
                then_branch = t () => (float[1, 4, 8, 8] a) {{ a = Neg (c) }},
                else_branch = e () => (float[1, 4, 8, 8] b) {{ b = Relu (c) }}
            >
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    after = quantized(model)
    inner = [node.inputs[0] for body in after.graph.subgraphs() for node in body]
    assert {v.producer().op_type for v in inner} == {DQ}


def test_names_that_a_body_uses_are_not_taken(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            y = Loop (three, , c) <body = l (int64 i, bool x_scale, float[1, 4, 8, 8] c_quantized)
                => (bool x_zero_point, float[1, 4, 8, 8] c_dequantized) {{
                x_zero_point = Identity (x_scale)
                c_dequantized = Add (c_quantized, c)
            }}>
        }}""",
        W=n(4, 3, 3, 3),
        three=np.array(3),
    )
    after = quantized(model)
    outer = {v.name for node in after.graph for v in node.outputs} | set(after.graph.initializers)
    assert not outer & {"x_scale", "c_quantized", "x_zero_point", "c_dequantized"}


def test_quantized_output_keeps_name_type_and_shape(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"g (float[N, 3, H, 8] x) => (float[N, 4, H, 8] out) {{ out = {CONV} (x, W) }}", W=n(4, 3, 3, 3)
    )
    after = quantized(model, model_kit.feeds(model, free=4))
    (output,) = after.graph.outputs
    assert (output.name, output.dtype) == ("out", ir.DataType.FLOAT)
    assert [str(d) for d in output.shape] == ["N", "4", "H", "8"]
    assert model_kit.ops(after) == [Q, DQ, DQ, "Conv", Q, DQ]


def test_moved_codes_have_one_scale(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            t = Transpose <perm = [0, 1, 3, 2]> (c)
            y = {CONV} (t, V)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    found = model_kit.tensors(quantized(model))
    assert found["c_scale"] == found["t_scale"] and found["c_zero_point"] == found["t_zero_point"]


def test_joined_values_have_one_scale(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 8, 8, 8] y) {{
            a = {CONV} (x, W)
            b = {CONV} (x, V)
            y = Concat <axis = 1> (a, b)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 3, 3, 3, seed=1) * 3,
    )
    found = model_kit.tensors(quantized(model))
    assert found["a_scale"] == found["b_scale"] == found["y_scale"]


def test_split(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            p, q = Split <axis = 1, num_outputs = 2> (c)
            d = {CONV} (p, V)
            e = {CONV} (q, V)
            y = Add (d, e)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 2, 3, 3),
    )
    quantized(model)


def test_unused_output_of_split(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = {CONV} (x, W)
            p, q = Split <axis = 1, num_outputs = 2> (c)
            y = {CONV} (p, V)
        }}""",
        W=n(4, 3, 3, 3),
        V=n(4, 2, 3, 3),
    )
    # The runtime keeps such a Split in float; the audit sees it, and the compiler leaves it there.
    quantized(model, clean=False)


def test_all_zero_activations(model_kit, quantized):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            z = Mul (x, nought)
            c = {CONV} (z, W)
            k = {CONV} (x, W)
            y = Add (c, k)
        }}""",
        W=n(4, 3, 3, 3),
        nought=np.array(0, np.float32),
    )
    quantized(model)
