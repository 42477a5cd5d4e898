"""The factor of each channel that leaves the least error behind the weights, chosen by measurement.

Candidates are s = max(A, t)^a / B^b of each channel's largest magnitude A and its largest share B of a weight's range:
t = 0 with b = 1 - a is SmoothQuant (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
Large Language Models", 2023, equation 4), a = b = 1/2 cross-layer equalization (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", 2019, section 4.1), a = 1 with t > 0 takes back outliers and nothing
else. No scaling at all is a candidate, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from qgraph.readers import Reader

__all__ = ["Balance", "search"]

Scales = NDArray[np.float64]
_POWERS = (0.5, 0.7, 0.85, 1.0)
_GENTLE_POWERS = (0.25, 0.5, 0.75, 1.0)
"""Where only weights are quantized."""
_QUANTILES = (0.0, 0.5, 0.9, 0.99)
_WEIGHT_POWERS = (0.0, 0.5)
_REFINED = ((0.08, 0.0, 0.0), (0.0, 0.04, 0.0), (0.0, 0.0, 0.2))
"""Steps around the best of the grid, in the power, in the quantile and in the power of the weights."""
_FLOOR = (1e-4, 0.05)
"""The least magnitude that is taken for real: of the largest, and of the lower quartile. Quieter ones may wake up."""


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
    """What a search found.

    Attributes:
        scale: factor of each channel, positive float64 [channels].
        before: signal over noise without it, dB, over all readers.
        after: with it.
    """

    scale: Scales
    before: float
    after: float

    @property
    def gain(self) -> float:
        """What it gains, dB."""
        return self.after - self.before


def search(readers: list[Reader], free: NDArray[np.bool_]) -> Balance:
    """The best factors for a group of channels; all ones where nothing is better.

    Args:
        readers: the layers whose error counts, at least one.
        free: channels that may be scaled, [channels].
    """
    magnitude, whole = np.zeros(free.size), np.zeros(free.size)
    share = np.zeros(free.size)
    for reader in readers:
        np.maximum.at(magnitude, reader.index, reader.magnitudes(False))
        np.maximum.at(whole, reader.index, reader.magnitudes(True))
        np.maximum.at(share, reader.index, reader.shares)
    chosen = free & (magnitude > 0)
    scale = np.ones(free.size)
    before = _error(readers, scale)
    if not chosen.any() or before <= 0.0:
        return Balance(scale, _decibels(before), _decibels(before))
    family = _Family(magnitude, share, chosen)
    tried: dict[tuple[float, float, float], float] = {}

    def loss(point: tuple[float, float, float]) -> float:
        if point not in tried:
            tried[point] = _error(readers, family.scale(*point))
        return tried[point]

    powers = _GENTLE_POWERS if all(reader.activation is None for reader in readers) else _POWERS
    best = min(itertools.product(powers, _QUANTILES, _WEIGHT_POWERS[:1]), key=loss)
    best = min(((best[0], best[1], power) for power in _WEIGHT_POWERS), key=loss)
    for step in _REFINED:
        for sign in (1, -1):
            there = tuple(round(p + sign * s, 3) for p, s in zip(best, step, strict=True))
            point = (max(there[0], 0.0), min(max(there[1], 0.0), 1.0), max(there[2], 0.0))
            if loss(point) < tried[best]:
                best = point
                break
    if tried[best] < before:
        # Tested on one half of the data, the factors are those of all of it.
        factors = _Family(whole, share, chosen).scale(*best)
        return Balance(factors, _decibels(before), _decibels(tried[best]))
    return Balance(scale, _decibels(before), _decibels(before))


class _Family:
    """The candidates, at a level that suits the channels that are not scaled."""

    def __init__(self, magnitude: Scales, share: Scales, chosen: NDArray[np.bool_]):
        seen = magnitude[chosen]
        least = max(_FLOOR[0] * float(seen.max()), _FLOOR[1] * float(np.quantile(seen, 0.25)))
        self._magnitude = np.maximum(magnitude, least)
        self._share = np.maximum(share, 1e-3)
        self._chosen = chosen
        rest = magnitude[~chosen]
        self._level = float(rest.max(initial=0.0))

    def scale(self, power: float, quantile: float, weight_power: float) -> Scales:
        """[channels]; 1 for those that are not scaled."""
        floor = np.quantile(self._magnitude[self._chosen], quantile) if quantile else 0.0
        found = np.maximum(self._magnitude, floor) ** power / self._share**weight_power
        if self._level > 0.0:
            # The scaled channels shall reach as far as the others do.
            found *= float((self._magnitude / found)[self._chosen].max()) / self._level
        else:
            found /= math.exp(float(np.log(found[self._chosen]).mean()))
        return np.where(self._chosen, found, 1.0)


def _error(readers: list[Reader], scale: Scales) -> float:
    return sum(reader.error(scale) for reader in readers) / len(readers)


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error > 0.0 else math.inf
