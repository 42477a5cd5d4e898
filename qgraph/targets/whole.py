"""Targets that take QDQ graphs whole: an accelerator's table says which operators it has between quantizers.

There every value between two layers stays in integers, and what has no integer form costs a way out to another
processor and back. The numbers here are therefore no kernel's times but an order of preference: integers first, and
no crossing without need. Where a provider's times were measured, its own file says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from qgraph import graph
from qgraph.spec import Scheme
from qgraph.targets.base import Kernel, Refusal, Target
from qgraph.targets.tables import Entry

__all__ = ["Whole"]

_MATRIX = 2


class Whole(Target):
    """A provider that takes QDQ graphs whole.

    Attributes:
        table: operator -> its entry.
        start: seconds that any node takes; rates are multiplications and bytes a second.
        slowdown: how many times slower it is in float.
        exile: seconds that a float node takes more, where the provider has none and another processor must run it.
        crossing: seconds that a quantizer takes beside the copy.
    """

    fuses_like_host = False
    ordinal = True
    table: Mapping[str, Entry]
    start: float = 1e-6
    rate: float = 1e12
    bandwidth: float = 20e9
    slowdown: float = 4.0
    exile: float = 0.0
    crossing: float = 1e-6
    absorbed: tuple[str, ...] = ("Relu", "Clip")

    def kernel(self, node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        """Look the operator up in the table."""
        if node.domain not in ("", "ai.onnx", "com.microsoft"):
            return Refusal(f"operator of domain {node.domain!r}")
        entry = self.table.get(node.op_type)
        if entry is None:
            return Refusal(f"{self.provider} has no quantized {node.op_type}")
        if self._vanishes(node, scheme):
            return Refusal("it goes where the layer before it goes, whose codes can do its work")
        found = entry(node, scheme)
        if isinstance(found, Refusal):
            return found
        integer = self._seconds(node, 1)
        in_float = self.exile + self.slowdown * self._seconds(node, 4)
        return replace(found, scheme=scheme.name, integer_seconds=integer, float_seconds=in_float)

    def _vanishes(self, node: ir.Node, scheme: Scheme) -> bool:
        """Whether the kernel that makes the input of a Relu or Clip ends at its bounds."""
        maker = node.inputs[0].producer() if node.op_type in self.absorbed and node.inputs[0] is not None else None
        if maker is None or maker.op_type not in self.table or len(maker.outputs[0].consumers()) != 1:
            return False
        if maker.outputs[0].is_graph_output():
            return False
        low, high = graph.clip_bounds(node)
        before = self.table[maker.op_type](maker, scheme)
        bounded = low is not None and high is not None and low <= 0.0 <= high
        if not bounded or not isinstance(before, Kernel) or before.shares or before.joins:
            return False
        return before.result is None or before.result.range is None

    def _seconds(self, node: ir.Node, size: int) -> float:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        moved = sum(graph.element_count(value) or 1024 for value in values)
        weight = graph.run_shape(node.inputs[1]) if len(node.inputs) > 1 else None
        made = graph.element_count(node.outputs[0]) or 1024
        inner = 0
        if node.op_type in ("Conv", "ConvTranspose") and weight:
            inner = int(graph.element_count(node.inputs[1]) or 0) // max(1, weight[0])
        elif node.op_type in ("MatMul", "Gemm") and weight:
            turned = bool(node.attributes.get_int("transB", 0)) or len(weight) < _MATRIX
            inner = weight[-1] if turned else weight[-2]
        return self.start + size * moved / self.bandwidth + size * made * inner / self.rate

    def quantize_cost(self, value: ir.Value) -> float:
        """A QuantizeLinear."""
        return self.crossing + 4 * (graph.element_count(value) or 1024) / self.bandwidth

    def dequantize_cost(self, value: ir.Value) -> float:
        """A DequantizeLinear."""
        return self.crossing + 4 * (graph.element_count(value) or 1024) / self.bandwidth
