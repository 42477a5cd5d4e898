"""MatMul(Mul(x, 1 / s), s W) -> MatMul(x, W) where the product stays in float: the Mul was for its codes.

`Smooth` puts the Mul there before it is known which products go into integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.rebalance import FACTOR
from qgraph.targets import KERNEL, Form, Kernel

__all__ = ["DropFactors"]


class DropFactors(ir.passes.InPlacePass):
    """Products without integer activations read what they read before, by the weight that they had.

    Refused: nothing; a Mul that another product needs stays for that one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        factors = [node for node in main if FACTOR in node.meta]
        names = graph.value_names(main) if factors else set[str]()
        changed = False
        for factor in factors:
            for reader, position in list(factor.outputs[0].uses()):
                if position == 0 and weights.is_product(reader) and not _rounds(reader):
                    _restore(main, factor, reader, names)
                    changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)


def _rounds(node: ir.Node) -> bool:
    """Whether the product's input goes into codes of its own range."""
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form in (Form.QDQ, Form.DYNAMIC)


def _restore(main: ir.Graph, factor: ir.Node, reader: ir.Node, names: set[str]) -> None:
    source, weight, by = factor.inputs[0], reader.inputs[1], graph.constant(factor.inputs[1])
    shape = graph.run_shape(weight)
    assert source is not None and weight is not None and by is not None and shape is not None
    rows: NDArray[np.float32] = by if reader.attributes.get_int("transB", 0) else by[:, None]
    restored = weights.derived(
        main,
        weight,
        lambda array: np.multiply(array, rows),
        ir.DataType.FLOAT,
        shape,
        graph.fresh_name(f"{weight.name}_restored", names),
    )
    reader.replace_input_with(0, source)
    reader.replace_input_with(1, restored)
