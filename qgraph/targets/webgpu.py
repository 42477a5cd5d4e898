"""WebGPU, in browsers and as onnxruntime's plugin: half precision, and products whose weights are in blocks.

It computes Conv, MatMul and DequantizeLinear in float and leaves QuantizeLinear to the CPU, so that int8 activations
bring nothing there. MatMulNBits has kernels for 8, 4 and 2 bits. Its rates are assumed from the ratio of bytes to
operations of GPUs in laptops, and were measured nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from qgraph.float_formats import FP16
from qgraph.formats import UINT2, UINT4, Int
from qgraph.spec import Mixture, PerBlock, QuantSpec, Scheme
from qgraph.targets.base import WEIGHTS
from qgraph.targets.gpu import Gpu, Rates

__all__ = ["WebGpu", "webgpu"]

_BLOCK = 32
_NO_INTEGERS = "onnxruntime's WebGPU provider has no {}: it computes in float, and crosses to the CPU at each quantizer"


class WebGpu(Gpu):
    """The WebGPU provider."""

    name = "webgpu"
    description = "browsers and desktops through WebGPU: fp16, weights in blocks of 8, 4 and 2 bits"
    provider = "WebGpuExecutionProvider"
    label = "WebGPU"
    runner = "webgpu"
    min_opset = 17
    half = FP16.name
    tolerance = 2e-2
    rates = Rates(start=2e-5, memory=60e9, single=2e12, half=4e12, unpacking=5e-12)
    fast_operators = frozenset(
        {
            "FastGelu",
            "Gelu",
            "GroupQueryAttention",
            "QuickGelu",
            "RotaryEmbedding",
            "SimplifiedLayerNormalization",
            "SkipSimplifiedLayerNormalization",
        }
    )
    refused: Mapping[str, str] = {
        "int8": _NO_INTEGERS.format("static integer kernels"),
        "int8-dynamic": _NO_INTEGERS.format("dynamic integer kernels"),
        "bf16": "WebGPU knows no bfloat16",
    }

    def __init__(self) -> None:
        half = Scheme(FP16.name, None, QuantSpec(FP16, observer="minmax"))
        blocks = [
            Scheme("int8-weights", None, QuantSpec(Int(8, narrow=True), PerBlock(0, _BLOCK), True, "minmax")),
            *(
                Scheme(f"int{f.bits}", None, QuantSpec(f, PerBlock(0, _BLOCK), observer="minmax"))
                for f in (UINT4, UINT2)
            ),
        ]
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (half, *blocks[:2])),
            half.name: half,
            # What has no weight in blocks computes in fp16.
            **{one.name: Mixture(one.name, (one, half)) for one in blocks},
            WEIGHTS: Mixture(WEIGHTS, (*blocks, half)),
            "fp32": Mixture("fp32", (), "float"),
        }


def webgpu() -> WebGpu:
    """The WebGPU provider."""
    return WebGpu()
