"""Where a constant row is added: the bias of a layer, in it or behind it, and that of any sum."""

from __future__ import annotations

import math

import onnx_ir as ir

from qgraph import graph

__all__ = ["bias_of", "row_of"]


def bias_of(node: ir.Node) -> tuple[ir.Node | None, int]:
    """(the node that adds a layer's constant bias, its own or behind it; its input position); (None, 0) for none.

    Args:
        node: Conv, MatMul or Gemm, with a constant weight, or com.microsoft's FusedMatMul.
    """
    weights = graph.run_shape(node.inputs[1])
    if weights is None:
        return None, 0
    first = node.op_type == "Conv" or node.attributes.get_int("transB", 0) != 0
    channels, axis = weights[0 if first else -1], len(weights) - 1 if node.op_type == "Conv" else 1
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return (node, 2) if _is_row(node.inputs[2], channels, 1) else (None, 0)
    users = node.outputs[0].consumers()
    if len(users) == 1 and graph.is_standard(users[0], "Add") and not node.outputs[0].is_graph_output():
        position = 1 - list(users[0].inputs).index(node.outputs[0])
        if _is_row(users[0].inputs[position], channels, axis):
            return users[0], position
    return None, 0


def row_of(value: ir.Value | None, columns: int) -> tuple[ir.Node, int] | None:
    """(the node that adds a constant row of so many columns to make `value`, its input position); None for none."""
    node = graph.producer(value, "Add", "Gemm")
    if node is not None and node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    for position in (0, 1) if node is not None and node.op_type == "Add" else (2,):
        if node is not None and len(node.inputs) > position and _is_row(node.inputs[position], columns, 1):
            return node, position
    return None


def _is_row(value: ir.Value | None, channels: int, axis: int) -> bool:
    """Whether `value` is a constant of one number for each channel, lying along this axis, counted from the last."""
    shape = graph.run_shape(value)
    if not graph.has_constant(value) or shape is None:
        return False
    return math.prod(shape) == channels and len(shape) >= axis and shape[-axis] == channels
