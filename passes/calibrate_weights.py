"""Weights -> QParams: the range along the spec's axis, widened where an int32 accumulator could overflow."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.errors import QuantizationError
from qgraph.qparams import QParams, from_range, limit_accumulator
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import ABSORBED, KERNEL, QPARAMS, Form, Kernel

__all__ = ["CONSTANTS", "INPUT", "WEIGHT", "CalibrateWeights"]

CONSTANTS = "qgraph.constant_qparams"
"""Key in `Node.meta`: QParams of the node's further constants, by input position."""

WEIGHT = "qgraph.weight_qparams"
"""Key in `Node.meta`: QParams of the node's weight."""
INPUT = "qgraph.input_qparams"
"""Key in `Node.meta`: QParams of the activation that meets the weight."""
_CHOOSES = ("Max", "Min", "Where", "Concat", "Gather")


class CalibrateWeights(ir.passes.InPlacePass):
    """Writes `Node.meta["qgraph.weight_qparams"]` on every planned node with a weight; reads each weight once.

    Attributes:
        refused: layer -> why its weight does not have the scale that PyTorch gives it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        for node in model.graph:
            kernel: Kernel | None = node.meta.get(KERNEL)
            if kernel is not None and kernel.constants:
                read = ((position, node.inputs[position], spec) for position, spec in kernel.constants.items())
                node.meta[CONSTANTS] = {
                    position: _constant(node, v, spec) for position, v, spec in read if v is not None
                }
            if kernel is None or kernel.weight is None:
                continue
            position, spec = kernel.weight
            weight = node.inputs[position]
            if kernel.form is Form.DYNAMIC and weight is not None and isinstance(spec.granularity, PerAxis):
                # Without a calibrated range there is none to overflow; the target has looked at the number of terms.
                node.meta[WEIGHT] = _solve(weight, spec)[1]
            if kernel.form is not Form.QDQ:
                continue
            activation = node.inputs[next(iter(kernel.activations))]
            if activation is None or weight is None or QPARAMS not in activation.meta:
                raise QuantizationError(f"The input of {graph.label(node)} has no parameters: calibrate first.")
            node.meta[INPUT] = activation.meta[QPARAMS]
            if not spec.format.whole:  # What sums floats overflows nowhere near.
                node.meta[WEIGHT] = _solve(weight, spec)[1]
                continue
            bias = node.inputs[kernel.bias] if kernel.bias is not None and len(node.inputs) > kernel.bias else None
            plain, node.meta[WEIGHT] = _solve(weight, spec, node.meta[INPUT], graph.constant(bias), _outputs(node))
            if spec.torch and plain is not node.meta[WEIGHT]:
                self.refused[graph.label(node)] = "with the scale that PyTorch gives its weight, int32 would overflow"
        return ir.passes.PassResult(model, False)


def _constant(node: ir.Node, value: ir.Value, spec: QuantSpec) -> QParams:
    """Those of the output, where the node only chooses among its inputs; else those of the constant's own range.

    Rounding and saturating do not change an order, so that choosing among codes of the output's scale gives the code of
    what would have been chosen. A scale of its own can only do harm: that of Max(x, 0) is any number, and QNN's HTP
    gives 0 where two scales of 16 bits lie further apart than 2**15.
    """
    made = node.outputs[0]
    users = made.consumers()
    if len(users) == 1 and ABSORBED in users[0].meta:  # Its quantizer stands behind a Relu or Clip.
        made = users[0].outputs[0]
    result: QParams | None = made.meta.get(QPARAMS)
    if node.op_type in _CHOOSES and result is not None and result.format == spec.format and result.axis is None:
        return result
    return _solve(value, spec)[1]


def _outputs(node: ir.Node) -> int | None:
    """Axis of the weight along which each slice has an accumulator of its own."""
    if node.op_type in ("Conv", "MatMul"):
        return 0 if node.op_type == "Conv" else -1
    return (0 if node.attributes.get_int("transB", 0) else 1) if node.op_type == "Gemm" else None


def _solve(
    weight: ir.Value,
    spec: QuantSpec,
    activation: QParams | None = None,
    bias: NDArray[np.generic] | None = None,
    outputs: int | None = None,
) -> tuple[QParams, QParams]:
    """The weight's parameters by its range, and as they are; without those of the activation, these are the same."""
    array = graph.constant(weight)
    assert array is not None
    axis = spec.granularity.axis % array.ndim if isinstance(spec.granularity, PerAxis) else None
    others = tuple(i for i in range(array.ndim) if i != axis)
    low, high = np.min(array, axis=others, initial=0.0), np.max(array, axis=others, initial=0.0)
    flat = None if bias is None else np.asarray(bias, np.float64).reshape(-1)
    params = from_range(low, high, spec)
    if activation is None:
        del array
        graph.release(weight)
        return params, params
    # Elements x the largest of them bounds sum|w|, and mostly suffices; only where it does not, the sum is taken.
    bound = np.maximum(-low, high).astype(np.float64) * (array.size // max(1, low.size))
    solved = limit_accumulator(activation, params, bound, flat)
    if solved is not params:
        if axis is None and outputs is not None:
            others = tuple(i for i in range(array.ndim) if i != outputs % array.ndim)
        sums = np.abs(array).sum(axis=others, dtype=np.float64)
        solved = limit_accumulator(activation, params, np.asarray(sums), flat)
    del array
    graph.release(weight)
    return params, solved
