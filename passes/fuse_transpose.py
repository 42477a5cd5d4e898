"""MatMul(x, Transpose(W)) -> com.microsoft.FusedMatMul(x, W, transB=1), W constant.

How exporters write an output head that is the embedding. The runtime would make a transposed copy of the table when it
loads; so it reads the one that is there, and a product with blocks of it can, too.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.targets import Target

__all__ = ["FuseTranspose"]


class FuseTranspose(ir.passes.InPlacePass):
    """Turned weights are read as they lie.

    Refused: weights that are computed or may be overridden, or have other than two dimensions, or whose turned form is
    an output; targets without the operator.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if "FusedMatMul" not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        main = model.graph
        found = [(n, weight) for n in main if graph.is_standard(n, "MatMul") and (weight := _turned(n)) is not None]
        for node, weight in found:
            new = ir.Node("com.microsoft", "FusedMatMul", [node.inputs[0], weight], [ir.AttrInt64("transB", 1)])
            graph.replace_node(main, node, new)
        if found:
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _turned(node: ir.Node) -> ir.Value | None:
    """The constant that stands before a transpose on the right."""
    turn = graph.producer(node.inputs[1], "Transpose")
    if turn is None or turn.outputs[0].is_graph_output() or turn.graph is not node.graph:
        return None
    weight, order = turn.inputs[0], turn.attributes.get_ints("perm", [1, 0])
    if not graph.has_constant(weight) or len(graph.run_shape(weight) or ()) != 2 or list(order) != [1, 0]:
        return None
    return weight
