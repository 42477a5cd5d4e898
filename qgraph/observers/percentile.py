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
        # Both ends of every bin, so that no value is sought in the gaps between bins.
        ends = np.stack([bins.low, bins.high], axis=1).reshape(-1)
        total = np.cumsum(bins.counts)
        share = np.stack([total - bins.counts, total], axis=1).reshape(-1) / total[-1]
        tail = (1.0 - self.percent / 100.0) / 2.0
        low, high = np.interp([tail, 1.0 - tail], share, ends)
        return Range(float(low), float(high))
