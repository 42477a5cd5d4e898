"""Where(IsNaN(p), 0, p), p = Softmax(s) -> p where s is finite; else MatMul first, and the guard on its smaller result.

Torch's exporters guard every scaled-dot-product attention against rows that are masked altogether with minus infinity,
at twice the cost of the Softmax itself. A mask of finite numbers makes no NaN. With infinite ones a row of p is NaN
as a whole or not at all, and so is its row of p V, which is narrower: the guard moves behind that product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph import graph

__all__ = ["NanGuard"]

_ACTIVATION = np.float32(1e30)
"""What no activation of a sane network reaches; added to the lowest float32 it is rounded away."""
_INFINITE = np.float32(np.inf)
_MOVES = ("Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_PRODUCTS = ("MatMul", "Gemm", "Conv")


class NanGuard(ir.passes.InPlacePass):
    """Guards of Softmax are dropped or moved; results differ only where activations are themselves not finite.

    Refused: a Softmax over another axis than the last, guarded weights that anything but one MatMul reads, and guards
    that replace NaN with another number than 0.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        changed = False
        bounds: dict[ir.Value, np.float32] = {}
        for node in list(model.graph):
            softmax = _guarded(node) if graph.is_standard(node, "Where") else None
            if softmax is None:
                continue
            scores, weights = softmax.inputs[0], softmax.outputs[0]
            if scores is not None and _bound(scores, bounds) < _INFINITE:
                ir.convenience.replace_all_uses_with(node.outputs[0], weights)
                _remove(model.graph, node)
                changed = True
            else:
                changed |= _move(model.graph, node, weights)
        return ir.passes.PassResult(model, changed)


def _guarded(where: ir.Node) -> ir.Node | None:
    """The Softmax whose NaN `where` replaces with 0."""
    test, softmax = graph.producer(where.inputs[0], "IsNaN"), graph.producer(where.inputs[2], "Softmax")
    if test is None or softmax is None or test.inputs[0] is not softmax.outputs[0] or test.graph is not where.graph:
        return None
    if where.outputs[0].is_graph_output() or graph.constant_scalar(where.inputs[1]) != 0.0:
        return None
    scores = softmax.inputs[0]
    axis = softmax.attributes.get_int("axis", -1)
    rank = len(scores.shape) if scores is not None and scores.shape is not None else None
    zero = where.inputs[1].shape if where.inputs[1] is not None else None
    if (axis != -1 and (rank is None or axis != rank - 1)) or zero is None or (rank is None and len(zero) > 1):
        return None
    return softmax if rank is None or len(zero) <= rank else None


def _bound(value: ir.Value, known: dict[ir.Value, np.float32]) -> np.float32:
    """The largest magnitude that `value` can have; infinite when unknown. Each value is looked at once."""
    pending = [value]
    while pending:
        one = pending[-1]
        node = one.producer()
        parts = [] if node is None or one in known else [v for v in _parts(node) if v is not None and v not in known]
        if parts:
            pending.extend(parts)
            continue
        pending.pop()
        if one not in known:
            with np.errstate(all="ignore"):
                known[one] = _magnitude(one, node, known)
    return known[value]


def _parts(node: ir.Node) -> list[ir.Value | None]:
    """The inputs that the magnitude of a node's output depends on."""
    if graph.is_standard(node, "Add", "Sub", "Mul"):
        return list(node.inputs)
    if graph.is_standard(node, "Div", *_MOVES):
        return list(node.inputs[:1])
    return list(node.inputs[1:]) if graph.is_standard(node, "Where") else []


def _magnitude(value: ir.Value, node: ir.Node | None, known: dict[ir.Value, np.float32]) -> np.float32:
    array = graph.constant(value)
    if array is not None:
        largest = np.float32(np.abs(array).max(initial=0)) if array.dtype.kind == "f" else _INFINITE
        graph.release(value)
        return largest
    if node is None:
        return _INFINITE
    if graph.is_standard(node, *_PRODUCTS):
        return _ACTIVATION
    if graph.is_standard(node, "Cast"):
        source = node.inputs[0]
        return np.float32(1) if source is not None and source.dtype == ir.DataType.BOOL else _INFINITE
    parts = [_INFINITE if v is None else known[v] for v in _parts(node)]
    if graph.is_standard(node, "Mul") and len(parts) == 2:
        return parts[0] * parts[1]
    if graph.is_standard(node, "Add", "Sub") and len(parts) == 2:
        return parts[0] + parts[1]
    if graph.is_standard(node, "Div"):
        divisor = graph.constant_scalar(node.inputs[1])
        return parts[0] / np.abs(np.float32(divisor)) if divisor else _INFINITE
    return max(parts, default=_INFINITE)


def _move(main: ir.Graph, where: ir.Node, weights: ir.Value) -> bool:
    """Put the guard behind the product that reads it."""
    uses = list(where.outputs[0].uses())
    product, position = uses[0] if len(uses) == 1 else (None, 0)
    if product is None or position != 0 or not graph.is_standard(product, "MatMul") or product.graph is not main:
        return False
    rank = weights.shape
    if rank is None or len(rank) < 3:
        return False
    result = product.outputs[0]
    product.replace_input_with(0, weights)
    test = ir.Node("", "IsNaN", [result], name=f"{product.name}_isnan")
    test.outputs[0].name = f"{result.name}_isnan"
    test.outputs[0].type, test.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), result.shape
    guard = ir.Node("", "Where", [test.outputs[0], where.inputs[1], result], name=f"{product.name}_guard")
    guarded = guard.outputs[0]
    guarded.name, guarded.type, guarded.shape = f"{result.name}_guarded", result.type, result.shape
    main.insert_after(product, [test, guard])
    readers = [(user, at) for user, at in result.uses() if user not in (test, guard)]
    for user, at in readers:
        user.replace_input_with(at, guarded)
    for at, output in enumerate(main.outputs):
        if output is result:
            result.name, guarded.name = guarded.name, result.name
            main.outputs[at] = guarded
    _remove(main, where)
    return True


def _remove(main: ir.Graph, where: ir.Node) -> None:
    """The guard, and its test when nothing else reads it."""
    test = graph.producer(where.inputs[0], "IsNaN")
    main.remove(where, safe=True)
    if test is not None and not test.outputs[0].uses() and not test.outputs[0].is_graph_output():
        main.remove(test, safe=True)
