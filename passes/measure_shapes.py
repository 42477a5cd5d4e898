"""The shape that every value has in a run on the first sample, by adding a Shape node to each and running once.

No value_info is needed, and dynamic dimensions get the sizes that the data gives them. Costs rest on it.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qgraph.data import Dataset
from qgraph.graph import RUN_SHAPE
from qgraph.session import Session, SessionOptions

__all__ = ["MeasureShapes"]


class MeasureShapes(ir.passes.InPlacePass):
    """Writes `Value.meta["qgraph.shape"]` on every tensor of the main graph.

    Args:
        data: the calibration data; its first batch (by content, so that order does not matter) is run.
        folder: where the model's external tensors lie.
    """

    def __init__(self, data: Dataset, folder: Path | None = None):
        super().__init__()
        self.data = data
        self.folder = folder

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        feeds = self.data.first().feeds
        for value in model.graph.inputs:
            if value.name in feeds:
                value.meta[RUN_SHAPE] = tuple(feeds[value.name].shape)
        probe = model.clone()
        wanted: dict[str, ir.Value] = {}
        shapes: list[ir.Value] = []
        ours = [v for node in model.graph for v in node.outputs]
        theirs = [v for node in probe.graph for v in node.outputs]
        for value, twin in zip(ours, theirs, strict=True):
            if value.dtype is None or not value.name or not isinstance(value.type, ir.TensorType):
                continue
            node = ir.Node("", "Shape", [twin])
            shape = node.outputs[0]
            shape.name = f"{value.name}__qgraph_shape"
            shape.type = ir.TensorType(ir.DataType.INT64)
            shape.shape = ir.Shape([None])
            probe.graph.append(node)
            wanted[shape.name] = value
            shapes.append(shape)
        probe.graph.outputs.clear()
        probe.graph.outputs.extend(shapes)
        if not shapes:
            return ir.passes.PassResult(model, False)
        options = SessionOptions(level="basic", config=(("session.disable_prepacking", "1"),))
        with Session(probe, options, self.folder) as session:
            for name, sizes in session.run(feeds).items():
                wanted[name].meta[RUN_SHAPE] = tuple(int(d) for d in sizes)
        return ir.passes.PassResult(model, False)
