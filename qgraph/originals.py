"""The model that results are compared with and timed against: the original, as far as the runtime can run it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qgraph import registry, widened
from qgraph.compare import Runnable
from qgraph.pipeline import Context
from qgraph.session import HOST, max_ir_version
from qgraph.spec import Mixture, Scheme
from qgraph.targets import Target

__all__ = ["runnable"]

_WIDENED = (
    "The model computes in bfloat16, which onnxruntime's CPU provider does not: losses and times are those against the "
    "same model in float32, whose weights are the same numbers."
)


def runnable(
    model: ir.Model, folder: Path | None, target: Target, scheme: Scheme | Mixture
) -> tuple[Runnable, list[str]]:
    """(what stands for the original, notes on why it is not the model itself).

    Args:
        model: the original; unchanged.
        folder: where its external tensors lie.
        target: on whose provider it would run.
        scheme: which numbers the result will use.
    """
    if target.options().providers[0] != HOST or not widened.brains(model):
        return Runnable(model, folder), []
    twin = registry.pipeline("widen")(Context(target, scheme, None, folder))(model.clone()).model
    twin.ir_version = min(twin.ir_version, max_ir_version())
    return Runnable(twin, folder), [_WIDENED]
