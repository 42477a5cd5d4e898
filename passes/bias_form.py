"""MatMul(x, W) + b -> the form in which the runtime keeps the integer kernel.

Two-dimensional x: Gemm(x, W, b), whose bias the integer kernel adds in int32. More dimensions: the bias is shaped
[1, 1, N]; with the plain [N] the runtime makes a float Gemm of both, which dequantizes the weights at every run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph

__all__ = ["BiasForm"]


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
    if rank == 2 and len(bias_shape) == 1:
        gemm = ir.Node("", "Gemm", [x, weight, bias], name=matmul.name, metadata_props=dict(matmul.metadata_props))
        graph.replace_node(main, add, gemm)
        graph.merge_origins(gemm, matmul)
        main.remove(matmul, safe=True)
        return True
    if rank >= 3 and len(bias_shape) == 1:
        # A bias that is shared stays shared in its new form.
        if bias not in rows:
            row = ir.tensor(np.reshape(np.asarray(graph.constant(bias)), (1, 1, -1)))
            rows[bias] = graph.add_initializer(main, row, graph.fresh_name(f"{bias.name}_row", names))
        add.replace_input_with(1 - position, rows[bias])
        return True
    return False
