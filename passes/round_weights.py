"""QuantizeLinear(W) -> codes rounded together, so that a layer's output errs less than with each rounded to nearest.

The error counted is the one behind the layer's own quantized inputs, over all the data: `tr(E H E^T)` with `H` their
second moment, or their covariance where `CorrectBias` takes the mean error out. `qgraph.rounding` has the algorithm and
the papers. Few rows say little of inputs together: `H` is shrunk towards inputs without correlation (Schaefer and
Strimmer, "A Shrinkage Approach to Large-Scale Covariance Matrix Estimation", 2005), by a share of the rows' number
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from qgraph.passes.calibrate_weights import INPUT, WEIGHT

from qgraph import calibration, graph
from qgraph.biases import bias_of
from qgraph.calibration import CHANNELS, MEANS, STATISTICS
from qgraph.data import Dataset
from qgraph.held import HELD
from qgraph.observers.sample import Patches
from qgraph.observers.second_moment import Grid, SecondMoment, patches_of
from qgraph.qparams import QParams
from qgraph.rounding import round_together
from qgraph.targets import KERNEL, Kernel

__all__ = ["CODES", "RoundWeights"]

CODES = "qgraph.codes"
"""Key in `Node.meta`: codes of the node's weight, an array of the weight's shape, instead of the nearest ones."""

_DAMPING = 0.01
"""Share of the mean power of the inputs that is added to each: what the data has not shown may still happen."""
_PRIOR = 0.5
"""Rows, as a share of the inputs, that speak for inputs that have nothing to do with each other. With it and the mean
left out, products of 384 and 1536 inputs that saw 640 to 940 rows lose 0.9 dB less on other rows."""

Codes: TypeAlias = "dict[tuple[str, bytes], NDArray[Any]]"
_Key: TypeAlias = "tuple[ir.Value, Patches | None, int]"


class RoundWeights(ir.passes.InPlacePass):
    """Writes `Node.meta["qgraph.codes"]` on layers whose weights have parameters per tensor or per axis.

    Args:
        data: the calibration data.
        folder: where the model's external tensors lie.
        budget: bytes that the observed values of one run may take, and as many again the second moments: layers are
            done in several passes over the data. To solve for one layer takes about three times its moment.
        progress: called with ("rounding", runs done, runs in all), anew for each pass over the data.
        store: codes found earlier on the same model and data, used and added to.

    Attributes:
        refused: node -> why its weights are rounded to nearest.
    """

    def __init__(
        self,
        data: Dataset,
        folder: Path | None = None,
        budget: int = calibration.DEFAULT_BUDGET,
        progress: Callable[[str, int, int], None] | None = None,
        store: Codes | None = None,
    ):
        super().__init__()
        self.data = data
        self.folder = folder
        self.budget = budget
        self.progress = progress
        self.store: Codes = {} if store is None else store
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        self.refused = {}
        for part in self._parts(self._layers(model)):
            for key, nodes in part.items():
                source, patches, groups = key
                statistic = SecondMoment(_grid(nodes[0]), patches, groups)
                source.meta.setdefault(STATISTICS, {})[patches, groups] = statistic
            calibration.observe(model, self.data, self.folder, self.budget, self._report, kinds=(STATISTICS,))
            found = {key: key[0].meta[STATISTICS].pop(key[1:]) for key in part}
            for source, _, _ in part:
                if not source.meta.get(STATISTICS, True):
                    del source.meta[STATISTICS]
            for key, nodes in part.items():
                _round(nodes, found.pop(key))
                self.store.update({_identity(node): node.meta[CODES] for node in nodes if CODES in node.meta})
        return ir.passes.PassResult(model, False)

    def _layers(self, model: ir.Model) -> dict[_Key, list[ir.Node]]:
        """Layers by what they read and how they look at it; each such has one second moment."""
        layers: dict[_Key, list[ir.Node]] = {}
        reads: dict[ir.Value, _Key] = {}
        for node in model.graph:
            source, weight = (node.inputs[0], node.inputs[1]) if WEIGHT in node.meta else (None, None)
            if source is None or weight is None or (INPUT not in node.meta and CHANNELS not in node.meta):
                continue
            if not _sums(node) or HELD in weight.meta:
                continue
            if not node.meta[WEIGHT].format.whole:
                self.refused[graph.label(node)] = "roundings are learned among whole numbers, and its codes are floats"
                continue
            key = (source, patches_of(node), node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1)
            if reads.setdefault(weight, key) != key:
                self.refused[graph.label(node)] = "its weight, shared with layers that read something else, stays one"
                for other in layers.get(reads[weight], []):
                    if other.inputs[1] is weight:
                        self.refused[graph.label(other)] = self.refused[graph.label(node)]
                continue
            layers.setdefault(key, []).append(node)
        kept = {k: [n for n in nodes if graph.label(n) not in self.refused] for k, nodes in layers.items()}
        for key, nodes in kept.items():
            for node in nodes:
                if (known := self.store.get(_identity(node))) is not None:
                    node.meta[CODES] = known
            kept[key] = [node for node in nodes if CODES not in node.meta]
        return {key: nodes for key, nodes in kept.items() if nodes}

    def _parts(self, layers: dict[_Key, list[ir.Node]]) -> Iterator[dict[_Key, list[ir.Node]]]:
        """As many second moments at a time as the budget holds."""
        part: dict[_Key, list[ir.Node]] = {}
        size = 0
        for key, nodes in layers.items():
            groups, inputs, _ = _dimensions(nodes[0])
            need = 8 * groups * inputs * inputs
            if need > self.budget:
                reason = (
                    f"the second moment of its {inputs} inputs takes {need >> 20} MiB, more than the memory allowed"
                )
                self.refused.update((graph.label(node), reason) for node in nodes)
                continue
            if part and size + need > self.budget:
                yield part
                part, size = {}, 0
            part[key] = nodes
            size += need
        if part:
            yield part

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("rounding", done, total)


def _sums(node: ir.Node) -> bool:
    """Whether the weight multiplies sums over inputs: a norm's gain has codes, too, and nothing to round together."""
    rank = len(graph.run_shape(node.inputs[1]) or ())
    return graph.is_standard(node, "Conv") if rank > 2 else rank == 2 and graph.is_standard(node, "MatMul", "Gemm")


def _identity(node: ir.Node) -> tuple[str, bytes]:
    """The layer and all that its codes depend on besides the data."""
    weight: QParams = node.meta[WEIGHT]
    activation: QParams | None = node.meta.get(INPUT)
    parts = [weight.scale.tobytes()]
    if activation is not None:
        parts += [activation.scale.tobytes(), activation.zero_point.tobytes()]
    return node.name or "", b"".join(parts)


def _grid(node: ir.Node) -> Grid:
    """The layer's own codes where its input has a calibrated range, else 12 bits for each channel."""
    if INPUT in node.meta:
        return Grid.of(node.meta[INPUT])
    low, high = node.meta[CHANNELS]
    return Grid.covering(np.maximum(-low, high))


def _dimensions(node: ir.Node) -> tuple[int, int, int]:
    """(groups, inputs of each, outputs of each)."""
    shape = graph.run_shape(node.inputs[1])
    assert shape is not None, "a constant"
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return groups, int(np.prod(shape[1:])), shape[0] // groups
    return (1, shape[1], shape[0]) if node.attributes.get_int("transB", 0) else (1, shape[0], shape[1])


def _round(nodes: list[ir.Node], seen: SecondMoment) -> None:
    """Codes of all layers that multiply what `seen` has seen."""
    moment, mean, rows = seen.moment(), seen.mean(), seen.rows
    if moment is None or mean is None:
        return
    del seen
    _add_outer(moment, mean, -1.0)
    _shrink(moment, rows)
    done: dict[tuple[ir.Value, bytes], NDArray[Any]] = {}
    centred = True
    for node in sorted(nodes, key=_is_corrected, reverse=True):
        if centred and not _is_corrected(node):
            _add_outer(moment, mean, 1.0)
            centred = False
        params: QParams = node.meta[WEIGHT]
        weight = node.inputs[1]
        assert weight is not None
        key = weight, params.scale.tobytes()
        if key not in done:
            done[key] = _codes(node, weight, params, moment)
        node.meta[CODES] = done[key]


def _add_outer(moment: NDArray[np.float64], mean: NDArray[np.float64], sign: float) -> None:
    """What the mean adds to [groups, inputs, inputs], in place, row by row."""
    for i in range(moment.shape[1]):
        moment[:, i] += (sign * mean[:, i, None]) * mean


def _is_corrected(node: ir.Node) -> bool:
    """Whether the mean error of the layer's outputs will be taken out of its bias."""
    kernel: Kernel | None = node.meta.get(KERNEL)
    means = node.inputs[0].meta.get(MEANS, {}) if node.inputs[0] is not None else {}
    statistic = means.get(graph.channel_axis(node))
    if kernel is None or kernel.weight is None or statistic is None or statistic.mean is None:
        return False
    return bias_of(node)[0] is not None


def _shrink(covariance: NDArray[np.float64], rows: int) -> None:
    """What few rows say of two inputs together counts less, in place; [groups, inputs, inputs] is positive then."""
    diagonal = np.einsum("gii->gi", covariance)
    powers = np.maximum(diagonal, 0.0)
    covariance *= rows / (rows + _PRIOR * covariance.shape[1])
    diagonal[...] = powers + _DAMPING * powers.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny


def _codes(node: ir.Node, weight: ir.Value, params: QParams, moment: NDArray[np.float64]) -> NDArray[Any]:
    """Of the weight's shape, in the format's storage type."""
    array = graph.constant(weight)
    assert array is not None
    groups, inputs, outputs = _dimensions(node)
    scale = params.scale
    if params.axis is not None:
        scale = scale.reshape([-1 if i == params.axis % array.ndim else 1 for i in range(array.ndim)])
    scaled = np.divide(array, scale, dtype=np.float32)
    del array
    graph.release(weight)
    shape = scaled.shape
    last = node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
    rows = (
        scaled.reshape(groups, outputs, inputs).transpose(0, 2, 1) if last else scaled.reshape(groups, inputs, outputs)
    )
    codes = round_together(rows, moment, params.format.lowest, params.format.highest)
    codes = codes.transpose(0, 2, 1) if last else codes
    return np.ascontiguousarray(codes).reshape(shape).astype(params.format.storage.numpy())
