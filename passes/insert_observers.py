"""An empty observer on each annotated value whose range must be seen: one per group of values that share parameters.

Outputs of operators that only move codes are not observed: their values are those of their input.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import observers
from qgraph.calibration import OBSERVER
from qgraph.targets import KERNEL, SPEC, Kernel

__all__ = ["InsertObservers"]


class InsertObservers(ir.passes.InPlacePass):
    """Writes `Value.meta["qgraph.observer"]`.

    Args:
        observer: name of the observer for all values; None takes each spec's own.
    """

    def __init__(self, observer: str | None = None):
        super().__init__()
        self.observer = observer

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        for value in annotated(model.graph):
            maker = value.producer()
            kernel: Kernel | None = maker.meta.get(KERNEL) if maker is not None else None
            if kernel is None or not kernel.shares:
                value.meta[OBSERVER] = observers.create(self.observer or value.meta[SPEC].observer)
        return ir.passes.PassResult(model, False)


def annotated(graph: ir.Graph) -> list[ir.Value]:
    """The activations that have a spec, in topological order."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [value for value in values if SPEC in value.meta]
