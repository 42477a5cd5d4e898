"""Did the planned kernels really appear? Answered by the runtime's own optimized graph.

The runtime keeps the name of the node it replaces (and appends marks of its own), so every planned node can be found
again and the kernel it became can be read off.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qgraph.session import Session
from qgraph.targets import KERNEL, Kernel, Target

__all__ = ["Audit", "Plan", "audit", "original_name", "plan_of"]

_MARKS = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/[A-Z]\w*Fusion)+$")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What must be found: operators by node name, and which nodes merely move codes (and may be optimized away)."""

    operators: Mapping[str, tuple[str, ...]]
    movers: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        kernels: planned node -> operator it runs as; a mover that was optimized away maps to "(no work)".
        problems: planned node -> what is wrong.
        unfused: constants that are dequantized at every run, with their readers.
    """

    kernels: dict[str, str]
    problems: dict[str, str]
    unfused: dict[str, str]

    @property
    def clean(self) -> bool:
        """Whether every planned kernel appeared."""
        return not self.problems and not self.unfused


def original_name(name: str) -> str:
    """The name of a node of the runtime's graph without the marks that the runtime appends."""
    return _MARKS.sub("", name)


def plan_of(model: ir.Model) -> Plan:
    """The plan that annotation left on the nodes."""
    operators: dict[str, tuple[str, ...]] = {}
    movers: set[str] = set()
    for node in model.graph:
        kernel: Kernel | None = node.meta.get(KERNEL)
        if kernel is not None and node.name:
            operators[node.name] = kernel.operators
            if kernel.shares:
                movers.add(node.name)
    return Plan(operators, frozenset(movers))


def audit(path: Path, plan: Plan, target: Target) -> Audit:
    """Load the model at `path` on `target` and compare the runtime's graph with the plan.

    Raises:
        ExecutionError: the runtime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-audit-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        Session(path, dataclasses.replace(target.options(), optimized=optimized)).close()
        return _compare(ir.load(optimized), plan)


def _compare(model: ir.Model, plan: Plan) -> Audit:
    found: dict[str, ir.Node] = {}
    for node in model.graph.all_nodes():
        name = node.name or ""
        for candidate in (name, original_name(name)):
            if candidate in plan.operators:
                found.setdefault(candidate, node)
    kernels: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name, operators in plan.operators.items():
        kept = found.get(name)
        if kept is None:
            if name in plan.movers:
                kernels[name] = "(no work)"
            else:
                problems[name] = f"the runtime's graph has no node of this name; expected {' or '.join(operators)}"
        elif name in plan.movers:
            maker = kept.inputs[0].producer() if kept.inputs and kept.inputs[0] is not None else None
            if maker is not None and maker.op_type == "DequantizeLinear":
                problems[name] = f"runs as {kept.op_type} on dequantized values"
            else:
                kernels[name] = kept.op_type
        elif kept.op_type in operators:
            kernels[name] = kept.op_type
        else:
            problems[name] = f"runs as {kept.op_type}, expected {' or '.join(operators)}"
    unfused: dict[str, str] = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            readers = ", ".join(str(reader.name) for reader in node.outputs[0].consumers())
            unfused[str(node.inputs[0].name)] = readers
    return Audit(kernels, problems, unfused)
