"""Estimated time of operators on ONNX Runtime's CPU provider: what each does, and what that takes on a processor.

A kernel's work is counted in terms (multiplications, elements, starts...), and `Costs` says how many nanoseconds each
takes on one thread; so a time is linear in the coefficients, and measured times can be fitted by others. They serve to
choose which nodes are worth an integer kernel, where only ratios between them matter; what is written is measured
afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import onnx_ir as ir

from qgraph import graph

__all__ = [
    "COEFFICIENTS",
    "SHIPPED",
    "Cost",
    "Costs",
    "Terms",
    "Work",
    "blocks",
    "boundary",
    "conv",
    "dynamic",
    "elements",
    "elementwise",
    "lstm",
    "matmul",
    "picked_rows",
    "positions",
]

_NS = 1e-9
_GUESS_ELEMENTS = 50_000
_GUESS_POSITIONS = 784

Terms = Mapping[str, float]
"""Name of a coefficient -> how many of it a kernel needs."""

# Elementwise operator -> nanoseconds for each element (float, integers).
_EACH = {
    "Add": (0.15, 0.14),
    "Mul": (0.16, 0.21),
    "Concat": (0.10, 0.04),
    "Sigmoid": (0.29, 0.24),
    "LeakyRelu": (0.40, 0.24),
    "GlobalAveragePool": (0.06, 0.04),
    "AveragePool": (0.24, 4.5),
    "MaxPool": (0.27, 0.24),
    # With rounding down the runtime has a fast float copy; the other modes are slow in both.
    "ResizeDown": (0.08, 0.85),
    "Resize": (0.72, 0.85),
    "Transpose": (0.30, 0.19),
    "Reshape": (0.02, 0.01),
    "Slice": (0.20, 0.09),
    "Split": (0.25, 0.11),
    "DepthToSpace": (2.5, 1.7),
}
# Multiplications per nanosecond of weights in blocks by (bits, block), for one row and for many.
_BLOCK_RATES = {
    (2, 32): (28, 34), (2, 64): (46, 62), (2, 128): (61, 89),
    (4, 32): (44, 64), (4, 64): (48, 66), (4, 128): (61, 88),
    (8, 32): (48, 72), (8, 64): (50, 80), (8, 128): (52, 86),
}  # fmt: skip

COEFFICIENTS: Mapping[str, float] = MappingProxyType(
    {
        "conv.float.start": 3000,
        "conv.float.mac": 0.0180,
        "conv.integers.start": 8500,
        "conv.integers.tap": 0.5,
        "conv.integers.element": 0.096,
        "conv.integers.mac": 0.0044,
        "conv.integers.ragged": 3.5,
        "narrow.float.start": 3500,
        "narrow.float.mac": 0.0195,
        "narrow.integers.start": 8000,
        "narrow.integers.tap": 1.6,
        "few.integers.start": 9000,
        "few.integers.tap": 1.7,
        "few.integers.element": 0.35,
        "depthwise.float.start": 4800,
        "depthwise.float.mac": 0.022,
        "depthwise.float.element": 0.038,
        "depthwise.integers.start": 7000,
        "depthwise.integers.tap": 0.80,
        "depthwise.integers.mac": 0.0253,
        "depthwise.integers.element": 0.10,
        "ragged.integers.start": 5400,
        "ragged.integers.tap": 1.22,
        "ragged.integers.element": 0.65,
        "grouped.float.start": 3000,
        "grouped.float.mac16": 1 / 58,
        "grouped.float.mac8": 1 / 18,
        "grouped.float.mac": 1 / 13,
        "grouped.integers.start": 5000,
        "grouped.integers.mac": 1 / 210,
        "grouped.integers.gather": 40,
        "grouped.integers.group": 18,
        "row.float.start": 1700,
        "row.float.mac": 1 / 19.8,
        "row.integers.start": 3900,
        "row.integers.mac": 1 / 58,
        "matmul.float.start": 2000,
        "matmul.float.mac": 1 / 53,
        "matmul.integers.start": 3800,
        "matmul.integers.mac": 1 / 203,
        "dynamic.start": 1500,
        "dynamic.element": 0.12,
        "blocks.row.start": 3900,
        "blocks.start": 6000,
        **{f"blocks.row.{bits}.{size}": 1 / one for (bits, size), (one, _) in _BLOCK_RATES.items()},
        **{f"blocks.{bits}.{size}": 1 / many for (bits, size), (_, many) in _BLOCK_RATES.items()},
        "elementwise.float.start": 2000,
        "elementwise.integers.start": 2500,
        **{f"{name}.float": each for name, (each, _) in _EACH.items()},
        **{f"{name}.integers": each for name, (_, each) in _EACH.items()},
        "image.in.start": 6000,
        "image.in.element": 0.25,
        "image.out.start": 5600,
        "image.out.element": 0.26,
        "flat.in.start": 2000,
        "flat.in.element": 0.125,
        "flat.out.start": 2000,
        "flat.out.element": 0.11,
        "rows.float.start": 2000,
        "rows.float.element": 0.1,
        "rows.integers.start": 8000,
        "rows.integers.element": 0.5,
        "lstm.float.start": 20_000,
        "lstm.float.mac": 1 / 16,
        "lstm.integers.start": 20_000,
        "lstm.integers.mac": 1 / 48,
    }
)
"""Nanoseconds of each term, as shipped: fits, to within about 10 % in float and 15 % in integers, of per-node times
inside chains of operators (`python tools/measure_kernels.py` in a clone measures them again)."""


class Cost(NamedTuple):
    """Seconds of one node."""

    in_float: float
    in_integers: float


class Work(NamedTuple):
    """What one node does, in either form."""

    in_float: Terms
    in_integers: Terms


@dataclasses.dataclass(frozen=True)
class Costs:
    """What work takes on a processor, on one thread.

    Attributes:
        measured: where, on what and when, in words.
        coefficients: nanoseconds of each term, by the names of `COEFFICIENTS`.
    """

    measured: str
    coefficients: Mapping[str, float]

    def seconds(self, terms: Terms) -> float:
        """Estimated time of that much work."""
        return _NS * sum(self.coefficients[name] * count for name, count in terms.items())

    def of(self, work: Work) -> Cost:
        """Estimated time in either form."""
        return Cost(self.seconds(work.in_float), self.seconds(work.in_integers))


SHIPPED = Costs("AMD EPYC (Zen 4, AVX512-VNNI), 2 cores, onnxruntime 1.31.1, November 2026", COEFFICIENTS)
"""The profile that comes with qgraph."""


def elements(value: ir.Value | None) -> int:
    """Elements of a value in a run, or a guess."""
    return graph.element_count(value) or _GUESS_ELEMENTS


def positions(output: ir.Value | None) -> int:
    """Batch x spatial positions of an NCHW value, or a guess."""
    shape = graph.run_shape(output)
    if shape is None or len(shape) < 2:
        return _GUESS_POSITIONS
    return max(1, math.prod(shape) // max(1, shape[1]))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def conv(where: int, weight: tuple[int, ...], groups: int) -> Work:
    """Convolution with `weight` [out, in / groups, kernel...], at `where` positions.

    Float runs in blocks of 16 channels. The fast integer path needs 16 output channels (4 input channels) at a time;
    a depthwise one pays for each position, whatever its channels; very few input channels make it gather bytes.
    """
    out_channels, per_group = weight[0], weight[1]
    area = math.prod(weight[2:])
    size, taps = where * out_channels, where * area
    whole = _up(out_channels, 16)
    if groups == 1 and per_group >= 16:
        return Work(
            {"conv.float.start": 1, "conv.float.mac": taps * _up(per_group, 16) * whole},
            {
                "conv.integers.start": 1,
                "conv.integers.tap": taps * (area > 1),
                "conv.integers.element": size,
                "conv.integers.mac": taps * whole * _up(per_group, 4),
                "conv.integers.ragged": where * (out_channels % 16 > 0),
            },
        )
    if groups == 1:
        in_float: Terms = {"narrow.float.start": 1, "narrow.float.mac": taps * per_group * whole}
        # What the gathering leaves to be multiplied.
        rest: Terms = {"conv.integers.mac": taps * whole * _up(per_group, 4)}
        if per_group >= 4:
            return Work(in_float, {"narrow.integers.start": 1, "narrow.integers.tap": taps, **rest})
        return Work(in_float, {"few.integers.start": 1, "few.integers.tap": taps, "few.integers.element": size, **rest})
    if per_group == 1:
        in_float = {"depthwise.float.start": 1, "depthwise.float.mac": size * area, "depthwise.float.element": size}
        kind = "depthwise" if out_channels % 16 == 0 else "ragged"
        terms = {f"{kind}.integers.start": 1.0, f"{kind}.integers.tap": taps, f"{kind}.integers.element": size}
        return Work(in_float, {**terms, "depthwise.integers.mac": size * area} if kind == "depthwise" else terms)
    macs = taps * out_channels * per_group
    step = "16" if per_group >= 16 else "8" if per_group >= 8 else ""
    gathered = f"grouped.integers.{'gather' if area > 1 else 'group'}"
    return Work(
        {"grouped.float.start": 1, f"grouped.float.mac{step}": macs},
        {"grouped.integers.start": 1, "grouped.integers.mac": macs, gathered: where * groups},
    )


def matmul(rows: int, inner: int, columns: int) -> Work:
    """[rows, inner] x [inner, columns] with a constant right side. One row is bound by the weights' bytes."""
    macs, kind = rows * inner * columns, "row" if rows == 1 else "matmul"
    return Work(*({f"{kind}.{form}.start": 1, f"{kind}.{form}.mac": macs} for form in ("float", "integers")))


def dynamic(rows: int, inner: int, columns: int) -> Terms:
    """The integer product, and the range of its activation. For one row that is next to nothing."""
    return {**matmul(rows, inner, columns).in_integers, "dynamic.start": 1, "dynamic.element": rows * inner}


def blocks(rows: int, inner: int, columns: int, bits: int, size: int) -> Terms:
    """Float rows times [inner, columns] in blocks of `size`; activations are quantized inside."""
    kind = "blocks.row" if rows == 1 else "blocks"
    return {f"{kind}.start": 1, f"{kind}.{bits}.{size}": rows * inner * columns}


def elementwise(name: str, count: int) -> Work:
    """An operator whose time is proportional to its elements."""
    return Work(*({f"elementwise.{form}.start": 1, f"{name}.{form}": count} for form in ("float", "integers")))


def boundary(value: ir.Value, into: bool) -> Terms:
    """To cross between float and integers; for images the change of layout included."""
    shape = graph.run_shape(value)
    kind = "image" if shape is None or len(shape) == 4 else "flat"
    way = "in" if into else "out"
    return {f"{kind}.{way}.start": 1, f"{kind}.{way}.element": elements(value)}


def picked_rows(count: int) -> Work:
    """Rows of a table, `count` numbers in all; each brought back to float by its own scale."""
    return Work(*({f"rows.{form}.start": 1, f"rows.{form}.element": count} for form in ("float", "integers")))


def lstm(macs: int) -> Work:
    """An LSTM of that many multiplications."""
    return Work(*({f"lstm.{form}.start": 1, f"lstm.{form}.mac": macs} for form in ("float", "integers")))
