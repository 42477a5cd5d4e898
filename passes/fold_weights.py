"""QuantizeLinear(W) of a constant -> the integer weight itself, computed when the file is written.

A weight becomes a lazy tensor that maps its float original, quantizes it and lets go of it, one at a time; no float
copy stays behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from qgraph.passes.calibrate_weights import WEIGHT
from qgraph.passes.round_weights import CODES

from qgraph import graph, held, weights
from qgraph.errors import QuantizationError
from qgraph.qparams import QParams, quantize

__all__ = ["FoldWeights"]


class FoldWeights(ir.passes.InPlacePass):
    """Weights become integers; float weights without a reader are dropped."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        folded = [n for n in model.graph if n.op_type == "QuantizeLinear" and WEIGHT in n.meta]
        for node in folded:
            _fold(model.graph, node)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(folded))


def _fold(main: ir.Graph, node: ir.Node) -> None:
    weight, output = node.inputs[0], node.outputs[0]
    params: QParams = node.meta[WEIGHT]
    tensor = weight.const_value if weight is not None else None
    if weight is None or tensor is None or output.name is None:
        raise QuantizationError(f"The weight of {graph.label(node)} is not a constant.")
    name = output.name

    found = node.meta.get(CODES)

    def codes(array: NDArray[Any]) -> NDArray[Any]:
        return quantize(array, params) if found is None else np.asarray(found)

    output.name = None
    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    folded = weights.derived(main, weight, codes, params.format.storage, shape, name)
    held.keep(folded, weight, params, turned=params.axis == 1)
    output.replace_all_uses_with(folded)
    main.remove(node, safe=True)
