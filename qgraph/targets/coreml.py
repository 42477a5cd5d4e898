"""Apple's CoreML: half precision; what is in integers, onnxruntime's provider leaves to the CPU.

Its list of operators has no QuantizeLinear, DequantizeLinear or MatMulNBits, so a model in int8 or int4 would run on
the CPU provider, for which there is the target arm64. A model in fp16 is half as large, and computes in fp16 on the
neural engine. Never run: CoreML is part of Apple's systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qgraph.float_formats import FP16
from qgraph.spec import Mixture, QuantSpec, Scheme
from qgraph.targets.base import Limits
from qgraph.targets.gpu import Gpu, Rates

__all__ = ["CoreMl", "coreml"]

_ON_CPU = "onnxruntime's CoreML provider has no {}; the CPU would run it, for which there is --target arm64"


class CoreMl(Gpu):
    """The CoreML provider."""

    name = "coreml"
    description = "iOS and macOS through CoreML: fp16; documented rules, never run"
    provider = "CoreMLExecutionProvider"
    label = "CoreML"
    min_opset = 17
    half = FP16.name
    limits = Limits(static_shapes=True)
    evidence = "onnxruntime's documentation; never run"
    missing = "CoreML is part of Apple's systems: run the model there (pip install onnxruntime, on macOS)."
    rates = Rates(start=1e-5, memory=60e9, single=2e12, half=8e12, unpacking=0.0)
    refused = MappingProxyType(
        {
            "int8": _ON_CPU.format("QDQ kernels"),
            "int8-dynamic": _ON_CPU.format("dynamic integer kernels"),
            "int8-weights": _ON_CPU.format("MatMulNBits"),
            "int4": _ON_CPU.format("MatMulNBits"),
            "bf16": "CoreML computes in fp16 and float32",
        }
    )

    def __init__(self) -> None:
        half = Scheme(FP16.name, None, QuantSpec(FP16, observer="minmax"))
        self.schemes: Mapping[str, Scheme | Mixture] = {
            "auto": Mixture("auto", (half,)),
            half.name: half,
            "fp32": Mixture("fp32", (), "float"),
        }


def coreml() -> CoreMl:
    """The CoreML provider."""
    return CoreMl()
