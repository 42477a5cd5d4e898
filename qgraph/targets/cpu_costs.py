"""Estimated time of operators on ONNX Runtime's CPU provider, one thread of an AVX512-VNNI core, in seconds.

The constants are fits, to within about 10 % in float and 15 % in integers, of per-node times inside chains of operators
(onnxruntime 1.31.1, Zen 4; `python tools/measure_kernels.py` measures them again). They serve to choose which nodes
are worth an integer kernel, where only ratios between them matter; what is written is measured afterwards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from qgraph import graph

__all__ = ["Cost", "blocks", "boundary", "conv", "elements", "elementwise", "matmul"]

_NS = 1e-9
_GUESS_ELEMENTS = 50_000
_GUESS_POSITIONS = 784


class Cost(NamedTuple):
    """Seconds of one node."""

    in_float: float
    in_integers: float


def elements(value: ir.Value | None) -> int:
    """Elements of a value in a run, or a guess."""
    return graph.element_count(value) or _GUESS_ELEMENTS


def _positions(output: ir.Value | None) -> int:
    """Batch x spatial positions of an NCHW value, or a guess."""
    shape = graph.run_shape(output)
    if shape is None or len(shape) < 2:
        return _GUESS_POSITIONS
    return max(1, math.prod(shape) // max(1, shape[1]))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def conv(output: ir.Value, weight: tuple[int, ...], groups: int) -> Cost:
    """Convolution with `weight` [out, in / groups, kernel...].

    Float runs in blocks of 16 channels. The fast integer path needs 16 output channels (4 input channels) at a time;
    a depthwise one pays for each position, whatever its channels; very few input channels make it gather bytes.
    """
    out_channels, per_group = weight[0], weight[1]
    area = math.prod(weight[2:])
    where = _positions(output)
    size, taps = where * out_channels, where * area
    if groups == 1 and per_group >= 16:
        in_float = 3000 + 0.0180 * taps * _up(per_group, 16) * _up(out_channels, 16)
        in_integers = 8500 + 0.5 * taps * (area > 1) + 0.096 * size
        in_integers += 0.0044 * taps * _up(out_channels, 16) * _up(per_group, 4) + 3.5 * where * (out_channels % 16 > 0)
    elif groups == 1:
        in_float = 3500 + 0.0195 * taps * per_group * _up(out_channels, 16)
        in_integers = 8000 + 1.6 * taps if per_group >= 4 else 9000 + 1.7 * taps + 0.35 * size
        # what the gathering leaves to be multiplied
        in_integers += 0.0044 * taps * _up(out_channels, 16) * _up(per_group, 4)
    elif per_group == 1:
        in_float = 4800 + size * (0.022 * area + 0.038)
        if out_channels % 16 == 0:
            in_integers = 7000 + 0.80 * taps + size * (0.0253 * area + 0.10)
        else:
            in_integers = 5400 + 1.22 * taps + 0.65 * size
    else:
        macs = taps * out_channels * per_group
        in_float = 3000 + macs / (58 if per_group >= 16 else 18 if per_group >= 8 else 13)
        in_integers = 5000 + macs / 210 + where * groups * (40 if area > 1 else 18)
    return Cost(in_float * _NS, in_integers * _NS)


def matmul(rows: int, inner: int, columns: int) -> Cost:
    """[rows, inner] x [inner, columns] with a constant right side. One row is bound by the weights' bytes."""
    macs = rows * inner * columns
    if rows == 1:
        return Cost((1700 + macs / 19.8) * _NS, (3900 + macs / 58) * _NS)
    return Cost((2000 + macs / 53) * _NS, (3800 + macs / 203) * _NS)


# Multiplications per nanosecond by (bits, block), for one row and for many.
_BLOCK_RATES = {
    (2, 32): (28, 34), (2, 64): (46, 62), (2, 128): (61, 89),
    (4, 32): (44, 64), (4, 64): (48, 66), (4, 128): (61, 88),
    (8, 32): (48, 72), (8, 64): (50, 80), (8, 128): (52, 86),
}  # fmt: skip


def blocks(rows: int, inner: int, columns: int, bits: int, size: int) -> float:
    """Seconds of float rows times [inner, columns] in blocks of `size`; activations are quantized inside."""
    macs = rows * inner * columns
    one, many = _BLOCK_RATES[bits, size]
    return (3900 + macs / one) * _NS if rows == 1 else (6000 + macs / many) * _NS


def elementwise(sized: ir.Value | None, in_float: float, in_integers: float) -> Cost:
    """An operator whose time is proportional to the elements of `sized`; nanoseconds for each."""
    count = elements(sized)
    return Cost((2000 + count * in_float) * _NS, (2500 + count * in_integers) * _NS)


def boundary(value: ir.Value, to_integers: bool) -> float:
    """Seconds to cross between float and integers; for images the change of layout included."""
    shape = graph.run_shape(value)
    if shape is None or len(shape) == 4:
        fixed, each = (6000, 0.25) if to_integers else (5600, 0.26)
    else:
        fixed, each = (2000, 0.125) if to_integers else (2000, 0.11)
    return (fixed + elements(value) * each) * _NS
