"""MeasureShapes: the shape of every tensor in a real run, without touching the model."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import Canonicalize, MeasureShapes

from qgraph.data import inputs_of, load
from qgraph.graph import RUN_SHAPE


@pytest.fixture
def measured(model_kit):
    """Applies the pass and returns the shapes by name; the model must stay as it was."""

    def apply(model, feeds, folder=None):
        before = ir.to_proto(model)
        MeasureShapes(load(feeds, inputs_of(model)), folder)(model)
        assert ir.to_proto(model) == before
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        return {v.name: v.meta[RUN_SHAPE] for v in values if RUN_SHAPE in v.meta}

    return apply


def test_dynamic_dimensions_get_sizes(model_kit, measured):
    model = model_kit.text(
        """g (float[batch, 3, h, w] x) => (float[batch, n] y) {
            c = Conv <strides = [2, 2]> (x, W)
            y = Flatten (c)
        }""",
        W=model_kit.normal(4, 3, 3, 3),
    )
    Canonicalize()(model)
    found = measured(model, [{"x": model_kit.normal(2, 3, 9, 7)}])
    assert found == {"x": (2, 3, 9, 7), "c": (2, 4, 4, 3), "y": (2, 48)}


def test_scalars_and_empty_tensors(model_kit, measured):
    model = model_kit.text(
        """g (float[n, 4] x) => (float y, float[m, 4] z) {
            y = ReduceSum <keepdims = 0> (x)
            z = Slice (x, zero, zero)
        }""",
        zero=np.array([0]),
    )
    Canonicalize()(model)
    found = measured(model, [{"x": model_kit.normal(3, 4)}])
    assert found["y"] == () and found["z"] == (0, 4)


def test_the_order_of_the_data_does_not_matter(model_kit, measured):
    text = "g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }"
    feeds = [{"x": model_kit.normal(i, 4)} for i in range(1, 6)]
    found = []
    for data in (feeds, feeds[::-1]):
        model = model_kit.text(text)
        Canonicalize()(model)
        found.append(measured(model, data))
    assert found[0] == found[1]


def test_bodies_sequences_and_functions_are_no_obstacle(model_kit, measured):
    model = model_kit.text(
        """g (float[n, 4] x, bool f) => (float[k, 4] y) {
            r = Relu (x)
            s = SequenceConstruct (r, r)
            c = ConcatFromSequence <axis = 0> (s)
            y = If (f) <
                then_branch = t () => (float[k, 4] a) { a = Neg (c) },
                else_branch = e () => (float[k, 4] b) { b = Relu (c) }
            >
        }"""
    )
    Canonicalize()(model)
    found = measured(model, [{"x": model_kit.normal(3, 4), "f": np.array(True)}])
    assert found["y"] == (6, 4) and found["c"] == (6, 4) and "s" not in found


def test_external_weights(model_kit, measured, tmp_path):
    model = model_kit.text("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, W) }", W=model_kit.normal(64, 64))
    ir.save(model, tmp_path / "m.onnx", external_data="w", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    Canonicalize()(model)
    assert measured(model, [{"x": model_kit.normal(3, 64)}], tmp_path)["y"] == (3, 64)
