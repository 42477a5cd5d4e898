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
from qgraph.targets import FOLDED, KERNEL, Form, Kernel, Target

__all__ = ["Audit", "Plan", "audit", "compare", "original_name", "plan_of"]

_INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "QAttention")
_OURS = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger")
_MARKS = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/[A-Z]\w*Fusion)+$")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What must be found.

    Attributes:
        operators: acceptable operators by name of planned node.
        movers: those that merely move codes, and may be optimized away.
        plain: those whose integer form has the name of the float operator, so that its inputs must tell.
        floats: names of the nodes that must stay in float.
        folded: node that must be gone, since it is computed as the model is loaded -> node that reads what it makes.
        given: constants that were behind a DequantizeLinear already, for nobody's planned kernel.
    """

    operators: Mapping[str, tuple[str, ...]]
    movers: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    folded: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        kernels: planned node -> operator it runs as; a mover that was optimized away maps to "(no work)".
        problems: node -> what is wrong.
        unfused: constants that are dequantized at every run, with the nodes that read them.
    """

    kernels: dict[str, str]
    problems: dict[str, str]
    unfused: dict[str, list[str]]

    @property
    def clean(self) -> bool:
        """Whether every planned kernel appeared."""
        return not self.problems and not self.unfused

    @property
    def summary(self) -> str:
        """What is wrong, in a sentence for each of the first five nodes."""
        lines = [f"{name}: {what}" for name, what in self.problems.items()]
        for constant, readers in self.unfused.items():
            lines.append(f"constant {constant} is dequantized at every run, for {', '.join(readers)}")
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        return "The model does not run in the planned kernels. " + "; ".join(lines[:5]) + more


def original_name(name: str) -> str:
    """The name of a node of the runtime's graph without the marks that the runtime appends."""
    return _MARKS.sub("", name)


def plan_of(model: ir.Model) -> Plan:
    """The plan that annotation left on the nodes."""
    operators: dict[str, tuple[str, ...]] = {}
    movers: set[str] = set()
    plain: set[str] = set()
    floats: set[str] = set()
    given: set[str] = set()
    theirs: set[str] = set()
    folded: dict[str, str] = {}
    for node in model.graph:
        kernel: Kernel | None = node.meta.get(KERNEL)
        if FOLDED in node.meta:
            folded[str(node.name)] = str(node.meta[FOLDED])
        elif kernel is not None and kernel.form in (Form.STORED, Form.HALF):
            # It is the float operator, which the runtime may fuse as it likes.
            continue
        elif kernel is not None and node.name:
            operators[node.name] = kernel.operators
            if kernel.shares:
                movers.add(node.name)
            if node.op_type in kernel.operators and kernel.form is Form.QDQ:
                plain.add(node.name)
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            if not any(KERNEL in reader.meta for reader in node.outputs[0].consumers()):
                given.add(str(node.inputs[0].name))
                # Who reads codes that the model came with was quantized by its author.
                theirs.update(str(reader.name) for reader in node.outputs[0].consumers())
        elif node.name and node.op_type not in _OURS:
            floats.add(node.name)
    # Without a plan no quantizer is ours, and none can draw a float node into integers.
    floats = floats - theirs if operators else set[str]()
    return Plan(operators, frozenset(movers), frozenset(plain), frozenset(floats), frozenset(given), folded)


def audit(path: Path, plan: Plan, target: Target) -> Audit:
    """Load the model at `path` on `target` and compare the runtime's graph with the plan.

    Raises:
        ExecutionError: the runtime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-audit-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        Session(path, dataclasses.replace(target.options(), optimized=optimized)).close()
        return compare(ir.load(optimized), plan)


def compare(model: ir.Model, plan: Plan) -> Audit:
    """What the runtime's optimized graph has of the plan."""
    found: dict[str, ir.Node] = {}
    for node in model.graph.all_nodes():
        name = node.name or ""
        for candidate in (name, original_name(name)):
            if candidate in plan.operators or candidate in plan.floats or candidate in plan.folded:
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
        elif name in plan.plain and _dequantized(kept):
            problems[name] = f"runs as {kept.op_type} on dequantized values"
        elif name in plan.movers or kept.op_type in operators:
            kernels[name] = kept.op_type
        else:
            problems[name] = f"runs as {kept.op_type}, expected {' or '.join(operators)}"
    for name in sorted(plan.floats):
        if name in found and found[name].op_type.startswith(_INTEGER_KERNELS):
            problems[name] = f"was to stay in float, but runs as {found[name].op_type}"
    for name, reader in plan.folded.items():
        if name in found:
            problems[reader] = f"its weight is not brought back at load, but by {found[name].op_type} at every run"
    unfused: dict[str, list[str]] = {}
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if source is not None and source.is_initializer() and source.name not in plan.given:
            readers = [original_name(str(reader.name)) for reader in node.outputs[0].consumers()]
            unfused.setdefault(str(source.name), []).extend(readers)
    return Audit(kernels, problems, unfused)


def _dequantized(node: ir.Node) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
