"""WebGPU, in browsers and as onnxruntime's plugin: half precision, and products whose weights are in blocks.

It computes Conv, MatMul and DequantizeLinear in float and leaves QuantizeLinear to the CPU, so that int8 activations
bring nothing there. MatMulNBits has kernels for 8, 4 and 2 bits. Its rates are assumed from the ratio of bytes to
operations of GPUs in laptops, and were measured nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from qgraph.float_formats import FP16
from qgraph.spec import Mixture, Scheme
from qgraph.targets.gpu import FUSED, Gpu, Rates, in_halves_and_blocks

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
    web = True
    min_opset = 17
    half = FP16.name
    tolerance = 2e-2
    rates = Rates(start=2e-5, memory=60e9, single=2e12, half=4e12, unpacking=5e-12)
    fast_operators = FUSED
    refused: Mapping[str, str] = {
        "int8": _NO_INTEGERS.format("static integer kernels"),
        "int8-dynamic": _NO_INTEGERS.format("dynamic integer kernels"),
        "bf16": "WebGPU knows no bfloat16",
    }

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = in_halves_and_blocks(_BLOCK)


def webgpu() -> WebGpu:
    """The WebGPU provider."""
    return WebGpu()
