"""Holds candidates to the budget: runs them on data that calibration did not see, and measures what was lost."""

from __future__ import annotations

import dataclasses
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
    ):
        self.data = data
        self.limits = limits
        self.held_back = held_back
        self._reference = Reference(original, data, options, folder)
        self._originals: dict[str, float] = {}
        self.rewritten: Callable[[], AbstractContextManager[Runnable]] | None = None
        self._unsteady: dict[str, str] | None = None  # Not looked for yet.
        if not self._reference.numbers:
            raise DataError("All outputs of the original are empty on the data: nothing can be compared with them.")

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
            return 1.0 + 1.0 / math.sqrt(self.samples)
        counts = self._reference.samples
        return 1.0 + max(
            min(1.0, output.spread) / math.sqrt(max(1, counts.get(name, 1)))
            for name, output in fidelity.outputs.items()
        )

    def judge(self, candidate: Runnable) -> Verdict:
        """Run `candidate` on all of the data.

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
