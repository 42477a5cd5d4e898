"""Nodes that make a constant out of a smaller one: the runtime's constant folding runs them once, as it loads a model.

Only operators that have been in every opset and every runtime for years are used, so that the file stays plain ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from qgraph import graph, weights
from qgraph.targets import FOLDED

__all__ = ["Folded"]


class Folded:
    """Writes such nodes before everything else in a graph.

    Args:
        main: the graph.
        before: the node before which they stand.
        reader: name of the node that reads what they make.
        base: what names begin with.
        names: taken names, to which the new ones are added.
        tables: what is looked up for several weights, by name; new ones are added.
    """

    def __init__(
        self, main: ir.Graph, before: ir.Node, reader: str, base: str, names: set[str], tables: dict[str, ir.Value]
    ):
        self._main, self._before, self._reader, self._base, self._names = main, before, reader, base, names
        self._tables = tables

    def table(self, array: ArrayLike, what: str) -> ir.Value:
        """A constant that is the same for all weights, and there once."""
        if what not in self._tables:
            name = graph.fresh_name(what, self._names)
            self._tables[what] = graph.add_initializer(self._main, ir.Tensor(np.asarray(array)), name)
        return self._tables[what]

    def constant(self, array: ArrayLike, what: str) -> ir.Value:
        """A new constant."""
        name = graph.fresh_name(f"{self._base}_{what}", self._names)
        return graph.add_initializer(self._main, ir.Tensor(np.asarray(array)), name)

    def derived(
        self,
        source: ir.Value,
        function: Callable[[NDArray[Any]], NDArray[Any]],
        kind: ir.DataType,
        shape: tuple[int, ...],
        what: str,
    ) -> ir.Value:
        """A new constant that is `function` of a constant, evaluated when the file is written."""
        name = graph.fresh_name(f"{self._base}_{what}", self._names)
        return weights.derived(self._main, source, function, kind, shape, name)

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        kind: ir.DataType,
        shape: tuple[int, ...] | None = None,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """A new operator's output."""
        name = graph.fresh_name(f"{self._base}_{op_type}", self._names)
        made = ir.Node("", op_type, inputs, attributes=attributes or [], name=name)
        value = made.outputs[0]
        value.name = graph.fresh_name(f"{name}_output", self._names)
        value.type = ir.TensorType(kind)
        value.shape = ir.Shape(shape) if shape is not None else None
        made.meta[FOLDED] = self._reader
        self._main.insert_before(self._before, made)
        return value

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """The same numbers in another type."""
        shape = graph.run_shape(value)
        return self.node("Cast", [value], kind, shape, [ir.AttrInt64("to", int(kind))])

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """The same numbers in another shape."""
        assert value.dtype is not None
        known = None if -1 in shape else shape
        return self.node("Reshape", [value, self.constant(np.array(shape, np.int64), "shape")], value.dtype, known)

    def first(self, value: ir.Value, count: int, axis: int = 0) -> ir.Value:
        """The first `count` along an axis."""
        assert value.dtype is not None
        ends = [
            self.constant(np.array([n], np.int64), what) for n, what in ((0, "start"), (count, "end"), (axis, "axis"))
        ]
        return self.node("Slice", [value, *ends], value.dtype)
