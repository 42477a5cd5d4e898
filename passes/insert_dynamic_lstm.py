"""LSTM(x, W, R) -> com.microsoft.DynamicQuantizeLSTM, W and R in int8 per gate and unit, transposed for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights
from qgraph.formats import INT8
from qgraph.qparams import QParams, from_range, quantize
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import KERNEL, Form, Kernel

__all__ = ["InsertDynamicLSTM"]

_PLAIN_INPUTS = 8


class InsertDynamicLSTM(ir.passes.InPlacePass):
    """Writes the LSTMs that annotation planned as dynamic.

    Refused: nothing; what cannot be written so was not planned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [node for node in main if _is_planned(node)]
        names = graph.value_names(main)
        for node in planned:
            _write(main, node, names)
        if planned:
            main.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.DYNAMIC and node.op_type == "LSTM"


def _write(main: ir.Graph, node: ir.Node, names: set[str]) -> None:
    kernel: Kernel = node.meta[KERNEL]
    assert kernel.weight is not None
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (_PLAIN_INPUTS - len(node.inputs))]
    spec = kernel.weight[1]
    for position in (1, 2):
        weight = node.inputs[position]
        assert weight is not None
        codes, scale, zero = _quantized(main, weight, spec, names)
        inputs[position] = codes
        inputs += [scale, zero]
    new = ir.Node(
        "com.microsoft",
        "DynamicQuantizeLSTM",
        inputs,
        attributes=[attribute for attribute in node.attributes.values() if attribute.name != "layout"],
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    graph.merge_origins(new, node)
    main.insert_before(node, new)
    for before, after in zip(node.outputs, new.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        before.name = None
    main.remove(node, safe=True)
    new.meta[KERNEL] = kernel


def _quantized(
    main: ir.Graph, weight: ir.Value, spec: QuantSpec, names: set[str]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """[directions, 4 H, K] -> codes [directions, K, 4 H], scales and zero points [directions, 4 H]."""
    array = graph.constant(weight)
    assert array is not None
    directions, gates, inner = array.shape
    each = QuantSpec(spec.format, PerAxis(0), symmetric=True)
    rows = array.reshape(directions * gates, inner)
    params: QParams = from_range(rows.min(axis=1), rows.max(axis=1), each)
    del array, rows
    graph.release(weight)

    def codes(array: NDArray[Any]) -> NDArray[Any]:
        found = quantize(array.reshape(directions * gates, inner), params).reshape(directions, gates, inner)
        return np.ascontiguousarray(found.transpose(0, 2, 1))

    base = str(weight.name)
    made = weights.derived(
        main,
        weight,
        codes,
        INT8.storage,
        (directions, inner, gates),
        graph.fresh_name(f"{base}_quantized", names),
    )
    scale = np.asarray(params.scale, np.float32).reshape(directions, gates)
    return (
        made,
        graph.add_initializer(main, ir.Tensor(scale), graph.fresh_name(f"{base}_scale", names)),
        graph.add_initializer(
            main, ir.Tensor(np.zeros((directions, gates), np.int8)), graph.fresh_name(f"{base}_zero_point", names)
        ),
    )
