"""Heads that came by way of a flattened batch -> Reshape [batch, positions, heads, channels] and one Transpose.

torch's nn.MultiheadAttention computes with positions first, takes queries, keys and values from one tensor by five
moves, and splits off the heads together with the batch (torch 2.13, both exporters). What is moved to where is read off
the axes, in whatever steps; then it is written the way that `FuseAttention` and most runtimes know.
"""

from __future__ import annotations

import dataclasses
from math import prod

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, sizes
from qgraph.attention import between, within
from qgraph.axes import Atom, trace
from qgraph.heads import FRONT, TURNED, factor, is_default
from qgraph.targets import Target

__all__ = ["PlainHeads"]

_SWAP, _BACK = (1, 0, 2), (2, 0, 1, 3)
"""Positions to the front or back; how heads go back where positions come first."""
_SINCE = 13
"""Before this opset the sizes of a Split are an attribute."""
_FAR = 8
"""Values between Softmax and the first product, at most."""


@dataclasses.dataclass(frozen=True)
class _Read:
    """How `value`, [batch, heads, positions, channels] in some order, is read from `source`, of three axes.

    Attributes:
        heads, size: how many, and channels of each.
        swapped: whether positions come first in the source.
        part: which of how many parts, one after the other along the source's last axis.
        plain: whether it is read by one Reshape and Transposes from [batch, positions, heads x channels], which may be
            the other way round before.
    """

    value: ir.Value
    source: ir.Value
    heads: int
    size: int
    order: tuple[int, ...]
    swapped: bool
    part: tuple[int, int]
    plain: bool

    @property
    def batch(self) -> int | ir.SymbolicDim:
        """Its size or name."""
        return self._lead[self.swapped]

    @property
    def positions(self) -> int | ir.SymbolicDim:
        """How many, or the name of that."""
        return self._lead[not self.swapped]

    @property
    def _lead(self) -> tuple[int | ir.SymbolicDim, ...]:
        assert self.source.shape is not None
        return self.source.shape[:2]


class PlainHeads(ir.passes.InPlacePass):
    """Queries, keys and values of an attention come by one Reshape and one Transpose, and its result goes so.

    Left alone: targets without an operator for attention; what is read and written the plain way already, and whatever
    is not seen to be heads, since a size has no name or its parts are not one after the other.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.target.attention is None or model.graph.opset_imports.get("", 0) < _SINCE:
            return ir.passes.PassResult(model, False)
        writer = _Writer(model.graph)
        changed = [writer.plain(node) for node in list(model.graph) if between(node)]
        if any(changed):
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, any(changed))


def _products(softmax: ir.Node) -> tuple[ir.Node, ir.Node, list[ir.Value]] | None:
    """The products before and behind, and the masks between the first and Softmax."""
    last = graph.only_reader(softmax.outputs[0], "MatMul")
    pending: list[tuple[ir.Value | None, list[ir.Value]]] = [(softmax.inputs[0], [])]
    for _ in range(_FAR):
        value, masks = pending.pop(0) if pending else (None, [])
        value = _unscaled(value)
        first = graph.producer(value, "MatMul")
        if first is not None:
            return None if last is None or last is first else (first, last, masks)
        add = graph.producer(value, "Add", "Sum")
        given = [one for one in (add.inputs if add is not None else ()) if one is not None]
        pending.extend((one, [*masks, *(other for other in given if other is not one)]) for one in given)
    return None


def _unscaled(value: ir.Value | None) -> ir.Value | None:
    """`value` before it was multiplied by numbers."""
    while (node := graph.producer(value, "Mul", "Div")) is not None and (found := factor(node)) is not None:
        value = found[0]
    return value


def _read(value: ir.Value | None, order: tuple[int, ...]) -> _Read | None:
    """How heads are read; None where they are not seen to be."""
    moved = trace(value, 3)
    if value is None or moved is None or len(moved.after) != 4:
        return None
    if any(is_default(given) for node in moved.steps for given in node.inputs[1:]):
        return None
    batch, heads, positions, channels = (moved.after[order.index(axis)] for axis in (0, 2, 1, 3))
    first, second, columns = moved.before
    if (batch, positions) == (first, second):
        swapped = False
    elif (batch, positions) == (second, first):
        swapped = True
    else:
        return None
    chosen = columns[: len(columns) - len(heads) - len(channels)]
    if [*chosen, *heads, *channels] != columns or len(chosen) > 1 or any(atom.index is None for atom in chosen):
        return None
    count, size = _length(heads), _length(channels)
    if count is None or size is None or any(atom.index is not None for atom in (*heads, *channels)):
        return None
    steps = moved.steps[:-1] if swapped and moved.steps[-1].op_type == "Transpose" else moved.steps
    plain = not chosen and sorted({node.op_type for node in steps}) == ["Reshape", "Transpose"]
    plain = plain and sum(node.op_type == "Reshape" for node in steps) == 1
    part = (chosen[0].index or 0, _length(chosen) or 1) if chosen else (0, 1)
    return _Read(value, moved.source, count, size, order, swapped, part, plain)


def _length(atoms: list[Atom]) -> int | None:
    numbers = [atom.size for atom in atoms if isinstance(atom.size, int)]
    return prod(numbers) if len(numbers) == len(atoms) else None


def _guarded(result: ir.Value) -> ir.Value:
    """Where(IsNaN(o), 0, o) behind a product o, if that is all that reads it; else the product."""
    users = result.consumers()
    where = next((user for user in users if graph.is_standard(user, "Where")), None)
    if where is None or len(users) != 2 or result.is_graph_output():
        return result
    test = graph.producer(where.inputs[0], "IsNaN")
    guards = test is not None and test.inputs[0] is result and test in users and where.inputs[2] is result
    number = graph.run_shape(where.inputs[1])
    return where.outputs[0] if guards and number is not None and len(number) <= 1 and set(number) <= {1} else result


def _fit(reads: list[_Read], masks: list[ir.Value]) -> bool:
    """Whether nothing is repeated on the way, so that the result is [batch, heads, queries, channels of the values]."""
    queries, keys, values = reads
    same = graph.same_size(queries.batch, keys.batch) and graph.same_size(keys.batch, values.batch)
    if not (same or queries.source is keys.source is values.source) or len({read.heads for read in reads}) > 1:
        return False
    whole = (queries.batch, queries.heads, queries.positions, keys.positions)
    return all(mask.shape is not None and within(mask, whole) for mask in masks)


class _Writer:
    """Writes heads plainly; parts of one tensor are taken from it once."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._names = graph.value_names(main)
        self._made: dict[tuple[object, ...], list[ir.Value]] = {}

    def plain(self, softmax: ir.Node) -> bool:
        """Whether anything had to be written."""
        products = _products(softmax)
        if products is None:
            return False
        first, last, masks = products
        reads = [
            _read(value, order)
            for value, order in (
                (_unscaled(first.inputs[0]), FRONT),
                (_unscaled(first.inputs[1]), TURNED),
                (last.inputs[1], FRONT),
            )
        ]
        found = [read for read in reads if read is not None]
        if len(found) < len(reads) or all(read.plain for read in found):
            return False
        if any(read.value.is_graph_output() and not read.plain for read in found) or not _fit(found, masks):
            return False
        back = self._back(last, found[0])
        if back is None:
            return False
        for read in found:
            if not read.plain:
                read.value.replace_all_uses_with(self._heads(read))
        if tuple(back.attributes.get_ints("perm", [])) == _BACK:
            self._join(back, found[0], found[2])
        return True

    def _back(self, last: ir.Node, queries: _Read) -> ir.Node | None:
        """The Transpose that brings the heads back, if what reads it can be told that they are joined."""
        result = _guarded(last.outputs[0])
        back = graph.only_reader(result, "Transpose")
        joined = graph.only_reader(back.outputs[0], "Reshape") if back is not None else None
        if back is None or joined is None or joined.inputs[0] is not back.outputs[0]:
            return None
        order = tuple(back.attributes.get_ints("perm", []))
        if order == FRONT:
            return back
        target, told = graph.constant(joined.inputs[1]), sizes.elements(joined.inputs[1])
        if order != _BACK or is_default(joined.inputs[1]) or queries.source.shape is None:
            return None
        # A 0 says the same of both first axes with the heads joined; of a third it would not.
        if target is None:
            return back if told is not None and None not in told and 0 not in told else None
        kept = joined.attributes.get_int("allowzero", 0) == 0
        return back if 0 not in target[2:] and (kept or 0 not in target) else None

    def _heads(self, read: _Read) -> ir.Value:
        """[batch, heads, positions, channels] in the order of the read."""
        source, number, count = read.source, *read.part
        assert source.shape is not None
        width = read.heads * read.size
        lead = list(source.shape[:2])
        if count > 1:
            lengths = self._constant(f"{source.name}_parts", *[width] * count)
            shapes = [[*lead, width]] * count
            parts = self._node(("Split", source, count), "Split", [source, lengths], shapes, [ir.AttrInt64("axis", 2)])
            source = parts[number]
        if read.swapped:
            lead.reverse()
            [source] = self._node(("Swap", source), "Transpose", [source], [[*lead, width]], [_perm(_SWAP)])
        target = self._constant("heads_shape", 0, 0, read.heads, read.size)
        split = [*lead, read.heads, read.size]
        [apart] = self._node(("Heads", source, read.heads), "Reshape", [source, target], [split])
        ordered = [split[axis] for axis in read.order]
        [made] = self._node(("Order", apart, read.order), "Transpose", [apart], [ordered], [_perm(read.order)])
        return made

    def _join(self, back: ir.Node, queries: _Read, values: _Read) -> None:
        """The heads joined as [batch, positions, ..], and only then positions first."""
        joined, result = back.outputs[0].consumers()[0], back.inputs[0]
        lead, width = [queries.batch, queries.positions], queries.heads * values.size
        shape = [*lead, queries.heads, values.size]
        [front] = self._node((), "Transpose", [result], [shape], [_perm(FRONT)])
        [rows] = self._node((), "Reshape", [front, self._constant("rows_shape", 0, 0, width)], [[*lead, width]])
        [swapped] = self._node((), "Transpose", [rows], [[*lead[::-1], width]], [_perm(_SWAP)])
        after = joined.outputs[0].shape
        whole = after is not None and len(after) == 3 and after[2] == width
        if whole and after is not None and all(map(graph.same_size, after[:2], lead[::-1])):
            node = swapped.producer()
            assert node is not None
            graph.replace_node(self._main, joined, node)
        else:
            joined.replace_input_with(0, swapped)

    def _constant(self, base: str, *numbers: int) -> ir.Value:
        key = (base, *numbers)
        if key not in self._made:
            tensor = ir.tensor(np.array(numbers, np.int64))
            self._made[key] = [graph.add_initializer(self._main, tensor, graph.fresh_name(base, self._names))]
        return self._made[key][0]

    def _node(
        self,
        key: tuple[object, ...],
        op_type: str,
        inputs: list[ir.Value | None],
        shapes: list[list[int | ir.SymbolicDim]],
        attributes: list[ir.Attr] | None = None,
    ) -> list[ir.Value]:
        """The results of a new operator, or of the one that was made under this key."""
        if key and key in self._made:
            return self._made[key]
        assert inputs[0] is not None
        name = graph.fresh_name(f"{inputs[0].name}_{op_type.lower()}", self._names)
        node = ir.Node("", op_type, inputs, attributes or [], num_outputs=len(shapes), name=name)
        for output, shape in zip(node.outputs, shapes, strict=True):
            output.name = graph.fresh_name(f"{name}_output", self._names)
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self._main.append(node)  # Sorted in the end.
        if key:
            self._made[key] = list(node.outputs)
        return list(node.outputs)


def _perm(order: tuple[int, ...]) -> ir.Attr:
    return ir.AttrInt64s("perm", order)
