"""LayerNormalization(Add(x, y)) -> LayerNormalization(Sum(x, y)), where the runtime's fusion of the two is slow.

The runtime merges the Add into SkipLayerNormalization, which on some targets takes several times the time of its parts;
a Sum computes the same numbers and is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph
from qgraph.targets import Target

__all__ = ["ResidualNorm"]


class ResidualNorm(ir.passes.InPlacePass):
    """Acts only for targets that name SkipLayerNormalization among their slow fusions.

    Refused: an Add of integers or of unknown type, or one that broadcasts.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        changed = False
        if "SkipLayerNormalization" in self.target.slow_fusions:
            for node in list(model.graph):
                if graph.is_standard(node, "LayerNormalization"):
                    add = graph.producer(node.inputs[0], "Add")
                    if add is not None and add.graph is model.graph and _plain(add):
                        graph.replace_node(model.graph, add, ir.Node("", "Sum", list(add.inputs)))
                        changed = True
        return ir.passes.PassResult(model, changed)


def _plain(add: ir.Node) -> bool:
    """Two float activations; a constant side is a bias, which other fusions want."""
    return all(graph.is_float(v) and v is not None and not v.is_initializer() for v in add.inputs)
