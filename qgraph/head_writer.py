"""Heads written the plain way: one Reshape and one Transpose from [batch, positions, heads x channels], and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.head_reads import HeadRead
from qgraph.heads import FRONT

__all__ = ["HeadWriter"]

_Dim = int | ir.SymbolicDim
_SWAP = (1, 0, 2)
"""Positions to the front, or back."""


class HeadWriter:
    """Adds operators to a graph, to be sorted in the end; parts of one tensor are taken from it once."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._names = graph.value_names(main)
        self._made: dict[tuple[object, ...], list[ir.Value]] = {}

    def heads(self, read: HeadRead, batch: _Dim | None = None) -> ir.Value:
        """[batch, heads, positions, channels] in the order of the read; `batch` is another name of that size."""
        source, number, count = read.source, *read.part
        assert source.shape is not None
        width = read.heads * read.size
        lead = list(source.shape[:2])
        if count > 1:
            lengths = self.constant(f"{source.name}_parts", *[width] * count)
            shapes = [[*lead, width]] * count
            parts = self.node("Split", [source, lengths], shapes, [ir.AttrInt64("axis", 2)], ("Split", source, count))
            source = parts[number]
        if read.swapped:
            lead.reverse()
            source = self.swapped(source, [*lead, width])
        target = self.constant("heads_shape", 0, 0, read.heads, read.size)
        split = [lead[0] if batch is None else batch, lead[1], read.heads, read.size]
        [apart] = self.node("Reshape", [source, target], [split], key=("Heads", source, read.heads, split[0]))
        ordered = [split[axis] for axis in read.order]
        return self.node("Transpose", [apart], [ordered], [_perm(read.order)], ("Order", apart, read.order))[0]

    def swapped(self, value: ir.Value, shape: list[_Dim]) -> ir.Value:
        """[first, second, columns] as [second, first, columns], of this shape."""
        return self.node("Transpose", [value], [shape], [_perm(_SWAP)], ("Swap", value))[0]

    def rows(self, result: ir.Value, shape: list[_Dim]) -> ir.Value:
        """[batch, heads, positions, channels] as [batch, positions, heads x channels].

        Args:
            result: what the last product made.
            shape: [batch, positions, heads, channels], the last two as numbers.
        """
        [front] = self.node("Transpose", [result], [shape], [_perm(FRONT)])
        heads, size = shape[2:]
        assert isinstance(heads, int) and isinstance(size, int)
        target = self.constant("rows_shape", 0, 0, heads * size)
        return self.node("Reshape", [front, target], [[*shape[:2], heads * size]])[0]

    def join(self, joined: ir.Node, result: ir.Value, shape: list[_Dim], swapped: bool, whole: bool) -> None:
        """Bring heads together where the Reshape `joined` did.

        Args:
            joined: it reads these numbers in this order, by whatever moves of axes.
            result, shape: as in `rows`.
            swapped: whether positions come first behind it.
            whole: whether it makes three axes; else it stays, and makes what it did.
        """
        made = self.rows(result, shape)
        if swapped:
            assert made.shape is not None
            made = self.swapped(made, [made.shape[1], made.shape[0], made.shape[2]])
        node = made.producer()
        assert node is not None
        if whole:
            graph.replace_node(self._main, joined, node)
        else:
            joined.replace_input_with(0, made)

    def constant(self, base: str, *numbers: int) -> ir.Value:
        """A vector of sizes, written once."""
        key = (base, *numbers)
        if key not in self._made:
            tensor = ir.tensor(np.array(numbers, np.int64))
            self._made[key] = [graph.add_initializer(self._main, tensor, graph.fresh_name(base, self._names))]
        return self._made[key][0]

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        shapes: list[list[_Dim]],
        attributes: list[ir.Attr] | None = None,
        key: tuple[object, ...] = (),
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> list[ir.Value]:
        """The results of a new operator, or of the one that was made under this key."""
        if key and key in self._made:
            return self._made[key]
        assert inputs[0] is not None
        name = graph.fresh_name(f"{inputs[0].name}_{op_type.lower()}", self._names)
        node = ir.Node("", op_type, inputs, attributes or [], num_outputs=len(shapes), name=name)
        for output, shape in zip(node.outputs, shapes, strict=True):
            output.name = graph.fresh_name(f"{name}_output", self._names)
            output.type, output.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._main.append(node)
        if key:
            self._made[key] = list(node.outputs)
        return list(node.outputs)


def _perm(order: tuple[int, ...]) -> ir.Attr:
    return ir.AttrInt64s("perm", order)
