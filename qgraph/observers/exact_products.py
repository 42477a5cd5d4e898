"""Sums of products of whole numbers over many rows, `A^T B`, exact in any order and however the rows are split.

BLAS adds up in an order of its own, which floats feel and whole numbers do not: every partial sum below 2^24 (float32)
or 2^53 (float64) is exact. Before a sum could grow past that, it is carried over into integers of 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.errors import QuantizationError

__all__ = ["ExactProducts"]

_SINGLE, _DOUBLE, _WHOLE = 1 << 24, 1 << 53, 1 << 63
_LEAST = 64
"""Rows that float32 must be able to add up to be worth it: it is twice as fast, and its sums need adding, too."""


class ExactProducts:
    """The sum over rows of `a_i b_j` for every i and j, an exact commutative monoid.

    Args:
        largest: what the magnitude of one product is at most, itself at most 2^53.
    """

    def __init__(self, largest: int):
        self.largest = max(1, largest)
        self.rows = 0
        single = self.largest * _LEAST <= _SINGLE
        self._kind: type[np.float32] | type[np.float64] = np.float32 if single else np.float64
        self._at_once = (_SINGLE if single else _DOUBLE) // self.largest
        self._low: NDArray[np.float64] | None = None
        self._held = 0  # rows in `_low`
        self._high: NDArray[np.int64] | None = None

    def add(self, first: NDArray[np.floating], second: NDArray[np.floating] | None = None) -> None:
        """Take in rows of whole numbers.

        Args:
            first: [groups, rows, n].
            second: [groups, rows, m]; `first` itself unless given, of which BLAS sees the symmetry.

        Raises:
            QuantizationError: more rows than integers of 64 bits can count.
        """
        left = first.astype(self._kind, copy=False)
        right = left if second is None else second.astype(self._kind, copy=False)
        if self._low is None:
            self._low = np.zeros((left.shape[0], left.shape[2], right.shape[2]))
        low = self._low
        for start in range(0, left.shape[1], self._at_once):
            rows = slice(start, start + self._at_once)
            a: Any = left[:, rows]
            b: Any = right[:, rows]
            self._make_room(a.shape[1])
            if len(a) == 1:
                low[0] += a[0].T @ b[0]
            else:
                low += a.transpose(0, 2, 1) @ b
            self._held += a.shape[1]
            self.rows += a.shape[1]

    def merge(self, other: Self) -> None:
        """Take in all that `other`, of the same shape, has seen."""
        if other._low is None:
            return
        self._make_room(other._held)
        self._low = other._low.copy() if self._low is None else self._low + other._low
        if other._high is not None:
            self._high = other._high.copy() if self._high is None else self._high + other._high
        self._held += other._held
        self.rows += other.rows

    def _make_room(self, rows: int) -> None:
        """Carry over, unless `rows` more stay exact."""
        if (self.rows + rows) * self.largest >= _WHOLE:
            raise QuantizationError("There are more rows of data than sums of 64 bits can hold: give fewer samples.")
        if self._low is None or (self._held + rows) * self.largest <= _DOUBLE:
            return
        whole = self._low.astype(np.int64)
        self._high = whole if self._high is None else self._high + whole
        self._low.fill(0.0)
        self._held = 0

    @property
    def total(self) -> NDArray[np.float64] | None:
        """The sums, each rounded once, [groups, n, m]; None when nothing was seen. Not to be written to."""
        if self._high is None or self._low is None:
            return self._low
        return (self._high + self._low.astype(np.int64)).astype(np.float64)
