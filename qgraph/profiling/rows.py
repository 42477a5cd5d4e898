"""What a row of the table of kernels is: an operator at one size, as a float model and its integer twin.

Each model is one operator or a short chain of it, and knows the work it does in the terms of the CPU's costs; so what
the costs look up is what was timed. Its terms hold besides what a run takes, and the change of layout at its ends.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from qgraph.targets.cpu_costs import Terms

__all__ = ["AROUND", "Row", "Timed", "added"]

AROUND: Mapping[str, float] = {"run": 3000.0, "layout.float": 0.1, "layout.integers": 0.1, "far": 0.06}
"""Terms of a model besides those of the costs -> about how many nanoseconds: a run, an element whose layout changes,
and a multiplication of one row by a float weight that the caches do not hold."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A model to time.

    Attributes:
        name: its own, also of its file.
        build: makes it.
        terms: the work of one run.
    """

    name: str
    build: Callable[[], ir.Model]
    terms: Terms


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel at one size.

    Attributes:
        table: the part of the table that it is in.
        name: operator and size, unique.
        form: the integer form.
        before: in float. Rows may share it.
        after: in integers.
    """

    table: str
    name: str
    form: str
    before: Timed
    after: Timed


def added(parts: Iterable[tuple[float, Terms]], around: Terms | None = None) -> Terms:
    """The sum of terms, each so many times, of one run; `around` counts what else it takes."""
    total: Counter[str] = Counter()
    for times, terms in parts:
        for name, count in terms.items():
            total[name] += times * count  # type: ignore[assignment]
    found = {name: float(count) for name, count in total.items() if count}
    return {"run": 1.0, **found, **{name: float(count) for name, count in (around or {}).items() if count}}
