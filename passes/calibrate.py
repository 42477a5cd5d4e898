"""Statistics -> QParams on every annotated value; values of one group get the parameters of their merged statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from qgraph.passes.annotate import GROUP

from qgraph import calibration
from qgraph.calibration import OBSERVER
from qgraph.data import Dataset
from qgraph.errors import QuantizationError
from qgraph.observers import Observer
from qgraph.qparams import from_range
from qgraph.spec import QuantSpec
from qgraph.targets import QPARAMS, SPEC, annotated

__all__ = ["Calibrate"]


class Calibrate(ir.passes.InPlacePass):
    """Runs the data through the graph and writes `Value.meta["qgraph.qparams"]`.

    Args:
        data: the calibration data.
        folder: where the model's external tensors lie.
        budget: bytes that one run's observed values may take.
        ranges: file of saved statistics and the model's key, used instead of running the data.
        save: file to write the statistics to, those of `store` included, and the model's key.
        progress: called with ("calibrating", runs done, runs in all).
        store: statistics of earlier calibrations on the same model and data, used and added to.
    """

    def __init__(
        self,
        data: Dataset,
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        ranges: tuple[Path, str] | None = None,
        save: tuple[Path, str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        store: calibration.Store | None = None,
    ):
        super().__init__()
        self.data = data
        self.folder = folder
        self.budget = budget
        self.ranges = ranges
        self.save = save
        self.progress = progress
        self.store = store

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        values = annotated(model.graph)
        if self.ranges is not None:
            calibration.restore(model, *self.ranges)
        else:
            calibration.observe(model, self.data, self.folder, self.budget, self._report, self.store)
        if self.save is not None:
            calibration.save(model, *self.save, self.store)
        groups: dict[str, Observer] = {}
        for value in values:
            # Taken away: a statistic is of no use once it is solved.
            observer: Observer | None = value.meta.pop(OBSERVER, None)
            if observer is None:
                continue
            key = str(value.meta.get(GROUP, value.name))
            if key in groups:
                groups[key].merge(observer)
            else:
                groups[key] = observer
        params: dict[tuple[str, object], object] = {}
        # What shares its parameters with a value of a fixed range has that range.
        fixed = {str(v.meta.get(GROUP, v.name)): v.meta[SPEC] for v in values if v.meta[SPEC].range is not None}
        for value in values:
            key = str(value.meta.get(GROUP, value.name))
            spec: QuantSpec = fixed.get(key, value.meta[SPEC])
            if key not in groups:
                raise QuantizationError(f"Value {value.name!r} was annotated but never observed.")
            if (key, spec) not in params:
                reach = spec.range
                params[key, spec] = groups[key].qparams(spec) if reach is None else from_range(reach[0], reach[1], spec)
            value.meta[QPARAMS] = params[key, spec]
        return ir.passes.PassResult(model, False)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("calibrating", done, total)
