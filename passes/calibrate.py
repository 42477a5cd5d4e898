"""Statistics -> QParams on every annotated value; values of one group get the parameters of their merged statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qgraph import calibration
from qgraph.calibration import OBSERVER
from qgraph.data import Dataset
from qgraph.errors import QuantizationError
from qgraph.observers import Observer
from qgraph.passes.annotate import GROUP
from qgraph.passes.insert_observers import annotated
from qgraph.targets import QPARAMS, SPEC

__all__ = ["Calibrate"]


class Calibrate(ir.passes.InPlacePass):
    """Runs the data through the graph and writes `Value.meta["qgraph.qparams"]`.

    Args:
        data: the calibration data; not needed when every observer has already seen data (`calibration.restore`).
        folder: where the model's external tensors lie.
        budget: bytes that one run's observed values may take.
        progress: called with (runs done, runs in all).
    """

    def __init__(
        self,
        data: Dataset | None,
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        self.data = data
        self.folder = folder
        self.budget = budget
        self.progress = progress

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        values = annotated(model.graph)
        if self.data is not None:
            calibration.observe(model, self.data, self.folder, self.budget, self.progress)
        groups: dict[str, Observer] = {}
        for value in values:
            observer: Observer | None = value.meta.get(OBSERVER)
            if observer is None:
                continue
            key = str(value.meta.get(GROUP, value.name))
            if key in groups:
                groups[key].merge(observer)
            else:
                # A copy, so that the value's own statistic stays its own.
                groups[key] = type(observer).from_state(observer.state())
        params: dict[tuple[str, object], object] = {}
        for value in values:
            key, spec = str(value.meta.get(GROUP, value.name)), value.meta[SPEC]
            if key not in groups:
                raise QuantizationError(f"Value {value.name!r} was annotated but never observed.")
            if (key, spec) not in params:
                params[key, spec] = groups[key].qparams(spec)
            value.meta[QPARAMS] = params[key, spec]
        return ir.passes.PassResult(model, False)
