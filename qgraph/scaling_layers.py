"""Layers, norms and attention: which of their constants take a factor in, on the reading and on the making side."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph, ternary
from qgraph.layouts import along, only
from qgraph.spread import Layout, Rule, Spread

__all__ = ["RULES"]


def _sides(spread: Spread, node: ir.Node, axis: int) -> tuple[Layout | None, Layout | None]:
    """[channels] of the node's input and output; what does not lie along `axis` freezes."""
    found: list[Layout | None] = []
    for value in (node.inputs[0], node.outputs[0]):
        layout = spread.layouts.get(value) if value is not None else None
        channels = None if layout is None else only(layout, axis)
        if layout is not None and channels is None:
            spread.freeze(layout, f"{node.op_type} mixes what is scaled apart", value)
        found.append(channels)
    for value in node.inputs[1:]:
        if value is not None and value in spread.layouts:
            spread.freeze(spread.layouts[value], f"a weight or bias of {node.op_type} is computed at run time", value)
    if ternary.grid_of(node.inputs[1]) is not None:
        for value, layout in zip((node.inputs[0], node.outputs[0]), found, strict=True):
            why = f"the weight of {node.op_type} has three values, and any factor would end that"
            spread.freeze(layout, why, value)
        return None, None
    return found[0], found[1]


def _made(spread: Spread, node: ir.Node, channels: Layout, *positions: int) -> None:
    """Constants with one number for each channel that the node makes."""
    for position in positions:
        if len(node.inputs) > position and node.inputs[position] is not None:
            spread.edit(node, position, channels, divides=True)


def _conv(spread: Spread, node: ir.Node) -> None:
    """[made, read in a group, kernel...]; read in a group, made... where transposed."""
    shape, groups = graph.run_shape(node.inputs[1]), node.attributes.get_int("group", 1)
    read, made = _sides(spread, node, 1)
    if shape is None:
        for channels in (read, made):
            spread.freeze(channels, "the weight's shape is not known")
        return
    flat = (1,) * (len(shape) - 2)
    transposed = node.op_type == "ConvTranspose"
    if read is not None:
        if transposed:
            spread.edit(node, 1, read.reshape(-1, 1, *flat), divides=False)
        else:
            rows = np.repeat(read.reshape(groups, -1), shape[0] // groups, axis=0) if groups > 1 else read[None]
            spread.edit(node, 1, rows.reshape(*rows.shape, *flat), divides=False)
    if made is not None:
        if transposed:
            rows = np.repeat(made.reshape(groups, -1), shape[0] // groups, axis=0) if groups > 1 else made[None]
            spread.edit(node, 1, rows.reshape(*rows.shape, *flat), divides=True)
        else:
            spread.edit(node, 1, made.reshape(-1, 1, *flat), divides=True)
        _made(spread, node, made, 2)


def _gemm(spread: Spread, node: ir.Node) -> None:
    if node.attributes.get_int("transA", 0):
        for value in (*node.inputs, *node.outputs):
            spread.freeze(spread.layouts.get(value) if value is not None else None, "Gemm with transA", value)
        return
    read, made = _sides(spread, node, -1)
    rows = 1 if node.attributes.get_int("transB", 0) else 0
    if read is not None:
        spread.edit(node, 1, along(read, rows, 2), divides=False)
    if made is not None:
        spread.edit(node, 1, along(made, 1 - rows, 2), divides=True)
        _made(spread, node, made, 2)


def _matmul(spread: Spread, node: ir.Node) -> None:
    """With a constant on the right: a layer. Of two activations: what is scaled apart from the sum passes through."""
    left, right = node.inputs
    if graph.has_constant(right) and len(graph.run_shape(right) or ()) == 2:
        read, made = _sides(spread, node, -1)
        if read is not None:
            spread.edit(node, 1, along(read, 0, 2), divides=False)
        if made is not None:
            spread.edit(node, 1, along(made, 1, 2), divides=True)
        return
    result = node.outputs[0]
    rank = len(graph.run_shape(result) or ())
    known = {value: spread.layouts[value] for value in (left, right) if value is not None and value in spread.layouts}
    passes = [
        layout
        for value, layout in known.items()
        if rank >= 2 and layout.ndim >= 2 and (layout.shape[-2] == 1 if value is right else layout.shape[-1] == 1)
    ]
    if len(known) == 1 and len(passes) == 1 and left is not right:
        layout = passes[0]
        spread.need(result, layout.reshape((1,) * (rank - layout.ndim) + layout.shape))
        return
    for stopped in (*known.values(), spread.layouts.get(result)):
        spread.freeze(stopped, "a product of activations sums over what is scaled", result)


def _norm(*positions: int, axis: int) -> Rule:
    """Gain and bias at these inputs take in the factor of the output; the input's scale is lost in the norm."""

    def rule(spread: Spread, node: ir.Node) -> None:
        source, result = node.inputs[0], node.outputs[0]
        layout = spread.layouts.get(result)
        for value in node.inputs:
            if value is not None and value in spread.layouts:
                spread.freeze(spread.layouts[value], f"{node.op_type} does not carry a factor through", value)
        if layout is None:
            return
        channels = only(layout, axis)
        last = node.attributes.get_int("axis", -1) % layout.ndim == layout.ndim - 1
        gain = graph.run_shape(node.inputs[positions[0]])
        if channels is None or (axis == -1 and not last) or gain != channels.shape:
            spread.freeze(layout, f"the gain of {node.op_type} is not along the channels", source)
        else:
            _made(spread, node, channels, *positions)

    return rule


def _attention(bias: int | None, past: slice) -> Rule:
    """The values' channels go through, [batch, positions, heads x size] or heads apart; queries and keys do not.

    Args:
        bias: the input with one number for each channel of queries, keys and values.
        past: the inputs with keys and values of earlier positions.
    """

    def rule(spread: Spread, node: ir.Node) -> None:
        result = node.outputs[0]
        value = node.inputs[2] if len(node.inputs) > 2 else None
        layout = spread.layouts.get(value) if value is not None else None
        shape, after = graph.run_shape(value), graph.run_shape(result)
        others = [v for v in (*node.inputs[:2], *node.inputs[3:], *node.outputs[1:]) if v is not None]
        for other in others:
            spread.freeze(spread.layouts.get(other), f"{node.op_type} does not carry a factor through", other)
        # Groups of heads that share their values have fewer channels than the result.
        followed = shape is not None and after is not None and len(shape) == len(after) and shape[-1:] == after[-1:]
        more = any(v.name for v in node.outputs[1:]) or any(v is not None for v in node.inputs[past])
        carried = None
        if layout is not None and shape is not None and after is not None and followed and not more:
            if len(shape) == 3 and (channels := only(layout, -1)) is not None:
                carried = along(channels, 2, 3)
            elif bias is None and len(shape) == 4 and shape[1] == after[1] and layout.shape[-2] == 1:
                carried = layout
        if carried is None:
            for one in (layout, spread.layouts.get(result)):
                spread.freeze(one, f"{node.op_type} in a form whose heads are not followed", result)
            return
        spread.need(result, carried)
        given = node.inputs[bias] if bias is not None and len(node.inputs) > bias else None
        if bias is not None and given is not None:
            channels = carried.reshape(-1)
            size = (graph.run_shape(given) or (0,))[0] - channels.size
            spread.edit(node, bias, np.concatenate([np.full(max(0, size), -1), channels]), divides=True)

    return rule


_TWO = _norm(1, 2, axis=-1)

RULES: dict[tuple[str, str], Rule] = {
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv,
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("", "LayerNormalization"): _TWO,
    ("", "RMSNormalization"): _norm(1, axis=-1),
    ("", "SimplifiedLayerNormalization"): _norm(1, axis=-1),
    ("com.microsoft", "SimplifiedLayerNormalization"): _norm(1, axis=-1),
    ("com.microsoft", "SkipLayerNormalization"): _norm(2, 3, axis=-1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _norm(2, axis=-1),
    ("", "BatchNormalization"): _norm(1, 2, axis=1),
    ("", "InstanceNormalization"): _norm(1, 2, axis=1),
    ("com.microsoft", "MultiHeadAttention"): _attention(3, slice(6, 8)),
    ("", "Attention"): _attention(None, slice(4, 6)),
}
"""Operators with weights, and those that are made of them."""
