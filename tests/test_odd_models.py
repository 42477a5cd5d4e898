"""Models as people really have them: old opsets, bodies, functions, odd names, odd weights. Each goes through all."""

import contextlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import ExternalDataError, ModelError, QGraphError

pytestmark = pytest.mark.usefixtures("model_free_cpu")

CONV = "Conv <pads = [1, 1, 1, 1]>"


@pytest.fixture
def compiled(model_kit, tmp_path):
    """Writes the model, optimizes the file, and checks all that holds for any model."""

    def compile_model(model, feeds=None, least=25.0, **options):
        options = {"scheme": "int8", "max_loss": "100%", **options}
        source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
        ir.save(model, source)
        feeds = model_kit.feeds(model) if feeds is None else feeds
        result = qgraph.optimize(source, target, data=feeds, options=qgraph.Options(bench_seconds=0, **options))
        with contextlib.suppress(onnx.checker.ValidationError):
            onnx.checker.check_model(onnx.load(source))
            onnx.checker.check_model(onnx.load(target))
        before, after = onnx.load(source).graph, onnx.load(target).graph
        assert [o.name for o in after.output] == [o.name for o in before.output]
        given = {i.name for i in before.initializer}
        kept = [i for i in before.input if i.name not in given or i.name in {v.name for v in after.input}]
        assert list(after.input) == kept
        assert model_kit.sqnr(source, target, feeds) >= least
        assert result.report.quantized
        assert all((node.kernel is None) != (node.reason is None) for node in result.report.nodes)
        assert all(node.name for node in result.report.nodes)
        read = {name for node in _all_nodes(after) for name in node.input} | {o.name for o in after.output}
        assert not [i.name for i in after.initializer if i.name not in read], "dead initializers"
        json.dumps(result.report.to_dict(), allow_nan=False)
        assert not list(tmp_path.glob(".qgraph-*"))
        return result

    return compile_model


def _all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _all_nodes(body)


def kernels(result):
    return {node.name: node.kernel for node in result.report.quantized}


# -- old opsets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18])
def test_old_opsets_are_raised_with_their_meaning(model_kit, compiled, opset):
    # Softmax without an axis flattened to two dimensions before opset 13, BatchNormalization had `spatial` before 9.
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            b = BatchNormalization (c, s, t, m, v)
            r = Relu (b)
            y = Softmax (r)
        }""",
        opset=opset,
        W=n(4, 3, 3, 3),
        s=1 + 0.1 * n(4),
        t=n(4, seed=1),
        m=n(4, seed=2),
        v=np.abs(n(4, seed=3)) + 0.5,
    )
    result = compiled(model, least=15)
    assert "QLinearConv" in kernels(result).values()
    assert not any(node.op_type == "BatchNormalization" for node in result.report.nodes)


def test_opset_6_is_an_error_that_says_what_to_do(model_kit, tmp_path):
    model = model_kit.text("g (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }", opset=6)
    ir.save(model, tmp_path / "in.onnx")
    with pytest.raises(ModelError, match="opset 6"):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=[])


def test_old_form_of_gemm_broadcast_dropout_and_upsample(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 5] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            u = Upsample <mode = "nearest"> (c, k)
            d = Dropout <ratio = 0.5> (u)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, G, b)
        }""",
        opset=9,
        W=n(4, 3, 3, 3),
        k=np.array([1, 1, 2, 2], np.float32),
        G=n(5, 256, scale=0.1),
        b=n(5),
    )
    assert {"QLinearConv", "QGemm"} <= set(kernels(compiled(model)).values())


# -- bodies ---------------------------------------------------------------------------------------------------------


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


# -- functions ------------------------------------------------------------------------------------------------------


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


# -- weights --------------------------------------------------------------------------------------------------------


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


def test_weights_in_constant_nodes(model_kit, compiled):
    model = model_kit.text(
        """g (float[4, 2] x) => (float[4, 3] y) {
            W = Constant <value = float[2, 3] {1.0, -2.0, 0.5, 0.25, 3.0, -1.0}> ()
            y = MatMul (x, W)
        }"""
    )
    assert kernels(compiled(model))


def test_weights_from_constant_of_shape(model_kit, compiled):
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


# -- types and shapes -----------------------------------------------------------------------------------------------


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


def test_dynamic_shapes_keep_their_symbols(model_kit, compiled):
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


def test_conv_in_one_dimension(model_kit, compiled):
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


# -- names and connections ------------------------------------------------------------------------------------------


def test_odd_names_survive(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) { c = Conv <pads = [1, 1, 1, 1]> (x, W, b)  y = Relu (c) }",
        W=n(4, 3, 3, 3),
        b=n(4),
    )
    conv, relu = model.graph
    conv.name, relu.name = "/features/0 (conv)/Conv", "model/relu:0 ü"
    model.graph.inputs[0].name = "serving default/x:0"
    conv.outputs[0].name = "/features/0/Conv output 0"
    relu.outputs[0].name = "StatefulPartitionedCall:0"
    result = compiled(model)
    assert list(kernels(result)) == ["/features/0 (conv)/Conv"]
    assert result.model.graph.inputs[0].name == "serving default/x:0"


def test_unnamed_nodes(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { a = MatMul (x, W) b = MatMul (a, W) c = MatMul (b, W) y = Relu (c) }",
        W=n(8, 8, scale=0.3),
    )
    for node, name in zip(model.graph, (None, "c_MatMul", "", None), strict=True):
        node.name = name
    assert len(kernels(compiled(model))) == 3


def test_names_that_collide_with_ours(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x, float[2, 8] x_scale) => (float[2, 8] y) {
            x_quantized = MatMul (x, x_zero_point)
            x_dequantized = Add (x_quantized, x_scale)
            y = MatMul (x_dequantized, x_QuantizeLinear)
        }""",
        x_zero_point=n(8, 8),
        x_QuantizeLinear=n(8, 8, seed=1),
    )
    compiled(model)


def test_value_that_is_output_and_consumed(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] m, float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            m = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (m, V)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    assert len(kernels(compiled(model))) == 2


def test_conv_output_is_output_before_its_relu(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] c, float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            m = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (m, V)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    assert len(kernels(compiled(model))) == 2


def test_same_value_twice_as_output(model_kit, compiled, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y, float[2, 8] z) { y = MatMul (x, W)  z = Identity (y) }", W=n(8, 8)
    )
    compiled(model)


def test_output_that_is_an_input(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=n(8, 8))
    model.graph.outputs.append(model.graph.inputs[0])
    compiled(model)


def test_output_that_is_an_initializer(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=n(8, 8))
    model.graph.outputs.append(model.graph.initializers["W"])
    compiled(model)


def test_unused_outputs_inputs_and_missing_optional_inputs(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x, float[2] unused) => (float[1, 4, 4, 4] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W, )
            k = Clip (c, , six)
            p, indices = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (k)
            d, mask = Dropout (p)
            y = Relu (d)
        }""",
        W=n(4, 3, 3, 3),
        six=np.array(6, np.float32),
    )
    compiled(model)


def test_two_consumers_of_a_relu(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            d = Conv <pads = [1, 1, 1, 1]> (r, V)
            e = Erf (r)
            y = Add (d, e)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    compiled(model)


def test_split_with_several_outputs(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 12, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            a, b = Split <axis = 1> (c, sizes)
            d = Conv <pads = [1, 1, 1, 1]> (a, V)
            y = Concat <axis = 1> (d, b, c)
        }""",
        W=n(4, 3, 3, 3),
        V=n(6, 2, 3, 3),
        sizes=np.array([2, 2]),
    )
    compiled(model)


def test_add_of_a_value_to_itself(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            a = Add (c, c)
            y = Conv <pads = [1, 1, 1, 1]> (a, V)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    compiled(model)


def test_input_feeds_a_layer_and_is_added_again(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            a = Add (c, x)
            y = Relu (a)
        }""",
        W=n(4, 4, 3, 3),
    )
    compiled(model)


def test_relu_straight_on_the_input(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { r = Relu (x)  y = Conv <pads = [1, 1, 1, 1]> (r, W) }",
        W=n(4, 4, 3, 3),
    )
    compiled(model)


def test_nodes_out_of_order(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  y = Relu (h) }", W=n(8, 8))
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    compiled(model)


# -- what else a file holds -----------------------------------------------------------------------------------------


def test_metadata_survives(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul (x, W) }", opset=17, W=n(8, 8))
    model.metadata_props["author"] = "someone"
    model.graph.metadata_props["g"] = "kept"
    model.producer_name, model.doc_string, model.graph.name = "maker", "about", "main graph"
    model.domain, model.model_version = "org.example", 7
    model.graph.inputs[0].doc_string = "the input"
    result = compiled(model)
    found = result.model
    assert found.metadata_props["author"] == "someone"
    assert found.graph.metadata_props["g"] == "kept"
    assert (found.producer_name, found.doc_string, found.graph.name) == ("maker", "about", "main graph")
    assert (found.domain, found.model_version) == ("org.example", 7)
    assert found.graph.inputs[0].doc_string == "the input"


def test_contrib_operators_and_their_domain_survive(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2, 8] x) => (float[2, 8] y) {
            h = MatMul (x, W)
            y = com.microsoft.Gelu (h)
        }""",
        W=n(8, 8),
    )
    result = compiled(model)
    assert "com.microsoft" in result.model.graph.opset_imports
    assert "domain" in next(node.reason for node in result.report.refused)


def test_an_already_quantized_model_is_left_as_it_is_or_extended(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, wz)
            h = MatMul (d, wd)
            r = Tanh (h)
            y = MatMul (r, V)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(128, np.uint8),
        w=np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8),
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        V=n(8, 8),
    )
    compiled(model)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int8-dynamic", "int8-weights", "auto"])
def test_what_its_author_quantized_stays_in_every_scheme(model_kit, tmp_path, scheme):
    """Also where a value that the author quantizes is quantized by us once more: names must not be given twice."""
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y, float[2, 8] k) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, wz)
            h = MatMul (d, wd)
            a = Add (d, d)
            aq = QuantizeLinear (a, s, z)
            k = DequantizeLinear (aq, s, z)
            r = Tanh (h)
            y = MatMul (r, V)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(128, np.uint8),
        w=np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8),
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        V=n(8, 8),
    )
    ir.save(model, tmp_path / "in.onnx")
    feeds = model_kit.feeds(model)
    result = qgraph.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", data=feeds, scheme=scheme, max_loss="100%", bench_seconds=0,
        force=scheme == "int8-weights",
    )  # fmt: skip
    assert not [
        one for one in result.report.candidates if "cannot load" in one.verdict or "does not run" in one.verdict
    ]
    assert model_kit.sqnr(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds) > 20


def test_external_data(model_kit, tmp_path):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[4, 64] x) => (float[4, 64] y) { h = MatMul (x, W)  y = MatMul (h, V) }",
        W=n(64, 64),
        V=n(64, 64, seed=1),
    )
    source = tmp_path / "in"
    source.mkdir()
    ir.save(model, source / "m.onnx", external_data="weights.bin", size_threshold_bytes=64)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    feeds = model_kit.feeds(model)
    target = tmp_path / "m.onnx"
    qgraph.optimize(source / "m.onnx", target, data=feeds, options=qgraph.Options(bench_seconds=0))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert model_kit.sqnr(source / "m.onnx", target, feeds) > 25
    assert sorted(p.name for p in tmp_path.iterdir()) in (["in", "m.onnx"], ["in", "m.onnx", "m.onnx.data"])


@pytest.mark.parametrize("harm", ["missing", "truncated", "outside"])
def test_broken_external_data(model_kit, tmp_path, harm):
    model = model_kit.text("g (float[4, 64] x) => (float[4, 64] y) { y = MatMul (x, W) }", W=model_kit.normal(64, 64))
    source = tmp_path / "in.onnx"
    ir.save(model, source, external_data="w.bin", size_threshold_bytes=64)
    data: Path = tmp_path / "w.bin"
    if harm == "missing":
        data.unlink()
    elif harm == "truncated":
        data.write_bytes(data.read_bytes()[:100])
    else:
        proto = onnx.load(source, load_external_data=False)
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
        source.write_bytes(proto.SerializeToString())
    with pytest.raises(ExternalDataError, match="W"):
        qgraph.optimize(source, tmp_path / "out.onnx", data=model_kit.feeds(model))
    assert not (tmp_path / "out.onnx").exists()


def test_model_without_the_default_domain(model_kit, tmp_path):
    model = model_kit.text(
        """<ir_version: 8, opset_import: ["com.microsoft" : 1]>
        g (float[2, 8] x) => (float[2, 8] y) { y = com.microsoft.Gelu (x) }"""
    )
    ir.save(model, tmp_path / "in.onnx")
    with pytest.raises(QGraphError, match="default ONNX domain"):
        qgraph.optimize(tmp_path / "in.onnx", tmp_path / "out.onnx", data=model_kit.feeds(model))


def test_sequence_and_optional_values_pass_through(model_kit, compiled):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 16] y) {
            h = MatMul (x, W)
            s = SequenceConstruct (x, h)
            y = ConcatFromSequence <axis = 1> (s)
        }""",
        W=n(8, 8),
    )
    compiled(model)
