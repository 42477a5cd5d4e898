"""A layer that reads scaled channels, and the error behind its weights when they are scaled so."""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import graph
from qgraph.apart import WIDEST, Apart
from qgraph.biases import bias_of
from qgraph.qparams import QParams, from_range
from qgraph.spec import PerAxis, PerBlock, QuantSpec

__all__ = ["Reader", "in_runs"]

Array = NDArray[np.float32]
Scales = NDArray[np.float64]
_SHARES = (WIDEST, 1.4, 1.2, 1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.12)
"""Shares of the range seen that are tried for activations; above 1 they lose unless other data is judged on."""
_SAMPLES, _COLUMNS = 128, 192
"""Rows of the sample, and output channels of a layer, on which the error is measured."""
_EXTREME = 16
"""Of these channels, how many are those with the largest weights, by each of two measures."""
_ROWS = 64
"""Rows of the sample on which the range of activations is chosen."""


class Reader:
    """A layer that reads scaled channels, with all that its error is measured on.

    Args:
        node: Conv, MatMul or Gemm with a constant weight, which is read once.
        sample: some of its input, [n, channels] or [n, channels, kernel...].
        bounds: smallest and largest value of each input channel over all the data, [channels] each.
        index: number of each input channel among those of its group, [channels].
        activation: how its input will be quantized; None when it stays in float.
        weight: how its weight will be.
        relative: whether each output channel's error counts relative to that channel's power: when the channels behind
            may be scaled as well, their sizes mean nothing.
        apart: halves of what it reads: then candidates are made of the first, and their error is that on the other.
        runs: lowest and highest of each channel in some runs, [runs, 2, channels], where the range of activations is
            found in each run anew.
    """

    def __init__(
        self,
        node: ir.Node,
        sample: Array,
        bounds: tuple[Array, Array],
        index: NDArray[np.intp],
        activation: QuantSpec | None,
        weight: QuantSpec,
        relative: bool,
        apart: Apart | None = None,
        runs: Array | None = None,
    ):
        self.node, self.index, self.activation = node, index, activation
        self._weight, self._runs = weight, runs
        self._low, self._high = self._seen = bounds
        if apart is not None and activation is not None:
            sample, self._low, self._high = apart.rows, apart.low, apart.high
        self._groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        # As [samples, channels, taps] and [made, channels in a group, taps], whatever the layer.
        self._sample = sample[:_SAMPLES].reshape(-1, sample.shape[1], math.prod(sample.shape[2:]))
        array = np.asarray(graph.constant(node.inputs[1]), np.float32)
        if node.op_type != "Conv" and not node.attributes.get_int("transB", 0):
            array = array.T
        chosen, shares = _chosen(array, self.magnitudes(True)) if self._groups == 1 else (slice(None), 1.0)
        self._weights = np.array(array[chosen].reshape(-1, *array.shape[1:2], math.prod(array.shape[2:])))
        del array
        graph.release(node.inputs[1])
        self._wanted = self._product(self._sample, self._weights)
        self._biased = bias_of(node)[0] is not None
        self._middle = self._wanted.mean(axis=0, keepdims=True)
        square = np.square(self._wanted, dtype=np.float64)
        power = square.mean(axis=0)
        silent = max(1e-9 * float(power.max(initial=0)), float(np.finfo(np.float32).tiny))
        self._columns = shares / np.maximum(power, silent) if relative else shares * np.ones_like(power)
        row = square @ self._columns
        self._rows = np.ones_like(row)
        if node.op_type != "Conv":
            # A norm behind gives each row the same say: one with a thousand times the power must not drown the others.
            self._rows = 1.0 / np.maximum(row + np.median(row), silent)
        self._signal = max(float(row @ self._rows), silent)

    def magnitudes(self, everything: bool) -> Array:
        """Size of each input channel, [channels]: the largest that a quantized input must hold.

        Where only weights are quantized their errors count by the power of what they multiply.

        Args:
            everything: whether over all the data, or over what candidates are made of.
        """
        if self.activation is None:
            return np.asarray(np.sqrt(np.square(self._sample).mean(axis=(0, 2))))
        low, high = self._seen if everything else (self._low, self._high)
        return np.asarray(np.maximum(np.abs(low), np.abs(high)))

    @property
    def shares(self) -> Array:
        """Largest share of an output channel's weight range that each input channel takes, [channels], 0 to 1."""
        size = np.abs(self._weights).max(axis=2)
        size = size / np.maximum(size.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return np.asarray(size.reshape(self._groups, -1, size.shape[1]).max(axis=1).reshape(-1), np.float32)

    def without(self, channels: NDArray[np.intp]) -> Reader:
        """The same product but for these inputs, [k]; its errors still count in terms of the whole."""
        rest = copy.copy(self)
        rest._sample, rest._weights = self._sample.copy(), self._weights.copy()
        rest._sample[:, channels] = 0
        rest._weights[:, channels] = 0
        rest._low, rest._high = _silent(self._low, channels), _silent(self._high, channels)
        rest._seen = _silent(self._seen[0], channels), _silent(self._seen[1], channels)
        rest._runs = None if self._runs is None else _silent(self._runs, channels)
        rest._wanted = rest._product(rest._sample, rest._weights)
        rest._middle = rest._wanted.mean(axis=0, keepdims=True)
        return rest

    def share(self, rest: Reader) -> float:
        """Power of the output of `rest` in terms of this one's, as the errors count."""
        square = np.square(rest._wanted, dtype=np.float64)
        return float(self._rows @ square @ self._columns) / self._signal

    def _product(self, x: Array, w: Array) -> Array:
        if self._groups == 1:
            return np.asarray(x.reshape(len(x), -1) @ w.reshape(len(w), -1).T)
        left = x.reshape(len(x), self._groups, -1).transpose(1, 0, 2)
        right = w.reshape(self._groups, len(w) // self._groups, -1).transpose(0, 2, 1)
        return np.asarray(np.matmul(left, right).transpose(1, 0, 2).reshape(len(x), -1))

    def error(self, scale: Scales) -> float:
        """Noise over signal at the output when the group's channels have these factors."""
        factors = scale[self.index].astype(np.float32)
        x = self._sample / factors[:, None]
        if self.activation is not None and self._runs is not None:
            lows, highs = ((self._runs[:, side] / factors) for side in (0, 1))
            x = in_runs(x[..., 0], lows.min(axis=1), highs.max(axis=1), self.activation)[..., None]
        elif self.activation is not None:
            _quantize(x, float((self._low / factors).min()), float((self._high / factors).max()), self.activation)
        rows = np.repeat(factors.reshape(self._groups, -1), len(self._weights) // self._groups, axis=0)
        w = self._weights * rows[:, :, None]
        if isinstance(self._weight.granularity, PerBlock):
            size = self._weight.granularity.size
            short = -w.shape[1] % size
            w = np.pad(w, ((0, 0), (0, short), (0, 0))).reshape(len(w), -1, size)
            _round(w, from_range(w.min(axis=2, keepdims=True), w.max(axis=2, keepdims=True), self._weight))
            w = w.reshape(len(w), -1, 1)[:, : self._weights.shape[1]]
        else:
            axes = (1, 2) if isinstance(self._weight.granularity, PerAxis) else None
            _round(w, from_range(w.min(axis=axes, keepdims=True), w.max(axis=axes, keepdims=True), self._weight))
        found = self._product(x, w)
        if self._biased:
            # What the weights' rounding adds on average is taken out of the bias later.
            mean = (self._sample / factors[:, None]).mean(axis=0, keepdims=True)
            found -= self._product(mean, w) - self._middle
        found -= self._wanted
        noise = np.square(found, dtype=np.float64)
        return float(self._rows @ noise @ self._columns) / self._signal


def _chosen(array: Array, magnitudes: Array) -> tuple[NDArray[np.intp], Scales]:
    """Output channels on which the error is measured, and how many each of them stands for.

    Those with the largest weights are among them, as they are and by what they multiply: in a transformer one channel
    of hundreds may have most of the error.
    """
    count = len(array)
    if count <= _COLUMNS:
        return np.arange(count), np.ones(count)
    flat = np.abs(array.reshape(*array.shape[:2], -1)).max(axis=2)
    sizes = (flat.max(axis=1), (flat * magnitudes).max(axis=1))
    largest = np.unique(np.concatenate([np.argsort(-size, kind="stable")[:_EXTREME] for size in sizes]))
    others = np.setdiff1d(np.arange(count), largest)
    few = others[:: -(-len(others) // (_COLUMNS - len(largest)))]
    shares = np.concatenate([np.ones(len(largest)), np.full(len(few), len(others) / len(few))])
    return np.concatenate([largest, few]), shares


def _silent(bound: Array, channels: NDArray[np.intp]) -> Array:
    found = bound.copy()
    found[..., channels] = 0
    return found


def _quantize(x: Array, low: float, high: float, spec: QuantSpec) -> None:
    """Round `x` in place, in that share of its range that leaves the least squared error on a few rows."""
    best, least = from_range(low, high, spec), math.inf
    few = x[:_ROWS]
    for share in _SHARES:
        params = from_range(low * share, high * share, spec)
        found = few.copy()
        _round(found, params)
        found -= few
        loss = float(np.vdot(found, found))
        if loss > least:
            break
        best, least = params, loss
    _round(x, best)


def in_runs(rows: Array, lows: Array, highs: Array, spec: QuantSpec) -> Array:
    """Rows as codes have them whose range each run finds anew, when each row lies in one of some runs, in turn.

    Args:
        rows: [n, channels].
        lows: smallest value of each run, [runs].
        highs: largest.
        spec: per tensor.
    """
    turn = np.arange(len(rows)) % len(lows)
    low, high = np.minimum(lows[turn], rows.min(axis=1)), np.maximum(highs[turn], rows.max(axis=1))
    found = rows.copy()
    _round(found, from_range(low[:, None], high[:, None], spec))
    return found


def _round(array: Array, params: QParams) -> None:
    """`qparams.fake_quantize` of an array whose shape the scales broadcast to, in place."""
    low = (params.format.lowest - params.zero_point).astype(np.float32)
    high = (params.format.highest - params.zero_point).astype(np.float32)
    array /= params.scale
    if params.format.whole:
        np.rint(array, out=array)
        np.clip(array, low, high, out=array)
    else:
        array[...] = params.format.project(array)
    array *= params.scale
