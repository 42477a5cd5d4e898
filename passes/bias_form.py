"""MatMul(x, W) + b -> the form in which the runtime keeps the integer kernel.

Two-dimensional x: Gemm(x, W, b), whose bias the integer kernel adds in int32. More dimensions: the bias is shaped
[1, 1, N]; with the plain [N] the runtime makes a float Gemm of both, which dequantizes the weights at every run. Axes
that only the bias has come behind the sum.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph, weights

__all__ = ["BiasForm"]

_SINCE = 13
"""Before this opset the axes of an Unsqueeze are an attribute."""


class BiasForm(ir.passes.InPlacePass):
    """MatMul followed by the addition of a constant row.

    Refused: products of two activations, unknown rank, a bias that is not one number per column, a MatMul whose result
    is also read elsewhere.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        changed = False
        rows: dict[ir.Value, ir.Value] = {}
        names = graph.value_names(model.graph)
        for node in list(model.graph):
            if graph.is_standard(node, "Add"):
                changed |= _rewrite(model.graph, node, rows, names)
        return ir.passes.PassResult(model, changed)


def _rewrite(main: ir.Graph, add: ir.Node, rows: dict[ir.Value, ir.Value], names: set[str]) -> bool:
    for position in (0, 1):
        product, bias = add.inputs[position], add.inputs[1 - position]
        matmul = graph.producer(product, "MatMul")
        if matmul is not None and product is not None and graph.has_constant(bias) and bias is not None:
            break
    else:
        return False
    x, weight = matmul.inputs
    if x is None or x.shape is None or not graph.is_float(x) or not graph.has_constant(weight) or weight is None:
        return False
    shape, bias_shape = graph.run_shape(weight), graph.run_shape(bias)
    if shape is None or len(shape) != 2 or bias_shape is None or bias_shape[-1:] != (shape[1],):
        return False
    if int(np.prod(bias_shape)) != shape[1] or len(product.consumers()) != 1 or product.is_graph_output():
        return False
    rank = len(x.shape)
    more = max(len(bias_shape) - rank, 0)
    if rank < 2 or (rank > 2 and not more and len(bias_shape) > 1):
        return False
    if more and main.opset_imports.get("", 0) < _SINCE:
        return False
    # A bias that is shared stays shared in its new form.
    if rank == 2:
        bias = weights.flat(main, bias, names)
    elif bias_shape != (1, 1, shape[1]):
        if bias not in rows:
            row = ir.tensor(np.reshape(np.asarray(graph.constant(bias)), (1, 1, -1)))
            rows[bias] = graph.add_initializer(main, row, graph.fresh_name(f"{bias.name}_row", names))
        bias = rows[bias]
    if more:
        _unsqueeze(main, add, product, more, names)
    add.replace_input_with(1 - position, bias)
    if rank == 2:
        gemm = ir.Node("", "Gemm", [x, weight, bias], name=matmul.name, metadata_props=dict(matmul.metadata_props))
        graph.replace_node(main, add, gemm)
        graph.merge_origins(gemm, matmul)
        main.remove(matmul, safe=True)
    return True


def _unsqueeze(main: ir.Graph, add: ir.Node, product: ir.Value, count: int, names: set[str]) -> None:
    """The axes that a bias brings along, behind the sum: the runtime's dynamic kernel would forget them."""
    axes = graph.add_initializer(main, ir.tensor(np.arange(count)), graph.fresh_name(f"{product.name}_axes", names))
    whole = add.outputs[0]
    node = ir.Node("", "Unsqueeze", [whole, axes], name=graph.fresh_name(f"{add.name}_unsqueeze", names))
    result = node.outputs[0]
    result.name, result.type, result.shape = whole.name, whole.type, whole.shape
    ir.convenience.replace_all_uses_with(whole, result, replace_graph_outputs=True)
    node.replace_input_with(0, whole)
    whole.name, whole.shape = graph.fresh_name(f"{result.name}_sum", names), product.shape
    main.insert_after(add, node)
