"""x * cos + concat(-x2, x1) * sin -> RotaryEmbedding(x), where x = concat(x1, x2) on the last axis.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.4.2, in the spelling with
rotated halves. The cosines and sines stay as the model computes them, once, and become the operator's tables: their
rows are then the positions, so that any positions, scaled frequencies and batches of their own positions are the same.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.targets import Target

__all__ = ["FuseRotary"]

_LOG = logging.getLogger(__name__)
_OPERATOR = "RotaryEmbedding"
_ELEMENTWISE = ("Cast", "Cos", "Identity", "Sin", "Unsqueeze")


@dataclasses.dataclass
class _Rotation:
    """x of shape [batch, heads, positions, size], and its angles, which broadcast to [batch, 1, positions, size]."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


class FuseRotary(ir.passes.InPlacePass):
    """Rotary position embeddings in primitives become one operator, for targets that name it among the fast ones.

    Refused: tables whose halves are not seen to be equal, angles that differ between heads, x of unknown rank or size,
    positions per batch whose batch is not seen to be that of x. Reasons go to the debug log.

    Args:
        target: where the model will run; None for the runtime's operators without a target's opinion.
    """

    def __init__(self, target: Target | None = None):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.target is not None and _OPERATOR not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        tables = _Tables(model.graph)
        changed = False
        for node in list(model.graph):
            found = _match(node) if graph.is_standard(node, "Add") else None
            if found is not None:
                reason = tables.refusal(found)
                if reason is None:
                    inputs = [found.x, tables.positions(found), tables.rows(found.cos), tables.rows(found.sin)]
                    new = ir.Node("com.microsoft", _OPERATOR, inputs)
                    graph.replace_node(model.graph, node, new)
                    new.outputs[0].shape = found.x.shape
                    changed = True
                else:
                    _LOG.debug("%s: no %s: %s", graph.label(node), _OPERATOR, reason)
        if changed:
            model.graph.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, changed)


def _match(add: ir.Node) -> _Rotation | None:
    products = [graph.producer(v, "Mul") for v in add.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            return None
        for at in (0, 1):
            x = _rotated(graph.producer(turned.inputs[at], "Concat"))
            if x is not None and x in plain.inputs:
                cos, sin = plain.inputs[1] if plain.inputs[0] is x else plain.inputs[0], turned.inputs[1 - at]
                return None if cos is None or sin is None else _Rotation(x, cos, sin)
    return None


def _rotated(concat: ir.Node | None) -> ir.Value | None:
    """The x of concat(-x2, x1)."""
    if concat is None or len(concat.inputs) != 2:
        return None
    negated = graph.producer(concat.inputs[0], "Neg")
    second, first = (negated.inputs[0] if negated is not None else None), concat.inputs[1]
    if second is None or first is None:
        return None
    split = graph.producer(first, "Split")
    node = split or graph.producer(first, "Slice")
    x = node.inputs[0] if node is not None else None
    if x is None or not graph.is_float(x) or x.shape is None or len(x.shape) != 4:
        return None
    size = x.shape[3]
    if not isinstance(size, int) or size % 2 or concat.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    if split is not None:
        halves = [None if v.shape is None else v.shape[3] for v in split.outputs]
        right = list(split.outputs) == [first, second] and split.attributes.get_int("axis", 0) in (-1, 3)
        return x if right and halves == [size // 2] * 2 else None
    right = _slices(first, x, 0, size // 2, size) and _slices(second, x, size // 2, size, size)
    return x if right else None


def _slices(value: ir.Value, x: ir.Value, start: int, end: int, size: int) -> bool:
    """Whether `value` is x[..., start:end]."""
    node = graph.producer(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    starts, ends, axes = (graph.constant_scalar(v) for v in node.inputs[1:4])
    step = 1.0 if len(node.inputs) < 5 or node.inputs[4] is None else graph.constant_scalar(node.inputs[4])
    if starts is None or ends is None or axes not in (-1, 3) or step != 1:
        return False
    bounds = [int(b + size) if b < 0 else int(min(b, size)) for b in (starts, ends)]
    return bounds == [start, end]


class _Tables:
    """The angles as tables of two dimensions, each made once, however many layers read them."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._names = graph.value_names(main)
        self._rows: dict[ir.Value, ir.Value] = {}
        self._positions: dict[ir.Value | None, ir.Value] = {}

    def refusal(self, found: _Rotation) -> str | None:
        """Why these angles cannot be tables; None when they can."""
        x = found.x.shape
        batches: list[int | ir.SymbolicDim] = []
        for angles in (found.cos, found.sin):
            shape = _four(angles)
            if x is None or shape is None or shape[1] != 1 or shape[3] != x[3]:
                return f"{angles.name} is not [batch, 1, positions, size]"
            if shape[2] == 1 and x[2] != 1:
                return f"{angles.name} has one position, x has more"
            if not _equal_halves(angles):
                return f"the halves of {angles.name} may differ"
            if shape[0] != 1 and not _same(shape[0], x[0]):
                return f"the batch of {angles.name} may not be that of x"
            if shape[0] != 1 and _source(angles) is angles:
                return f"{angles.name} has positions for each batch in a form that is not known"
            batches.append(shape[0])
        return None if batches[0] == batches[1] else "cosines and sines have different batches"

    def rows(self, angles: ir.Value) -> ir.Value:
        """[batch * positions, size / 2]."""
        source = _source(angles)
        if source not in self._rows:
            size = angles.shape[-1] if angles.shape is not None else 0
            half = int(size) // 2 if isinstance(size, int) else 0
            array = graph.constant(source)
            if array is not None:
                rows = np.ascontiguousarray(array[..., :half].reshape(-1, half))
                self._rows[source] = self._constant(rows, f"{source.name}_rows")
            else:
                numbers = (self._constant(np.array([n]), f"{source.name}_{n}") for n in (0, half, -1))
                part = self._node("Slice", [source, *numbers], f"{source.name}_half")
                shape = self._constant(np.array([-1, half]), f"{source.name}_rows_shape")
                self._rows[source] = self._node("Reshape", [part, shape], f"{source.name}_rows")
        return self._rows[source]

    def positions(self, found: _Rotation) -> ir.Value:
        """Which row belongs to which position: [1] for the first row, or [batch, positions]."""
        dims = _four(found.cos)
        source = None if dims is not None and dims[0] == 1 else _source(found.cos)
        if source not in self._positions:
            if source is None:
                self._positions[None] = self._constant(np.array([0]), "rotary_first_row")
            else:
                name = f"{source.name}_positions"
                zero, one = (self._constant(np.array(n), f"{name}_{n}") for n in (0, 1))
                shape = self._node("Shape", [source], f"{name}_shape", [ir.AttrInt64("end", 2)])
                count = self._node("ReduceProd", [shape], f"{name}_count", [ir.AttrInt64("keepdims", 0)])
                steps = self._node("Range", [zero, count, one], f"{name}_range")
                self._positions[source] = self._node("Reshape", [steps, shape], name)
        return self._positions[source]

    def _constant(self, array: np.ndarray, name: str) -> ir.Value:
        return graph.add_initializer(self._main, ir.tensor(array), graph.fresh_name(name, self._names))

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, attributes: list[ir.Attr] | None = None
    ) -> ir.Value:
        node = ir.Node("", op_type, inputs, attributes or [], name=graph.fresh_name(name, self._names))
        node.outputs[0].name = node.name
        integers = op_type in ("Shape", "ReduceProd", "Range") or "_positions" in name
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64 if integers else ir.DataType.FLOAT)
        self._main.append(node)
        return node.outputs[0]


def _four(angles: ir.Value) -> list[int | ir.SymbolicDim] | None:
    """The shape with the leading ones that broadcasting adds; None when it is not known or longer than four."""
    shape = None if angles.shape is None else list(angles.shape)
    return None if shape is None or len(shape) > 4 else [*[1] * (4 - len(shape)), *shape]


def _same(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    return one == other and (isinstance(one, int) or one.value is not None)


def _source(angles: ir.Value) -> ir.Value:
    """[batch, positions, size], before each layer adds the axis of heads."""
    node = graph.producer(angles, "Unsqueeze")
    axes = graph.constant(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    source = node.inputs[0] if node is not None else None
    return source if source is not None and axes is not None and axes.tolist() == [1] else angles


def _equal_halves(value: ir.Value | None) -> bool:
    """Whether the two halves of the last axis are seen to hold the same numbers."""
    for _ in range(16):
        if value is None:
            return False
        array = graph.constant(value)
        if array is not None:
            half = array.shape[-1] // 2 if array.ndim else 0
            equal = array.ndim > 1 and bool(np.array_equal(array[..., :half], array[..., half:]))
            graph.release(value)
            return equal
        node = value.producer()
        if node is None:
            return False
        if graph.is_standard(node, "Concat"):
            rank = len(value.shape) if value.shape is not None else 0
            last = node.attributes.get_int("axis", 0) in (-1, rank - 1)
            return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if graph.is_standard(node, "Mul", "Div"):
            scalar = graph.constant_scalar(node.inputs[1]) is not None
            value = node.inputs[0] if scalar or node.op_type == "Div" else node.inputs[1]
            other = node.inputs[1] if scalar or node.op_type == "Div" else node.inputs[0]
            if graph.constant_scalar(other) is None:
                return False
        elif graph.is_standard(node, "Gather"):
            table = node.inputs[0]
            outer = table is not None and table.shape is not None and len(table.shape) > 1
            if not outer or node.attributes.get_int("axis", 0) != 0:
                return False
            value = table
        elif graph.is_standard(node, *_ELEMENTWISE) and _keeps_last(node):
            value = node.inputs[0]
        else:
            return False
    return False


def _keeps_last(node: ir.Node) -> bool:
    """Whether the last axis of the output is that of the input."""
    if node.op_type != "Unsqueeze":
        return True
    out = node.outputs[0].shape
    axes = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return out is not None and axes is not None and not {-1, len(out) - 1} & {int(a) for a in axes.reshape(-1)}
