"""ONNX Runtime's CUDA provider: half precision everywhere, and products whose weights are in blocks of few bits.

It has no integer kernels: a QDQ product runs at 0.3 to 0.9 times the speed of float32, and MatMulInteger and
DynamicQuantizeLinear run on the CPU. int8 in QDQ form is for TensorRT, which is a provider of its own. Measured with
onnxruntime-gpu 1.31.1 on an H100 (`python tools/measure_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from qgraph.float_formats import FP16
from qgraph.spec import Mixture, Scheme
from qgraph.targets.gpu import FUSED, Gpu, Rates, in_halves_and_blocks

__all__ = ["Cuda", "cuda"]

# Speed is the same for blocks of 16 to 128; 32 is the most faithful that is common.
_BLOCK = 32
_NO_INTEGERS = "onnxruntime's CUDA provider has no {} kernels; int8 in QDQ form is for TensorRT"


class Cuda(Gpu):
    """The CUDA provider."""

    name = "cuda"
    description = "NVIDIA GPU through CUDA: fp16, weights in blocks of 8, 4 and 2 bits"
    provider = "CUDAExecutionProvider"
    label = "CUDA"
    runner = "cuda"
    evidence = "onnxruntime-gpu 1.31.1 on an H100, 2026-11"
    missing = "It needs an NVIDIA GPU."
    # float32 with TF32.
    rates = Rates(start=5e-6, memory=2.4e12, single=290e12, half=600e12, unpacking=0.6e-12)
    min_opset = 17
    half = FP16.name
    fast_operators = FUSED
    refused: Mapping[str, str] = {
        "int8": _NO_INTEGERS.format("static integer"),
        "int8-dynamic": _NO_INTEGERS.format("dynamic integer"),
        "bf16": "bfloat16 runs at the speed of fp16 with eight bits of mantissa; take fp16, in which what overflows "
        "on the data stays in float32",
        "e4m3": "DequantizeLinear of fp8 is not fused into products here and halves their speed",
        "e5m2": "DequantizeLinear of fp8 is not fused into products here and halves their speed",
    }

    def __init__(self) -> None:
        self.schemes: Mapping[str, Scheme | Mixture] = in_halves_and_blocks(_BLOCK)


def cuda() -> Cuda:
    """The CUDA provider."""
    return Cuda()
