"""Types and shapes: other floats, dynamic, missing and empty shapes, and forms that no kernel has."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph

pytestmark = pytest.mark.usefixtures("model_free_cpu")


def test_float64_is_refused_with_reasons(model_kit, tmp_path):
    weight = model_kit.normal(16, 16).astype(np.float64)
    model = model_kit.text("g (double[4, 16] x) => (double[4, 16] y) { y = MatMul (x, W) }", W=weight)
    ir.save(model, tmp_path / "in.onnx")
    feeds = model_kit.feeds(model)
    for scheme in ("int8", "int8-dynamic", "int8-weights", "auto"):
        found = qgraph.optimize(
            tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, scheme=scheme, bench_seconds=0,
            force=scheme != "auto",
        ).report  # fmt: skip
        assert not found.quantized
        assert [node.reason for node in found.refused] == ["computes in double, not float32"], scheme
        assert [(one.name, one.verdict) for one in found.candidates] == [("fp32", "chosen")]
        model_kit.same(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds)


def test_float16_part_of_a_float_model(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[4, 16] x) => (float[4, 16] y) {
            h = MatMul (x, W)
            k = Cast <to = 10> (h)
            m = MatMul (k, V)
            y = Cast <to = 1> (m)
        }""",
        W=n(16, 16),
        V=n(16, 16).astype(np.float16),
    )
    result = compiled(model)
    assert [node.name for node in result.report.quantized] == ["h_MatMul", "m_MatMul"]
    assert not any(node.op_type == "Cast" for node in result.model.graph)


def test_dynamic_shapes_keep_their_symbols(model_kit, kernels, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[batch, 3, height, width] x) => (float[batch, 4, height, width] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (r, V)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    feeds = [{"x": n(1 + i % 2, 3, 5 + i, 7, seed=i)} for i in range(6)]
    result = compiled(model, feeds)
    assert [str(d) for d in result.model.graph.outputs[0].shape] == ["batch", "4", "height", "width"]
    assert set(kernels(result).values()) == {"QLinearConv"}


def test_dynamic_shapes_computed_by_shape_and_gather(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[batch, seq, 16] x) => (float[batch, seq, 4, 8] y) {
            h = MatMul (x, W)
            s = Shape (x)
            b = Gather (s, zero)
            l = Gather (s, one)
            bu = Unsqueeze (b, axis0)
            lu = Unsqueeze (l, axis0)
            t = Concat <axis = 0> (bu, lu, tail)
            y = Reshape (h, t)
        }""",
        W=n(16, 32),
        zero=np.array(0),
        one=np.array(1),
        axis0=np.array([0]),
        tail=np.array([4, 8]),
    )
    feeds = [{"x": n(2, 3 + i, 16, seed=i)} for i in range(6)]
    compiled(model, feeds)


def test_no_shapes_at_all(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[] x) => (float[] y) { c = Conv (x, W)  r = Relu (c)  y = MaxPool <kernel_shape = [2, 2]> (r) }",
        W=n(4, 3, 3, 3),
    )
    compiled(model, [{"x": n(1, 3, 8, 8, seed=i)} for i in range(5)])


def test_output_without_type(model_kit, compiled, tmp_path):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  y = Relu (h) }", W=n(8, 8))
    model.graph.outputs[0].shape = None
    compiled(model)


def test_scalar_inputs_and_integers_beside(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (int64[1, seq] ids, float gain) => (float[1, seq, 8] y) {
            e = Gather (table, ids)
            h = MatMul (e, W)
            y = Mul (h, gain)
        }""",
        table=n(10, 16),
        W=n(16, 8),
    )
    feeds = [{"ids": np.array([[i, 3, 9 - i]]), "gain": np.array(0.5, np.float32)} for i in range(5)]
    compiled(model, feeds)


def test_zero_size_dimension(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, n, 8] x) => (float[2, n, 8] y) {
            k = Concat <axis = 1> (nothing, x)
            y = MatMul (k, W)
        }""",
        nothing=np.zeros((2, 0, 8), np.float32),
        W=n(8, 8),
    )
    compiled(model, [{"x": n(2, 3, 8, seed=i)} for i in range(5)])


def test_a_batch_of_zero_samples_among_the_data(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, W) }", W=n(8, 8))
    compiled(model, [{"x": n(i, 8, seed=i)} for i in range(5)])


def test_conv_in_one_dimension(model_kit, kernels, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 8, 32] x) => (float[1, 8, 32] y) {
            c = Conv <pads = [1, 1]> (x, W, b)
            r = Relu (c)
            y = Conv <pads = [1, 1]> (r, V)
        }""",
        W=n(8, 8, 3),
        b=n(8),
        V=n(8, 8, 3, seed=1),
    )
    assert list(kernels(compiled(model)).values()) == ["QLinearConv"] * 2


def test_conv_in_three_dimensions_is_refused(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 2, 4, 4, 4] x) => (float[1, 2, 8] y) {
            c = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, W)
            f = Reshape (c, shape)
            y = MatMul (f, V)
        }""",
        W=n(2, 2, 3, 3, 3),
        V=n(64, 8),
        shape=np.array([1, 2, 64]),
    )
    result = compiled(model)
    assert "3 dimensions" in next(node.reason for node in result.report.refused if node.op_type == "Conv")


@pytest.mark.parametrize(
    "attributes, bias, refusal",
    [
        ("", "b", None),
        ("<transB = 1>", "b", None),
        ("<transB = 1>", "", None),
        ("<transA = 1>", "b", "transA"),
        ("<alpha = 0.5>", "b", "alpha"),
        ("<beta = 0.5>", "b", "beta"),
        ("<beta = 0.5>", "", None),
        ("", "full", "one number per column"),
        ("", "one", "one number per column"),
        ("", "row", None),
    ],
)
def test_gemm_forms(model_kit, compiled, attributes, bias, refusal):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[16, 16] x) => (float[16, 16] y) {{
            h = MatMul (x, V)
            y = Gemm {attributes} (h, W{", " + bias if bias else ""})
        }}""",
        V=n(16, 16, seed=3),
        W=n(16, 16),
        **({bias: {"b": n(16), "full": n(16, 16), "one": n(1), "row": n(1, 16)}[bias]} if bias else {}),
    )
    result = compiled(model)
    gemm = next(node for node in result.report.nodes if node.op_type == "Gemm")
    if refusal is None:
        assert gemm.kernel == "QGemm"
    else:
        assert refusal in gemm.reason
