"""s -> s', so near that no code on x86 and arm64 rounds apart: the scales around sums, products and means of codes.

onnxruntime computes these three in floats on x86 (QLinearAdd and QLinearMul with fused or separate roundings) and on
arm64 in fixed point, or fused: the same but for the last bit, which decides where a result lies by chance within that
bit of the middle between two codes, or exactly on it (ties go to even on x86, away from zero on arm64). So the scales
are chosen that no result can lie there: where the ratio of each input's scale to the output's is a fraction p / q with
one odd q, every exact result is a multiple of 1 / q, and at least 1 / 2q away from any middle.

    a * s_a + b * s_b = c * s_c        s_a, s_b = n * u, s_c = q * u, q odd
    a * s_a * b * s_b = c * s_c        s_a * s_b / s_c = p / q, q odd
    sum(a) / count * s_a = c * s_c     s_a / (count * s_c) = p / q, q odd

Sums that share a value share the unit u. The rest of the integer kernels give the same bits at any scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import networkx
import numpy as np
import onnx_ir as ir
from qgraph.passes.annotate import GROUP

from qgraph import graph
from qgraph.qparams import QParams
from qgraph.targets import ABSORBED, KERNEL, QPARAMS, SPEC, annotated

__all__ = ["Portable", "apart", "product_error", "sum_error"]

_HALF_BIT = 2.0**-24
"""Relative error of one rounding to float32."""
_STEPS = (192, 160, 128, 96, 64, 48, 32, 24, 16)
"""Units in the smallest scale of connected sums, to try: the more, the nearer is each scale to its own."""
_LEAST = 256
"""At least so large is the odd denominator of a product's ratio: scales move by at most 1/256."""
_BITS = 10
"""Bits of a unit, so few that its multiples are exact in float32."""


def _reach(params: QParams) -> float:
    """The largest code or zero point, as a number."""
    return max(abs(params.format.lowest), abs(params.format.highest))


def sum_error(left: QParams, right: QParams, result: QParams) -> float:
    """How far a kernel's sum may lie from the exact one before it is rounded, in codes of the result.

    In floats: the terms and the constant part (zero points times ratios) with eight roundings. In fixed point, as
    arm64 has it: two factors of 22 bits, each rounded. The two are added up, though a kernel has one of them.
    """
    first, second = float(left.scale) / float(result.scale), float(right.scale) / float(result.scale)
    largest = _reach(result) + 2 * (_reach(left) * first + _reach(right) * second)
    shift = 21 - math.floor(math.log2(max(first, second)))
    spans = left.format.steps + right.format.steps
    return 8 * _HALF_BIT * largest + 0.5 * spans / 2.0**shift


def product_error(result: QParams) -> float:
    """The same of a product or a mean whose result is within the codes: four roundings, the zero point added."""
    return 4 * _HALF_BIT * (result.format.steps + _reach(result))


def apart(denominator: int, error: float) -> bool:
    """Whether multiples of 1 / `denominator`, an odd number, stay on their side of every middle despite `error`."""
    return denominator % 2 == 1 and 0.5 / denominator > error


class Portable(ir.passes.InPlacePass):
    """Replaces scales in `Value.meta["qgraph.qparams"]`; comes after ranges are found, before weights are quantized.

    Left as they are: ranges that the scheme or a Clip fixes, and products whose zero point is 0, which are rounded
    once on either machine. Zero points stay, so that a range moves by less than a hundredth of itself, as a rule.

    Attributes:
        refused: label of a node -> why its codes may still differ in the last bit; filled when the pass runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        scales = _Scales(annotated(model.graph))
        planned = [node for node in model.graph if _is_planned(node, scales)]
        sums = [node for node in planned if graph.is_standard(node, "Add")]
        self.refused = {}
        for nodes in _connected(sums):
            reason = _settle_sums(nodes, scales)
            self.refused.update({graph.label(node): reason for node in nodes} if reason else {})
        for node in planned:
            if graph.is_standard(node, "Mul", "GlobalAveragePool"):
                reason = _settle_product(node, scales)
                if reason:
                    self.refused[graph.label(node)] = reason
        scales.write()
        return ir.passes.PassResult(model, False)


class _Scales:
    """Parameters by group of values; those that have been used are settled."""

    def __init__(self, values: Iterable[ir.Value]):
        self.values: dict[str, list[ir.Value]] = {}
        self.fixed: set[str] = set()
        for value in values:
            if QPARAMS in value.meta:
                self.values.setdefault(self.key(value), []).append(value)
                maker = value.producer()
                # A range that stands for a Clip must end where the Clip does.
                clips = maker is not None and ABSORBED in maker.meta and graph.is_standard(maker, "Clip")
                if clips or value.meta[SPEC].range is not None or value.meta[SPEC].torch:
                    self.fixed.add(self.key(value))
        self.params: dict[str, QParams] = {key: some[0].meta[QPARAMS] for key, some in self.values.items()}

    @staticmethod
    def key(value: ir.Value) -> str:
        """Of the group that `value` shares its parameters with."""
        return str(value.meta.get(GROUP, value.name))

    def change(self, key: str, scale: float) -> None:
        """Another scale for a group, which is fixed from then on."""
        self.params[key] = dataclasses.replace(self.params[key], scale=np.asarray(scale, np.float32))
        self.fixed.add(key)

    def write(self) -> None:
        """Into the values' meta."""
        for key, values in self.values.items():
            for value in values:
                if float(value.meta[QPARAMS].scale) != float(self.params[key].scale):
                    value.meta[QPARAMS] = self.params[key]


def _is_planned(node: ir.Node, scales: _Scales) -> bool:
    """Whether all that a sum, a product or a mean reads and writes is in integers, with one scale each."""
    if KERNEL not in node.meta or not graph.is_standard(node, "Add", "Mul", "GlobalAveragePool"):
        return False
    values = [*node.inputs, _result(node)]
    return all(v is not None and QPARAMS in v.meta and v.meta[QPARAMS].scale.ndim == 0 for v in values)


def _result(node: ir.Node) -> ir.Value:
    """What the kernel writes: behind a Relu or Clip that its quantizer stands for, if there is one."""
    value = node.outputs[0]
    users = value.consumers()
    if QPARAMS not in value.meta and len(users) == 1 and graph.is_standard(users[0], "Relu", "Clip"):
        return users[0].outputs[0]
    return value


def _keys(node: ir.Node) -> list[str]:
    """Groups of the inputs, then that of the result."""
    return [_Scales.key(value) for value in (*node.inputs, _result(node)) if value is not None]


def _connected(sums: list[ir.Node]) -> list[list[ir.Node]]:
    """Sums that share groups, together."""
    groups: Any = networkx.utils.UnionFind()
    for node in sums:
        groups.union(*_keys(node))
    found: dict[str, list[ir.Node]] = {}
    for node in sums:
        found.setdefault(groups[_keys(node)[0]], []).append(node)
    return list(found.values())


def _settle_sums(nodes: list[ir.Node], scales: _Scales) -> str | None:
    """Give all groups of connected sums multiples of one unit; why not, if there is none."""
    keys = dict.fromkeys(key for node in nodes for key in _keys(node))
    if any(key in scales.fixed for key in keys):
        return "a range that it reads or writes is fixed"
    results = {_keys(node)[-1] for node in nodes}
    before = {key: float(scales.params[key].scale) for key in keys}
    for steps in _STEPS:
        unit = _short(min(before.values()) / steps)
        counts = {key: _odd(s / unit) if key in results else max(1, round(s / unit)) for key, s in before.items()}
        params = {
            key: dataclasses.replace(scales.params[key], scale=np.asarray(count * unit, np.float32))
            for key, count in counts.items()
        }
        each = [(counts[c], sum_error(params[a], params[b], params[c])) for a, b, c in map(_keys, nodes)]
        if all(apart(count, error) for count, error in each):
            for key, count in counts.items():
                scales.change(key, count * unit)
            return None
    return "the scales that meet in it, and in the sums that it is connected with, lie too far apart"


def _settle_product(node: ir.Node, scales: _Scales) -> str | None:
    """Give the result of a product or mean the scale that makes the ratio p / q; why not, if it cannot have it."""
    *inputs, key = _keys(node)
    result = scales.params[key]
    whole = math.prod(float(scales.params[one].scale) for one in inputs)
    if node.op_type == "GlobalAveragePool":
        shape = graph.run_shape(node.inputs[0])
        if shape is None or len(shape) < 3:
            return "the size of what it averages is not known"
        whole /= math.prod(shape[2:])
    elif float(result.zero_point) == 0:
        scales.fixed.update(inputs, [key])
        return None
    if key in scales.fixed or key in inputs:
        return "the range that it writes is fixed"
    wanted = float(result.scale) / whole
    numerator = 1
    while wanted * numerator < _LEAST:
        numerator *= 2
    denominator = _odd(wanted * numerator)
    if not apart(denominator, product_error(result)):
        return "its scales lie too far apart"
    scales.change(key, whole * denominator / numerator)
    scales.fixed.update(inputs)
    return None


def _odd(number: float) -> int:
    """The nearest odd number, at least 1."""
    return max(1, 2 * round((number - 1) / 2) + 1)


def _short(number: float) -> float:
    """`number` with `_BITS` bits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 2**_BITS), exponent - _BITS)
