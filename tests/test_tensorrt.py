"""TensorRT: explicit quantizers in int8 and fp8, around which layers, and that fp8 is computed as it is written."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import registry
from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError, QGraphError
from qgraph.external import float_quantizers
from qgraph.float_formats import E4M3
from qgraph.pipeline import Context
from qgraph.qparams import dequantize, fake_quantize, from_range, quantize
from qgraph.session import Session, SessionOptions
from qgraph.spec import QuantSpec
from qgraph.targets import Kernel
from qgraph.targets.tensorrt import tensorrt

BLOCK = """g (float[1, 32, 8, 8] x) => (float[1, 32, 8, 8] y) {
    a = Conv <pads=[1,1,1,1]> (x, A, b)  r = Relu (a)  c = Conv <pads=[1,1,1,1]> (r, C)  s = Add (c, x)  y = Relu (s)
}"""


def written(model, feeds, scheme):
    target = tensorrt()
    context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)))
    return registry.pipeline("quantize")(context)(model.clone()).model


@pytest.fixture
def block(model_kit):
    n = model_kit.normal
    return model_kit.text(BLOCK, opset=17, A=n(32, 32, 3, 3) / 8, C=n(32, 32, 3, 3, seed=1) / 8, b=n(32))


def test_fp8_by_the_rules(model_kit, block):
    feeds = model_kit.feeds(block)
    done = written(block, feeds, "fp8")
    assert done.graph.opset_imports[""] == 19, "the first whose quantizers write fp8"
    quantizers = [node for node in done.graph if node.op_type == "QuantizeLinear"]
    assert [node.inputs[0].name for node in quantizers] == ["x", "r"], "on inputs of layers, and not on their outputs"
    for node in done.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value
            assert zero.dtype == ir.DataType.FLOAT8E4M3FN and not zero.numpy().astype(np.float32).any()
    weights = [v for v in done.graph.initializers.values() if v.const_value.size > 32]
    assert {v.dtype for v in weights} == {ir.DataType.FLOAT8E4M3FN}
    assert {v.const_value.shape[0] for v in done.graph.initializers.values() if "A_scale" in str(v.name)} == {32}
    bias = next(node for node in done.graph if node.op_type == "Conv").inputs[2]
    assert bias.dtype == ir.DataType.FLOAT
    assert 24 < model_kit.sqnr(block, done, feeds) < 45


def test_fp8_is_run_as_it_is_written(model_kit, block, tmp_path):
    """The runtime takes a Relu before a quantizer of fp8 out, as if codes ended at 0; our sessions do not let it."""
    feeds = model_kit.feeds(block)
    done = written(block, feeds, "fp8")
    path = tmp_path / "m.onnx"
    ir.save(done, path)
    plain = SessionOptions(level="none")
    for source in (path, done):
        with Session(source, plain) as there:
            expected = there.run(feeds[0])["y"]
        with Session(source) as here:
            np.testing.assert_allclose(here.run(feeds[0])["y"], expected, atol=1e-4)


def test_products_in_fp8_load(model_kit):
    """Up to 1.31 the runtime fuses their quantizers into an operator that refuses them."""
    text = "g (float[32, 64] x) => (float[32, 48] y) { y = MatMul (x, W) }"
    model = model_kit.text(text, W=model_kit.normal(64, 48))
    feeds = model_kit.feeds(model)
    assert 24 < model_kit.sqnr(model, written(model, feeds, "fp8"), feeds) < 45


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=16), st.floats(2**-10, 1e4, width=32))
def test_codes_are_the_runtimes(values, reach):
    array = np.array(values, np.float32)
    params = from_range(-reach, reach, QuantSpec(E4M3, symmetric=True))
    codes = quantize(array, params)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(codes.view(np.uint8) & 0x7F, _runtime(array, params).view(np.uint8) & 0x7F)
    inside = np.abs(array) <= reach
    error = np.abs(fake_quantize(array, params) - array)
    # Half a step: 2**-4 of the number, or of the smallest normal one.
    assert (error <= np.maximum(np.abs(array), 2.0**-6 * params.scale) * 2.0**-4 * 1.001)[inside].all()
    assert np.isfinite(dequantize(codes, params)).all()


def _runtime(array, params):
    text = """<ir_version: 9, opset_import: ["": 19]> g (float[N] x, float s) => (float8e4m3fn[N] y)
        <float8e4m3fn z = {0}> { y = QuantizeLinear (x, s, z) }"""
    model = ir.from_onnx_text(text)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given_x, given_s = (ort.OrtValue.ortvalue_from_numpy(a) for a in (array, np.asarray(params.scale)))
    found = session.run_with_ort_values(["y"], {"x": given_x, "s": given_s})[0]
    return found.numpy().view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scheme", "nodes", "shapes", "words"),
    [
        ("int8", "y = Conv (x, W)", ((1, 3, 8, 8), (16, 3, 3, 3)), None),  # the first layer of a net
        ("int8", "y = Conv (x, W)", ((1, 3, 8, 8), (12, 3, 3, 3)), "too few"),
        ("int8", "y = Conv <group=32> (x, W)", ((1, 32, 8, 8), (32, 1, 3, 3)), None),
        ("int8", "y = Conv <group=32> (x, W)", ((1, 32, 8, 8), (32, 1, 1, 1)), "too few"),
        ("fp8", "y = Conv <group=32> (x, W)", ((1, 32, 8, 8), (32, 1, 3, 3)), "too few"),
        ("fp8", "y = Conv (x, W)", ((1, 32, 8, 8), (32, 32, 7, 7)), "too large"),
        ("fp8", "y = Conv (x, W)", ((1, 32, 8, 8), (32, 32, 3, 3)), None),
        ("int8", "y = MatMul (x, W)", ((1, 64), (64, 64)), "one row"),
        ("int8", "y = MatMul (x, W)", ((1, 5, 64), (64, 64)), None),
        ("fp8", "y = MatMul (x, W)", ((1, 5, 64), (64, 8)), "64 by 8"),
        ("fp8", "y = Gemm <transB=1> (x, W)", ((5, 8), (64, 8)), "8 by 64"),
        ("fp8", "y = MaxPool <kernel_shape=[2,2]> (x)", ((1, 32, 8, 8), (1,)), "pools"),
        ("int8", "y = MaxPool <kernel_shape=[2,2]> (x)", ((1, 32, 8, 8), (1,)), None),
    ],
)
def test_what_gains_nothing_stays_float(model_kit, scheme, nodes, shapes, words):
    x, w = shapes
    dims = ",".join(map(str, x))
    model = model_kit.text(f"g (float[{dims}] x) => (float y) {{ {nodes} }}", W=model_kit.normal(*w))
    target = tensorrt()
    model.graph.outputs[0].shape = None
    model.graph[0].outputs[0].shape = _made(model, model_kit.normal(*x))
    found = target.kernel(model.graph[0], target.scheme(scheme))
    if words is None:
        assert isinstance(found, Kernel)
    else:
        assert words in found.reason


def _made(model, x):
    with Session(model, SessionOptions(level="none")) as session:
        return ir.Shape(session.run({"x": x})["y"].shape)


def test_fp8_elsewhere_is_storage_or_refused():
    stored = registry.target("x86-vnni").scheme("fp8")
    assert stored.activation is None
    with pytest.raises(QGraphError, match="scheme for target 'qnn': 'fp8'"):
        registry.target("qnn").scheme("fp8")


def test_single_nodes_in_fp8(model_kit):
    text = "g (float[32, 64] x) => (float[32, 48] y) { y = MatMul (x, W) }"
    model = model_kit.text(text, opset=17, W=model_kit.normal(64, 48))
    feeds = model_kit.feeds(model)
    found = qgraph.optimize(
        model, None, data=feeds, target="tensorrt", scheme="int8", choices={"MatMul": "fp8"}, check="none"
    )
    assert found.model.graph.opset_imports[""] == 19
    assert model_kit.ops(found.model).count("QuantizeLinear") == 1
    assert 24 < model_kit.sqnr(model, found.model, feeds) < 45


@pytest.mark.parametrize("nodes, quantized", [("m = MatMul (x, W)  y = Relu (m)", True), ("y = MatMul (x, W)", False)])
def test_one_row_for_now_is_a_reason_for_a_head_alone(model_kit, nodes, quantized):
    """What calibration ran with need not be what the model will see; a head in 8 bits costs precision at once."""
    model = model_kit.text(f"g (float[N, 64] x) => (float[N, 48] y) {{ {nodes} }}", W=model_kit.normal(64, 48))
    feeds = [{"x": model_kit.normal(1, 64, seed=i)} for i in range(8)]
    if quantized:
        assert "QuantizeLinear" in model_kit.ops(written(model, feeds, "int8"))
    else:
        with pytest.raises(NothingQuantizedError, match="one row or column"):
            written(model, feeds, "int8")


ZERO = "<float8e4m3fn z = {0}> { r = Relu (x)  q = QuantizeLinear (r, s, z)  y = DequantizeLinear (q, s, z) }"
NODE = "{ z = Constant <value = float8e4m3fn {0}> ()" + ZERO.split("{", 2)[2]
SAID = "{ r = Relu (x)  q = QuantizeLinear <output_dtype = 17> (r, s)  y = DequantizeLinear (q, s) }"


@pytest.mark.parametrize("body", [ZERO, NODE, SAID], ids=["initializer", "Constant", "attribute"])
def test_fp8_is_found_however_it_is_written(body, tmp_path):
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[4] x, float s) => (float[4] y) {body}'
    )
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    feeds = {"x": np.array([-3, -1, 0.5, 2], np.float32), "s": np.array(0.1, np.float32)}
    assert float_quantizers(path) and float_quantizers(model)
    for source in (path, model):
        with Session(source) as session:
            assert session.run(feeds)["y"].min() == 0


def test_other_models_are_not_held_back(model_kit, tmp_path):
    model = model_kit.text("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    ir.save(model, tmp_path / "m.onnx")
    assert not float_quantizers(tmp_path / "m.onnx") and not float_quantizers(model)
