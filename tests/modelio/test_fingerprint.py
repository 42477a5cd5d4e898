"""The fingerprint is of the model and not of its file, and tells models apart."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qgraph.fingerprint import fingerprint
from qgraph.modelio import read


def test_the_fingerprint_is_of_the_model_and_not_of_its_file(tiny_chain, tmp_path):
    expected = fingerprint(tiny_chain(width=512))
    assert len(expected) == 64
    assert fingerprint(tiny_chain(width=512)) == expected
    assert fingerprint(tiny_chain(width=512).clone()) == expected
    for data in (None, "m.data"):
        ir.save(tiny_chain(width=512), tmp_path / "m.onnx", external_data=data, size_threshold_bytes=10)
        assert fingerprint(read(tmp_path / "m.onnx")) == expected


def rename(model):
    model.graph[1].outputs[0].name = "another"


def rename_input(model):
    model.graph.inputs[0].name = "another"


def another_operator(model):
    model.graph[2].op_type = "Abs"


def another_domain(model):
    model.graph[2].domain = "com.microsoft"


def another_attribute(model):
    model.graph[2].attributes.add(ir.AttrInt64("axis", 1))


def another_weight(model):
    tensor = model.graph.initializers["w"].const_value.numpy().copy()
    tensor[-1] += 1e-6
    model.graph.initializers["w"].const_value = ir.tensor(tensor, name="w")


def another_type(model):
    tensor = model.graph.initializers["w"].const_value.numpy()
    model.graph.initializers["w"].const_value = ir.tensor(tensor.view(np.int32), name="w")


def another_shape(model):
    tensor = model.graph.initializers["w"].const_value.numpy()
    model.graph.initializers["w"].const_value = ir.tensor(tensor.reshape(1, -1), name="w")


def another_order_of_inputs(model):
    node = model.graph[0]
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


CHANGES = [
    rename,
    rename_input,
    another_operator,
    another_domain,
    another_attribute,
    another_weight,
    another_type,
    another_shape,
    another_order_of_inputs,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [4, 1 << 15], ids=["small", "large"])
def test_the_fingerprint_tells_models_apart(tiny_chain, change, width):
    model = tiny_chain(width=width, weight=1.0)
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("inside", [False, True])
def test_constants_and_bodies_count(inside):
    """Exporters write weights as Constant nodes, too."""

    def model(constant, where="cond"):
        body = [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([constant]))),
            helper.make_node("Add", ["x", "c"], ["sum"]),
        ]
        info = helper.make_tensor_value_info
        if inside:
            branch = helper.make_graph(body, "body", [], [info("sum", TensorProto.FLOAT, [1])])
            body = [helper.make_node("If", ["cond"], ["sum"], then_branch=branch, else_branch=copy.deepcopy(branch))]
        inputs = [info("x", TensorProto.FLOAT, [1]), info("cond", TensorProto.BOOL, [])]
        return ir.from_proto(
            helper.make_model(helper.make_graph(body, "g", inputs, [info("sum", TensorProto.FLOAT, [1])]))
        )

    assert fingerprint(model(1.0)) == fingerprint(model(1.0))
    assert fingerprint(model(1.0)) != fingerprint(model(2.0))
