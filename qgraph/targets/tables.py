"""Entries for the tables of targets that take QDQ graphs whole: which values of an operator are in integers.

Each function makes an entry: (node, scheme) -> its kernel, or the reason why it has none.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.formats import UINT8
from qgraph.spec import PerAxis, PerTensor, QuantSpec, Scheme
from qgraph.targets import cpu_checks
from qgraph.targets.base import Kernel, Output, Refusal

__all__ = ["Condition", "Entry", "convolution", "every", "moves", "picks", "product", "scaled", "unary"]

Entry = Callable[[ir.Node, Scheme], "Kernel | Refusal"]
"""What a table holds for an operator."""
Condition = Callable[[ir.Node], "str | None"]
"""Why a node is refused, or None."""


def _codes(scheme: Scheme) -> QuantSpec:
    assert scheme.activation is not None, "a static scheme has one"
    return scheme.activation


def _weight(scheme: Scheme, axis: int) -> QuantSpec:
    """Per channel along `axis`, where the scheme has scales for channels."""
    per_tensor = isinstance(scheme.weight.granularity, PerTensor)
    return scheme.weight if per_tensor else replace(scheme.weight, granularity=PerAxis(axis))


def _unfit(node: ir.Node, weight: str, bias: ir.Value | None, condition: Condition | None) -> Refusal | None:
    """Why there is no kernel for an activation that meets a weight (what it is called), and perhaps a bias."""
    refusal = cpu_checks.float_activation(node.inputs[0]) or cpu_checks.weight(node.inputs[1], weight)
    if refusal is None and bias is not None:
        refusal = cpu_checks.weight(bias, "the bias")
    why = condition(node) if refusal is None and condition is not None else None
    return refusal if why is None else Refusal(why)


def convolution(condition: Condition | None = None, output: Output = Output.QUANTIZED, channels: bool = True) -> Entry:
    """Conv or ConvTranspose with a constant weight.

    Args:
        condition: why a node is refused.
        output: whether the result must be in integers.
        channels: whether the weight may have a scale for each output channel.
    """

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        refusal = _unfit(node, "the weight", bias, condition)
        if refusal is not None:
            return refusal
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
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        refusal = _unfit(node, "the scale", bias, condition)
        if refusal is not None:
            return refusal
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


def picks(condition: Condition | None = None) -> Entry:
    """As `moves`; rows of a constant table are codes from the start, in one scale for the whole table.

    The scale is not that of the rows that calibration has seen: others are picked later.
    """
    moved = moves(condition)

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        table = node.inputs[0]
        if table is None or not graph.has_constant(table):
            return moved(node, scheme)
        why = condition(node) if condition is not None else None
        refusal = cpu_checks.weight(table, "the table") or (Refusal(why) if why is not None else None)
        if refusal is not None:
            return refusal
        low, high = _reach(table)
        if not math.isfinite(low) or not math.isfinite(high):
            return Refusal(f"its table {table.name!r} is not finite, which no codes are")
        codes = replace(_codes(scheme), range=(low, high))
        return Kernel((node.op_type,), {}, constants={0: codes}, output=Output.QUANTIZED, result=codes)

    return entry


_REACHES: weakref.WeakKeyDictionary[ir.TensorProtocol, tuple[float, float]] = weakref.WeakKeyDictionary()
"""Of tables that were read before: kernels are asked for again and again."""


def _reach(table: ir.Value) -> tuple[float, float]:
    tensor = table.const_value
    assert tensor is not None
    if tensor not in _REACHES:
        array = graph.constant(table)
        assert array is not None
        _REACHES[tensor] = float(np.min(array, initial=0.0)), float(np.max(array, initial=0.0))
        del array
        graph.release(table)
    return _REACHES[tensor]
