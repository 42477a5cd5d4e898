"""Android's NNAPI: its subset of QDQ, u8 activations with s8 weights, shapes known beforehand.

The table is what onnxruntime's provider accepts (`nnapi_builtin/builders`: groups of QDQ, u8 with u8 or s8); Add and
Mul want u8 on both sides. It was never run: no device and no emulator of it is at hand, and Android deprecates NNAPI
from version 15 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from qgraph import graph
from qgraph.formats import INT8, UINT8
from qgraph.spec import BIAS, Mixture, PerAxis, QuantSpec, Scheme
from qgraph.targets import tables, whole
from qgraph.targets.base import Kernel, Limits, Refusal

__all__ = ["Nnapi", "nnapi"]

_INT8 = Scheme("int8", QuantSpec(UINT8), QuantSpec(INT8, PerAxis(0), symmetric=True, observer="minmax"), BIAS)
_IMAGE = 4
_NO_SUCH = "onnxruntime's NNAPI provider has no {}; the CPU would run it"


def _image(node: ir.Node) -> str | None:
    shape = graph.run_shape(node.inputs[0])
    return None if shape is None or len(shape) == _IMAGE else "NNAPI convolves and pools in two dimensions only"


def _matrix(node: ir.Node) -> str | None:
    shape = graph.run_shape(node.inputs[0])
    return None if shape is None or len(shape) <= 2 else "NNAPI multiplies matrices of two dimensions only"


def _fully_connected(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    why = _matrix(node) if not graph.has_constant(node.inputs[1]) else None
    return Refusal(why) if why is not None else tables.product(two=False, channels=False)(node, scheme)


_TABLE: Mapping[str, tables.Entry] = {
    "Conv": tables.convolution(_image),
    "Gemm": _fully_connected,
    "MatMul": _fully_connected,
    **dict.fromkeys(("Add", "Mul"), tables.every()),
    "Concat": tables.every(joins=True),
    **dict.fromkeys(("AveragePool", "Resize"), tables.unary(_image)),
    "Softmax": tables.unary(),
    "MaxPool": tables.moves(_image),
    **dict.fromkeys(("Reshape", "Transpose"), tables.moves()),
}


class Nnapi(whole.Whole):
    """The NNAPI provider."""

    name = "nnapi"
    description = "Android through NNAPI: u8 activations, s8 weights; documented rules, never run"
    provider = "NnapiExecutionProvider"
    min_opset = 17
    limits = Limits(static_shapes=True)
    evidence = "the provider's source; never run"
    missing = "NNAPI is part of Android: run the model on a device with onnxruntime-android."
    table = _TABLE
    exile = 1e-4
    mask = -100.0
    refused = MappingProxyType(
        {
            "int4": _NO_SUCH.format("weights in blocks"),
            "int8-weights": _NO_SUCH.format("weights in blocks"),
            "int8-dynamic": _NO_SUCH.format("ranges found at run time"),
            "fp16": "NNAPI computes float32 models in fp16 by an option of the session (NNAPI_FLAG_USE_FP16)",
        }
    )

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (_INT8,)),
            _INT8.name: _INT8,
            "fp32": Mixture("fp32", (), "float"),
        }


def nnapi() -> Nnapi:
    """The NNAPI provider."""
    return Nnapi()
