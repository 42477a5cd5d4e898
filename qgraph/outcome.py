"""What became of each node of a candidate, told by its plan and the audit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qgraph import audit, graph
from qgraph.report import NodeReport, Step
from qgraph.stored import REACH, Reach
from qgraph.targets import ABSORBED, FOLDED, KERNEL, REASON, Form, Kernel, Target
from qgraph.ternary import EXACT

__all__ = ["INSTEAD", "LATE", "NOTHING", "ONLY_FLOAT", "dynamic", "idle", "nodes", "not_chosen", "notes", "overflowing"]

LATE = "the time limit was reached"
"""How the reason begins that a pass gives for what it had no time for."""
NOTHING = "Scheme {!r} quantizes nothing here: what is written is the float graph, rewritten. The reasons stand above."
"""Told where a named scheme was forced."""
ONLY_FLOAT = "Of scheme {!r}, nothing is within the budget and not slower"
"""Why a named scheme that only the float graph would be left of is an error."""
INSTEAD = " Or take the scheme 'auto', which writes a faster float graph where nothing else is to be had."
"""What to do about it."""
_INSIDE = "inside a body of If, Loop or Scan"
_ADDED = "it was put in for the kernels beside it"
_NAMED = 4
_PLUMBING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def nodes(model: ir.Model, found: audit.Audit) -> list[NodeReport]:
    """Each node with its kernel or the reason why it has none; what only carries codes is left out."""
    reports: list[NodeReport] = []
    for node in model.graph.all_nodes():
        name = node.name or ""
        kernel: Kernel | None = node.meta.get(KERNEL)
        if FOLDED in node.meta:
            continue
        if kernel is not None and kernel.form is Form.STORED:
            reports.append(NodeReport(name, node.op_type, kernel=f"{node.op_type} (float)", scheme=kernel.scheme))
        elif kernel is not None and kernel.form is Form.HALF:
            reports.append(
                NodeReport(name, node.op_type, kernel=f"{node.op_type} ({kernel.scheme})", scheme=kernel.scheme)
            )
        elif kernel is not None:
            ran = found.kernels.get(name)
            names = graph.planned_names(node)
            reports += [NodeReport(one, node.op_type, kernel=ran, scheme=kernel.scheme) for one in names]
        elif ABSORBED in node.meta:
            # Absorbed ones are gone; one that is still here was not.
            reports.append(NodeReport(name, node.op_type, reason="the codes do not end at its bounds"))
        elif node.op_type not in _PLUMBING:
            reason = str(node.meta.get(REASON, _ADDED if node.graph is model.graph else _INSIDE))
            reports.append(NodeReport(name, node.op_type, reason=reason))
    return reports


def dynamic(model: ir.Model) -> frozenset[str]:
    """Names of the nodes that are planned to find the ranges of what they read at run time."""
    kernels: dict[str, Kernel | None] = {graph.label(node): node.meta.get(KERNEL) for node in model.graph}
    return frozenset(name for name, one in kernels.items() if one is not None and one.form is Form.DYNAMIC)


def idle(assignment: Mapping[str, str], layers: Iterable[tuple[str, str]], target: Target) -> bool:
    """Whether nothing is quantized; or, where costs are no times, no layer with weights, if any could be.

    Args:
        assignment: node -> scheme of a candidate.
        layers: (node, scheme) of all kernels that have weights.
        target: where it will run.
    """
    named = {node for node, _ in layers} if target.ordinal else set[str]()
    return not assignment or bool(named and not named & assignment.keys())


def notes(model: ir.Model, steps: Iterable[Step]) -> list[str]:
    """What a reader should know of the weights."""
    steps = list(steps)
    late = [name for step in steps for name, why in step.refused.items() if why.startswith(LATE)]
    exact: dict[str, list[str]] = {}
    kept: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        kernel: Kernel | None = node.meta.get(KERNEL)
        if kernel is None or kernel.weight is None:
            continue
        if kernel.weight[1].observer == EXACT:
            exact.setdefault(kernel.weight[1].format.name, []).append(str(node.name))
        if kernel.form is Form.STORED:
            kept.setdefault(kernel.scheme, []).append(node)
    told = [note for step in steps for note in step.notes]
    told += [*(_exact(kind, names) for kind, names in exact.items()), *(_kept(*one) for one in kept.items())]
    wider = [name for step in steps if step.name == "CalibrateWeights" for name in step.refused]
    if wider:
        more = f" and {len(wider) - _NAMED} more" if len(wider) > _NAMED else ""
        told.append(
            f"{len(wider)} weights have a wider scale than PyTorch's, with which int32 accumulators could overflow: "
            f"{', '.join(wider[:_NAMED])}{more}."
        )
    if late:
        told.append(
            f"{LATE.capitalize()} before the codes of {len(late)} weights were learned: they are rounded to nearest, "
            "so the result depends on this machine's speed. A longer --time-limit learns them all."
        )
    return told


def _exact(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    what = f"{len(names)} weights are {kind} already and packed in 2 bits without loss (their inputs are rounded to 8)"
    return f"{what}: {', '.join(names[:_NAMED])}{more}."


def _kept(scheme: str, nodes: list[ir.Node]) -> str:
    what = (
        f"{len(nodes)} weights are stored in {scheme} and brought back as the model is loaded; all computes in float32."
    )
    found: list[Reach] = [node.meta[REACH] for node in nodes if REACH in node.meta]
    small, count = sum(one.subnormal for one in found), sum(one.count for one in found)
    if not small:
        return what
    return f"{what} {small} of {count} numbers are smaller than {found[0].smallest:.2g} and keep fewer digits."


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
    return {
        (one, planned[name].meta[KERNEL].scheme): reason
        for name, reason in reasons.items()
        for one in graph.planned_names(planned[name])
    }


def _reads(node: ir.Node, constant: str) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(m is not None and m.inputs and m.inputs[0] is not None and m.inputs[0].name == constant for m in makers)


def overflowing(steps: Iterable[Step], half: str | None) -> dict[tuple[str, str], str]:
    """What was seen to reach too far for 16 bits, with the reason, as refusals: it would do so again."""
    return {(name, half or ""): why for step in steps if step.name == "ToHalf" for name, why in step.refused.items()}
