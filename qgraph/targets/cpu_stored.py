"""What the CPU provider makes of floats of 16, 8 and 4 bits: nothing at run time, but it brings weights back at load.

Measured with onnxruntime 1.31.1 on Zen 4, [1, 2048] x [2048, 2048] (`python tools/measure_floats.py`): a MatMul in fp16
is Cast and the float32 product, one in bf16 has no kernel; DequantizeLinear of fp8 runs at every run, 20 to 70 times
slower than float32, and has no kernel for e2m1; MatMulBnb4 (nf4, fp4) is 7 times slower than float32. Cast, and a table
that is looked up, are folded as the model is loaded: then the float32 kernels run at their own speed.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qgraph import graph, stored
from qgraph.spec import Scheme
from qgraph.targets.base import Form, Kernel, Output, Refusal

__all__ = ["REFUSED", "find"]

_LEAST = 1024
"""Numbers of a weight below which it is not worth the nodes that bring it back."""
_BYTE = 5e-13
"""Seconds that a byte less on disk is worth."""

REFUSED = {
    "fp16-compute": "onnxruntime's CPU provider computes fp16 products as Cast and float32; take fp16, which stores "
    "weights so and computes in float32",
    "bf16-compute": "onnxruntime's CPU provider has no product in bf16; take bf16, which stores weights so and "
    "computes in float32",
    "fp8-compute": "onnxruntime's CPU provider has no product in fp8; take fp8, which stores weights so",
}
"""Schemes that others have and this provider has not -> the reason."""


def find(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    """The float operator with a stored weight, or why it stays as it is."""
    found = stored.positions(node)
    if not found:
        return Refusal("it has no constant float32 weight that could be stored in fewer bits")
    count = sum(math.prod(graph.run_shape(node.inputs[position]) or ()) for position in found)
    if count < _LEAST:
        return Refusal(f"its weight has only {count} numbers")
    return Kernel(
        (node.op_type,),
        {},
        weight=(found[0], scheme.weight),
        output=Output.FLOAT,
        form=Form.STORED,
        scheme=scheme.name,
        float_seconds=_BYTE * 4 * count,
        integer_seconds=_BYTE * count * scheme.bits / 8,
    )
