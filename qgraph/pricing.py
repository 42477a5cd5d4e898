"""Prices of noise: those that leave one assignment, and those between two at which something else is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

from qgraph.errors import NothingQuantizedError
from qgraph.sensitivity import total

__all__ = ["Tariff", "between", "highest", "only", "without"]

_HALVINGS = 10
_LEAST, _MOST = 1e-4, 1e6
"""Where to look, in units of the price at which all that is saved is worth all the noise."""
_NEAR = 1.05
_AWAY = 1.02


class Tariff:
    """What a price of noise leads to.

    Args:
        best: the best assignment at prices of (node, scheme); raises NothingQuantizedError where there is none.
        noises: noise of (node, scheme), as well as it is known.
        saved: seconds that an assignment saves.
    """

    def __init__(
        self,
        best: Callable[[dict[tuple[str, str], float]], dict[str, str]],
        noises: Callable[[], dict[tuple[str, str], float]],
        saved: Callable[[Mapping[str, str]], float],
    ):
        self._best, self._noises, self._saved = best, noises, saved

    def prices(self, price: float) -> dict[tuple[str, str], float]:
        """Of all (node, scheme), in seconds."""
        return {key: price * noise for key, noise in self._noises().items()} if price else {}

    def noise_at(self, price: float) -> float:
        """By estimate, of the best assignment at a price."""
        return total(self._noises(), self._at(price))

    def saved_at(self, price: float) -> float:
        """Seconds, by estimate, that the best assignment at a price saves."""
        return self._saved(self._at(price))

    def _at(self, price: float) -> dict[str, str]:
        try:
            return self._best(self.prices(price))
        except NothingQuantizedError:
            return {}


def only(assignment: Mapping[str, str], known: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Prices of all `known` (node, scheme) at which `assignment` is all that can be."""
    return {(node, scheme): -1.0 if assignment.get(node) == scheme else math.inf for node, scheme in known}


def without(known: Iterable[tuple[str, str]], schemes: Collection[str]) -> dict[tuple[str, str], float] | None:
    """Prices of all `known` (node, scheme) at which these schemes are out; None for no prices."""
    return {key: math.inf for key in known if key[1] in schemes} or None


def highest(least: float, unit: float, saved_at: Callable[[float], float]) -> float | None:
    """The highest price found whose best assignment saves `least` seconds; None where the lowest one saves less.

    Args:
        least: seconds.
        unit: the price at which all that is saved is worth all the noise.
        saved_at: what the best assignment at a price saves, which falls as the price rises.
    """
    lower, upper = unit * _LEAST, unit * _MOST
    if saved_at(lower) < least:
        return None
    for _ in range(_HALVINGS):
        middle = math.sqrt(lower * upper)
        if saved_at(middle) >= least:
            lower = middle
        else:
            upper = middle
    return lower


def between(aim: float, fails: float, holds: float, unit: float, noise_at: Callable[[float], float]) -> float | None:
    """A price between `fails` and `holds` whose best assignment has about the noise `aim`; None when none is.

    Args:
        aim: the noise wanted; infinite to halve the way.
        fails: the highest price known to lose too much; 0 for none.
        holds: the lowest price known to be within the budget; infinite for none.
        unit: the price at which all that is saved is worth all the noise.
        noise_at: noise of the best assignment at a price, which falls as the price rises.
    """
    low = max(fails, unit * _LEAST)
    high = holds if not math.isinf(holds) else unit * _MOST
    if high / low < _NEAR:
        return None
    if math.isinf(aim):
        return math.sqrt(low * high)
    lower, upper = low, high
    for _ in range(_HALVINGS):
        middle = math.sqrt(lower * upper)
        if noise_at(middle) > aim:
            lower = middle
        else:
            upper = middle
    # Kept away from the ends, which are known.
    return min(max(upper, low * _AWAY), high / _AWAY)
