"""ReduceSum(x, axes) * (1 / n)  ->  ReduceMean(x, axes), where each sum is of n numbers; and so is a division by n.

Normalizations spelled in primitives sum up before they divide. A sum of 512 squares may lie beyond the 65504 that
halves hold where their mean is far below it, and a provider that computes in halves keeps to their range within a mean:
magika on QNN's HTP gave infinity by the one and 67 dB by the other.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph import graph

__all__ = ["MeanSums"]

_NEAR = 2.0**-20
"""How far a constant may be from 1 / n, as a share: it was rounded to float32 by somebody."""
_INPUT_AXES = 18
"""First opset in which the axes of ReduceMean are an input."""


class MeanSums(ir.passes.InPlacePass):
    """Rewrites sums in the main graph and in bodies.

    Refused, silently since nothing is lost: sums that others read, other types than float32, axes that are computed,
    and axes whose sizes are not known beforehand.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        opset = model.graph.opset_imports.get("", 0)
        names = graph.value_names(model.graph)
        changed = False
        for one in graph.all_graphs(model.graph):
            for node in list(one):
                if graph.is_standard(node, "ReduceSum"):
                    changed |= _rewritten(one, node, opset, names)
        return ir.passes.PassResult(model, changed)


def _rewritten(home: ir.Graph, node: ir.Node, opset: int, names: set[str]) -> bool:
    total = node.outputs[0]
    users = total.consumers()
    if len(users) != 1 or total.is_graph_output() or not graph.is_float(node.inputs[0]) or users[0].graph is not home:
        return False
    scaled, axes = users[0], _axes(node)
    count = None if axes is None else _count(node.inputs[0], axes)
    if axes is None or count is None or not _divides(scaled, total, count):
        return False
    keep = ir.AttrInt64("keepdims", node.attributes.get_int("keepdims", 1))
    if opset >= _INPUT_AXES:
        wanted = graph.add_initializer(
            home, ir.Tensor(np.array(axes, np.int64)), graph.fresh_name(f"{node.name}_axes", names)
        )
        made = ir.Node("", "ReduceMean", [node.inputs[0], wanted], attributes=[keep])
    else:
        made = ir.Node("", "ReduceMean", [node.inputs[0]], attributes=[ir.AttrInt64s("axes", axes), keep])
    made.name = node.name
    graph.merge_origins(made, node)
    graph.replace_node(home, scaled, made)
    home.remove(node, safe=True)
    return True


def _axes(node: ir.Node) -> list[int] | None:
    """Constant axes, at least one."""
    array = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if array is None or not array.size else [int(axis) for axis in array.reshape(-1)]


def _count(value: ir.Value | None, axes: list[int]) -> int | None:
    """Numbers in each sum over `axes`, or None where that is known in a run only."""
    shape = value.shape if value is not None else None
    if shape is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
        return None
    sizes = [size for size in (shape[axis] for axis in axes) if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(axes) else None


def _divides(node: ir.Node, total: ir.Value, count: int) -> bool:
    """Whether `node` makes the mean of a sum of `count` numbers."""
    if count < 1 or not graph.is_standard(node, "Mul", "Div") or len(node.inputs) != 2:
        return False
    position = 1 if node.inputs[0] is total else 0
    factor, other = node.inputs[position], node.inputs[1 - position]
    number = graph.constant_scalar(factor)
    # A constant of more dimensions than the sum would give the result its shape.
    rank = len(factor.shape) if factor is not None and factor.shape is not None else 0
    if other is not total or number is None or (rank and (total.shape is None or rank > len(total.shape))):
        return False
    if node.op_type == "Div" and position == 0:
        return False
    return abs(number * count - 1) <= _NEAR if node.op_type == "Mul" else abs(number / count - 1) <= _NEAR
