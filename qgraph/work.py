"""How much there is to multiply in each node, from the shapes that a runtime's profile tells."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

from qgraph.audit import original_name
from qgraph.session import Feeds, KernelTime, Session, SessionOptions

__all__ = ["by_node", "multiplications"]

_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "QLinearConv": 3, "ConvInteger": 1, "ConvTranspose": 1}
"""Operator -> position of its weight [outputs, inputs per group, ...]."""
_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
)


def multiplications(kernel: KernelTime) -> int:
    """Multiplications of one run of a convolution, a product or a recurrent layer; 0 for all else."""
    op, inputs, outputs = kernel.op_type, kernel.inputs, kernel.outputs
    if not inputs or not outputs:
        return 0
    if op in _CONVOLUTIONS and len(inputs) > _CONVOLUTIONS[op]:
        taps = math.prod(inputs[_CONVOLUTIONS[op]][1:])
        return math.prod(inputs[0] if op == "ConvTranspose" else outputs[0]) * taps
    if op == "Gemm" and outputs[0]:
        return math.prod(inputs[0]) * outputs[0][-1]
    if op in _PRODUCTS and inputs[0]:
        return math.prod(outputs[0]) * inputs[0][-1]
    if op in ("Attention", "MultiHeadAttention") and len(inputs) > 1 and len(inputs[0]) == len(inputs[1]) > 2:
        # Every query meets every key, and then every value.
        return (math.prod(inputs[0]) + math.prod(outputs[0])) * inputs[1][-2]
    if op in ("LSTM", "GRU", "RNN") and len(inputs) > 2:
        return math.prod(inputs[0][:2]) * (math.prod(inputs[1]) + math.prod(inputs[2]))
    return 0


def by_node(model: Path, feeds: Feeds, options: SessionOptions) -> dict[str, int]:
    """Multiplications of each node of `model` that has any, by name, in a run on `feeds`.

    The graph is run as it stands in the file, since what a provider makes of it has other nodes.

    Raises:
        ExecutionError: the model cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="qgraph-work-") as folder:
        plain = dataclasses.replace(options, level="none", profile=str(Path(folder) / "profile"))
        with Session(model, plain) as session:
            session.call(feeds)
            kernels = session.profile()
    found: dict[str, int] = {}
    for kernel in kernels:
        count = multiplications(kernel)
        if count:
            found[original_name(kernel.node)] = count
    return found
