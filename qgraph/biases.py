"""Where the bias of a layer lies: in the layer, or in a constant row that is added behind it."""

from __future__ import annotations

import math

import onnx_ir as ir

from qgraph import graph
from qgraph.targets import Kernel

__all__ = ["bias_of"]


def bias_of(node: ir.Node, kernel: Kernel) -> tuple[ir.Node | None, int]:
    """(the node that adds the layer's constant bias, its own or behind it; its input position); (None, 0) for none."""
    if kernel.bias is not None and len(node.inputs) > kernel.bias:
        return node, kernel.bias
    users = node.outputs[0].consumers()
    if len(users) == 1 and graph.is_standard(users[0], "Add") and not node.outputs[0].is_graph_output():
        position = 1 - list(users[0].inputs).index(node.outputs[0])
        if _is_row(node, kernel, users[0].inputs[position]):
            return users[0], position
    return None, 0


def _is_row(node: ir.Node, kernel: Kernel, value: ir.Value | None) -> bool:
    """Whether `value` is a constant of one number for each output channel, lying along the channels."""
    weight = node.inputs[kernel.weight[0]] if kernel.weight is not None else None
    shape, weights = graph.run_shape(value), graph.run_shape(weight)
    if not graph.has_constant(value) or shape is None or weights is None:
        return False
    if node.op_type == "Conv":
        channels, axis = weights[0], len(weights) - 1
    else:
        channels, axis = weights[0 if node.attributes.get_int("transB", 0) else -1], 1
    return math.prod(shape) == channels and len(shape) >= axis and shape[-axis] == channels
