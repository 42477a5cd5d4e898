"""MatMul(x, W) with a W of three or two values -> the same, W known to be ternary or binary (only meta is written).

Networks trained with ternary weights come with them as floats. They fit a kernel of two bits without loss, which later
passes and the target can only know from here: each weight is read once, mostly only its first few numbers.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph, ternary

__all__ = ["FindTernary"]


class FindTernary(ir.passes.InPlacePass):
    """Writes `Value.meta["qgraph.ternary"]` on constant weights of products, a `qgraph.ternary.Grid`.

    Refused: weights that products read in both directions, and those with more values.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        axes: dict[ir.Value, set[int]] = {}
        for node in model.graph:
            if not graph.is_standard(node, "MatMul", "Gemm"):
                continue
            weight = node.inputs[1]
            if weight is not None and graph.has_constant(weight) and graph.is_float(weight):
                axes.setdefault(weight, set()).add(1 if node.attributes.get_int("transB", 0) else 0)
        for weight, found in axes.items():
            weight.meta.pop(ternary.GRID, None)
            array = graph.constant(weight) if len(found) == 1 else None
            grid = ternary.detect(array, next(iter(found))) if array is not None else None
            if grid is not None:
                weight.meta[ternary.GRID] = grid
            del array
            graph.release(weight)
        return ir.passes.PassResult(model, False)
