"""softmax(scale q k' + mask) v, head by head -> Attention(q, k, v, mask), which reads heads where they lie.

Attention of ONNX's opset 23 takes [batch, positions, heads x channels]: no Transpose copies anything, and scores are
scaled, masked and normalized head by head, near the product that made them. The numbers are the same, but for rows
that a mask hides altogether: in parts they are NaN with minus infinity, and with the lowest float32 the mean of all
values (`BoundMasks` takes care of constants); here newer runtimes make both 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import version_converter

from qgraph import graph, sizes
from qgraph.attention import LOW, Attention, between, find, within
from qgraph.quiet import quiet
from qgraph.targets import Target

__all__ = ["FuseAttention"]

_Dim = int | ir.SymbolicDim
_READ = "its weights are read elsewhere, which the operator does not give away"
_OTHER = "it is in a form that is not followed: heads beside a cache, turned or in groups, say"


class FuseAttention(ir.passes.InPlacePass):
    """Attention in parts becomes one operator, where the target has a fast one; the model gets the opset that knows it.

    Refused, with the reason: queries, keys and values that are not seen to have one batch, masks that would repeat the
    scores, and whatever `qgraph.attention.find` does not follow. Without any query, key or batch the operator is an
    error of the runtime, where the parts make nothing of nothing.

    Attributes:
        refused: Softmax -> why what is around it stays in parts.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.refused = {}
        main, since = model.graph, self.target.attention
        if since is None:
            return ir.passes.PassResult(model, False)
        found = {node: one for node in main if (one := _found(node)) is not None}
        self.refused = {graph.label(node): one for node, one in found.items() if isinstance(one, str)}
        softmaxes = [node for node, one in found.items() if isinstance(one, Attention)]
        if not softmaxes or not _raised(model, since):
            return ir.passes.PassResult(model, False)
        writer = _Writer(main)
        for node in softmaxes:
            # Once more: what it reads may have been another's result.
            one = find(node)
            if one is not None:
                writer.replace(one)
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, True)


def _found(node: ir.Node) -> Attention | str | None:
    """The attention around a Softmax; why it stays in parts; None where there is none."""
    one = find(node)
    if one is not None:
        return _obstacle(one) or one
    if not between(node):
        return None
    return _OTHER if graph.only_reader(node.outputs[0]) is not None else _READ


def _raised(model: ir.Model, opset: int) -> bool:
    """Bring the model to an opset, if it can be done in place."""
    if model.graph.opset_imports.get("", 0) < opset:
        with quiet("onnxscript.version_converter"):
            version_converter.ConvertVersionPass(target_version=opset, fallback=False)(model)
    return model.graph.opset_imports.get("", 0) >= opset


def _obstacle(one: Attention) -> str | None:
    """What would have to be repeated but masks, or why what reads the result could not go on."""
    queries, keys, values = one.queries.shape, one.keys.shape, one.values.shape
    if queries is None or keys is None or values is None:
        return "the sizes of queries, keys or values are not known"
    if not one.one_batch or not graph.same_size(keys[1], values[1]):
        return "queries, keys and values are not seen to have one batch, and a value for each key"
    whole = (queries[0], one.heads, queries[1], keys[1])
    for mask in one.masks:
        if not within(mask, whole):
            return f"the mask {mask.name!r} is not seen to have the batch, the heads and the positions of the scores"
    # With the heads joined, the first two sizes are those that a 0 copied before, and the third is another. What is
    # computed from sizes is 0 where there is nothing at all.
    target, told = graph.constant(one.joined.inputs[1]), sizes.elements(one.joined.inputs[1])
    if target is None:
        fine = _joins(one) or (told is not None and 0 not in told)
    else:
        fine = 0 not in target[2:] and (0 not in target or one.joined.attributes.get_int("allowzero", 0) == 0)
    return None if fine else "the heads are not seen to be joined behind it"


def _joins(one: Attention) -> bool:
    """Whether the Reshape at the end makes [batch, positions, heads x channels], and nothing else."""
    before, after, queries = one.joined.inputs[0], one.joined.outputs[0].shape, one.queries.shape
    shape = before.shape if before is not None else None
    if shape is None or after is None or queries is None or len(shape) != 4 or len(after) != 3:
        return False
    target = graph.constant(one.joined.inputs[1])
    kept = [
        any(graph.same_size(from_[axis], after[axis]) for from_ in (shape, queries))
        or (target is not None and target[axis] == 0)
        for axis in (0, 1)
    ]
    whole = isinstance(shape[2], int) and isinstance(shape[3], int) and shape[2] * shape[3] == after[2]
    return all(kept) or (whole and any(kept))


def _broadcast(one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """The shape of a sum; None where no rank is known. A dimension that is not sure has no name."""
    if one is None or other is None:
        return None
    rank = max(len(one), len(other))
    first, second = ([*[1] * (rank - len(shape)), *shape.dims] for shape in (one, other))
    pairs = zip(first, second, strict=True)
    return ir.Shape([b if a == 1 else a if b == 1 or graph.same_size(a, b) else None for a, b in pairs])


class _Writer:
    """Writes the operators; masks that are brought to full size are, once."""

    def __init__(self, main: ir.Graph):
        self._main = main
        self._names = graph.value_names(main)
        self._masks: dict[tuple[object, ...], ir.Value] = {}  # By the masks that were added, or what was expanded.

    def replace(self, one: Attention) -> None:
        """Write `one` as an operator in the place of its last product."""
        base = one.product.name or one.product.outputs[0].name or "product"
        mask = self._full(one, self._bounded(one, self._sum(one, one.masks))) if one.masks else None
        attributes: list[ir.Attr] = [
            ir.AttrInt64("q_num_heads", one.heads),
            ir.AttrInt64("kv_num_heads", one.heads),
            ir.AttrFloat32("scale", one.scale),
        ]
        inputs = [one.queries, one.keys, one.values, *([] if mask is None else [mask])]
        last = ir.Node("", "Attention", inputs, attributes, name=graph.fresh_name(f"{base}_attention", self._names))
        last.metadata_props.update(one.product.metadata_props)
        graph.merge_origins(last, *one.nodes)
        if one.guard is not None:
            result = self._before(one, last)
            test = self._before(one, ir.Node("", "IsNaN", [result], name=self._name(base, "is_nan")), ir.DataType.BOOL)
            last = ir.Node("", "Where", [test, one.guard.inputs[1], result], name=self._name(base, "guard"))
        if _joins(one):
            seen = one.joined.outputs[0].meta.get(graph.RUN_SHAPE)
            last.outputs[0].meta.update({} if seen is None else {graph.RUN_SHAPE: seen})
            graph.replace_node(self._main, one.joined, last)
        else:
            one.joined.replace_input_with(0, self._before(one, last))

    def _name(self, base: str, kind: str) -> str:
        return graph.fresh_name(f"{base}_{kind}", self._names)

    def _before(self, one: Attention, node: ir.Node, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The node's result, of the shape of the queries but for the channels."""
        value, size = node.outputs[0], one.product.outputs[0]
        value.name, value.type = node.name, ir.TensorType(kind)
        ran, shape = graph.run_shape(size), size.shape
        if shape is not None and one.queries.shape is not None:
            width = shape[3] * one.heads if isinstance(shape[3], int) else None
            value.shape = ir.Shape([one.queries.shape[0], one.queries.shape[1], width])
        if ran is not None:
            value.meta[graph.RUN_SHAPE] = (ran[0], ran[2], ran[1] * ran[3])
        self._main.insert_before(one.joined, node)
        return value

    def _sum(self, one: Attention, key: tuple[ir.Value, ...]) -> ir.Value:
        """All masks in one; those that layers share are added once."""
        if len(key) == 2 and key not in self._masks:
            first, second = key
            shape = _broadcast(first.shape, second.shape)
            self._masks[key] = self._added(one, ir.Node("", "Add", [second, first]), f"{first.name}_sum", shape)
        return self._masks.get(key, key[0])

    def _bounded(self, one: Attention, mask: ir.Value) -> ir.Value:
        """The mask, brought up to the floor: with what is below all scores the sum of both is the mask."""
        if one.floor is None:
            return mask
        key = (mask, one.floor)
        if key not in self._masks:
            floor = self._initializer("lowest_score", np.maximum(LOW, np.float32(one.floor)))
            node = ir.Node("", "Max", [mask, floor])
            self._masks[key] = self._added(one, node, f"{mask.name}_bounded", mask.shape)
        return self._masks[key]

    def _full(self, one: Attention, mask: ir.Value) -> ir.Value:
        """The mask with a row for each query and a column for each key, which is how the operator wants it."""
        assert one.queries.shape is not None and one.keys.shape is not None and mask.shape is not None
        rows, columns = one.queries.shape[1], one.keys.shape[1]
        if (
            len(mask.shape) in (2, 4)
            and graph.same_size(mask.shape[-2], rows)
            and graph.same_size(mask.shape[-1], columns)
        ):
            return mask
        key = (mask, self._key(one.queries, rows), self._key(one.keys, columns))
        if key not in self._masks:
            target = self._target(one)
            node = ir.Node("", "Expand", [mask, target], name=self._name(mask.name or "mask", "full"))
            node.outputs[0].name, node.outputs[0].type = node.name, mask.type
            self._main.insert_before(one.joined, node)
            self._masks[key] = node.outputs[0]
        return self._masks[key]

    @staticmethod
    def _key(value: ir.Value, size: _Dim) -> object:
        """What is equal where sizes are known to be."""
        return size if isinstance(size, int) or size.value is not None else value

    def _target(self, one: Attention) -> ir.Value:
        """[1, 1, queries, keys]."""
        assert one.queries.shape is not None and one.keys.shape is not None
        rows, columns = one.queries.shape[1], one.keys.shape[1]
        if isinstance(rows, int) and isinstance(columns, int):
            return self._constant("mask_size", 1, 1, rows, columns)
        parts = [self._constant("mask_ones", 1, 1)]
        for value in (one.queries, one.keys):
            node = ir.Node("", "Shape", [value], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
            parts.append(self._added(one, node, f"{value.name}_positions"))
        return self._added(one, ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)]), "mask_size")

    def _constant(self, base: str, *numbers: int) -> ir.Value:
        return self._initializer(base, np.array(numbers, np.int64))

    def _initializer(self, base: str, array: NDArray[Any]) -> ir.Value:
        return graph.add_initializer(self._main, ir.tensor(array), graph.fresh_name(base, self._names))

    def _added(self, one: Attention, node: ir.Node, base: str, shape: ir.Shape | None = None) -> ir.Value:
        """What a new node makes, of the type of what it reads, or sizes."""
        made, first = node.outputs[0], node.inputs[0]
        node.name = made.name = graph.fresh_name(base, self._names)
        of_sizes = ir.TensorType(ir.DataType.INT64) if node.op_type in ("Shape", "Concat") else None
        made.type, made.shape = of_sizes or (first.type if first is not None else None), shape
        self._main.insert_before(one.joined, node)
        return made
