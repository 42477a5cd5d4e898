"""Targets: what an execution provider on a kind of machine executes. Found by entry point `qgraph.targets`."""

from qgraph.targets.base import (
    ABSORBED,
    AUTO,
    FOLDED,
    KERNEL,
    QPARAMS,
    REASON,
    SPEC,
    STATIC,
    WEIGHTS,
    Form,
    Kernel,
    Limits,
    Output,
    Refusal,
    Target,
    annotated,
)

__all__ = [
    "ABSORBED",
    "AUTO",
    "FOLDED",
    "KERNEL",
    "QPARAMS",
    "REASON",
    "SPEC",
    "STATIC",
    "WEIGHTS",
    "Form",
    "Kernel",
    "Limits",
    "Output",
    "Refusal",
    "Target",
    "annotated",
]
