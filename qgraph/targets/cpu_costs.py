"""Estimated time of operators on ONNX Runtime's CPU provider, one thread of an AVX512-VNNI core.

The constants are fits to single-operator chains (repeat with `python tools/measure_kernels.py`). They serve to choose
which nodes are worth an integer kernel, where only ratios between them matter; what is written is measured afterwards.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qgraph import graph

__all__ = ["conv", "elementwise", "matmul", "positions"]

_GUESS_ELEMENTS = 100_000
_GUESS_ROWS = 64

CALL = 2e-6
"""Fixed time of one more node."""
FLOAT_MAC = 1 / 52e9
INTEGER_MAC = 1 / 200e9

Seconds = tuple[float, float]
"""(in float, in integers)"""


def elements(value: ir.Value | None) -> int:
    """Elements of a value in a run, or a guess."""
    return graph.element_count(value) or _GUESS_ELEMENTS


def positions(value: ir.Value | None) -> int:
    """Batch x spatial positions of an NCHW value, or a guess."""
    shape = graph.run_shape(value)
    return _GUESS_ROWS if shape is None or len(shape) < 2 else max(1, math.prod(shape) // max(1, shape[1]))


def conv(output: ir.Value, weight: tuple[int, ...], groups: int) -> Seconds:
    """Convolution with `weight` [out, in / groups, kernel...]."""
    out_channels, per_group = weight[0], weight[1]
    kernel = math.prod(weight[2:])
    where = positions(output)
    macs = where * out_channels * per_group * kernel
    size = where * out_channels
    if groups == 1:
        channels = per_group
        if channels < 8:
            # The blocked float kernel has a special path for images; the integer one gathers columns of few bytes.
            return macs * FLOAT_MAC * 1.3 + CALL, macs * FLOAT_MAC * 1.3 / 0.6 + CALL
        return macs * FLOAT_MAC + CALL, macs * INTEGER_MAC + size * 0.15e-9 + CALL
    if per_group == 1:
        return macs * 0.045e-9 + CALL, macs * 0.047e-9 + size * 0.1e-9 + CALL
    return macs * FLOAT_MAC + CALL, macs * FLOAT_MAC * 4 + CALL


def matmul(rows: int, inner: int, columns: int) -> Seconds:
    """[rows, inner] x [inner, columns] with constant right side, float out."""
    macs = rows * inner * columns
    weights = inner * columns
    # With few rows the weights' bytes bound both.
    return (
        max(macs * FLOAT_MAC, weights * 0.12e-9) + CALL,
        max(macs * INTEGER_MAC, weights * 0.035e-9) + CALL,
    )


def elementwise(output: ir.Value, float_ns: float, integer_ns: float) -> Seconds:
    """An operator whose time is proportional to its output's elements."""
    size = elements(output)
    return size * float_ns * 1e-9 + CALL, size * integer_ns * 1e-9 + CALL
