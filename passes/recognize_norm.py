"""Normalizations of the last axis spelled in primitives -> LayerNormalization, SimplifiedLayerNormalization.

(x - mean) / sqrt(var + eps) * scale + bias -> LayerNormalization(x, scale, bias)
    (Ba, Kiros and Hinton 2016, "Layer Normalization", section 3)
x / sqrt(mean(x^2) + eps) * scale -> RMSNormalization(x, scale), the runtime's SimplifiedLayerNormalization before 23
    (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4)

They stay in float as a whole, and run in a third of the time.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph
from qgraph.targets import Target

__all__ = ["RecognizeNorm"]


@dataclasses.dataclass
class _Found:
    """`value` computed from d by `nodes`: d / sqrt(mean(d^2) + epsilon), or the inverse of that root alone."""

    d: ir.Value
    epsilon: float
    value: ir.Value
    nodes: list[ir.Node]


class RecognizeNorm(ir.passes.InPlacePass):
    """Each normalization in primitives becomes one operator.

    Refused: other types than float32, another axis than the last, a scale or bias that is not a constant of the last
    axis, values in between that are read elsewhere, opsets before 17, and the runtime's own operator where the target
    does not name it among its fast ones.

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
        for node in [node for node in model.graph if graph.is_standard(node, "ReduceMean")]:
            found = _inverse_root(node) if node.graph is model.graph else None
            if found is not None and opset >= 17 and _scaled_first(model.graph, found):
                changed = True
            elif found is not None and (normal := _normal(found)) is not None:
                done = opset >= 17 and _layer_norm(model.graph, normal)
                changed |= done or self._rms_norm(model.graph, normal, opset)
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    def _rms_norm(self, main: ir.Graph, normal: _Found, opset: int) -> bool:
        name = "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"
        if opset < 23 and self.target is not None and name not in self.target.fast_operators:
            return False
        product, scale = _constant_step(normal.value, "Mul", normal.d)
        if product is None or scale is None:
            return False
        attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", normal.epsilon)]
        # The runtime keeps its own operator in the default domain.
        return _replace(main, product, ir.Node("", name, [normal.d, scale], attributes), normal.nodes)


def _layer_norm(main: ir.Graph, normal: _Found) -> bool:
    deviation = _deviation(normal.d)
    if deviation is None:
        return False
    x, *nodes = deviation
    product, scale = _constant_step(normal.value, "Mul", x)
    total, bias = _constant_step(product.outputs[0], "Add", x) if product is not None else (None, None)
    if product is None or total is None:
        return False
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", normal.epsilon)]
    new = ir.Node("", "LayerNormalization", [x, scale, bias], attributes)
    return _replace(main, total, new, [product, *normal.nodes, *nodes])


def _scaled_first(main: ir.Graph, inverse: _Found) -> bool:
    """x * m + (bias - mean * m) with m = scale / root: TensorFlow's `batch_normalization` of the last axis."""
    deviation = _deviation(inverse.d)
    if deviation is None:
        return False
    x, difference, reduce = deviation
    product, scale = _constant_step(inverse.value, "Mul", x)
    factor = product.outputs[0] if product is not None else None
    users = factor.consumers() if factor is not None else ()
    if product is None or len(users) != 2 or not all(graph.is_standard(user, "Mul") for user in users):
        return False
    scaled = next((user for user in users if x in user.inputs), None)
    shift = next((user for user in users if reduce.outputs[0] in user.inputs), None)
    subtract, total = _only_user(shift, "Sub"), _only_user(scaled, "Add")
    bias = subtract.inputs[0] if subtract is not None else None
    if scaled is None or shift is None or subtract is None or total is None or not _fits(bias, x):
        return False
    if subtract.inputs[1] is not shift.outputs[0] or subtract.outputs[0] not in total.inputs:
        return False
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", inverse.epsilon)]
    new = ir.Node("", "LayerNormalization", [x, scale, bias], attributes)
    return _replace(main, total, new, [subtract, shift, scaled, product, *inverse.nodes, difference, reduce])


def _deviation(d: ir.Value) -> tuple[ir.Value, ir.Node, ir.Node] | None:
    """x, the Sub and the ReduceMean of d = x - mean(x)."""
    difference = graph.producer(d, "Sub")
    reduce = graph.producer(difference.inputs[1], "ReduceMean") if difference is not None else None
    x = difference.inputs[0] if difference is not None else None
    if difference is None or reduce is None or x is None or reduce.inputs[0] is not x or not _last_axis(reduce):
        return None
    return x, difference, reduce


def _inverse_root(mean: ir.Node) -> _Found | None:
    """1 / sqrt(mean(d^2) + eps), or d divided by that root, whose mean is this node."""
    square = graph.producer(mean.inputs[0], "Mul", "Pow")
    d = square.inputs[0] if square is not None else None
    if square is None or d is None or not graph.is_float(d) or not _last_axis(mean):
        return None
    if not (square.inputs[1] is d if square.op_type == "Mul" else _is(square.inputs[1], 2.0)):
        return None
    total = _only_user(mean, "Add")
    epsilon = None if total is None else next((e for v in total.inputs if (e := graph.constant_scalar(v))), None)
    root = _only_user(total, "Sqrt", "Pow")
    if total is None or root is None or epsilon is None or epsilon < 0:
        return None
    nodes = [root, total, mean, square]
    if root.op_type == "Pow":
        right = root.inputs[0] in total.outputs and _is(root.inputs[1], -0.5)
        return _Found(d, epsilon, root.outputs[0], nodes) if right else None
    last = _only_user(root, "Reciprocal", "Div")
    if last is None:
        return None
    inverse = last.op_type == "Reciprocal" or _is(last.inputs[0], 1.0)
    if not inverse and (last.inputs[0] is not d or last.inputs[1] is not root.outputs[0]):
        return None
    return _Found(d, epsilon, last.outputs[0], [last, *nodes])


def _normal(found: _Found) -> _Found | None:
    """d times the inverse of the root."""
    last = found.nodes[0]
    if last.op_type == "Div" and last.inputs[0] is found.d:
        return found
    product = _only_user(last, "Mul")
    if product is None or found.d not in product.inputs:
        return None
    return _Found(found.d, found.epsilon, product.outputs[0], [product, *found.nodes])


def _constant_step(value: ir.Value, op_type: str, x: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The only reader of `value`, a sum or product with a constant of x's last axis, and that constant."""
    node = _only_user(value.producer(), op_type)
    if node is None or value.producer() is None:
        return None, None
    constant = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    return (node, constant) if _fits(constant, x) else (None, None)


def _fits(constant: ir.Value | None, x: ir.Value) -> bool:
    """Whether `constant` has a number for each place of x's last axis."""
    shape = graph.run_shape(constant) if graph.has_constant(constant) else None
    width = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if shape is None or len(shape) != 1:
        return False
    return shape[0] == width if isinstance(width, int) else shape[0] > 1


def _only_user(node: ir.Node | None, *op_types: str) -> ir.Node | None:
    """The one node that reads the output of `node`, if it is of these types."""
    output = node.outputs[0] if node is not None else None
    users = [] if output is None or output.is_graph_output() else output.consumers()
    return users[0] if len(users) == 1 and graph.is_standard(users[0], *op_types) else None


def _last_axis(reduce: ir.Node) -> bool:
    """Whether the mean is over the last axis alone, which is kept; axes are an attribute before opset 18."""
    x = reduce.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else None
    if len(reduce.inputs) > 1:
        array = graph.constant(reduce.inputs[1])
        axes = [] if array is None else [int(axis) for axis in array.reshape(-1)]
    else:
        axes = list(reduce.attributes.get_ints("axes", []))
    return reduce.attributes.get_int("keepdims", 1) == 1 and (axes == [-1] or (rank is not None and axes == [rank - 1]))


def _is(value: ir.Value | None, number: float) -> bool:
    found = graph.constant_scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-4)


def _replace(main: ir.Graph, last: ir.Node, new: ir.Node, nodes: list[ir.Node]) -> bool:
    """Put `new` in the place of `last`, unless one of `nodes`, all before it, is read by others."""
    group = {last, *nodes}
    if any(v.is_graph_output() or any(u not in group for u in v.consumers()) for n in nodes for v in n.outputs):
        return False
    graph.replace_node(main, last, new)
    graph.merge_origins(new, *nodes)
    main.remove(list(dict.fromkeys(nodes)), safe=True)
    return True
