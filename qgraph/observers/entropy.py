"""The range whose codes lose the least information: smallest Kullback-Leibler divergence.

After Migacz, "8-bit Inference with TensorRT" (2017), with three repairs to the form that circulates. (1) Candidates
span the codes that the spec really has, affine and one-sided ranges included, instead of 128 levels of |x|. (2) Exact
zeros, which any range expresses exactly, are left out of both distributions; otherwise they dominate a Relu's output
and pull the range to nothing. (3) The reference keeps the clipped values where they are instead of moving them to the
last bin, and the candidate puts them where the codes will: at the end. So clipping always costs what it loses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.observers.base import Range
from qgraph.observers.counts import Bins, CountingObserver
from qgraph.spec import QuantSpec

__all__ = ["Entropy"]

_RESOLUTION = 4096
_CANDIDATES = 64


class Entropy(CountingObserver):
    """The range with the least KL divergence between the values and their codes."""

    def solve(self, bins: Bins, spec: QuantSpec) -> Range:
        """Search over fractions of [min, max] on both sides, the wider side first."""
        full = Range(min(float(bins.low[0]), 0.0), max(float(bins.high[-1]), 0.0))
        real = bins.low != bins.high
        if full.low == full.high or not real.any():
            return full
        density, edges = _linear(Bins(*(part[real] for part in bins)), full)
        fractions = np.geomspace(1.0, 1 / 64, _CANDIDATES)
        if spec.symmetric:
            reach = max(-full.low, full.high)
            options = [Range(max(-reach * f, full.low), min(reach * f, full.high)) for f in fractions]
        else:
            high = _best([Range(full.low, full.high * f) for f in fractions], density, edges, spec).high
            options = [Range(full.low * f, high) for f in fractions]
            if full.low == 0.0:
                return Range(0.0, high)
        return _best(options, density, edges, spec)


def _linear(bins: Bins, full: Range) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distribution on `_RESOLUTION` bins of equal width, and their edges."""
    edges = np.linspace(full.low, full.high, _RESOLUTION + 1)
    knots = np.empty(2 * bins.low.size)
    knots[0::2], knots[1::2] = bins.low, bins.high
    mass = np.zeros(knots.size)
    mass[1::2] = bins.counts
    cumulative = np.interp(edges, knots, np.cumsum(mass))
    density = np.diff(cumulative)
    return density / density.sum(), edges


def _best(options: list[Range], density: NDArray[np.float64], edges: NDArray[np.float64], spec: QuantSpec) -> Range:
    return options[int(np.argmin([_divergence(option, density, edges, spec) for option in options]))]


def _divergence(option: Range, p: NDArray[np.float64], edges: NDArray[np.float64], spec: QuantSpec) -> float:
    """KL(p || q), where q spreads each code's mass evenly over the bins that had mass and round to that code."""
    centre = (edges[:-1] + edges[1:]) / 2
    width = max(option.high - option.low, np.finfo(np.float64).tiny)
    if spec.symmetric:
        width = 2 * max(-option.low, option.high)
    inside = (centre >= option.low) & (centre <= option.high)
    if not inside.any():
        return float("inf")
    codes = np.rint((centre[inside] - option.low) / (width / spec.format.steps)).astype(np.intp)
    held = p[inside]
    alive = (held > 0).astype(np.float64)
    per_code = np.bincount(codes, held)
    # What lies beyond an end is expressed by the code of that end.
    per_code[codes[0]] += p[centre < option.low].sum()
    per_code[codes[-1]] += p[centre > option.high].sum()
    population = np.bincount(codes, alive)
    q = np.full_like(p, 1e-12)
    q[inside] += np.where(alive > 0, (per_code / np.maximum(population, 1))[codes], 0.0)
    q /= q.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
