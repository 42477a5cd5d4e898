"""Weights of three values -s, 0, s, or of two: found where they are, made by rounding where they are wanted.

They fit the two bits of `com.microsoft.MatMulNBits`, whose codes 1, 2 and 3 stand for -1, 0 and 1 times the scale of a
block (`qgraph.blocks`). A weight that is ternary by block, by column or as a whole is ternary by block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import blocks
from qgraph.blocks import Blocks
from qgraph.formats import BINARY, TERNARY, Format
from qgraph.spec import PerBlock, QuantSpec
from qgraph.strips import Strips

__all__ = ["ABSMEAN", "EXACT", "FITTED", "GRID", "Grid", "blocks_of", "detect", "grid_of", "rounded"]

GRID = "qgraph.ternary"
"""Key in `Value.meta` of a weight: the Grid that it lies on, where it does."""
EXACT = "exact"
"""Observer of a weight that is ternary already: the scale is the largest magnitude of a block."""
ABSMEAN = "absmean"
"""Observer: one scale, the mean magnitude of the whole weight. S. Ma et al., "The Era of 1-bit LLMs: All Large Language
Models are in 1.58 Bits" (2024), equations 1 to 3: what a network trained so has learned to live with."""
FITTED = "absmean-fitted"
"""Observer: a scale for each block, found from its mean magnitude on in turns with the codes, so that the squared error
falls (as the scale of F. Li et al., "Ternary Weight Networks", 2016, section 2.2): for weights not trained for it."""

_SIZES = (128, 64, 32)
"""Fastest first."""
_ROUNDING = 1e-5
"""Relative distance from the three values that still is rounding: that of a few float32 operations."""
_CHUNK = 1 << 22
_TURNS = 6
_CODE_OF_ZERO = 2

_Matrix: TypeAlias = "NDArray[np.floating]"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a weight has been found to be.

    Attributes:
        format: ternary or binary.
        size: of the blocks, each of which has one magnitude.
        shared: dimensions along which the blocks have one magnitude: 1 for one a column, 2 for one in all.
    """

    format: Format
    size: int
    shared: int = 0

    def spec(self, axis: int) -> QuantSpec:
        """How the weight, whose columns run along `axis`, is quantized without loss."""
        return QuantSpec(self.format, PerBlock(axis, self.size), symmetric=True, observer=EXACT)


def grid_of(weight: ir.Value | None) -> Grid | None:
    """The grid that a weight was found to lie on, if it was."""
    return None if weight is None else weight.meta.get(GRID)


def rounded(weight: _Matrix | Strips, spec: QuantSpec) -> Blocks:
    """Blocks of a weight as its spec wants them: of two or three values, or the nearest of evenly spaced codes."""
    return blocks_of(weight, spec) if spec.format in (TERNARY, BINARY) else blocks.nearest(weight, spec)


def detect(weight: _Matrix, axis: int) -> Grid | None:
    """The grid on which all of `weight` lies, to within rounding; None for none, mostly after looking at a few numbers.

    Args:
        weight: two dimensions, memory-mapped or not.
        axis: the dimension that is summed over.
    """
    if weight.ndim != 2 or weight.shape[axis] < _SIZES[-1] or not weight.shape[1 - axis]:
        return None
    for size in _SIZES:
        if weight.shape[axis] < size:
            continue
        found = _detect(weight, axis, size)
        if found is not None:
            return found
    return None


def _detect(weight: _Matrix, axis: int, size: int) -> Grid | None:
    zeros = False
    least = np.full(weight.shape[1 - axis], np.inf, np.float32)
    most = np.zeros(weight.shape[1 - axis], np.float32)
    # Few numbers tell of almost every weight that it is not.
    first = weight[:size, :8] if axis == 0 else weight[:8, :size]
    done = 0
    for slab in (first, *_slabs(weight, axis, size)):
        magnitude = np.abs(_blocks(slab, axis, size))
        top = magnitude.max(axis=-1)
        if not np.isfinite(top).all():
            return None
        low = magnitude <= top[..., None] * _ROUNDING
        if not (low | (magnitude >= top[..., None] * (1 - _ROUNDING))).all():
            return None
        # What fills the last block up is zero, and no zero of the weight.
        zeros |= int(low.sum()) - (low.size - slab.size) > 0
        if slab is first:
            continue
        columns = slice(None) if axis == 0 else slice(done, done + len(slab))
        done += len(slab)
        least[columns] = np.minimum(least[columns], np.where(top > 0, top, np.inf).min(axis=1))
        most[columns] = np.maximum(most[columns], top.max(axis=1))
    some = most > 0
    if not some.any():
        return None
    by_column = bool((least[some] == most[some]).all())
    shared = 0 if not by_column else 2 if most[some].min() == most.max() else 1
    return Grid(TERNARY if zeros else BINARY, size, shared)


def _slabs(weight: _Matrix, axis: int, size: int) -> Iterator[_Matrix]:
    """Parts of a weight of whole blocks, in the order of its bytes."""
    other = max(1, weight.shape[1])
    step = max(1, _CHUNK // other)
    if axis == 0:
        step = max(size, step // size * size)
    for start in range(0, len(weight), step):
        yield weight[start : start + step]


def _blocks(part: _Matrix, axis: int, size: int) -> NDArray[np.float32]:
    """[columns, blocks, size] of a part of a weight, the last block filled up with zeros."""
    rows = np.ascontiguousarray(part.T if axis == 0 else part, np.float32)
    short = -rows.shape[1] % size
    if short:
        rows = np.pad(rows, ((0, 0), (0, short)))
    return rows.reshape(len(rows), -1, size)


def blocks_of(weight: _Matrix | Strips, spec: QuantSpec) -> Blocks:
    """Ternary or binary codes of a weight, with scales as the spec's observer says.

    Args:
        weight: two dimensions, of which `spec.granularity.axis` is summed over.
        spec: ternary or binary, per block.
    """
    assert isinstance(spec.granularity, PerBlock)
    axis, size = spec.granularity.axis, spec.granularity.size
    source = weight if isinstance(weight, Strips) else Strips(weight)
    inner, columns = source.shape[axis], source.shape[1 - axis]
    mean = _mean_magnitude(source) if spec.observer == ABSMEAN else None
    step = max(1, _CHUNK // max(1, inner))
    codes: list[NDArray[np.uint8]] = []
    scales: list[NDArray[np.float32]] = []
    for start in range(0, columns, step):
        chunk = slice(start, start + step)
        part = source.window(slice(None), chunk) if axis == 0 else source.window(chunk)
        parts = _blocks(part, axis, size)
        if mean is not None:
            scale = np.full(parts.shape[:2], mean, np.float32)
        elif spec.observer == EXACT:
            scale = np.abs(parts).max(axis=-1)
        else:
            scale = _fitted(parts, inner)
        found = _codes(parts, scale, spec.format)
        found = found.reshape(len(found), -1)[:, :inner]
        made = Blocks.of(found + np.int8(_CODE_OF_ZERO), scale, None, 2, size)
        codes.append(made.codes)
        scales.append(made.scale)
    return Blocks(np.concatenate(codes), _without_gaps(np.concatenate(scales)), None, 2, inner)


def _codes(parts: NDArray[np.float32], scale: NDArray[np.float32], fmt: Format) -> NDArray[np.int8]:
    """Where a scale is zero, so is the block."""
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    return fmt.project(parts * inverse[..., None]).astype(np.int8)


def _mean_magnitude(source: Strips) -> float:
    height, width = source.shape
    step = max(1, _CHUNK // max(1, width))
    starts = range(0, height, step)
    total = sum(float(np.abs(source.window(slice(s, s + step))).sum(dtype=np.float64)) for s in starts)
    return total / max(1, height * width)


def _fitted(parts: NDArray[np.float32], inner: int) -> NDArray[np.float32]:
    """Of each block the scale that leaves least squared error, found in turns with the codes."""
    counts = np.full(parts.shape[1], parts.shape[2], np.float32)
    counts[-1] -= parts.shape[1] * parts.shape[2] - inner
    scale = np.abs(parts).sum(axis=-1) / counts
    for _ in range(_TURNS):
        codes = _codes(parts, scale, TERNARY).astype(np.float32)
        taken = np.square(codes).sum(axis=-1)
        np.divide((parts * codes).sum(axis=-1), taken, out=scale, where=taken > 0)
    return np.asarray(scale, np.float32)


def _without_gaps(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blocks of zeros take the scale of their column, or of the weight: any will do, and equal ones can be packed."""
    column = scale.max(axis=1, keepdims=True)
    most = float(column.max(initial=0.0)) or 1.0
    column = np.where(column > 0, column, np.float32(most))
    return np.where(scale > 0, scale, column).astype(np.float32)
