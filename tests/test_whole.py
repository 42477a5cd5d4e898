"""Targets that take graphs whole: constants, fixed ranges, Relus that vanish, and the ladder of schemes."""

import numpy as np
import pytest

import qgraph
from qgraph import proof, registry
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.targets import Kernel, Refusal
from qgraph.targets.nnapi import nnapi
from qgraph.targets.openvino import openvino
from qgraph.targets.qnn import qnn
from qgraph.targets.tensorrt import tensorrt


def written(model, feeds, target, scheme="int8"):
    """The model as written for a target, without any runtime but the CPU's."""
    context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)))
    return registry.pipeline("quantize")(context)(model.clone()).model


def makers(node):
    return [None if v is None or v.producer() is None else v.producer().op_type for v in node.inputs]


def only(model, op):
    return next(node for node in model.graph if node.op_type == op)


def test_constants_beside_activations_are_integers(model_kit):
    model = model_kit.text(
        "g (float[2, 8, 4] x) => (float[2, 8, 4] y) { a = Mul (x, c) y = Add (a, d) }",
        c=model_kit.normal(8, 1),
        d=model_kit.normal(4),
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, qnn())
    for op in ("Mul", "Add"):
        node = only(done, op)
        assert makers(node) == ["DequantizeLinear"] * 2
        codes = node.inputs[1].producer().inputs[0]
        assert codes.is_initializer() and codes.const_value.dtype.name == "UINT8"
    assert model_kit.sqnr(model, done, feeds) > 30


def test_a_constant_that_two_nodes_share_is_stored_once(model_kit):
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { a = Mul (x, c) y = Add (a, c) }", c=model_kit.normal(8)
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, qnn())
    stored = {only(done, op).inputs[1].producer().inputs[0].name for op in ("Mul", "Add")}
    assert len(stored) == 1
    assert model_kit.sqnr(model, done, feeds) > 25


@pytest.mark.parametrize("op, scale, zero", [("Sigmoid", 1 / 65536, 0), ("Tanh", 1 / 32768, 32768)])
def test_sixteen_bits_have_the_range_that_the_kernel_wants(model_kit, op, scale, zero):
    model = model_kit.text(
        f"g (float[4, 8] x) => (float[8, 4] y) {{ a = {op} (x) b = Reshape (a, s) y = Mul (b, b) }}", s=np.array([8, 4])
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, qnn(), "a16w8")
    quantizer = only(done, op).outputs[0].consumers()[0]
    assert quantizer.op_type == "QuantizeLinear"
    assert float(quantizer.inputs[1].const_value.numpy()) == scale
    assert int(quantizer.inputs[2].const_value.numpy()) == zero
    moved = only(done, "Reshape")
    assert float(moved.outputs[0].consumers()[0].inputs[1].const_value.numpy()) == scale, "codes are moved as they are"
    # In eight bits it is what the data has.
    eight = only(written(model, feeds, qnn()), op).outputs[0].consumers()[0]
    assert float(eight.inputs[1].const_value.numpy()) != scale


def test_a_relu_goes_into_the_codes_before_it(model_kit):
    model = model_kit.text(
        """
        g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {
            a = Conv <pads=[1,1,1,1]> (x, W)
            r = Relu (a)
            s = Relu (x)
            y = Add (r, s)
        }
        """,
        W=model_kit.normal(4, 4, 3, 3),
    )
    done = written(model, model_kit.feeds(model), qnn())
    assert model_kit.ops(done).count("Relu") == 1, "the one of the input stays, and is in integers"
    assert makers(only(done, "Relu")) == ["DequantizeLinear"]


def test_normalization(model_kit):
    model = model_kit.text(
        "g (float[2, 6, 16] x) => (float[2, 6, 16] y) { y = LayerNormalization (x, g, b) }",
        g=1 + 0.2 * model_kit.normal(16),
        b=model_kit.normal(16, seed=1),
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, qnn())
    node = only(done, "LayerNormalization")
    kinds = [value.producer().inputs[0].dtype.name for value in node.inputs]
    assert kinds == ["UINT8", "UINT8", "INT32"]
    assert model_kit.sqnr(model, done, feeds) > 30


def test_a_grouped_transposed_convolution(model_kit):
    model = model_kit.text(
        "g (float[1, 4, 5, 5] x) => (float[1, 6, 10, 10] y) { y = ConvTranspose <group=2, strides=[2,2]> (x, W, b) }",
        W=model_kit.normal(4, 3, 2, 2),
        b=model_kit.normal(6),
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, qnn())
    assert makers(only(done, "ConvTranspose")) == ["DequantizeLinear"] * 3
    assert model_kit.sqnr(model, done, feeds) > 30


RESIDUAL = """
g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
    a = Conv <pads=[1,1,1,1]> (x, A, b)
    r = Relu (a)
    c = Conv <pads=[1,1,1,1]> (r, B)
    s = Add (c, x)
    y = Relu (s)
}
"""


def test_tensorrt_wants_symmetric_codes_in_front_of_layers_and_float_biases(model_kit):
    model = model_kit.text(
        RESIDUAL, A=model_kit.normal(8, 8, 3, 3) / 8, B=model_kit.normal(8, 8, 3, 3, seed=1) / 8, b=model_kit.normal(8)
    )
    feeds = model_kit.feeds(model)
    done = written(model, feeds, tensorrt())
    first, second = (node for node in done.graph if node.op_type == "Conv")
    assert makers(first)[:2] == ["DequantizeLinear"] * 2 and makers(first)[2] is None, "the bias stays in float"
    for node in done.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zeros = node.inputs[2].const_value
            assert zeros.dtype.name == "INT8" and not np.any(zeros.numpy()), node.name
    assert {user.op_type for user in first.outputs[0].consumers()} == {"Relu"}, "what fuses into it comes right behind"
    added = only(done, "Add")
    assert makers(added) == ["Conv", "DequantizeLinear"], "the branch beside the layer is in integers"
    assert second in [value.producer() for value in added.inputs]
    assert model_kit.sqnr(model, done, feeds) > 25


@pytest.mark.parametrize("make", [nnapi, openvino, qnn, tensorrt])
def test_every_entry_refuses_with_a_reason_or_has_a_kernel(make, model_kit):
    target = make()
    model = model_kit.text(
        "g (float[2, 8] x, int64[2, 8] k) => (float[2, 8] y, int64[2, 8] z) { y = Add (x, x) z = Add (k, k) }"
    )
    scheme = target.scheme("int8")
    for node in model.graph:
        for op in (*target.table, "NonZero"):
            node.op_type = op
            found = target.kernel(node, scheme)
            assert isinstance(found, Kernel) or (isinstance(found, Refusal) and found.reason), op
            if node.outputs[0].name == "z":
                assert isinstance(found, Refusal), f"{op} of integers has no quantized kernel"


def test_the_next_scheme_is_tried_where_the_first_loses_too_much(model_kit, monkeypatch):
    monkeypatch.setattr(proof, "runner_of", lambda target: None)
    model = model_kit.text(
        "g (float[4, 32] x) => (float[4, 32] y) { a = MatMul (x, A) b = Tanh (a) y = MatMul (b, B) }",
        A=model_kit.normal(32, 32) / 6,
        B=model_kit.normal(32, 32, seed=1) / 6,
    )
    data = [{"x": model_kit.normal(4, 32, seed=i)} for i in range(12)]
    easy = qgraph.optimize(model, data=data, target="qnn", min_sqnr=15).report
    assert easy.scheme == "int8" and easy.quantized
    hard = qgraph.optimize(model, data=iter(data), target="qnn", min_sqnr=42).report
    assert hard.scheme == "a16w8" and hard.quantized and hard.fidelity.worst.sqnr >= 42
    assert any("'int8' was tried first" in note for note in hard.notes)
