"""What the CPU provider's integer kernels ask of a layer's inputs; each check answers with its reason to refuse."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.targets.base import Refusal

__all__ = ["finite", "finite_activation", "float_activation", "product", "rows", "weight"]


def float_activation(value: ir.Value | None) -> Refusal | None:
    """Why `value` cannot be a quantized activation."""
    if value is None:
        return Refusal("an input is missing")
    if value.is_initializer():
        return Refusal(f"its input {value.name!r} is a constant or has a default")
    if value.dtype is not None and value.dtype != ir.DataType.FLOAT:
        return Refusal(f"computes in {value.dtype.name.lower()}, not float32")
    if value.dtype is None:
        return Refusal(f"the type of {value.name!r} could not be inferred")
    return None


def finite(value: ir.Value) -> bool:
    """Whether a constant holds numbers only; what is no constant is not looked at."""
    array = graph.constant(value)
    found = array is None or bool(np.isfinite(array).all())
    del array
    graph.release(value)
    return found


def finite_activation(value: ir.Value | None) -> Refusal | None:
    """Why `value` cannot be a quantized activation: as on the CPU, or since a constant makes it infinite."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type in ("Where", "Pad", "Max", "Min", "Add", "Concat"):
        for one in maker.inputs:
            small = one is not None and graph.is_float(one) and graph.has_constant(one)
            if small and one is not None and not finite(one):
                return Refusal(f"its input {str(value and value.name)!r} may be infinite")
    return float_activation(value)


def weight(value: ir.Value | None, what: str) -> Refusal | None:
    """Why `value` cannot be a quantized weight; `what` names it."""
    if value is None or value.dtype != ir.DataType.FLOAT:
        return Refusal(f"{what} is not float32")
    if value.is_graph_input() and value.is_initializer():
        return Refusal(f"{what} {value.name!r} may be overridden by the caller (it is also a graph input)")
    if not graph.has_constant(value):
        return Refusal(f"{what} {value.name!r} is computed at run time")
    return None


def rows(value: ir.Value | None, inner: int) -> int:
    """Rows of an activation whose last axis has `inner` elements, in a run or guessed."""
    count = graph.element_count(value)
    return 64 if count is None else max(1, count // max(1, inner))


def _gemm(node: ir.Node) -> tuple[int, int, bool] | Refusal:
    """(inner size, columns, whether the weight is transposed) of a Gemm that is a product and a row of biases."""
    shape = graph.run_shape(node.inputs[1]) or (0, 0)
    transposed = bool(node.attributes.get_int("transB", 0))
    inner, columns = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    if node.attributes.get_int("transA", 0):
        return Refusal("the integer kernel does not transpose its activation (transA)")
    alpha, beta = node.attributes.get("alpha"), node.attributes.get("beta")
    if alpha is not None and alpha.as_float() != 1.0:
        return Refusal("alpha is not 1")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if beta is not None and beta.as_float() != 1.0:
            return Refusal("beta is not 1")
        shape_of_bias = graph.run_shape(bias) or ()
        if shape_of_bias[-1:] != (columns,) or math.prod(shape_of_bias) != columns:
            return Refusal("the bias is not one number per column")
    return inner, columns, transposed


def product(node: ir.Node, why_not_two: str) -> tuple[int, int, bool] | Refusal:
    """(inner size, columns, whether the weight is transposed) of a MatMul or Gemm of an activation and a weight.

    Args:
        node: the product.
        why_not_two: the reason to refuse a product of two activations.
    """
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return Refusal("an input is missing")
    if node.op_type == "MatMul" and not right.is_initializer() and not left.is_initializer():
        return Refusal(why_not_two)
    if node.op_type == "MatMul" and graph.has_constant(left):
        return Refusal("the weight is on the left; the integer kernel wants it on the right")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    refusal = float_activation(left) or weight(right, "the weight")
    if refusal is None and bias is not None:
        refusal = weight(bias, "the bias")
    if refusal is not None:
        return refusal
    if node.op_type == "Gemm":
        return _gemm(node)
    shape = graph.run_shape(right) or ()
    if len(shape) != 2:
        return Refusal(f"the weight has {len(shape)} dimensions; the integer kernel takes 2")
    if node.op_type == "FusedMatMul":
        return _turned(node, shape)
    return shape[0], shape[1], False


def _turned(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, int, bool] | Refusal:
    """The same of a FusedMatMul, whose weight may be read in either direction."""
    alpha = node.attributes.get("alpha")
    if alpha is not None and alpha.as_float() != 1.0:
        return Refusal("alpha is not 1")
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return Refusal("the integer kernel does not transpose its activation")
    if node.attributes.get_int("transB", 0):
        return shape[1], shape[0], True
    return shape[0], shape[1], False
