"""x' = x - z, W x' + (b + W z): channels of a norm's output that lie far to one side of zero are centered.

Wei et al., "Outlier Suppression+: Accurate Quantization of Large Language Models by Equivalent and Effective Shifting
and Scaling" (2023), section 4.1. The range of a tensor is that of its channels together; where one lies at 5 and
another at -4, both with little around them, most codes are of no use. The norm's own bias takes -z in, and the biases
of all that reads it z, so that nothing is computed that was not before. A residual sum that reads it, too, as behind
the norms of BERT, has z added by the bias on its other side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph
from qgraph.apart import APART, Apart
from qgraph.biases import bias_of, row_of
from qgraph.calibration import CHANNELS, RUNS, SAMPLE

__all__ = ["Center"]

_BIAS = {("", "LayerNormalization"): 2, ("com.microsoft", "SkipLayerNormalization"): 3}
"""Input positions of the biases of norms."""
_RUNS = 4
"""Runs below which the middle of a channel is not known."""
_ROWS = 256
"""Outputs of a weight that are multiplied in float64 at once."""

Floats = NDArray[np.float32]
Middles = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What takes the middles in.

    Attributes:
        norm: its bias takes them with a minus.
        layers: products that read it, and where the bias of each is added.
        sums: where rows are added that make up for it in sums.
    """

    norm: ir.Node
    layers: list[tuple[ir.Node, ir.Node, int]]
    sums: list[tuple[ir.Node, int]]


@dataclasses.dataclass(frozen=True)
class Centered:
    """A norm whose output was centered.

    Attributes:
        norm: its name.
        gain: by how much the range of its output shrinks, dB, found on one half of the runs and tested on the other.
    """

    norm: str
    gain: float


class Center(ir.passes.InPlacePass):
    """Centers what norms make, where all that reads it can make up for that. Needs `Survey` before.

    The float model computes the same but for rounding. Refused, with the reason in `refused`: outputs of the model,
    readers that have no bias to take the middles in, fewer than four runs of data, and what gains less than `least`.

    Args:
        least: decibels by which the range has to shrink, on runs that had no say in the middles.

    Attributes:
        changes: what was centered, after a call.
        refused: norm -> why it was not, after a call.
    """

    def __init__(self, least: float = 0.05):
        super().__init__()
        self.least = least
        self.changes: list[Centered] = []
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        self.changes, self.refused = [], {}
        main = model.graph
        names = graph.value_names(main)
        for node in main:
            if (node.domain, node.op_type) not in _BIAS:
                continue
            runs = next((u.meta[RUNS] for u in node.outputs[0].consumers() if RUNS in u.meta), None)
            if runs is None:
                continue  # Nothing that is multiplied.
            plan = _plan(node, runs.shape[-1])
            if isinstance(plan, str):
                self.refused[graph.label(node)] = plan
                continue
            gain = _gain(runs)
            if gain is None or gain < self.least:
                few = f"{len(runs)} runs of data are too few to tell the middle of a channel"
                why = few if gain is None else f"its range would shrink by {gain:.2f} dB"
                self.refused[graph.label(node)] = why
                continue
            _center(main, plan, _middles(runs), names)
            self.changes.append(Centered(graph.label(node), gain))
        if self.changes:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(self.changes))


def _plan(norm: ir.Node, columns: int) -> _Plan | str:
    """What can take as many middles in; or why not all can."""
    value, position = norm.outputs[0], _BIAS[norm.domain, norm.op_type]
    bias = norm.inputs[position] if len(norm.inputs) > position else None
    own = [norm.inputs[position - 1], *([] if bias is None else [bias])]
    if (bias is not None and not graph.has_constant(bias)) or not all(_has_columns(row, columns) for row in own):
        return "its gain or its bias is not a constant row"
    if value.is_graph_output():
        return "its result is an output of the model"
    layers: list[tuple[ir.Node, ir.Node, int]] = []
    sums: list[tuple[ir.Node, int]] = []
    for user, at in value.uses():
        if user.graph is not norm.graph:
            return "a subgraph reads its result"
        if graph.is_standard(user, "Shape"):
            continue
        label = graph.label(user)
        if graph.is_standard(user, "MatMul", "Gemm") and at == 0 and _is_layer(user, columns):
            adds, place = bias_of(user)
            if adds is None:
                return f"{label} reads its result, and has no bias that could make up for it"
            layers.append((user, adds, place))
        elif graph.is_standard(user, "Add", "Sum"):
            others = (other for other in user.inputs if other is not value)
            rows = [row for other in others if (row := _own_row(other, columns)) is not None]
            if not rows:
                return f"{label} reads its result, and nothing that it adds has a bias of its own"
            sums.append(rows[0])
        else:
            return f"{label} reads its result, and cannot make up for it"
    if len({(node, at) for node, at in sums}) < len(sums):
        return "one bias would have to make up for several sums"
    return _Plan(norm, layers, sums)


def _has_columns(value: ir.Value | None, columns: int) -> bool:
    shape = graph.run_shape(value)
    return shape is not None and prod(shape) == columns and shape[-1:] == (columns,)


def _is_layer(node: ir.Node, columns: int) -> bool:
    weight = node.inputs[1]
    shape = graph.run_shape(weight)
    if not graph.has_constant(weight) or shape is None or len(shape) != 2:
        return False
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 == node.attributes.get_float("beta", 1.0)
    return plain and not node.attributes.get_int("transA", 0) and columns in shape


def _own_row(value: ir.Value | None, columns: int) -> tuple[ir.Node, int] | None:
    """Where a row is added that only the one reader of `value` sees."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return row_of(value, columns)


def _middles(runs: Floats) -> Middles:
    """Middle of each channel, the mean over runs, [channels], from lows and highs [runs, 2, channels]."""
    return np.asarray(runs.mean(axis=(0, 1), dtype=np.float64))


def _gain(runs: Floats) -> float | None:
    """Decibels by which the range of a run shrinks, for the middles of the other half of the runs; None for few."""
    if len(runs) < _RUNS:
        return None
    gains: list[float] = []
    for half in (0, 1):
        middles = _middles(runs[half::2]).astype(np.float32)
        for run in runs[1 - half :: 2]:
            low, high = run - middles
            # Zero is in every range.
            wide = max(float(run[1].max()), 0.0) - min(float(run[0].min()), 0.0)
            now = max(float(high.max()), 0.0) - min(float(low.min()), 0.0)
            if not np.isfinite(wide) or wide <= 0.0 or now <= 0.0:
                return 0.0
            gains.append(20 * np.log10(wide / now))
    return float(np.mean(gains))


def _center(main: ir.Graph, plan: _Plan, middles: Middles, names: set[str]) -> None:
    """Write new biases, and keep what is known of the layers' inputs right."""
    norm, position = plan.norm, _BIAS[plan.norm.domain, plan.norm.op_type]
    base = norm.outputs[0].name or norm.op_type

    def add(node: ir.Node, at: int, row: Middles) -> None:
        old = node.inputs[at] if len(node.inputs) > at else None
        array = graph.constant(old)
        new = row if array is None else np.asarray(array, np.float64) + row.reshape(array.shape)
        name = graph.fresh_name(f"{base if old is None else old.name}_centered", names)
        made = graph.add_initializer(main, ir.tensor(new.astype(np.float32)), name)
        if len(node.inputs) <= at:
            node.resize_inputs(at + 1)
        node.replace_input_with(at, made)

    add(norm, position, -middles)
    for layer, adds, at in plan.layers:
        weight = graph.constant(layer.inputs[1])
        assert weight is not None
        turned = layer.attributes.get_int("transB", 0)
        shift = _times(weight if turned else weight.T, middles)
        del weight
        graph.release(layer.inputs[1])
        add(adds, at, shift)
    for node, at in plan.sums:
        add(node, at, middles)
    made: dict[int, Floats] = {}

    def moved(array: Floats) -> Floats:
        # Layers that read one value share what is known of it.
        if id(array) not in made:
            made[id(array)] = np.asarray(array - middles, np.float32)
        return made[id(array)]

    halves = {
        id(layer.meta[APART]): layer.meta[APART].moved(-middles) for layer, _, _ in plan.layers if APART in layer.meta
    }
    for layer, _, _ in plan.layers:
        _keep(layer, moved, halves)


def _times(weight: Floats, middles: Middles) -> Middles:
    """[outputs, channels] by [channels] in float64, some rows at a time: no second copy of a large weight."""
    parts = range(0, len(weight), _ROWS)
    return np.concatenate([weight[at : at + _ROWS].astype(np.float64) @ middles for at in parts])


def _keep(layer: ir.Node, moved: Callable[[Floats], Floats], halves: dict[int, Apart]) -> None:
    meta = layer.meta
    if SAMPLE in meta:
        meta[SAMPLE] = moved(meta[SAMPLE])
    if CHANNELS in meta:
        meta[CHANNELS] = tuple(moved(bound) for bound in meta[CHANNELS])
    if RUNS in meta:
        meta[RUNS] = moved(meta[RUNS])
    if APART in meta:
        meta[APART] = halves[id(meta[APART])]
