"""How a positive factor for each channel of one value spreads over a graph so that the graph computes the same.

A *layout* says which channel each element of a value belongs to: an array of channel numbers of the value's rank, with
size 1 along the axes that do not matter, and -1 where nothing is scaled. Reshape, Transpose, Split or Gather of a value
are the same operation on its layout, so channels stay known through heads, joined projections and flattened images.
What cannot follow a channel *freezes* it: its factor is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph

__all__ = ["Edit", "Layout", "Rule", "Spread"]

Layout = NDArray[np.intp]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """A constant that takes a factor in.

    Attributes:
        node: the node that reads it.
        position: at which input.
        index: channel of each of its elements, to be broadcast with it; -1 for those that stay.
        divides: whether it is divided by the factors (it makes the scaled value) or multiplied (it reads it).
    """

    node: ir.Node
    position: int
    index: Layout
    divides: bool


class Spread:
    """The values that must be scaled together, found by asking the rule of each node around a scaled value.

    Args:
        rules: (domain, operator) -> rule.
    """

    def __init__(self, rules: Mapping[tuple[str, str], Rule]):
        self.layouts: dict[ir.Value, Layout] = {}
        self.edits: dict[ir.Node, list[Edit]] = {}
        self.reasons: dict[str, str] = {}
        """Why channels are frozen: reason -> the value where it was found."""
        self.free = np.zeros(0, np.bool_)
        self._rules = rules
        self._waiting: dict[ir.Node, None] = {}

    def fresh(self, count: int) -> Layout:
        """Numbers of `count` new channels, [count]."""
        first = self.free.size
        self.free = np.append(self.free, np.ones(count, np.bool_))
        return np.arange(first, first + count)

    def freeze(self, layout: Layout | None, reason: str, where: ir.Value | None = None) -> None:
        """The factor of these channels stays 1."""
        if layout is not None:
            chosen = layout[layout >= 0]
            if chosen.size and self.free[chosen].any():
                self.free[chosen] = False
                self.reasons.setdefault(reason, str(where.name) if where is not None else "")

    def need(self, value: ir.Value | None, layout: Layout | None, where: ir.Value | None = None) -> None:
        """`value` must be scaled so; with `layout` None, whatever is scaled of `where` cannot be followed."""
        if value is None:
            return
        if layout is None:
            self.freeze(self.layouts.get(where or value), "its channels are lost from sight", where or value)
            return
        layout = _compact(layout)
        shape = graph.run_shape(value)
        if (
            shape is None
            or len(shape) != layout.ndim
            or any(n not in (1, m) for n, m in zip(layout.shape, shape, strict=True))
        ):
            self.freeze(layout, "its shape is not known", value)
            return
        known = self.layouts.get(value)
        if known is not None:
            if known.shape != layout.shape or not np.array_equal(known, layout):
                self.freeze(known, "two ways meet with different channels", value)
                self.freeze(layout, "two ways meet with different channels", value)
            return
        self.layouts[value] = layout
        readers = value.consumers()
        maker = value.producer()
        if maker is None or value.is_graph_output() or not graph.is_float(value):
            self.freeze(layout, "an input or output of the graph, or not float32", value)
        if any(maker is not None and reader.graph is not maker.graph for reader in readers):
            self.freeze(layout, "read inside a body of If, Loop or Scan", value)
        for node in (*([maker] if maker is not None else []), *readers):
            self._waiting[node] = None

    def operand(self, node: ir.Node, position: int, layout: Layout) -> None:
        """An input of `node` must be scaled so: a constant is divided, any other value needs it."""
        value = node.inputs[position]
        if graph.has_constant(value) and graph.is_float(value):
            self.edit(node, position, layout, divides=True)
        else:
            self.need(value, layout)

    def edit(self, node: ir.Node, position: int, index: Layout, divides: bool) -> None:
        """A constant of `node` takes the factors in; where it is none, the channels freeze."""
        value = node.inputs[position]
        if graph.has_constant(value) and graph.is_float(value):
            self.edits[node].append(Edit(node, position, index, divides))
        else:
            self.freeze(index, "a weight or bias is not a float32 constant", value)

    def run(self) -> None:
        """Ask rules until nothing is new or nothing is free."""
        while self._waiting and self.free.any():
            node = next(iter(self._waiting))
            del self._waiting[node]
            self.edits[node] = []
            rule = self._rules.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
            if rule is not None:
                rule(self, node)
                continue
            for value in (*node.inputs, *node.outputs):
                if value is not None and value in self.layouts:
                    self.freeze(self.layouts[value], f"{node.op_type} does not carry a factor through", value)


Rule = Callable[[Spread, ir.Node], None]


def _compact(layout: Layout) -> Layout:
    """Size 1 along the axes on which it does not vary."""
    for axis, size in enumerate(layout.shape):
        if size > 1:
            first = layout.take([0], axis=axis)
            if np.array_equal(np.broadcast_to(first, layout.shape), layout):
                layout = first
    return layout
