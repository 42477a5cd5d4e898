"""Intel's OpenVINO on the CPU: QDQ graphs in one piece, products with weights in blocks of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from qgraph.formats import INT8, UINT4, UINT8, Int
from qgraph.spec import BIAS, Mixture, PerAxis, PerBlock, QuantSpec, Scheme
from qgraph.targets import cpu_products, tables, whole
from qgraph.targets.base import WEIGHTS, Kernel, Output, Refusal
from qgraph.targets.cpu_costs import SHIPPED

__all__ = ["OpenVino", "openvino"]

_BLOCK = 128
_WEIGHT = QuantSpec(INT8, PerAxis(0), symmetric=True, observer="minmax")
_INT8 = Scheme("int8", QuantSpec(UINT8), _WEIGHT, BIAS)
_BLOCKS = Scheme("int8-weights", None, QuantSpec(Int(8, narrow=True), PerBlock(0, _BLOCK), True, "minmax"))
_INT4 = Scheme("int4", None, QuantSpec(UINT4, PerBlock(0, _BLOCK), observer="minmax"))

_NEAR = 4
_FAR = ("MatMul", "Gemm", "Softmax", "LayerNormalization", "Reshape", "Flatten")


def _no_image(node: ir.Node) -> str | None:
    """Sums and products behind convolutions are in integers; scores, masks and a stream of tokens do not bear it."""
    seen, edge = {node}, [node]
    for _ in range(_NEAR):
        makers = {
            m for one in edge for value in one.inputs if value is not None and (m := value.producer()) is not None
        }
        edge = [maker for maker in makers - seen if maker.op_type not in _FAR]
        if any(maker.op_type == "Conv" for maker in edge):
            return None
        seen.update(edge)
    return "there is no convolution near: sums and products of tokens lose much in 8 bits, and gain little here"


_TABLE: Mapping[str, tables.Entry] = {
    "Conv": tables.convolution(),
    # Its products write float as well as integers, and of what transformers have between them little bears 8 bits.
    **dict.fromkeys(("Gemm", "MatMul"), tables.product(output=Output.FLOAT, two=False)),
    **dict.fromkeys(("Add", "Mul"), tables.every(_no_image)),
    "Concat": tables.every(joins=True),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), tables.unary()),
    **dict.fromkeys(
        ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"), tables.moves()
    ),
}


class OpenVino(whole.Whole):
    """OpenVINO's CPU device."""

    name = "openvino"
    description = "Intel CPUs through OpenVINO: u8 activations, s8 weights, weights in blocks of 8 and 4 bits"
    provider = "OpenVINOExecutionProvider"
    runner = "openvino"
    min_opset = 17
    tolerance = 1e-2
    table = _TABLE
    refused = MappingProxyType(
        {
            "int2": "OpenVINO computes affine MatMulNBits of 2 bits wrongly or not at all",
            "int8-dynamic": "OpenVINO leaves DynamicQuantizeLinear and MatMulInteger to the CPU provider",
        }
    )

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (_INT8, _BLOCKS)),
            _INT8.name: _INT8,
            _BLOCKS.name: _BLOCKS,
            _INT4.name: _INT4,
            WEIGHTS: Mixture(WEIGHTS, (_BLOCKS, _INT4)),
            "fp32": Mixture("fp32", (), "float"),
        }

    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """Static kernels by the table, weights in blocks as on the CPU."""
        return super().kernel(node, scheme) if scheme.static else cpu_products.find(node, scheme, SHIPPED, "OpenVINO")


def openvino() -> OpenVino:
    """OpenVINO's CPU device."""
    return OpenVino()
