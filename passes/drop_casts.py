"""Cast(x) to the type that x has -> x.

Such Casts are left where a whole graph changed its type, and each is one kernel's start on a GPU.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph

__all__ = ["DropCasts"]


class DropCasts(ir.passes.InPlacePass):
    """Acts on the graph and on the bodies of If, Loop and Scan.

    Refused: Casts whose removal would make one value two outputs of a graph, or an input an output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        nodes = [node for one in graph.all_graphs(model.graph) for node in one if graph.is_standard(node, "Cast")]
        return ir.passes.PassResult(model, sum([graph.drop_cast(node) for node in nodes]) > 0)
