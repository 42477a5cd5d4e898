"""MatMulNBits(accuracy_level 0 to 3) -> the same at level 4, which computes in int8; 2-bit blocks of 256 -> two of 128.

Many tools leave the level at its default, 0, where weights of 2 and 8 bits are unpacked to float at every run: 50 times
slower than the float product (4 bits: 3 times slower than at level 4). At level 4 each block of a row of activations
gets 8 bits and a scale of its own, which costs 0.1 to 0.2 dB at 4 bits. Blocks of 256 have no fast kernel at 2 bits;
the same codes in blocks of 128, each scale written twice, have one, and the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.blocks import pack, unpack
from qgraph.targets import Target

__all__ = ["RaiseLevel"]

_LEVEL = 4
_LONG, _FAST = 256, 128


class RaiseLevel(ir.passes.InPlacePass):
    """Products that come with weights of few bits run in the kernel for them.

    Refused: activations in other types than float32; 2-bit blocks of 16, or of 256 whose constants are computed.

    Attributes:
        refused: node -> why it stays slow.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused = {}
        if "MatMulNBits" not in self.target.fast_operators:
            return ir.passes.PassResult(model, False)
        main = model.graph
        changed = False
        names: set[str] | None = None
        made: dict[tuple[ir.Value | None, ...], list[ir.Value | None]] = {}
        for node in list(main):
            # Scales have the type of the activation, and theirs is known.
            if (node.domain, node.op_type) != ("com.microsoft", "MatMulNBits") or not graph.is_float(node.inputs[2]):
                continue
            bits, size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
            if bits == 2 and size == _LONG:
                names = graph.value_names(main) if names is None else names
                changed |= self._halve(main, node, names, made)
            elif bits == 2 and size < 32:
                self.refused[graph.label(node)] = f"onnxruntime has no fast kernel for 2 bits in blocks of {size}"
            if node.attributes.get_int("accuracy_level", 0) != _LEVEL:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _LEVEL)
                changed = True
        if made:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    def _halve(
        self,
        main: ir.Graph,
        node: ir.Node,
        names: set[str],
        made: dict[tuple[ir.Value | None, ...], list[ir.Value | None]],
    ) -> bool:
        constants = [*node.inputs[1:4], *[None] * (4 - len(node.inputs))]
        plain = all(value is None or graph.has_constant(value) for value in constants)
        grouped = len(node.inputs) > 4 and node.inputs[4] is not None
        if not plain or grouped or (constants[2] is not None and constants[2].dtype != ir.DataType.UINT8):
            self.refused[graph.label(node)] = "onnxruntime has no fast kernel for 2 bits in blocks of 256"
            return False
        inner, columns = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
        key = tuple(constants)
        if key not in made:
            made[key] = _parted(main, constants, columns, inner, names)
        for position, value in enumerate(made[key], 1):
            if value is not None:
                node.replace_input_with(position, value)
        node.attributes["block_size"] = ir.AttrInt64("block_size", _FAST)
        return True


def _parted(
    main: ir.Graph, constants: list[ir.Value | None], columns: int, inner: int, names: set[str]
) -> list[ir.Value | None]:
    """Codes, scales and zero points for blocks of half the size."""
    codes, scale, zero = constants
    old, count = -(-inner // _LONG), -(-inner // _FAST)

    def halves(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.repeat(array.reshape(columns, old), 2, axis=1)[:, :count])

    def bytes_of(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array.reshape(columns, -1, _FAST // 4)[:, :count])

    def packed(array: NDArray[Any]) -> NDArray[Any]:
        return pack(halves(unpack(array.reshape(columns, -1), 2)[:, :old]), 2)

    def made(value: ir.Value, function: Any, *shape: int) -> ir.Value:
        name = graph.fresh_name(f"{value.name}_halves", names)
        return weights.derived(main, value, function, value.dtype or ir.DataType.UINT8, shape, name)

    assert codes is not None and scale is not None
    return [
        made(codes, bytes_of, columns, count, _FAST // 4),
        made(scale, halves, columns, count),
        None if zero is None else made(zero, packed, columns, -(-count // 4)),
    ]
