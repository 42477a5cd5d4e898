"""Reciprocal(x)  ->  Div(1, x), for providers that have the one right in integers and the other wrong.

QNN's HTP gave a tenth of the reciprocal where that reached 100, in 8 and in 16 bits, and takes the operator whenever
quantizers happen to stand around it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.targets import Target

__all__ = ["PlainReciprocal"]


class PlainReciprocal(ir.passes.InPlacePass):
    """Rewrites reciprocals of float32 in the main graph and in bodies, where `target.reciprocals` is not set."""

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.target.reciprocals:
            return ir.passes.PassResult(model, False)
        names = graph.value_names(model.graph)
        changed = False
        for home in graph.all_graphs(model.graph):
            found = [n for n in home if graph.is_standard(n, "Reciprocal") and graph.is_float(n.inputs[0])]
            if not found:
                continue
            one = graph.add_initializer(home, ir.Tensor(np.array(1.0, np.float32)), graph.fresh_name("one", names))
            for node in found:
                graph.replace_node(home, node, ir.Node("", "Div", [one, node.inputs[0]]))
            changed = True
        return ir.passes.PassResult(model, changed)
