"""Attention of [batch x heads, positions, channels] -> in four dimensions, with the heads in an axis of their own.

torch's nn.MultiheadAttention with its weights wanted (the default of need_weights), and BART, OPT, CLIP, Whisper and
others up to transformers 4.4x, flatten batch and heads for torch.bmm; masks come in a Reshape to four axes and back, or
flattened, too. Each axis is followed through these moves; then heads are written the way that `FuseAttention` and most
runtimes know. Since the product of two stacks repeats none that has more than one matrix, queries, keys and values of
several heads have one batch, whatever their sizes are called.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.attention import between
from qgraph.flat_attention import FlatAttention, Mask, find
from qgraph.head_reads import HeadRead, unscaled
from qgraph.head_writer import HeadWriter
from qgraph.targets import Target

__all__ = ["LiftHeads"]

_Dim = int | ir.SymbolicDim
_SINCE = 15
"""Before this opset a Shape gives all sizes or none, and a Split has its sizes in an attribute."""


class LiftHeads(ir.passes.InPlacePass):
    """Products, masks and Softmax of an attention have heads in an axis of their own.

    Left alone: targets without an operator for attention, single heads, scores and weights that are read elsewhere, and
    whatever is not seen to be heads or a mask that repeats none of them.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.target.attention is None or model.graph.opset_imports.get("", 0) < _SINCE:
            return ir.passes.PassResult(model, False)
        writer, changed = _Lifter(model.graph), False
        for node in list(model.graph):
            flat = find(node) if between(node) else None
            if flat is not None:
                writer.lift(flat)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, changed)


class _Lifter:
    """Writes attentions in four dimensions."""

    def __init__(self, main: ir.Graph):
        self._writer = HeadWriter(main)

    def lift(self, flat: FlatAttention) -> None:
        """Write it; what it was is left without a reader."""
        queries, keys, values = flat.reads
        batch = _best([one.batch for one in flat.reads])
        rows, columns, heads = queries.positions, keys.positions, queries.heads
        left, right = self._side(flat.first, 0, queries, batch), self._side(flat.first, 1, keys, batch)
        scores: list[_Dim] = [batch, heads, rows, columns]
        value = self._again(flat.first, [left, right], scores)
        for step, mask in flat.steps:
            inputs = list(step.node.inputs)
            inputs[step.side] = value
            if mask is not None:
                inputs[1 - step.side] = self._apart(mask, heads, batch)
            value = self._again(step.node, inputs, scores)
        weights = self._again(flat.softmax, [value], scores, [ir.AttrInt64("axis", -1)])
        size: list[_Dim] = [batch, heads, rows, values.size]
        result = self._again(flat.last, [weights, self._writer.heads(values, batch)], size)
        self._writer.join(flat.joined, result, [batch, rows, heads, values.size], flat.swapped, flat.whole)

    def _side(self, product: ir.Node, side: int, read: HeadRead, batch: _Dim) -> ir.Value:
        """Queries or keys, multiplied as they were."""
        value = self._writer.heads(read, batch)
        assert value.shape is not None
        shape = list(value.shape)
        before, scaled = unscaled(product.inputs[side])
        for node in reversed(scaled):
            value = self._again(node, [value if one is before else one for one in node.inputs], shape)
            before = node.outputs[0]
        return value

    def _again(
        self, node: ir.Node, inputs: list[ir.Value | None], shape: list[_Dim], attributes: list[ir.Attr] | None = None
    ) -> ir.Value:
        """The same operator on these inputs."""
        made = self._writer.node(node.op_type, inputs, [shape], attributes or list(node.attributes.values()))[0]
        again = made.producer()
        assert again is not None
        again.metadata_props.update(node.metadata_props)
        graph.merge_origins(again, node)
        return made

    def _apart(self, mask: Mask, heads: int, batch: _Dim) -> ir.Value:
        """The mask with four axes, or fewer."""
        if not mask.apart:
            return mask.value
        shape = mask.value.shape
        assert shape is not None
        rest = list(shape[1:])
        numbers = [one for one in rest if isinstance(one, int)]
        if len(numbers) == len(rest):
            target = self._writer.constant("mask_shape", -1, heads, *numbers)
        else:
            key, since = ("MaskRest", mask.value), [ir.AttrInt64("start", 1)]
            [sizes] = self._writer.node("Shape", [mask.value], [[2]], since, key, ir.DataType.INT64)
            lead = self._writer.constant("mask_heads", -1, heads)
            along = [ir.AttrInt64("axis", 0)]
            [target] = self._writer.node(
                "Concat", [lead, sizes], [[4]], along, ("MaskShape", mask.value), ir.DataType.INT64
            )
        after = [batch, heads, *rest]
        return self._writer.node("Reshape", [mask.value, target], [after], key=("Mask", mask.value, heads))[0]


def _best(dims: list[_Dim]) -> _Dim:
    """Of names of one size, the one that tells most."""
    return min(dims, key=lambda dim: 0 if isinstance(dim, int) else 1 if graph.is_named(dim) else 2)
