"""Small models, what a folder holds, and a place for a result."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph.session import Session


@pytest.fixture
def proto():
    """Maker of y = x + w."""

    def make(opset=21, domain="", weight=None):
        weight = numpy_helper.from_array(np.arange(512, dtype=np.float32), "w") if weight is None else weight
        shape = list(weight.dims)
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [weight],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=8)

    return make


@pytest.fixture
def run():
    """Gives the output of a model of one input [1, width]; its weights may lie in a folder."""

    def output(model, folder=None, width=512):
        with Session(model, folder=folder) as session:
            return session.run({"x": np.linspace(-1, 1, width, dtype=np.float32)[None]})["y"]

    return output


@pytest.fixture
def files():
    """Gives all that a folder holds: contents by path."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def destination(tmp_path):
    """A path whose folder holds nothing else."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out.onnx"
