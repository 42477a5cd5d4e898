"""Mean over samples of each sample's smallest and largest value.

The exponential moving average of the frameworks (m += c * (m_sample - m)) depends on the order of the data, which an
exact commutative monoid must not. Its order-free form weighs every sample alike: the mean of the per-sample extremes.
The sums are exact integers (float32 counts in units of 2**-149), so that no order of additions can differ.
"""

from __future__ import annotations

import fractions

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.base import Observer, Range
from qgraph.spec import QuantSpec

__all__ = ["MovingAverage"]

_UNIT = 149
_WORDS = 8


def _exact(value: float) -> int:
    ratio = fractions.Fraction(value) * 2**_UNIT
    return int(ratio)


def _pack(value: int) -> NDArray[np.generic]:
    return np.frombuffer(value.to_bytes(8 * _WORDS, "little", signed=True), dtype="<i8")


def _unpack(words: NDArray[np.generic]) -> int:
    return int.from_bytes(words.astype("<i8").tobytes(), "little", signed=True)


class MovingAverage(Observer):
    """The range is the average sample's range: rare extremes are clipped."""

    per_sample = True

    def __init__(self) -> None:
        self._low = 0
        self._high = 0
        self._samples = 0
        self._finite = True

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in one sample's values."""
        if array.size == 0:
            return
        low, high = float(np.min(array)), float(np.max(array))
        self._samples += 1
        if np.isfinite(low) and np.isfinite(high):
            self._low += _exact(low)
            self._high += _exact(high)
        else:
            self._finite = False

    def merge(self, other: Observer) -> None:
        """Add the other's sums."""
        other = self.same_kind(other)
        self._low += other._low
        self._high += other._high
        self._samples += other._samples
        self._finite &= other._finite

    @property
    def count(self) -> int:
        """Samples seen."""
        return self._samples

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return self._finite

    def range(self, spec: QuantSpec) -> Range:
        """Mean of the samples' extremes."""
        if not self._samples:
            return Range(0.0, 0.0)
        unit = self._samples * 2**_UNIT
        return Range(float(fractions.Fraction(self._low, unit)), float(fractions.Fraction(self._high, unit)))

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays `low`, `high` (exact sums as 8 little-endian int64 words) and `count` (int64 [2])."""
        counts = np.array([self._samples, self._finite])
        return {"low": _pack(self._low), "high": _pack(self._high), "count": counts}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """Restore."""
        new = cls()
        new._low, new._high = _unpack(state["low"]), _unpack(state["high"])
        new._samples, finite = (int(v) for v in state["count"].tolist())
        new._finite = bool(finite)
        return new
