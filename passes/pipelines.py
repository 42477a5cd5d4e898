"""The pipelines, each a flat list of passes, read top to bottom."""

from __future__ import annotations

import onnx_ir as ir
from qgraph.passes.annotate import Annotate
from qgraph.passes.bias_form import BiasForm
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.calibrate_weights import CalibrateWeights
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.correct_bias import CorrectBias
from qgraph.passes.fold_weights import FoldWeights
from qgraph.passes.fuse_layers import FuseLayers
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.measure_shapes import MeasureShapes
from qgraph.passes.recognize import Recognize
from qgraph.passes.residual_norm import ResidualNorm

from qgraph.errors import OptionError
from qgraph.pipeline import Context, Pipeline

__all__ = ["plan", "static"]


def plan(context: Context) -> Pipeline:
    """Everything up to the decision what to quantize; nothing is calibrated or changed in its numbers."""
    return Pipeline(*_prepare(context), progress=context.progress)


def static(context: Context) -> Pipeline:
    """Static post-training quantization: ranges of activations are fixed from calibration data."""
    if context.data is None:
        raise OptionError("Static quantization needs calibration data: a few dozen typical inputs (--data).")
    return Pipeline(
        *_prepare(context),
        InsertObservers(context.observer),
        Calibrate(
            context.data,
            context.folder,
            context.budget,
            context.ranges,
            context.save_ranges,
            context.progress,
        ),
        CalibrateWeights(),
        CorrectBias(),
        InsertQDQ(context.target),
        FoldWeights(),
        progress=context.progress,
    )


def _prepare(context: Context) -> list[ir.passes.PassBase]:
    """The graph as the target likes it, and an annotation on each value."""
    measure = [] if context.data is None else [MeasureShapes(context.data, context.folder)]
    return [
        Canonicalize(context.target.min_opset),
        FuseLayers(),
        Recognize(),
        BiasForm(),
        ResidualNorm(context.target),
        *measure,
        Annotate(context.target, context.scheme, context.keep_float, context.refused, context.measured),
    ]
