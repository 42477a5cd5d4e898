"""Which operators carry a factor for each channel through, and which take it into a constant: a rule for each.

A rule sees the layouts of a node's inputs and outputs as far as they are known, and says what the others must be.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.layouts import aligned, along, reshaped, trimmed
from qgraph.spread import Layout, Rule, Spread

__all__ = ["RULES"]

_BOUNDED = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh")
"""What makes the gate of a product: the other operand is the one that can be scaled."""


def _freeze(spread: Spread, node: ir.Node, reason: str) -> None:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value in spread.layouts:
            spread.freeze(spread.layouts[value], reason, value)


def _same(spread: Spread, node: ir.Node) -> None:
    """f(x / s) = f(x) / s for each element: input and output share their layout."""
    source, result = node.inputs[0], node.outputs[0]
    for value in (*node.inputs[1:], *node.outputs[1:]):
        if value is not None and value in spread.layouts:
            spread.freeze(spread.layouts[value], f"{node.op_type} does not carry a factor through", value)
    layout = _known(spread, source)
    layout = _known(spread, result) if layout is None else layout
    if layout is not None:
        spread.need(source, layout)
        spread.need(result, layout)


def _known(spread: Spread, value: ir.Value | None) -> Layout | None:
    return None if value is None else spread.layouts.get(value)


def _ignore(spread: Spread, node: ir.Node) -> None:
    """Only the shape is read."""


def _clip(spread: Spread, node: ir.Node) -> None:
    """Only bounds of 0 and infinity move with a factor; Clip(x, 0, 6) would need a bound for each channel."""
    low, high = graph.clip_bounds(node)
    if low in (0.0, -math.inf) and high in (0.0, math.inf):
        _same(spread, node)
    else:
        _freeze(spread, node, "Clip has a bound that would have to differ between channels")


def _pool(spread: Spread, node: ir.Node) -> None:
    """Positions are mixed, channels are not."""
    for value in (node.inputs[0], node.outputs[0]):
        layout = _known(spread, value)
        if layout is not None and any(size > 1 for size in layout.shape[2:]):
            spread.freeze(layout, f"{node.op_type} mixes its positions", value)
            return
    _same(spread, node)


def _reduce(spread: Spread, node: ir.Node) -> None:
    """A mean, sum or extreme over axes along which the factor does not change."""
    source, result = node.inputs[0], node.outputs[0]
    layout, before, after = _known(spread, source), graph.run_shape(source), graph.run_shape(result)
    axes = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", [])
    if layout is None or before is None or after is None or axes is None:
        _freeze(spread, node, f"{node.op_type} is not followed back")
        return
    chosen = {int(a) % len(before) for a in np.reshape(axes, -1)} or set(range(len(before)))
    if any(layout.shape[a] > 1 for a in chosen):
        spread.freeze(layout, f"{node.op_type} mixes channels", source)
        return
    kept = [a for a in range(len(before)) if a not in chosen]
    spread.need(result, layout if len(after) == len(before) else layout.transpose(*kept, *chosen).reshape(
        [layout.shape[a] for a in kept]
    ))  # fmt: skip


def _pad(spread: Spread, node: ir.Node) -> None:
    pads = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    layout = _known(spread, node.inputs[0])
    layout = _known(spread, node.outputs[0]) if layout is None else layout
    filled = node.inputs[2] if len(node.inputs) > 2 else None
    zero = filled is None or graph.constant_scalar(filled) == 0.0
    plain = len(node.inputs) < 4 or node.inputs[3] is None
    if layout is None or pads is None or not plain or not zero or pads.size != 2 * layout.ndim:
        _freeze(spread, node, "Pad with other numbers than zero")
    elif any(layout.shape[i % layout.ndim] > 1 and pad for i, pad in enumerate(pads.reshape(-1))):
        _freeze(spread, node, "Pad adds channels")
    else:
        _same(spread, node)


def _reshape(spread: Spread, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the same on the layout, in both directions."""
    source, result = node.inputs[0], node.outputs[0]
    before, after = graph.run_shape(source), graph.run_shape(result)
    forth, back = _known(spread, source), _known(spread, result)
    if before is None or after is None:
        _freeze(spread, node, "its shape is not known")
    elif forth is not None:
        spread.need(result, reshaped(forth, before, after), source)
    elif back is not None:
        spread.need(source, reshaped(back, after, before), result)


def _transpose(spread: Spread, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    forth, back = _known(spread, source), _known(spread, result)
    found = forth if forth is not None else back
    if found is None:
        return
    order = node.attributes.get_ints("perm", list(reversed(range(found.ndim))))
    if forth is not None:
        spread.need(result, forth.transpose(order))
    else:
        spread.need(source, found.transpose(np.argsort(order)))


def _expand(spread: Spread, node: ir.Node) -> None:
    layout, shape = _known(spread, node.inputs[0]), graph.run_shape(node.outputs[0])
    if layout is None or shape is None:
        _freeze(spread, node, "Expand is not followed back")
    else:
        spread.need(node.outputs[0], aligned(layout, len(shape)))


def _split(spread: Spread, node: ir.Node) -> None:
    layout = _known(spread, node.inputs[0])
    if layout is None:
        _freeze(spread, node, "Split is not followed back")
        return
    axis = node.attributes.get_int("axis", 0) % layout.ndim
    shapes = [graph.run_shape(value) for value in node.outputs]
    ends = list(accumulate(shape[axis] if shape else 0 for shape in shapes))
    for value, shape, end in zip(node.outputs, shapes, ends, strict=True):
        if shape is None:
            spread.freeze(layout, "its shape is not known", value)
            return
        part = layout if layout.shape[axis] == 1 else layout.take(range(end - shape[axis], end), axis=axis)
        spread.need(value, part)


def _slice(spread: Spread, node: ir.Node) -> None:
    layout, shape = _known(spread, node.inputs[0]), graph.run_shape(node.inputs[0])
    numbers = [graph.constant(value) for value in node.inputs[1:]]
    if layout is None or shape is None or any(n is None for n in numbers) or len(numbers) < 2:
        _freeze(spread, node, "Slice is not followed back, or its bounds are not constant")
        return
    starts, ends, *rest = (np.reshape(n, -1).tolist() for n in numbers)  # type: ignore[arg-type]
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if layout.shape[axis] > 1:
            where = slice(start, end if step > 0 or end >= -shape[axis] else None, step)
            layout = layout.take(np.arange(shape[axis])[where], axis=axis)
    spread.need(node.outputs[0], layout)


def _gather(spread: Spread, node: ir.Node) -> None:
    layout, indices = _known(spread, node.inputs[0]), node.inputs[1]
    rank = len(graph.run_shape(indices) or ()) if graph.run_shape(indices) is not None else None
    if layout is None or rank is None:
        _freeze(spread, node, "Gather is not followed back, or the shape of its indices is not known")
        return
    axis = node.attributes.get_int("axis", 0) % layout.ndim
    array = np.zeros((1,) * rank, np.intp) if layout.shape[axis] == 1 else graph.constant(indices)
    if array is None:
        spread.freeze(layout, "Gather takes channels chosen at run time", node.inputs[0])
    else:
        spread.need(node.outputs[0], layout.take(array, axis=axis))


def _concat(spread: Spread, node: ir.Node) -> None:
    """Along the channels: what is joined shares a range, so it is scaled together; along others: one layout."""
    result = node.outputs[0]
    shape = graph.run_shape(result)
    layouts = [_known(spread, value) for value in node.inputs]
    shapes = [graph.run_shape(value) for value in node.inputs]
    if shape is None or any(s is None for s in shapes):
        _freeze(spread, node, "its shape is not known")
        return
    axis = node.attributes.get_int("axis", 0) % len(shape)
    whole = _known(spread, result)
    joined = whole is not None and whole.shape[axis] > 1
    if joined or any(found is not None and found.shape[axis] > 1 for found in layouts):
        if any(n > 1 for found in layouts if found is not None for i, n in enumerate(found.shape) if i != axis):
            _freeze(spread, node, "joined along one of several axes of channels")
            return
        ends = list(accumulate(s[axis] for s in shapes if s is not None))
        parts: list[Layout] = []
        for found, part, end in zip(layouts, shapes, ends, strict=True):
            size = part[axis] if part is not None else 0
            if found is not None and size > 1 and found.shape[axis] == 1:
                found = np.repeat(found, size, axis=axis)
            if found is None:
                found = whole.take(range(end - size, end), axis=axis) if joined and whole is not None else None
            parts.append(along(spread.fresh(size), axis, len(shape)) if found is None else found)
        for position, layout in enumerate(parts):
            spread.operand(node, position, layout)
        spread.need(result, np.concatenate(parts, axis=axis))
        return
    found = next((one for one in (whole, *layouts) if one is not None), None)
    if found is not None:
        for position in range(len(node.inputs)):
            spread.operand(node, position, found)
        spread.need(result, found)


def _sum(spread: Spread, node: ir.Node) -> None:
    """Add, Sub, Sum, Mean, Max, Min: all operands are scaled alike."""
    result = node.outputs[0]
    shape = graph.run_shape(result)
    found = next((one for v in (result, *node.inputs) if (one := _known(spread, v)) is not None), None)
    if shape is None or found is None:
        _freeze(spread, node, "its shape is not known")
        return
    layout = aligned(found, len(shape))
    for position, value in enumerate(node.inputs):
        rank = len(graph.run_shape(value) or ())
        spread.operand(node, position, trimmed(layout, rank))
    spread.need(result, layout)


def _product(spread: Spread, node: ir.Node) -> None:
    """A product carries the factor of one operand through; a constant operand can take in that of the result."""
    left, right = node.inputs
    result = node.outputs[0]
    shape = graph.run_shape(result)
    known = [_known(spread, left), _known(spread, right)]
    divides = node.op_type == "Div"
    if shape is None or (known[0] is not None and known[1] is not None) or (divides and known[1] is not None):
        _freeze(spread, node, "both factors of a product would be scaled, or a divisor")
        return
    given = known[0] if known[0] is not None else known[1]
    if given is not None:
        spread.need(result, aligned(given, len(shape)))
        return
    layout = _known(spread, result)
    if layout is None:
        return
    for position, value in enumerate((left, right)):
        if graph.has_constant(value):
            rank = len(graph.run_shape(value) or ())
            spread.edit(node, position, trimmed(layout, rank), divides=not (divides and position == 1))
            return
    whole = [v for v in (left, right)[: 1 if divides else 2] if _carries(v, layout)]
    if len(whole) == 1:
        spread.need(whole[0], trimmed(layout, len(graph.run_shape(whole[0]) or ())))
    else:
        spread.freeze(layout, "a product in which either operand could be scaled", result)


def _carries(value: ir.Value | None, layout: Layout) -> bool:
    """Whether an operand has all channels of the result, and is not a gate."""
    shape = graph.run_shape(value)
    if shape is None or graph.producer(value, *_BOUNDED) is not None or len(shape) > layout.ndim:
        return False
    sizes = (1,) * (layout.ndim - len(shape)) + shape
    return all(n in (1, m) for n, m in zip(layout.shape, sizes, strict=True))


RULES: dict[tuple[str, str], Rule] = {
    **dict.fromkeys((("", op) for op in ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Abs", "Neg")), _same),
    **dict.fromkeys((("", op) for op in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")), _pool),
    **dict.fromkeys((("", op) for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")), _reduce),
    **dict.fromkeys((("", op) for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")), _reshape),
    **dict.fromkeys((("", op) for op in ("Add", "Sub", "Sum", "Mean", "Max", "Min")), _sum),
    **dict.fromkeys((("", op) for op in ("Mul", "Div")), _product),
    **dict.fromkeys((("", op) for op in ("Shape", "Size")), _ignore),
    ("", "Clip"): _clip,
    ("", "Pad"): _pad,
    ("", "Transpose"): _transpose,
    ("", "Expand"): _expand,
    ("", "Split"): _split,
    ("", "Slice"): _slice,
    ("", "Gather"): _gather,
    ("", "Concat"): _concat,
}
"""Operators that move or combine channels; `qgraph.scaling_layers` has those with weights."""
