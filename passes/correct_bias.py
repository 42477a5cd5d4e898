"""b -> b - (W_quantized - W) E[x]: the mean error that rounding the weights causes, taken out of the bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2, with E[x]
measured for each input channel on the calibration data. Zero padding is accounted for: a tap counts for the share of
positions in which it meets the image.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from qgraph.passes.calibrate_weights import WEIGHT
from qgraph.passes.round_weights import CODES

from qgraph import graph
from qgraph.biases import bias_of
from qgraph.calibration import MEANS
from qgraph.qparams import QParams, dequantize, fake_quantize
from qgraph.targets import KERNEL, Kernel

__all__ = ["CorrectBias"]


class CorrectBias(ir.passes.InPlacePass):
    """Shifts the biases of planned layers: a layer's own, or the constant row that is added to a product.

    Refused: products without a constant row after them, layers whose input has no channel means.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        changed = False
        for node in list(model.graph):
            params: QParams | None = node.meta.get(WEIGHT)
            kernel: Kernel | None = node.meta.get(KERNEL)
            if params is None or kernel is None or kernel.weight is None or node.inputs[0] is None:
                continue
            if not graph.is_standard(node, "Conv", "MatMul", "Gemm"):
                continue  # The means are those of a value, which others may read as well.
            statistic = node.inputs[0].meta.get(MEANS, {}).get(graph.channel_axis(node))
            mean = statistic.mean if statistic is not None else None
            weight = node.inputs[kernel.weight[0]]
            reader, position = bias_of(node)
            if mean is None or weight is None or reader is None:
                continue
            shift = _shift(node, weight, params, mean)
            bias = reader.inputs[position]
            if bias is not None and shift is not None:
                reader.replace_input_with(position, _shifted(model.graph, bias, shift, str(node.name)))
                changed = True
        return ir.passes.PassResult(model, changed)


def _shift(node: ir.Node, weight: ir.Value, params: QParams, mean: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(W_quantized - W) E[x] of each output channel."""
    array = graph.constant(weight)
    assert array is not None
    codes = node.meta.get(CODES)
    rounded = fake_quantize(array, params) if codes is None else dequantize(codes, params)
    if node.op_type == "Conv":
        taps = _taps(node, array.shape)
        groups = node.attributes.get_int("group", 1)
        error = (rounded - array).reshape(*array.shape[:2], -1) @ taps
        wide = mean.reshape(groups, -1)
        shift = np.einsum("goc,gc->go", error.reshape(groups, -1, array.shape[1]), wide).reshape(-1)
    else:
        error = rounded - array
        shift = error @ mean if node.attributes.get_int("transB", 0) else mean @ error
    del array
    graph.release(weight)
    return np.asarray(shift, np.float64) if np.isfinite(shift).all() else None


def _taps(node: ir.Node, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Share of output positions in which each tap of the kernel meets the image, [kernel positions]."""
    kernel = shape[2:]
    rank = len(kernel)
    image, result = graph.run_shape(node.inputs[0]), graph.run_shape(node.outputs[0])
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    auto = node.attributes.get("auto_pad")
    if image is None or result is None or (auto is not None and auto.as_string() not in ("NOTSET", "VALID")):
        return np.ones(int(np.prod(kernel)))
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    shares = np.ones(1)
    for axis in range(rank):
        starts = np.arange(result[2 + axis]) * strides[axis] - pads[axis]
        where = starts[:, None] + np.arange(kernel[axis]) * dilations[axis]
        inside = ((where >= 0) & (where < image[2 + axis])).mean(axis=0)
        shares = np.multiply.outer(shares, inside).reshape(-1)
    return shares


def _shifted(main: ir.Graph, bias: ir.Value, shift: NDArray[np.float64], owner: str) -> ir.Value:
    array = graph.constant(bias)
    assert array is not None
    corrected = (array.astype(np.float64) - shift.reshape(array.shape)).astype(np.float32)
    return graph.add_initializer(main, ir.Tensor(corrected), f"{owner}_corrected_bias")
