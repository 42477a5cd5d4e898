"""Rows of the table of kernels on images: convolutions, what stands between them, and the way in and out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.profiling.models import Net
from qgraph.profiling.rows import Row, Timed, added
from qgraph.targets import cpu_costs
from qgraph.targets.cpu_costs import Terms, Work

__all__ = ["rows"]

_Codes = type[np.integer[Any]]
_Sizes = tuple[int, ...]

# in-out k kernel [s stride] [g groups] @ height [x width] [* copies in a row]; a comma goes on with another one.
_CONVS = (
    "64-64k3@56", "128-128k3@28", "256-256k3@14", "512-512k3@7", "32-32k3@28*4", "256-256k3@5*3",
    "64-256k1,256-64k1@56", "256-1024k1,1024-256k1@14", "16-16k1@60*6", "96-96k1@14*6", "32-192k1,192-32k1@28*2",
    "144-24k1,24-144k1@56", "240-40k1,40-240k1@28*2", "64-24k3,24-64k3@28",
    "12-16k3@56", "8-16k3@120", "4-32k3s2@224", "3-32k3s2@224", "3-64k7s2@224", "1-64k3@112", "3-16k3s2@256",
    "144-144k3g144@56*4", "384-384k3g384@14*6", "240-240k5g240@28*4", "32-32k3g32@80*4", "96-96k3g96@28*6",
    "72-72k3g72@28*6", "24-24k3g24@56*6", "120-120k5g120@14*6",
    "128-128k3g32@56", "256-256k3g8@14*2", "64-64k3g8@28*2", "240-240k1g3@28*2",
    "32-192k1,192-192k3g192,192-32k1@28",
)  # fmt: skip
_CONV = re.compile(r"(\d+)-(\d+)k(\d)(?:s(\d))?(?:g(\d+))?")
_BETWEEN_COPIES = 6
_CHANNELS, _SIDE = 32, 64


def rows(codes: _Codes) -> Iterator[Row]:
    """All of them."""
    for text in _CONVS:
        yield _convs(text, codes)
    for operator, attributes in (("Sigmoid", {}), ("LeakyRelu", {"alpha": 0.1}), ("MaxPool", _POOL)):
        yield _between(operator, operator, codes, functools.partial(_unary, operator, attributes))
    for operator in ("Add", "Mul"):
        yield _between(operator, operator, codes, functools.partial(_binary, operator))
    for mode, name in (("floor", "ResizeDown"), ("round_prefer_floor", "Resize")):
        yield _resized(name, mode, codes)
    yield _deep(codes)
    for channels, side in ((16, 112), (64, 56), (128, 28), (256, 14)):
        yield _crossings(channels, side, codes)


_POOL = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}


def _work(positions: int, sizes: tuple[int, int, int], groups: int = 1) -> Work:
    inside, outside, kernel = sizes
    return cpu_costs.conv(positions, (outside, inside // groups, kernel, kernel), groups)


def _row(
    table: str, name: str, form: str, codes: _Codes, build: Callable[[Net], ir.Model], terms: tuple[Terms, Terms]
) -> Row:
    """A row whose two models differ in their form only."""
    return Row(
        table,
        name,
        form,
        Timed(f"{name} float", lambda: build(Net(None)), terms[0]),
        Timed(f"{name} {form}", lambda: build(Net(codes)), terms[1]),
    )


def _eight_bits(codes: _Codes) -> str:
    return f"{'u8' if codes is np.uint8 else 's8'} x s8"


def _convs(text: str, codes: _Codes) -> Row:
    chain, _, place = text.partition("@")
    side, _, copies = place.partition("*")
    found = [tuple(int(v or 1) for v in one.groups()) for one in _CONV.finditer(chain)] * int(copies or 1)
    first, last = found[0], found[-1]
    parts: list[Work] = []
    extent = int(side)
    for inside, outside, kernel, stride, groups in found:
        extent = -(-extent // stride)
        parts.append(_work(extent**2, (inside, outside, kernel), groups))
    left, right = first[0] * int(side) ** 2, last[1] * extent**2
    # Blocked convolutions read an image of few channels as it is, and groups of few channels are not blocked.
    per_group = first[0] // first[4]
    blocked = 0 if 1 < per_group < 16 <= first[0] else right + (left if first[0] >= 16 else 0)

    def build(net: Net) -> ir.Model:
        x = net.input(1, first[0], int(side), int(side))
        for inside, outside, kernel, stride, groups in found:
            x = net.conv(x, (inside, outside, kernel), stride, groups)
        return net.model(x)

    kind = "depthwise" if first[4] == first[0] > 1 else "grouped" if first[4] > 1 else "stem" if first[0] < 16 else ""
    name = f"Conv {kind + ' ' if kind else ''}{chain}@{side}"
    floats = added([(1, one.in_float) for one in parts], {"layout.float": blocked})
    integers = added([(1, one.in_integers) for one in parts], {"layout.integers": left + right})
    return _row("conv", name, _eight_bits(codes), codes, build, (floats, integers))


def _between(name: str, term: str, codes: _Codes, middle: Callable[[Net, ir.Value, ir.Value], ir.Value]) -> Row:
    """An operator, several in a row, between two convolutions."""
    sizes = (_CHANNELS, _CHANNELS, 1)
    count = _CHANNELS * _SIDE**2

    def build(net: Net) -> ir.Model:
        x = net.input(1, _CHANNELS, _SIDE, _SIDE)
        other = net.conv(x, sizes)
        y = net.conv(other, sizes)
        for _ in range(_BETWEEN_COPIES):
            y = middle(net, y, other)
        return net.model(net.conv(y, sizes))

    conv, each = _work(_SIDE**2, sizes), cpu_costs.elementwise(term, count)
    terms = (
        added([(3, conv.in_float), (_BETWEEN_COPIES, each.in_float)], {"layout.float": 2 * count}),
        added([(3, conv.in_integers), (_BETWEEN_COPIES, each.in_integers)], {"layout.integers": 2 * count}),
    )
    return _row("elementwise", f"{name} {_CHANNELS}@{_SIDE}", "codes", codes, build, terms)


def _unary(operator: str, attributes: dict[str, Any], net: Net, y: ir.Value, other: ir.Value) -> ir.Value:
    return net.op(operator, y, **attributes)


def _binary(operator: str, net: Net, y: ir.Value, other: ir.Value) -> ir.Value:
    return net.op(operator, y, other)


def _resized(term: str, mode: str, codes: _Codes) -> Row:
    """Twice as large, and back by a convolution of stride 2."""
    sizes, copies = (_CHANNELS, _CHANNELS, 1), 2
    count = _CHANNELS * _SIDE**2

    def build(net: Net) -> ir.Model:
        y = net.conv(net.input(1, _CHANNELS, _SIDE, _SIDE), sizes)
        scales = net.constant(np.asarray([1, 1, 2, 2], np.float32))
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": mode}
        for _ in range(copies):
            y = net.conv(net.op("Resize", y, None, scales, **how), sizes, 2)
        return net.model(y)

    conv, each = _work(_SIDE**2, sizes), cpu_costs.elementwise(term, 4 * count)
    terms = (
        added([(1 + copies, conv.in_float), (copies, each.in_float)], {"layout.float": 2 * count}),
        added([(1 + copies, conv.in_integers), (copies, each.in_integers)], {"layout.integers": 2 * count}),
    )
    return _row("elementwise", f"Resize {mode} {_CHANNELS}@{_SIDE}", "codes", codes, build, terms)


def _deep(codes: _Codes) -> Row:
    """Depth to space, and back by a convolution of stride 2."""
    channels, copies = 64, 2
    count = channels * _SIDE**2
    back = (channels // 4, channels, 3)

    def build(net: Net) -> ir.Model:
        y = net.conv(net.input(1, channels, _SIDE, _SIDE), (channels, channels, 1))
        for _ in range(copies):
            y = net.conv(net.op("DepthToSpace", y, blocksize=2), back, 2)
        return net.model(y)

    first, conv = _work(_SIDE**2, (channels, channels, 1)), _work(_SIDE**2, back)
    each = cpu_costs.elementwise("DepthToSpace", count)
    terms = (
        added([(1, first.in_float), (copies, conv.in_float), (copies, each.in_float)], {"layout.float": 2 * count}),
        added(
            [(1, first.in_integers), (copies, conv.in_integers), (copies, each.in_integers)],
            {"layout.integers": 2 * count},
        ),
    )
    return _row("elementwise", f"DepthToSpace {channels}@{_SIDE}", "codes", codes, build, terms)


def _crossings(channels: int, side: int, codes: _Codes) -> Row:
    """Two convolutions: the first in float and the second in integers, and the other way round."""
    sizes, count = (channels, channels, 1), channels * side**2
    conv = _work(side**2, sizes)
    shape = ir.val("x", ir.DataType.FLOAT, [1, channels, side, side])

    def inward() -> ir.Model:
        net = Net(None)
        x = net.conv(net.input(1, channels, side, side), sizes)
        net.codes = codes
        return net.model(net.conv(net.quantized(x), sizes))

    def outward() -> ir.Model:
        net = Net(codes)
        x = net.conv(net.input(1, channels, side, side), sizes)
        net.codes = None
        return net.model(net.conv(x, sizes))

    def terms(into: bool) -> Terms:
        both = [(1.0, conv.in_float), (1.0, conv.in_integers), (1.0, cpu_costs.boundary(shape, into))]
        return added(both, {"layout.float": count, "layout.integers": count})

    name = f"crossing {channels}@{side}"
    return Row(
        "crossing",
        name,
        "in and out",
        Timed(f"{name} in", inward, terms(True)),
        Timed(f"{name} out", outward, terms(False)),
    )
