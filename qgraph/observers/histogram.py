"""The range of the smallest mean squared error, searched on a histogram.

The error of a range is what its codes round away plus what its ends clip (Banner, Nahshan and Soudry, "Post training
4-bit quantization of convolutional networks for rapid-deployment", 2019, section 3.1). A first search assumes
step^2 / 12 for the rounding, which makes the two ends separable, and looks at all pairs of ends at once; a second one
around its result integrates the true error, rounded zero point and exact zeros included.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.observers.base import Range
from qgraph.observers.counts import Bins, CountingObserver
from qgraph.qparams import QParams, from_range
from qgraph.spec import QuantSpec

__all__ = ["Histogram", "mean_squared_error"]

_CANDIDATES = 160
_DEPTH = 4096
_ROUNDS = ((5, 0.94, 1.06), (5, 0.985, 1.015))


class Histogram(CountingObserver):
    """The range with the least mean squared quantization error."""

    def solve(self, bins: Bins, spec: QuantSpec) -> Range:
        """Search; the plain [min, max] is always among the candidates."""
        full = Range(min(float(bins.low[0]), 0.0), max(float(bins.high[-1]), 0.0))
        if full.low == full.high:
            return full
        best = _coarse(bins, full, spec)
        bins = _merge_near_zero(bins, (best.high - best.low) / spec.format.steps)
        options = [full, best]
        for size, start, stop in _ROUNDS:
            factors = np.linspace(start, stop, size)
            lows = [max(best.low * f, full.low) for f in factors] if best.low < 0 else [0.0]
            highs = [min(best.high * f, full.high) for f in factors] if best.high > 0 else [0.0]
            if spec.symmetric:
                reach = max(-best.low, best.high)
                pairs = [Range(max(-reach * f, full.low), min(reach * f, full.high)) for f in factors]
            else:
                pairs = [Range(low, high) for low in lows for high in highs]
            options = [best, full, *pairs]
            errors = [mean_squared_error(bins, from_range(low, high, spec)) for low, high in options]
            best = options[int(np.argmin(errors))]
        return best


def _coarse(bins: Bins, full: Range, spec: QuantSpec) -> Range:
    """The best pair of ends, with rounding taken as step^2 / 12 of all values that are not zero."""
    width, mass = bins.high - bins.low, float(bins.counts[bins.high != bins.low].sum())
    middle = (bins.low + bins.high) / 2
    moments = bins.counts * np.stack([np.ones_like(middle), middle, middle**2 + width**2 / 12])

    def clipped(ends: NDArray[np.float64], above: bool) -> NDArray[np.float64]:
        """Squared error of the values beyond each end; running sums from the far side, so that no tail is lost."""
        start = np.zeros((3, 1))
        if above:
            sums = np.concatenate([np.cumsum(moments[:, ::-1], axis=1)[:, ::-1], start], axis=1)
            count, first, second = sums[:, np.searchsorted(bins.low, ends, side="left")]
        else:
            sums = np.concatenate([start, np.cumsum(moments, axis=1)], axis=1)
            count, first, second = sums[:, np.searchsorted(bins.high, ends, side="right")]
        return np.asarray(np.maximum(second - 2 * ends * first + ends**2 * count, 0.0))

    lows = _candidates(bins.low[bins.low < full.low / _DEPTH], full.low)
    highs = _candidates(bins.high[bins.high > full.high / _DEPTH], full.high)
    cost_low, cost_high = clipped(lows, above=False), clipped(highs, above=True)
    if spec.symmetric:
        reach = np.union1d(-lows, highs)
        cost = clipped(-reach, above=False) + clipped(reach, above=True)
        total = cost + mass * (2 * reach / spec.format.steps) ** 2 / 12
        best = float(reach[int(np.argmin(total))])
        return Range(max(-best, full.low), min(best, full.high))
    step = (highs[None, :] - lows[:, None]) / spec.format.steps
    total = cost_low[:, None] + cost_high[None, :] + mass * step**2 / 12
    row, column = np.unravel_index(int(np.argmin(total)), total.shape)
    return Range(float(lows[row]), float(highs[column]))


def _candidates(ends: NDArray[np.float64], extreme: float) -> NDArray[np.float64]:
    """Places for an end: some of the bins' own, and a geometric series up to the extreme one.

    The best end may lie anywhere between a dense body and a single far outlier, where no bin is.
    """
    if extreme == 0.0:
        return np.zeros(1)
    own = ends[np.unique(np.linspace(0, ends.size - 1, _CANDIDATES // 3).astype(np.intp))] if ends.size else ends
    return np.union1d(own, np.geomspace(extreme / _DEPTH, extreme, _CANDIDATES))


def _merge_near_zero(bins: Bins, step: float) -> Bins:
    """One bin each side of zero for all that certainly rounds to zero: fewer bins, the same error.

    For uniform mass on [0, h] the mean square is h^2 / 3, so a bin with the same second moment stands for them.
    """
    limit = step * 0.25
    keep = (bins.low < -limit) | (bins.high > limit)
    inner = ~keep
    if not inner.any():
        return bins
    count = float(bins.counts[inner].sum())
    moment = float(
        (bins.counts[inner] * (bins.low[inner] ** 2 + bins.low[inner] * bins.high[inner] + bins.high[inner] ** 2)).sum()
    )
    h = np.sqrt(moment / count)
    return Bins(np.append(bins.low[keep], 0.0), np.append(bins.high[keep], h), np.append(bins.counts[keep], count))


def mean_squared_error(bins: Bins, qparams: QParams) -> float:
    """Mean of (x - fake_quantize(x))^2 over the distribution, integrated inside every bin (per-tensor parameters)."""
    scale, zero = float(qparams.scale), float(qparams.zero_point)
    lowest, highest = qparams.format.lowest - zero, qparams.format.highest - zero
    a, b = bins.low / scale, bins.high / scale
    width = b - a
    point = width < 1e-6
    middle = (a + b) / 2
    error = np.square(middle - np.clip(np.rint(middle), lowest, highest))
    integral = _antiderivative(b, lowest, highest) - _antiderivative(a, lowest, highest)
    error = np.where(point, error, integral / np.where(point, 1.0, width))
    return float((error * bins.counts).sum() / bins.counts.sum()) * scale**2


def _antiderivative(u: NDArray[np.float64], lowest: float, highest: float) -> NDArray[np.float64]:
    """Integral from 0 to u of (t - clip(round(t)))^2: 1/12 for each whole step, cubes for the rest."""
    code = np.clip(np.rint(u), lowest, highest)
    rest = u - code
    return np.asarray(code / 12 + rest * rest * rest / 3)  # a power would take ten times as long
