"""Smallest and largest value of each channel in each of a few runs: what a range found at run time will be made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.observers.sample import Sample

__all__ = ["RunRanges"]

_RUNS = 28


class RunRanges:
    """Of at most 28 runs, picked by a hash of these very numbers, so that no order of the data changes them.

    How the data is divided into runs does: they should be as large as those that are to come.
    """

    def __init__(self) -> None:
        self._runs = Sample(count=_RUNS * 8 // 7)  # An eighth are extreme ones, which are not asked for.

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in one run's values, [..., channels]; runs that are not finite are left out."""
        if array.size == 0 or array.ndim == 0:
            return
        rows = array.reshape(-1, array.shape[-1])
        self._runs.update(np.concatenate([rows.min(axis=0), rows.max(axis=0)])[None])

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        self._runs.merge(other._runs)

    @property
    def ranges(self) -> NDArray[np.float32] | None:
        """[runs, low and high, channels]; None when nothing was seen."""
        found = self._runs.fair
        return None if found is None else found.reshape(len(found), 2, -1)
