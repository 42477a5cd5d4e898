"""The pipelines, each a flat list of passes, read top to bottom."""

from __future__ import annotations

from qgraph.passes.annotate import Annotate
from qgraph.passes.bias_form import BiasForm
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_weights import FoldWeights
from qgraph.passes.fuse_layers import FuseLayers
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.measure_shapes import MeasureShapes
from qgraph.passes.recognize import Recognize
from qgraph.pipeline import Context, Pipeline

__all__ = ["static"]


def static(context: Context) -> Pipeline:
    """Static post-training quantization: ranges of activations are fixed from calibration data."""
    return Pipeline(
        Canonicalize(context.target.min_opset),
        FuseLayers(),
        Recognize(),
        BiasForm(),
        MeasureShapes(context.data, context.folder),
        Annotate(context.target, context.scheme, context.keep_float),
        InsertObservers(context.observer),
        Calibrate(context.data, context.folder, context.budget),
        InsertQDQ(),
        FoldWeights(),
    )
