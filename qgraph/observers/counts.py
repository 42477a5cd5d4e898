"""Counts of values by the upper half of their float32 pattern: the statistic under the histogram observers.

The bins are those of bfloat16 truncation: sign, exponent and 7 bits of mantissa, so a bin is never wider than 1/128 of
its values. They are fixed before any data is seen, hence merging is the addition of two vectors of integers, exact and
commutative, no range ever has to grow, and one value of -3.4e38 costs the others nothing.
"""

from __future__ import annotations

import abc
import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.base import Observer, Range
from qgraph.spec import QuantSpec

__all__ = ["Bins", "CountingObserver"]

_BINS = 1 << 16
_CHUNK = 1 << 18
_EXPONENT = 0x7F80


class Bins(NamedTuple):
    """The occupied bins in ascending order; the values of a bin are taken as uniform between its ends.

    Attributes:
        low: lower ends, float64 [bins].
        high: upper ends, float64 [bins]; equal to `low` for the bin of zero.
        counts: number of values, float64 [bins].
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    counts: NDArray[np.float64]


@functools.cache
def _edges() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Ends of every bin, and the rank of each bin by value."""
    patterns = np.arange(_BINS, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        near = (patterns << 16).view(np.float32).astype(np.float64)
        far = ((patterns << 16) | 0xFFFF).view(np.float32).astype(np.float64)
    low, high = np.minimum(near, far), np.maximum(near, far)
    # Subnormals share the bins of +0 and -0; they are zero for every purpose here.
    for zero in (0, 0x8000):
        low[zero] = high[zero] = 0.0
    half = _BINS // 2
    return low, high, np.concatenate([np.arange(half) + half, np.arange(half)[::-1]]).astype(np.intp)


class CountingObserver(Observer):
    """Base of the observers that solve for a range on `Bins`."""

    def __init__(self) -> None:
        # Only occupied bins are kept: a few thousand at most for any real tensor.
        self._index: NDArray[np.intp] = np.zeros(0, np.intp)
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._low = np.inf
        self._high = -np.inf

    def update(self, array: NDArray[np.floating]) -> None:
        """Count all values of `array`."""
        if array.size == 0:
            return
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        # In pieces that stay in cache, and so that the index array stays small.
        for start in range(0, flat.size, _CHUNK):
            piece = flat[start : start + _CHUNK]
            # + 0.0 makes -0.0 into 0.0: which of the two comes out must not depend on the order
            self._low = min(self._low, float(piece.min()) + 0.0)
            self._high = max(self._high, float(piece.max()) + 0.0)
            self._add(np.bincount(piece.view(np.uint32) >> 16, minlength=_BINS).astype(np.int64, copy=False))

    def merge(self, other: Observer) -> None:
        """Add the other's counts."""
        other = self.same_kind(other)
        dense = np.zeros(_BINS, np.int64)
        dense[other._index] = other._counts
        self._add(dense)
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def _add(self, dense: NDArray[np.int64]) -> None:
        """Add counts of all bins; `dense` is used up."""
        dense[self._index] += self._counts
        self._index = np.flatnonzero(dense)
        self._counts = dense[self._index]

    @property
    def count(self) -> int:
        """Values seen."""
        return int(self._counts.sum())

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return not bool(((self._index & 0x7FFF) >= _EXPONENT).any())

    def bins(self) -> Bins:
        """The occupied bins, their ends trimmed to the smallest and largest value seen."""
        low, high, rank = _edges()
        by_value = np.argsort(rank[self._index])
        order = self._index[by_value]
        counts = self._counts[by_value].astype(np.float64)
        return Bins(np.clip(low[order], self._low, self._high), np.clip(high[order], self._low, self._high), counts)

    def range(self, spec: QuantSpec) -> Range:
        """The range that `solve` finds on the counts."""
        if not self.count:
            return Range(0.0, 0.0)
        return self.solve(self.bins(), spec)

    @abc.abstractmethod
    def solve(self, bins: Bins, spec: QuantSpec) -> Range:
        """The range advised for the distribution `bins`."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays `index`, `count` (the occupied bins) and `range` (float64 [2])."""
        extremes = np.array([self._low, self._high])
        return {"index": self._index.astype(np.int32), "count": self._counts.copy(), "range": extremes}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """Restore."""
        new = cls()
        new._index = state["index"].astype(np.intp)
        new._counts = state["count"].astype(np.int64)
        new._low, new._high = (float(v) for v in state["range"].tolist())
        return new
