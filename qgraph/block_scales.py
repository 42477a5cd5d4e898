"""Scales and zero points of blocks that leave the least squared error, each weight counted by what it multiplies.

A block's own range is only one of the grids that it can be rounded to: a narrower one clips a few weights and rounds
all others more finely. Some shares of the range are tried, then scale and codes are fitted to each other in turn, each
by least squares (the scheme of llama.cpp's k-quants, Kawrakow 2023; Lloyd's algorithm on an even grid). Weights count
by the power of their input, the diagonal of its second moment, where that is known (Frantar et al., "GPTQ", 2022,
section 3 has the whole matrix; see `qgraph.block_rounding`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from qgraph.blocks import Blocks
from qgraph.spec import PerBlock, QuantSpec

__all__ = ["Codes", "Levels", "searched"]

_COLUMNS = 2048
"""Output columns that are fitted at a time, so that a block's arrays stay in the cache."""
_SHARES = {2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7), 8: (1.0, 0.98)}
_ROUNDS = 2
_TINY = float(np.finfo(np.float32).tiny)

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Levels:
    """The unsigned codes of a block.

    Attributes:
        lowest: smallest code.
        highest: largest.
        middle: the zero point where it is fixed; None where each block has its own.
        bits: stored bits of a code.
        size: weights in a block.
    """

    lowest: int
    highest: int
    middle: int | None
    bits: int
    size: int

    @classmethod
    def of(cls, spec: QuantSpec) -> Levels:
        """The codes of an integer spec per block, as `qgraph.blocks` stores them."""
        assert isinstance(spec.granularity, PerBlock)
        bits = spec.format.storage.bitwidth
        shift = 2 ** (bits - 1) if spec.format.signed else 0
        middle = 2 ** (bits - 1) if spec.symmetric else None
        lowest, highest = int(spec.format.lowest) + shift, int(spec.format.highest) + shift
        return cls(lowest, highest, middle, bits, spec.granularity.size)


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A weight [inputs, outputs] in blocks along its inputs.

    Attributes:
        codes: whole numbers, float32 [inputs, outputs].
        scale: float32 [blocks, outputs].
        zero: whole numbers, float32 [blocks, outputs].
        levels: what codes there are.
    """

    codes: Floats
    scale: Floats
    zero: Floats
    levels: Levels

    @property
    def real(self) -> Floats:
        """The weights that the codes stand for, [inputs, outputs]."""
        found = np.empty_like(self.codes)
        for block, start in enumerate(range(0, len(found), self.levels.size)):
            rows = slice(start, start + self.levels.size)
            np.subtract(self.codes[rows], self.zero[block], out=found[rows])
            found[rows] *= self.scale[block]
        return found

    def packed(self) -> Blocks:
        """As they are stored."""
        zero = None if self.levels.middle is not None else self.zero.T
        codes = np.ascontiguousarray(self.codes.T.astype(np.uint8))
        return Blocks.of(codes, self.scale.T, zero, self.levels.bits, self.levels.size)


def searched(weight: NDArray[np.floating], levels: Levels, power: NDArray[np.floating] | None = None) -> Codes:
    """Scales, zero points and nearest codes of the least squared error.

    Args:
        weight: [inputs, outputs].
        levels: what codes there are.
        power: what the square of each input's error counts, [inputs]; None for all alike.

    Returns:
        In no block is the error counted so larger than on the block's own range.
    """
    inputs, outputs = weight.shape
    count = -(-inputs // levels.size)
    found = Codes(
        np.empty((inputs, outputs), np.float32),
        np.empty((count, outputs), np.float32),
        np.empty((count, outputs), np.float32),
        levels,
    )
    weights = np.ones(inputs, np.float32) if power is None else np.asarray(power, np.float32)
    for left in range(0, outputs, _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        for block, start in enumerate(range(0, inputs, levels.size)):
            rows = slice(start, start + levels.size)
            part = np.ascontiguousarray(weight[rows, columns], np.float32)
            best = _fit(part, weights[rows], levels)
            found.scale[block, columns], found.zero[block, columns], found.codes[rows, columns] = best
    return found


def _fit(part: Floats, power: Floats, levels: Levels) -> tuple[Floats, Floats, Floats]:
    """Scale [columns], zero [columns] and codes [rows, columns] of one block."""
    if not power.any():
        power = np.ones_like(power)
    low, high = np.minimum(part.min(axis=0), 0.0), np.maximum(part.max(axis=0), 0.0)
    best: tuple[Floats, Floats, Floats] | None = None
    least = np.zeros(0, np.float32)
    for share in _SHARES[levels.bits]:
        found = _rounded(part, *_grid(low, high, share, levels), levels)
        best, least = _better(part, power, found, best, least)
    assert best is not None
    for _ in range(_ROUNDS):
        scale, zero, codes = best
        if levels.middle is None:
            # The zero point that suits these codes, then the scale that suits both.
            shift = power @ (codes - part / scale) / power.sum()
            zero = np.clip(np.rint(shift), 0.0, float(levels.highest)).astype(np.float32)
        steps = codes - zero
        square = power @ (steps * steps)
        better = power @ (steps * part) / np.maximum(square, _TINY)
        scale = np.where((better > _TINY) & (square > 0), better, scale).astype(np.float32)
        best, least = _better(part, power, _rounded(part, scale, zero, levels), best, least)
    return best


def _grid(low: Floats, high: Floats, share: float, levels: Levels) -> tuple[Floats, Floats]:
    if levels.middle is not None:
        scale = np.maximum(-low, high) * np.float32(2 * share / (levels.highest - levels.lowest))
        zero = np.full(scale.shape, levels.middle, np.float32)
    else:
        scale = (high - low) * np.float32(share / (levels.highest - levels.lowest))
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale > 0, levels.lowest - np.rint(share * low / scale), levels.lowest)
        zero = np.clip(zero, levels.lowest, levels.highest).astype(np.float32)
    scale = np.where(scale > _TINY, scale, np.where(scale > 0, _TINY, 1.0)).astype(np.float32)
    return scale, zero


def _rounded(part: Floats, scale: Floats, zero: Floats, levels: Levels) -> tuple[Floats, Floats, Floats]:
    codes = part / scale
    np.rint(codes, out=codes)
    codes += zero
    return scale, zero, np.clip(codes, levels.lowest, levels.highest, out=codes)


def _better(
    part: Floats,
    power: Floats,
    found: tuple[Floats, Floats, Floats],
    best: tuple[Floats, Floats, Floats] | None,
    least: Floats,
) -> tuple[tuple[Floats, Floats, Floats], Floats]:
    """The better of two grids for each column, and its error, [columns]."""
    scale, zero, codes = found
    error = (codes - zero) * scale
    error -= part
    loss = np.asarray(power @ np.square(error, out=error), np.float32)
    if best is None:
        return found, loss
    wins = loss < least
    if not wins.any():
        return best, least
    return (
        np.where(wins, scale, best[0]),
        np.where(wins, zero, best[1]),
        np.where(wins, codes, best[2]),
    ), np.where(wins, loss, least)
