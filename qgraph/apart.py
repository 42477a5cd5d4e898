"""What one half of the data says of a layer's input, tested on the other half.

A range or a factor that is fitted to data fits that data: each channel of a few samples has its largest value in one of
them, and a new sample goes beyond it somewhere. Where choices are judged on rows whose half had no say in them, they
hold for data that is still to come (cross-validation; Stone, "Cross-Validatory Choice and Assessment of Statistical
Predictions", 1974).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__all__ = ["APART", "LEAST", "SHARE", "WIDEST", "Apart"]

APART = "qgraph.apart"
"""Key in `Node.meta` of a product that was surveyed on enough data: an `Apart`."""
SHARE = 0.5
"""Of the batches, how many are the other half."""
LEAST = 64
"""Distinct rows of the other half below which nothing is tested on them."""
WIDEST = 2.0
"""The widest range that is tried, in terms of the values seen: more than doubling them costs a bit."""

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Apart:
    """Two halves of what a product reads.

    Attributes:
        low: smallest value of each channel in the first half, [channels].
        high: largest.
        under: smallest of each channel in the other half, [channels].
        over: largest.
        rows: a sample of the other half, each row as likely as any, [n, channels].
        share: of the other half's rows that these are, above 0, at most 1.
    """

    low: Floats
    high: Floats
    under: Floats
    over: Floats
    rows: Floats
    share: float

    def scaled(self, factor: NDArray[np.floating]) -> Self:
        """The same with each channel divided by its positive factor, [channels]."""
        return self._each(lambda part: np.asarray(part / factor, np.float32))

    def moved(self, by: NDArray[np.floating]) -> Self:
        """The same with a number added to each channel, [channels]."""
        return self._each(lambda part: np.asarray(part + by, np.float32))

    def without(self, channels: NDArray[np.intp]) -> Self:
        """The same where these channels, [k], are zero."""

        def silent(part: Floats) -> Floats:
            found = part.copy()
            found[..., channels] = 0
            return found

        return self._each(silent)

    def _each(self, change: Callable[[Floats], Floats]) -> Self:
        low, high, under, over, rows = map(change, (self.low, self.high, self.under, self.over, self.rows))
        return type(self)(low, high, under, over, rows, self.share)
