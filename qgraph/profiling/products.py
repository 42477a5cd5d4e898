"""Rows of the table of kernels on matrices: products in every form, what moves numbers about, the way in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.profiling.models import MICROSOFT, Net
from qgraph.profiling.rows import Row, Timed, added
from qgraph.targets import cpu_costs
from qgraph.targets.cpu_costs import Terms

__all__ = ["rows"]

_Codes = type[np.integer[Any]]
# Rows, inner and outer size, how many in a chain.
_SQUARE = ((1, 768, 6), (16, 768, 4), (128, 768, 2), (384, 768, 1), (1, 256, 8), (64, 256, 6), (4, 384, 6))
_IN_BLOCKS = ((1, 2048), (32, 1024))
_BITS = ((2, 4, 8), (32, 64, 128))
_CACHED = 1 << 20


def rows(codes: _Codes) -> Iterator[Row]:
    """All of them."""
    for count, size, copies in _SQUARE:
        yield from _products(count, size, copies, codes)
    for count, size in _IN_BLOCKS:
        for bits in _BITS[0]:
            for block in _BITS[1]:
                yield _blocks(count, size, bits, block)
    for operator, shape, attributes in (
        ("Transpose", (1, 512, 12, 64), {"perm": [0, 2, 1, 3]}),
        ("Reshape", (1, 512, 768), {}),
        ("Slice", (1, 512, 1536), {}),
        ("Split", (1, 512, 768), {"axis": 2}),
        ("Concat", (1, 64, 64, 64), {"axis": 1}),
        ("GlobalAveragePool", (1, 256, 56, 56), {}),
        ("AveragePool", (1, 64, 56, 56), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ):
        yield _mover(operator, shape, attributes, codes)
    for count, size in ((16, 384), (128, 768), (256, 3072)):
        yield _crossing(count, size, codes)
    yield _nothing(codes)


def _float_product(count: int, size: int, copies: int) -> Timed:
    def build() -> ir.Model:
        net = Net(None)
        x = net.input(count, size)
        weight, _ = net.weight((size, size), 1)
        for _ in range(copies):
            x = net.node("MatMul", [x, weight])
        return net.model(x)

    far = {"far": size * size} if count == 1 and size * size > _CACHED else {}
    terms = added([(copies, cpu_costs.matmul(count, size, size).in_float)], far)
    return Timed(f"MatMul {count}x{size}x{size} float", build, terms)


def _products(count: int, size: int, copies: int, codes: _Codes) -> Iterator[Row]:
    before, name = _float_product(count, size, copies), f"MatMul {count}x{size}x{size}"
    form = f"{'u8' if codes is np.uint8 else 's8'} x s8"

    def static() -> ir.Model:
        net = Net(codes)
        x = net.input(count, size)
        weight, _ = net.weight((size, size), 1)
        for _ in range(copies):
            x = net.op("MatMul", x, weight)
        return net.model(x)

    def dynamic() -> ir.Model:
        net = Net(None)
        x = net.input(count, size)
        weight = net.bytes((size, size), np.int8)
        scales = net.constant(np.full(size, 1e-4, np.float32))
        zero = net.constant(np.zeros(size, np.int8))
        for _ in range(copies):
            quantized, scale, offset = net.nodes("DynamicQuantizeLinear", [x], 3)
            product = net.node("MatMulInteger", [quantized, weight, offset, zero])
            x = net.node("Mul", [net.node("Cast", [product], to=1), net.node("Mul", [scale, scales])])
        return net.model(x)

    work = cpu_costs.matmul(count, size, size)
    yield Row("matmul", name, form, before, Timed(f"{name} {form}", static, added([(copies, work.in_integers)])))
    terms = added([(copies, cpu_costs.dynamic(count, size, size))])
    yield Row("matmul", name, "dynamic", before, Timed(f"{name} dynamic", dynamic, terms))


def _blocks(count: int, size: int, bits: int, block: int) -> Row:
    name, form = f"MatMul {count}x{size}x{size}", f"{bits} bits by {block}"

    def build() -> ir.Model:
        net = Net(None)
        x = net.input(count, size)
        weight = net.bytes((size, size // block, block * bits // 8), np.uint8)
        scales = net.filled((size, size // block), lambda part: np.full(part, 1e-3, np.float32))
        sizes = {"K": size, "N": size, "bits": bits, "block_size": block, "accuracy_level": 4}
        return net.model(net.node("MatMulNBits", [x, weight, scales], MICROSOFT, **sizes))

    terms = added([(1, cpu_costs.blocks(count, size, size, bits, block))])
    return Row("blocks", name, form, _float_product(count, size, 1), Timed(f"{name} {form}", build, terms))


def _mover(operator: str, shape: tuple[int, ...], attributes: dict[str, Any], codes: _Codes) -> Row:
    count = int(np.prod(shape))
    sized = {"Slice": count // 2, "Concat": 2 * count, "AveragePool": count // 4}.get(operator, count)

    def build(net: Net) -> ir.Model:
        x = net.input(*shape)
        if operator == "Split":
            return net.model(*(net.quantized(y) for y in net.nodes("Split", [x], 2, **attributes)))
        more: list[ir.Value] = []
        if operator == "Reshape":
            more = [net.constant(np.asarray([shape[1], shape[0], shape[2]], np.int64))]
        elif operator == "Slice":
            more = [net.constant(np.asarray([bound], np.int64)) for bound in (0, shape[2] // 2, 2)]
        elif operator == "Concat":
            more = [net.input(*shape)]
        return net.model(net.op(operator, x, *more, **attributes))

    work = cpu_costs.elementwise(operator, sized)
    # Pools run in the blocked layout of convolutions.
    blocked = {"GlobalAveragePool": count, "AveragePool": count + sized}.get(operator, 0)
    name = f"{operator} {'x'.join(map(str, shape[1:]))}"
    return Row(
        "mover",
        name,
        "codes",
        Timed(f"{name} float", lambda: build(Net(None)), added([(1, work.in_float)], {"layout.float": blocked})),
        Timed(f"{name} codes", lambda: build(Net(codes)), added([(1, work.in_integers)])),
    )


def _crossing(count: int, size: int, codes: _Codes) -> Row:
    """QuantizeLinear, and DequantizeLinear."""
    name = f"crossing {count}x{size}"
    shape = ir.val("x", ir.DataType.FLOAT, [count, size])

    def inward() -> ir.Model:
        net = Net(None)
        x = net.input(count, size)
        net.codes = codes
        return net.model(net.quantized(x))

    def outward() -> ir.Model:
        net = Net(codes)
        x = net.input(count, size)
        net.codes = None
        # As it stands, the output would be the input.
        return net.model(net.node("Identity", [x]))

    terms: list[Terms] = [added([(1, cpu_costs.boundary(shape, into))]) for into in (True, False)]
    return Row(
        "crossing", name, "in and out", Timed(f"{name} in", inward, terms[0]), Timed(f"{name} out", outward, terms[1])
    )


def _nothing(codes: _Codes) -> Row:
    """What a run takes that does next to nothing."""

    def build(kind: _Codes | None) -> Callable[[], ir.Model]:
        def make() -> ir.Model:
            net = Net(kind)
            return net.model(net.op("Reshape", net.input(1, 1), net.constant(np.asarray([1], np.int64))))

        return make

    work = cpu_costs.elementwise("Reshape", 1)
    return Row(
        "run",
        "a run",
        "codes",
        Timed("a run float", build(None), added([(1, work.in_float)])),
        Timed("a run codes", build(codes), added([(1, work.in_integers)])),
    )
