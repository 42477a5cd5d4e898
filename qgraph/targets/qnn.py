"""Qualcomm's Hexagon processor through QNN's HTP backend: the whole graph in integers, shapes known beforehand.

Activations are u8 or u16, weights s8 per channel. Weights in blocks are not
taken (MatMulNBits runs on the CPU), and INT4 weights come out wrong there (relative error 3.3), so that neither is
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from qgraph.float_formats import FP16
from qgraph.formats import INT8, UINT8, UINT16
from qgraph.spec import BIAS, Mixture, PerAxis, QuantSpec, Scheme
from qgraph.targets import tables, whole
from qgraph.targets.base import Limits

__all__ = ["Qnn", "qnn"]

_WEIGHT = QuantSpec(INT8, PerAxis(0), symmetric=True, observer="minmax")
_INT8 = Scheme("int8", QuantSpec(UINT8), _WEIGHT, BIAS)
_A16W8 = Scheme("a16w8", QuantSpec(UINT16, observer="minmax"), _WEIGHT, BIAS)
_IMAGE = 4


def _image(node: ir.Node) -> str | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None or len(shape) <= _IMAGE else "HTP convolves and pools in two dimensions"


_TABLE: Mapping[str, tables.Entry] = {
    "Conv": tables.convolution(_image),
    "ConvTranspose": tables.convolution(_image, channels=False),
    "Gemm": tables.product(),
    "MatMul": tables.product(),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Where", "Max", "Min"), tables.every()),
    "Concat": tables.every(joins=True),
    **dict.fromkeys(
        ("Relu", "Softmax", "Gelu", "HardSwish", "HardSigmoid", "Elu", "Sqrt", "Abs", "Neg", "Exp"),
        tables.unary(),
    ),
    # With 16 bits HTP computes these with one scale only; with another it is 2 % off.
    "Sigmoid": tables.unary(ranges={16: (0.0, 65535 / 65536)}),
    "Tanh": tables.unary(ranges={16: (-1.0, 32767 / 32768)}),
    **dict.fromkeys(("LeakyRelu", "ReduceMean", "ReduceSum", "ReduceMax", "Clip", "Pad", "LogSoftmax"), tables.unary()),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), tables.unary(_image)),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), tables.moves(_image)),
    "LayerNormalization": tables.scaled(),
    **dict.fromkeys(
        ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "DepthToSpace", "SpaceToDepth",
         "Tile", "Expand"),
        tables.moves(),
    ),
    "Gather": tables.picks(),
    "Resize": tables.unary(_image),
}  # fmt: skip


class Qnn(whole.Whole):
    """QNN on the HTP."""

    name = "qnn"
    description = "Qualcomm phones, QNN HTP: the whole graph in u8 or u16 activations and s8 weights"
    provider = "QNNExecutionProvider"
    runner = "qnn"
    min_opset = 21
    limits = Limits(static_shapes=True)
    tolerance = 5e-2
    table = _TABLE
    exile = 1e-2
    reciprocals = False
    mask = -100.0
    narrow = FP16
    ladder = ("int8", "a16w8", "fp32")
    refused = MappingProxyType(
        {
            "int4": "QNN's HTP takes INT4 weights and computes something else (relative error 3.3)",
            "int8-weights": "QNN's HTP leaves MatMulNBits to the CPU",
            "int8-dynamic": "QNN's HTP has no ranges found at run time",
            "int2": "QNN's HTP has no weights of 2 bits",
        }
    )

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (_INT8,)),
            _INT8.name: _INT8,
            _A16W8.name: _A16W8,
            "fp32": Mixture("fp32", (), "float"),
        }


def qnn() -> Qnn:
    """QNN on the HTP."""
    return Qnn()
