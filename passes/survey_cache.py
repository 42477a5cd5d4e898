"""What keys and values the attention writes into its cache, for the scales that a cache in integers needs.

One pass over the calibration data; each channel of each head gets a scale of its own. Keys are seen after their rotary
embedding, as they are kept.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qgraph import calibration, graph
from qgraph.caches import Seen, cast_to_output
from qgraph.calibration import STATISTICS
from qgraph.data import Dataset

__all__ = ["CACHE", "SurveyCache"]

CACHE = "qgraph.cache"
"""Key in `Value.meta` of a cache that goes out: what was seen of it, a `qgraph.caches.Seen`."""


class SurveyCache(ir.passes.InPlacePass):
    """Writes `Value.meta["qgraph.cache"]` on the caches that GroupQueryAttention gives out.

    Refused: caches that are in integers already, or that are no output of the model.

    Args:
        data: the calibration data.
        folder: where the model's external tensors lie.
        budget: bytes that the caches of one run may take.
    """

    def __init__(self, data: Dataset, folder: Path | None = None, budget: int = calibration.DEFAULT_BUDGET):
        super().__init__()
        self.data = data
        self.folder = folder
        self.budget = budget

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        caches = [
            value
            for node in model.graph
            if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
            for value in node.outputs[1:3]
            if graph.is_float(value) and (value.is_graph_output() or cast_to_output(value) is not None)
        ]
        for value in caches:
            value.meta[CACHE] = Seen()
            value.meta[STATISTICS] = {CACHE: value.meta[CACHE]}
        try:
            if caches:
                calibration.observe(model, self.data, self.folder, self.budget)
        finally:
            for value in caches:
                del value.meta[STATISTICS]
        return ir.passes.PassResult(model, False)
