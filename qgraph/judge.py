"""Holds candidates to the budget: runs them on data that calibration did not see, and measures what was lost."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from qgraph.compare import Reference, Runnable
from qgraph.data import Dataset
from qgraph.errors import DataError
from qgraph.metrics import Limit, Outputs
from qgraph.report import Fidelity
from qgraph.session import SessionOptions

__all__ = ["Judge", "Verdict"]

_MARK = "other-"
_MANY = 32
"""Samples held back that say enough by themselves; of others so many are asked, too, where these are fewer."""
_SURE = 0.3
"""Share of the limit that is so little that other samples need not be asked."""
_FLATTERED = 2.0
"""Times the margin on calibration data of what learned its codes there."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one candidate lost.

    Attributes:
        fidelity: the comparison with the original.
        losses: by metric, in the unit of its limit.
        strain: the largest loss as a share of its limit, with the judge's margin; above 1 is outside the budget.
    """

    fidelity: Fidelity
    losses: dict[str, float]
    strain: float

    @property
    def within(self) -> bool:
        """Whether every limit holds."""
        return self.strain <= 1.0


class Judge:
    """Compares with one original on one dataset.

    Args:
        original: the model.
        data: what it is held to; not the calibration data, if that can be had.
        limits: the budget.
        options: session options.
        folder: where the original's outputs wait.
        held_back: whether calibration did not see `data`.
        seen: what calibration saw. Five samples may all be easy ones; so where `data` has few, what comes near a limit
            must hold it here, too. What was calibrated on it flatters a candidate, but not by much; what learned its
            codes on it does, and has to hold it by twice the margin.
        errors: standard errors of the mean that the margin is.

    Attributes:
        rewritten: gives the float graph as it is before anything is quantized, or None. It is asked for where a
            candidate's output has another shape: one that differs there, too, is held against nobody.

    Raises:
        DataError: on this data nothing comes out of the original.
    """

    def __init__(
        self,
        original: Runnable,
        data: Dataset,
        limits: list[Limit],
        options: SessionOptions,
        folder: Path,
        held_back: bool = True,
        seen: Dataset | None = None,
        errors: float = 1.0,
    ):
        self.data = data
        self.limits = limits
        self.held_back = held_back
        self._errors = errors
        more = folder / "seen"
        self._another = functools.partial(Judge, original, limits=limits, options=options, folder=more, held_back=False)
        self._more = seen
        self._second: Judge | None = None
        self._reference = Reference(original, data, options, folder)
        self._originals: dict[str, float] = {}
        self.rewritten: Callable[[], AbstractContextManager[Runnable]] | None = None
        self._unsteady: dict[str, str] | None = None  # Not looked for yet.
        if not self._reference.numbers:
            raise DataError("All outputs of the original are empty on the data: nothing can be compared with them.")
        if self.samples >= _MANY:
            self._more = None

    @property
    def samples(self) -> int:
        """How many the losses are means over: of the output that has the fewest, as the comparison counts them."""
        return max(1, min(self._reference.samples.values(), default=1))

    def margin(self, fidelity: Fidelity | None = None) -> float:
        """By how much losses count more than they measure: a few samples do not tell what others will lose.

        The standard error of the mean over n samples, as a share of it: their spread over sqrt(n), of the output where
        that is most. Without a comparison, the most that it can be.
        """
        if fidelity is None or not fidelity.outputs:
            return 1.0 + self._errors / math.sqrt(self.samples)
        counts = self._reference.samples
        return 1.0 + self._errors * max(
            min(1.0, output.spread) / math.sqrt(max(1, counts.get(name, 1)))
            for name, output in fidelity.outputs.items()
        )

    @property
    def told(self) -> str:
        """How losses count, in words."""
        words = f"losses on {self.samples} samples count up to {self.margin():.2f}-fold"
        return words if self._more is None else f"{words}, and those on calibration data where they are worse"

    def judge(self, candidate: Runnable, learned: bool = False) -> Verdict:
        """Run `candidate` on all of the data, and near a limit on some that calibration saw.

        Args:
            candidate: the model.
            learned: whether its codes were learned on what calibration saw.

        Raises:
            DataError: a metric cannot be measured on this data.
            ExecutionError: the candidate cannot be run.
        """
        first = self._judged(candidate)
        if self._more is None or not _SURE < first.strain <= 1.0:
            return first
        try:
            if self._second is None:
                self._second = self._another(data=_some(self._more))
            self._second.rewritten = self.rewritten
            self._second._errors = _FLATTERED if learned else 1.0
            second = self._second.judge(candidate)
        except DataError:  # No labels there, say.
            self._more = None
            return first
        losses = {name: max(loss, second.losses[name]) for name, loss in first.losses.items()}
        return Verdict(first.fidelity, losses, max(first.strain, second.strain))

    def _judged(self, candidate: Runnable) -> Verdict:
        """On the data alone.

        Raises:
            DataError: a metric cannot be measured on this data.
            ExecutionError: the candidate cannot be run.
        """
        keep = _MARK if any(limit.metric.needs_outputs for limit in self.limits) else ""
        fidelity = self._compared(candidate, keep)
        if any(math.isnan(output.cosine) for output in fidelity.outputs.values()):
            # It overflows where the original does not: no metric says anything about that.
            return Verdict(fidelity, {limit.metric.name: math.inf for limit in self.limits}, math.inf)
        losses: dict[str, float] = {}
        strain = 0.0
        for limit in self.limits:
            value = limit.metric.value(fidelity, self._outputs(keep), self._reference.outputs())
            loss = limit.loss(self._original(limit, fidelity), value)
            losses[limit.metric.name] = loss
            share = 0.0 if loss <= 0 else loss / limit.limit if limit.limit > 0 else math.inf
            strain = max(strain, share * self.margin(fidelity))
        return Verdict(fidelity, losses, strain)

    def _compared(self, candidate: Runnable, keep: str) -> Fidelity:
        found = self._reference.compare(candidate, self.held_back, keep, self._unsteady)
        if found.skipped and self._unsteady is None and self.rewritten is not None:
            with self.rewritten() as graph:
                self._unsteady = self._reference.unsteady(graph)
            if self._unsteady:
                found = self._reference.compare(candidate, self.held_back, keep, self._unsteady)
        return found

    def _outputs(self, mark: str) -> Outputs:
        return self._reference.outputs(mark) if mark else ()

    def _original(self, limit: Limit, fidelity: Fidelity) -> float:
        metric = limit.metric
        if metric.perfect is not None:
            return metric.perfect
        if metric.name not in self._originals:
            self._originals[metric.name] = metric.value(fidelity, *[self._reference.outputs() for _ in range(2)])
        return self._originals[metric.name]


def _some(data: Dataset) -> Dataset:
    """As many as are asked, chosen by their contents."""
    count = data.count()
    part = data.split(_MANY / count)[1] if count > _MANY else None
    return data if part is None else part
