"""One pass over the data: for each layer a sample of what it multiplies, and the range of each input channel.

Later passes choose scales, roundings and schemes by the error behind the weights; with the sample at hand they need no
further run of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import calibration, graph
from qgraph.apart import APART, LEAST, SHARE, Apart
from qgraph.calibration import CHANNELS, RUNS, SAMPLE, STATISTICS
from qgraph.data import Dataset
from qgraph.observers.channel_range import ChannelRange
from qgraph.observers.run_ranges import RunRanges
from qgraph.observers.sample import Patches, Sample
from qgraph.observers.second_moment import patches_of

__all__ = ["Survey"]


class Survey(ir.passes.InPlacePass):
    """Runs the data and writes `Node.meta["qgraph.sample"]` and `["qgraph.channels"]` on layers with constant weights.

    Products get `["qgraph.runs"]`, too (a batch is a run, as large as those to come, it is hoped), and, where there are
    four batches or more, `["qgraph.apart"]`; runs are those of the other half then.

    Args:
        data: the calibration data.
        folder: where the model's external tensors lie.
        budget: bytes that one run's observed values may take.
        progress: called with ("surveying", runs done, runs in all).
    """

    def __init__(
        self,
        data: Dataset,
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        super().__init__()
        self.data = data
        self.folder = folder
        self.budget = budget
        self.progress = progress

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        layers = {node: patches_of(node) for node in model.graph if is_layer(node)}
        for node, patches in layers.items():
            source, axis = node.inputs[0], graph.channel_axis(node)
            assert source is not None
            statistics = source.meta.setdefault(STATISTICS, {})
            statistics.setdefault(patches, Sample(patches))
            statistics.setdefault(axis, ChannelRange(axis))
            if patches is None:
                statistics.setdefault(RUNS, RunRanges())
        halves: dict[ir.Value, Apart] = {}
        if layers:
            self._observe(model, layers, halves)
        # Layers that read one value share its sample.
        items: dict[tuple[ir.Value, object], NDArray[np.float32] | None] = {}
        runs: dict[ir.Value, NDArray[np.float32] | None] = {}
        for node, patches in layers.items():
            source, axis = node.inputs[0], graph.channel_axis(node)
            assert source is not None
            if (source, patches) not in items:
                items[source, patches] = source.meta[STATISTICS][patches].items
            _hand_over(node, items[source, patches], source.meta[STATISTICS][axis])
            if patches is not None:
                continue
            if source not in runs:
                runs[source] = source.meta[STATISTICS][RUNS].ranges
            if (ranges := runs[source]) is not None:
                node.meta[RUNS] = ranges
            if source in halves:
                node.meta[APART] = halves[source]
        for node in layers:
            if node.inputs[0] is not None:
                node.inputs[0].meta.pop(STATISTICS, None)
        return ir.passes.PassResult(model, False)

    def _observe(self, model: ir.Model, layers: dict[ir.Node, Patches | None], halves: dict[ir.Value, Apart]) -> None:
        """All data, half by half where there are two: what products read is kept apart, too, in `halves`."""
        first, second = self.data.split(SHARE)
        calibration.observe(model, first, self.folder, self.budget, self._report)
        if second is None:
            return
        sources = {node.inputs[0]: patches for node, patches in layers.items()}
        before: dict[ir.Value, dict[Any, Any]] = {}
        for source in sources:
            assert source is not None
            before[source] = source.meta[STATISTICS]
            source.meta[STATISTICS] = {key: _anew(old) for key, old in before[source].items()}
        calibration.observe(model, second, self.folder, self.budget, self._report)
        for source, statistics in before.items():
            later = source.meta[STATISTICS]
            if None in statistics and -1 in statistics:
                one, other, rows = statistics[-1], later[-1], later[None].fair
                ends = one.low, one.high, other.low, other.high
                if rows is not None and len(rows) >= LEAST and all(end is not None for end in ends):
                    # Equal rows are one of the sample.
                    halves[source] = Apart(*ends, rows, min(1.0, len(rows) / other.count))
                    statistics[RUNS] = RunRanges()
            for key, statistic in statistics.items():
                statistic.merge(later[key])
            source.meta[STATISTICS] = statistics

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("surveying", done, total)


def _anew(old: Any) -> Any:
    """A statistic of the same kind that has seen nothing."""
    if isinstance(old, ChannelRange):
        return ChannelRange(old.axis)
    return RunRanges() if isinstance(old, RunRanges) else Sample(old.patches)


def is_layer(node: ir.Node) -> bool:
    """A Conv, MatMul or Gemm of a float activation with a constant float weight on the right."""
    if not graph.is_standard(node, "Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
        return False
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or source.is_initializer() or not graph.is_float(source):
        return False
    if 0 in (graph.run_shape(weight) or ()):
        return False
    rank = len(graph.run_shape(weight) or ())
    right = rank in (3, 4) if node.op_type == "Conv" else rank == 2
    return right and graph.has_constant(weight) and graph.is_float(weight) and not node.attributes.get_int("transA", 0)


def _hand_over(node: ir.Node, sample: NDArray[np.float32] | None, channels: ChannelRange) -> None:
    if sample is not None:
        node.meta[SAMPLE] = sample
    if channels.low is not None and channels.high is not None:
        node.meta[CHANNELS] = (channels.low, channels.high)
