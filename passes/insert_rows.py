"""Gather(table, ids) -> Cast(Gather(codes, ids)) * Gather(scales, ids), the table in int8 with a scale for each row.

Only the rows that are picked are brought back to float; a DequantizeLinear before the Gather would do that with the
whole table at every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.qparams import from_range, quantize
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["InsertRows"]


class InsertRows(ir.passes.InPlacePass):
    """Writes the embeddings that annotation planned with quantized rows.

    Refused: nothing; what cannot be written so was not planned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [n for n in main if graph.is_standard(n, "Gather") and _is_planned(n)]
        names = graph.value_names(main)
        made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in planned:
            _write(main, node, names, made)
        if planned:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.WEIGHTS


def _write(main: ir.Graph, node: ir.Node, names: set[str], made: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
    kernel: Kernel = node.meta[KERNEL]
    table, ids = node.inputs[0], node.inputs[1]
    assert table is not None and ids is not None and kernel.weight is not None
    if table not in made:
        made[table] = _quantized(main, table, kernel.weight[1], names)
    codes, scales = made[table]
    base = str(node.name)
    shape = node.outputs[0].shape
    picked = _node(main, node, "Gather", [codes, ids], names, f"{base}_codes", shape, codes.dtype)
    real = _node(main, node, "Cast", [picked.outputs[0]], names, f"{base}_real", shape, ir.DataType.FLOAT)
    real.attributes.add(ir.AttrInt64("to", int(ir.DataType.FLOAT)))
    step = _node(main, node, "Gather", [scales, ids], names, f"{base}_scales", None, ir.DataType.FLOAT)
    scaled = ir.Node("", "Mul", [real.outputs[0], step.outputs[0]], name=graph.fresh_name(f"{base}_scaled", names))
    for part in (real, step, scaled):
        part.meta[REASON] = f"part of the embedding {base}"
    picked.name, picked.meta[KERNEL] = base, kernel
    picked.metadata_props.update(node.metadata_props)
    graph.replace_node(main, node, scaled)


def _node(
    main: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    names: set[str],
    name: str,
    shape: ir.Shape | None,
    kind: ir.DataType | None,
) -> ir.Node:
    made = ir.Node("", op_type, inputs, name=graph.fresh_name(name, names))
    made.outputs[0].name = graph.fresh_name(f"{name}_output", names)
    made.outputs[0].shape = shape
    made.outputs[0].type = ir.TensorType(kind) if kind is not None else None
    main.insert_before(before, made)
    return made


def _quantized(main: ir.Graph, table: ir.Value, spec: QuantSpec, names: set[str]) -> tuple[ir.Value, ir.Value]:
    """[rows, ...] -> codes of that shape, scales [rows, 1, ...]."""
    array = graph.constant(table)
    assert array is not None
    rows = array.reshape(len(array), -1)
    params = from_range(rows.min(axis=1), rows.max(axis=1), QuantSpec(spec.format, PerAxis(0), symmetric=True))
    shape = tuple(array.shape)
    del array, rows
    graph.release(table)

    def codes(array: NDArray[Any]) -> NDArray[Any]:
        return quantize(array.reshape(shape[0], -1), params).reshape(shape)

    base = str(table.name)
    made = weights.derived(main, table, codes, spec.format.storage, shape, graph.fresh_name(f"{base}_quantized", names))
    scale = np.asarray(params.scale, np.float32).reshape(-1, *[1] * (len(shape) - 1))
    return made, graph.add_initializer(main, ir.Tensor(scale), graph.fresh_name(f"{base}_row_scale", names))
