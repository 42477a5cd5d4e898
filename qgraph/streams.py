"""Two streams of values through one graph, stretch by stretch: the model's own, and that of its quantized beginning.

An algorithm that corrects what is quantized before a layer needs both at every layer in turn. The graph is cut where
such layers read; what is alive at a cut lies in files, and each stretch between two cuts runs once for each stream. So
the cost is that of two runs of the model, whatever the number of cuts, and the memory that of one batch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph import experts, graph
from qgraph.data import Dataset
from qgraph.session import Session, SessionOptions

__all__ = ["Streams"]

Array = NDArray[Any]
_PATIENT = SessionOptions(config=(("session.intra_op.allow_spinning", "0"),))
"""Between two runs files are read: waiting threads would only take cores away."""

_PICKING = frozenset({"Compress", "Gather", "GatherElements", "GatherND", "Slice", "Split"})
"""Operators whose further inputs say what of the first is taken."""


class _Shelf:
    """The arrays of one value, a batch after the other, in a file."""

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO = path.open("w+b")
        self._places: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []

    @property
    def kind(self) -> tuple[np.dtype[Any], int]:
        """Type and rank of the arrays."""
        _, dtype, shape = self._places[0]
        return dtype, len(shape)

    def append(self, array: Array) -> None:
        self._places.append((self._file.seek(0, 2), array.dtype, array.shape))
        np.ascontiguousarray(array).tofile(self._file)

    def get(self, number: int) -> Array:
        place, dtype, shape = self._places[number]
        self._file.seek(place)
        return np.fromfile(self._file, dtype, int(np.prod(shape))).reshape(shape)

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class Streams:
    """Values of the model and of its quantized twin, on all batches of the data.

    Args:
        model: its nodes that `quantizes` names differ between the streams.
        data: the feeds.
        quantizes: whether a node computes something else in the quantized stream.
        write: turns a stretch of the graph into its quantized twin, in place.
        folder: where the model's external tensors lie.
        scratch: where the files go; the system's folder for temporary files unless given.
    """

    def __init__(
        self,
        model: ir.Model,
        data: Dataset,
        quantizes: Callable[[ir.Node], bool],
        write: Callable[[ir.Model], None],
        folder: Path | None = None,
        scratch: Path | None = None,
    ):
        self._model, self._write, self._folder = model, write, folder
        self._quantizes = quantizes
        self._nodes = list(model.graph)
        self._last = _last_uses(self._nodes)
        self._moved = _moved(self._nodes, quantizes)
        self._at = 0
        self._room = Path(tempfile.mkdtemp(prefix="qgraph-streams-", dir=scratch))
        self._shelves: tuple[dict[ir.Value, _Shelf], dict[ir.Value, _Shelf]] = ({}, {})
        self._visible: list[NDArray[np.bool_] | None] = []
        self._files = 0
        inputs = [v for v in model.graph.inputs if v in self._last and v.name not in model.graph.initializers]
        for batch in data:
            for value in inputs:
                self._keep(0, value, batch.feeds[str(value.name)])
            self._visible.append(batch.visible)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files."""
        for shelves in self._shelves:
            for shelf in shelves.values():
                shelf.remove()
            shelves.clear()
        shutil.rmtree(self._room, ignore_errors=True)

    def advance(self, stop: int) -> None:
        """Run both streams on through the node before position `stop` of the graph."""
        nodes = self._nodes[self._at : stop]
        if not nodes:
            return
        made = [v for node in nodes for v in node.outputs if self._last.get(v, -1) >= stop]
        dirty = self._dirty(nodes)
        self._run(0, nodes, made)
        self._run(1, nodes, [v for v in made if v in dirty])
        self._at = stop
        for shelves in self._shelves:
            for value in [v for v in shelves if self._last[v] < stop]:
                shelves.pop(value).remove()

    def differs(self, value: ir.Value) -> bool:
        """Whether the streams differ at `value`, which is alive."""
        return value in self._shelves[1]

    def aligned(self, value: ir.Value) -> bool:
        """Whether what is in one place of `value` is the same thing in both streams.

        Where a router sends tokens to experts, the streams may send them to others, and in other numbers.
        """
        return value not in self._moved

    def pairs(self, value: ir.Value) -> Iterator[tuple[Array, Array]]:
        """(in the model, in its twin) of `value`, which is alive, batch by batch.

        Rows [positions, channels] of a value with three dimensions are only those that the data says are to be seen.
        """
        for number, visible in enumerate(self._visible):
            own = self._shelves[0][value].get(number)
            other = self._shelves[1][value].get(number) if value in self._shelves[1] else own
            if visible is not None and own.ndim == 3 and own.shape[:2] == visible.shape:
                same = own is other
                own = own[visible]
                other = own if same else other[visible]
            yield own, other

    def _keep(self, stream: int, value: ir.Value, array: Array) -> None:
        shelves = self._shelves[stream]
        if value not in shelves:
            self._files += 1
            shelves[value] = _Shelf(self._room / f"{self._files}.bin")
        shelves[value].append(array)

    def _dirty(self, nodes: Sequence[ir.Node]) -> set[ir.Value]:
        """What differs in the quantized stream."""
        found: set[ir.Value] = set(self._shelves[1])
        for node in nodes:
            if self._quantizes(node) or any(value in found for value in _reads(node)):
                found.update(node.outputs)
        return found

    def _run(self, stream: int, nodes: Sequence[ir.Node], made: Sequence[ir.Value]) -> None:
        if not made:
            return
        own = set(nodes)
        reads = {value: None for node in nodes for value in _reads(node)}
        # What this stretch itself makes may be on the shelves already, from the other stream.
        fed = [v for v in reads if v in self._shelves[0] and v.producer() not in own]
        constants = [v for v in reads if v.is_initializer() and v not in self._shelves[0]]
        view = ir.GraphView(
            fed,
            made,
            nodes=nodes,
            initializers=constants,
            opset_imports=self._model.graph.opset_imports,
            name="stretch",
        )
        part = ir.Model(view.clone(), ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        for given, value in zip(part.graph.inputs, fed, strict=True):
            dtype, rank = self._shelves[0][value].kind
            if value.dtype != ir.DataType.BFLOAT16:
                given.type = ir.TensorType(ir.DataType.from_numpy(dtype))
            if given.shape is None:
                given.shape = ir.Shape([None] * rank)
        if stream == 1:
            self._write(part)
        names = [str(value.name) for value in made]
        with Session(part, _PATIENT, self._folder) as session:
            for number in range(len(self._visible)):
                feeds: dict[str, Array] = {}
                for value in fed:
                    shelves = self._shelves[1] if stream == 1 and value in self._shelves[1] else self._shelves[0]
                    feeds[str(value.name)] = shelves[value].get(number)
                results = session.run(feeds, names)
                for value, name in zip(made, names, strict=True):
                    self._keep(stream, value, results[name])


def _moved(nodes: Sequence[ir.Node], quantizes: Callable[[ir.Node], bool]) -> set[ir.Value]:
    """Values that are picked from others in an order, or a number, that may differ between the streams."""
    dirty: set[ir.Value] = set()
    found: set[ir.Value] = set()
    for node in nodes:
        reads = set(_reads(node))
        source = node.inputs[0] if node.inputs else None
        if node.op_type in ("Shape", "Size") and source not in found:
            continue
        if quantizes(node) or not dirty.isdisjoint(reads):
            dirty.update(node.outputs)
        if experts.PUT_BACK in node.meta:
            continue
        # What is scattered comes to stand where it belongs.
        moved = source in found if node.op_type.startswith("Scatter") else not found.isdisjoint(reads)
        # Picking from a constant puts other numbers into the same places.
        picks = node.op_type in _PICKING and source is not None and not source.is_initializer()
        if moved or (picks and any(value in dirty for value in node.inputs[1:])):
            found.update(node.outputs)
    return found


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in its bodies too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        bodies: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        for body in bodies:
            for one in graph.all_graphs(body):
                inner = {v for n in one for v in n.outputs}
                for inside in one:
                    yield from (v for v in inside.inputs if v is not None and v not in inner and v.graph is not one)


def _last_uses(nodes: Sequence[ir.Node]) -> dict[ir.Value, int]:
    """Value -> position of the last node that reads it; constants left out."""
    found: dict[ir.Value, int] = {}
    for position, node in enumerate(nodes):
        for value in _reads(node):
            if not value.is_initializer():
                found[value] = position
    return found
