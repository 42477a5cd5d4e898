"""NVIDIA's TensorRT: explicit QDQ, symmetric s8, quantizers where its placement rules want them.

The rules are those of its documentation on explicit quantization: activations are symmetric (zero point 0), weights
symmetric and per channel, biases stay in float; quantizers stand on the inputs of layers with weights and of pools, and
not on their outputs, so that what follows (Relu, BatchNormalization) fuses into the layer; of a residual sum the
branch that comes from a layer stays in float. In fp8 (E4M3) it is the same, but that pools have no kernel. Which sizes
gain nothing is what NVIDIA's Model Optimizer says of them (modelopt.onnx.quantization.graph_utils, its functions
find_nodes_from_convs_to_exclude and _exclude_matmuls_by_shape_inference). Never run: no TensorRT was to be had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import onnx_ir as ir

from qgraph import graph
from qgraph.float_formats import E4M3
from qgraph.formats import Int
from qgraph.spec import Mixture, PerAxis, QuantSpec, Scheme
from qgraph.targets import tables, whole
from qgraph.targets.base import Kernel, Output, Refusal

__all__ = ["TensorRt", "tensorrt"]

_S8 = Int(8, narrow=True)
_INT8 = Scheme(
    "int8",
    QuantSpec(_S8, symmetric=True),
    QuantSpec(_S8, PerAxis(0), symmetric=True, observer="minmax"),
)
_E4M3 = QuantSpec(E4M3, symmetric=True, observer="minmax")
_FP8 = Scheme("fp8", _E4M3, replace(_E4M3, granularity=PerAxis(0)))
_MATRIX = 2
_TILE, _HALF_TILE = 16, 8
"""Channels, rows or columns below which the tensor cores' kernels gain nothing."""
_SMALL_KERNEL, _LARGE_KERNEL = 3, 32
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _residual(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    """A sum of a layer's output and another branch: the other branch is in integers, so that the sum fuses."""
    made_by_layer = [graph.producer(value, *_LAYERS) is not None for value in node.inputs]
    if made_by_layer.count(True) != 1 or any(graph.has_constant(value) for value in node.inputs):
        return Refusal("TensorRT fuses a sum into the one layer that makes one of its inputs")
    other = made_by_layer.index(False)
    assert scheme.activation is not None
    if node.inputs[other] is None or not graph.is_float(node.inputs[other]):
        return Refusal("the branch beside the layer is not float32")
    return Kernel((node.op_type,), {other: scheme.activation}, output=Output.FLOAT)


def _pool(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    if not scheme.weight.format.whole:
        return Refusal("TensorRT is not known to have pools in fp8")
    return tables.unary(output=Output.FLOAT)(node, scheme)


def _convolution(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    shape = graph.run_shape(node.inputs[1]) if len(node.inputs) > 1 else None
    why = None
    if node.op_type == "Conv" and shape is not None and len(shape) > _MATRIX:
        why = _slow_in_integers(node, shape) if scheme.weight.format.whole else _slow_in_floats(shape)
    return Refusal(why) if why is not None else tables.convolution(output=Output.FLOAT)(node, scheme)


def _slow_in_integers(node: ir.Node, shape: tuple[int, ...]) -> str | None:
    """Of a weight [outputs, inputs of a group, sizes...]."""
    outputs, inputs, *sizes = shape
    if outputs >= _TILE and inputs >= _TILE:
        return None
    if node.attributes.get_int("group", 1) > 1:
        good = outputs % _HALF_TILE == 0 and min(sizes) >= _SMALL_KERNEL
    else:
        first = node.inputs[0] is not None and node.inputs[0].is_graph_input()
        eights = outputs % _HALF_TILE == 0 or inputs % _HALF_TILE == 0
        good = eights and (first or outputs >= _TILE or inputs >= _TILE) and len(set(sizes)) == 1
    return None if good else f"{inputs} channels in and {outputs} out are too few for TensorRT's kernels in int8"


def _slow_in_floats(shape: tuple[int, ...]) -> str | None:
    outputs, inputs, *sizes = shape
    if outputs <= _TILE or inputs <= _TILE:
        return f"{inputs} channels in a group and {outputs} out are too few for TensorRT's kernels in fp8"
    if math.prod(sizes) > _LARGE_KERNEL:
        return f"its window of {math.prod(sizes)} is too large for TensorRT's kernels in fp8"
    return None


def _product(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    made, right = _ends(node.outputs[0]), _ends(node.inputs[1])
    if made is not None and right is not None:
        inner = right[1] if node.attributes.get_int("transB", 0) else right[0]
        flat = len(node.outputs[0].shape or ()) == _MATRIX
        rows = made[0] if flat or not graph.has_constant(node.inputs[1]) else None
        if flat and rows is None and node.outputs[0].is_graph_output():
            # A head: little is to be won, and the output's precision to be lost. What was run has to do.
            rows = next(iter(graph.run_shape(node.outputs[0]) or ()), None)
        if rows == 1 or made[1] == 1:
            return Refusal("one row or column: TensorRT's tensor cores are no help, and quantizers cost")
        if min(made[1] or _TILE, inner or _TILE) < _TILE:
            return Refusal(f"a product of {inner} by {made[1]} is too small for TensorRT's tensor cores")
    return tables.product(output=Output.FLOAT)(node, scheme)


def _ends(value: ir.Value | None) -> tuple[int | None, int | None] | None:
    """The last two sizes; None for one that is open: what calibration ran with need not be what comes."""
    if value is None or value.shape is None or len(value.shape) < _MATRIX:
        return None
    rows, columns = (dim if isinstance(dim, int) else None for dim in list(value.shape)[-_MATRIX:])
    return rows, columns


_TABLE: Mapping[str, tables.Entry] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("Gemm", "MatMul"), _product),
    "Add": _residual,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool"), _pool),
}


class TensorRt(whole.Whole):
    """The TensorRT provider."""

    name = "tensorrt"
    description = "NVIDIA GPU through TensorRT: symmetric s8 or fp8 in explicit QDQ; documented rules, never run"
    provider = "TensorrtExecutionProvider"
    runner = "tensorrt"
    min_opset = 17
    evidence = "TensorRT's documentation of explicit quantization; never run"
    missing = "It needs an NVIDIA GPU and TensorRT."
    table = _TABLE
    absorbed = ()
    refused = MappingProxyType(
        {
            "int4": "weights in blocks are for the CUDA provider (--target cuda)",
            "int8-weights": "weights in blocks are for the CUDA provider (--target cuda)",
            "int8-dynamic": "TensorRT has no ranges found at run time for int8",
            "fp16": "TensorRT chooses fp16 by an option of the provider (trt_fp16_enable)",
        }
    )

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (_INT8,)),
            _INT8.name: _INT8,
            _FP8.name: _FP8,
            "fp32": Mixture("fp32", (), "float"),
        }


def tensorrt() -> TensorRt:
    """The TensorRT provider."""
    return TensorRt()
