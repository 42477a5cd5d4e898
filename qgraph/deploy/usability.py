"""What the runtime's own static check of mobile models says, in words: onnxruntime.tools, without running anything."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxruntime.tools.mobile_helpers import usability_checker as checker
from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

from qgraph.errors import first_line

__all__ = ["Verdict", "usability"]

_WORDS = {"YES": "should work well", "MAYBE": "may help, measure it", "NO": "use the CPU instead"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the check says about one provider.

    Attributes:
        provider: its name, with the format where it has two.
        verdict: in words.
        supported: nodes that it would take, by operator and shape alone.
        nodes: all nodes, after the runtime's basic optimizations.
        partitions: connected groups of supported nodes; each costs crossings.
        unsupported: operators that it has not.
        fixed: the verdict if all free dimensions were fixed; None where that would change nothing.
    """

    provider: str
    verdict: str
    supported: int
    nodes: int
    partitions: int
    unsupported: list[str]
    fixed: str | None


def usability(model: Path) -> list[Verdict] | str:
    """The verdicts for NNAPI and both formats of CoreML, or why there are none."""
    checks: dict[str, Callable[[Any, bool], Any]] = {
        "NNAPI": checker.check_nnapi_partitions,
        "CoreML NeuralNetwork": _coreml("coreml_supported_neuralnetwork_ops.md"),
        "CoreML MLProgram": _coreml("coreml_supported_mlprogram_ops.md"),
    }
    folder = Path(tempfile.mkdtemp(prefix="qgraph-usability-"))
    try:
        # As its own command does: what the runtime folds away does not count.
        optimize_model(model, folder / "model.onnx", use_external_initializers=True)
        shaped = ModelProtoWithShapeInfo(folder / "model.onnx").model_with_shape_info
        free, _ = checker.check_shapes(shaped.graph, logging.getLogger("qgraph.deploy"))
        return [_verdict(name, check, shaped, bool(free)) for name, check in checks.items()]
    except Exception as error:  # a tool of another project, on any model: its failure is worth a line, not the job
        return f"The runtime's check of mobile models failed: {type(error).__name__}: {first_line(error)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _coreml(listing: str) -> Callable[[Any, bool], Any]:
    """The check against a file of the runtime's that lists operators."""
    return lambda model, fixed: checker.check_coreml_partitions(model, fixed, listing)


def _verdict(name: str, check: Callable[[Any, bool], Any], model: Any, free: bool) -> Verdict:
    found = check(model, True)
    said = found.suitability().name
    fixed: str | None = None
    if free and said != "YES":
        fixed = _WORDS[check(model, False).suitability().name]
    unsupported = sorted(found.unsupported_ops)
    partitions, taken = int(found.num_partitions), int(found.num_supported_nodes)
    return Verdict(name, _WORDS[said], taken, int(found.num_nodes), partitions, unsupported, fixed)
