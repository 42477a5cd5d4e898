"""Prices of noise: those that leave one assignment, and those between two at which something else is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

__all__ = ["between", "only"]

_HALVINGS = 10
_LEAST, _MOST = 1e-4, 1e6
"""Where to look, in units of the price at which all that is saved is worth all the noise."""
_NEAR = 1.05
_AWAY = 1.02


def only(assignment: Mapping[str, str], known: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Prices of all `known` (node, scheme) at which `assignment` is all that can be."""
    return {(node, scheme): -1.0 if assignment.get(node) == scheme else math.inf for node, scheme in known}


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
