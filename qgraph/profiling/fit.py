"""Coefficients of costs from measured times: linear least squares of relative errors, none of them negative.

Each measured time is a sum of terms, and each coefficient is sought as a multiple of its prior. What the times say
little about is drawn to the factor by which the times that it has part in differ from the prior's. Times far off the
fit count less (Huber, "Robust Estimation of a Location Parameter", 1964).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "fit"]

_PULL = 0.05
_OUTLYING = 0.15
_REWEIGHTED = 5
_SWEEPS = 500
_LEAST = 0.02
_NS = 1e-9


class Fit(NamedTuple):
    """What a fit gives.

    Attributes:
        coefficients: nanoseconds of each term of the prior.
        errors: for each time, fitted over measured, less one.
    """

    coefficients: dict[str, float]
    errors: list[float]


def fit(times: Sequence[tuple[Mapping[str, float], float]], prior: Mapping[str, float]) -> Fit:
    """Fit.

    Args:
        times: (terms of a run, its seconds).
        prior: nanoseconds of each term, all above 0.
    """
    names = list(prior)
    column = {name: number for number, name in enumerate(names)}
    shares = np.zeros((len(times), len(names)))
    for row, (terms, seconds) in enumerate(times):
        for name, count in terms.items():
            shares[row, column[name]] = count * prior[name] * _NS / seconds
    centre = _centres(shares)
    factors = centre
    weights = np.ones(len(times))
    for _ in range(_REWEIGHTED):
        factors = _solve(shares, weights, centre, factors)
        off = np.abs(shares @ factors - 1)
        weights = np.minimum(1, _OUTLYING / np.maximum(off, 1e-9))
    coefficients = {name: float(prior[name] * factor) for name, factor in zip(names, factors, strict=True)}
    return Fit(coefficients, [float(one) for one in shares @ factors - 1])


def _centres(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factor that each coefficient is drawn to: the median over its rows of measured over prior, by its share."""
    total = shares.sum(axis=1)
    factor = 1 / total
    order = np.argsort(factor)
    part = (shares / total[:, None])[order]
    everywhere = float(np.median(factor))
    above = np.cumsum(part, axis=0) >= part.sum(axis=0) / 2
    return np.where(part.sum(axis=0) > 0, factor[order][above.argmax(axis=0)], everywhere)


def _solve(
    shares: NDArray[np.float64], weights: NDArray[np.float64], centre: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimum of sum w (s f - 1)^2 + pull (f / centre - 1)^2 over f >= least, by coordinate descent (it is convex)."""
    pull = _PULL / centre**2
    gram = (shares * weights[:, None]).T @ shares + np.diag(pull)
    aim = shares.T @ weights + pull * centre
    found = start.copy()
    for _ in range(_SWEEPS):
        before = found.copy()
        for one in range(len(found)):
            rest = aim[one] - gram[one] @ found + gram[one, one] * found[one]
            found[one] = max(_LEAST * centre[one], rest / gram[one, one])
        if np.max(np.abs(found - before)) < 1e-6 * np.max(found):
            break
    return found
