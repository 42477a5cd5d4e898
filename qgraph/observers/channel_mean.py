"""Mean of each channel, exact and independent of the order of the data.

The mean of every sample is a float; floats do not add up the same in every order, integers do. Each mean is split into
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
    """Mean over samples (along axis 0) of each sample's mean over all positions but `axis`.

    Every sample counts alike, so the split into batches makes no difference.
    """

    def __init__(self, axis: int):
        self.axis = axis
        self._sums: NDArray[np.int64] | None = None
        self._weight = 0

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in all samples of `array`, whose size along `axis` stays the same; empty arrays change nothing.

        Positions that are not finite in all channels, in float32, are left out, whatever else is in their batch; so
        are samples without any other.
        """
        if array.size == 0:
            return
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32)
        axis = self.axis % array.ndim
        if axis == 0:
            array, axis = array[None], 1
        others = tuple(i for i in range(1, array.ndim) if i != axis)
        finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        whole = array if finite.all() else array[finite]
        if len(whole):
            self._add(whole.mean(axis=others, dtype=np.float64).astype(np.float32) if others else whole)
        for sample in array[~finite]:
            rows = np.moveaxis(sample, axis - 1, -1).reshape(-1, array.shape[axis])
            rows = rows[np.isfinite(rows).all(axis=1)]
            if len(rows):
                self._add(rows.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32))

    def _add(self, means: NDArray[np.float32]) -> None:
        """Add [samples, channels]."""
        if self._sums is None:
            self._sums = np.zeros((_PIECES, means.shape[1]), np.int64)
        mantissa, exponent = np.frexp(means.astype(np.float64))
        place = exponent.astype(np.int64) - _LOWEST
        piece = np.clip(place // _SPAN, 0, _PIECES - 1)
        digits = np.rint(np.ldexp(mantissa, _MANTISSA)).astype(np.int64) << (place - piece * _SPAN).clip(0, _SPAN)
        for number in np.unique(piece):
            self._sums[number] += np.where(piece == number, digits, 0).sum(axis=0)
        self._weight += means.shape[0]

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
        """Arrays `sums` (int64 [pieces, channels]) and `count` (int64 [2]: axis, samples)."""
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
