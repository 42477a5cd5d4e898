"""The range of the smallest mean squared error, searched on a histogram.

The error of a range is what its codes round away plus what its ends clip (Banner, Nahshan and Soudry, "Post training
4-bit quantization of convolutional networks for rapid-deployment", 2019, section 3.1). Codes are multiples of the step
wherever the ends lie, so the rounding depends on the step alone and each end's clipping on that end alone: a first
search looks at all pairs of ends at once. A second one around its result integrates the error of the very parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.observers.base import Range
from qgraph.observers.counts import Bins, CountingObserver
from qgraph.qparams import QParams, from_range
from qgraph.spec import QuantSpec

__all__ = ["Histogram", "mean_squared_error"]

_CANDIDATES = 192
_STEPS = 64
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
    """The best pair of ends: what each clips, and what their step rounds away."""
    width = bins.high - bins.low
    middle = (bins.low + bins.high) / 2
    moments = bins.count * np.stack([np.ones_like(middle), middle, middle**2 + width**2 / 12])

    def clipped(ends: NDArray[np.float64], above: bool) -> NDArray[np.float64]:
        """Squared error of the values beyond each end; running sums from the far side, so that no tail is lost."""
        start = np.zeros((3, 1))
        if above:
            sums = np.concatenate([np.cumsum(moments[:, ::-1], axis=1)[:, ::-1], start], axis=1)
            count, first, second = sums[:, np.searchsorted(bins.low, ends, side="left")]
        else:
            sums = np.concatenate([start, np.cumsum(moments, axis=1)], axis=1)
            count, first, second = sums[:, np.searchsorted(bins.high, ends, side="right")]
        return np.maximum(second - 2 * ends * first + ends**2 * count, 0.0)

    # Candidates are the bins' own ends, evenly thinned by rank among those beyond 1/64 of the full reach: the best
    # end may lie anywhere between a dense body and a single far outlier.
    lows = _thin(bins.low[bins.low < full.low / 4096], full.low)
    highs = _thin(bins.high[bins.high > full.high / 4096], full.high)
    cost_low, cost_high = clipped(lows, above=False), clipped(highs, above=True)
    if spec.symmetric:
        reach = np.union1d(-lows, highs)
        reach = reach[reach > 0]
        cost = clipped(-reach, above=False) + clipped(reach, above=True)
        total = cost + _rounded(bins, 2 * reach / spec.format.steps)
        best = float(reach[int(np.argmin(total))])
        return Range(max(-best, full.low), min(best, full.high))
    step = (highs[None, :] - lows[:, None]) / spec.format.steps
    total = cost_low[:, None] + cost_high[None, :] + _rounded(bins, step)
    row, column = np.unravel_index(int(np.argmin(total)), total.shape)
    return Range(float(lows[row]), float(highs[column]))


def _rounded(bins: Bins, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared error of rounding all values to multiples of each step; in units of step^2 it is interpolated."""
    known = np.geomspace(steps.min(), steps.max(), _STEPS)
    units = [float((_error(bins, step, -np.inf, np.inf) * bins.count).sum()) for step in known]
    return np.asarray(np.interp(np.log(steps), np.log(known), units) * steps**2)


def _thin(ends: NDArray[np.float64], extreme: float) -> NDArray[np.float64]:
    """At most `_CANDIDATES` of the ends, the extreme one included."""
    if extreme == 0.0:
        return np.zeros(1)
    chosen = ends[np.unique(np.linspace(0, ends.size - 1, _CANDIDATES).astype(np.intp))] if ends.size else ends
    return np.union1d(chosen, [extreme])


def _merge_near_zero(bins: Bins, step: float) -> Bins:
    """One bin each side of zero for all that certainly rounds to zero: fewer bins, the same error.

    For uniform mass on [0, h] the mean square is h^2 / 3, so a bin with the same second moment stands for them.
    """
    limit = step * 0.25
    keep = (bins.low < -limit) | (bins.high > limit)
    inner = ~keep
    if not inner.any():
        return bins
    count = float(bins.count[inner].sum())
    moment = float(
        (bins.count[inner] * (bins.low[inner] ** 2 + bins.low[inner] * bins.high[inner] + bins.high[inner] ** 2)).sum()
    )
    h = np.sqrt(moment / count)
    return Bins(np.append(bins.low[keep], 0.0), np.append(bins.high[keep], h), np.append(bins.count[keep], count))


def mean_squared_error(bins: Bins, qparams: QParams) -> float:
    """Mean of (x - fake_quantize(x))^2 over the distribution, integrated inside every bin (per-tensor parameters)."""
    scale, zero = float(qparams.scale), float(qparams.zero_point)
    error = _error(bins, scale, qparams.format.lowest - zero, qparams.format.highest - zero)
    return float((error * bins.count).sum() / bins.count.sum()) * scale**2


def _error(bins: Bins, step: float, lowest: float, highest: float) -> NDArray[np.float64]:
    """Mean squared error of each bin's values as codes from `lowest` to `highest`, in units of step^2."""
    a, b = bins.low / step, bins.high / step
    width = b - a
    point = width < 1e-6
    middle = (a + b) / 2
    error = np.square(middle - np.clip(np.rint(middle), lowest, highest))
    integral = _antiderivative(b, lowest, highest) - _antiderivative(a, lowest, highest)
    return np.where(point, error, integral / np.where(point, 1.0, width))


def _antiderivative(u: NDArray[np.float64], lowest: float, highest: float) -> NDArray[np.float64]:
    """Integral from 0 to u of (t - clip(round(t)))^2: 1/12 for each whole step, cubes for the rest."""
    code = np.clip(np.rint(u), lowest, highest)
    rest = u - code
    return code / 12 + rest * rest * rest / 3  # a power would take ten times as long
