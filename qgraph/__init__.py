"""qgraph: a quantization compiler for ONNX.

    result = qgraph.optimize("in.onnx", "out.onnx", data="calibration.npz")
    print(result.report.speed)

The face holds no logic; see `qgraph.compiler.optimize` for the main job and `qgraph.passes` for the passes alone.
"""

from qgraph.compiler import Options, Result, optimize
from qgraph.errors import (
    AccuracyError,
    AuditError,
    DataError,
    ExecutionError,
    ExternalDataError,
    ModelError,
    NothingQuantizedError,
    OptionError,
    ProviderError,
    QGraphError,
    QuantizationError,
    SlowerError,
    UnprovedError,
)
from qgraph.report import Report

__version__ = "0.1.0"

__all__ = [
    "AccuracyError",
    "AuditError",
    "DataError",
    "ExecutionError",
    "ExternalDataError",
    "ModelError",
    "NothingQuantizedError",
    "OptionError",
    "Options",
    "ProviderError",
    "QGraphError",
    "QuantizationError",
    "Report",
    "Result",
    "SlowerError",
    "UnprovedError",
    "__version__",
    "optimize",
]
