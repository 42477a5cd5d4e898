"""Targets that take QDQ graphs whole: an accelerator's table says which operators it has between quantizers.

There every value between two layers stays in integers, and what has no integer form costs a way out to another
processor and back. The numbers here are therefore no kernel's times but an order of preference: integers first, and
no crossing without need. Where a provider's times were measured, its own file says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx_ir as ir

from qgraph import graph
from qgraph.formats import UINT8
from qgraph.spec import PerAxis, PerTensor, QuantSpec, Scheme
from qgraph.targets import cpu_checks
from qgraph.targets.base import Kernel, Output, Refusal, Target

__all__ = ["Entry", "Whole", "convolution", "every", "moves", "product", "scaled", "unary"]

Entry = Callable[[ir.Node, Scheme], "Kernel | Refusal"]
"""What a table holds for an operator."""
Condition = Callable[[ir.Node], "str | None"]
"""Why a node is refused, or None."""
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
        return bounded and isinstance(before, Kernel) and not before.shares and not before.joins

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


def _codes(scheme: Scheme) -> QuantSpec:
    assert scheme.activation is not None, "a static scheme has one"
    return scheme.activation


def _weight(scheme: Scheme, axis: int) -> QuantSpec:
    """Per channel along `axis`, where the scheme has scales for channels."""
    per_tensor = isinstance(scheme.weight.granularity, PerTensor)
    return scheme.weight if per_tensor else replace(scheme.weight, granularity=PerAxis(axis))


def convolution(condition: Condition | None = None, output: Output = Output.QUANTIZED, channels: bool = True) -> Entry:
    """Conv or ConvTranspose with a constant weight.

    Args:
        condition: why a node is refused.
        output: whether the result must be in integers.
        channels: whether the weight may have a scale for each output channel.
    """

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        refusal = cpu_checks.float_activation(node.inputs[0]) or cpu_checks.weight(node.inputs[1], "the weight")
        if refusal is None and bias is not None:
            refusal = cpu_checks.weight(bias, "the bias")
        why = condition(node) if condition is not None else None
        if refusal is not None or why is not None:
            return refusal or Refusal(str(why))
        return Kernel(
            (node.op_type,),
            {0: _codes(scheme)},
            weight=(1, _weight(scheme, 0) if channels else replace(scheme.weight, granularity=PerTensor())),
            bias=2 if bias is not None and scheme.bias is not None else None,
            output=output,
            result=_codes(scheme) if output is Output.QUANTIZED else None,
        )

    return entry


def product(output: Output = Output.QUANTIZED, two: bool = True, channels: bool = True) -> Entry:
    """MatMul or Gemm.

    Args:
        output: whether the result must be in integers.
        two: whether both sides may be activations.
        channels: whether the weight may have a scale for each column.
    """

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        codes = _codes(scheme)
        result = codes if output is Output.QUANTIZED else None
        right = node.inputs[1]
        if (
            node.op_type == "MatMul"
            and two
            and not graph.has_constant(right)
            and not graph.has_constant(node.inputs[0])
        ):
            refusal = cpu_checks.float_activation(node.inputs[0]) or cpu_checks.float_activation(right)
            return refusal or Kernel((node.op_type,), {0: codes, 1: codes}, output=output, result=result)
        form = cpu_checks.product(node, "a product of two activations")
        if isinstance(form, Refusal):
            return form
        axis = 0 if form[2] else 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        weight = _weight(scheme, axis) if channels else replace(scheme.weight, granularity=PerTensor())
        return Kernel(
            (node.op_type,),
            {0: codes},
            weight=(1, weight),
            bias=2 if bias is not None and scheme.bias is not None else None,
            output=output,
            result=result,
        )

    return entry


def every(condition: Condition | None = None, output: Output = Output.QUANTIZED, joins: bool = False) -> Entry:
    """All inputs that are floats are in integers, constants too; so is the output."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        why = condition(node) if condition is not None else None
        if why is not None:
            return Refusal(why)
        codes = _codes(scheme)
        activations: dict[int, QuantSpec] = {}
        constants: dict[int, QuantSpec] = {}
        for position, value in enumerate(node.inputs):
            if value is None or (value.dtype is not None and value.dtype != ir.DataType.FLOAT):
                continue
            if graph.has_constant(value):
                if not cpu_checks.finite(value):
                    return Refusal(f"its constant {value.name!r} is not finite, which no codes are")
                constants[position] = replace(codes, observer="minmax")
                continue
            refusal = cpu_checks.finite_activation(value)
            if refusal is not None:
                return refusal
            activations[position] = codes
        if not activations:
            return Refusal("it reads no float32 activation")
        return Kernel(
            (node.op_type,),
            activations,
            constants=constants,
            output=output,
            result=codes if output is Output.QUANTIZED else None,
            joins=joins and not constants,
        )

    return entry


def unary(
    condition: Condition | None = None,
    output: Output = Output.QUANTIZED,
    ranges: Mapping[int, tuple[float, float]] | None = None,
) -> Entry:
    """The first input is in integers, and so is the output; further inputs are parameters that stay as they are.

    Args:
        condition: why a node is refused.
        output: whether the result must be in integers.
        ranges: bits of the codes -> range that the output must have, whatever the data has.
    """

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        refusal = cpu_checks.finite_activation(node.inputs[0])
        why = condition(node) if condition is not None else None
        if refusal is not None or why is not None:
            return refusal or Refusal(str(why))
        codes = _codes(scheme)
        result = codes if output is Output.QUANTIZED else None
        bits = codes.format.storage.bitwidth
        if result is not None and ranges is not None and bits in ranges:
            result = replace(codes, range=ranges[bits])
        return Kernel((node.op_type,), {0: codes}, output=output, result=result)

    return entry


def scaled(condition: Condition | None = None) -> Entry:
    """A normalization: its scale is a constant of u8, its bias is int32 at the scale of the two."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        refusal = cpu_checks.float_activation(node.inputs[0]) or cpu_checks.weight(node.inputs[1], "the scale")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if refusal is None and bias is not None:
            refusal = cpu_checks.weight(bias, "the bias")
        why = condition(node) if condition is not None else None
        if refusal is not None or why is not None:
            return refusal or Refusal(str(why))
        codes = _codes(scheme)
        return Kernel(
            (node.op_type,),
            {0: codes},
            weight=(1, QuantSpec(UINT8, observer="minmax")),
            bias=2 if bias is not None and scheme.bias is not None else None,
            result=codes,
        )

    return entry


def moves(condition: Condition | None = None) -> Entry:
    """Codes are only moved about: input and output share their parameters."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        refusal = cpu_checks.finite_activation(node.inputs[0])
        why = condition(node) if condition is not None else None
        if refusal is not None or why is not None:
            return refusal or Refusal(str(why))
        codes = _codes(scheme)
        return Kernel((node.op_type,), {0: codes}, result=codes, shares=True)

    return entry
