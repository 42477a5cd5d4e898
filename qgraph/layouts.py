"""Arithmetic of layouts: arrays of channel numbers, of size 1 along the axes on which they do not vary."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["aligned", "along", "only", "reshaped", "trimmed"]

Layout = NDArray[np.intp]


def along(channels: Layout, axis: int, rank: int) -> Layout:
    """[channels] laid along one axis of a value of that rank."""
    return channels.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def only(layout: Layout, axis: int) -> Layout | None:
    """[channels] if the layout varies along that axis alone, else None; a layout of one element varies along any."""
    axis %= layout.ndim
    return layout.reshape(-1) if layout.shape[axis] == layout.size else None


def aligned(layout: Layout, rank: int) -> Layout:
    """With leading axes of size 1, as broadcasting aligns it."""
    return layout.reshape((1,) * (rank - layout.ndim) + layout.shape)


def trimmed(layout: Layout, rank: int) -> Layout:
    """Without the leading axes of size 1 that a value of that rank does not have."""
    while layout.ndim > rank and layout.shape[0] == 1:
        layout = layout[0]
    return layout


def reshaped(layout: Layout, before: tuple[int, ...], after: tuple[int, ...]) -> Layout | None:
    """The layout of a value of shape `before` that is reshaped to `after`; None where it holds no element.

    Only the axes that are split or merged along channels are laid out in full, so that images cost nothing.
    """
    if math.prod(before) != math.prod(after) or 0 in before:
        return None
    wide: list[int] = []
    made: list[int] = []
    for old, new in _blocks(before, after):
        varies = any(layout.shape[axis] > 1 for axis in old)
        wide += [before[axis] if varies else 1 for axis in old]
        made += [after[axis] if varies else 1 for axis in new]
    return np.broadcast_to(layout, wide).reshape(made)


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of equal product, the finest ones."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new, p, q = [i], [j], before[i], after[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                old.append(i)
                p, i = p * before[i], i + 1
            else:
                new.append(j)
                q, j = q * after[j], j + 1
        blocks.append((old, new))
    blocks.append((list(range(i, len(before))), list(range(j, len(after)))))
    return blocks
