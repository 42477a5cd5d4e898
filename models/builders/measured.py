"""Statistics that a network of random weights really produces, measured by running it once while it is built.

Made-up ones would let the signal vanish or explode with depth, and would let a constant drown what the output owes to
the input; SQNR would then measure the constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from models.builders.graph import Dim, FloatArray, GraphWriter
from models.builders.inputs import images

MEASURING_IMAGES = 16
MEASURING_SEED = 7919
LOGIT_DEVIATION = 2.5

Statistics: TypeAlias = Mapping[str, FloatArray]


@dataclass(frozen=True)
class Form:
    """Which form of a network to write, with which batch dimension, and the statistics to write into it.

    `measure` normalizes by the batch it is run on and gives the statistics as outputs, `unfused` holds them in
    BatchNormalization nodes, `folded` in the convolutions.
    """

    mode: Literal["measure", "unfused", "folded"]
    batch: Dim = "N"
    statistics: Statistics = field(default_factory=dict[str, FloatArray])

    @property
    def measures(self) -> bool:
        """Whether the statistics are still to be found."""
        return self.mode == "measure"

    def moments(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Mean and variance per channel, float32 [C], of the value measured under `name`."""
        return self.statistics[f"{name}.mean"], self.statistics[f"{name}.var"]


def measured(
    write: Callable[[Form], ir.Model], size: int, *, channels: int = 3, seed: int, batch: Dim, folded: bool = False
) -> ir.Model:
    """Run the measuring form of `write` once on seeded images [., channels, size, size]; return its final form."""
    measuring = ir.to_proto(write(Form("measure"))).SerializeToString()
    session: Any = ort.InferenceSession(measuring, providers=["CPUExecutionProvider"])
    names: list[str] = [output.name for output in session.get_outputs()]
    sample = images(MEASURING_IMAGES, size=size, channels=channels, seed=seed + MEASURING_SEED)
    results: list[FloatArray] = session.run(names, {session.get_inputs()[0].name: sample})
    statistics = {name: np.ravel(array) for name, array in zip(names, results, strict=True)}
    return write(Form("folded" if folded else "unfused", batch, statistics))


def measure(g: GraphWriter, x: ir.Value, channels: int, axes: list[int], name: str) -> tuple[ir.Value, ir.Value]:
    """Append the mean and the variance of `x` over `axes`, as outputs `<name>.mean` and `<name>.var`.

    Returns x - mean and the variance, for the caller to normalize by.
    """
    scope = f"/measure/{name}"
    mean = g.op("ReduceMean", [x], scope, axes=axes)
    centred = g.op("Sub", [x, mean], scope)
    variance = g.op("ReduceMean", [g.op("Mul", [centred, centred], scope)], scope, axes=axes)
    shape = [1, channels, *(1 for axis in axes if axis > 1)]
    g.output(mean, f"{name}.mean", ir.DataType.FLOAT, shape)
    g.output(variance, f"{name}.var", ir.DataType.FLOAT, shape)
    return centred, variance


def classifier(g: GraphWriter, x: ir.Value, sizes: tuple[int, int], form: Form) -> None:
    """Append the Gemm from features [batch, in] to the output `logits` [batch, classes]; sizes = (in, classes).

    Its bias takes away the mean, so that classes are balanced and the choice is the image's, as after training.
    """
    features, classes = sizes
    weight = g.normal("classifier.weight", (classes, features), 1.0 / math.sqrt(features))
    bias = g.normal("classifier.bias", (classes,), 0.1)
    if not form.measures:
        mean, variance = form.moments("classifier")
        scale = np.float32(LOGIT_DEVIATION) / np.sqrt(variance.mean())
        weight *= scale
        bias -= scale * mean
    inputs = [x, g.weight("classifier.weight", weight)]
    if form.measures:
        measure(g, g.op("Gemm", inputs, "/classifier", transB=1), classes, [0], "classifier")
        return
    inputs.append(g.weight("classifier.bias", bias))
    g.output(g.op("Gemm", inputs, "/classifier", transB=1), "logits", ir.DataType.FLOAT, [form.batch, classes])
