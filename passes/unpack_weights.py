"""Split(W), Slice(W), Gather(W, i), Transpose(W), Reshape(W) of a constant -> constants, read from W when needed.

torch keeps the projections of an attention in one weight, and its newer exporter writes the nodes that take it apart.
The runtime would run them once, as it loads the model; here each part has to be a weight, or it is not quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.heads import is_default

__all__ = ["UnpackWeights"]


_SINCE = 13
"""Before this opset their arguments are attributes."""
_PARTS = ("Gather", "Slice", "Split", "Transpose")
_SHAPED = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclasses.dataclass(frozen=True)
class _Part:
    """How a part is read from the array, its shape, and what is equal for equal parts."""

    read: Callable[[NDArray[Any]], NDArray[Any]]
    shape: tuple[int, ...]
    key: str


class UnpackWeights(ir.passes.InPlacePass):
    """Parts of a constant become constants.

    Refused: constants that something else reads, too, or whose parts overlap, which would make the model larger; parts
    that are outputs; what is chosen by numbers that are not constant; shapes that are not known.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        if model.graph.opset_imports.get("", 0) < _SINCE:
            return ir.passes.PassResult(model, False)
        names, refused = graph.value_names(main), set[ir.Value]()
        changed = False
        # What a part of a part is made of is there once its own turn comes: nodes are in order.
        for node in [node for node in main if graph.is_standard(node, *_PARTS, *_SHAPED)]:
            source = node.inputs[0] if node.inputs else None
            if source is None or source in refused:
                continue
            if self._unpack(main, source, names):
                changed = True
            else:
                refused.add(source)
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    @staticmethod
    def _unpack(main: ir.Graph, source: ir.Value, names: set[str]) -> bool:
        """Whether `source` was taken apart."""
        shape = graph.run_shape(source) if graph.has_constant(source) else None
        if source.dtype in (None, ir.DataType.STRING) or not shape or source.is_graph_output():
            return False
        found = [(user, _parts(user, shape)) for user in source.consumers()]
        # Layers that share a weight take the same parts of it.
        sizes = {part.key: prod(part.shape) for _, parts in found for part in parts}
        if not sizes or not all(parts for _, parts in found) or sum(sizes.values()) > prod(shape):
            return False
        if any(user.inputs[0] is not source or user.graph is not main for user, _ in found):
            return False
        if any(output.is_graph_output() for user, _ in found for output in user.outputs):
            return False
        known: dict[str, ir.Value] = {}
        for user, parts in found:
            for output, part in zip(user.outputs, parts, strict=True):
                # Free for the constant, which is known by what it was called.
                name, output.name = output.name or "", None
                if part.key not in known:
                    name = name or graph.fresh_name(f"{source.name}_part", names)
                    known[part.key] = weights.moved(main, source, part.read, part.shape, name)
                output.replace_all_uses_with(known[part.key])
            main.remove(user, safe=True)
        return True


def _parts(node: ir.Node, shape: tuple[int, ...]) -> list[_Part]:
    """How each output of `node` is read from an array of this shape; empty where that is not known."""
    if any(is_default(given) for given in node.inputs[1:]):
        return []
    if graph.is_standard(node, "Split"):
        return _split(node, shape)
    if graph.is_standard(node, *_SHAPED):
        after = graph.run_shape(node.outputs[0])
        if after is None or prod(after) != prod(shape):
            return []
        return [_Part(lambda array: array.reshape(after), after, f"as {after}")]
    if not graph.is_standard(node, *_PARTS):
        return []
    read = {"Gather": _gather, "Slice": _slice, "Transpose": _transpose}[node.op_type]
    return [one] if (one := read(node, shape)) is not None else []


def _split(node: ir.Node, shape: tuple[int, ...]) -> list[_Part]:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    count, told = len(node.outputs), node.inputs[1] if len(node.inputs) > 1 else None
    if told is None:
        # The last is smaller where it does not come out even.
        each = -(-shape[axis] // count)
        lengths = [min(each, shape[axis] - each * k) for k in range(count)]
    else:
        numbers = graph.constant(told)
        lengths = [] if numbers is None else [int(number) for number in numbers]
    if len(lengths) != count or sum(lengths) != shape[axis] or min(lengths) < 0:
        return []
    ends = np.cumsum(lengths).tolist()
    return [_cut(shape, {axis: slice(end - length, end, 1)}) for end, length in zip(ends, lengths, strict=True)]


def _slice(node: ir.Node, shape: tuple[int, ...]) -> _Part | None:
    given = list(node.inputs[1:]) + [None] * (5 - len(node.inputs))
    numbers = [None if value is None else graph.constant(value) for value in given]
    if any(value is not None and array is None for value, array in zip(given, numbers, strict=True)):
        return None
    starts, ends, axes, steps = numbers
    if starts is None or ends is None:
        return None
    along = range(len(starts)) if axes is None else (int(axis) % len(shape) for axis in axes)
    by = np.ones(len(starts), int) if steps is None else steps
    if any(step < 1 for step in by):
        return None
    cuts = {
        axis: slice(*slice(int(start), int(end), int(step)).indices(shape[axis]))
        for axis, start, end, step in zip(along, starts, ends, by, strict=True)
    }
    return _cut(shape, cuts)


def _gather(node: ir.Node, shape: tuple[int, ...]) -> _Part | None:
    axis, index = node.attributes.get_int("axis", 0) % len(shape), graph.constant(node.inputs[1])
    if index is None or index.ndim != 0 or not -shape[axis] <= int(index) < shape[axis]:
        return None
    return _cut(shape, {axis: int(index)})


def _transpose(node: ir.Node, shape: tuple[int, ...]) -> _Part:
    order = list(node.attributes.get_ints("perm", range(len(shape))[::-1]))
    return _Part(lambda array: array.transpose(order), tuple(shape[axis] for axis in order), f"by {order}")


def _cut(shape: tuple[int, ...], cuts: dict[int, slice] | dict[int, int]) -> _Part:
    where = tuple(cuts.get(axis, slice(None)) for axis in range(len(shape)))
    # Of an array of one number that takes no memory, whatever its shape.
    size = np.broadcast_to(np.int8(0), shape)[where].shape
    return _Part(lambda array: array[where], size, f"at {where}")
