"""The range that PyTorch's HistogramObserver finds: least L2 norm of the quantization error on 2048 equal bins.

The bins lie between the smallest and the largest value of all the data, as if PyTorch had seen it in one batch; of
several batches, PyTorch's own histogram, stretched whenever the range grows, depends on their order. The search is that
of `torch.ao.quantization.HistogramObserver` (PyTorch 2), which has it from Caffe2's norm minimization: from both ends,
step by step in quantiles, the end moves that passes more bins, for as long as the norm does not grow. It is greedy, so
where it stops depends on the arithmetic; that is repeated here in single precision, operation by operation.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from qgraph.observers.base import Range
from qgraph.observers.cells import CellObserver
from qgraph.spec import QuantSpec

__all__ = ["TorchHistogram"]

_BINS = 2048
_CODES = 256
"""Of the search, whether or not the range of the codes is reduced."""
_STEP = 1e-5
_WIDEST = float(np.finfo(np.float32).max)

Floats = NDArray[np.float32]


class TorchHistogram(CellObserver):
    """The range with the least L2 norm of the error by PyTorch's search."""

    def range(self, spec: QuantSpec) -> Range:
        """Whole bins of the 2048, ends as PyTorch computes them."""
        low, high = self.extremes
        if low > high:
            return Range(0.0, 0.0)
        with np.errstate(over="ignore"):
            width = (high - low) / np.float32(_BINS)
        if width == 0 or not np.isfinite(width):
            return Range(float(low), float(high))
        with np.errstate(all="ignore"):  # infinite norms, and what is not a number, PyTorch passes over, too
            first, last = _search(self.histogram(), float(high) - float(low))
        return Range(float(low + width * np.float32(first)), float(low + width * np.float32(last + 1)))

    def histogram(self) -> Floats:
        """Values in each bin between the extremes; a cell across an edge is split as if its values lay evenly."""
        low, high = self.extremes
        first, last, counts = self.cells()
        start, end = _bin_of(first, low, high), _bin_of(last, low, high)
        found = np.bincount(start, counts, _BINS)
        across = start != end
        edges = float(low) + end[across] * ((float(high) - float(low)) / _BINS)
        begin = first[across].astype(np.float64)
        share = 1 - np.clip((edges - begin) / (last[across] - begin), 0.0, 1.0)
        moved = np.rint(counts[across] * share)
        found -= np.bincount(start[across], moved, _BINS)
        found += np.bincount(end[across], moved, _BINS)
        return found.astype(np.float32)


def _bin_of(values: Floats, low: np.float32, high: np.float32) -> NDArray[np.intp]:
    """As torch.histc finds it; in double precision where single would overflow."""
    kind = np.dtype(np.float32 if float(high) - float(low) < _WIDEST / _BINS else np.float64)
    ends = np.array([low, high], kind)
    places: NDArray[np.floating] = (values.astype(kind) - ends[0]) * _BINS / (ends[1] - ends[0])
    return np.minimum(places.astype(np.intp), _BINS - 1)


def _search(histogram: Floats, span: float) -> tuple[int, int]:
    """First and last bin of the range."""
    total = float(histogram.sum(dtype=np.float64))
    running: list[float] = np.cumsum(histogram, dtype=np.float64).astype(np.float32).tolist()
    alpha, beta, first, last = 0.0, 1.0, 0, _BINS - 1
    least = np.inf
    while alpha < beta:
        lower, upper = alpha + _STEP, beta - _STEP
        left = bisect_left(running, float(np.float32(lower * total)), first, last)
        right = max(bisect_right(running, float(np.float32(upper * total)), first, last + 1) - 1, first)
        following = (first, last)
        if left - first > last - right:
            following, alpha = (left, last), lower
        else:
            following, beta = (first, right), upper
        if following == (first, last):
            continue
        norm = _norm(histogram, span / _BINS, *following)
        if norm > least:
            break
        least = norm
        first, last = following
    return first, last


def _norm(histogram: Floats, width: float, first: int, last: int) -> float:
    """Squared error if bins `first` to `last` are quantized evenly, and the values of a bin lie evenly in it."""
    code = width * (last - first + 1) / _CODES
    if code == 0.0:
        return 0.0
    single, step, half = np.float32(width), np.float32(code), np.float32(code / 2)
    begin: Floats = (np.arange(_BINS) - first).astype(np.float32) * single
    end: Floats = begin + single
    code_of_begin: Floats = np.clip(np.floor_divide(begin, step), 0, _CODES - 1)
    code_of_end: Floats = np.clip(np.floor_divide(end, step), 0, _CODES - 1)
    density: Floats = histogram / single
    after: Floats = np.subtract(begin, (code_of_begin + np.float32(0.5)) * step, dtype=np.float32)
    before: Floats = np.subtract(end, code_of_end * step + half, dtype=np.float32)
    norm = _integral(after, np.full(_BINS, half), density)
    norm += (code_of_end - code_of_begin - 1) * _integral(-half, half, density)
    norm += _integral(-half, before, density)
    return float(norm.sum(dtype=np.float64))


def _integral(begin: Floats | np.float32, end: Floats | np.float32, density: Floats) -> Floats:
    """Of the density times x^2 from `begin` to `end`."""
    return density * ((end * end * end - begin * begin * begin) / np.float32(3))
