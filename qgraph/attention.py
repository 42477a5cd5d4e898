"""Attention in parts: softmax(scale q k' + mask) v for each head, with the moves of heads around it.

Vaswani et al., "Attention Is All You Need", 2017, section 3.2. Exporters split the channels of queries, keys and values
into heads (Reshape), bring the heads to the front (Transpose), and undo both behind the last product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qgraph import graph, sizes

__all__ = ["Attention", "find", "likely"]

_BETWEEN = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub", "Sum", "Where")
_MASKS = 2
_DEPTH = 6
"""Operators between Softmax and the products around it, at most."""
_FRONT, _FRONT_TURNED = (0, 2, 1, 3), (0, 2, 3, 1)
"""Orders of axes that bring the heads to the front; turned: with the channels of a head in rows."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention reads and makes.

    Attributes:
        queries, keys, values: [batch, positions, heads x channels of a head].
        masks: what is added to the scores, last first, of shapes that broadcast to [batch, heads, queries, keys].
        heads: how many, the same number for queries, keys and values.
        scale: what the scores are multiplied by, positive.
        product: the last product.
        guard: Where(IsNaN(o), 0, o) right behind that product, or None.
        joined: [batch, positions, heads x channels], or what a Reshape makes of that.
        nodes: products, Softmax and what is between them; nothing else reads what they make.
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    masks: tuple[ir.Value, ...]
    heads: int
    scale: float
    product: ir.Node
    guard: ir.Node | None
    joined: ir.Node
    nodes: tuple[ir.Node, ...]


def likely(main: ir.Graph) -> bool:
    """Whether some Softmax stands between two products, in whatever spelling; shapes need not be known."""
    return any(
        _reaches(node, upwards=True) and _reaches(node, upwards=False) for node in main if _is_softmax(node, None)
    )


def _reaches(softmax: ir.Node, upwards: bool) -> bool:
    level = [softmax]
    for _ in range(_DEPTH):
        if upwards:
            near = [v.producer() for node in level for v in node.inputs if v is not None]
        else:
            near = [user for node in level for v in node.outputs for user in v.consumers()]
        found = [node for node in near if node is not None]
        if any(graph.is_standard(node, "MatMul") for node in found):
            return True
        level = [node for node in found if graph.is_standard(node, *_BETWEEN)]
    return False


def find(softmax: ir.Node) -> Attention | None:
    """The attention whose weights `softmax` makes; None for any other Softmax, and in any form that is not followed.

    Weights and scores that are read elsewhere, keys from a cache and heads that are not of one size are not followed.
    """
    weights = softmax.outputs[0]
    product = _only_reader(weights, "MatMul")
    if not _is_softmax(softmax, weights) or product is None or product.inputs[0] is not weights:
        return None
    values, scores = _heads(product.inputs[1], _FRONT), softmax.inputs[0]
    if values is None or values.scale != 1 or scores is None:
        return None
    for raw, masks, adds in _unmasked(scores):
        read = _scores(raw)
        if read is None:
            continue
        queries, keys, inner, scale = read
        scale *= queries.scale * keys.scale
        end = _end(product, queries, values.size)
        if end is not None and queries.count == keys.count == values.count and scale > 0:
            sources = (queries.source, keys.source, values.source)
            nodes = (product, softmax, *adds, *inner)
            return Attention(*sources, masks, values.count, scale, product, *end, nodes)
    return None


def _unmasked(scores: ir.Value) -> Iterator[tuple[ir.Value, tuple[ir.Value, ...], tuple[ir.Node, ...]]]:
    """What may be the scores before masks were added, up to two, those masks, and the nodes that add them."""
    pending: list[tuple[ir.Value, tuple[ir.Value, ...], tuple[ir.Node, ...]]] = [(scores, (), ())]
    while pending:
        value, masks, adds = pending.pop(0)
        yield value, masks, adds
        add = _maker(value, "Add", "Sum")
        if add is None or len(add.inputs) != 2 or len(masks) == _MASKS:
            continue
        for raw, mask in (add.inputs[:], add.inputs[::-1]):
            if raw is not None and mask is not None and _broadcasts(mask):
                pending.append((raw, (*masks, mask), (*adds, add)))


def _is_softmax(node: ir.Node, result: ir.Value | None) -> bool:
    """Softmax over the last axis; of rank 4 and in float32 where its `result` is given."""
    if not graph.is_standard(node, "Softmax"):
        return False
    axis = node.attributes.get_int("axis", -1)
    if result is None:
        return axis in (-1, 3)
    return axis in (-1, 3) and graph.is_float(result) and result.shape is not None and len(result.shape) == 4


def _only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """What alone reads `value`, when it is one of these and in the same graph."""
    users = value.consumers()
    if len(users) != 1 or value.is_graph_output() or users[0].graph is not value.graph:
        return None
    return users[0] if graph.is_standard(users[0], *op_types) else None


def _maker(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """What makes `value`, when it is one of these and nothing else reads that."""
    node = graph.producer(value, *op_types)
    return node if value is not None and node is not None and _only_reader(value, *_ANY) is not None else None


_ANY = ("Add", "Div", "MatMul", "Mul", "Softmax", "Sum")


@dataclasses.dataclass(frozen=True)
class _Heads:
    """`source` [batch, positions, heads x channels], how many heads, of what size, and what they are multiplied by."""

    source: ir.Value
    count: int
    size: int
    scale: float


def _scores(value: ir.Value | None) -> tuple[_Heads, _Heads, list[ir.Node], float] | None:
    """Queries, keys, nodes and scale of a product of both, perhaps scaled."""
    nodes: list[ir.Node] = []
    scale = 1.0
    while (step := _maker(value, "Mul", "Div")) is not None:
        factor = _factor(step)
        if factor is None:
            return None
        value, scale = factor[0], scale * factor[1]
        nodes.append(step)
    product = _maker(value, "MatMul")
    queries = _heads(product.inputs[0], _FRONT) if product is not None else None
    keys = _heads(product.inputs[1], _FRONT_TURNED) if product is not None else None
    if product is None or queries is None or keys is None:
        return None
    return queries, keys, [*nodes, product], scale


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The side of Mul or Div that is not one number, and what that side is multiplied by."""
    left, right = node.inputs
    number = graph.constant_scalar(right)
    if number is not None and left is not None and _alone(right):
        if node.op_type == "Mul":
            return left, number
        return (left, 1 / number) if number else None
    number = graph.constant_scalar(left)
    if number is not None and right is not None and node.op_type == "Mul" and _alone(left):
        return right, number
    return None


def _alone(number: ir.Value | None) -> bool:
    """Whether multiplying by this constant of one element adds no axes."""
    return number is not None and len(graph.run_shape(number) or ()) <= 1


def _heads(value: ir.Value | None, order: tuple[int, ...]) -> _Heads | None:
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
        factor = _factor(node)
        if factor is None:
            return None
        value, scale = factor[0], scale * factor[1]
    node = graph.producer(value, "Reshape")
    source = node.inputs[0] if node is not None else None
    if node is None or source is None or tuple(perm) != order or not graph.is_float(source):
        return None
    found = _split(node, source)
    return None if found is None else _Heads(source, *found, scale)


def _split(node: ir.Node, source: ir.Value) -> tuple[int, int] | None:
    """Heads, and channels of each, that a Reshape makes of the last of three axes, when it leaves the others."""
    before, after = source.shape, node.outputs[0].shape
    if before is None or len(before) != 3 or after is None or len(after) != 4:
        return None
    heads, size, width = after[2], after[3], before[2]
    if not (isinstance(heads, int) and isinstance(size, int)) or heads * size != width:
        return None
    # Of the two other axes, one that stays keeps the other.
    return (heads, size) if any(_stays(node, before, after, axis) for axis in (0, 1)) else None


def _stays(node: ir.Node, before: ir.Shape, after: ir.Shape, axis: int) -> bool:
    """Whether a Reshape is seen to keep the size of one of the first axes."""
    target = graph.constant(node.inputs[1])
    copied = target is not None and target[axis] == 0 and node.attributes.get_int("allowzero", 0) == 0
    return copied or graph.same_size(before[axis], after[axis])


def _end(product: ir.Node, queries: _Heads, size: int) -> tuple[ir.Node | None, ir.Node] | None:
    """The guard behind the last product, if any, and the Reshape that joins the heads again."""
    result, guard = product.outputs[0], None
    if result.is_graph_output():
        return None
    users = [user for user in result.consumers() if not graph.is_standard(user, "Shape")]
    if len(users) == 2:
        where = next((user for user in users if graph.is_standard(user, "Where")), None)
        test = graph.producer(where.inputs[0], "IsNaN") if where is not None else None
        guards = test is not None and test.inputs[0] is result and len(test.outputs[0].uses()) == 1
        if where is None or not guards or where.inputs[2] is not result or not _alone(where.inputs[1]):
            return None
        guard, result = where, where.outputs[0]
    again = _measured(result, "Reshape")
    if again is not None:
        if not _keeps(again, queries, size):
            return None
        result = again.outputs[0]
    back = _measured(result, "Transpose")
    if back is None or tuple(back.attributes.get_ints("perm", [])) != _FRONT:
        return None
    joined = _measured(back.outputs[0], "Reshape")
    if joined is None or joined.inputs[0] is not back.outputs[0]:
        return None
    return guard, joined


def _measured(value: ir.Value, op_type: str) -> ir.Node | None:
    """What alone reads `value`, but for what asks for its shape."""
    users = [user for user in value.consumers() if not graph.is_standard(user, "Shape")]
    if len(users) != 1 or value.is_graph_output() or users[0].graph is not value.graph:
        return None
    return users[0] if graph.is_standard(users[0], op_type) else None


def _keeps(node: ir.Node, queries: _Heads, size: int) -> bool:
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


def _broadcasts(mask: ir.Value) -> bool:
    """Whether the mask is a float of a known rank that can be brought to 4."""
    return graph.is_float(mask) and mask.shape is not None and len(mask.shape) <= 4
