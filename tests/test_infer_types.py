"""InferTypes: the runtime tells the types behind its own operators, without the weights."""

import numpy as np
import onnx_ir as ir
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.infer_types import InferTypes

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def test_types_behind_the_runtimes_operators(model_kit):
    text = """g (float[b, s, 8] x, float[b, s, 8] y) => (float z) {
        n, , , r = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (x, y, scale)
        m = MatMul (n, W) a = Relu (m) z = Add (a, r) }"""
    model = model_kit.text(HEADER + text, scale=np.ones(8, np.float32), W=model_kit.normal(8, 8))
    Canonicalize(21)(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert values["m"].dtype is None or values["n"].dtype is None, "ONNX knows nothing of it"
    weights = model_kit.tensors(model)
    assert InferTypes()(model).modified
    assert [str(d) for d in values["m"].shape] == ["b", "s", "8"]
    assert all(values[name].dtype == ir.DataType.FLOAT for name in "nrma")
    assert model_kit.tensors(model).keys() == weights.keys() and len(model.graph.inputs) == 2, "the model is untouched"
    assert not InferTypes()(model).modified, "there is nothing left to ask"


def test_types_of_models_whose_weights_lie_elsewhere(model_kit, tmp_path):
    text = """g (float[b, s, 8] x) => (float z) {
        n = SimplifiedLayerNormalization <axis = -1> (x, scale) r = Reshape (n, rows) z = MatMul (r, W) }"""
    model = model_kit.text(
        HEADER + text, scale=np.ones(8, np.float32), W=model_kit.normal(8, 8), rows=np.array([-1, 8])
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    read = Canonicalize(21)(ir.load(tmp_path / "m.onnx")).model
    InferTypes()(read)
    reshaped = next(node for node in read.graph if node.op_type == "Reshape").outputs[0]
    assert reshaped.dtype == ir.DataType.FLOAT and reshaped.shape[1] == 8, "shapes are read from their file"


def test_types_that_nobody_knows(model_kit):
    model = model_kit.text(
        '<ir_version: 10, opset_import: ["" : 21, "mine" : 1]>\ng (float[4] x) => (float[4] z) '
        "{ a = mine.Unknown (x) z = Relu (a) }"
    )
    assert not InferTypes()(model).modified and model.graph[0].outputs[0].dtype is None
    plain = model_kit.text("g (float[4] x) => (float[4] z) { a = Relu (x) z = Relu (a) }")
    Canonicalize(21)(plain)
    assert not InferTypes()(plain).modified, "the standard's own inference is not repeated"
