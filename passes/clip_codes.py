"""DequantizeLinear(s, z) -> Clip(a, b) -> QuantizeLinear(s, z)  ->  Clip(a / s + z, b / s + z) of the codes.

Rounding to codes keeps the order of numbers, so the codes of a clipped number are its clipped codes: the same bits, and
no way through floats, of which the runtime would compute all three.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.targets import KERNEL, Kernel

__all__ = ["ClipCodes"]

_NOTE = (
    "PyTorch fuses no ReLU6 into the layer before it: the codes of {} layers reach as far as there, beyond their Clip. "
    "Without the qconfig they end where it does, which is finer."
)


class ClipCodes(ir.passes.InPlacePass):
    """Comes after `InsertQDQ`, and takes each Clip that is planned to share its parameters.

    Attributes:
        refused: label of a Clip -> why it stays between its quantizers; filled when the pass runs.
        notes: what a report says of ranges that reach beyond a Clip.

    Refused: bounds that are no constants, parameters that differ on the two sides, and codes that others read in floats
    on the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused, self.notes = {}, []
        names = graph.value_names(model.graph)
        count = 0
        for node in list(model.graph):
            kernel: Kernel | None = node.meta.get(KERNEL)
            if kernel is None or not kernel.shares or not graph.is_standard(node, "Clip"):
                continue
            why = _rewritten(model.graph, node, names)
            if why is None:
                count += 1
            else:
                self.refused[graph.label(node)] = why
        if count:
            self.notes = [_NOTE.format(count)]
        return ir.passes.PassResult(model, bool(count))


def _rewritten(main: ir.Graph, node: ir.Node, names: set[str]) -> str | None:
    """Why `node` stays, or None where it was put on the codes."""
    before, users = graph.producer(node.inputs[0], "DequantizeLinear"), node.outputs[0].consumers()
    after = users[0] if len(users) == 1 and graph.is_standard(users[0], "QuantizeLinear") else None
    if before is None or after is None or node.outputs[0].is_graph_output():
        return "its codes are read in floats, too"
    low, high = graph.clip_bounds(node)
    if low is None or high is None:
        return "its bounds are no constants"
    source, scale, zero = before.inputs
    found = (graph.constant(value) for value in (*before.inputs[1:], *after.inputs[1:]))
    params = [array for array in found if array is not None and array.size == 1]
    if source is None or len(params) != 4:
        return "its codes have several scales"
    if not (np.array_equal(params[0], params[2]) and np.array_equal(params[1], params[3])):
        return "its codes have another scale than those that it reads"
    assert scale is not None and zero is not None and zero.const_value is not None, "constants, as was seen"
    ends = [_code(bound, scale, zero) for bound in (low, high)]
    kind = zero.const_value.dtype
    bounds = [
        graph.add_initializer(main, ir.Tensor(end), graph.fresh_name(f"{node.name}_{word}", names))
        for end, word in zip(ends, ("low", "high"), strict=True)
    ]
    made = ir.Node("", "Clip", [source, *bounds], name=node.name)
    made.meta.update(node.meta)
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(kind), node.outputs[0].shape
    result = after.outputs[0]
    made.outputs[0].name, result.name = result.name, None
    main.insert_before(node, made)
    ir.convenience.replace_all_uses_with(result, made.outputs[0], replace_graph_outputs=True)
    for old in (after, node, before):
        if not any(value.consumers() or value.is_graph_output() for value in old.outputs):
            main.remove(old, safe=True)
    return None


def _code(bound: float, scale: ir.Value, zero: ir.Value) -> np.ndarray[tuple[()], np.dtype[np.integer]]:
    """What the runtime's QuantizeLinear makes of a number: in float32, halves to even, the ends of the type beyond."""
    step, middle = graph.constant(scale), graph.constant(zero)
    assert step is not None and middle is not None
    limits = np.iinfo(middle.dtype)
    code = np.rint(np.float32(bound) / np.float32(step.reshape(-1)[0])) + float(middle.reshape(-1)[0])
    return np.asarray(np.clip(code, limits.min, limits.max), middle.dtype)
