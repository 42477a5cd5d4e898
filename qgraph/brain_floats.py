"""bfloat16 into the runtime and out of it: numpy has no such type, so that float32 goes in and comes out."""

# The runtime ships no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["BRAIN", "given", "numbers"]

BRAIN = "tensor(bfloat16)"
"""What the runtime calls the type."""


def given(feeds: Mapping[str, NDArray[Any]], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The runtime's values of `feeds`, rounded to bfloat16 where that is the input's kind. They use the arrays' memory.

    Args:
        feeds: arrays by name.
        kinds: the runtime's words for the types of the inputs.
    """
    kind, make = ir.DataType.BFLOAT16, ort.OrtValue
    return {
        name: make.ortvalue_from_numpy_with_onnx_type(array.astype(kind.numpy()).view(np.uint16), int(kind))
        if kinds.get(name) == BRAIN
        else make.ortvalue_from_numpy(np.asarray(array, order="C"))
        for name, array in feeds.items()
    }


def numbers(value: Any) -> Any:
    """A result as an array; bfloat16 as float32, which is exact."""
    if value.data_type() == BRAIN:
        value = _widener().run_with_ort_values(None, {"x": value})[0]
    return value.numpy()


@functools.cache
def _widener() -> Any:
    """A session that brings bfloat16 of any shape to float32; numpy cannot read what the runtime holds."""
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> widener (bfloat16 x) => (float y) { y = Cast <to = 1> (x) }'
    )
    model.graph.inputs[0].shape = model.graph.outputs[0].shape = None
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    source = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
