"""Gather(table, ids) -> Cast(Gather(codes, ids)) * Gather(scales, ids), the table in int8 with a scale for each row.

Only the rows that are picked are brought back to float; a DequantizeLinear before the Gather would do that with the
whole table at every run.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.qparams import from_range, quantize
from qgraph.spec import PerAxis, QuantSpec
from qgraph.strips import Strips
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["InsertRows"]

_WINDOW = 1 << 21
"""Bytes of float rows that a core has in hand at once."""


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
    """[rows, columns] -> codes of that shape, scales [rows, 1]; evaluated as the file is written."""
    shape = graph.run_shape(table) or (0, 0)
    source = weights.Shared(table, lambda rows: _rounded(rows, spec))
    base = str(table.name)

    def part(name: str, number: int, dtype: ir.DataType, *shape: int) -> ir.Value:
        return source.part(main, lambda made: made[number], dtype, shape, graph.fresh_name(f"{base}_{name}", names))

    return part("quantized", 0, spec.format.storage, *shape), part("row_scale", 1, ir.DataType.FLOAT, shape[0], 1)


def _rounded(table: Strips, spec: QuantSpec) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes and scales, a window of rows at a time."""
    count, width = table.shape
    codes, scale = np.empty((count, width), spec.format.storage.numpy()), np.empty((count, 1), np.float32)
    step = max(1, _WINDOW // (4 * max(1, width)))

    def part(start: int) -> None:
        here = slice(start, start + step)
        rows = table.window(here)
        params = from_range(rows.min(axis=1), rows.max(axis=1), QuantSpec(spec.format, PerAxis(0), symmetric=True))
        codes[here], scale[here, 0] = quantize(rows, params), params.scale

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(part, range(0, count, step)):
            pass
    return codes, scale
