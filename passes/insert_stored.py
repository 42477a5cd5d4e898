"""op(x, W) -> op(x, Cast(W in 16 bits)), or op(x, table[W in 8 or 4 bits] * scales): W as it is brought back at load.

All inputs of the new nodes are constant, so the runtime folds them once, as it loads the model (which is audited), and
the operator finds the float32 weight that it would have found. What is smaller is the file.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, stored
from qgraph.float_formats import Float
from qgraph.folded import Folded
from qgraph.spec import QuantSpec
from qgraph.stored import REACH, Reach
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["InsertStored"]


class InsertStored(ir.passes.InPlacePass):
    """Writes the weights that annotation planned to store in fewer bits.

    Refused: weights that reach beyond the format's range where it has no scales, those that hold what is no number, and
    those that another node reads, which keeps them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [node for node in main if _spec(node) is not None]
        names = graph.value_names(main)
        made: dict[ir.Value, ir.Value] = {}
        tables: dict[str, ir.Value] = {}
        for node in planned:
            spec = _spec(node)
            if spec is not None and (reason := self._refusal(node, spec)):
                del node.meta[KERNEL]
                node.meta[REASON] = reason
        for node in planned:
            spec = _spec(node)
            if spec is None:
                continue
            for position in stored.positions(node):
                value = node.inputs[position]
                assert value is not None
                if value not in made:
                    made[value] = _write(
                        Folded(main, main[0], str(node.name), str(value.name), names, tables), node, value, spec
                    )
                node.replace_input_with(position, made[value])
        if planned:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(made))

    def _refusal(self, node: ir.Node, spec: QuantSpec) -> str | None:
        for position in stored.positions(node):
            value = node.inputs[position]
            assert value is not None
            others = [user for user in value.consumers() if _spec(user) != spec]
            if others or value.is_graph_output():
                where = graph.label(others[0]) if others else "the caller"
                return f"its weight {value.name!r} is read by {where}, too, which keeps it in float32"
            array = graph.constant(value)
            assert array is not None
            fmt = spec.format
            reach = Reach.of(array, fmt) if isinstance(fmt, Float) else Reach.of(array, _WIDEST)
            del array
            graph.release(value)
            if not math.isfinite(reach.largest):
                return f"its weight {value.name!r} holds what is no number"
            if fmt.storage.bitwidth == 16:
                if reach.largest > fmt.highest:
                    return f"its weight reaches {reach.largest:.3g}, and {fmt.name} only {fmt.highest:.5g}"
                known: Reach | None = node.meta.get(REACH)
                node.meta[REACH] = reach if known is None else reach.merged(known)
        return None


_WIDEST = Float("bf16", ir.DataType.BFLOAT16)


def _spec(node: ir.Node) -> QuantSpec | None:
    kernel: Kernel | None = node.meta.get(KERNEL)
    stored_so = kernel is not None and kernel.form is Form.STORED and kernel.weight is not None
    return kernel.weight[1] if stored_so and kernel is not None and kernel.weight is not None else None


def _write(folded: Folded, node: ir.Node, value: ir.Value, spec: QuantSpec) -> ir.Value:
    """The weight as nodes that the runtime folds."""
    shape = graph.run_shape(value) or ()
    fmt, kind = spec.format, ir.DataType.FLOAT
    if fmt.storage.bitwidth == 16:
        half = folded.derived(value, fmt.encode, fmt.storage, shape, fmt.name)
        return folded.cast(half, kind)
    view = stored.view_of(node, shape)
    blocks, size = stored.blocks_in(view, spec)
    outer, inner, rest = view
    count = outer * blocks * size * rest
    packed = -(-count * fmt.storage.bitwidth // 8)
    codes = folded.derived(value, lambda w: stored.encode(w, view, spec), ir.DataType.UINT8, (packed,), fmt.name)
    scales = folded.derived(
        value, lambda w: stored.scales_of(w, view, spec), kind, (outer, blocks, 1, rest), f"{fmt.name}_scales"
    )
    table = folded.table(stored.table_of(fmt), f"{fmt.name}_numbers")
    index = folded.cast(codes, ir.DataType.INT32)
    real = folded.node("Gather", [table, index], kind)
    if packed * 8 // fmt.storage.bitwidth > count:
        real = folded.first(folded.reshape(real, -1), count)
    parts = folded.reshape(real, outer, blocks, size, rest)
    scaled = folded.node("Mul", [parts, scales], kind, (outer, blocks, size, rest))
    if blocks * size > inner:
        scaled = folded.first(folded.reshape(scaled, outer, blocks * size, rest), inner, axis=1)
    return folded.reshape(scaled, *shape)
