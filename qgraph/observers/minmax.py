"""Smallest and largest value ever seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.base import Observer, Range
from qgraph.spec import QuantSpec

__all__ = ["MinMax"]


class MinMax(Observer):
    """The range is [min, max]: nothing is clipped, every outlier costs resolution."""

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self._count = 0
        self._finite = True

    def update(self, array: NDArray[np.floating]) -> None:
        """Widen to hold all of `array`."""
        if array.size == 0:
            return
        # + 0.0 makes -0.0 into 0.0: which of the two comes out must not depend on the order
        low, high = float(np.min(array)) + 0.0, float(np.max(array)) + 0.0
        self._finite &= bool(np.isfinite(low) and np.isfinite(high))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._count += array.size

    def merge(self, other: Observer) -> None:
        """Widen to the other's range."""
        other = self.same_kind(other)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._count += other._count
        self._finite &= other._finite

    @property
    def count(self) -> int:
        """Values seen."""
        return self._count

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return self._finite

    def range(self, spec: QuantSpec) -> Range:
        """All that was seen."""
        return Range(self.low, self.high) if self._count else Range(0.0, 0.0)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays `range` (float64 [2]) and `count` (int64 [2]: values, whether finite)."""
        return {"range": np.array([self.low, self.high]), "count": np.array([self._count, self._finite])}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """Restore."""
        new = cls()
        new.low, new.high = (float(v) for v in state["range"].tolist())
        new._count, finite = (int(v) for v in state["count"].tolist())
        new._finite = bool(finite)
        return new
