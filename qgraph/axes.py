"""Which axes of a tensor went where, through the operators that only move them: reshapes as einops sees them.

An axis is a row of atoms, of which a Reshape joins neighbours and takes apart what was one (Rogozhnikov, "Einops: Clear
and Reliable Tensor Manipulations with Einstein-like Notation", 2022, section 4). Atoms of length 1 are left out.
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import TypeAlias

import onnx_ir as ir

from qgraph import graph, sizes
from qgraph.heads import is_default

__all__ = ["Atom", "Axes", "Moved", "moved_on", "trace"]

_MOVES = ("Gather", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_FAR = 12
"""Operators that are followed, at most."""


@dataclasses.dataclass(eq=False)
class Atom:
    """A stretch of one axis of the source.

    Attributes:
        size: its length, or the name of it.
        names: others that its length is seen to have.
        parts: what it was taken apart into, in order; empty while it is whole.
        index: the one place along it that was chosen; None where all are there.
    """

    size: int | ir.SymbolicDim
    names: list[ir.SymbolicDim] = dataclasses.field(default_factory=list)
    parts: list[Atom] = dataclasses.field(default_factory=list)
    index: int | None = None

    def whole(self) -> list[Atom]:
        """The atoms that it consists of, itself if it is one."""
        return [atom for part in self.parts for atom in part.whole()] if self.parts else [self]

    def goes_by(self, dim: int | ir.SymbolicDim) -> bool:
        """Whether its length is seen to be `dim`."""
        return any(graph.same_size(one, dim) for one in (self.size, *self.names))

    def cut(self, size: int) -> tuple[Atom, Atom] | None:
        """Outer part and inner one of this length, if it divides."""
        if not isinstance(self.size, int) or size < 1 or self.size % size:
            return None
        self.parts = [Atom(self.size // size), Atom(size)]
        return self.parts[0], self.parts[1]


Axes: TypeAlias = list[list[Atom]]


@dataclasses.dataclass(frozen=True)
class Moved:
    """`value` is `source` with its axes elsewhere.

    Attributes:
        source: what was moved.
        steps: the nodes that did, last first.
        before: the atoms of each axis of the source.
        after: the atoms of each axis of the value.
    """

    source: ir.Value
    steps: list[ir.Node]
    before: Axes
    after: Axes


def trace(value: ir.Value | None, rank: int) -> Moved | None:
    """How `value` was made of the furthest tensor of this rank that is only moved on the way; None where none is."""
    steps: list[ir.Node] = []
    while (node := graph.producer(value, *_MOVES)) is not None and len(steps) < _FAR:
        if any(is_default(given) for given in node.inputs[1:]):
            break
        steps.append(node)
        value = node.inputs[0]
    for count in range(len(steps), 0, -1):
        source = steps[count - 1].inputs[0]
        if source is None or source.shape is None or len(source.shape) != rank or not graph.is_float(source):
            continue
        if 0 in source.shape:
            continue
        before = [[] if dim == 1 else [Atom(dim)] for dim in source.shape]
        after = _along(steps[count - 1 :: -1], source, before)
        if after is not None:
            return Moved(source, steps[:count], _settled(before), _settled(after))
    return None


def moved_on(node: ir.Node, axes: Axes) -> Axes | None:
    """The axes behind a node that only moves what has these; None where that is not seen."""
    if not graph.is_standard(node, *_MOVES) or any(is_default(given) for given in node.inputs[1:]):
        return None
    made = _through(node, axes, {})
    return None if made is None else _settled(made)


def _along(nodes: list[ir.Node], source: ir.Value, before: Axes) -> Axes | None:
    """The axes behind a chain of nodes; None where one is not seen to keep the elements in a known place."""
    axes, seen = before, {source: before}
    for node in nodes:
        made = _through(node, axes, seen)
        if made is None:
            return None
        axes = seen[node.outputs[0]] = made
    return axes


def _settled(axes: Axes) -> Axes:
    return [[one for atom in axis for one in atom.whole()] for axis in axes]


def _through(node: ir.Node, axes: Axes, seen: dict[ir.Value, Axes]) -> Axes | None:
    """The axes behind one node, which may know their lengths by more names."""
    made, shape = _moved(node, _settled(axes), seen), node.outputs[0].shape
    for axis, dim in zip(made or [], shape or [], strict=False):
        if (
            len(axis) == 1
            and not isinstance(axis[0].size, int)
            and not isinstance(dim, int)
            and not axis[0].goes_by(dim)
        ):
            axis[0].names.append(dim)
    return made


def _moved(node: ir.Node, axes: Axes, seen: dict[ir.Value, Axes]) -> Axes | None:
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(len(axes))[::-1])
        return [axes[axis] for axis in order]
    if node.op_type == "Reshape":
        dims = _dims(node, axes, seen)
        return None if dims is None else _regroup([atom for axis in axes for atom in axis], dims)
    if node.op_type == "Gather":
        axis, index = node.attributes.get_int("axis", 0) % len(axes), graph.constant(node.inputs[1])
        if index is None or index.ndim != 0 or len(axes[axis]) != 1:
            return None
        chosen = axes[axis][0]
        if not isinstance(chosen.size, int):
            return None
        # Each chain has atoms of its own.
        chosen.index = int(index) % chosen.size
        return axes[:axis] + axes[axis + 1 :]
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None:
        return None
    rank = len(axes) + (given.size if node.op_type == "Unsqueeze" else 0)
    places = {int(axis) % rank for axis in given.reshape(-1)}
    if node.op_type == "Squeeze":
        return None if any(axes[axis] for axis in places) else [a for k, a in enumerate(axes) if k not in places]
    rest = iter(axes)
    return [[] if place in places else next(rest) for place in range(rank)]


_Dim: TypeAlias = "list[int | ir.SymbolicDim | Atom]"
"""What the length of an axis is the product of; nothing where it is 1."""


def _dims(node: ir.Node, axes: Axes, seen: dict[ir.Value, Axes]) -> list[_Dim | None] | None:
    """The lengths that a Reshape makes, as far as its shape and the arithmetic of shapes tell."""
    shape, told = node.outputs[0].shape, sizes.factors(node.inputs[1])
    if shape is None and told is None:
        return None
    rank = len(shape) if shape is not None else len(told or ())
    if told is None or len(told) != rank:
        told = [(-1,)] * rank
    copies = node.attributes.get_int("allowzero", 0) == 0
    dims: list[_Dim | None] = []
    for axis, product in enumerate(told):
        known = shape[axis] if shape is not None else None
        if product == (0,) and copies and axis < len(axes):
            dims.append([*axes[axis]])
        elif isinstance(known, int):
            dims.append([known])
        elif isinstance(product[0], int) and product[0] < 1:
            dims.append(None if known is None else [known])
        else:
            dims.append([one for size in product for one in _lengths(size, seen)])
    return dims


def _lengths(size: sizes.Size, seen: dict[ir.Value, Axes]) -> _Dim:
    """The atoms of an axis that was seen; else its number or name."""
    if isinstance(size, int):
        return [size]
    value, axis = size
    if value in seen:
        return [one for atom in seen[value][axis] for one in atom.whole()]
    assert value.shape is not None
    return [value.shape[axis]]


def _regroup(atoms: list[Atom], dims: list[_Dim | None]) -> Axes | None:
    """Atoms in the axes that they are reshaped to; at most one axis is what is left between the others."""
    front: Axes = []
    while len(front) < len(dims) and (taken := _take(atoms, dims[len(front)], 0)) is not None:
        front.append(taken)
    back: Axes = []
    while len(front) + len(back) < len(dims) and (taken := _take(atoms, dims[-1 - len(back)], -1)) is not None:
        back.insert(0, taken[::-1])
    left = len(dims) - len(front) - len(back)
    if left > 1 or (left == 0 and atoms):
        return None
    return [*front, *([atoms] if left else []), *back]


def _take(atoms: list[Atom], dim: _Dim | None, end: int) -> list[Atom] | None:
    """The atoms that make up `dim`, taken from this end of the list; None if none do, though one may be cut."""
    if dim is None:
        return None
    lengths = [one.size if isinstance(one, Atom) and isinstance(one.size, int) else one for one in dim]
    rest = prod(one for one in lengths if isinstance(one, int))
    names = [one for one in lengths if not isinstance(one, int)]
    if rest == 0:
        return None
    taken: list[Atom] = []
    kept = list(atoms)
    while rest > 1 or names:
        if not kept:
            return None
        size = kept[end].size
        if not isinstance(size, int):
            found = next((one for one in names if one is kept[end] or _same(kept[end], one)), None)
            if found is None:
                return None
            names.remove(found)
            taken.append(kept.pop(end))
        elif rest % size == 0:
            taken.append(kept.pop(end))
            rest //= size
        else:
            pair = kept[end].cut(size // rest if end == 0 else rest) if rest > 1 and size % rest == 0 else None
            if pair is None or names:
                return None
            at = end % len(kept)
            kept[at : at + 1] = pair
            taken.append(kept.pop(end))
            rest = 1
    atoms[:] = kept
    return taken


def _same(atom: Atom, dim: ir.SymbolicDim | Atom) -> bool:
    return not isinstance(dim, Atom) and atom.goes_by(dim)
