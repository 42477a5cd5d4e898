"""The price of noise that is looked for: between the highest that was outside the budget, and the lowest within."""

from __future__ import annotations

import math
from collections.abc import Callable

from qgraph import pricing

__all__ = ["Bracket"]

_MARGIN = 0.9
_LITTLE = 0.01
_CLOSE = 1.1


class Bracket:
    """What is known of prices, trial by trial.

    Args:
        noise: of a first assignment, which costs nothing.
        strain: its loss as a share of the budget.
        unit: the price at which all that is saved is worth all the noise.
        key: of that assignment.
    """

    def __init__(self, noise: float, strain: float, unit: float, key: str):
        self._fails, self._holds, self._unit = 0.0, math.inf, unit
        # What is within leaves something for assignments that were left out of the first one.
        self._aim = noise / max(strain, _LITTLE if strain <= 1.0 else 1.0) * _MARGIN
        self._tried = {key}
        self._failed = 0  # One after the other.

    def price(self, noise_at: Callable[[float], float]) -> float | None:
        """The next to try, whose best assignment has about the noise that the budget allows; None when none is."""
        if not math.isinf(self._holds) and self._fails > 0 and self._holds / self._fails < _CLOSE:
            return None
        return pricing.between(self._aim, self._fails, self._holds, self._unit, noise_at)

    def nothing(self, price: float) -> None:
        """At `price` nothing pays."""
        self._holds, self._aim = price, math.inf

    def tried(self, price: float, noise: float, strain: float, key: str) -> None:
        """At `price` an assignment has that noise, and was measured to take that share of the budget."""
        if strain <= 1.0:
            self._holds, self._failed = price, 0
            # Look for one that loses a little more.
            self._aim = noise / max(strain, 0.05) * _MARGIN
        else:
            self._fails, self._failed = price, self._failed + 1
            # Where the loss does not fall as the noise does, ever larger steps get within the budget in time.
            self._aim = noise / min(max(strain, 1.05), 1e6) * _MARGIN**2 ** (self._failed - 1)
        if key in self._tried:
            self._aim = math.inf
        self._tried.add(key)
