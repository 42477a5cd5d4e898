"""Gather(T, ids), MatMul(x, W) with W equal to T transposed -> the same with com.microsoft.FusedMatMul(x, T, transB=1).

Some builders write an embedding that is the output head, too, twice: once by row and once by column. The table is then
kept, quantized and paged in once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.strips import Strips
from qgraph.targets import Target

__all__ = ["TieHead"]

_LEAST = 1 << 14
"""Elements; below it nothing is gained."""
_WINDOW = 1 << 23


class TieHead(ir.passes.InPlacePass):
    """Finds the copies; a few rows tell of most that they are none, and all of the numbers that they are.

    Refused: weights that may be overridden; targets without the operator.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if "FusedMatMul" not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        main = model.graph
        tables: dict[tuple[int, ...], list[ir.Value]] = {}
        for node in main:
            table = node.inputs[0] if graph.is_standard(node, "Gather") else None
            if table is not None and _is_matrix(table) and not node.attributes.get_int("axis", 0):
                known = tables.setdefault(graph.run_shape(table) or (), [])
                if table not in known:
                    known.append(table)
        changed = False
        for node in [n for n in main if graph.is_standard(n, "MatMul")] if tables else []:
            weight = node.inputs[1]
            if weight is None or not _is_matrix(weight):
                continue
            shape = (graph.run_shape(weight) or ())[::-1]
            twin = next((table for table in tables.get(shape, []) if _is_turned(table, weight)), None)
            if twin is not None:
                new = ir.Node("com.microsoft", "FusedMatMul", [node.inputs[0], twin], [ir.AttrInt64("transB", 1)])
                graph.replace_node(main, node, new)
                changed = True
        if changed:
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)


def _is_matrix(value: ir.Value) -> bool:
    return (
        graph.has_constant(value)
        and graph.is_float(value)
        and len(graph.run_shape(value) or ()) == 2
        and (graph.element_count(value) or 0) >= _LEAST
    )


def _is_turned(table: ir.Value, weight: ir.Value) -> bool:
    """Whether `weight` holds the numbers of `table`, turned."""
    assert table.const_value is not None and weight.const_value is not None
    one, other = Strips(table.const_value), Strips(weight.const_value)
    count, width = one.shape
    step = max(1, _WINDOW // (4 * width))
    parts = [slice(0, 1), slice(count - 1, count), *(slice(s, min(s + step, count)) for s in range(0, count, step))]
    return all(np.array_equal(one.window(part), other.window(slice(None), part).T) for part in parts)
