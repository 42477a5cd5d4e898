"""What stays in float, by wish or because it loses: it runs in float, and has the right reason."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import NothingQuantizedError, OptionError
from qgraph.session import Session, SessionOptions

QUIET = qgraph.Options(bench_seconds=0)


def test_keep_float_by_name_pattern_and_operator(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    feeds = model_kit.feeds(cnn, 6)
    options = dataclasses.replace(QUIET, keep_float=("/net/c0", "Gemm"))
    kept = {node.name: node for node in qgraph.optimize(cnn, data=feeds, options=options).report.refused}
    assert {"/net/c0", "/net/logits"} <= set(kept)
    assert "/net/c0" in kept["/net/c0"].reason and "Gemm" in kept["/net/logits"].reason
    options = dataclasses.replace(QUIET, keep_float=("/net/c?",))
    report = qgraph.optimize(cnn, data=feeds, options=options).report
    assert not [node for node in report.quantized if node.op_type == "Conv"]


def test_keep_float_of_an_operator_holds_for_unnamed_nodes(model_kit, model_free_cpu, cnn):
    assert not any(node.name for node in cnn.graph)
    options = dataclasses.replace(QUIET, keep_float=("Conv",))
    report = qgraph.optimize(cnn, data=model_kit.feeds(cnn, 6), options=options).report
    assert not [node for node in report.quantized if node.op_type == "Conv"]


def test_keep_float_of_a_node_that_is_fused_into(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    options = dataclasses.replace(QUIET, keep_float=("/net/c1",))
    report = qgraph.optimize(cnn, data=model_kit.feeds(cnn, 6), options=options).report
    assert sum(node.op_type == "Conv" for node in report.refused) == 1


@pytest.mark.parametrize("layer, default", [("Conv", True), ("ConvTranspose", False)])
def test_a_float_layer_between_integers_is_left_alone(model_kit, model_free_cpu, layer, default):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            a = Conv <pads = [1, 1, 1, 1]> (x, A)
            b = {layer} <pads = [1, 1, 1, 1]> (a, B)
            y = Conv <pads = [1, 1, 1, 1]> (b, C)
        }}""",
        **{name: n(4, 4, 3, 3, seed=i) for i, name in enumerate("ABC")},
    )
    if default:
        # A weight that the caller may override must not be quantized by the runtime, either.
        model.graph.inputs.append(model.graph.initializers["B"])
    report = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET).report
    assert [node.name for node in report.quantized] == ["a_Conv", "y_Conv"]


def test_a_relu_that_is_kept_in_float_is_there_and_listed(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (r, V)
        }""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
    )
    result = qgraph.optimize(model, data=model_kit.feeds(model), keep_float=("Relu",), bench_seconds=0)
    assert "Relu" in model_kit.ops(result.model)
    assert [node.op_type for node in result.report.refused] == ["Relu"]


def test_keep_float_that_matches_nothing_names_the_nearest(model_kit, model_free_cpu, cnn):
    for node in cnn.graph:
        node.name = f"/net/{node.outputs[0].name}"
    with pytest.raises(OptionError, match="/net/logits"):
        qgraph.optimize(cnn, data=model_kit.feeds(cnn), options=dataclasses.replace(QUIET, keep_float=("/net/logit",)))


@pytest.mark.parametrize("scheme", ["auto", "int8", "int8-dynamic", "int8-weights"])
def test_keep_float_of_everything_leaves_the_float_graph(model_kit, model_free_cpu, mlp, scheme):
    options = dataclasses.replace(QUIET, keep_float=("Gemm",), scheme=scheme)
    if scheme != "auto":
        with pytest.raises(NothingQuantizedError, match=f"scheme '{scheme}', nothing"):
            qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=options)
        options = dataclasses.replace(options, force=True)
    result = qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=options)
    assert not result.report.quantized
    reasons = {node.reason for node in result.report.refused if node.op_type == "Gemm"}
    assert reasons == {"left in float by the option 'Gemm'"}
    model_kit.same(mlp, result.model)


def test_a_model_with_nothing_to_quantize_gets_the_rewritten_graph_and_the_reasons(model_kit, tmp_path):
    """Erf-GELU in pieces: no node has an integer kernel, but the runtime's own Gelu is faster."""
    model = model_kit.text(
        """g (float[4, 64] x) => (float[4, 64] y) {
            a = Div (x, root2)
            b = Erf (a)
            c = Add (b, one)
            d = Mul (x, c)
            y = Mul (d, half)
        }""",
        root2=np.array(np.sqrt(2), np.float32),
        one=np.array(1, np.float32),
        half=np.array(0.5, np.float32),
    )
    with pytest.raises(NothingQuantizedError, match="the scheme 'auto', which writes a faster float graph"):
        qgraph.optimize(model, data=model_kit.feeds(model), scheme="int8", options=QUIET)
    for scheme in ("auto", "fp32"):
        result = qgraph.optimize(
            model, tmp_path / "out.onnx", data=model_kit.feeds(model), scheme=scheme, options=QUIET
        )
        assert model_kit.ops(result.model) == ["Gelu"]
        model_kit.same(model, tmp_path / "out.onnx")
        assert [(one.name, one.verdict) for one in result.report.candidates] == [("fp32", "chosen")]
        (node,) = result.report.nodes
        assert node.kernel is None
        assert node.reason == ("the scheme leaves all nodes in float" if scheme == "fp32"
                               else "onnxruntime's CPU provider has no integer kernel for Gelu")  # fmt: skip


def test_float_nodes_of_a_float_result_have_the_reasons_of_the_plan(model_kit, mlp):
    """Kernels that exist, but came out worse on the whole, are not explained by a body that is not there."""
    options = dataclasses.replace(QUIET, max_loss=0.0, min_sqnr=100, target="x86-vnni")
    report = qgraph.optimize(mlp, data=model_kit.feeds(mlp, free=32), options=options).report
    assert not report.quantized
    reasons = {node.name: node.reason for node in report.refused}
    assert not [why for why in reasons.values() if "body" in why], reasons
    assert "no candidate with its integer kernel" in reasons["k_Gemm"]
    assert "no integer kernel for Relu" in reasons["r_Relu"]


@pytest.mark.parametrize("operator", ["Softmax", "Sigmoid", "LeakyRelu", "Tanh"])
def test_what_is_left_in_float_runs_in_float(model_kit, model_free_cpu, tmp_path, operator):
    # onnxruntime's QLinearSoftmax turns the largest codes, if they round to 256, into 0: this is not only about speed.
    n = model_kit.normal
    model = model_kit.text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {{
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            s = {operator} (c)
            y = Conv <pads = [1, 1, 1, 1]> (s, V)
        }}""",
        W=n(4, 4, 3, 3),
        V=n(4, 4, 3, 3, seed=1),
    )
    options = dataclasses.replace(QUIET, keep_float=(operator,))
    result = qgraph.optimize(model, tmp_path / "out.onnx", data=model_kit.feeds(model), options=options)
    assert operator in {node.op_type for node in result.report.refused}
    Session(tmp_path / "out.onnx", SessionOptions(optimized=tmp_path / "run.onnx")).close()
    assert operator in {node.op_type for node in ir.load(tmp_path / "run.onnx").graph}
