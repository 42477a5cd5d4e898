"""Mean of each channel, exact and independent of the order of the data.

The mean of every batch is a float; floats do not add up the same in every order, integers do. Each mean is split into
a 24-bit mantissa and an exponent, and mantissas are added as int64 in one of 20 accumulators by exponent (Kulisch's
long accumulator, "Computer Arithmetic and Validity", 2008, in pieces).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__all__ = ["ChannelMean"]

_MANTISSA = 24
_SPAN = 16
_LOWEST = -160
_PIECES = 20


class ChannelMean:
    """Mean over all positions but `axis`, of arrays whose size along `axis` stays the same.

    Every array counts alike: it is one sample (or one batch, where the caller gives batches).
    """

    def __init__(self, axis: int):
        self.axis = axis
        self._sums: NDArray[np.int64] | None = None
        self._weight = 0

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in all of `array`; empty arrays change nothing."""
        if array.size == 0:
            return
        axis = self.axis % array.ndim
        others = tuple(i for i in range(array.ndim) if i != axis)
        mean = array.mean(axis=others, dtype=np.float64).astype(np.float32)
        if not np.isfinite(mean).all():
            return
        self._add(mean)

    def _add(self, mean: NDArray[np.float32]) -> None:
        if self._sums is None:
            self._sums = np.zeros((_PIECES, mean.size), np.int64)
        mantissa, exponent = np.frexp(mean.astype(np.float64))
        place = exponent.astype(np.int64) - _LOWEST
        piece = np.clip(place // _SPAN, 0, _PIECES - 1)
        digits = np.rint(np.ldexp(mantissa, _MANTISSA)).astype(np.int64) << (place - piece * _SPAN).clip(0, _SPAN)
        np.add.at(self._sums, (piece, np.arange(mean.size)), digits)
        self._weight += 1

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        if other._sums is None:
            return
        self._sums = other._sums.copy() if self._sums is None else self._sums + other._sums
        self._weight += other._weight

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """Mean of each channel, [channels]; None when nothing was seen."""
        if self._sums is None:
            return None
        units = np.ldexp(1.0, _LOWEST - _MANTISSA + _SPAN * np.arange(_PIECES))
        return np.asarray((self._sums * units[:, None]).sum(axis=0) / self._weight)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays `sums` (int64 [pieces, channels]) and `count` (int64 [2]: axis, batches)."""
        sums = np.zeros((_PIECES, 0), np.int64) if self._sums is None else self._sums
        return {"sums": sums, "count": np.array([self.axis, self._weight])}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """Restore."""
        axis, weight = (int(v) for v in state["count"].tolist())
        new = cls(axis)
        sums = state["sums"].astype(np.int64)
        new._sums, new._weight = (sums if sums.size else None), weight
        return new
