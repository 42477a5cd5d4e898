"""scores + mask * -3.4e38 -> scores + mask * -100, before Softmax: a mask that codes of few bits can hold.

Where a graph is in integers from end to end, so is the mask that is added to the scores, and its constant would take
the whole range. exp(-100) is nothing beside any score that is not masked, as long as scores lie within some dozens of
each other. A row that is masked altogether becomes another one; nothing reads it.

Where the runtime has one operator for attention, a mask of exactly the lowest float32 becomes a little less: there it
would make a row that is masked altogether 0, which in parts is the mean of all values, as with any other number.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.attention import LOW
from qgraph.targets import Target

__all__ = ["BoundMasks"]

_LEAST = -1e4
"""Constants below are masks; exporters write -1e4, -1e9, -3.4e38 and minus infinity."""
_LOWEST = np.finfo(np.float32).min
_MOVERS = (
    "Concat",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
)
_SUMS = ("Add", "Where")
_FAR = 24
"""Nodes between a mask's constant and its Softmax."""


class BoundMasks(ir.passes.InPlacePass):
    """Bounds the constants of masks, where the target says how far.

    Refused: constants that reach anything but a Softmax on any way, and those that a caller may override.

    Args:
        target: its `mask` is the new constant. Without one, masks of the lowest float32 alone are changed, where it has
            an operator for attention.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.mask = target.mask
        self.attention = target.attention is not None
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.mask is None and not self.attention:
            return ir.passes.PassResult(model, False)
        lowest = self.mask is None
        ends: dict[tuple[ir.Value, bool], bool] = {}
        changed = False
        for value in list(model.graph.initializers.values()):
            if value.dtype != ir.DataType.FLOAT or (lowest and not _ends_in_softmax(value, ends, _FAR, lowest)):
                continue  # Before anything is read: weights are large.
            if self._is_mask(value.const_value):
                if not graph.has_constant(value) or not _ends_in_softmax(value, ends, _FAR, lowest):
                    if not lowest:
                        self.refused[str(value.name)] = "it is no mask before a Softmax alone, or may be overridden"
                    continue
                tensor = value.const_value
                assert tensor is not None
                value.const_value = ir.Tensor(self._bounded(tensor), name=value.name)
                self._tell(str(value.name))
                changed = True
        for node in model.graph:
            filler = node.attributes.get("value") if graph.is_standard(node, "ConstantOfShape") else None
            tensor = filler.as_tensor() if filler is not None else None
            is_float = tensor is not None and tensor.dtype == ir.DataType.FLOAT
            if tensor is None or not is_float or not self._is_mask(tensor):
                continue
            if _ends_in_softmax(node.outputs[0], ends, _FAR, lowest):
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(self._bounded(tensor)))
                self._tell(str(node.outputs[0].name))
                changed = True
        return ir.passes.PassResult(model, changed)

    def _bounded(self, tensor: ir.TensorProtocol) -> NDArray[np.float32]:
        array = np.asarray(tensor.numpy(), np.float32)
        return np.where(array == _LOWEST, LOW, array) if self.mask is None else np.maximum(array, np.float32(self.mask))

    def _tell(self, name: str) -> None:
        if self.mask is None:
            return
        self.notes.append(
            f"The mask {name!r} is bounded to {self.mask:g}, so that codes can hold it beside the scores."
        )

    def _is_mask(self, tensor: ir.TensorProtocol | None) -> bool:
        # A mask is a number, or an array that was computed from one; no weight reaches so far down.
        if tensor is None or tensor.size == 0 or tensor.size > 1 << 24:
            return False
        array = tensor.numpy()
        return bool((array == _LOWEST).any()) if self.mask is None else float(np.min(array)) <= _LEAST


def _ends_in_softmax(
    value: ir.Value, known: dict[tuple[ir.Value, bool], bool], far: int, any_factor: bool, summed: bool = False
) -> bool:
    """Whether every way from `value` leads into a Softmax, and nothing on the way makes a number of it that counts.

    Args:
        value: a constant that hides, or what was made of it.
        known: what was found, by value and `summed`.
        far: how many operators to follow.
        any_factor: whether any factor will do.
        summed: whether anything was added to it.
    """
    if (value, summed) in known:
        return known[value, summed]
    known[value, summed] = False
    if far == 0 or value.is_graph_output() or not value.consumers():
        return False
    known[value, summed] = all(
        graph.is_standard(node, "Softmax", "Shape")
        or (_asks_whether(node) and not summed)
        or (
            (graph.is_standard(node, *_MOVERS, *_SUMS) or _switches(node, value, any_factor))
            and all(
                _ends_in_softmax(one, known, far - 1, any_factor, summed or graph.is_standard(node, "Add"))
                for one in node.outputs
            )
        )
        for node in value.consumers()
    )
    return known[value, summed]


def _asks_whether(node: ir.Node) -> bool:
    """Whether `node` only asks what is not 0; what is bounded is not, as before."""
    return graph.is_standard(node, "Cast") and node.attributes.get_int("to", 0) == ir.DataType.BOOL


def _switches(node: ir.Node, value: ir.Value, any_factor: bool) -> bool:
    """Whether `node` multiplies `value` by what is 0 or 1; or by anything, or bounds it, where that will do."""
    if any_factor and graph.is_standard(node, "Mul", "Max"):
        return True  # Next to the lowest number, no factor and no score makes the little less of it count.
    if not graph.is_standard(node, "Mul"):
        return False
    others = [one for one in node.inputs if one is not value]
    return len(others) == 1 and _is_switch(others[0], _FAR)


def _is_switch(value: ir.Value | None, far: int) -> bool:
    """Whether `value` is made of truth values or of the integers of an attention mask: itself, or 1 less it."""
    node = value.producer() if value is not None else None
    if node is None or far == 0:
        return False
    source = node.inputs[0]
    if graph.is_standard(node, "Cast") and source is not None:
        return source.dtype is not None and (source.dtype == ir.DataType.BOOL or source.dtype.is_integer())
    if graph.is_standard(node, "Sub"):
        return graph.constant_scalar(source) == 1.0 and _is_switch(node.inputs[1], far - 1)
    return graph.is_standard(node, *_MOVERS) and _is_switch(source, far - 1)
