"""Shapes of all values, by ONNX's inference, and of no number that a caller may yet give."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph.quiet import quiet

__all__ = ["infer_shapes"]


def infer_shapes(model: ir.Model) -> None:
    """Write types and shapes into `model`.

    The library takes the default of an input, such as the target of a Reshape, for what it is in every run; so defaults
    of integers are set aside meanwhile.
    """
    main = model.graph
    defaults = [value for value in main.inputs if value.is_initializer() and _is_size(value)]
    for value in defaults:
        main.initializers.pop(str(value.name))
    try:
        with quiet("onnx_ir"):
            common.ShapeInferencePass(data_prop=True)(model)
    finally:
        for value in defaults:
            main.register_initializer(value)


def _is_size(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()
