"""y = x / s, Conv(y, W s): channels of a convolution's input brought to ranges that suit, 1 / s in what makes x.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1, with factors
chosen by the error on the data (`qgraph.balance`) and along everything that carries a factor (`qgraph.spread`): grouped
and depthwise convolutions, residual sums, joined branches, pools. With one scale for each channel of a weight, scaling
what makes x costs nothing: the range of each channel of x and the weights of its readers decide.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.rebalance import Change, Rebalance
from qgraph.spec import Scheme
from qgraph.targets import Target

__all__ = ["Equalize"]


class Equalize(ir.passes.InPlacePass):
    """Scales groups of channels that a convolution reads. Needs `Survey` before, and keeps its samples right.

    The float model computes the same but for rounding. Refused, with the reason in `refused`: channels that end in an
    operator that carries no factor through, as Clip(x, 0, 6), whose bound would have to differ between channels; layers
    without an integer kernel; gains below `least`.

    Args:
        target: knows which layers it runs in integers, and how.
        scheme: the number formats.
        least: decibels at the readers' outputs that are worth new weights.

    Attributes:
        changes: what was scaled, after a call.
        refused: reader -> why its input was not scaled, after a call.
    """

    def __init__(self, target: Target, scheme: Scheme, least: float = 0.1):
        super().__init__()
        self.target = target
        self.scheme = scheme
        self.least = least
        self.changes: list[Change] = []
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        work = Rebalance(model.graph, self.target, self.scheme, (SAMPLE, CHANNELS))
        for group, readers in work.groups():
            if any(node.op_type == "Conv" for node in readers):
                work.fold(group, readers, self.least)
        work.explain(node for node in model.graph if SAMPLE in node.meta and node.op_type == "Conv")
        self.changes, self.refused = work.changes, work.refused
        return ir.passes.PassResult(model, bool(work.changes))
