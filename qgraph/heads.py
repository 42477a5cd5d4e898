"""How exporters bring the heads of an attention apart, to the front, and together again."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qgraph import graph, sizes

__all__ = ["FRONT", "TURNED", "Heads", "alone", "ended", "factor", "is_default", "split"]

FRONT, TURNED = (0, 2, 1, 3), (0, 2, 3, 1)
"""Orders of axes that bring the heads to the front; turned: with the channels of a head in rows."""
_FAR = 6
"""Operators between a shape and the Reshape that it is for, at most."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """`source` [batch, positions, heads x channels], how many heads, of what size, and what they are multiplied by.

    Attributes:
        batch: what its size is called, before and behind the Reshape.
    """

    source: ir.Value
    count: int
    size: int
    batch: tuple[int | ir.SymbolicDim, ...]
    scale: float


def split(value: ir.Value | None, order: tuple[int, ...]) -> Heads | None:
    """What [batch, positions, heads x channels] `value` splits and transposes in this order, scaled perhaps."""
    perm, scale = np.arange(4), 1.0
    while value is not None:
        node = graph.producer(value, "Transpose", "Mul", "Div", "Reshape")
        if node is None or node.op_type == "Reshape":
            break
        if node.op_type == "Transpose":
            turn = node.attributes.get_ints("perm", [])
            if len(turn) != 4:
                return None
            perm = np.asarray(turn)[perm]
            value = node.inputs[0]
            continue
        found = factor(node)
        if found is None:
            return None
        value, scale = found[0], scale * found[1]
    node = graph.producer(value, "Reshape")
    source = node.inputs[0] if node is not None else None
    if node is None or source is None or tuple(perm) != order or not graph.is_float(source):
        return None
    parts = _parts(node, source)
    return None if parts is None else Heads(source, *parts, scale)


def _parts(node: ir.Node, source: ir.Value) -> tuple[int, int, tuple[int | ir.SymbolicDim, ...]] | None:
    """Heads, channels of each, and the batch, where a Reshape takes the last of three axes apart and leaves others."""
    before, after = source.shape, node.outputs[0].shape
    if before is None or len(before) != 3 or after is None or len(after) != 4:
        return None
    heads, size, width = after[2], after[3], before[2]
    if is_default(node.inputs[1]):
        return None
    if not (isinstance(heads, int) and isinstance(size, int)) or heads * size != width:
        return None
    # Of the two other axes, one that stays keeps the other.
    stays = any(_stays(node, before, after, axis) for axis in (0, 1))
    return (heads, size, (before[0], after[0])) if stays else None


def _stays(node: ir.Node, before: ir.Shape, after: ir.Shape, axis: int) -> bool:
    """Whether a Reshape is seen to keep the size of one of the first axes."""
    target = graph.constant(node.inputs[1])
    copied = target is not None and target[axis] == 0 and node.attributes.get_int("allowzero", 0) == 0
    return copied or graph.same_size(before[axis], after[axis])


def is_default(value: ir.Value | None) -> bool:
    """Whether a caller may give other numbers than those that the model has."""
    return value is not None and value.is_initializer() and not graph.has_constant(value)


def factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The side of Mul or Div that is not one number, and what that side is multiplied by."""
    left, right = node.inputs
    number = graph.constant_scalar(right)
    if number is not None and left is not None and alone(right):
        if node.op_type == "Mul":
            return left, number
        return (left, 1 / number) if number else None
    number = graph.constant_scalar(left)
    if number is not None and right is not None and node.op_type == "Mul" and alone(left):
        return right, number
    return None


def alone(number: ir.Value | None) -> bool:
    """Whether multiplying by this constant of one element adds no axes."""
    return number is not None and len(graph.run_shape(number) or ()) <= 1


def ended(product: ir.Node, queries: Heads, size: int) -> tuple[ir.Node | None, ir.Node] | None:
    """The guard behind the last product, if any, and the Reshape that joins the heads again."""
    result, guard = product.outputs[0], None
    if result.is_graph_output():
        return None
    users = [user for user in result.consumers() if not graph.is_standard(user, "Shape")]
    if len(users) == 2:
        where = next((user for user in users if graph.is_standard(user, "Where")), None)
        test = graph.producer(where.inputs[0], "IsNaN") if where is not None else None
        guards = test is not None and test.inputs[0] is result and len(test.outputs[0].uses()) == 1
        number = graph.constant_scalar(where.inputs[1]) if where is not None else None
        if where is None or not guards or where.inputs[2] is not result or number is None or not alone(where.inputs[1]):
            return None
        guard, result = where, where.outputs[0]
    chain = [product.outputs[0], result]
    again = _measured(result, "Reshape")
    if again is not None:
        if not _keeps(again, queries, size):
            return None
        result = again.outputs[0]
        chain.append(result)
    back = _measured(result, "Transpose")
    if back is None or tuple(back.attributes.get_ints("perm", [])) != FRONT:
        return None
    joined = _measured(back.outputs[0], "Reshape")
    if joined is None or joined.inputs[0] is not back.outputs[0] or is_default(joined.inputs[1]):
        return None
    # Whoever else asks for a shape would keep the product alive.
    ends = {joined, again}
    asked = [
        user for value in (*chain, back.outputs[0]) for user in value.consumers() if graph.is_standard(user, "Shape")
    ]
    if any(not _leads_to(user.outputs[0], ends, _FAR) for user in asked):
        return None
    return guard, joined


def _keeps(node: ir.Node, queries: Heads, size: int) -> bool:
    """Whether a Reshape leaves [batch, heads, positions, channels] as it is."""
    shape, told, own = queries.source.shape, sizes.elements(node.inputs[1]), node.inputs[0]
    if shape is None or told is None or len(told) != 4:
        return False
    if 0 in told and node.attributes.get_int("allowzero", 0) != 0:
        return False
    same = 0
    for axis, (number, dim) in enumerate(zip(told, (shape[0], queries.count, shape[1], size), strict=True)):
        if isinstance(number, tuple):
            other = number[0].shape
            same += number == (own, axis) or (other is not None and graph.same_size(other[number[1]], dim))
        else:
            same += number in (0, dim)
    # The only one that is not seen to stay does, since all others do.
    return same == 4 or (same == 3 and -1 in told)


def _leads_to(value: ir.Value, ends: set[ir.Node | None], far: int) -> bool:
    """Whether nothing but `ends` is made of these sizes."""
    if far == 0 or value.is_graph_output():
        return False
    return all(
        user in ends
        or (graph.is_standard(user, *sizes.MOVES) and all(_leads_to(out, ends, far - 1) for out in user.outputs))
        for user in value.consumers()
    )


def _measured(value: ir.Value, op_type: str) -> ir.Node | None:
    """What alone reads `value`, but for what asks for its shape."""
    users = [user for user in value.consumers() if not graph.is_standard(user, "Shape")]
    if len(users) != 1 or value.is_graph_output() or users[0].graph is not value.graph:
        return None
    return users[0] if graph.is_standard(users[0], op_type) else None
