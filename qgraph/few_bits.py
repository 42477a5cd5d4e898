"""Whether `auto` should choose among weights in blocks of few bits: where those are what the target runs fastest.

A step of generation multiplies one row, and reads all weights for it: the fewer their bytes, the faster it is, and
kernels with float activations and weights in blocks beat integer products of one byte a weight. Of many rows, or where
layers have no such kernel, they do not. So the target's costs decide, for the sizes that will be timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from qgraph import graph, weights
from qgraph.rules import Rules
from qgraph.spec import Mixture
from qgraph.targets import AUTO, WEIGHTS, Kernel, Target

__all__ = ["FewBits", "Order", "notes_of"]

_MATRIX = 2
_COMMON = 4
"""Bits that trained networks usually bear in each weight; what has fewer is tried where these leave something over."""


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order schemes are tried.

    Attributes:
        last: names of those that are tried only where the others leave something of the budget.
        others: names of all but the one with the most bits, which holds a budget if anything does.
        names: of all.
        usual: the schemes without those that are tried last. Channels are scaled for these: to a small trained model
            with outliers in 4 bits that brings 10 dB, and factors chosen for 2 bits bring nothing.
    """

    last: frozenset[str]
    others: frozenset[str]
    names: tuple[str, ...]
    usual: Mixture

    @staticmethod
    def of(scheme: Mixture) -> Order:
        """That of the parts of `scheme`, by their bits."""
        few = frozenset(part.name for part in scheme.parts if part.bits < _COMMON)
        most = max(scheme.parts, key=lambda part: part.bits)
        names = tuple(part.name for part in scheme.parts)
        usual = tuple(part for part in scheme.parts if part.name not in few)
        return Order(few, frozenset(names) - {most.name}, names, dataclasses.replace(scheme, parts=usual))


def notes_of(order: Order | None) -> list[str]:
    """What the user should know where there is an order."""
    if order is None:
        return []
    return [
        "One row at a time, weights in blocks are what this target runs fastest, so 'auto' chose among "
        f"{', '.join(order.names)}: activations stay in float."
    ]


@dataclasses.dataclass(frozen=True)
class FewBits:
    """The choice, for a model that is timed in a certain way.

    Attributes:
        one_row: whether products are timed on one row each, whatever sizes were measured.
    """

    one_row: bool = False

    def suited(self, model: ir.Model, target: Target, rules: Rules) -> Mixture | None:
        """The mixture of weights in blocks that replaces `auto` for this model.

        None where `auto` is faster as it is, and without data, by which alone the loss of few bits is known.

        Args:
            model: its weights are not read.
            target: its default scheme must hold weights in blocks: on others they are slow, and taken by name alone.
            rules: what comes into question in the default scheme.
        """
        blocks, usual = target.schemes.get(WEIGHTS), target.scheme(AUTO).parts
        # Losses on made-up inputs say too little of what few bits do to a text.
        if blocks is None or not rules.calibrated or target.ordinal or all(part.block is None for part in usual):
            return None
        common = tuple(part for part in blocks.parts if part.block is not None and part.bits >= _COMMON)
        if {part.name for part in common} <= {part.name for part in usual}:
            return None
        fewer, before, after = Rules(target, Mixture(AUTO, common)), 0.0, 0.0
        changed = self.price(model)
        for node in model.graph:
            # The rest of a step is small, and was measured on a prompt.
            if self.one_row and not _is_layer(node):
                continue
            now, then = rules.kernels(node)[0], fewer.kernels(node)[0]
            before += _seconds(now)
            after += _seconds(then) if then else max((kernel.float_seconds for kernel in now.values()), default=0.0)
        for value, shape in changed.items():
            value.meta[graph.RUN_SHAPE] = shape
            if shape is None:
                del value.meta[graph.RUN_SHAPE]
        return Mixture(AUTO, tuple(blocks.parts)) if after < before else None

    def price(self, model: ir.Model) -> dict[ir.Value, tuple[int, ...] | None]:
        """Give what products read the sizes that are timed, in place; returns the sizes that were measured."""
        changed: dict[ir.Value, tuple[int, ...] | None] = {}
        for node in model.graph if self.one_row else ():
            value, weight = (node.inputs[0], graph.run_shape(node.inputs[1])) if _is_layer(node) else (None, None)
            if value is not None and weight is not None and value not in changed:
                changed[value] = value.meta.get(graph.RUN_SHAPE)
                value.meta[graph.RUN_SHAPE] = (1, weight[1 if node.attributes.get_int("transB", 0) else 0])
        return changed


def _is_layer(node: ir.Node) -> bool:
    """Whether it is a product with a constant matrix."""
    known = weights.is_product(node) and len(node.inputs) > 1 and graph.has_constant(node.inputs[1])
    return known and len(graph.run_shape(node.inputs[1]) or ()) == _MATRIX


def _seconds(kernels: Mapping[str, Kernel]) -> float:
    """Of the fastest kernel, or in float."""
    return min((min(kernel.integer_seconds, kernel.float_seconds) for kernel in kernels.values()), default=0.0)
