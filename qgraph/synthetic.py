"""Random inputs for a model without data: good for timing and for a first look at the loss, not for calibration.

Whole numbers that pick rows of a table are drawn from the table's rows, other whole numbers are one (masks, counts);
floats are standard normal. Free dimensions of one name get one size. A decoder with a cache gets a prompt, and then
some tokens and single ones after many; its lengths fit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.decoding import LEAST_PAST, Decoder
from qgraph.feeds import inputs_of

__all__ = ["synthetic", "table_rows"]

_FEEDS = 4
_FREE = 64
_IMAGE = 224
_LENGTHS = ((0, 64), (LEAST_PAST - 16, 16), (LEAST_PAST, 1), (LEAST_PAST - 1, 1))
"""Tokens that are past and new, of the feeds for a decoder."""
_THROUGH = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Transpose")


def synthetic(model: ir.Model) -> Iterator[dict[str, NDArray[Any]]]:
    """A few seeded feeds for the inputs without default."""
    decoder = Decoder.of(inputs_of(model))
    if decoder is not None:
        yield from _continued(model, decoder)
        return
    sizes: dict[str, int] = {}
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    for number in range(_FEEDS):
        rng = np.random.default_rng(number)
        yield {str(value.name): _array(value, rng, sizes) for value in inputs}


def _continued(model: ir.Model, decoder: Decoder) -> Iterator[dict[str, NDArray[Any]]]:
    ids = next(v for v in model.graph.inputs if v.name == decoder.ids.name)
    batch, fixed = decoder.ids.shape or (None, None)
    for number, (past, new) in enumerate(_LENGTHS):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, table_rows(ids) or 2, (batch or 1, fixed or new)).astype(decoder.ids.dtype)
        yield decoder.complete({decoder.ids.name: tokens, **decoder.drawn(batch or 1, past, rng)})


def _array(value: ir.Value, rng: np.random.Generator, sizes: dict[str, int]) -> NDArray[Any]:
    shape = _shape(value, sizes)
    known = value.dtype is not None and value.dtype != ir.DataType.BFLOAT16
    kind = np.dtype(value.dtype.numpy()) if known and value.dtype is not None else np.dtype(np.float32)
    if kind.kind == "f":
        return np.asarray(rng.standard_normal(shape), kind)
    rows = table_rows(value) if kind.kind in "iu" else None
    if rows is None:
        return np.ones(shape, kind)
    return rng.integers(0, rows, shape).astype(kind)


def _shape(value: ir.Value, sizes: dict[str, int]) -> list[int]:
    dims = list(value.shape) if value.shape is not None else []
    found: list[int] = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            found.append(dim)
            continue
        default = 1 if axis == 0 else _IMAGE if len(dims) == 4 and axis >= 2 else _FREE
        name = dim.value
        found.append(sizes.setdefault(name, default) if name else default)
    return found


def table_rows(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that `value` picks from, through operators that keep its numbers."""
    waiting, seen, smallest = [value], {value}, None
    while waiting:
        for node, position in waiting.pop().uses():
            picks = graph.is_standard(node, "Gather") or node.op_type == "GatherBlockQuantized"
            if picks and position == 1:
                shape = graph.run_shape(node.inputs[0])
                axis = node.attributes.get_int("axis" if node.op_type == "Gather" else "gather_axis", 0)
                if shape is not None and graph.has_constant(node.inputs[0]):
                    smallest = shape[axis] if smallest is None else min(smallest, shape[axis])
            elif graph.is_standard(node, *_THROUGH) and position == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return smallest
