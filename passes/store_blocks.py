"""W in int8 or float32 -> the nodes that compute it from codes of few bits in blocks, once, at load.

What `ShrinkWeights` made W fit. All inputs of the new nodes are constant, so the runtime folds them as it loads the
model (which is audited), and packs for its kernel what it would have packed. The arithmetic is that of `qgraph.blocks`
and `qgraph.qparams` in the same order and in float32, so the result has the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph
from qgraph.blocks import Blocks, unpack
from qgraph.folded import Folded
from qgraph.held import HELD, Held
from qgraph.qparams import QParams

__all__ = ["StoreBlocks"]

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT32


class StoreBlocks(ir.passes.InPlacePass):
    """Writes the weights that fit few bits as those bits.

    Refused: nothing; weights without such codes stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        found = [(value, held) for value in main.initializers.values() if (held := _held(value)) is not None]
        names = graph.value_names(main) if found else set[str]()
        tables: dict[str, ir.Value] = {}
        for value, held in found:
            reader = str(value.consumers()[0].name)
            folded = Folded(main, main[0], reader, str(value.name), names, tables)
            ir.convenience.replace_all_uses_with(value, _written(folded, held, value))
        if found:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _held(value: ir.Value) -> Held | None:
    held: Held | None = value.meta.get(HELD)
    return held if value.consumers() and not value.is_graph_output() else None


def _written(folded: Folded, held: Held, value: ir.Value) -> ir.Value:
    """The constant as nodes that the runtime folds."""
    blocks = held.blocks
    columns, count = blocks.scale.shape
    size = blocks.size
    codes = _codes(folded, blocks.codes.reshape(columns, -1), blocks.bits, "codes")
    codes = folded.reshape(codes, columns, count, size)
    if blocks.zero_point is None:
        middle = folded.table(np.float32(2 ** (blocks.bits - 1)), f"middle_of_{blocks.bits}_bits")
    else:
        zeros = _codes(folded, blocks.zero_point, blocks.bits, "zero_points")
        middle = folded.reshape(folded.first(folded.reshape(zeros, columns, -1), count, axis=1), columns, count, 1)
    centred = folded.node("Sub", [codes, middle], _FLOAT, (columns, count, size))
    real = folded.node("Mul", [centred, _scales(folded, blocks)], _FLOAT, (columns, count, size))
    real = folded.reshape(real, columns, count * size)
    if count * size > blocks.inner:
        real = folded.first(real, blocks.inner, axis=1)
    if held.params is not None:
        real = _integers(folded, real, held.params)
    if not held.turned:
        return real
    kind = value.dtype or _FLOAT
    shape = (blocks.inner, columns)
    return folded.node("Transpose", [real], kind, shape, [ir.AttrInt64s("perm", [1, 0])])


def _codes(folded: Folded, packed: NDArray[Any], bits: int, what: str) -> ir.Value:
    """The unsigned codes in rows of bytes, as floats, [rows, bytes, codes in a byte]."""
    stored = folded.constant(packed, what)
    if bits == 8:
        return folded.cast(stored, _FLOAT)
    every = unpack(np.arange(256, dtype=np.uint8)[:, None], bits).astype(np.float32)
    table = folded.table(every, f"codes_of_{bits}_bits")
    return folded.node("Gather", [table, folded.cast(stored, _INT)], _FLOAT, (*packed.shape, every.shape[1]))


def _scales(folded: Folded, blocks: Blocks) -> ir.Value:
    """[N, blocks, 1], in 16 bits where these hold them."""
    scale = blocks.scale[..., None]
    half = scale.astype(np.float16)
    if np.array_equal(half.astype(np.float32), scale):
        return folded.cast(folded.constant(half, "scales"), _FLOAT)
    return folded.constant(scale, "scales")


def _integers(folded: Folded, real: ir.Value, params: QParams) -> ir.Value:
    """Rounded as `qparams.quantize` does with a zero point of 0."""
    shape = graph.run_shape(real)
    step = folded.constant(params.scale.astype(np.float32).reshape(-1, 1), "step")
    steps = folded.node("Round", [folded.node("Div", [real, step], _FLOAT, shape)], _FLOAT, shape)
    ends = [folded.table(np.float32(end), f"code_{end}") for end in (params.format.lowest, params.format.highest)]
    return folded.cast(folded.node("Clip", [steps, *ends], _FLOAT, shape), params.format.storage)
