"""x -> QuantizeLinear: the range whose error is least behind the weights that x meets, not in x itself.

Few channels make most of a tensor's range, and often they meet small weights: what the tensor's own error calls a good
range is a bad one for its readers. The error of a range is measured on the sample of each reader's input. What the
sample lacks is not forgotten: for each channel whose extreme over all the data lies outside the sample, that extreme
counts as one more row, so that no rare large value is clipped for free.

Where the data was surveyed in two halves (`qgraph.apart`), ranges are shares of what the first half has shown, above 1,
too, and their error is that on the other half: a new sample goes beyond those seen as the other half does.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from qgraph.passes.annotate import GROUP

from qgraph import graph
from qgraph.apart import APART, WIDEST, Apart
from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.qparams import QParams, fake_quantize, from_range
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import KERNEL, QPARAMS, SPEC, Kernel, Output, annotated

__all__ = ["FitRanges"]

_SHRINK = np.geomspace(1.0, 1 / 32, 16)
_REFINE = (0.8, 0.9, 1.1, 1.25), (0.95, 1.05)
_FEW_BITS = 8
_WORTH = 0.9
"""A new range must lower the error to this share of the observer's: less may be chance of the sample."""
_FAINT = 0.1
"""Rows of products count by their share of their own power, but as if they had at least this share of the mean."""

Floats = NDArray[np.float32]
Bounds = tuple[float, float]
Fits: TypeAlias = "dict[tuple[str, tuple[str, ...]], QParams]"
"""(value, how it is quantized and by which layers it is read) -> its parameters."""


@dataclasses.dataclass
class _Reader:
    """A layer's sample, and what its weights make of an error.

    Attributes:
        rows: [groups, n, inputs].
        factor: [groups, inputs, any]: the squared error of `rows @ factor` is that of the outputs, relative to their
            mean power on the sample.
        weights: by which each row's error counts, [n].
        extremes: values beyond the sample's own range of their channels, [any].
        powers: what a squared error of each of `extremes` adds.
    """

    rows: Floats
    factor: Floats
    weights: NDArray[np.float64]
    extremes: Floats
    powers: NDArray[np.float64]

    def error(self, params: QParams) -> float:
        """Of the outputs, when the input is quantized so."""
        noise = (fake_quantize(self.rows, params) - self.rows) @ self.factor
        beyond = fake_quantize(self.extremes, params) - self.extremes
        sampled = np.square(noise, dtype=np.float64).sum(axis=(0, 2)) @ self.weights
        return float(sampled + np.square(beyond, dtype=np.float64) @ self.powers)


class FitRanges(ir.passes.InPlacePass):
    """Replaces `Value.meta["qgraph.qparams"]` of activations that only layers with a sample read in integers.

    Left as they are: values that share their range with others, values that another operator reads in integers, and
    codes of 16 bits and of floats, which a narrower range would only clip.

    Args:
        convolutions: whether to fit the ranges that a Conv reads, too. Of images' outputs a patch's own error tells
            less of the model's than a token's does: convolutional networks have won and lost by it.
        store: ranges found earlier on the same surveyed model, used and added to.
    """

    def __init__(self, convolutions: bool = False, store: Fits | None = None):
        super().__init__()
        self.convolutions = convolutions
        self.store: Fits = {} if store is None else store

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place; only meta is written."""
        values = [value for value in annotated(model.graph) if QPARAMS in value.meta]
        sharing = Counter(str(value.meta.get(GROUP, value.name)) for value in values)
        for value in values:
            layers = _layers(value) if _gains(value.meta[SPEC]) else []
            if not self.convolutions and any(node.op_type == "Conv" for node in layers):
                continue
            if layers and sharing[str(value.meta.get(GROUP, value.name))] == 1:
                key = str(value.name), (repr(value.meta[SPEC]), *map(graph.label, layers))
                if key not in self.store:
                    self.store[key] = _fit(value, layers)
                value.meta[QPARAMS] = self.store[key]
        return ir.passes.PassResult(model, False)


def _gains(spec: QuantSpec) -> bool:
    """Whether a narrower range has finer steps that matter: those of 16 bits do not, and those of floats stay."""
    return spec.range is None and spec.format.whole and spec.format.storage.bitwidth <= _FEW_BITS


def _layers(value: ir.Value) -> list[ir.Node]:
    """The layers that read `value` in integers, or none if anything else sees what becomes of it."""
    maker = value.producer()
    made: Kernel | None = maker.meta.get(KERNEL) if maker is not None else None
    rounded = made is not None and made.output is Output.QUANTIZED
    layers: list[ir.Node] = []
    for node, position in value.uses():
        kernel: Kernel | None = node.meta.get(KERNEL)
        if kernel is not None and position in kernel.activations:
            if kernel.weight is None or SAMPLE not in node.meta or CHANNELS not in node.meta:
                return []
            layers.append(node)
        elif rounded:
            return []
    return [] if rounded and value.is_graph_output() else layers


def _fit(value: ir.Value, layers: list[ir.Node]) -> QParams:
    """The best of the observer's parameters, [min, max], and narrower ranges, each end by itself."""
    spec: QuantSpec = value.meta[SPEC]
    before: QParams = value.meta[QPARAMS]
    readers = [_reader(node) for node in layers]
    known: dict[Bounds, float] = {}

    def cost(bounds: Bounds) -> float:
        if bounds not in known:
            params = from_range(*bounds, spec)
            known[bounds] = sum(reader.error(params) for reader in readers)
        return known[bounds]

    seen = _reach([node.meta[CHANNELS] for node in layers])
    halves = [node.meta[APART] for node in layers if APART in node.meta]
    apart = len(halves) == len(layers)
    low, high = _reach([(half.low, half.high) for half in halves]) if apart else seen
    widest = WIDEST if apart else 1.0
    best = min(((low * factor, high * factor) for factor in widest * _SHRINK), key=cost)
    for factors in _REFINE:
        for side in (1, 0, 1):
            options = [best]
            for factor in factors:
                first, last = best[0] * factor if side == 0 else best[0], best[1] * factor if side == 1 else best[1]
                options.append((max(first, low * widest), min(last, high * widest)))
            best = min(options, key=cost)
    if apart:
        # What the first half needs for the other, all of the data needs for what is to come.
        shares = _shares(best, (low, high))
        return from_range(shares[0] * seen[0], shares[1] * seen[1], spec)
    start = sum(reader.error(before) for reader in readers)
    return from_range(*best, spec) if cost(best) < _WORTH * start else before


def _reach(bounds: list[tuple[Floats, Floats]]) -> Bounds:
    """Of all channels together, with zero."""
    return min(0.0, *(float(low.min()) for low, _ in bounds)), max(0.0, *(float(high.max()) for _, high in bounds))


def _shares(bounds: Bounds, ends: Bounds) -> Bounds:
    low, high = (bound / end if end else 1.0 for bound, end in zip(bounds, ends, strict=True))
    return low, high


def _reader(node: ir.Node) -> _Reader:
    apart: Apart | None = node.meta.get(APART)
    sample: Floats = node.meta[SAMPLE] if apart is None else apart.rows
    factor = _weight(node)
    rows = sample.reshape(len(sample), factor.shape[0], -1).transpose(1, 0, 2)
    outputs = np.square(rows @ factor, dtype=np.float64).sum(axis=(0, 2))
    mean = max(float(outputs.mean()), float(np.finfo(np.float32).tiny))
    factor = factor / np.float32(np.sqrt(mean))
    low, high = node.meta[CHANNELS] if apart is None else (apart.under, apart.over)
    seen = sample.reshape(len(sample), low.size, -1)
    under, over = low < seen.min(axis=(0, 2)), high > seen.max(axis=(0, 2))
    gain = np.square(factor, dtype=np.float64).sum(axis=2).reshape(low.size, -1).sum(axis=1)
    extremes, powers = np.concatenate([low[under], high[over]]), np.concatenate([gain[under], gain[over]])
    weights = np.ones(len(sample))
    if node.op_type != "Conv":
        # A token's few huge numbers are made small again by the normalization behind; an image's large ones are it.
        weights = 1.0 / np.maximum(outputs / mean, _FAINT)
        powers = powers / np.maximum(powers * np.square(extremes, dtype=np.float64), _FAINT)
    if apart is not None:
        # A channel's extreme is one row of its half, of which the sample is a share.
        powers = powers * apart.share
    if factor.shape[2] > factor.shape[1] and factor.shape[0] == 1:
        # Of many outputs, only how they go together matters.
        values, vectors = np.linalg.eigh(factor[0] @ factor[0].T)
        factor = (vectors * np.sqrt(np.maximum(values, 0.0)))[None]
    return _Reader(np.ascontiguousarray(rows), np.ascontiguousarray(factor, np.float32), weights, extremes, powers)


def _weight(node: ir.Node) -> Floats:
    """The quantized weight, [groups, inputs, outputs]."""
    kernel: Kernel = node.meta[KERNEL]
    assert kernel.weight is not None
    position, spec = kernel.weight
    weight = node.inputs[position]
    array = graph.constant(weight)
    assert array is not None
    axis = spec.granularity.axis % array.ndim if isinstance(spec.granularity, PerAxis) else None
    others = tuple(i for i in range(array.ndim) if i != axis)
    low, high = np.min(array, axis=others, initial=0.0), np.max(array, axis=others, initial=0.0)
    quantized = fake_quantize(array, from_range(low, high, spec))
    del array
    graph.release(weight)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return quantized.reshape(groups, quantized.shape[0] // groups, -1).transpose(0, 2, 1)
    return (quantized.T if node.attributes.get_int("transB", 0) else quantized)[None]
