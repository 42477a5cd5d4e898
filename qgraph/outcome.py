"""What became of each node of a candidate, told by its plan and the audit."""

from __future__ import annotations

import onnx_ir as ir

from qgraph import audit
from qgraph.report import NodeReport
from qgraph.targets import ABSORBED, KERNEL, REASON, Kernel

__all__ = ["nodes", "not_chosen"]

_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def nodes(model: ir.Model, found: audit.Audit) -> list[NodeReport]:
    """Each node with its kernel or the reason why it has none; what only carries codes is left out."""
    reports: list[NodeReport] = []
    for node in model.graph.all_nodes():
        name = node.name or ""
        kernel: Kernel | None = node.meta.get(KERNEL)
        if kernel is not None:
            reports.append(NodeReport(name, node.op_type, kernel=found.kernels.get(name), scheme=kernel.scheme))
        elif ABSORBED in node.meta:
            # Absorbed ones are gone; one that is still here was not.
            reports.append(NodeReport(name, node.op_type, reason="the codes do not end at its bounds"))
        elif node.op_type not in _PLUMBING:
            reason = str(node.meta.get(REASON, "inside a body of If, Loop or Scan"))
            reports.append(NodeReport(name, node.op_type, reason=reason))
    return reports


def not_chosen(model: ir.Model, found: audit.Audit) -> dict[tuple[str, str], str]:
    """What the runtime did not fuse, with what was seen as the reason to leave it in float."""
    planned = {str(node.name): node for node in model.graph if KERNEL in node.meta}
    reasons = {
        name: f"the runtime did not choose the planned kernel: {what}"
        for name, what in found.problems.items()
        if name in planned
    }
    for constant, readers in found.unfused.items():
        ours = [name for name in readers if name in planned]
        for name in ours or [name for name, node in planned.items() if _reads(node, constant)]:
            reasons[name] = "the runtime would dequantize its weight at every run"
    return {(name, planned[name].meta[KERNEL].scheme): reason for name, reason in reasons.items()}


def _reads(node: ir.Node, constant: str) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(m is not None and m.inputs and m.inputs[0] is not None and m.inputs[0].name == constant for m in makers)
