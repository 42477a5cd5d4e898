"""ONNX Runtime's CPU provider: x86 with VNNI, x86 without, arm64.

The three share their operators and differ in the integer formats their instructions want. With VNNI, u8 activations
times s8 weights accumulate exactly in int32. Without it, `vpmaddubsw` adds two u8 x s8 products into 16 saturating
bits, so weights may use 7 bits only. On arm64 the dot-product instructions take s8 x s8.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qgraph.errors import OptionError
from qgraph.float_formats import BF16, E2M1, E4M3, E5M2, FP16, NF4
from qgraph.formats import INT8, TERNARY, UINT2, UINT4, UINT8, Format, Int
from qgraph.session import SessionOptions
from qgraph.spec import BIAS, Mixture, PerAxis, PerBlock, QuantSpec, Scheme
from qgraph.targets import cpu_costs, cpu_kernels, cpu_stored
from qgraph.targets.base import WEIGHTS, Kernel, Refusal, Target
from qgraph.targets.cpu_costs import SHIPPED, Costs
from qgraph.ternary import ABSMEAN, FITTED

__all__ = ["Cpu", "arm64", "detect", "x86", "x86_vnni"]

# The fastest block of MatMulNBits that keeps the error of a block's range apart (64 is slower, 256 no faster).
_BLOCK = 128
# As QLoRA has it. Nothing is faster or slower for it, since weights are brought back at load.
_FLOAT_BLOCK = 64


def _schemes(activation: Format, weight: Format) -> Mapping[str, Scheme | Mixture]:
    """All that this provider has kernels for."""
    per_channel = QuantSpec(weight, PerAxis(0), symmetric=True, observer="minmax")
    static = Scheme("int8", QuantSpec(activation), per_channel, BIAS)
    # DynamicQuantizeLinear knows u8 only.
    dynamic = Scheme("int8-dynamic", QuantSpec(UINT8), per_channel, dynamic=True)
    blocks = Scheme(
        "int8-weights", None, QuantSpec(Int(8, narrow=True), PerBlock(0, _BLOCK), symmetric=True, observer="minmax")
    )
    # Zero points take no measurable time, and at few bits bring half a decibel.
    few = [
        Scheme(f"int{one.bits}", None, QuantSpec(one, PerBlock(0, _BLOCK), observer="minmax")) for one in (UINT4, UINT2)
    ]
    return {
        "auto": Mixture("auto", (static, dynamic, blocks)),
        "int8": static,
        "int8-dynamic": dynamic,
        "int8-weights": blocks,
        **{one.name: one for one in few},
        **{
            name: Scheme(name, None, QuantSpec(TERNARY, PerBlock(0, _BLOCK), symmetric=True, observer=observer))
            for name, observer in (("ternary", ABSMEAN), ("ternary-blocks", FITTED))
        },
        **{
            name: Scheme(name, None, QuantSpec(one, symmetric=True, observer="minmax"))
            for name, one in (("fp16", FP16), ("bf16", BF16), ("fp8", E4M3), ("fp8-e5m2", E5M2))
        },
        **{
            name: Scheme(name, None, QuantSpec(one, PerBlock(-1, _FLOAT_BLOCK), symmetric=True, observer="minmax"))
            for name, one in (("fp4", E2M1), ("nf4", NF4))
        },
        WEIGHTS: Mixture(WEIGHTS, (blocks, *few)),
        "a8w4": Mixture("a8w4", (static, dynamic, few[0]), held=few[0]),
        "fp32": Mixture("fp32", (), "float"),
    }


_ARM = ("aarch64", "arm64")
# Without it the runtime fuses no sum or product of s8 codes on x86.
_SIGNED = (("session.qdqisint8allowed", "1"),)


class Cpu(Target):
    """The CPU provider, for one pairing of activation and weight format."""

    provider = "CPUExecutionProvider"
    # QuantizeLinear along an axis is 13, LayerNormalization 17. Newer models keep their opset.
    min_opset = 17
    # 485 us against 82 us for Sum and LayerNormalization of [1, 128, 768], one thread (tools/measure_kernels.py).
    slow_fusions = frozenset({"SkipLayerNormalization"})
    # 1.5, 1.5, 1.0, 2 to 3.6 and 3 to 4 times as fast as their parts (tools/measure_glue.py). Left out, as measured
    # there: MultiHeadAttention 0.7 to 1.0, SkipSimplifiedLayerNormalization 0.4 to 0.6.
    fast_operators = frozenset(
        {
            "FastGelu",
            "FusedMatMul",
            "Gelu",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "QuickGelu",
            "RotaryEmbedding",
            "SimplifiedLayerNormalization",
        }
    )
    # 1.01 to 1.16 times as fast as its parts on one thread, 1.05 to 1.7 on two (tools/measure_glue.py).
    attention: int | None = 23
    # Left to it, the runtime would run a 20 times slower AveragePool, a Softmax whose codes wrap round, and quantize
    # the weights of float layers by itself.
    greedy_fusions = frozenset(
        {
            "Add",
            "AveragePool",
            "Concat",
            "Conv",
            "ConvTranspose",
            "Gemm",
            "GlobalAveragePool",
            "LeakyRelu",
            "MatMul",
            "Mul",
            "ReduceMean",
            "Sigmoid",
            "Softmax",
            "Where",
        }
    )

    absorbed: tuple[str, ...] = ("Relu", "Clip")
    clips_codes = True
    refused = cpu_stored.REFUSED
    tolerance = 1e-4
    rounds_apart = True
    divides = True
    sets_aside = True

    def __init__(self, name: str, description: str, activation: Format, weight: Format, costs: Costs = SHIPPED):
        self.name = name
        self.description = description
        self.costs = costs
        self.signed = activation.signed
        self.schemes: Mapping[str, Scheme | Mixture] = _schemes(activation, weight)

    @property
    def native(self) -> bool:
        """Whether this machine is of the kind."""
        return self.here and (platform.machine().lower() in _ARM) == (self.runner == "arm64")

    def options(self, threads: int = 0) -> SessionOptions:
        """As ever; s8 activations are fused on other machines as they are on arm64."""
        found = super().options(threads)
        return dataclasses.replace(found, config=_SIGNED) if self.signed else found

    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """Look the operator up in the table of this provider's kernels."""
        return cpu_kernels.find(node, scheme, self.costs)

    def quantize_cost(self, value: ir.Value) -> float:
        """QuantizeLinear, and the way out of the blocked float layout for images."""
        return self.costs.seconds(cpu_costs.boundary(value, into=True))

    def dequantize_cost(self, value: ir.Value) -> float:
        """DequantizeLinear, and the way into the blocked float layout for images."""
        return self.costs.seconds(cpu_costs.boundary(value, into=False))


def x86_vnni() -> Cpu:
    """x86-64 with AVX-VNNI or AVX512-VNNI: u8 activations, full 8-bit weights."""
    return Cpu("x86-vnni", "x86-64 CPU with VNNI: u8 activations, s8 weights per channel", UINT8, INT8)


def x86() -> Cpu:
    """x86-64 without VNNI: u8 activations, 7-bit weights so that 16-bit sums cannot saturate."""
    return Cpu("x86", "x86-64 CPU without VNNI: u8 activations, 7-bit weights per channel", UINT8, Int(7))


def arm64() -> Cpu:
    """64-bit ARM: s8 activations and weights."""
    made = Cpu("arm64", "arm64 CPU: s8 activations, s8 weights per channel", INT8, INT8)
    made.runner = "arm64"
    return made


def detect() -> Cpu:
    """The CPU target of the machine this runs on.

    Raises:
        OptionError: the machine is neither x86-64 nor arm64.
    """
    machine = platform.machine().lower()
    if machine in _ARM:
        return arm64()
    if machine in ("x86_64", "amd64"):
        return x86_vnni() if _has_vnni() else x86()
    raise OptionError(f"No CPU target is known for machine {machine!r}. Name one: x86-vnni, x86, arm64.")


def _has_vnni() -> bool:
    """Whether /proc/cpuinfo names a VNNI extension; elsewhere the safe answer, False."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
