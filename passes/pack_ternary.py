"""MatMulNBits(x, codes of 2 bits) -> MatMulNBits(x, unpacked(codes of 1.6 or 1 bit)), unpacked once at load.

On disk five ternary codes share a byte (3^5 = 243), or eight binary ones. Tables bring them back into the two bits that
the kernel reads, with operators of plain ONNX whose inputs are all constant: the runtime folds them as it loads the
model, and then prepares the kernel's weights as if they had come so (which is audited). Of each five bytes of two-bit
codes four are looked up whole, one for each packed byte; the fifth is put together of the fifth codes of these four.
Scales that are equal are stored once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph
from qgraph.folded import Folded
from qgraph.formats import BINARY, TERNARY, Format
from qgraph.targets import KERNEL, Kernel
from qgraph.ternary import ABSMEAN, GRID, Grid

__all__ = ["PackTernary"]

_CODES = 3**5
_BYTES = np.arange(256)
_INT, _BYTE = ir.DataType.INT32, ir.DataType.UINT8


class PackTernary(ir.passes.InPlacePass):
    """Packs the weights of products that are planned as ternary or binary.

    Refused: nothing; other weights stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        nodes = [node for node in main if node.op_type == "MatMulNBits" and _format(node) is not None]
        names = graph.value_names(main)
        done: set[ir.Value] = set()
        tables: dict[str, ir.Value] = {}
        for node in nodes:
            for position, write in ((1, _codes), (2, _scales)):
                value = node.inputs[position]
                assert value is not None
                if value in done:
                    continue
                made = write(Folded(main, main[0], str(node.name), str(value.name), names, tables), node, value)
                ir.convenience.replace_all_uses_with(value, made)
                done.add(made)
        if nodes:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(nodes))


def _format(node: ir.Node) -> Format | None:
    kernel: Kernel | None = node.meta.get(KERNEL)
    fmt = kernel.weight[1].format if kernel is not None and kernel.weight is not None else None
    return fmt if fmt in (TERNARY, BINARY) else None


def _codes(folded: Folded, node: ir.Node, value: ir.Value) -> ir.Value:
    shape = graph.run_shape(value) or ()
    count = int(np.prod(shape))
    whole_blocks = node.attributes.get_int("K", 0) % node.attributes.get_int("block_size", 1) == 0
    # What fills a last block up is zero, and so a third code.
    if _format(node) == BINARY and whole_blocks:
        packed = folded.derived(value, _pack_binary, _BYTE, (count // 2,), "packed")
        # Two bytes of four codes for each byte of eight.
        pairs = folded.table(np.stack([_spread(_BYTES & 15), _spread(_BYTES >> 4)], axis=1), "binary_codes")
        found = folded.node("Gather", [pairs, folded.cast(packed, _INT)], _BYTE, (count // 2, 2))
        return folded.reshape(found, *shape)
    groups = -(-count // 5)
    packed = folded.derived(value, _pack_ternary, _BYTE, (4, groups), "packed")
    index = folded.cast(packed, _INT)
    whole = folded.table(_four(_BYTES), "ternary_codes")
    four = folded.node("Gather", [whole, index], _BYTE, (4, groups))
    # Which of the four packed bytes it is says where its fifth code goes.
    fifth = np.concatenate([(np.arange(_CODES) // 81 + 1) << 2 * place for place in range(4)]).astype(np.int32)
    offset = folded.table(np.arange(0, 4 * _CODES, _CODES, dtype=np.int32)[:, None], "ternary_offsets")
    moved = folded.node("Add", [index, offset], _INT, (4, groups))
    single = folded.node("Gather", [folded.table(fifth, "ternary_fifth_codes"), moved], _INT, (4, groups))
    axis = folded.constant(np.array([0], np.int64), "axis")
    last = folded.cast(folded.node("ReduceSum", [single, axis], _INT, (1, groups)), _BYTE)
    both = folded.node("Concat", [four, last], _BYTE, (5, groups), [ir.AttrInt64("axis", 0)])
    return folded.reshape(folded.first(folded.reshape(both, -1), count), *shape)


def _four(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """The byte of two-bit codes that the first four of five ternary ones make."""
    found = np.stack([(codes // 3**place % 3 + 1) << 2 * place for place in range(4)])
    return np.asarray(found.sum(axis=0), np.uint8)


def _spread(signs: NDArray[Any]) -> NDArray[np.uint8]:
    """The byte of two-bit codes that four bits make: 0 is code 1, 1 is code 3."""
    found = np.stack([((signs >> place & 1) * 2 + 1) << 2 * place for place in range(4)])
    return np.asarray(found.sum(axis=0), np.uint8)


_DIGITS = np.stack([np.clip((_BYTES >> 2 * place & 3) - 1, 0, 2) for place in range(4)]).astype(np.uint8)
_LOW = (_DIGITS * 3 ** np.arange(4)[:, None]).sum(axis=0).astype(np.uint8)
_SIGNS = np.stack([(_BYTES >> (2 * place + 1) & 1) << place for place in range(4)]).sum(axis=0).astype(np.uint8)


def _pack_ternary(codes: NDArray[Any]) -> NDArray[Any]:
    """Bytes of four two-bit codes 1 to 3 -> [4, groups] bytes of five ternary ones."""
    flat = codes.reshape(-1)
    groups = -(-flat.size // 5)
    # What fills the last group up is never looked at.
    flat = np.pad(flat, (0, 5 * groups - flat.size), constant_values=0b10101010)
    four, last = flat[: 4 * groups].reshape(4, groups), flat[4 * groups :]
    return np.asarray(_LOW[four] + np.uint8(81) * _DIGITS[:, last], np.uint8)


def _pack_binary(codes: NDArray[Any]) -> NDArray[Any]:
    """Bytes of four two-bit codes, 1 or 3 -> half as many bytes of eight bits."""
    signs = _SIGNS[codes.reshape(-1, 2)]
    return np.asarray(signs[:, 0] | signs[:, 1] << np.uint8(4), np.uint8)


def _scales(folded: Folded, node: ir.Node, value: ir.Value) -> ir.Value:
    """One scale, or one a column, where they are equal; else as they are."""
    grid: Grid | None = node.meta.get(GRID)
    kernel: Kernel = node.meta[KERNEL]
    mean = kernel.weight is not None and kernel.weight[1].observer == ABSMEAN
    shared = 2 if mean else grid.shared if grid is not None else 0
    shape = graph.run_shape(value)
    if not shared or shape is None:
        return value
    rows = 1 if shared == 2 else shape[0]
    kept = folded.derived(value, lambda s: s[:rows, :1], ir.DataType.FLOAT, (rows, 1), "shared")
    size = folded.constant(np.array(shape, np.int64), "size")
    return folded.node("Expand", [kept, size], ir.DataType.FLOAT, shape)
