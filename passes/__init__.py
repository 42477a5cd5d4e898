"""The passes: each an `onnx_ir.passes.PassBase`, usable alone on any `onnx_ir.Model`. One idea per file."""

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

__all__ = [
    "Annotate",
    "BiasForm",
    "Calibrate",
    "CalibrateWeights",
    "Canonicalize",
    "CorrectBias",
    "FoldWeights",
    "FuseLayers",
    "InsertObservers",
    "InsertQDQ",
    "MeasureShapes",
    "Recognize",
    "ResidualNorm",
]
