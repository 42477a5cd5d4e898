"""Which weights get how many bits, so that all together stay under a size: least noise for the bytes.

Each product has a few schemes, each with its bytes and its noise. Only those on the lower convex hull of the two can
be best at some exchange rate between noise and bytes; steps along the hulls are taken in the order of noise removed
per byte, which is optimal but for the last step (H. Everett, "Generalized Lagrange Multiplier Method", 1963; Y. Shoham
and A. Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988, section III).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qgraph import graph, weights
from qgraph.errors import OptionError
from qgraph.rules import Rules
from qgraph.spec import PerBlock
from qgraph.targets import Form, Kernel

__all__ = ["Choice", "allocate", "assign", "choices", "stored_bits", "weights_in"]

_SCALE_BITS = 32


@dataclasses.dataclass(frozen=True)
class Choice:
    """One weight in one scheme.

    Attributes:
        scheme: the scheme.
        bits: stored bits of all its weights, scales and zero points included.
        noise: what it does to the outputs; any unit that adds up.
    """

    scheme: str
    bits: float
    noise: float


def stored_bits(shape: Sequence[int], kernel: Kernel) -> float:
    """Bits that the weight of a kernel takes on disk, scales and zero points included."""
    assert kernel.weight is not None
    spec = kernel.weight[1]
    count = math.prod(shape)
    each = spec.format.storage.bitwidth
    granularity = spec.granularity
    if not isinstance(granularity, PerBlock):
        return float(count * each + _SCALE_BITS * count / max(1, shape[-1]))
    rows = shape[granularity.axis]
    scales = count // max(1, rows) * -(-rows // granularity.size)
    filled = count // max(1, rows) * -(-rows // granularity.size) * granularity.size
    return float(filled * each + scales * (_SCALE_BITS + (0 if spec.symmetric else each)))


def weights_in(model: ir.Model, rules: Rules) -> dict[ir.Value, list[tuple[ir.Node, dict[str, Kernel]]]]:
    """Constant weights that have kernels with few bits -> the nodes that read them, with their kernels."""
    found: dict[ir.Value, list[tuple[ir.Node, dict[str, Kernel]]]] = {}
    for node in model.graph:
        kernels = {name: k for name, k in rules.kernels(node)[0].items() if k.form is Form.WEIGHTS and k.weight}
        if not kernels:
            continue
        first = next(iter(kernels.values()))
        assert first.weight is not None
        weight = node.inputs[first.weight[0]]
        if weight is not None:
            found.setdefault(weight, []).append((node, kernels))
    return found


def choices(
    model: ir.Model, rules: Rules, noises: Mapping[tuple[str, str], float]
) -> tuple[dict[tuple[str, ...], list[Choice]], int]:
    """(nodes that share a weight -> what it can be, number of weights in all)."""
    found: dict[tuple[str, ...], list[Choice]] = {}
    count = 0
    for weight, readers in weights_in(model, rules).items():
        shape = graph.run_shape(weight) or ()
        count += math.prod(shape)
        common = [name for name in readers[0][1] if all(name in kernels for _, kernels in readers)]
        names = tuple(node.name or "" for node, _ in readers)
        # A table that a product reads, too, is stored in the product's blocks.
        kernels = next((k for node, k in readers if weights.is_product(node)), readers[0][1])
        found[names] = [
            Choice(
                scheme,
                stored_bits(shape, kernels[scheme]),
                sum(noises.get((name, scheme), 0.0) for name in names),
            )
            for scheme in common
        ]
    return found, count


def assign(model: ir.Model, rules: Rules, noises: Mapping[tuple[str, str], float], bits: float) -> dict[str, str]:
    """Node -> scheme: the least noise within `bits` for each weight on average; see `allocate`."""
    found, count = choices(model, rules, noises)
    return allocate(found, bits * count)


def allocate(options: Mapping[tuple[str, ...], Sequence[Choice]], budget: float) -> dict[str, str]:
    """Node -> scheme, of least summed noise within `budget` bits.

    Args:
        options: nodes that share a weight -> what it can be.
        budget: bits for all weights together.

    Raises:
        OptionError: even the fewest bits everywhere are too many; says how many they are.
    """
    hulls = {names: _hull(found) for names, found in options.items() if found}
    left = budget - sum(hull[0].bits for hull in hulls.values())
    if left < 0:
        raise OptionError(
            f"The fewest bits that there are kernels for take {(budget - left) / 8e6:.2f} MB, "
            f"and the size asked for is {budget / 8e6:.2f} MB."
        )
    places = dict.fromkeys(hulls, 0)
    heap: list[tuple[float, tuple[str, ...]]] = []

    def offer(names: tuple[str, ...]) -> None:
        place, hull = places[names], hulls[names]
        if place + 1 < len(hull):
            now, then = hull[place], hull[place + 1]
            heapq.heappush(heap, ((then.noise - now.noise) / (then.bits - now.bits), names))

    for names in hulls:
        offer(names)
    while heap:
        _, names = heapq.heappop(heap)
        hull, place = hulls[names], places[names]
        cost = hull[place + 1].bits - hull[place].bits
        if cost <= left:
            # What does not fit any more stays where it is; smaller ones may still fit.
            left -= cost
            places[names] = place + 1
            offer(names)
    return {name: hulls[names][place].scheme for names, place in places.items() for name in names}


def _hull(found: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull, fewest bits first; each loses less than the one before."""
    hull: list[Choice] = []
    for one in sorted(found, key=lambda c: (c.bits, c.noise)):
        if hull and one.noise >= hull[-1].noise:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], one):
            hull.pop()
        hull.append(one)
    return hull


def _slope(first: Choice, second: Choice) -> float:
    if second.bits == first.bits:
        return -math.inf
    return (second.noise - first.noise) / (second.bits - first.bits)
