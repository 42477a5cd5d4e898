"""Transpose(1, 0, 2) .. Transpose(1, 0, 2) -> what is between, by rows, with its first two axes the other way round.

nn.MultiheadAttention computes with positions first, and what calls it with the batch first: each of its products stands
between transposes of whole activations. What treats every row by itself does not care which of both axes is first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, sizes, weights
from qgraph.rowwise import Rows
from qgraph.swaps import SWAP, Layout, asks_whole, is_swap

__all__ = ["CancelSwaps"]

_SINCE = 14
"""Before opset 13 Softmax is over all axes from its own on; from 14 on a Reshape may be told that 0 is 0."""


class CancelSwaps(ir.passes.InPlacePass):
    """Groups of operators that go by rows compute in the order of axes that needs the fewest transposes.

    Each group, small ones first, is turned round where fewer columns are transposed so. What the model gives away keeps
    its order. Left alone: what a subgraph reads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        if model.graph.opset_imports.get("", 0) < _SINCE or not any(is_swap(node) for node in main):
            return ir.passes.PassResult(model, False)
        layout = Layout(main)
        if not layout.settle():
            return ir.passes.PassResult(model, False)
        _write(main, layout)
        common.TopologicalSortPass()(model)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)


def _write(main: ir.Graph, layout: Layout) -> None:
    """Turn round what was decided on, and transpose what has to be."""
    writer = _Writer(main)
    declared = {output: (output.type, output.shape) for output in main.outputs}
    turned = [part for number in sorted(layout.turned) for part in layout.groups[number]]
    uses = [(value, [(*use, layout.needs(value, *use)) for use in layout.users(value)]) for value in layout.origins()]
    for part in turned:
        writer.turn(part)
    for value, readers in uses:
        others: list[ir.Value] = []
        for user, at, _, needs in readers:
            if needs and not others and not asks_whole(user):
                others.append(writer.transposed(value))
            if isinstance(user, ir.Value):
                writer.give(user, others[0] if needs else value, declared[user])
                continue
            if needs and asks_whole(user):
                made, readers_of_it = user.outputs[0], tuple(user.outputs[0].uses())
                ordered = writer.in_order(made)
                for reader, place in readers_of_it:
                    reader.replace_input_with(place, ordered)
            user.replace_input_with(at, others[0] if needs and not asks_whole(user) else value)


class _Writer:
    """Writes swaps and what they need; names are new."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._names = graph.value_names(main)

    def turn(self, part: Rows) -> None:
        """What a part makes has its first two axes the other way round."""
        for output in part.nodes[-1].outputs:
            assert output.shape is not None
            output.shape = ir.Shape([output.shape[axis] for axis in SWAP])
            if (ran := output.meta.get(graph.RUN_SHAPE)) is not None:
                output.meta[graph.RUN_SHAPE] = tuple(ran[axis] for axis in SWAP)
        if part.target is None:
            return
        target = graph.constant(part.target)
        if target is None:
            swapped = self.in_order(part.target)
            if -1 not in (sizes.elements(part.target) or ()):
                # A batch of none would else be a size to copy.
                part.nodes[-1].attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
        else:
            name = graph.fresh_name(f"{part.target.name}_swapped", self._names)
            swapped = graph.add_initializer(self._main, ir.tensor(target[list(SWAP)]), name)
        part.nodes[-1].replace_input_with(1, swapped)

    def give(self, output: ir.Value, made: ir.Value, declared: tuple[ir.TypeProtocol | None, ir.Shape | None]) -> None:
        """The model gives `made` away in place of `output`, by its name and as it was declared."""
        if made is output:
            return
        if made.is_graph_output() or made.producer() is None:
            node = ir.Node("", "Identity", [made], name=graph.fresh_name(f"{made.name}_copy", self._names))
            node.outputs[0].type, node.outputs[0].shape = made.type, made.shape
            self._main.append(node)
            made = node.outputs[0]
        made.name, output.name = output.name, made.name or graph.fresh_name("turned", self._names)
        made.type, made.shape = declared[0] or made.type, declared[1] or made.shape
        outputs = self._main.outputs
        for at, one in enumerate(outputs):
            if one is output:
                outputs[at] = made

    def in_order(self, three: ir.Value) -> ir.Value:
        """Three sizes, the first two the other way round."""
        name = graph.fresh_name(f"{three.name}_swapped", self._names)
        axes = graph.fresh_name(f"{name}_axes", self._names)
        places = graph.add_initializer(self._main, ir.tensor(np.array(SWAP)), axes)
        node = ir.Node("", "Gather", [three, places], name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = name, three.type, ir.Shape([3])
        self._main.append(node)  # Sorted in the end.
        return made

    def transposed(self, value: ir.Value) -> ir.Value:
        """`value` the other way round."""
        if graph.has_constant(value):
            name, shape = graph.fresh_name(f"{value.name}_swapped", self._names), graph.run_shape(value)
            assert shape is not None
            turned = tuple(shape[axis] for axis in SWAP)
            return weights.moved(self._main, value, lambda array: array.transpose(SWAP), turned, name)
        name = graph.fresh_name(f"{value.name}_swap", self._names)
        node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", SWAP)], name=name)
        made = node.outputs[0]
        made.name, made.type = graph.fresh_name(f"{name}_output", self._names), value.type
        made.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in SWAP])
        self._main.append(node)  # Sorted in the end.
        return made
