"""What a layer reads in a model and in its quantized twin: moments of both together, the same bits in any order.

Floats do not add up the same in every order, so they are counted in steps of a grid: 16 bits for each channel, of a
power of two that the largest magnitude over all the data settles, which no order changes. Sums of products of whole
numbers are exact (`exact_products`). No value moves by more than 2^-15 of the largest one, and that one alone is a
share 1 / R of its channel's power over R rows: so even where a single outlier is all there is, the mean error of a
channel is below sqrt(R) / 2^15 of its mean magnitude. Elsewhere it is far smaller, and small beside any damping.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.exact_products import ExactProducts
from qgraph.observers.second_moment import Grid

__all__ = ["TwinMoment", "TwinReach"]

_BITS = 16
_ROWS = 1024
"""Rows that wait until they are multiplied: each product of matrices is also an addition of one as large as the sum."""

Floats = NDArray[np.float32]


class TwinReach:
    """The largest magnitude of each channel of the twin's values, and of what the model's differ by from them."""

    def __init__(self) -> None:
        self.twin: Floats | None = None
        self.lost: Floats | None = None

    def update(self, own: NDArray[np.floating], other: NDArray[np.floating]) -> None:
        """Take in the model's values and the twin's, [..., channels]; what is not finite is left out row by row."""
        rows, lost = _rows(own, other)
        if len(rows):
            self._take(np.abs(rows).max(axis=0), None if lost is None else np.abs(lost).max(axis=0))

    def _take(self, twin: Floats, lost: Floats | None) -> None:
        self.twin = twin if self.twin is None else np.maximum(self.twin, twin)
        if lost is not None:
            self.lost = lost if self.lost is None else np.maximum(self.lost, lost)

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        if other.twin is not None:
            self._take(other.twin, other.lost)


class TwinMoment:
    """Means over all rows of `xq xq^T`, and of `xq (xf - xq)^T` where the two differ at all.

    Args:
        reach: of all the data that is to come; what goes further is clipped.
        differ: whether the second is wanted.
    """

    def __init__(self, reach: TwinReach, differ: bool):
        assert reach.twin is not None, "something was seen"
        self._grid = Grid.covering(reach.twin, _BITS)
        width = len(reach.twin)
        lost = reach.lost if reach.lost is not None else np.zeros(width, np.float32)
        self._lost_grid = Grid.covering(lost, _BITS) if differ else None
        self._products = ExactProducts(self._grid.highest**2)
        self._drifts = ExactProducts(self._grid.highest**2)
        self._waiting = np.empty((2 if differ else 1, _ROWS, width))
        self._count = 0

    def update(self, own: NDArray[np.floating], other: NDArray[np.floating]) -> None:
        """Take in the model's values and the twin's, [..., channels]; what is not finite is left out row by row."""
        rows, lost = _rows(own, other)
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + _ROWS - self._count)
            place = slice(self._count, self._count + stop - start)
            self._waiting[0, place] = self._grid.steps(rows[start:stop], -1)
            if self._lost_grid is not None:
                self._waiting[1, place] = 0 if lost is None else self._lost_grid.steps(lost[start:stop], -1)
            self._count += stop - start
            start = stop
            if self._count == _ROWS:
                self._multiply()

    def _multiply(self) -> None:
        """Add what waits."""
        rows = self._waiting[:, None, : self._count]
        self._count = 0
        if rows.shape[2]:
            self._products.add(rows[0])
            if self._lost_grid is not None:
                self._drifts.add(rows[0], rows[1])

    def merge(self, other: Self) -> None:
        """Take in all that `other`, of the same reach, has seen."""
        self._multiply()
        other._multiply()
        self._products.merge(other._products)
        self._drifts.merge(other._drifts)

    @property
    def rows(self) -> int:
        """How many were seen."""
        return self._products.rows + self._count

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """(mean of xq xq^T, mean of xq (xf - xq)^T or None), [channels, channels] each; needs at least one row."""
        self._multiply()
        products, drifts = self._products.total, self._drifts.total
        assert products is not None
        step = self._grid.step.astype(np.float64)
        moment = products[0] * (step / self._products.rows)[:, None]
        moment *= step
        if drifts is None or self._lost_grid is None:
            return moment, None
        drift = drifts[0] * (step / self._drifts.rows)[:, None]
        drift *= self._lost_grid.step.astype(np.float64)
        return moment, drift


def _rows(own: NDArray[np.floating], other: NDArray[np.floating]) -> tuple[Floats, Floats | None]:
    """The twin's finite rows, and what the model's differ by from them; None where they are the same array."""
    rows = np.asarray(other, np.float32).reshape(-1, other.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):
        lost = None if own is other else np.asarray(own, np.float32).reshape(rows.shape) - rows
    finite = np.isfinite(rows).all(axis=1)
    if lost is not None:
        finite &= np.isfinite(lost).all(axis=1)
    if finite.all():
        return rows, lost
    return rows[finite], None if lost is None else lost[finite]
