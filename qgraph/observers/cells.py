"""Counts of values in cells of equal width, a power of two as small as a fixed number of occupied cells allows.

Which width that is depends on the set of values alone: more values never occupy fewer cells, and halving the number of
cells maps each whole cell into a whole one. So counts can be refined while there is room and merged exactly, in any
order, and few values are known as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.base import Observer

__all__ = ["CellObserver"]

_CELLS = 1 << 16
_CHUNK = 1 << 18
_DENSE = 1 << 20
_SMALLEST = -149
"""Every float32 is a multiple of 2 to this power."""
_DEPTH = 40
"""Cells need not be finer than this power of one half of the largest magnitude."""

Keys = NDArray[np.int64]


class CellObserver(Observer):
    """Base of the observers that want counts on a grid which is known only when all has been seen."""

    def __init__(self) -> None:
        self._power = _SMALLEST
        self._keys: Keys = np.zeros(0, np.int64)
        self._counts: Keys = np.zeros(0, np.int64)
        self._low = np.inf
        self._high = -np.inf
        self._strange = 0

    def update(self, array: NDArray[np.floating]) -> None:
        """Count all values of `array`."""
        if array.size == 0:
            return
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            piece = flat[start : start + _CHUNK]
            low, high = float(piece.min()) + 0.0, float(piece.max()) + 0.0
            if not (np.isfinite(low) and np.isfinite(high)):
                finite = piece[np.isfinite(piece)]
                self._strange += piece.size - finite.size
                if finite.size == 0:
                    continue
                piece, low, high = finite, float(finite.min()) + 0.0, float(finite.max()) + 0.0
            self._reach(low, high)
            keys = np.floor(np.multiply(piece, 2.0**-self._power, dtype=np.float64)).astype(np.int64)
            first = int(keys.min())
            if int(keys.max()) - first < _DENSE:
                dense = np.bincount(keys - first)
                places = np.flatnonzero(dense)
                self._add(places + first, dense[places].astype(np.int64, copy=False))
            else:
                self._add(*np.unique(keys, return_counts=True))

    def merge(self, other: Observer) -> None:
        """Add the other's counts."""
        other = self.same_kind(other)
        self._strange += other._strange
        if other._keys.size:
            self._reach(other._low, other._high)
            self._coarsen(other._power)
            self._add(*_gathered(other._keys >> (self._power - other._power), other._counts))

    def _reach(self, low: float, high: float) -> None:
        """Take in the extremes."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        reach = max(-self._low, self._high)
        if reach > 0:
            # Zeros lie in the cell at zero of any size, and ask for none.
            self._coarsen(int(np.frexp(reach)[1]) - _DEPTH)

    def _coarsen(self, power: int) -> None:
        """Cells of at least this power of two."""
        if power > self._power:
            self._keys, self._counts = _gathered(self._keys >> (power - self._power), self._counts)
            self._power = power

    def _add(self, keys: Keys, counts: Keys) -> None:
        """Add the counts of ascending cells, then join cells until there are few enough."""
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")  # two ascending runs: merged in linear time
        self._keys, self._counts = _gathered(keys[order], counts[order])
        while self._keys.size > _CELLS:
            self._coarsen(self._power + 1)

    @property
    def count(self) -> int:
        """Values seen."""
        return int(self._counts.sum()) + self._strange

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return self._strange == 0

    @property
    def extremes(self) -> tuple[np.float32, np.float32]:
        """Smallest and largest finite value seen."""
        return np.float32(self._low), np.float32(self._high)

    def cells(self) -> tuple[NDArray[np.float32], NDArray[np.float32], Keys]:
        """Occupied cells in ascending order: the smallest and the largest float32 that each can hold, and its count."""
        low, high = np.ldexp(self._keys, self._power), np.ldexp(self._keys + 1, self._power)
        first, last = low.astype(np.float32), high.astype(np.float32)
        first = np.where(first < low, np.nextafter(first, np.float32(np.inf)), first)
        last = np.where(last >= high, np.nextafter(last, np.float32(-np.inf)), last)
        return np.clip(first, *self.extremes), np.clip(last, *self.extremes), self._counts

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays `cell`, `count` (the occupied cells), `range` (float64 [2]) and `grid` (int64 [2]: power, strange)."""
        return {
            "cell": self._keys.copy(),
            "count": self._counts.copy(),
            "range": np.array([self._low, self._high]),
            "grid": np.array([self._power, self._strange]),
        }

    @classmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """Restore."""
        new = cls()
        new._keys, new._counts = state["cell"].astype(np.int64), state["count"].astype(np.int64)
        new._low, new._high = (float(v) for v in state["range"].tolist())
        new._power, new._strange = (int(v) for v in state["grid"].tolist())
        return new


def _gathered(keys: Keys, counts: Keys) -> tuple[Keys, Keys]:
    """Counts of equal neighbours added up."""
    if keys.size == 0:
        return keys, counts
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)
