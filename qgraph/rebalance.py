"""Moves range between the channels of a graph: finds groups, searches factors, scales, and keeps samples right."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, scaling
from qgraph.apart import APART, Apart
from qgraph.balance import Balance, search
from qgraph.calibration import RUNS, UNSCALED
from qgraph.formats import UINT8
from qgraph.layouts import along
from qgraph.readers import Reader
from qgraph.sides import SIDE, Side, hushed, loudest, seconds
from qgraph.spec import QuantSpec, Scheme
from qgraph.spread import Edit, Layout
from qgraph.targets import Refusal, Target
from qgraph.targets.cpu_checks import finite

__all__ = ["FACTOR", "Change", "Rebalance"]

FACTOR = "qgraph.factor"
"""Key in `Node.meta` of a Mul that only makes what stands behind it easier to quantize."""

_WEIGHT = 4096
"""Elements from which a constant is a weight that must not be stored twice."""
_LEAST_ASIDE = 1.0
"""Decibels that channels in float have to gain, however little time they take."""
_WORTH_ASIDE = 5e-3
"""Noise, as a share of the output's power, that must go for the time of a whole product; for less time, less. The four
products of all-MiniLM-L6-v2 that gain 1.5 dB for the whole model are at 0.019 and above, all others below 0.001."""

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Change:
    """A group of readers whose input was scaled.

    Attributes:
        readers: names of the layers.
        before: signal over noise behind their weights before, dB, on the samples.
        after: and after.
        explicit: whether a Mul was put before them, because nothing could take the factors in.
    """

    readers: tuple[str, ...]
    before: float
    after: float
    explicit: bool


class Rebalance:
    """One graph, one target.

    Args:
        main: the graph, its layers surveyed.
        target: knows which layers it runs in integers, and how.
        scheme: the number formats.
        keys: those of `Node.meta` under which a layer's sample and its channels' bounds lie.
        dynamic: names of the layers whose ranges will be found at run time.
    """

    def __init__(
        self,
        main: ir.Graph,
        target: Target,
        scheme: Scheme,
        keys: tuple[str, str],
        dynamic: Collection[str] = (),
    ):
        self.changes: list[Change] = []
        self.refused: dict[str, str] = {}
        """Reader -> why its input was not scaled."""
        self._main, self._target, self._scheme = main, target, scheme
        self._sample, self._bounds = keys
        self._dynamic = dynamic
        self._groups = scaling.find(main)
        # What these make may be of any size: only its error relative to itself says something.
        self._scalable = {node for group in self._groups if group.free.any() for node in group.makers}
        # Each hurdle is looked for once: a long chain of sums is one group, in which every layer meets the same one.
        self._why: dict[ir.Value, str | None] = {}
        for group in self._groups:
            reason = next(iter(group.reasons), None)
            for value, free in group.values.items():
                self._why.setdefault(value, None if free else reason)
        self._taken: set[str] | None = None

    def groups(self) -> Iterator[tuple[scaling.Group, list[ir.Node]]]:
        """Each group that may be scaled, with those of its readers whose error is known."""
        for group in self._groups:
            surveyed = [node for node in group.readers if self._sample in node.meta]
            if surveyed and group.free.any():
                yield group, surveyed

    def fold(self, group: scaling.Group, surveyed: Sequence[ir.Node], least: float) -> bool:
        """Scale a group if that gains at least so many decibels."""
        if self._shared({(edit.node, edit.position): edit.divides for edit in group.edits}, surveyed):
            return False
        readers = self._readers({node: group.readers[node] for node in surveyed})
        found = search(readers, group.free) if readers else None
        if found is None or found.gain < least:
            self._refuse(surveyed, found)
            return False
        scaling.absorb(self._main, group.edits, found.scale, self._name)
        self._rescale({n: i for n, i in group.readers.items() if self._sample in n.meta}, found, explicit=False)
        return True

    def multiply(self, value: ir.Value, surveyed: Sequence[ir.Node], least: float, aside: bool = False) -> bool:
        """Put a Mul before these products, which all read `value`, if that gains at least so many decibels.

        Args:
            value: what they read.
            surveyed: the products.
            least: decibels that a Mul has to gain.
            aside: whether their loudest channels may be computed in float, where that is worth its time.
        """
        if self._shared({(node, 1): False for node in surveyed}, surveyed):
            return False
        count = len(surveyed[0].meta[self._bounds][0])
        everything = np.arange(count)
        readers = self._readers(dict.fromkeys(surveyed, everything))
        found = search(readers, np.ones(count, np.bool_)) if readers else None
        beside = self._beside(readers, found) if aside and found is not None else None
        found = beside[0] if beside is not None else found
        if found is None or found.gain < least:
            self._refuse(surveyed, found)
            return False
        nodes = [reader.node for reader in readers]
        edits = [
            Edit(n, 1, along(everything, 1 if n.attributes.get_int("transB", 0) else 0, 2), divides=False)
            for n in nodes
        ]
        scaling.absorb(self._main, edits, found.scale, self._name)
        factor = ir.Tensor((1.0 / found.scale).astype(np.float32))
        by = graph.add_initializer(self._main, factor, self._name(f"{value.name}_smoothing"))
        product = ir.Node("", "Mul", [value, by], name=self._name(f"{value.name}_Mul"))
        product.meta[FACTOR] = True
        made = product.outputs[0]
        made.name, made.type, made.shape = self._name(f"{value.name}_smooth"), value.type, value.shape
        if graph.RUN_SHAPE in value.meta:
            made.meta[graph.RUN_SHAPE] = value.meta[graph.RUN_SHAPE]
        # In the order of the graph, the first of them comes first.
        self._main.insert_before(nodes[0], product)
        for node in nodes:
            node.replace_input_with(0, made)
        for node in nodes:
            node.meta[UNSCALED] = node.meta[self._sample], factor.numpy()
        self._rescale(dict.fromkeys(nodes, everything), found, explicit=True)
        if beside is not None:
            self._set_aside(product, nodes, beside[1])
        return True

    def _beside(self, readers: list[Reader], found: Balance) -> tuple[Balance, list[Side]] | None:
        """The best factors with the loudest channels set aside; None where that gains too little for its time."""
        magnitude = np.max([reader.magnitudes(everything=True) for reader in readers], axis=0)
        channels = loudest(magnitude)
        kernels = [self._target.kernel(reader.node, self._scheme) for reader in readers]
        usual = sum(kernel.integer_seconds for kernel in kernels if not isinstance(kernel, Refusal))
        if not channels.size:
            return None
        rest = [reader.without(channels) for reader in readers]
        free = np.ones(magnitude.size, np.bool_)
        free[channels] = False
        other = search(rest, free)
        share = seconds(self._target, [reader.node for reader in readers]) / usual if usual > 0.0 else 0.0
        best = max(found.after, found.before)
        if other.after < best + _LEAST_ASIDE or 10 ** (-best / 10) - 10 ** (-other.after / 10) < _WORTH_ASIDE * share:
            return None
        sides = [Side(channels, whole.share(part)) for whole, part in zip(readers, rest, strict=True)]
        return Balance(hushed(other.scale, channels), found.before, other.after), sides

    def _set_aside(self, factor: ir.Node, nodes: Sequence[ir.Node], sides: Sequence[Side]) -> None:
        """Plan it: what is known of the products' inputs is that of the others from now on."""
        factor.meta[SIDE] = sides[0]
        made: dict[int, Floats] = {}

        def hushed_in(array: Floats) -> Floats:
            if id(array) not in made:
                made[id(array)] = array.copy()
                made[id(array)][..., sides[0].channels] = 0
            return made[id(array)]

        for node, side in zip(nodes, sides, strict=True):
            node.meta[SIDE] = side
            node.meta[self._sample] = hushed_in(node.meta[self._sample])
            node.meta[self._bounds] = tuple(hushed_in(bound) for bound in node.meta[self._bounds])
            if RUNS in node.meta:
                node.meta[RUNS] = hushed_in(node.meta[RUNS])
            if APART in node.meta:
                node.meta[APART] = node.meta[APART].without(side.channels)

    def explain(self, nodes: Iterable[ir.Node]) -> None:
        """Note for each of these layers that was not looked at why its input could not be scaled."""
        seen = {name for change in self.changes for name in change.readers} | self.refused.keys()
        for node in nodes:
            source = node.inputs[0]
            if graph.label(node) in seen or source is None:
                continue
            why = self._why[source] if source in self._why else scaling.hurdle(node)
            if why is not None:
                self.refused[graph.label(node)] = why

    def _readers(self, indices: Mapping[ir.Node, Layout]) -> list[Reader]:
        """Those that the target can run in integers."""
        found: list[Reader] = []
        for node, index in indices.items():
            kernel = self._target.kernel(node, self._scheme)
            if isinstance(kernel, Refusal) or kernel.weight is None:
                self.refused[graph.label(node)] = "it has no integer kernel"
                continue
            sample, bounds = node.meta[self._sample], node.meta[self._bounds]
            weight = node.inputs[kernel.weight[0]]
            if weight is None or not finite(weight) or not np.isfinite(bounds).all():
                self.refused[graph.label(node)] = "its weight or what it reads holds NaN or infinity"
                continue
            activation = kernel.activations.get(0)
            apart: Apart | None = node.meta.get(APART)
            runs = node.meta.get(RUNS) if graph.label(node) in self._dynamic else None
            if runs is not None and activation is None:
                activation = QuantSpec(UINT8)
            relative = node in self._scalable
            found.append(Reader(node, sample, bounds, index, activation, kernel.weight[1], relative, apart, runs))
        return found

    def _shared(self, divided: Mapping[tuple[ir.Node, int], bool], surveyed: Sequence[ir.Node]) -> bool:
        """Whether a weight that would be scaled has other readers, for whom it would have to be stored twice.

        Args:
            divided: (node, input position) that would be scaled -> whether it would be divided, or multiplied.
            surveyed: layers to which the refusal is told.
        """
        for (node, position), divides in divided.items():
            weight = node.inputs[position]
            if weight is None or (graph.element_count(weight) or 0) < _WEIGHT:
                continue
            if any(divided.get((use.node, use.idx)) != divides for use in weight.uses()):
                self.refused.update({graph.label(n): f"{weight.name!r} is shared with other layers" for n in surveyed})
                return True
        return False

    def _refuse(self, nodes: Sequence[ir.Node], found: Balance | None) -> None:
        for node in nodes:
            if found is not None:
                self.refused[graph.label(node)] = f"scaling its input would gain {found.gain:.2f} dB"

    def _rescale(self, indices: Mapping[ir.Node, Layout], found: Balance, explicit: bool) -> None:
        """New samples and bounds, shared where they were."""
        made: dict[tuple[int, bytes], Floats] = {}

        def scaled(array: Floats, index: Layout, axis: int) -> Floats:
            key = (id(array), index.tobytes())
            if key not in made:
                made[key] = (array / found.scale[along(index, axis, array.ndim)]).astype(np.float32)
            return made[key]

        for node, index in indices.items():
            sample, (low, high) = node.meta[self._sample], node.meta[self._bounds]
            node.meta[self._sample] = scaled(sample, index, 1)
            node.meta[self._bounds] = (scaled(low, index, 0), scaled(high, index, 0))
            if APART in node.meta:
                node.meta[APART] = node.meta[APART].scaled(found.scale[index])
            if RUNS in node.meta:
                node.meta[RUNS] = scaled(node.meta[RUNS], index, 2)
            self.refused.pop(graph.label(node), None)
        names = tuple(graph.label(node) for node in indices)
        self.changes.append(Change(names, found.before, found.after, explicit))

    def _name(self, wanted: str) -> str:
        if self._taken is None:
            self._taken = graph.value_names(self._main)
        return graph.fresh_name(wanted, self._taken)
