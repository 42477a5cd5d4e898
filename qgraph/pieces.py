"""New nodes of a graph, each put before one of its nodes, with names, types and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from qgraph import graph

__all__ = ["Dims", "Pieces", "dims", "free"]

Dims: TypeAlias = "list[int | ir.SymbolicDim]"
_NONE: Mapping[str, int | Sequence[int]] = MappingProxyType({})


class Pieces:
    """Writes nodes before `at`, which is set anew for each place.

    Args:
        main: the graph, which is not empty.
    """

    def __init__(self, main: ir.Graph):
        self.main = main
        self.names = graph.value_names(main)
        self.at = main[0]

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Dims,
        attributes: Mapping[str, int | Sequence[int]] = _NONE,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
    ) -> ir.Value:
        """The output of a new standard operator."""
        return self.ops(op_type, inputs, [shape], attributes, dtype)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shapes: Sequence[Dims],
        attributes: Mapping[str, int | Sequence[int]] = _NONE,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
    ) -> Sequence[ir.Value]:
        """All outputs of a new standard operator."""
        made = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", op_type, inputs, made, num_outputs=len(shapes), name=self.name(op_type.lower()))
        return self.place(node, shapes, dtype)

    def place(self, node: ir.Node, shapes: Sequence[Dims], dtype: ir.DataType | None) -> Sequence[ir.Value]:
        """The outputs of `node`, which has a name, after it was put into the graph."""
        for value, sizes in zip(node.outputs, shapes, strict=True):
            value.name, value.shape = graph.fresh_name(f"{node.name}_output", self.names), ir.Shape(sizes)
            value.type = None if dtype is None else ir.TensorType(dtype)
        self.main.insert_before(self.at, node)
        return node.outputs

    def shape(self, x: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        """Dimensions of `x` from `start` to before `end`, as they are in a run."""
        attributes = {"start": start} if end is None else {"start": start, "end": end}
        return self.op("Shape", [x], [len(dims(x)[start:end])], attributes, ir.DataType.INT64)

    def ints(self, numbers: Iterable[int] | int) -> ir.Value:
        """A constant of int64: a scalar, or one dimension."""
        array = np.array(numbers if isinstance(numbers, int) else list(numbers), np.int64)
        return graph.add_initializer(self.main, ir.Tensor(array), self.name("ints"))

    def name(self, what: str) -> str:
        """A new name."""
        return graph.fresh_name(f"{graph.label(self.at)}_{what}", self.names)


def dims(x: ir.Value) -> Dims:
    """The dimensions of a value of known rank."""
    assert x.shape is not None, "the rank was looked at"
    return list(x.shape)


def free(count: int) -> Dims:
    """So many dimensions of which nothing is known."""
    return [ir.SymbolicDim(None) for _ in range(count)]
