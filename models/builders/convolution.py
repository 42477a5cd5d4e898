"""Convolution with batch normalization, the unit of every convolutional network here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from models.builders.graph import FloatArray, GraphWriter, lognormal
from models.builders.measured import Form, measure

EPSILON = 1e-5


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of one square convolution and the spread of its channels.

    `gain` is the median of the normalization's per-channel scale and `spread` the standard deviation of the scale's
    logarithm; `weight_spread` the same for the convolution's channels, which normalization cancels in fp32 but
    per-tensor weight scales feel.
    """

    channels: int
    kernel: int
    stride: int = 1
    groups: int = 1
    gain: float = 1.0
    spread: float = 0.25
    weight_spread: float = 0.3


@dataclass(frozen=True)
class ConvWriter:
    """Appends Conv + BatchNormalization to `graph` in the form asked for."""

    graph: GraphWriter
    form: Form

    def __call__(self, x: ir.Value, in_channels: int, spec: ConvSpec, scope: str) -> ir.Value:
        """Append the pair; x is [N, in_channels, H, W], the result [N, spec.channels, H', W']."""
        g, channels = self.graph, spec.channels
        prefix = scope.strip("/").replace("/", ".")
        weight = self._weight(f"{prefix}.conv", in_channels, spec)
        gamma = lognormal(g, f"{prefix}.bn.weight", channels, median=spec.gain, spread=spec.spread)
        beta = g.normal(f"{prefix}.bn.bias", (channels,), 0.2 * spec.gain)

        if self.form.measures:
            y = self._conv(x, weight, None, spec, scope)
            return self._normalize_by_batch(y, gamma, beta, prefix)
        mean, variance = self.form.moments(prefix)
        if self.form.mode == "folded":
            factor = (gamma / np.sqrt(variance + np.float32(EPSILON))).astype(np.float32)
            bias = (beta - mean * factor).astype(np.float32)
            return self._conv(x, weight * factor[:, None, None, None], bias, spec, scope)
        norm = [
            g.weight(f"{prefix}.bn.weight", gamma),
            g.weight(f"{prefix}.bn.bias", beta),
            g.weight(f"{prefix}.bn.running_mean", mean),
            g.weight(f"{prefix}.bn.running_var", variance),
        ]
        y = self._conv(x, weight, None, spec, scope)
        return g.op("BatchNormalization", [y, *norm], f"{scope}/bn", epsilon=EPSILON, momentum=0.9)

    def _weight(self, name: str, in_channels: int, spec: ConvSpec) -> FloatArray:
        shape = (spec.channels, in_channels // spec.groups, spec.kernel, spec.kernel)
        std = float(np.sqrt(2.0 / (shape[1] * spec.kernel**2)))
        weight = self.graph.normal(f"{name}.weight", shape, std)
        if spec.kernel > 1:
            # Half of the power goes to flat kernels: trained ones are smooth, and white ones turn depth into chaos.
            flat = self.graph.normal(f"{name}.flat", (*shape[:2], 1, 1), std)
            weight = (weight + flat) * np.float32(np.sqrt(0.5))
        if shape[1] > 3:
            # Inputs are positive behind a ReLU: kernels that do not sum to zero let one bright image grow with depth.
            weight -= weight.mean(axis=1, keepdims=True)
        ranges = lognormal(self.graph, f"{name}.range", spec.channels, median=1.0, spread=spec.weight_spread)
        return weight * ranges[:, None, None, None]

    def _conv(self, x: ir.Value, weight: FloatArray, bias: FloatArray | None, spec: ConvSpec, scope: str) -> ir.Value:
        g, prefix = self.graph, scope.strip("/").replace("/", ".")
        inputs = [x, g.weight(f"{prefix}.conv.weight", weight)]
        if bias is not None:
            inputs.append(g.weight(f"{prefix}.conv.bias", bias))
        return g.op(
            "Conv",
            inputs,
            f"{scope}/conv",
            dilations=[1, 1],
            group=spec.groups,
            kernel_shape=[spec.kernel, spec.kernel],
            pads=[spec.kernel // 2] * 4,
            strides=[spec.stride, spec.stride],
        )

    def _normalize_by_batch(self, x: ir.Value, gamma: FloatArray, beta: FloatArray, prefix: str) -> ir.Value:
        g, scope = self.graph, f"/measure/{prefix}"
        centred, variance = measure(g, x, len(gamma), [0, 2, 3], prefix)
        deviation = g.op("Sqrt", [g.op("Add", [variance, g.constant(EPSILON, scope)], scope)], scope)
        scale = g.weight(f"{prefix}.gamma", gamma[:, None, None])
        shift = g.weight(f"{prefix}.beta", beta[:, None, None])
        return g.op("Add", [g.op("Mul", [g.op("Div", [centred, deviation], scope), scale], scope), shift], scope)
