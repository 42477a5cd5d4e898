"""Finds what can be scaled channel by channel without a change in what the graph computes, and scales it.

A group is a set of channels with what makes them (layers, gains of norms, constant products: divided by the factors),
the values in between (operators that carry a factor through), and what reads them (layers: multiplied). A value whose
reader cannot take the factor in has frozen channels: their factor is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph, scaling_layers, scaling_rules, weights
from qgraph.layouts import along, only
from qgraph.spread import Edit, Layout, Spread

__all__ = ["Group", "absorb", "find", "hurdle"]

_RULES = {**scaling_rules.RULES, **scaling_layers.RULES}
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "BatchNormalization",
    "InstanceNormalization",
)
_IN_MEMORY = 1 << 16
"""Bytes above which a constant that lies on disk is scaled only when it is read."""

Scales = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels that are scaled together.

    Attributes:
        free: which channels may have another factor than 1, [channels].
        edits: the constants that take the factors in.
        readers: layer -> the channel of each of its input channels, [input channels].
        makers: the nodes whose constants are divided.
        reasons: why channels are frozen -> the value where that was found.
        values: those that were looked at -> whether any of their channels is free.
    """

    free: NDArray[np.bool_]
    edits: list[Edit]
    readers: dict[ir.Node, Layout]
    makers: set[ir.Node]
    reasons: dict[str, str]
    values: dict[ir.Value, bool]


def find(main: ir.Graph) -> list[Group]:
    """All groups of a graph whose shapes are known, in order of their first maker; frozen ones too.

    Each maker starts at most one search, and a search ends at layers and at what carries no factor, so that the cost
    is linear in the nodes but where products of many activations are nested.
    """
    groups: list[Group] = []
    made: set[ir.Node] = set()
    for node in main:
        channels = None if node in made else _channels(node)
        if channels is None:
            continue
        spread = Spread(_RULES)
        axis = _axis(node)
        rank = len(graph.run_shape(node.outputs[0]) or ())
        spread.need(node.outputs[0], along(spread.fresh(channels), axis, rank))
        spread.run()
        group = _group(spread)
        made |= {node, *group.makers}
        groups.append(group)
    return groups


def hurdle(layer: ir.Node) -> str | None:
    """Why the channels that `layer` reads cannot be scaled; None when they can, or when no channel is known."""
    source, axis = layer.inputs[0], graph.channel_axis(layer)
    shape = graph.run_shape(source)
    if source is None or not shape:
        return "its shape is not known"
    spread = Spread(_RULES)
    spread.need(source, along(spread.fresh(shape[axis]), axis, len(shape)))
    spread.run()
    return None if spread.free.any() else next(iter(spread.reasons), None)


def _axis(node: ir.Node) -> int:
    return 1 if node.op_type in ("Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization") else -1


def _channels(node: ir.Node) -> int | None:
    """How many channels `node` makes with a constant for each; None where it does not."""
    shape = graph.run_shape(node.outputs[0]) if node.outputs else None
    if not shape or (len(shape) < 2 and node.op_type != "Mul"):
        return None
    count = shape[_axis(node)]
    if node.op_type in _LAYERS or node.op_type in _NORMS:
        weight = node.inputs[2 if node.op_type.startswith("Skip") else 1]
        return count if count > 1 and graph.has_constant(weight) else None
    if graph.is_standard(node, "Mul"):
        shapes = [graph.run_shape(value) for value in node.inputs if graph.has_constant(value)]
        return count if count > 1 and any(s and s[-1] == count and np.prod(s) == count for s in shapes) else None
    return None


def _group(spread: Spread) -> Group:
    edits = [edit for edits in spread.edits.values() for edit in edits]
    readers: dict[ir.Node, Layout] = {}
    for edit in edits:
        source = edit.node.inputs[0]
        if not edit.divides and source is not None and edit.node.op_type in _LAYERS:
            channels = only(spread.layouts[source], 1 if edit.node.op_type.startswith("Conv") else -1)
            if channels is not None:
                readers[edit.node] = channels
    # Where nothing is free the search has stopped, and has not seen all that there is.
    values = {value: bool(spread.free[layout[layout >= 0]].any()) for value, layout in spread.layouts.items()}
    return Group(spread.free, edits, readers, {edit.node for edit in edits if edit.divides}, spread.reasons, values)


def absorb(main: ir.Graph, edits: Iterable[Edit], scale: Scales, name: Callable[[str], str]) -> None:
    """Divide what makes the channels by `scale`, and multiply what reads them: the graph computes the same.

    A constant that others read as well stays as it is for them. What lies on disk is read and scaled when the new
    constant is read, and takes no memory.

    Args:
        main: the graph.
        edits: of one group.
        scale: positive factor of each channel, [channels]; 1 for frozen ones.
        name: a free name for a wanted one.
    """
    made: dict[tuple[object, ...], ir.Value] = {}
    for edit in edits:
        factor = np.append(scale, 1.0)[edit.index]
        old = edit.node.inputs[edit.position]
        if old is None or np.all(factor == 1.0):
            continue
        factor = (1.0 / factor if edit.divides else factor).astype(np.float32)
        key = (old, factor.shape, factor.tobytes())
        if key not in made:
            made[key] = _scaled(main, old, factor, name(f"{old.name}_scaled"))
        edit.node.replace_input_with(edit.position, made[key])


def _scaled(main: ir.Graph, old: ir.Value, factor: NDArray[np.float32], name: str) -> ir.Value:
    tensor = old.const_value
    assert tensor is not None, "only constants are edited"
    if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) and tensor.nbytes > _IN_MEMORY:
        shape = np.broadcast_shapes(tuple(tensor.shape.numpy()), factor.shape)
        return weights.derived(main, old, lambda array: np.multiply(array, factor), ir.DataType.FLOAT, shape, name)
    return graph.add_initializer(main, ir.Tensor(np.multiply(tensor.numpy(), factor)), name)
