"""Weights stored in fewer bits than the float32 in which they are used: halves, and 8- and 4-bit floats with scales.

A weight is looked at as [outer, inner, rest], `inner` being what its operator sums over (or a row of a table): runs of
`size` numbers along it share a scale, which brings the largest of them to the format's largest number.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.float_formats import Codebook, Float
from qgraph.formats import Format
from qgraph.spec import PerBlock, QuantSpec

__all__ = [
    "REACH",
    "Reach",
    "View",
    "blocks_in",
    "decode",
    "encode",
    "is_stored",
    "noise",
    "positions",
    "scales_of",
    "table_of",
    "view_of",
]

View: TypeAlias = "tuple[int, int, int]"

REACH = "qgraph.reach"
"""Key in `Node.meta`: the Reach of the node's weights in the format that stores them, where that has no scales."""

_POSITIONS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "GRU": (1, 2),
    "Gather": (0,),
    "Gemm": (1,),
    "LSTM": (1, 2),
    "MatMul": (1,),
    "RNN": (1, 2),
}
_SAMPLE = 1 << 20


def is_stored(fmt: Format) -> bool:
    """Whether a format is for storage only: no kernel computes in it."""
    return isinstance(fmt, (Codebook, Float))


def positions(node: ir.Node) -> tuple[int, ...]:
    """Inputs of `node` that hold constant float32 weights of two dimensions or more."""
    wanted = _POSITIONS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
    found: list[int] = []
    for position in wanted:
        value = node.inputs[position] if len(node.inputs) > position else None
        if graph.has_constant(value) and graph.is_float(value) and len(graph.run_shape(value) or ()) > 1:
            found.append(position)
    return tuple(found)


def view_of(node: ir.Node, shape: tuple[int, ...]) -> View:
    """[outer, inner, rest] of the weight of `node`."""
    if node.op_type in ("ConvTranspose", "MatMul") or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    ):
        axis = 0 if node.op_type == "ConvTranspose" else len(shape) - 2
        return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if node.op_type == "Conv":
        return shape[0], math.prod(shape[1:]), 1
    return math.prod(shape[:-1]), shape[-1], 1


def blocks_in(view: View, spec: QuantSpec) -> tuple[int, int]:
    """(blocks along `inner`, numbers in each); one block where the spec has none."""
    granularity = spec.granularity
    size = min(granularity.size, view[1]) if isinstance(granularity, PerBlock) else view[1]
    return -(-view[1] // size), size


def _blocks(weight: NDArray[Any], view: View, size: int) -> NDArray[np.float32]:
    """[outer, blocks, size, rest], the last block filled up with zeros."""
    outer, inner, rest = view
    parts = np.asarray(weight, np.float32).reshape(view)
    if inner % size:
        parts = np.pad(parts, ((0, 0), (0, -inner % size), (0, 0)))
    return parts.reshape(outer, -1, size, rest)


def scales_of(weight: NDArray[Any], view: View, spec: QuantSpec) -> NDArray[np.float32]:
    """float32 [outer, blocks, 1, rest]; 1 for blocks of zeros."""
    most = np.abs(_blocks(weight, view, blocks_in(view, spec)[1])).max(axis=2, keepdims=True)
    scale = (most / np.float32(spec.format.highest)).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def encode(weight: NDArray[Any], view: View, spec: QuantSpec) -> NDArray[np.uint8]:
    """Codes of scaled blocks, flat, two of four bits to a byte with the first in the lower half."""
    parts = _blocks(weight, view, blocks_in(view, spec)[1]) / scales_of(weight, view, spec)
    codes = spec.format.encode(parts.reshape(-1))
    flat = codes.astype(np.uint8) if isinstance(spec.format, Codebook) else codes.view(np.uint8)
    if spec.format.storage.bitwidth == 8:
        return flat
    flat = np.pad(flat & 15, (0, flat.size % 2))
    return np.asarray(flat[::2] | flat[1::2] << np.uint8(4), np.uint8)


def table_of(fmt: Format) -> NDArray[np.float32]:
    """What each byte stands for: [256] numbers, or [256, 2] of the two codes in it."""
    if isinstance(fmt, Codebook):
        numbers = np.zeros(16, np.float32)
        numbers[: len(fmt.numbers)] = fmt.numbers
    else:
        numbers = np.arange(2**fmt.storage.bitwidth, dtype=np.uint8).view(fmt.storage.numpy()).astype(np.float32)
    if len(numbers) == 256:
        return numbers
    places = np.arange(256)
    return np.stack([numbers[places & 15], numbers[places >> 4]], axis=1)


def decode(weight: NDArray[Any], view: View, spec: QuantSpec) -> NDArray[np.float32]:
    """`weight` as it is after having been stored; its shape kept."""
    if spec.format.storage.bitwidth == 16:
        return np.asarray(spec.format.project(np.asarray(weight, np.float32)), np.float32)
    size = blocks_in(view, spec)[1]
    scale = scales_of(weight, view, spec)
    parts = spec.format.project(_blocks(weight, view, size) / scale) * scale
    return parts.reshape(view[0], -1, view[2])[:, : view[1]].reshape(weight.shape)


def noise(node: ir.Node, spec: QuantSpec) -> float:
    """Share of the weights' power that storing them turns into noise, on a sample of them."""
    power = lost = 0.0
    for position in positions(node):
        value = node.inputs[position]
        array = graph.constant(value)
        assert array is not None
        view = view_of(node, array.shape)
        step = max(1, array.size // _SAMPLE)
        by_row = view[0] >= view[2]
        part = array.reshape(view)[::step] if by_row else array.reshape(view)[:, :, ::step]
        part = np.array(part, np.float32)
        del array
        graph.release(value)
        power += float(np.square(part, dtype=np.float64).sum())
        lost += float(np.square(part - decode(part, part.shape, spec), dtype=np.float64).sum())
    return lost / power if power > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Reach:
    """How the numbers of a weight fit a format.

    Attributes:
        largest: the largest magnitude.
        subnormal: numbers that are not zero and below the smallest normal one, which lose digits.
        count: all numbers.
        smallest: the format's smallest normal number.
    """

    largest: float
    subnormal: int
    count: int
    smallest: float

    @classmethod
    def of(cls, weight: NDArray[Any], fmt: Float) -> Reach:
        """Of a weight in `fmt` without a scale."""
        magnitude = np.abs(np.asarray(weight, np.float32))
        small = int(np.count_nonzero(magnitude < fmt.smallest_normal)) - int(np.count_nonzero(magnitude == 0))
        return cls(float(magnitude.max(initial=0.0)), small, magnitude.size, fmt.smallest_normal)

    def merged(self, other: Reach) -> Reach:
        """Of both."""
        largest = max(self.largest, other.largest)
        return Reach(largest, self.subnormal + other.subnormal, self.count + other.count, self.smallest)
