"""Weights that no scale holds: layers whose weights are not all finite stay in float."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.rules import Rules
from qgraph.targets.cpu_checks import finite

__all__ = ["REASON", "refusals"]

REASON = "its weight holds NaN or infinity"


def refusals(model: ir.Model, rules: Rules) -> dict[tuple[str, str], str]:
    """(node, scheme) -> why not, of all kernels that would quantize such a weight. Reads every weight once."""
    known: dict[ir.Value, bool] = {}
    found: dict[tuple[str, str], str] = {}
    for node in model.graph:
        for scheme, kernel in rules.kernels(node)[0].items():
            weight = node.inputs[kernel.weight[0]] if kernel.weight is not None else None
            if weight is None:
                continue
            if weight not in known:
                known[weight] = finite(weight)
            if not known[weight]:
                found[node.name or "", scheme] = REASON
    return found
