"""MatMulNBits(x, A), MatMulNBits(x, B) -> Split(MatMulNBits(x, [A, B])), where one of them is small.

Queries, keys and values are products of the same x. For one row of x, as in generation, each call costs as much again
as reading a small weight: the row is brought to int8 anew, and the threads meet once more. For many rows the Split's
copy outweighs that where the products are large, which are left apart (tools/measure_decode.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.targets import KERNEL

__all__ = ["JoinProducts"]

_SMALL = 1 << 20
"""Weights of a product that is small: half a megabyte in four bits, read in 30 us."""
_ARRAYS = (1, 2, 3)
"""Inputs of MatMulNBits that hold a row for each column: codes, scales, zero points."""
_BIAS = 5


class JoinProducts(ir.passes.InPlacePass):
    """Products in blocks with the same input and of the same form become one, one of them being small.

    Refused: different bits, blocks or accuracy levels; codes that other nodes read, too; products of weights that come
    in another order of columns (g_idx).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        groups: dict[tuple[object, ...], list[ir.Node]] = {}
        for node in main:
            if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits") and _simple(node):
                groups.setdefault(_form(node), []).append(node)
        groups = {key: nodes for key, nodes in groups.items() if len(nodes) > 1 and any(map(_is_small, nodes))}
        names = graph.value_names(main) if groups else set[str]()
        for nodes in groups.values():
            _join(main, nodes, names)
        if groups:
            common.RemoveUnusedNodesPass()(model)
            # The joined product stands where the first was; what the others' constants needed may come later.
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, bool(groups))


def _simple(node: ir.Node) -> bool:
    """Whether its constants are its own."""
    arrays = [v for v in node.inputs[1:] if v is not None]
    alone = all(graph.has_constant(v) and len(v.uses()) == 1 for v in arrays if v is not _at(node, _BIAS))
    return alone and _at(node, 4) is None and (_at(node, _BIAS) is None or graph.has_constant(_at(node, _BIAS)))


def _form(node: ir.Node) -> tuple[object, ...]:
    alike = tuple(node.attributes.get_int(name, -1) for name in ("K", "bits", "block_size", "accuracy_level"))
    return node.inputs[0], *alike, *(None if (v := _at(node, i)) is None else v.dtype for i in _ARRAYS)


def _is_small(node: ir.Node) -> bool:
    return node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0) < _SMALL


def _at(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def _join(main: ir.Graph, nodes: list[ir.Node], names: set[str]) -> None:
    first = nodes[0]
    sizes = [node.attributes.get_int("N", 0) for node in nodes]
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for position in _ARRAYS:
        parts = [_at(node, position) for node in nodes]
        inputs.append(_stacked(main, [part for part in parts if part is not None], names))
    if any(_at(node, _BIAS) is not None for node in nodes):
        biases = [graph.constant(_at(node, _BIAS)) for node in nodes]
        row = np.concatenate([np.zeros(n, np.float32) if b is None else b for n, b in zip(sizes, biases, strict=True)])
        name = graph.fresh_name(f"{first.name}_joined_bias", names)
        inputs += [None, graph.add_initializer(main, ir.Tensor(row), name)]
    attributes = [a for a in first.attributes.values() if a.name != "N"] + [ir.AttrInt64("N", sum(sizes))]
    joined = ir.Node(first.domain, first.op_type, inputs, attributes, name=first.name)
    joined.meta.update(first.meta)
    joined.metadata_props.update(first.metadata_props)
    joined.meta[graph.JOINED] = tuple(name for node in nodes for name in graph.planned_names(node))
    whole = joined.outputs[0]
    whole.name, whole.type = graph.fresh_name(f"{first.name}_joined", names), first.outputs[0].type
    shape = first.outputs[0].shape
    whole.shape = None if shape is None else ir.Shape([*shape[:-1], sum(sizes)])
    lengths = graph.add_initializer(
        main, ir.Tensor(np.array(sizes, np.int64)), graph.fresh_name(f"{first.name}_sizes", names)
    )
    split = ir.Node(
        "", "Split", [whole, lengths], [ir.AttrInt64("axis", -1)], num_outputs=len(nodes),
        name=graph.fresh_name(f"{first.name}_split", names),
    )  # fmt: skip
    main.insert_before(first, [joined, split])
    for node, value in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        value.name, value.type, value.shape = old.name, old.type, old.shape
        graph.merge_origins(joined, node)
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        old.name = None
    main.remove(nodes, safe=True)
    kernel = first.meta.get(KERNEL)
    if kernel is not None:
        joined.meta[KERNEL] = kernel


def _stacked(main: ir.Graph, parts: list[ir.Value], names: set[str]) -> ir.Value | None:
    """The constants one below the other, read when the file is written."""
    tensors = [part.const_value for part in parts if part.const_value is not None]
    if not tensors:
        return None
    name = graph.fresh_name(f"{parts[0].name}_joined", names)
    shape = ir.Shape([sum(int(t.shape.numpy()[0]) for t in tensors), *tensors[0].shape.numpy()[1:]])

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors]), name=name)

    return graph.add_initializer(main, ir.LazyTensor(evaluate, tensors[0].dtype, shape, name=name), name)
