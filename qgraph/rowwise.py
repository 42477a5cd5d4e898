"""Operators that treat each row of [first, second, columns] by itself, so that the first two axes may change places."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qgraph import graph, sizes
from qgraph.heads import is_default

__all__ = ["Rows", "rows"]

_EACH = (
    *("Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg"),
    *("Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Swish", "Tanh"),
)
_BETWEEN = ("Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
_LAST = ("LayerNormalization", "LogSoftmax", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax", "Split")
_MICROSOFT = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A node, or a product between two Reshapes, by rows.

    Attributes:
        nodes: first to last; the first reads the inputs, the last makes the outputs.
        inputs: positions of the first node's inputs that are of the three axes.
        target: what the last node is reshaped to, if it is one: [first, second, columns].
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[int, ...]
    target: ir.Value | None = None


def rows(node: ir.Node) -> Rows | None:
    """What begins with `node`, if it is by rows and its results are of three axes; None for anything else."""
    if graph.is_standard(node, "Reshape"):
        return _between_reshapes(node)
    if any(out.shape is None or len(out.shape) != 3 for out in node.outputs) or not node.inputs:
        return None
    if graph.is_standard(node, "MatMul"):
        right = node.inputs[1]
        flat = right is not None and right.shape is not None and len(right.shape) == 2
        return Rows((node,), (0,)) if flat and _is_wide(node.inputs[0]) else None
    if graph.is_standard(node, *_BETWEEN):
        wide = tuple(at for at, value in enumerate(node.inputs) if not _is_row(value))
        lead = node.outputs[0].shape
        same = all(_is_wide(node.inputs[at]) and _leads(node.inputs[at], lead) for at in wide)
        return Rows((node,), wide) if same and wide else None
    if graph.is_standard(node, *_EACH) or (node.domain == "com.microsoft" and node.op_type in _MICROSOFT):
        return Rows((node,), (0,)) if _is_wide(node.inputs[0]) and all(map(_is_row, node.inputs[1:])) else None
    if graph.is_standard(node, *_LAST):
        axis = node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1)
        by_row = axis in (-1, 2) and all(map(_is_row, node.inputs[1:]))
        return Rows((node,), (0,)) if by_row and _is_wide(node.inputs[0]) else None
    return None


def _between_reshapes(first: ir.Node) -> Rows | None:
    """[first, second, columns] -> [first x second, columns] -> Gemm -> [first, second, others]."""
    x, flat, target = first.inputs[0], first.outputs[0], graph.constant(first.inputs[1])
    if not _is_wide(x) or x is None or x.shape is None or flat.shape is None or len(flat.shape) != 2:
        return None
    if not isinstance(x.shape[2], int) or flat.shape[1] != x.shape[2] or target is None or 0 in target:
        return None
    gemm = graph.only_reader(flat, "Gemm")
    if gemm is None or gemm.inputs[0] is not flat or gemm.attributes.get_int("transA", 0) != 0:
        return None
    if any(graph.run_shape(value) is None for value in gemm.inputs[1:] if value is not None):
        return None
    # A row that is added to each may be; a column may not.
    added = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    last = graph.only_reader(gemm.outputs[0], "Reshape")
    if last is None or last.inputs[0] is not gemm.outputs[0] or not _is_row(added) or is_default(last.inputs[1]):
        return None
    after, made = last.outputs[0].shape, gemm.outputs[0].shape
    if after is None or len(after) != 3 or made is None or not isinstance(after[2], int) or made[1] != after[2]:
        return None
    # As many rows as before: if one of both sizes is the same, the other is.
    told = sizes.elements(last.inputs[1])
    if not any(map(graph.same_size, x.shape[:2], after[:2])) or told is None or 0 in told:
        return None
    return Rows((first, gemm, last), (0,), last.inputs[1])


def _is_wide(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 3


def _is_row(value: ir.Value | None) -> bool:
    """Whether it is the same for all rows."""
    if value is None:
        return True
    return value.shape is not None and all(dim == 1 for dim in value.shape[:-1]) and len(value.shape) <= 3


def _leads(value: ir.Value | None, shape: ir.Shape | None) -> bool:
    """Whether the first two sizes are seen to be those of `shape`."""
    if value is None or value.shape is None or shape is None:
        return False
    return all(map(graph.same_size, value.shape[:2], shape[:2]))
