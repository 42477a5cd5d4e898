"""y = x / s, MatMul(y, W s): outliers of a product's input go over to its weights, 1 / s in what makes x or in a Mul.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2023), section
4, with factors chosen by the error on the data (`qgraph.balance`). What makes x takes 1 / s in for nothing: the gain of
a norm, the up-projection of a gated product, the value projection through attention. Where nothing can (behind GELU; a
norm whose output is also added to its own successor), a Mul does it for up to 6 % of the time of the norm, the rounding
and the int8 products together (onnxruntime 1.31.1, one thread, widths 384 to 3072); a second copy of the norm took 5 to
7 %, and a QuantizeLinear with one scale for each channel made the whole 3 to 8 times as slow.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from qgraph import graph
from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.rebalance import Change, Rebalance
from qgraph.spec import Scheme
from qgraph.targets import Target

__all__ = ["Smooth"]


class Smooth(ir.passes.InPlacePass):
    """Scales the inputs of MatMul and Gemm. Needs `Survey` before, and keeps its samples right.

    The float model computes the same but for rounding. Refused, with the reason in `refused`: layers without an integer
    kernel, gains below `least` or `worthy`, and without `explicit` what nothing can take the factors of.

    Args:
        target: knows which layers it runs in integers, and how.
        scheme: the number formats.
        explicit: whether a Mul may be put before a product; or the names of the products that may have one.
        least: decibels at the readers' outputs that are worth new weights.
        worthy: decibels that are worth a Mul.
        aside: whether the loudest channels may be planned to be computed in float, which `SetAside` writes.
        dynamic: names of the products whose ranges will be found at run time.

    Attributes:
        changes: what was scaled, after a call.
        refused: reader -> why its input was not scaled, after a call.
    """

    def __init__(
        self,
        target: Target,
        scheme: Scheme,
        explicit: bool | Collection[str] = True,
        least: float = 0.1,
        worthy: float = 0.3,
        aside: bool = False,
        dynamic: Collection[str] = (),
    ):
        super().__init__()
        self.target = target
        self.scheme = scheme
        self.explicit = explicit
        self.least = least
        self.worthy = worthy
        self.aside = aside
        self.dynamic = dynamic
        self.changes: list[Change] = []
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        work = Rebalance(model.graph, self.target, self.scheme, (SAMPLE, CHANNELS), self.dynamic)
        scaled: set[ir.Node] = set()
        for group, readers in work.groups():
            if not any(node.op_type == "Conv" for node in readers) and work.fold(group, readers, self.least):
                scaled.update(readers)
        shared: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            source = node.inputs[0] if node.inputs else None
            if source is not None and SAMPLE in node.meta and node not in scaled and self._may_multiply(node):
                shared.setdefault(source, []).append(node)
        for value, readers in shared.items():
            work.multiply(value, readers, self.worthy, self.aside)
        work.explain(node for node in model.graph if SAMPLE in node.meta and node.op_type != "Conv")
        self.changes, self.refused = work.changes, work.refused
        return ir.passes.PassResult(model, bool(work.changes))

    def _may_multiply(self, node: ir.Node) -> bool:
        if node.op_type == "Conv":
            return False
        return self.explicit if isinstance(self.explicit, bool) else graph.label(node) in self.explicit
