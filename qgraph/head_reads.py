"""How queries, keys and values are read from [batch, positions, heads x channels], by whatever moves of axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from qgraph import graph
from qgraph.axes import Atom, Axes, Moved, trace
from qgraph.heads import FRONT, factor

__all__ = ["HeadRead", "read", "unscaled"]


@dataclasses.dataclass(frozen=True)
class HeadRead:
    """How `value`, [batch, heads, positions, channels] in some order, is read from `source`, of three axes.

    Attributes:
        heads, size: how many, and channels of each.
        order: that of the axes of `value`, counted in [batch, positions, heads, channels].
        swapped: whether positions come first in the source.
        part: which of how many parts, one after the other along the source's last axis.
        plain: whether it is read by one Reshape and Transposes from [batch, positions, heads x channels], which may be
            the other way round before.
        lead: the atoms of batch and of positions.
    """

    value: ir.Value
    source: ir.Value
    heads: int
    size: int
    order: tuple[int, ...]
    swapped: bool
    part: tuple[int, int]
    plain: bool
    lead: tuple[list[Atom], list[Atom]]

    @property
    def batch(self) -> int | ir.SymbolicDim:
        """Its size or name."""
        return self._sizes[self.swapped]

    @property
    def positions(self) -> int | ir.SymbolicDim:
        """How many, or the name of that."""
        return self._sizes[not self.swapped]

    @property
    def _sizes(self) -> tuple[int | ir.SymbolicDim, ...]:
        assert self.source.shape is not None
        return self.source.shape[:2]


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """`value` before it was multiplied by numbers, and what did that, last first."""
    nodes = []
    while (node := graph.producer(value, "Mul", "Div")) is not None and (found := factor(node)) is not None:
        nodes.append(node)
        value = found[0]
    return value, nodes


def read(value: ir.Value | None, order: tuple[int, ...], flat: bool = False) -> HeadRead | None:
    """How heads are read; None where they are not seen to be.

    Args:
        value: what has the heads apart.
        order: that of its axes, counted in [batch, positions, heads, channels].
        flat: whether the heads are in one axis with the batch, which is the first.
    """
    moved = trace(value, 3)
    if value is None or moved is None or len(moved.after) != 4 - flat:
        return None
    columns = moved.before[2]
    for swapped, (batch, heads, positions, channels) in _groups(moved, order, flat):
        chosen = columns[: len(columns) - len(heads) - len(channels)]
        if [*chosen, *heads, *channels] != columns or len(chosen) > 1 or any(atom.index is None for atom in chosen):
            continue
        count, size = _length(heads), _length(channels)
        if count is None or size is None or any(atom.index is not None for atom in (*heads, *channels)):
            continue
        part = (chosen[0].index or 0, _length(chosen) or 1) if chosen else (0, 1)
        plain = not flat and not chosen and _is_plain(moved, swapped)
        return HeadRead(value, moved.source, count, size, order, swapped, part, plain, (batch, positions))
    return None


def _groups(moved: Moved, order: tuple[int, ...], flat: bool) -> Iterator[tuple[bool, Axes]]:
    """Whether positions come first in the source; atoms of batch, heads, positions and channels."""
    first, second = moved.before[:2]
    for swapped, batch, positions in ((False, first, second), (True, second, first)):
        after = moved.after
        if flat:
            lead = after[0]
            if lead[: len(batch)] != batch:
                continue
            inner = after[1:] if order == FRONT else after[:0:-1]
            groups = [batch, lead[len(batch) :], *inner]
        else:
            groups = [after[order.index(axis)] for axis in (0, 2, 1, 3)]
        if groups[0] == batch and groups[2] == positions:
            yield swapped, groups


def _is_plain(moved: Moved, swapped: bool) -> bool:
    steps = moved.steps[:-1] if swapped and moved.steps[-1].op_type == "Transpose" else moved.steps
    kinds = [node.op_type for node in steps]
    return sorted(set(kinds)) == ["Reshape", "Transpose"] and kinds.count("Reshape") == 1


def _length(atoms: list[Atom]) -> int | None:
    numbers = [atom.size for atom in atoms if isinstance(atom.size, int)]
    return prod(numbers) if len(numbers) == len(atoms) else None
