"""Models that are no everyday ones."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qgraph
from qgraph.errors import DataError

GOOD = ("--data", "d.npz", "--bench-seconds", 0)
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 16])


def saved(nodes, inputs, outputs, **weights):
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "odd.onnx")


def test_a_model_without_outputs(run, work):
    saved([helper.make_node("Relu", ["x"], ["y"])], [X], [])
    for command in (["optimize", "odd.onnx", "o.onnx"], ["inspect", "odd.onnx"], ["deploy", "odd.onnx", "--to", "d"]):
        code, told = run(*command)
        assert code == 1 and "'odd.onnx' has no outputs" in told


def test_a_model_whose_outputs_are_no_tensors(run, work):
    out = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["b", 16])
    saved([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("SequenceConstruct", ["y"], ["s"])], [X], [out])
    for command in (["optimize", "odd.onnx", "o.onnx", *GOOD], ["validate", "odd.onnx", "odd.onnx", *GOOD[:2]]):
        code, told = run(*command)
        assert code == 1 and "no output that is a tensor of numbers" in told


def test_a_model_that_takes_sequences(run, work):
    given = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["b", 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 16])
    saved([helper.make_node("SequenceAt", ["s", "i"], ["y"])], [given], [out], i=np.int64(0))
    for command in (["optimize", "odd.onnx", "o.onnx"], ["deploy", "odd.onnx", "--to", "d"]):
        code, told = run(*command)
        assert code == 1 and "Input 's' is not a tensor with a known type" in told


def test_a_model_that_takes_text(run, work):
    given = [helper.make_tensor_value_info(name, TensorProto.STRING, ["b", 3]) for name in "tu"]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])
    nodes = [helper.make_node("Equal", ["t", "u"], ["e"]), helper.make_node("Cast", ["e"], ["y"], to=1)]
    saved(nodes, given, [out])
    np.savez("text.npz", t=np.array([["a", "b", "c"]] * 6), u=np.array([["a", "x", "c"]] * 6))
    np.savez("numbers.npz", t=np.zeros((6, 3)), u=np.zeros((6, 3)))
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "text.npz")
    assert code == 0 and "identical" in told
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "numbers.npz")
    assert code == 1 and "but the model takes text" in told


def test_a_model_that_takes_nothing(run, work):
    saved(
        [helper.make_node("MatMul", ["A", "B"], ["y"])],
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        A=np.ones((4, 4), np.float32),
        B=np.ones((4, 4), np.float32),
    )
    code, told = run("validate", "odd.onnx", "odd.onnx", "--data", "d.npz")
    assert code == 1 and "It takes no inputs: leave the data out" in told


def test_a_batch_of_no_samples(net):
    with pytest.raises(DataError, match="All outputs of the original are empty"):
        qgraph.optimize(net, data=[{"x": np.zeros((0, 16), np.float32)}], bench_seconds=0)


@pytest.mark.parametrize("top", [6.0, 60.0])
def test_relu6_goes_where_the_codes_end_within_it(model_kit, top):
    """Its bounds are those of the codes, or lie beyond them; what the codes reach further for, stays."""
    model = model_kit.text(
        "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { a = Conv (x, W) c = Clip (a, lo, hi) y = Conv (c, V) }",
        W=model_kit.normal(4, 4, 1, 1, scale=4.0),
        V=model_kit.normal(4, 4, 1, 1),
        lo=np.float32(0),
        hi=np.float32(top),
    )
    feeds = model_kit.feeds(model)
    done = model_kit.static(model.clone(), feeds)
    assert "Clip" not in model_kit.ops(done) and model_kit.sqnr(model, done, feeds) > 30
    quantizer = next(n for n in done.graph if n.op_type == "QuantizeLinear" and n.inputs[0].producer() is not None)
    assert quantizer.inputs[0].producer().op_type == "Conv"
    scale, zero = (value.const_value.numpy() for value in quantizer.inputs[1:])
    assert zero == 0 and 255 * float(scale) <= top + 0.51 * float(scale)
