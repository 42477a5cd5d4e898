"""Add(MatMulNBits(x, ...), row) -> MatMulNBits(x, ..., row): the kernel adds the bias while it writes its sums.

The runtime does so itself for a bias of one dimension, and not for one with leading ones, the form in which it leaves
a MatMul and its bias apart (see `BiasForm`). A step of a 0.5B decoder becomes 6 % faster.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.targets import KERNEL

__all__ = ["BlockBias"]

_INPUTS = 6
"""Inputs of MatMulNBits up to the bias: x, codes, scales, zero points, order of columns, bias."""


class BlockBias(ir.passes.InPlacePass):
    """Products with weights in blocks take the bias behind them.

    Refused: results that are read by anything but the Add, products that have a bias already, rows that are not one
    constant number for each column.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        products = [n for n in main if (n.domain, n.op_type) == ("com.microsoft", "MatMulNBits")]
        names = graph.value_names(main) if products else set[str]()
        changed = False
        for node in products:
            changed |= _join(main, node, names)
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)


def _join(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    result, users = node.outputs[0], node.outputs[0].consumers()
    taken = len(node.inputs) >= _INPUTS and node.inputs[_INPUTS - 1] is not None
    if taken or len(users) != 1 or result.is_graph_output() or not graph.is_standard(users[0], "Add"):
        return False
    add = users[0]
    bias = add.inputs[1 - list(add.inputs).index(result)]
    shape, columns = graph.run_shape(bias), node.attributes.get_int("N", 0)
    if bias is None or not graph.has_constant(bias) or not graph.is_float(bias) or not shape:
        return False
    # Leading ones beyond the rank of the product would raise it.
    rank = len(result.shape) if result.shape is not None else 1
    if any(d != 1 for d in shape[:-1]) or shape[-1] != columns or len(shape) > rank:
        return False
    inputs = [*node.inputs[: _INPUTS - 1], *[None] * (_INPUTS - 1 - len(node.inputs)), weights.flat(main, bias, names)]
    fused = ir.Node(
        node.domain, node.op_type, inputs, list(node.attributes.values()), name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    fused.meta.update(node.meta)
    kernel = node.meta.get(KERNEL)
    graph.replace_node(main, add, fused)
    graph.merge_origins(fused, node)
    if kernel is not None:
        fused.meta[KERNEL] = kernel
    main.remove(node, safe=True)
    return True
