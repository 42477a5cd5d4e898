"""A candidate as it was written, and what tells it from others: the scheme of each node."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from qgraph import graph, modelio
from qgraph.compare import Runnable
from qgraph.report import NodeReport, Step
from qgraph.targets import KERNEL, Form, Kernel

__all__ = ["Built", "assignment_of", "digest"]


@dataclasses.dataclass
class Built:
    """A candidate as it was written.

    Attributes:
        model: its graph, planned kernels in the meta.
        staged: its files.
        nodes: each node with its kernel or the reason why it has none.
        steps: the passes that made it.
        assignment: scheme of each node that is quantized.
    """

    model: ir.Model
    staged: modelio.Staged
    nodes: list[NodeReport]
    steps: list[Step]
    assignment: dict[str, str]

    @property
    def runnable(self) -> Runnable:
        """What sessions are made of."""
        return Runnable(self.staged.path)

    @property
    def stored(self) -> bool:
        """Whether only the file is smaller: all that is planned are weights brought back at load, as was audited."""
        forms = {node.meta[KERNEL].form for node in self.model.graph if KERNEL in node.meta}
        return forms == {Form.STORED}

    @property
    def schemes(self) -> dict[str, int]:
        """Number of nodes in each scheme."""
        return dict(sorted(Counter(self.assignment.values()).items()))


def digest(assignment: Mapping[str, str]) -> str:
    """An identity of an assignment that fits a line."""
    return hashlib.sha256(json.dumps(sorted(assignment.items())).encode()).hexdigest()[:16]


def assignment_of(model: ir.Model) -> dict[str, str]:
    """Scheme of each node that is planned to be quantized."""
    found: dict[str, str] = {}
    for node in model.graph:
        kernel: Kernel | None = node.meta.get(KERNEL)
        if kernel is not None and node.name:
            for name in graph.planned_names(node):
                found[name] = kernel.scheme
    return found
