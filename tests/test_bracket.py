"""Bracket: prices lead within the budget, and back to where it is met closely."""

import pytest

from qgraph.bracket import Bracket


def searched(loss, steps=12):
    """The strains of what was tried, where price p leaves 1 / (1 + p) of the noise and noise n a loss of `loss(n)`."""
    strains = [loss(1.0)]
    bracket = Bracket(1.0, strains[0], 1.0, "first")
    for step in range(steps):
        price = bracket.price(lambda price: 1 / (1 + price))
        if price is None:
            break
        noise = 1 / (1 + price)
        strains.append(loss(noise))
        bracket.tried(price, noise, strains[-1], str(step))
    return strains


@pytest.mark.parametrize("first", [1.1, 3.0, 30.0])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
def test_the_budget_is_held_soon_and_then_met(first, power):
    """Also where the loss falls much less than the noise, as it does where errors add up to other ones."""
    strains = searched(lambda noise: first * noise**power)
    within = [strain <= 1.0 for strain in strains]
    assert any(within[:8]), strains
    assert max(strain for strain in strains if strain <= 1.0) > 0.8


def test_what_is_within_may_lose_more():
    strains = searched(lambda noise: 0.2 + noise)
    assert strains[0] > 1.0 and any(0.9 < strain <= 1.0 for strain in strains[1:])
