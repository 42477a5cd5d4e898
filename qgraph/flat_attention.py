"""Attention in three dimensions, as it comes: its products and masks, and what reads its heads and joins them again.

For torch.bmm batch and heads are one axis; masks come in a Reshape to four axes and back, or flattened, too. Each axis
is followed through these moves.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qgraph import graph
from qgraph.attention import Step, upwards, within
from qgraph.axes import Atom, Axes, moved_on, trace
from qgraph.head_reads import HeadRead, read, unscaled
from qgraph.heads import FRONT, TURNED

__all__ = ["FlatAttention", "Mask", "find"]

_Dim = int | ir.SymbolicDim
_FAR = 12
"""Operators behind the last product, at most."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """What is added: as it is, or with the heads to be taken apart from the batch."""

    value: ir.Value
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class FlatAttention:
    """An attention whose heads are in one axis with the batch.

    Attributes:
        first, softmax, last: products, and what is between.
        steps: from the first product to Softmax, Reshapes left out, each with its mask, if it has one.
        reads: queries, keys and values.
        joined: the Reshape that brings the heads together again.
        swapped: whether positions come first there.
        whole: whether it makes three axes, heads and channels in the last.
    """

    first: ir.Node
    softmax: ir.Node
    last: ir.Node
    steps: list[tuple[Step, Mask | None]]
    reads: tuple[HeadRead, HeadRead, HeadRead]
    joined: ir.Node
    swapped: bool
    whole: bool


def find(softmax: ir.Node) -> FlatAttention | None:
    """The attention of three dimensions whose weights `softmax` makes."""
    weights = softmax.outputs[0]
    last = graph.only_reader(weights, "MatMul")
    if last is None or last.inputs[0] is not weights or _rank(weights) != 3 or not graph.is_float(weights):
        return None
    found = upwards(softmax.inputs[0])
    if found is None:
        return None
    first, steps = found
    queries, keys, values = (
        read(unscaled(value)[0], order, flat=True)
        for value, order in ((first.inputs[0], FRONT), (first.inputs[1], TURNED), (last.inputs[1], FRONT))
    )
    if queries is None or keys is None or values is None or unscaled(last.inputs[1])[1]:
        return None
    if not queries.heads == keys.heads == values.heads > 1 or queries.size != keys.size:
        return None
    counts = (keys.positions, values.positions)
    if any(isinstance(count, int) for count in counts) and counts[0] != counts[1]:
        return None  # One key, say, whose scores a mask repeats.
    masked = _masked(first, steps, queries, keys)
    if masked is None:
        return None
    end = _end(last, queries, values)
    return None if end is None else FlatAttention(first, softmax, last, masked, (queries, keys, values), *end)


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _masked(
    first: ir.Node, steps: list[Step], queries: HeadRead, keys: HeadRead
) -> list[tuple[Step, Mask | None]] | None:
    """All steps but Reshapes, with what they add in four dimensions; None where one is not followed."""
    batch, rows, columns = (_copy(one) for one in (queries.lead[0], queries.lead[1], keys.lead[1]))
    heads = [Atom(queries.heads)]
    axes: Axes = [[*batch, *heads], rows, columns]
    whole = (queries.batch, queries.heads, queries.positions, keys.positions)
    masked: list[tuple[Step, Mask | None]] = []
    shape = first.outputs[0].shape
    for step in steps:
        if step.node.op_type == "Reshape":
            made = moved_on(step.node, axes)
            if made is None:
                return None
            axes, shape = made, step.node.outputs[0].shape
            continue
        if step.node.op_type in ("Mul", "Div"):
            masked.append((step, None))
            continue
        apart = axes == [batch, heads, rows, columns]
        if not apart and axes != [[*batch, *heads], rows, columns]:
            return None
        given = step.node.inputs[1 - step.side]
        mask = Mask(given) if apart and given is not None else _lifted(given, shape, queries.heads)
        if mask is None or not _repeats_none(mask, whole):
            return None
        masked.append((step, mask))
    return masked if axes == [[*batch, *heads], rows, columns] else None


def _copy(atoms: list[Atom]) -> list[Atom]:
    """Atoms of the same sizes, to be followed elsewhere."""
    return [Atom(atom.size, [*atom.names]) for atom in atoms]


def _lifted(mask: ir.Value | None, scores: ir.Shape | None, heads: int) -> Mask | None:
    """What is added to flattened scores of this shape, as it can be added to those with the heads apart."""
    rank = _rank(mask)
    if mask is None or mask.shape is None or rank is None or rank > 3:
        return None
    if rank < 3 or mask.shape[0] == 1:
        return Mask(mask)
    moved = trace(mask, 4)
    if moved is not None and len(moved.after) == 3:
        batch, apart, *others = moved.before
        known = [atom.size for atom in apart if isinstance(atom.size, int)]
        if moved.after == [[*batch, *apart], *others] and known == [heads]:
            return Mask(moved.source)
    return Mask(mask, True) if scores is not None and graph.same_size(mask.shape[0], scores[0]) else None


def _repeats_none(mask: Mask, whole: tuple[_Dim, ...]) -> bool:
    """Whether adding it is seen not to repeat scores."""
    if not graph.is_float(mask.value) or mask.value.shape is None or len(mask.value.shape) > 4:
        return False
    return within(mask.value, whole[2:] if mask.apart else whole)


def _end(last: ir.Node, queries: HeadRead, values: HeadRead) -> tuple[ir.Node, bool, bool] | None:
    """The Reshape that joins the heads, whether positions come first there, and whether it makes three axes."""
    batch, rows = (_copy(one) for one in queries.lead)
    heads, channels = [Atom(queries.heads)], [Atom(values.size)]
    columns = [*heads, *channels]
    axes: Axes = [[*batch, *heads], rows, channels]
    value = last.outputs[0]
    for _ in range(_FAR):
        node = graph.only_reader(value, "Transpose", "Reshape", "Squeeze", "Unsqueeze")
        if node is None or node.inputs[0] is not value:
            return None
        made = moved_on(node, axes)
        if made is None:
            return None
        value, axes = node.outputs[0], made
        order = [atom for axis in axes for atom in axis]
        if node.op_type != "Reshape" or axes[-1] != columns:
            continue
        for swapped, lead in ((False, [batch, rows]), (True, [rows, batch])):
            if axes == [*lead, columns]:
                return node, swapped, True
            # Its target will read other axes: a 0 would copy another size.
            if order == [*lead[0], *lead[1], *columns] and _copies_none(node):
                return node, swapped, False
        return None
    return None


def _copies_none(node: ir.Node) -> bool:
    target = graph.constant(node.inputs[1])
    return target is not None and 0 not in target
