"""scores + mask * -3.4e38 -> scores + mask * -100, before Softmax: a mask that codes of few bits can hold.

Where a graph is in integers from end to end, so is the mask that is added to the scores, and its constant would take
the whole range. exp(-100) is nothing beside any score that is not masked, as long as scores lie within some dozens of
each other. A row that is masked altogether becomes another one; nothing reads it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.targets import Target

__all__ = ["BoundMasks"]

_LEAST = -1e4
"""Constants below are masks; exporters write -1e4, -1e9, -3.4e38 and minus infinity."""
_CARRIERS = (
    "Add",
    "Cast",
    "Concat",
    "Expand",
    "Gather",
    "Max",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
)
_FAR = 24
"""Nodes between a mask's constant and its Softmax."""


class BoundMasks(ir.passes.InPlacePass):
    """Bounds the constants of masks, where the target says how far.

    Refused: constants that reach anything but a Softmax on any way, and those that a caller may override.

    Args:
        target: its `mask` is the new constant; None leaves masks as they are.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.mask = target.mask
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.mask is None:
            return ir.passes.PassResult(model, False)
        ends: dict[ir.Value, bool] = {}
        changed = False
        for value in list(model.graph.initializers.values()):
            if value.dtype == ir.DataType.FLOAT and self._is_mask(value.const_value):
                if not graph.has_constant(value) or not _ends_in_softmax(value, ends, _FAR):
                    self.refused[str(value.name)] = "it is no mask before a Softmax alone, or may be overridden"
                    continue
                tensor = value.const_value
                assert tensor is not None
                value.const_value = ir.Tensor(np.maximum(tensor.numpy(), np.float32(self.mask)), name=value.name)
                changed = True
        for node in model.graph:
            filler = node.attributes.get("value") if graph.is_standard(node, "ConstantOfShape") else None
            tensor = filler.as_tensor() if filler is not None else None
            is_float = tensor is not None and tensor.dtype == ir.DataType.FLOAT
            if tensor is None or not is_float or not self._is_mask(tensor):
                continue
            if _ends_in_softmax(node.outputs[0], ends, _FAR):
                bounded = ir.Tensor(np.maximum(tensor.numpy(), np.float32(self.mask)))
                node.attributes["value"] = ir.AttrTensor("value", bounded)
                changed = True
        return ir.passes.PassResult(model, changed)

    def _is_mask(self, tensor: ir.TensorProtocol | None) -> bool:
        # A mask is a number, or an array that was computed from one; no weight reaches so far down.
        if tensor is None or tensor.size == 0 or tensor.size > 1 << 24:
            return False
        return float(np.min(tensor.numpy())) <= _LEAST


def _ends_in_softmax(value: ir.Value, known: dict[ir.Value, bool], far: int) -> bool:
    """Whether every way from `value` leads into a Softmax."""
    if value in known:
        return known[value]
    known[value] = False
    if far == 0 or value.is_graph_output() or not value.consumers():
        return False
    good = all(
        graph.is_standard(node, "Softmax")
        or (graph.is_standard(node, *_CARRIERS) and all(_ends_in_softmax(v, known, far - 1) for v in node.outputs))
        for node in value.consumers()
    )
    known[value] = good
    return good
