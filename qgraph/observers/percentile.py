"""The range that leaves out a fixed share of the values."""

from __future__ import annotations

import numpy as np

from qgraph.observers.base import Range
from qgraph.observers.counts import Bins, CountingObserver
from qgraph.spec import QuantSpec

__all__ = ["Percentile"]


class Percentile(CountingObserver):
    """The range holds `percent` of all values, two-sided: half of the rest lies beyond each end."""

    percent = 99.999

    def solve(self, bins: Bins, spec: QuantSpec) -> Range:
        """Quantiles, interpolated inside their bin."""
        ends = np.concatenate([[bins.low[0]], bins.high])
        share = np.concatenate([[0.0], np.cumsum(bins.count)]) / bins.count.sum()
        tail = (1.0 - self.percent / 100.0) / 2.0
        low, high = np.interp([tail, 1.0 - tail], share, ends)
        return Range(float(low), float(high))
