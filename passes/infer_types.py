"""Types and shapes that are not known behind the runtime's own operators -> those that the runtime infers.

ONNX's inference stops at operators that it does not know. The runtime knows its own, so it is asked: the graph is
loaded without its weights and unoptimized, and tells the type of every value as it would that of an output.
"""

from __future__ import annotations

import logging
import re

import numpy as np
import onnx_ir as ir

from qgraph.errors import ExecutionError
from qgraph.session import Session, SessionOptions

__all__ = ["InferTypes"]

_LOG = logging.getLogger(__name__)
_SMALL = 1024
"""Elements of the integer constants that stay in the graph: shapes and axes are among them, weights are not."""


class InferTypes(ir.passes.InPlacePass):
    """Values of unknown type get type and shape; graphs of ONNX's operators have none such, and nobody is asked.

    Refused: graphs that the runtime does not load; the reason goes to the debug log, and types stay unknown.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only types and shapes are written."""
        unknown = {v.name: v for node in model.graph for v in node.outputs if v.name and v.type is None}
        if not unknown:
            return ir.passes.PassResult(model, False)
        try:
            found = _infer(model, set(unknown))
        except ExecutionError as error:
            _LOG.debug("types stay unknown: %s", error)
            return ir.passes.PassResult(model, False)
        for name, (kind, shape) in found.items():
            if kind is not None:
                unknown[name].type, unknown[name].shape = ir.TensorType(kind), shape
        return ir.passes.PassResult(model, bool(found))


def _infer(model: ir.Model, names: set[str | None]) -> dict[str, tuple[ir.DataType | None, ir.Shape]]:
    probe = model.clone()
    for name, value in list(probe.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.size <= _SMALL and tensor.dtype.is_integer():
            # Wherever it lies: no file is at hand.
            value.const_value = ir.Tensor(np.array(tensor.numpy()), name=name, dtype=tensor.dtype)
        else:
            del probe.graph.initializers[name]
            value.const_value = None
            probe.graph.inputs.append(value)
    # What has an output already is known; the runtime gives every output a type.
    probe.graph.outputs.extend(v for node in probe.graph for v in node.outputs if v.name in names)
    with Session(probe, SessionOptions(level="none", threads=1)) as session:
        return {
            name: (_kind(kind), ir.Shape(shape)) for name, (kind, shape) in session.types().items() if name in names
        }


def _kind(text: str) -> ir.DataType | None:
    """The element type that the runtime calls `tensor(float)`."""
    found = re.fullmatch(r"tensor\((\w+)\)", text)
    return None if found is None else getattr(ir.DataType, found[1].upper(), None)
