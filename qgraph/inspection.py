"""What is in a model, what would be quantized, and why the rest would not: the plan without the work."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from qgraph import data, modelio, registry
from qgraph.data import DataSource
from qgraph.errors import NothingQuantizedError
from qgraph.pipeline import Context
from qgraph.report import NodeReport
from qgraph.targets import ABSORBED, AUTO, KERNEL, REASON, STATIC

__all__ = ["Inspection", "inspect"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model at a glance.

    Attributes:
        opset: of the default domain.
        ir_version: of the file.
        inputs: name -> type and shape in words.
        outputs: name -> type and shape in words.
        operators: count of each operator, as the file has them.
        weights: bytes of all initializers.
        disk: bytes on disk, external data included.
        target: name of the target that was planned for.
        scheme: name of the scheme.
        nodes: after fusion; `kernel` is the planned one.
        measured: whether shapes were measured on data; otherwise costs rest on declared shapes and guesses.
    """

    opset: int
    ir_version: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    weights: int
    disk: int
    target: str
    scheme: str
    nodes: list[NodeReport]
    measured: bool


def inspect(path: Path, target: str = "cpu", scheme: str | None = None, source: DataSource | None = None) -> Inspection:
    """Plan the quantization of the model at `path` without calibrating it.

    Args:
        path: the model.
        target: name of the target.
        scheme: name of the scheme; None for `int8` where the target has it, and else its `auto`.
        source: data whose first sample gives dynamic dimensions their sizes; None to do without.

    Raises:
        QGraphError: the model, an option or the data is at fault.
    """
    model = modelio.read(path)
    graph = model.graph
    operators = Counter(node.op_type for node in graph.all_nodes())
    opset, version = graph.opset_imports.get("", 0), model.ir_version
    inputs, outputs = _words(graph.inputs, set(graph.initializers)), _words(graph.outputs, set())
    weights = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    where = registry.target(target)
    chosen = where.scheme(scheme or (STATIC if STATIC in where.schemes else AUTO))
    dataset = data.load(source, data.inputs_of(model)) if source is not None else None
    with modelio.Workspace() as workspace:
        context = Context(where, chosen, dataset, workspace.spill(model))
        # The reasons stand on the nodes; that nothing is left is what the caller wants to see.
        with contextlib.suppress(NothingQuantizedError):
            registry.pipeline("plan")(context)(model)
        nodes = [_node(node, model.graph) for node in model.graph.all_nodes()]
    return Inspection(
        opset=opset,
        ir_version=version,
        inputs=inputs,
        outputs=outputs,
        operators=dict(operators.most_common()),
        weights=weights,
        disk=modelio.size_on_disk(path),
        target=where.name,
        scheme=chosen.name,
        nodes=nodes,
        measured=dataset is not None,
    )


def _node(node: ir.Node, main: ir.Graph) -> NodeReport:
    kernel = node.meta.get(KERNEL)
    if kernel is not None:
        return NodeReport(node.name or "", node.op_type, kernel=kernel.operators[0])
    if ABSORBED in node.meta:
        return NodeReport(node.name or "", node.op_type, kernel="(absorbed)")
    default = "not looked at" if node.graph is main else "inside a body of If, Loop or Scan"
    return NodeReport(node.name or "", node.op_type, reason=str(node.meta.get(REASON, default)))


def _words(values: Iterable[ir.Value], without: set[str]) -> dict[str, str]:
    return {str(v.name): f"{v.dtype or 'unknown'} {v.shape or ''}".strip() for v in values if v.name not in without}
