"""Weights in blocks: each run of weights along the sum of a product has a scale, and codes of 2, 4 or 8 bits.

This is the layout of `com.microsoft.MatMulNBits` and of `GatherBlockQuantized` over rows: unsigned codes, several to
a byte with the first in the lowest bits, each row's last block filled up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.errors import QuantizationError
from qgraph.qparams import of_blocks
from qgraph.spec import PerBlock, QuantSpec

__all__ = ["BLOCKS", "Blocks", "nearest", "pack", "unpack"]

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
        return self.codes.shape[2] * 8 // self.bits

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
    groups = codes.reshape(*codes.shape[:-1], -1, each)
    packed = groups[..., 0].copy()
    for place in range(1, each):
        packed |= groups[..., place] << np.uint8(place * bits)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """What `pack` was given along the last axis, with what filled the last byte up."""
    if bits == 8:
        return packed
    each = 8 // bits
    places = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[..., None] >> places) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def nearest(weight: NDArray[np.floating], spec: QuantSpec) -> Blocks:
    """Round each weight to the nearest code of its block's own range.

    Args:
        weight: two dimensions, of which `spec.granularity.axis` is K.
        spec: integer format of 2, 4 or 8 bits, per block.
    """
    assert isinstance(spec.granularity, PerBlock)
    axis, size, bits = spec.granularity.axis, spec.granularity.size, spec.format.storage.bitwidth
    rows = np.ascontiguousarray(weight.T if axis == 0 else weight, np.float32)
    lowered = dataclasses.replace(spec, granularity=PerBlock(1, size))
    params = of_blocks(rows, lowered)
    columns, inner = rows.shape
    shift = 2 ** (bits - 1) if spec.format.signed else 0
    codes = np.empty((columns, inner), np.uint8)
    inverse = (1.0 / params.scale).astype(np.float32)
    zero = params.zero_point.astype(np.float32)
    for block, start in enumerate(range(0, inner, size)):
        part = rows[:, start : start + size] * inverse[:, block, None]
        np.rint(part, out=part)
        part += zero[:, block, None]
        np.clip(part, spec.format.lowest, spec.format.highest, out=part)
        codes[:, start : start + size] = part + shift
    return Blocks.of(codes, params.scale, None if spec.symmetric else params.zero_point + shift, bits, size)
