"""What GPU providers share: half precision everywhere, and products whose weights are in blocks of few bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from qgraph import graph, halves
from qgraph.float_formats import FP16
from qgraph.formats import UINT2, UINT4, Int
from qgraph.spec import Mixture, PerBlock, QuantSpec, Scheme
from qgraph.targets import cpu_checks
from qgraph.targets.base import WEIGHTS, Form, Kernel, Output, Refusal, Target

__all__ = ["FUSED", "Gpu", "Rates", "in_halves_and_blocks"]

# Each is one kernel's start instead of several.
FUSED = frozenset(
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
"""Operators of the runtime's own that are faster on a GPU than their parts."""

_MATRIX = 2


@dataclass(frozen=True)
class Rates:
    """How fast a GPU is.

    Attributes:
        start: seconds to start a kernel, which is all that there is to small ones.
        memory: bytes a second from the device's memory.
        single: multiplications and additions a second in float32.
        half: the same in 16 bits.
        unpacking: seconds for each weight in a block, when there is more than one row.
        byte: seconds that a byte less of memory is worth: room for a longer cache or a larger batch.
    """

    start: float
    memory: float
    single: float
    half: float
    unpacking: float
    byte: float = 1.5e-12


class Gpu(Target):
    """A GPU's provider.

    Attributes:
        rates: how fast it is.
        label: the provider in words.
    """

    rates: Rates
    label: str
    tolerance = 5e-3

    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """Half precision for what has it, blocks for products with a constant weight."""
        return self._half(node, scheme) if scheme.block is None else self._blocks(node, scheme)

    def quantize_cost(self, value: ir.Value) -> float:
        """Nothing here goes into integers."""
        return self.rates.start

    def dequantize_cost(self, value: ir.Value) -> float:
        """Nothing here comes from integers."""
        return self.rates.start

    def _half(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        floats = [
            value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == ir.DataType.FLOAT
        ]
        if not floats:
            return Refusal("it computes no floats")
        refusal = halves.refusal(node, ir.DataType.FLOAT16, self.min_opset)
        if refusal is not None:
            return Refusal(refusal)
        rates = self.rates
        moved, macs = _sizes(node)
        return Kernel(
            (node.op_type,),
            {},
            weight=None,
            output=Output.FLOAT,
            form=Form.HALF,
            scheme=scheme.name,
            float_seconds=rates.start + max(4 * moved / rates.memory, 2 * macs / rates.single),
            integer_seconds=rates.start + max(2 * moved / rates.memory, 2 * macs / rates.half) - 1e-9,
        )

    def _blocks(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        if node.op_type not in ("MatMul", "Gemm"):
            return Refusal(f"onnxruntime's {self.label} provider has no {node.op_type} with weights in blocks")
        form = cpu_checks.product(node, "a product of two activations has no weight")
        if isinstance(form, Refusal):
            return form
        inner, columns, transposed = form
        assert scheme.block is not None
        if inner < scheme.block:
            return Refusal(f"its {inner} rows are less than one block of {scheme.block}")
        rates = self.rates
        rows = cpu_checks.rows(node.inputs[0], inner)
        weights, macs = inner * columns, rows * inner * columns
        stored = weights * (scheme.bits / 8 + 4 / scheme.block)
        unpacking = rates.unpacking * weights if rows > 1 else 0.0
        seconds = rates.start + max(stored / rates.memory, 2 * macs / rates.half) + unpacking
        axis = 1 if transposed else 0
        return Kernel(
            ("MatMulNBits",),
            {},
            weight=(1, replace(scheme.weight, granularity=PerBlock(axis, scheme.block))),
            bias=2 if len(node.inputs) > 2 else None,
            output=Output.FLOAT,
            form=Form.WEIGHTS,
            scheme=scheme.name,
            float_seconds=rates.start + max(4 * weights / rates.memory, 2 * macs / rates.single),
            integer_seconds=seconds - rates.byte * (4 * weights - stored),
        )


def in_halves_and_blocks(size: int) -> dict[str, Scheme | Mixture]:
    """The schemes of a GPU: fp16, and weights in blocks of `size` with fp16 for what has none."""
    half = Scheme(FP16.name, None, QuantSpec(FP16, observer="minmax"))
    blocks = [
        Scheme("int8-weights", None, QuantSpec(Int(8, narrow=True), PerBlock(0, size), True, "minmax")),
        *(Scheme(f"int{f.bits}", None, QuantSpec(f, PerBlock(0, size), observer="minmax")) for f in (UINT4, UINT2)),
    ]
    return {
        "auto": Mixture("auto", (half, *blocks[:2])),
        half.name: half,
        **{one.name: Mixture(one.name, (one, half)) for one in blocks},
        WEIGHTS: Mixture(WEIGHTS, (*blocks, half)),
        "fp32": Mixture("fp32", (), "float"),
    }


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
