"""The passes: each an `onnx_ir.passes.PassBase`, usable alone on any `onnx_ir.Model`. One idea per file."""

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

__all__ = [
    "Annotate",
    "BiasForm",
    "Calibrate",
    "Canonicalize",
    "FoldWeights",
    "FuseLayers",
    "InsertObservers",
    "InsertQDQ",
    "MeasureShapes",
    "Recognize",
]
