"""Heads that came by way of a flattened batch -> Reshape [batch, positions, heads, channels] and one Transpose.

torch's nn.MultiheadAttention computes with positions first, takes queries, keys and values from one tensor by five
moves, and splits off the heads together with the batch (torch 2.13, both exporters). What is moved to where is read off
the axes, in whatever steps; then it is written the way that `FuseAttention` and most runtimes know.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph, sizes
from qgraph.attention import between, upwards, within
from qgraph.head_reads import HeadRead, read, unscaled
from qgraph.head_writer import HeadWriter
from qgraph.heads import FRONT, TURNED, is_default
from qgraph.targets import Target

__all__ = ["PlainHeads"]

_BACK = (2, 0, 1, 3)
"""How heads go back where positions come first."""
_SINCE = 13
"""Before this opset the sizes of a Split are an attribute."""


class PlainHeads(ir.passes.InPlacePass):
    """Queries, keys and values of an attention come by one Reshape and one Transpose, and its result goes so.

    Left alone: targets without an operator for attention; what is read and written the plain way already, and whatever
    is not seen to be heads, since a size has no name or its parts are not one after the other.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        if self.target.attention is None or model.graph.opset_imports.get("", 0) < _SINCE:
            return ir.passes.PassResult(model, False)
        writer = HeadWriter(model.graph)
        changed = [_plain(node, writer) for node in list(model.graph) if between(node)]
        if any(changed):
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, any(changed))


def _products(softmax: ir.Node) -> tuple[ir.Node, ir.Node, list[ir.Value]] | None:
    """The products before and behind, and the masks between the first and Softmax."""
    last, found = graph.only_reader(softmax.outputs[0], "MatMul"), upwards(softmax.inputs[0])
    if last is None or found is None:
        return None
    first, steps = found
    if last is first or any(step.node.op_type == "Reshape" for step in steps):
        return None
    masks = [step.node.inputs[1 - step.side] for step in steps if step.node.op_type not in ("Mul", "Div")]
    return first, last, [one for one in masks if one is not None]


def _guarded(result: ir.Value) -> ir.Value:
    """Where(IsNaN(o), 0, o) behind a product o, if that is all that reads it; else the product."""
    users = result.consumers()
    where = next((user for user in users if graph.is_standard(user, "Where")), None)
    if where is None or len(users) != 2 or result.is_graph_output():
        return result
    test = graph.producer(where.inputs[0], "IsNaN")
    guards = test is not None and test.inputs[0] is result and test in users and where.inputs[2] is result
    number = graph.run_shape(where.inputs[1])
    return where.outputs[0] if guards and number is not None and len(number) <= 1 and set(number) <= {1} else result


def _fit(reads: list[HeadRead], masks: list[ir.Value]) -> bool:
    """Whether nothing is repeated on the way, so that the result is [batch, heads, queries, channels of the values]."""
    queries, keys, values = reads
    same = graph.same_size(queries.batch, keys.batch) and graph.same_size(keys.batch, values.batch)
    if not (same or queries.source is keys.source is values.source) or len({one.heads for one in reads}) > 1:
        return False
    whole = (queries.batch, queries.heads, queries.positions, keys.positions)
    return all(mask.shape is not None and within(mask, whole) for mask in masks)


def _plain(softmax: ir.Node, writer: HeadWriter) -> bool:
    """Whether anything had to be written."""
    products = _products(softmax)
    if products is None:
        return False
    first, last, masks = products
    reads = [
        read(value, order)
        for value, order in (
            (unscaled(first.inputs[0])[0], FRONT),
            (unscaled(first.inputs[1])[0], TURNED),
            (last.inputs[1], FRONT),
        )
    ]
    found = [one for one in reads if one is not None]
    if len(found) < len(reads) or all(one.plain for one in found):
        return False
    if any(one.value.is_graph_output() and not one.plain for one in found) or not _fit(found, masks):
        return False
    back = _back(last, found[0])
    if back is None:
        return False
    for one in found:
        if not one.plain:
            one.value.replace_all_uses_with(writer.heads(one))
    if tuple(back.attributes.get_ints("perm", [])) == _BACK:
        _join(back, found[0], found[2], writer)
    return True


def _back(last: ir.Node, queries: HeadRead) -> ir.Node | None:
    """The Transpose that brings the heads back, if what reads it can be told that they are joined."""
    result = _guarded(last.outputs[0])
    back = graph.only_reader(result, "Transpose")
    joined = graph.only_reader(back.outputs[0], "Reshape") if back is not None else None
    if back is None or joined is None or joined.inputs[0] is not back.outputs[0]:
        return None
    order = tuple(back.attributes.get_ints("perm", []))
    if order == FRONT:
        return back
    target, told = graph.constant(joined.inputs[1]), sizes.elements(joined.inputs[1])
    if order != _BACK or is_default(joined.inputs[1]) or queries.source.shape is None:
        return None
    # A 0 says the same of both first axes with the heads joined; of a third it would not.
    if target is None:
        return back if told is not None and 0 not in told else None
    kept = joined.attributes.get_int("allowzero", 0) == 0
    return back if 0 not in target[2:] and (kept or 0 not in target) else None


def _join(back: ir.Node, queries: HeadRead, values: HeadRead, writer: HeadWriter) -> None:
    """The heads joined as [batch, positions, ..], and only then positions first."""
    joined, result = back.outputs[0].consumers()[0], back.inputs[0]
    assert result is not None
    lead, width = [queries.batch, queries.positions], queries.heads * values.size
    after = joined.outputs[0].shape
    whole = after is not None and len(after) == 3 and after[2] == width
    whole = whole and after is not None and all(map(graph.same_size, after[:2], lead[::-1]))
    writer.join(joined, result, [*lead, queries.heads, values.size], True, whole)
