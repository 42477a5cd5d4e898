"""Which groups of row-wise operators compute with their first two axes the other way round, to save transposes.

Each group of operators that read one another may be turned round as a whole; a Transpose(1, 0, 2), a swap, is needed
where what makes a value and what reads it differ. Groups are turned as long as fewer columns are transposed so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qgraph import graph
from qgraph.rowwise import Rows, rows

__all__ = ["SWAP", "Layout", "asks_whole", "is_swap"]

SWAP = (1, 0, 2)
"""The order of axes."""
_ROUNDS = 4
"""How often each group is looked at, at most; the first time decides nearly all."""


def is_swap(node: ir.Node) -> bool:
    """Whether nothing but a transpose of the first two of three axes is asked of the node."""
    if not graph.is_standard(node, "Transpose") or tuple(node.attributes.get_ints("perm", [])) != SWAP:
        return False
    return _is_ours(node.outputs[0], node.graph)


def _is_ours(value: ir.Value, main: ir.Graph | ir.Function | None) -> bool:
    return all(user.graph is main for user in value.consumers())


def asks_whole(user: ir.Node | ir.Value) -> bool:
    """Whether a node asks for all sizes of its input, which may as well be put in order afterwards."""
    if not isinstance(user, ir.Node) or not graph.is_standard(user, "Shape") or user.attributes:
        return False
    return not user.outputs[0].is_graph_output()


class _Tally:
    """How many readers of a value need the other order of axes, kept up to date as groups are turned round.

    Args:
        value: what is read.
        maker: the group that makes it, None for what is never turned round.
        readers: the group of each reader, None likewise, and whether swaps turn the value round on the way.
    """

    def __init__(self, value: ir.Value, maker: int | None, readers: Iterable[tuple[int | None, bool]]):
        width = value.shape[2] if value.shape is not None and len(value.shape) == 3 else 1
        self._columns = 0 if graph.has_constant(value) else width if isinstance(width, int) else 1
        self.maker = maker
        self.readers: dict[int | None, list[int]] = {}
        """Group -> how many of its readers get it as it is, and how many the other way round."""
        for group, odd in readers:
            self.readers.setdefault(group, [0, 0])[odd] += 1
        self._all = sum(map(sum, self.readers.values()))
        self._odd = sum(odd for _, odd in self.readers.values())

    def flip(self, group: int, turned: bool) -> None:
        """A group has been turned round, or back."""
        even, odd = self.readers.get(group, (0, 0))
        self._odd += even - odd if turned else odd - even

    def price(self, turned: set[int]) -> int:
        """Columns that have to be transposed."""
        needing = self._all - self._odd if self.maker in turned else self._odd
        return self._columns if needing else 0


class Layout:
    """Which groups of operators are turned round, and what has to be transposed then."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._part: dict[ir.Node, Rows] = {}
        for node in main:
            found = rows(node) if node not in self._part else None
            if found is not None and all(_is_ours(out, main) for out in found.nodes[-1].outputs):
                self._part.update(dict.fromkeys(found.nodes, found))
        self.groups = self._joined()
        self.turned: set[int] = set()
        self._group = {part.nodes[0]: number for number, group in enumerate(self.groups) for part in group}

    def _joined(self) -> list[list[Rows]]:
        """Parts that read one another directly, in one group; small groups first."""
        leader = {part.nodes[0]: part.nodes[0] for part in self._part.values()}

        def find(node: ir.Node) -> ir.Node:
            while leader[node] is not node:
                leader[node] = leader[leader[node]]
                node = leader[node]
            return node

        for first in list(leader):
            for value in _values(self._part[first]):
                if (maker := self._maker(value)) is not None:
                    leader[find(first)] = find(maker)
        groups: dict[ir.Node, list[Rows]] = {}
        for first in leader:
            groups.setdefault(find(first), []).append(self._part[first])
        return sorted(groups.values(), key=len)

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """The first node of the part that makes `value`."""
        node = value.producer()
        return self._part[node].nodes[0] if node is not None and node in self._part else None

    def users(self, value: ir.Value) -> Iterable[tuple[ir.Node | ir.Value, int, bool]]:
        """Who reads a value that no swap makes: node, position, and whether swaps in between turn it round.

        An output of the model stands for its caller.
        """
        pending = [(value, False)]
        while pending:
            one, odd = pending.pop()
            if one.is_graph_output():
                yield one, 0, odd
            for user, at in one.uses():
                if is_swap(user):
                    pending.append((user.outputs[0], not odd))
                else:
                    yield user, at, odd

    def needs(self, value: ir.Value, user: ir.Node | ir.Value, at: int, odd: bool) -> bool:
        """Whether this reader needs the other order of axes than the value will have."""
        return odd ^ (self._reading(user, at) in self.turned) ^ (self._making(value) in self.turned)

    def _making(self, value: ir.Value) -> int | None:
        """The group that makes a value; None for what is never turned round."""
        maker = self._maker(value)
        return None if maker is None else self._group[maker]

    def _reading(self, user: ir.Node | ir.Value, at: int) -> int | None:
        """The group that reads there by rows; None for what is never turned round."""
        part = self._part.get(user) if isinstance(user, ir.Node) else None
        by_rows = part is not None and user is part.nodes[0] and at in part.inputs
        return self._group[part.nodes[0]] if by_rows and part is not None else None

    def settle(self) -> bool:
        """Turn groups round; whether any was."""
        tallies = [_Tally(value, self._making(value), self._readers(value)) for value in self.origins()]
        touched: list[list[_Tally]] = [[] for _ in self.groups]
        for tally in tallies:
            for number in {tally.maker, *tally.readers}:
                if number is not None:
                    touched[number].append(tally)
        for _ in range(_ROUNDS):
            improved = [self._improve(number, known) for number, known in enumerate(touched)]
            if not any(improved):
                break
        return bool(self.turned)

    def _improve(self, number: int, known: list[_Tally]) -> bool:
        """Turn a group round if that saves anything; whether it does."""
        before = sum(tally.price(self.turned) for tally in known)
        self._flip(number, known)
        if sum(tally.price(self.turned) for tally in known) < before:
            return True
        self._flip(number, known)
        return False

    def _flip(self, number: int, known: list[_Tally]) -> None:
        self.turned ^= {number}
        for tally in known:
            tally.flip(number, number in self.turned)

    def origins(self) -> dict[ir.Value, None]:
        """What may have to be transposed: what goes through swaps, and what parts read and make."""
        swapped = [_origin(node.outputs[0]) for node in self._main if is_swap(node)]
        read = [_origin(value) for first in self._group for value in _values(self._part[first])]
        made = [output for first in self._group for output in self._part[first].nodes[-1].outputs]
        return dict.fromkeys((*swapped, *read, *made))

    def _readers(self, value: ir.Value) -> Iterator[tuple[int | None, bool]]:
        """The group of each reader that may need the other order, and whether swaps turn the value round for it."""
        for user, at, odd in self.users(value):
            if not asks_whole(user):
                yield self._reading(user, at), odd


def _values(part: Rows) -> list[ir.Value]:
    given = (part.nodes[0].inputs[at] for at in part.inputs)
    return [value for value in given if value is not None]


def _origin(value: ir.Value) -> ir.Value:
    """`value` before swaps."""
    while (node := value.producer()) is not None and is_swap(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
