"""GELU and SiLU spelled in primitives, in whatever order -> the one operator that they are.

x * 0.5 * (1 + erf(x / sqrt 2)) -> Gelu(x)                                       (Hendrycks and Gimpel 2016, section 2)
x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) -> Gelu(x, approximate="tanh"), FastGelu(x)             (ditto)
x * sigmoid(alpha x) -> QuickGelu(x, alpha), which is SiLU for alpha = 1                          (Elfwing et al. 2018)

Recognized by their numbers: what lies between x and a candidate result is computed on a few points and compared. Only
analytic operators lie there, so that what agrees on the points agrees between them. In pieces, each would look like an
operator worth quantizing; as one they stay in float and take half the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph
from qgraph.targets import Target

__all__ = ["Recognize"]

_Floats = NDArray[np.float64]
_POINTS: _Floats = np.concatenate([[1.0], np.linspace(-6.0, 6.0, 40), [-30.0, 30.0]])
_TOLERANCE = 2e-6
_DEPTH = 7
"""Operators above the anchor, and below it, that the longest known spelling has."""

_ERF = np.vectorize(math.erf, otypes=[np.float64])
_UNARY: dict[str, Callable[[_Floats], _Floats]] = {
    "Erf": lambda a: np.asarray(_ERF(a)),
    "Neg": np.negative,
    "Sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "Tanh": np.tanh,
}
_BINARY: dict[str, Callable[[_Floats, _Floats], _Floats]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}
_ANALYTIC = (*_UNARY, *_BINARY)
_ANCHORS = ("Erf", "Tanh", "Sigmoid")


class Recognize(ir.passes.InPlacePass):
    """Activations in primitives become operators.

    Refused: other types than float32, other numbers, values in between that are read elsewhere, and the runtime's own
    operators where the target does not name them among its fast ones.

    Args:
        target: where the model will run; None for the runtime's operators without a target's opinion.
    """

    def __init__(self, target: Target | None = None):
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        opset = model.graph.opset_imports.get("", 0)
        changed = False
        # A result of one activation may be the x of the next, never a part of it.
        for anchor in [node for node in model.graph if graph.is_standard(node, *_ANCHORS)]:
            for x, result in _candidates(anchor):
                numbers = _compute(x, result)
                new = None if numbers is None else _operator(anchor, x, numbers, opset)
                if new is not None and (not new.domain or self._fast(new.op_type)):
                    region = _region(x, result)
                    if region is not None:
                        _replace(model.graph, region, new)
                        changed = True
                        break
        if changed:
            common.RemoveUnusedNodesPass()(model)
        if changed and any(node.domain == "com.microsoft" for node in model.graph):
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, changed)

    def _fast(self, op_type: str) -> bool:
        return self.target is None or op_type in self.target.fast_operators


def _candidates(anchor: ir.Node) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Pairs of a value above `anchor` and a product below it that is read by one node alone, nearest first."""
    above: list[ir.Value] = []
    level = [v for v in anchor.inputs if v is not None]
    for _ in range(_DEPTH):
        above.extend(v for v in level if v not in above)
        makers = [graph.producer(v, *_ANALYTIC) for v in level]
        level = [v for n in makers if n is not None for v in n.inputs if v is not None and not graph.has_constant(v)]
    node = anchor
    for _ in range(_DEPTH):
        users = node.outputs[0].consumers()
        if len(users) != 1 or not graph.is_standard(users[0], *_ANALYTIC) or users[0].graph is not anchor.graph:
            return
        node = users[0]
        if node.op_type == "Mul":
            yield from ((x, node) for x in above if graph.is_float(x))


def _compute(x: ir.Value, result: ir.Node) -> _Floats | None:
    """The result at `_POINTS`; None when it depends on anything but x and single numbers."""
    known: dict[ir.Value, _Floats | None] = {x: _POINTS}
    rank = len(x.shape) if x.shape is not None else 0

    def at(value: ir.Value | None, depth: int) -> _Floats | None:
        if value is None or depth > 2 * _DEPTH:
            return None
        if value not in known:
            node = graph.producer(value, *_ANALYTIC)
            number = graph.constant_scalar(value)
            if number is not None:
                fits = value.shape is not None and len(value.shape) <= rank
                known[value] = np.full_like(_POINTS, number) if fits else None
            elif node is None:
                known[value] = None
            else:
                inputs = [at(v, depth + 1) for v in node.inputs]
                arrays = [a for a in inputs if a is not None]
                known[value] = None if len(arrays) < len(inputs) else _apply(node.op_type, arrays)
        return known[value]

    with np.errstate(all="ignore"):
        return at(result.outputs[0], 0)


def _apply(op_type: str, arrays: list[_Floats]) -> _Floats:
    return _UNARY[op_type](arrays[0]) if op_type in _UNARY else _BINARY[op_type](arrays[0], arrays[1])


def _operator(anchor: ir.Node, x: ir.Value, numbers: _Floats, opset: int) -> ir.Node | None:
    """The operator that has these numbers at `_POINTS`."""
    p = _POINTS
    if anchor.op_type == "Erf" and _equal(numbers, p * 0.5 * (1 + _ERF(p * math.sqrt(0.5)))):
        return ir.Node("" if opset >= 20 else "com.microsoft", "Gelu", [x])
    if anchor.op_type == "Tanh" and _equal(
        numbers, p * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p**3)))
    ):
        if opset >= 20:
            return ir.Node("", "Gelu", [x], [ir.AttrString("approximate", "tanh")])
        return ir.Node("com.microsoft", "FastGelu", [x])
    if anchor.op_type == "Sigmoid" and 0.5 < numbers[0] < 1:
        # At x = 1 the result is sigmoid(alpha).
        alpha = round(float(np.log(numbers[0] / (1 - numbers[0]))), 6)
        if _equal(numbers, p / (1 + np.exp(-alpha * p))):
            return ir.Node("com.microsoft", "QuickGelu", [x], [ir.AttrFloat32("alpha", alpha)])
    return None


def _equal(found: _Floats, expected: _Floats) -> bool:
    return bool(np.all(np.abs(found - expected) <= _TOLERANCE * np.maximum(1.0, np.abs(expected))))


def _region(x: ir.Value, result: ir.Node) -> list[ir.Node] | None:
    """The nodes between x and `result`, which comes first; None when one of them is also read elsewhere."""
    nodes, pending = [result], list(result.inputs)
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None and value is not x else None
        if node is not None and node not in nodes:
            nodes.append(node)
            pending.extend(node.inputs)
    inner = [value for node in nodes[1:] for value in node.outputs]
    if any(v.is_graph_output() or any(user not in nodes for user in v.consumers()) for v in inner):
        return None
    return nodes


def _replace(main: ir.Graph, region: list[ir.Node], new: ir.Node) -> None:
    graph.replace_node(main, region[0], new)
    graph.merge_origins(new, *region[1:])
    main.remove(region[1:], safe=True)
