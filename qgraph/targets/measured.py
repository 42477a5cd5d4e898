"""A target with the costs of a measured profile: the kernels and formats of another, the times of a real machine."""

from __future__ import annotations

import copy

from qgraph.errors import OptionError
from qgraph.targets.base import Target
from qgraph.targets.cpu import Cpu
from qgraph.targets.cpu_costs import Costs

__all__ = ["measured"]


def measured(base: Target, costs: Costs, note: str, name: str | None = None) -> Cpu:
    """The target `base` with other costs.

    Args:
        base: whose kernels, formats and schemes it has.
        costs: what they take.
        note: what reports say about them.
        name: what it is called; None for the name of `base`.

    Raises:
        OptionError: `base` does not look its times up in costs.
    """
    if not isinstance(base, Cpu):
        raise OptionError(f"Target {base.name!r} has no costs that a profile could replace; take a CPU target.")
    made = copy.copy(base)
    made.costs = costs
    made.notes = (note,)
    if name is not None:
        made.name = name
        made.description = f"{base.description}; measured on {costs.measured}"
    return made
