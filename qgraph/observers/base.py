"""What an observer is: a statistic of a tensor's values that is an exact commutative monoid.

`merge` of two observers gives, bit for bit, the observer that saw both streams, in any order and any split into
batches. So neither the order of the calibration data nor the number of workers changes a byte of the output.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qgraph.qparams import QParams, from_range
from qgraph.spec import QuantSpec

__all__ = ["Observer", "Range"]


class Range(NamedTuple):
    """Smallest and largest value that the codes should reach."""

    low: float
    high: float


class Observer(abc.ABC):
    """A statistic with `update`, `merge` and `qparams`; it never keeps the data."""

    per_sample: bool = False
    """Whether `update` must see one sample at a time, because the statistic is one of samples, not of values."""

    @abc.abstractmethod
    def update(self, array: NDArray[np.floating]) -> None:
        """Take in all values of `array` (float, any shape; empty arrays change nothing)."""

    @abc.abstractmethod
    def merge(self, other: Observer) -> None:
        """Take in all that `other`, an observer of the same kind, has seen."""

    def same_kind(self, other: Observer) -> Self:
        """`other`, known to be of this very class.

        Raises:
            TypeError: it is not; statistics of different kinds have no sum.
        """
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        return other

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """Number of values (or samples) seen."""

    @property
    @abc.abstractmethod
    def finite(self) -> bool:
        """Whether every value seen was finite."""

    @abc.abstractmethod
    def range(self, spec: QuantSpec) -> Range:
        """The range that this statistic advises for `spec`. (0, 0) when nothing was seen."""

    @abc.abstractmethod
    def state(self) -> dict[str, NDArray[np.generic]]:
        """The statistic as arrays, to be saved."""

    @classmethod
    @abc.abstractmethod
    def from_state(cls, state: dict[str, NDArray[np.generic]]) -> Self:
        """The observer whose `state` this is."""

    def qparams(self, spec: QuantSpec) -> QParams:
        """Scale and zero point for `spec` (per-tensor)."""
        low, high = self.range(spec)
        return from_range(low, high, spec)
