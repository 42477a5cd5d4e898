"""One pass over the data: for each layer a sample of what it multiplies, and the range of each input channel.

Later passes choose scales, roundings and schemes by the error behind the weights; with the sample at hand they need no
further run of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import calibration, graph
from qgraph.calibration import CHANNELS, SAMPLE, STATISTICS
from qgraph.data import Dataset
from qgraph.observers.channel_range import ChannelRange
from qgraph.observers.sample import Sample
from qgraph.observers.second_moment import patches_of

__all__ = ["Survey"]


class Survey(ir.passes.InPlacePass):
    """Runs the data and writes `Node.meta["qgraph.sample"]` and `["qgraph.channels"]` on layers with constant weights.

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
        if layers:
            calibration.observe(model, self.data, self.folder, self.budget, self._report)
        # Layers that read one value share its sample.
        items: dict[tuple[ir.Value, object], NDArray[np.float32] | None] = {}
        for node, patches in layers.items():
            source, axis = node.inputs[0], graph.channel_axis(node)
            assert source is not None
            if (source, patches) not in items:
                items[source, patches] = source.meta[STATISTICS][patches].items
            _hand_over(node, items[source, patches], source.meta[STATISTICS][axis])
        for node in layers:
            if node.inputs[0] is not None:
                node.inputs[0].meta.pop(STATISTICS, None)
        return ir.passes.PassResult(model, False)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("surveying", done, total)


def is_layer(node: ir.Node) -> bool:
    """A Conv, MatMul or Gemm of a float activation with a constant float weight on the right."""
    if not graph.is_standard(node, "Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
        return False
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or source.is_initializer() or not graph.is_float(source):
        return False
    rank = len(graph.run_shape(weight) or ())
    right = rank in (3, 4) if node.op_type == "Conv" else rank == 2
    return right and graph.has_constant(weight) and graph.is_float(weight) and not node.attributes.get_int("transA", 0)


def _hand_over(node: ir.Node, sample: NDArray[np.float32] | None, channels: ChannelRange) -> None:
    if sample is not None:
        node.meta[SAMPLE] = sample
    if channels.low is not None and channels.high is not None:
        node.meta[CHANNELS] = (channels.low, channels.high)
