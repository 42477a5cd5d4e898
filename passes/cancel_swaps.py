"""Transpose(1, 0, 2) .. Transpose(1, 0, 2) -> what is between, by rows, with its first two axes the other way round.

nn.MultiheadAttention computes with positions first, and what calls it with the batch first: each of its products stands
between transposes of whole activations. What treats every row by itself does not care which of both axes is first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.rowwise import Rows, rows

__all__ = ["CancelSwaps"]

_SWAP = (1, 0, 2)
_ROUNDS = 4
"""How often each group is looked at, at most; the first time decides nearly all."""


class CancelSwaps(ir.passes.InPlacePass):
    """Groups of operators that go by rows compute in the order of axes that needs the fewest transposes.

    Each group, small ones first, is turned round where fewer columns are transposed so. What the model gives away keeps
    its order. Left alone: what a subgraph reads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        if not any(_is_swap(node) for node in main):
            return ir.passes.PassResult(model, False)
        layout = _Layout(main)
        if not layout.settle():
            return ir.passes.PassResult(model, False)
        layout.write()
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, True)


def _is_swap(node: ir.Node) -> bool:
    """Whether nothing but a transpose of the first two of three axes is asked of the node."""
    if not graph.is_standard(node, "Transpose") or tuple(node.attributes.get_ints("perm", [])) != _SWAP:
        return False
    return _is_ours(node.outputs[0], node.graph)


def _is_ours(value: ir.Value, main: ir.Graph | ir.Function | None) -> bool:
    return all(user.graph is main for user in value.consumers())


def _asks_whole(user: ir.Node | ir.Value) -> bool:
    """Whether a node asks for all sizes of its input, which may as well be put in order afterwards."""
    if not isinstance(user, ir.Node) or not graph.is_standard(user, "Shape") or user.attributes:
        return False
    return not user.outputs[0].is_graph_output()


class _Layout:
    """Which groups of operators are turned round, and what has to be transposed then."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._part: dict[ir.Node, Rows] = {}
        for node in main:
            found = rows(node) if node not in self._part else None
            if found is not None and all(_is_ours(out, main) for out in found.nodes[-1].outputs):
                self._part.update(dict.fromkeys(found.nodes, found))
        self._groups = self._joined()
        self._turned: set[int] = set()
        self._group = {part.nodes[0]: number for number, group in enumerate(self._groups) for part in group}

    def _joined(self) -> list[list[Rows]]:
        """Parts that read one another directly, in one group; small groups first."""
        leader = {part.nodes[0]: part.nodes[0] for part in self._part.values()}

        def find(node: ir.Node) -> ir.Node:
            while leader[node] is not node:
                leader[node] = leader[leader[node]]
                node = leader[node]
            return node

        for first in list(leader):
            for value, _ in self._reads(first):
                maker = self._maker(value)
                if maker is not None and value in _values(self._part[first]):
                    leader[find(first)] = find(maker)
        groups: dict[ir.Node, list[Rows]] = {}
        for first in leader:
            groups.setdefault(find(first), []).append(self._part[first])
        return sorted(groups.values(), key=len)

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """The first node of the part that makes `value`."""
        node = value.producer()
        return self._part[node].nodes[0] if node is not None and node in self._part else None

    def _reads(self, first: ir.Node) -> Iterable[tuple[ir.Value, bool]]:
        """What a part reads, before swaps, and whether they leave it the other way round."""
        return [_origin(value) for value in _values(self._part[first])]

    def _is_turned(self, node: ir.Node | None) -> bool:
        return node is not None and self._group[node] in self._turned

    def _users(self, value: ir.Value) -> Iterable[tuple[ir.Node | ir.Value, int, bool]]:
        """Who reads a value that no swap makes: node, position, and whether swaps in between turn it round.

        An output of the model stands for its caller.
        """
        pending = [(value, False)]
        while pending:
            one, odd = pending.pop()
            if one.is_graph_output():
                yield one, 0, odd
            for user, at in one.uses():
                if _is_swap(user):
                    pending.append((user.outputs[0], not odd))
                else:
                    yield user, at, odd

    def _needs(self, value: ir.Value, user: ir.Node | ir.Value, at: int, odd: bool) -> bool:
        """Whether this reader needs the other order of axes than the value will have."""
        part = self._part.get(user) if isinstance(user, ir.Node) else None
        by_rows = part is not None and user is part.nodes[0] and at in part.inputs
        turned = by_rows and part is not None and self._is_turned(part.nodes[0])
        return odd ^ turned ^ self._is_turned(self._maker(value))

    def _price(self, value: ir.Value) -> int:
        """Columns of a value that have to be transposed."""
        if graph.has_constant(value):
            return 0
        if not any(self._needs(value, *use) for use in self._users(value) if not _asks_whole(use[0])):
            return 0
        width = value.shape[2] if value.shape is not None else 1
        return width if isinstance(width, int) else 1

    def settle(self) -> bool:
        """Turn groups round; whether any was."""
        touched = [self._touched(group) for group in self._groups]
        for _ in range(_ROUNDS):
            changed = False
            for number, values in enumerate(touched):
                before = sum(map(self._price, values))
                self._turned ^= {number}
                if sum(map(self._price, values)) < before:
                    changed = True
                else:
                    self._turned ^= {number}
            if not changed:
                break
        return bool(self._turned)

    def _touched(self, group: list[Rows]) -> list[ir.Value]:
        """What a group reads and makes that may have to be transposed."""
        values = {value: None for part in group for value, _ in self._reads(part.nodes[0])}
        values.update((output, None) for part in group for output in part.nodes[-1].outputs)
        inside = {part.nodes[0] for part in group}
        return [value for value in values if not self._stays_inside(value, inside)]

    def _stays_inside(self, value: ir.Value, inside: set[ir.Node]) -> bool:
        if self._maker(value) not in inside:
            return False
        return all(user in inside and not odd and at in self._part[user].inputs for user, at, odd in self._users(value))

    def write(self) -> None:
        """Turn round what was decided on, and transpose what has to be."""
        names = graph.value_names(self._main)
        turned = [part for number in self._turned for part in self._groups[number]]
        ends = {node for part in turned for node in (part.nodes[0], part.nodes[-1])}
        swaps = [node for node in self._main if _is_swap(node)]
        origins = {_origin(node.outputs[0])[0]: None for node in swaps}
        origins.update((value, None) for part in turned for value, _ in self._reads(part.nodes[0]))
        origins.update((output, None) for node in ends if node in self._part for output in self._last(node).outputs)
        uses = [(value, [(*use, self._needs(value, *use)) for use in self._users(value)]) for value in origins]
        for part in turned:
            self._turn(part, names)
        for value, readers in uses:
            others: list[ir.Value] = []
            for user, at, _, needs in readers:
                if needs and not others and not _asks_whole(user):
                    others.append(self._transposed(value, names))
                if isinstance(user, ir.Value):
                    self._give(user, others[0] if needs else value, names)
                    continue
                if needs and _asks_whole(user):
                    made, readers_of_it = user.outputs[0], tuple(user.outputs[0].uses())
                    ordered = self._in_order(made, names)
                    for reader, place in readers_of_it:
                        reader.replace_input_with(place, ordered)
                user.replace_input_with(at, others[0] if needs and not _asks_whole(user) else value)

    def _last(self, node: ir.Node) -> ir.Node:
        return self._part[node].nodes[-1]

    def _turn(self, part: Rows, names: set[str]) -> None:
        for output in part.nodes[-1].outputs:
            assert output.shape is not None
            output.shape = ir.Shape([output.shape[axis] for axis in _SWAP])
            if (ran := output.meta.get(graph.RUN_SHAPE)) is not None:
                output.meta[graph.RUN_SHAPE] = tuple(ran[axis] for axis in _SWAP)
        if part.target is None:
            return
        target = graph.constant(part.target)
        if target is None:
            swapped = self._in_order(part.target, names)
        else:
            name = graph.fresh_name(f"{part.target.name}_swapped", names)
            swapped = graph.add_initializer(self._main, ir.tensor(target[list(_SWAP)]), name)
        part.nodes[-1].replace_input_with(1, swapped)

    def _give(self, output: ir.Value, made: ir.Value, names: set[str]) -> None:
        """The model gives `made` away in place of `output`, by its name."""
        if made is output:
            return
        if made.is_graph_output() or made.producer() is None:
            node = ir.Node("", "Identity", [made], name=graph.fresh_name(f"{made.name}_copy", names))
            node.outputs[0].type, node.outputs[0].shape = made.type, made.shape
            self._main.append(node)
            made = node.outputs[0]
        made.name, output.name = output.name, made.name or graph.fresh_name("turned", names)
        outputs = self._main.outputs
        for at, one in enumerate(outputs):
            if one is output:
                outputs[at] = made

    def _in_order(self, sizes: ir.Value, names: set[str]) -> ir.Value:
        """Three sizes, the first two the other way round."""
        name = graph.fresh_name(f"{sizes.name}_swapped", names)
        places = graph.add_initializer(self._main, ir.tensor(np.array(_SWAP)), graph.fresh_name(f"{name}_axes", names))
        node = ir.Node("", "Gather", [sizes, places], name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = name, sizes.type, ir.Shape([3])
        self._main.append(node)  # Sorted in the end.
        return made

    def _transposed(self, value: ir.Value, names: set[str]) -> ir.Value:
        if graph.has_constant(value):
            array = graph.constant(value)
            assert array is not None
            tensor = ir.tensor(np.ascontiguousarray(array.transpose(_SWAP)))
            return graph.add_initializer(self._main, tensor, graph.fresh_name(f"{value.name}_swapped", names))
        name = graph.fresh_name(f"{value.name}_swap", names)
        node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _SWAP)], name=name)
        made = node.outputs[0]
        made.name, made.type = graph.fresh_name(f"{name}_output", names), value.type
        made.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in _SWAP])
        self._main.append(node)  # Sorted in the end.
        return made


def _values(part: Rows) -> list[ir.Value]:
    given = (part.nodes[0].inputs[at] for at in part.inputs)
    return [value for value in given if value is not None]


def _origin(value: ir.Value) -> tuple[ir.Value, bool]:
    """`value` before swaps, and whether they leave it the other way round."""
    odd = False
    while (node := value.producer()) is not None and _is_swap(node) and node.inputs[0] is not None:
        value, odd = node.inputs[0], not odd
    return value, odd
