"""What a layer's inputs are together: the sum of products of every two of them, exact and in any order.

Inputs are counted in whole steps of a grid, as the layer's own quantizer does; sums of products of whole numbers are
exact (`exact_products`), so no order or split of the data changes a bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph import graph
from qgraph.observers.exact_products import ExactProducts
from qgraph.observers.sample import Patches
from qgraph.qparams import QParams

__all__ = ["Grid", "SecondMoment", "patches_of", "stride_of"]

_PIECE = 1 << 20
_POSITIONS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The whole numbers of steps that inputs are rounded to; zero is one of them.

    Attributes:
        step: size of a step, float32, () or [channels].
        lowest: smallest number of steps; what lies below is taken as this.
        highest: largest.
    """

    step: NDArray[np.float32]
    lowest: int
    highest: int

    @classmethod
    def of(cls, params: QParams) -> Self:
        """The numbers that per-tensor codes express: what a layer with a quantized input multiplies."""
        zero = int(params.zero_point)
        return cls(params.scale, int(params.format.lowest) - zero, int(params.format.highest) - zero)

    @classmethod
    def covering(cls, largest: NDArray[np.floating], bits: int = 12) -> Self:
        """Steps of a power of two for each channel, whose magnitudes reach up to `largest`, [channels]."""
        reach = 2 ** (bits - 1) - 1
        _, exponent = np.frexp(np.maximum(largest.astype(np.float64), np.finfo(np.float32).tiny) / reach)
        return cls(np.ldexp(1.0, np.maximum(exponent, -126)).astype(np.float32), -reach, reach)

    def steps(self, array: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
        """Whole numbers of steps of each value, channels along `axis`."""
        step = self.step
        if step.ndim:
            step = step.reshape([-1 if i == axis % array.ndim else 1 for i in range(array.ndim)])
        with np.errstate(over="ignore"):
            counted: NDArray[np.float32] = np.divide(array, step, dtype=np.float32)  # what overflows is clipped
        np.rint(counted, out=counted)
        return np.clip(counted, self.lowest, self.highest, out=counted)


class SecondMoment:
    """Sums of `x` and of `x x^T` over all rows [..., channels] or patches [channels / groups, kernel...].

    Of an image with more than some 256 positions, patches are taken at regular distances.

    Args:
        grid: what inputs are rounded to.
        patches: where a convolution looks; None for rows.
        groups: of the convolution; inputs of different groups never meet, and their products are left out.
    """

    def __init__(self, grid: Grid, patches: Patches | None = None, groups: int = 1):
        self.grid = grid
        self.patches = patches
        self.groups = groups
        # Counted from the middle of the grid, numbers are half as large and four times as many rows add up exactly.
        self._middle = -(-(grid.lowest + grid.highest) // 2)
        self._products = ExactProducts(max(grid.highest - self._middle, self._middle - grid.lowest) ** 2)
        self._sums: NDArray[np.float64] | None = None

    @property
    def rows(self) -> int:
        """How many were seen."""
        return self._products.rows

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in `array`: [..., channels] for rows, [samples, channels, spatial...] for patches.

        Rows, or images, that are not finite are left out, as are empty arrays.
        """
        if array.size == 0 or array.ndim == 0:
            return
        if self.patches is None:
            array = array.reshape(-1, array.shape[-1])
        # One by one: whatever else is in their batch, they are in the sum or not.
        finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        array = array if finite.all() else array[finite]
        counted = self.grid.steps(array, -1 if self.patches is None else 1)
        if self.patches is None:
            rows = counted[None]
            step = max(1, _PIECE // rows.shape[-1])
            for start in range(0, rows.shape[1], step):
                self._add(rows[:, start : start + step])
            return
        for image in counted:
            for rows in self._patch_rows(image):
                self._add(rows)

    def _patch_rows(self, image: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """All patches of an image [channels, spatial...], as [groups, positions, inputs], some at a time."""
        assert self.patches is not None
        windows = self.patches.windows(image[None])[0]
        rank = image.ndim - 1
        positions, taps = windows.shape[1 : 1 + rank], windows.shape[1 + rank :]
        every = stride_of(positions)
        windows = windows[(slice(None), *(slice(min(every // 2, size - 1), None, every) for size in positions))]
        positions = windows.shape[1 : 1 + rank]
        inner = image.shape[0] // self.groups
        width = inner * int(np.prod(taps))
        lines = max(1, _PIECE // max(1, self.groups * width * int(np.prod(positions[1:]))))
        for start in range(0, positions[0], lines):
            part = windows[:, start : start + lines]
            split = part.reshape(self.groups, inner, *part.shape[1:])
            # groups, channels, positions..., taps... -> groups, positions..., channels, taps...
            moved = np.moveaxis(split, 1, 1 + rank)
            yield np.ascontiguousarray(moved, np.float32).reshape(self.groups, -1, width)

    def _add(self, rows: NDArray[np.float32]) -> None:
        """Add [groups, rows, inputs]."""
        shifted = rows - np.float32(self._middle)
        # A whole number of a few bits: these sums stay exact for longer than those of products.
        sums = shifted.sum(axis=1, dtype=np.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._products.add(shifted)

    def merge(self, other: Self) -> None:
        """Take in all that `other`, on the same grid, has seen."""
        self._products.merge(other._products)
        if other._sums is not None:
            self._sums = other._sums.copy() if self._sums is None else self._sums + other._sums

    def mean(self) -> NDArray[np.float64] | None:
        """E[x] in the inputs' own unit, [groups, inputs]; None when nothing was seen."""
        if self._sums is None:
            return None
        mean = self._sums / self.rows + self._middle
        step = self.grid.step.astype(np.float64)
        return mean * (np.repeat(step, mean.size // step.size).reshape(mean.shape) if step.ndim else step)

    def moment(self) -> NDArray[np.float64] | None:
        """E[x x^T] in the inputs' own unit, [groups, inputs, inputs]; None when nothing was seen."""
        products = self._products.total
        if products is None or self._sums is None:
            return None
        mean = self._sums / self.rows
        found = products / self.rows
        if self._middle:
            found += (self._middle * mean)[:, :, None]
            found += (self._middle * mean)[:, None, :] + float(self._middle) ** 2
        step = self.grid.step.astype(np.float64)
        if step.ndim:
            step = np.repeat(step, mean.size // step.size).reshape(mean.shape)
            found *= step[:, :, None]
            found *= step[:, None, :]
        else:
            found *= step * step
        return found


def stride_of(positions: tuple[int, ...]) -> int:
    """Of how many patches along each dimension one is taken: neighbouring ones are alike, so not all of many."""
    return max(1, int((np.prod(positions) / _POSITIONS) ** (1 / len(positions))))


def patches_of(node: ir.Node) -> Patches | None:
    """Where a Conv looks; None for a product."""
    if node.op_type != "Conv":
        return None
    kernel = (graph.run_shape(node.inputs[1]) or ())[2:]
    rank = len(kernel)
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    auto = node.attributes.get("auto_pad")
    return Patches(
        tuple(kernel),
        tuple(node.attributes.get_ints("strides", [1] * rank)),
        tuple(node.attributes.get_ints("dilations", [1] * rank)),
        tuple(zip(pads[:rank], pads[rank:], strict=True)),
        auto.as_string() if auto is not None else "NOTSET",
    )
