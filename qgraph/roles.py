"""What part a node plays: nodes of one role in the repeated blocks of a network pass their errors on alike."""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir

from qgraph import graph

__all__ = ["Role", "role"]

Role: TypeAlias = "tuple[object, ...]"
_PASSED = ("Add", "Cast", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Biases, scales and moves, on either side."""
_FAR = 6


def role(node: ir.Node) -> Role:
    """The operator, the size of its weight, what its input comes from, and what reads its result, and where."""
    weight = graph.run_shape(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.op_type, weight, _above(node), tuple(sorted(_below(node, _FAR)))


def _above(node: ir.Node) -> str:
    for _ in range(_FAR):
        makers = [v.producer() for v in node.inputs if v is not None]
        found = [maker for maker in makers if maker is not None]
        if not found:
            return ""
        node = found[0]
        if not graph.is_standard(node, *_PASSED):
            break
    return node.op_type


def _below(node: ir.Node, far: int) -> set[str]:
    found: set[str] = set()
    for user, position in (use for value in node.outputs for use in value.uses()):
        passed = far and graph.is_standard(user, *_PASSED)
        found |= _below(user, far - 1) if passed else {f"{user.op_type} {position}"}
    return found
