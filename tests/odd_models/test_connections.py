"""Names and connections: odd names, outputs that are read, several readers, nodes in any order."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("model_free_cpu")


def test_odd_names_survive(model_kit, kernels, compiled):
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


def test_unnamed_nodes(model_kit, kernels, compiled):
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


def test_value_that_is_output_and_consumed(model_kit, kernels, compiled):
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


def test_conv_output_is_output_before_its_relu(model_kit, kernels, compiled):
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
