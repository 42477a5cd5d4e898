"""ONNX Runtime's CUDA provider: half precision everywhere, and products whose weights are in blocks of few bits.

It has no integer kernels: a QDQ product runs at 0.3 to 0.9 times the speed of float32, and MatMulInteger and
DynamicQuantizeLinear run on the CPU. int8 in QDQ form is for TensorRT, which is a provider of its own. Measured with
onnxruntime-gpu 1.31.1 on an H100 (`python tools/measure_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from qgraph import graph, halves
from qgraph.float_formats import FP16
from qgraph.formats import UINT2, UINT4, Int
from qgraph.spec import Mixture, PerBlock, QuantSpec, Scheme
from qgraph.targets import cpu_checks
from qgraph.targets.base import WEIGHTS, Form, Kernel, Output, Refusal, Target

__all__ = ["Cuda", "cuda"]

# Speed is the same for blocks of 16 to 128; 32 is the most faithful that is common.
_BLOCK = 32
# A kernel's start, which is all that there is to small ones.
_START = 5e-6
# Bytes per second that come from the device's memory, and operations per second; float32 with TF32.
_BYTES = 2.4e12
_FLOAT_RATE, _HALF_RATE = 290e12, 600e12
# What unpacking takes for each weight when there is more than one row.
_UNPACKING = 0.6e-12
# Seconds that a byte less of memory is worth: room for a longer cache or a larger batch.
_BYTE = 1.5e-12
_MATRIX = 2
_NO_INTEGERS = "onnxruntime's CUDA provider has no {} kernels; int8 in QDQ form is for TensorRT"


class Cuda(Target):
    """The CUDA provider."""

    name = "cuda"
    description = "NVIDIA GPU through CUDA: fp16, weights in blocks of 8, 4 and 2 bits"
    provider = "CUDAExecutionProvider"
    min_opset = 17
    half = FP16.name
    # Each is one kernel's start instead of several.
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
        "int8": _NO_INTEGERS.format("static integer"),
        "int8-dynamic": _NO_INTEGERS.format("dynamic integer"),
        "bf16": "bfloat16 runs at the speed of fp16 with eight bits of mantissa; take fp16, in which what overflows "
        "on the data stays in float32",
        "e4m3": "DequantizeLinear of fp8 is not fused into products here and halves their speed",
        "e5m2": "DequantizeLinear of fp8 is not fused into products here and halves their speed",
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

    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """Half precision for what has it, blocks for products with a constant weight."""
        return _half(node, scheme) if scheme.block is None else _blocks(node, scheme)

    def quantize_cost(self, value: ir.Value) -> float:
        """Nothing here goes into integers."""
        return _START

    def dequantize_cost(self, value: ir.Value) -> float:
        """Nothing here comes from integers."""
        return _START


def cuda() -> Cuda:
    """The CUDA provider."""
    return Cuda()


def _sizes(node: ir.Node) -> tuple[int, int]:
    """(numbers that are read and written, multiplications) of a node in a run, unknown ones taken as small."""
    moved = sum(graph.element_count(value) or 1024 for value in (*node.inputs, *node.outputs) if value is not None)
    weight = graph.run_shape(node.inputs[1]) if len(node.inputs) > 1 else None
    made = graph.element_count(node.outputs[0]) or 1024
    if node.op_type == "Conv" and weight is not None:
        taps = 1
        for size in weight[1:]:
            taps *= size
        return moved, made * taps
    if node.op_type in ("MatMul", "Gemm") and weight is not None and len(weight) >= _MATRIX:
        inner = weight[-1 if node.attributes.get_int("transB", 0) else -2]
        return moved, made * inner
    return moved, 0


def _half(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    floats = [
        value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == ir.DataType.FLOAT
    ]
    if not floats:
        return Refusal("it computes no floats")
    refusal = halves.refusal(node, ir.DataType.FLOAT16, Cuda.min_opset)
    if refusal is not None:
        return Refusal(refusal)
    moved, macs = _sizes(node)
    return Kernel(
        (node.op_type,),
        {},
        weight=None,
        output=Output.FLOAT,
        form=Form.HALF,
        scheme=scheme.name,
        float_seconds=_START + max(4 * moved / _BYTES, 2 * macs / _FLOAT_RATE),
        integer_seconds=_START + max(2 * moved / _BYTES, 2 * macs / _HALF_RATE) - 1e-9,
    )


def _blocks(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    if node.op_type not in ("MatMul", "Gemm"):
        return Refusal(f"onnxruntime's CUDA provider has no {node.op_type} with weights in blocks")
    form = cpu_checks.product(node, "a product of two activations has no weight")
    if isinstance(form, Refusal):
        return form
    inner, columns, transposed = form
    assert scheme.block is not None
    if inner < scheme.block:
        return Refusal(f"its {inner} rows are less than one block of {scheme.block}")
    rows = cpu_checks.rows(node.inputs[0], inner)
    weights, macs = inner * columns, rows * inner * columns
    stored = weights * (scheme.bits / 8 + 4 / scheme.block)
    seconds = _START + max(stored / _BYTES, 2 * macs / _HALF_RATE) + (_UNPACKING * weights if rows > 1 else 0.0)
    axis = 1 if transposed else 0
    return Kernel(
        ("MatMulNBits",),
        {},
        weight=(1, replace(scheme.weight, granularity=PerBlock(axis, scheme.block))),
        bias=2 if len(node.inputs) > 2 else None,
        output=Output.FLOAT,
        form=Form.WEIGHTS,
        scheme=scheme.name,
        float_seconds=_START + max(4 * weights / _BYTES, 2 * macs / _FLOAT_RATE),
        integer_seconds=seconds - _BYTE * (4 * weights - stored),
    )
