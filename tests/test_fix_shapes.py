"""FixShapes: free dimensions get the sizes of the data, for targets that ask for it."""

import numpy as np
import pytest
from qgraph.passes import Canonicalize, FixShapes, FoldShapes

from qgraph.data import inputs_of, load
from qgraph.errors import DataError, OptionError
from qgraph.targets.cpu import x86_vnni
from qgraph.targets.qnn import qnn

TEXT = """
g (float[n, 3, h, w] x, int64[n] k) => (float[n, p] y) {
    s = Shape (x)
    first = Gather (s, zero)
    u = Unsqueeze (first, zeros)
    both = Concat <axis=0> (u, rest)
    y = Reshape (x, both)
}
"""


@pytest.fixture
def model(model_kit):
    return model_kit.text(TEXT, zero=np.int64(0), zeros=np.array([0]), rest=np.array([-1]))


def data(model, *sizes):
    return load(
        [{"x": np.zeros((2, 3, size, 5), np.float32), "k": np.zeros(2, np.int64)} for size in sizes], inputs_of(model)
    )


def test_dynamic_inputs_get_the_sizes_of_the_data(model, model_kit):
    samples = data(model, 4, 4)
    first = samples.first().feeds
    done = FixShapes(qnn(), samples)(model)
    assert done.modified
    assert [tuple(value.shape.numpy()) for value in done.model.graph.inputs] == [
        first["x"].shape,
        first["k"].shape,
    ]
    folded = FoldShapes()(Canonicalize()(done.model).model).model
    assert model_kit.ops(folded) == ["Reshape"], "what computed the shape is a constant now"
    assert model_kit.run(folded, first)["y"].shape == (first["x"].shape[0], 60)


def test_samples_of_several_sizes_are_an_error(model):
    with pytest.raises(DataError, match=r"Input 'x' is .* takes one size"):
        FixShapes(qnn(), data(model, 4, 6))(model)


def test_without_data_it_is_an_error_that_names_the_inputs(model):
    with pytest.raises(OptionError, match=r"inputs are open: x .*, k .*--data"):
        FixShapes(qnn())(model)


def test_static_models_and_other_targets_are_left_alone(model, model_kit):
    assert not FixShapes(x86_vnni(), data(model, 4))(model).modified
    static = model_kit.text("g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }")
    assert not FixShapes(qnn())(static).modified
