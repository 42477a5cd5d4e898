"""Attention in parts: softmax(scale q k' + mask) v for each head, with the moves of heads around it.

Vaswani et al., "Attention Is All You Need", 2017, section 3.2. Exporters split the channels of queries, keys and values
into heads (Reshape), bring the heads to the front (Transpose), and undo both behind the last product.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.heads import FRONT, TURNED, Heads, alone, ended, factor, split

__all__ = ["LOW", "Attention", "Step", "between", "find", "likely", "upwards", "within"]

LOW = np.float32(-3e38)
"""Beside it scores are nothing, and yet the operator does not take it for what hides a row altogether."""

_Dim = int | ir.SymbolicDim

_BETWEEN = ("Add", "Cast", "Div", "Identity", "Max", "Mul", "Reshape", "Sub", "Sum", "Where")
_MASKS = 2
_CUT = re.compile(r"Min\((?:[2-9]|\d\d+), (.+)\)")
_BEYOND = -1e30
"""Whatever is added to numbers below this, it leaves them in float32 as they are, as long as it is a score."""
_FAR = 12
_DEPTH = 8
"""Operators between Softmax and the products around it, at most."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention reads and makes.

    Attributes:
        queries, keys, values: [batch, positions, heads x channels of a head].
        one_batch: whether these three are seen to be of one batch.
        masks: what is added to the scores, last first, of shapes that broadcast to [batch, heads, queries, keys].
        floor: a number below all scores that scores are brought up to behind the masks, or None.
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
    one_batch: bool
    masks: tuple[ir.Value, ...]
    floor: float | None
    heads: int
    scale: float
    product: ir.Node
    guard: ir.Node | None
    joined: ir.Node
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """An operator between the first product and Softmax, and the side on which the scores come in."""

    node: ir.Node
    side: int


def likely(main: ir.Graph) -> bool:
    """Whether some Softmax stands between two products, in whatever spelling; shapes need not be known."""
    return any(map(between, main))


def between(node: ir.Node) -> bool:
    """Whether `node` is a Softmax between two products."""
    return _is_softmax(node, None) and _reaches(node, upwards=True) and _reaches(node, upwards=False)


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
    product = graph.only_reader(weights, "MatMul")
    if not _is_softmax(softmax, weights) or product is None or product.inputs[0] is not weights:
        return None
    values, scores = split(product.inputs[1], FRONT), softmax.inputs[0]
    if values is None or values.scale != 1 or scores is None:
        return None
    scores, bounding = _unbounded(scores)
    for raw, masks, adds in _unmasked(scores):
        read = _scores(raw)
        if read is None:
            continue
        queries, keys, inner, scale = read
        scale *= queries.scale * keys.scale
        end = ended(product, queries, values.size)
        fits = queries.count == keys.count == values.count and np.float32(scale) > 0 and np.isfinite(np.float32(scale))
        if end is not None and fits:
            sources = (queries.source, keys.source, values.source)
            floors = [graph.constant_scalar(one) for one in (bounding.inputs if bounding is not None else ())]
            floor = next((one for one in floors if one is not None), None)
            nodes = (product, softmax, *([] if bounding is None else [bounding]), *adds, *inner)
            alike = _alike(queries, keys) and _alike(keys, values)
            return Attention(*sources, alike, masks, floor, values.count, scale, product, *end, nodes)
    return None


def upwards(scores: ir.Value | None) -> tuple[ir.Node, list[Step]] | None:
    """The product that makes scores, and what is between, first to last; nothing else reads what any of them makes."""
    pending: list[tuple[ir.Value | None, list[Step]]] = [(scores, [])]
    while pending:
        value, steps = pending.pop(0)
        node = graph.producer(value, "MatMul", "Reshape", "Add", "Sum", "Max", "Mul", "Div")
        if value is None or node is None or len(steps) == _FAR or graph.only_reader(value) is None:
            continue
        if node.op_type == "MatMul":
            return node, steps
        if node.op_type in ("Mul", "Div"):
            found = factor(node)
            sides = [] if found is None else [k for k, one in enumerate(node.inputs) if one is found[0]]
        else:
            sides = [0] if node.op_type == "Reshape" else list(range(len(node.inputs))) if len(node.inputs) == 2 else []
        pending.extend((node.inputs[side], [Step(node, side), *steps]) for side in sides)
    return None


def _alike(one: Heads, other: Heads) -> bool:
    """Whether both are seen to be of one batch."""
    return any(graph.same_size(left, right) for left in one.batch for right in other.batch)


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
            if raw is not None and mask is not None and raw is not mask and _broadcasts(mask):
                pending.append((raw, (*masks, mask), (*adds, add)))


def _unbounded(scores: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """Scores before a Max kept them from where no score is, and that Max."""
    node = _maker(scores, "Max")
    for value, other in () if node is None or len(node.inputs) != 2 else (node.inputs[:], node.inputs[::-1]):
        number = graph.constant_scalar(other)
        if value is not None and number is not None and number <= _BEYOND and alone(other):
            return value, node
    return scores, None


def _is_softmax(node: ir.Node, result: ir.Value | None) -> bool:
    """Softmax over the last axis; of rank 4 and in float32 where its `result` is given."""
    if not graph.is_standard(node, "Softmax"):
        return False
    axis, shape = node.attributes.get_int("axis", -1), node.outputs[0].shape
    if axis != -1 and axis not in ((2, 3) if shape is None else (len(shape) - 1,)):
        return False
    return result is None or (graph.is_float(result) and shape is not None and len(shape) == 4)


def _maker(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """What makes `value`, when it is one of these and nothing else reads that."""
    node = graph.producer(value, *op_types)
    return node if value is not None and node is not None and graph.only_reader(value, *_ANY) is not None else None


_ANY = ("Add", "Div", "MatMul", "Max", "Mul", "Softmax", "Sum")


def _scores(value: ir.Value | None) -> tuple[Heads, Heads, list[ir.Node], float] | None:
    """Queries, keys, nodes and scale of a product of both, perhaps scaled."""
    nodes: list[ir.Node] = []
    scale = 1.0
    while (step := _maker(value, "Mul", "Div")) is not None:
        found = factor(step)
        if found is None:
            return None
        value, scale = found[0], scale * found[1]
        nodes.append(step)
    product = _maker(value, "MatMul")
    queries = split(product.inputs[0], FRONT) if product is not None else None
    keys = split(product.inputs[1], TURNED) if product is not None else None
    if product is None or queries is None or keys is None:
        return None
    return queries, keys, [*nodes, product], scale


def _broadcasts(mask: ir.Value) -> bool:
    """Whether the mask is a float of a known rank that can be brought to 4."""
    return graph.is_float(mask) and mask.shape is not None and len(mask.shape) <= 4


def within(mask: ir.Value, whole: tuple[_Dim, ...]) -> bool:
    """Whether adding a mask is seen not to repeat scores of these sizes: [batch, heads, queries, keys].

    Of keys nothing need be seen: weights for more of them than there are values could not be multiplied.
    """
    dims = [] if mask.shape is None else list(mask.shape.dims)
    return all(_fits(dim, size) for dim, size in zip(dims[-2::-1], whole[-2::-1], strict=False))


def _fits(dim: _Dim, size: _Dim) -> bool:
    """Whether a mask's dimension is seen to be 1 or `size`, or has no name to tell it by and cannot well be another."""
    if dim == 1 or graph.same_size(dim, size):
        return True
    # A longer one adds to none of these scores: what a mask of so many at most is cut to, as torch's exporter calls it.
    if not isinstance(dim, int) and (found := _CUT.fullmatch(str(dim.value))) and found[1] == str(size):
        return True
    if isinstance(dim, int) or size == 1:
        return False
    return isinstance(size, int) or not (graph.is_named(dim) and graph.is_named(size))
