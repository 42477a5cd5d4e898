"""DequantizeLinear, MatMul, Add(row) -> com.microsoft.MatMulIntegerToFloat(codes, ..., bias).

The runtime makes the same kernel of the QDQ form, but leaves the bias behind it as an Add over the whole result;
written so, the kernel adds the bias while it scales its sums.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.targets import KERNEL, Target

__all__ = ["JoinBias"]

_FUSED = "MatMulIntegerToFloat"


class JoinBias(ir.passes.InPlacePass):
    """Acts on planned products with a float result, where the target calls MatMulIntegerToFloat fast.

    Refused: results that are read by anything but the Add, or are quantized again; biases that are not one number for
    each column; weights with zero points other than zero.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        changed = False
        if _FUSED in self.target.fast_operators:
            names = graph.value_names(main)
            for node in [n for n in main if graph.is_standard(n, "MatMul") and KERNEL in n.meta]:
                changed |= _join(main, node, names)
        if changed:
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)


def _join(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    left, right = (graph.producer(value, "DequantizeLinear") for value in node.inputs)
    users = node.outputs[0].consumers()
    if left is None or right is None or len(users) != 1 or node.outputs[0].is_graph_output():
        return False
    add = users[0]
    if not graph.is_standard(add, "Add") or any(u.op_type == "QuantizeLinear" for u in add.outputs[0].consumers()):
        return False
    codes, scale = right.inputs[0], right.inputs[1]
    zero = graph.constant(right.inputs[2]) if len(right.inputs) > 2 else None
    bias = add.inputs[1 - list(add.inputs).index(node.outputs[0])]
    shape = graph.run_shape(bias)
    columns = (graph.run_shape(codes) or (0,))[-1]
    if not graph.has_constant(codes) or (zero is not None and np.any(zero)):
        return False
    if bias is None or not graph.has_constant(bias) or not shape or shape[-1] != columns or np.prod(shape) != columns:
        return False
    rank = left.inputs[0].shape if left.inputs[0] is not None else None
    if rank is None or len(shape) > len(rank):
        return False
    source, step, middle = (left.inputs[i] for i in range(3))
    fused = ir.Node(
        "com.microsoft",
        _FUSED,
        [source, codes, step, scale, middle, None, weights.flat(main, bias, names)],
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    kernel = node.meta[KERNEL]
    graph.replace_node(main, add, fused)
    graph.merge_origins(fused, node)
    fused.meta[KERNEL] = kernel
    main.remove(node, safe=True)
    return True
