"""Smallest and largest value of each channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__all__ = ["ChannelRange"]


class ChannelRange:
    """Running extremes along `axis`; `low` and `high` are [channels], None when nothing was seen.

    `count` says how many values of each channel were.
    """

    def __init__(self, axis: int):
        self.axis = axis
        self.count = 0
        self.low: NDArray[np.float32] | None = None
        self.high: NDArray[np.float32] | None = None

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in all values of `array`, whose size along the axis stays the same."""
        if array.size == 0:
            return
        axis = self.axis % array.ndim
        others = tuple(i for i in range(array.ndim) if i != axis)
        self._take(array.min(axis=others).astype(np.float32), array.max(axis=others).astype(np.float32))
        self.count += array.size // array.shape[axis]

    def _take(self, low: NDArray[np.float32], high: NDArray[np.float32]) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        if other.low is not None and other.high is not None:
            self._take(other.low, other.high)
        self.count += other.count
