"""Bodies of If, Loop and Scan, and functions: what they read of a graph that is quantized around them."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("model_free_cpu")


def test_if_bodies_read_a_quantized_value(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x, bool flag) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            y = If (flag) <
                then_branch = t () => (float[1, 4, 8, 8] a) { a = Conv <pads = [1, 1, 1, 1]> (r, V) },
                else_branch = e () => (float[1, 4, 8, 8] b) { b = Neg (r) }
            >
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    result = compiled(model)
    inner = [node for node in result.report.nodes if node.op_type == "Conv" and node.kernel is None]
    assert len(inner) == 1 and "inside a body" in inner[0].reason


def test_if_body_holds_the_only_reader(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x, bool flag) => (float[2, 8] y) {
            h = MatMul (x, W)
            z = MatMul (h, V)
            y = If (flag) <
                then_branch = t () => (float[2, 8] a) { a = Identity (z) },
                else_branch = e () => (float[2, 8] b) { b = Neg (z) }
            >
        }""",
        W=n(16, 16),
        V=n(16, 8),
    )
    compiled(model)


def test_if_body_reads_the_weight_of_an_outer_layer(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x, bool flag) => (float[2, 16] y) {
            h = MatMul (x, W)
            y = If (flag) <
                then_branch = t () => (float[2, 16] a) { a = MatMul (h, W) },
                else_branch = e () => (float[2, 16] b) { b = Neg (h) }
            >
        }""",
        W=n(16, 16, scale=0.3),
    )
    compiled(model)


def test_loop_body_with_matmul_and_an_outer_value(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x) => (float[2, 16] y) {
            h = MatMul (x, W)
            y = Loop (three, yes, h) <body = l (int64 i, bool c, float[2, 16] s) => (bool d, float[2, 16] t) {
                d = Identity (c)
                p = MatMul (s, V)
                t = Add (p, h)
            }>
        }""",
        W=n(16, 16),
        V=n(16, 16, scale=0.1),
        three=np.array(3),
        yes=np.array(True),
    )
    result = compiled(model, least=20)
    assert [node.op_type for node in result.report.quantized] == ["MatMul"]


def test_scan_body(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[5, 2, 16] x) => (float[2, 16] s_last, float[5, 2, 16] y) {
            h = MatMul (x, W)
            s_last, y = Scan <num_scan_inputs = 1, body = b (float[2, 16] s, float[2, 16] e)
                => (float[2, 16] t, float[2, 16] o) {
                p = MatMul (s, V)
                t = Add (p, e)
                o = Tanh (t)
            }> (zero, h)
        }""",
        W=n(16, 16),
        V=n(16, 16, scale=0.1),
        zero=np.zeros((2, 16), np.float32),
    )
    result = compiled(model)
    assert [node.op_type for node in result.report.quantized] == ["MatMul"]


def test_nested_bodies_and_equal_names_in_two_of_them(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 16] x, bool f) => (float[2, 16] y) {
            h = MatMul (x, W)
            y = If (f) <
                then_branch = t () => (float[2, 16] a) {
                    a = If (f) <
                        then_branch = tt () => (float[2, 16] q) { z = MatMul (h, W)  q = Relu (z) },
                        else_branch = te () => (float[2, 16] q2) { q2 = Neg (h) }
                    >
                },
                else_branch = e () => (float[2, 16] b) { w = MatMul (h, W)  b = Relu (w) }
            >
        }""",
        W=n(16, 16, scale=0.3),
    )
    compiled(model)


def test_local_functions_are_inlined(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
        g (float[2, 16] x) => (float[2, 16] y) {
            h = mine.layer (x, W)
            y = mine.layer (h, V)
        }
        <domain: "mine", opset_import: ["" : 17]>
        layer (a, w) => (b) {
            p = MatMul (a, w)
            b = Relu (p)
        }""",
        W=n(16, 16),
        V=n(16, 16, seed=1),
    )
    result = compiled(model)
    assert sum(node.op_type == "MatMul" for node in result.report.quantized) == 2
