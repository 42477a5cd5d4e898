"""Weights in blocks: each run of weights along the sum of a product has a scale, and codes of 2, 4 or 8 bits.

This is the layout of `com.microsoft.MatMulNBits` and of `GatherBlockQuantized` over rows: unsigned codes, several to
a byte with the first in the lowest bits, each row's last block filled up.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.errors import QuantizationError
from qgraph.qparams import from_range
from qgraph.spec import PerBlock, QuantSpec
from qgraph.strips import Strips

__all__ = ["BLOCKS", "Blocks", "nearest", "pack", "unpack"]

_WINDOW = 1 << 21
"""Bytes of float weights that a core has in hand at once: the steps on them find them in its cache."""

BLOCKS = "qgraph.blocks"
"""Key in `Node.meta` of a product: the Blocks that an algorithm has chosen for its weight."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A weight of N columns and K rows, in blocks along K.

    Attributes:
        codes: unsigned and packed, uint8 [N, blocks, size * bits / 8].
        scale: float32 [N, blocks].
        zero_point: unsigned and packed along the blocks, uint8 [N, ceil(blocks * bits / 8)]; None for the middle,
            2 ** (bits - 1).
        bits: 2, 4 or 8.
        inner: K, of which the last block may hold less than `size`.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    bits: int
    inner: int

    @property
    def size(self) -> int:
        """Weights in a block."""
        return int(self.codes.shape[2]) * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)

    @property
    def real(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, [N, K]."""
        columns, count = self.scale.shape
        codes = unpack(self.codes, self.bits).astype(np.float32)
        if self.zero_point is None:
            codes -= 2 ** (self.bits - 1)
        else:
            codes -= unpack(self.zero_point, self.bits)[:, :count, None]
        codes *= self.scale[..., None]
        return codes.reshape(columns, -1)[:, : self.inner]

    @classmethod
    def of(
        cls, codes: NDArray[Any], scale: NDArray[np.floating], zero_point: NDArray[Any] | None, bits: int, size: int
    ) -> Blocks:
        """Pack unsigned codes [N, K] with scales [N, blocks] and zero points [N, blocks] (None for the middle)."""
        columns, inner = codes.shape
        filler = 2 ** (bits - 1) if zero_point is None else 0
        wide = np.pad(codes, ((0, 0), (0, -inner % size)), constant_values=filler)
        wide = wide.reshape(columns, -1, size).astype(np.uint8, copy=False)
        if zero_point is not None and inner % size:
            # What fills the last block up stands for zero.
            wide[:, -1, inner % size :] = zero_point[:, -1:]
        packed = None if zero_point is None else pack(zero_point.astype(np.uint8), bits)
        return cls(pack(wide, bits), np.ascontiguousarray(scale, np.float32), packed, bits, inner)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Several codes to a byte along the last axis, the first in the lowest bits; the last byte is filled up with zeros.

    Raises:
        QuantizationError: codes of `bits` bits do not fill bytes evenly.
    """
    if bits not in (1, 2, 4, 8):
        raise QuantizationError(f"Codes of {bits} bits are not packed; 1, 2, 4 and 8 are.")
    if bits == 8:
        return np.ascontiguousarray(codes)
    each = 8 // bits
    short = -codes.shape[-1] % each
    if short:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    # The bytes of a group are one wide number, in which each code moves down to its place.
    wide = np.ascontiguousarray(codes).view(f"<u{each}")
    packed = wide.copy()
    for place in range(1, each):
        packed |= wide >> wide.dtype.type(place * (8 - bits))
    return packed.astype(np.uint8)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """What `pack` was given along the last axis, with what filled the last byte up."""
    if bits == 8:
        return packed
    each = 8 // bits
    places = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[..., None] >> places) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def nearest(weight: NDArray[np.floating] | Strips, spec: QuantSpec) -> Blocks:
    """Round each weight to the nearest code of its block's own range, a window of the weight at a time, on all cores.

    Args:
        weight: two dimensions, of which `spec.granularity.axis` is K.
        spec: integer format of 2, 4 or 8 bits, per block.

    Raises:
        QuantizationError: a weight is not finite.
    """
    assert isinstance(spec.granularity, PerBlock)
    source = weight if isinstance(weight, Strips) else Strips(weight)
    axis, size, bits = spec.granularity.axis, spec.granularity.size, spec.format.storage.bitwidth
    inner, columns = source.shape[axis], source.shape[1 - axis]
    count = -(-inner // size)
    codes = np.empty((columns, count, size * bits // 8), np.uint8)
    scale, zero = np.empty((columns, count), np.float32), np.empty((columns, count), np.uint8)

    windows = list(_windows(source.shape, axis, size))
    local = threading.local()

    def part(window: tuple[slice, slice]) -> None:
        if not hasattr(local, "buffer"):
            # The first window is the largest. Fresh memory for each would take as long as the work on it.
            local.buffer = np.empty(math.prod(w.stop - w.start for w in windows[0]), np.float32)
        array = source.window(*window, into=local.buffer)
        if axis == 0:
            found, block = _columns(array, spec, size), window[0].start // size
            codes[window[1], block], scale[window[1], block], zero[window[1], block] = found[0].T, found[1], found[2]
        else:
            codes[window[0]], scale[window[0]], zero[window[0]] = _rows(array, spec, size)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(part, windows):
            pass
    return Blocks(codes, scale, None if spec.symmetric else pack(zero, bits), bits, inner)


def _windows(shape: tuple[int, ...], axis: int, size: int) -> Iterator[tuple[slice, slice]]:
    """One block and many columns at a time, or many rows of blocks."""
    height = size if axis == 0 else max(1, _WINDOW // (4 * shape[1]))
    # Whole rows are read at once, parts of rows one by one.
    width = shape[1] if axis == 1 or shape[1] <= _WINDOW // size else max(1, _WINDOW // (4 * size))
    for top in range(0, shape[0], height):
        for left in range(0, shape[1], width):
            yield slice(top, min(top + height, shape[0])), slice(left, min(left + width, shape[1]))


def _columns(part: NDArray[np.float32], spec: QuantSpec, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One block [at most size, columns], which is spoilt -> packed codes [bytes, columns], scales, zero points."""
    params = from_range(part.min(axis=0), part.max(axis=0), spec)
    shift = np.float32(2 ** (spec.format.storage.bitwidth - 1) if spec.format.signed else 0)
    zero = params.zero_point.astype(np.float32) + shift
    part *= (1.0 / params.scale).astype(np.float32)
    np.rint(part, out=part)
    part += zero
    np.clip(part, np.float32(spec.format.lowest + shift), np.float32(spec.format.highest + shift), out=part)
    codes = part.astype(np.uint8)
    if len(codes) < size:
        # What fills the last block up stands for zero.
        codes = np.concatenate([codes, np.broadcast_to(zero.astype(np.uint8), (size - len(codes), codes.shape[1]))])
    bits = spec.format.storage.bitwidth
    # The caller turns it over: rows a power of two apart would lie in few lines of the cache.
    packed = np.empty((size * bits // 8, codes.shape[1] + 64), np.uint8)[:, : codes.shape[1]]
    packed[:] = codes[:: 8 // bits]
    for place in range(1, 8 // bits):
        packed |= codes[place :: 8 // bits] << np.uint8(place * bits)
    return packed, params.scale, zero


def _rows(part: NDArray[np.float32], spec: QuantSpec, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Rows [rows, K], which are spoilt -> packed codes [rows, blocks, bytes], scales and zero points [rows, blocks]."""
    # Zero is in every range, and so changes none.
    part = np.pad(part, ((0, 0), (0, -part.shape[1] % size))) if part.shape[1] % size else part
    part = part.reshape(len(part), -1, size)
    params = from_range(part.min(axis=2), part.max(axis=2), spec)
    shift = np.float32(2 ** (spec.format.storage.bitwidth - 1) if spec.format.signed else 0)
    zero = params.zero_point.astype(np.float32) + shift
    part *= (1.0 / params.scale).astype(np.float32)[..., None]
    np.rint(part, out=part)
    part += zero[..., None]
    np.clip(part, np.float32(spec.format.lowest + shift), np.float32(spec.format.highest + shift), out=part)
    return pack(part.astype(np.uint8), spec.format.storage.bitwidth), params.scale, zero
