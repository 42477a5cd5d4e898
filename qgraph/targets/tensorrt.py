"""NVIDIA's TensorRT: explicit QDQ, symmetric s8, quantizers where its placement rules want them.

The rules are those of its documentation on explicit quantization: activations are symmetric (zero point 0), weights
symmetric and per channel, biases stay in float; quantizers stand on the inputs of layers with weights and of pools, and
not on their outputs, so that what follows (Relu, BatchNormalization) fuses into the layer; of a residual sum the
branch that comes from a layer stays in float. Never run: no TensorRT was to be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from qgraph import graph
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


_TABLE: Mapping[str, tables.Entry] = {
    "Conv": tables.convolution(output=Output.FLOAT),
    "Gemm": tables.product(output=Output.FLOAT),
    "MatMul": tables.product(output=Output.FLOAT),
    "Add": _residual,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool"), tables.unary(output=Output.FLOAT)),
}


class TensorRt(whole.Whole):
    """The TensorRT provider."""

    name = "tensorrt"
    description = "NVIDIA GPU through TensorRT: symmetric s8 in explicit QDQ; documented rules, never run"
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
            "fp32": Mixture("fp32", (), "float"),
        }


def tensorrt() -> TensorRt:
    """The TensorRT provider."""
    return TensorRt()
