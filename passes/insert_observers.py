"""An empty observer on each annotated value whose range must be seen, and channel means on the inputs of layers.

Outputs of operators that only move codes have no range of their own: their values are those of their input.
"""

from __future__ import annotations

import onnx_ir as ir
from qgraph.passes.annotate import FOLLOWS

from qgraph import graph, observers
from qgraph.calibration import MEANS, OBSERVER
from qgraph.observers.channel_mean import ChannelMean
from qgraph.targets import KERNEL, SPEC, Kernel, annotated

__all__ = ["InsertObservers"]


class InsertObservers(ir.passes.InPlacePass):
    """Writes `Value.meta["qgraph.observer"]` and `["qgraph.means"]`.

    Args:
        observer: name of the observer for all values; None takes each spec's own.
    """

    def __init__(self, observer: str | None = None):
        super().__init__()
        self.observer = observer

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        for value in annotated(model.graph):
            # PyTorch's observer of values that share parameters sees each of them.
            if FOLLOWS not in value.meta or value.meta[SPEC].torch:
                value.meta[OBSERVER] = observers.create(self.observer or value.meta[SPEC].observer)
        for node in model.graph:
            planned: Kernel | None = node.meta.get(KERNEL)
            source = node.inputs[0] if planned is not None and planned.weight is not None else None
            if source is not None and graph.is_standard(node, "Conv", "MatMul", "Gemm"):
                axis = graph.channel_axis(node)
                source.meta.setdefault(MEANS, {}).setdefault(axis, ChannelMean(axis))
        return ir.passes.PassResult(model, False)
