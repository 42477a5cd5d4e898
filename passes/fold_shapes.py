"""Reshape(x, a shape computed at run time) -> Reshape(x, [0, 0, -1, 64]), wherever the runs cannot differ.

Exporters compute the shapes of every layer anew from Shape nodes. What only depends on ranks and static dimensions is
the same in every run; a Reshape copies the dimensions that it keeps and infers one. The arithmetic then has no reader.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from qgraph import graph
from qgraph.heads import is_default
from qgraph.inference import infer_shapes
from qgraph.quiet import quiet
from qgraph.sizes import elements, natural

__all__ = ["FoldShapes"]

_ROUNDS = 3
"""What one round finds out about shapes, the next may fold; exports of torch need two."""
_SMALL = 64


class FoldShapes(ir.passes.InPlacePass):
    """Shape arithmetic becomes constants, with shape inference in between.

    Refused: a Reshape of which two dimensions or more are neither static nor those of its input at the same place, and
    one to a dimension that may be zero. Two symbolic dimensions are the same where they bear the same name, or one is
    computed from the other.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        before = len(model.graph)
        changed = False
        if any(graph.is_standard(node, "Reshape", "Expand") for node in model.graph):
            # Passes since the last inference may have made new shapes known.
            _fold(model)
            _infer(model)
        for _ in range(_ROUNDS):
            names = graph.value_names(model.graph)
            found = [_rewrite(model.graph, node, names) for node in list(model.graph)]
            if not any(found):
                break
            changed = True
            common.RemoveUnusedNodesPass()(model)
            _fold(model)
            _infer(model)
        return ir.passes.PassResult(model, changed or len(model.graph) != before)


def _rewrite(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    if graph.is_standard(node, "Reshape"):
        return _settle(main, node, names)
    if graph.is_standard(node, "Gather", "Slice"):
        return _known_dimension(main, node, names)
    if graph.is_standard(node, "Range"):
        return _named_range(node)
    return graph.is_standard(node, "Where") and _skip_choice(main, node, names)


def _named_range(node: ir.Node) -> bool:
    """Give 0, 1, .. up to a dimension the name of that; the library's inference leaves it without."""
    start, limit, step = node.inputs
    told, out = elements(limit), node.outputs[0]
    if graph.constant_scalar(start) != 0 or graph.constant_scalar(step) != 1 or not told or isinstance(told[0], int):
        return False
    value, axis = told[0]
    dim = value.shape[axis] if value.shape is not None else None
    if dim is None or not graph.is_named(dim):
        return False
    if out.shape is not None and (len(out.shape) != 1 or graph.is_named(out.shape[0])):
        return False
    out.shape = ir.Shape([dim])
    return True


def _known_dimension(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    """Gather or Slice of Shape(x) -> numbers, where x has them; the library's folder does lists of indices only."""
    shape, out = graph.producer(node.inputs[0], "Shape"), node.outputs[0]
    x = shape.inputs[0] if shape is not None else None
    if shape is None or x is None or x.shape is None or out.is_graph_output():
        return False
    dims = list(x.shape)[shape.attributes.get_int("start", 0) : shape.attributes.get_int("end", len(x.shape))]
    given = [v is not None for v in node.inputs[1:]]
    numbers = [graph.constant(v) for v in node.inputs[1:]]
    if not given or any(array is None for array, there in zip(numbers, given, strict=True) if there):
        return False
    arrays = [np.array([1]) if array is None else array for array in numbers]
    if node.op_type == "Gather":
        if any(not -len(dims) <= index < len(dims) for index in arrays[0].reshape(-1)):
            return False
        chosen, form = [dims[index] for index in arrays[0].reshape(-1)], arrays[0].shape
    else:
        start, end, step = int(arrays[0][0]), int(arrays[1][0]), int(arrays[3][0]) if len(arrays) > 3 else 1
        if step != 1:
            return False
        chosen = dims[start:end]
        form = (len(chosen),)
    known = [dim for dim in chosen if isinstance(dim, int)]
    if len(known) < len(chosen):
        return False
    constant = ir.tensor(np.array(known, np.int64).reshape(form))
    name = graph.fresh_name(f"{out.name}_constant", names)
    ir.convenience.replace_all_uses_with(out, graph.add_initializer(main, constant, name))
    return True


def _settle(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    """Give a Reshape a constant shape; tell whether that or a better shape of its output was found."""
    x, out = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or out.shape is None or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    if is_default(node.inputs[1]):
        return False
    better = _missing_dimension(x.shape, out.shape)
    if better is not None:
        out.shape = better
    if len(x.shape) == len(out.shape) == 1 and not out.is_graph_output():
        ir.convenience.replace_all_uses_with(out, x)
        return bool(x.uses())
    if graph.has_constant(node.inputs[1]):
        return better is not None
    dims: list[int] = []
    told = elements(node.inputs[1]) or []
    for position, dim in enumerate(out.shape):
        if isinstance(dim, int):
            dims.append(dim)
        else:
            same = position < len(x.shape) and dim.value is not None and dim == x.shape[position]
            dims.append(0 if same or told[position : position + 1] == [(x, position)] else -1)
    if dims.count(-1) > 1 or any(d == 0 for d in out.shape if isinstance(d, int)):
        return better is not None
    constant = ir.tensor(np.array(dims, np.int64))
    name = graph.fresh_name(f"{node.inputs[1].name}_constant", names)
    node.replace_input_with(1, graph.add_initializer(main, constant, name))
    node.attributes.pop("allowzero", None)
    return True


def _missing_dimension(before: ir.Shape, after: ir.Shape) -> ir.Shape | None:
    """The shape after a Reshape with its only unknown dimension, where all others leave a number or a name for it.

    As long as there are elements at all: of none, any other number would be as good.
    """
    if any(not isinstance(dim, int) and dim.value is None for dim in before):
        return None
    unnamed = [i for i, dim in enumerate(after) if not isinstance(dim, int) and dim not in list(before)]
    if len(unnamed) != 1:
        return None
    left = Counter(str(dim) for dim in before if not isinstance(dim, int))
    left.subtract(str(dim) for i, dim in enumerate(after) if not isinstance(dim, int) and i not in unnamed)
    total = int(np.prod([dim for dim in before if isinstance(dim, int)], dtype=np.int64))
    kept = int(np.prod([dim for dim in after if isinstance(dim, int)], dtype=np.int64))
    if kept == 0 or total % kept or min(left.values(), default=0) < 0:
        return None
    names = [*left.elements()]
    if names and (len(names) > 1 or total != kept or graph.is_named(after[unnamed[0]])):
        return None
    missing = next(dim for dim in before if str(dim) == names[0]) if names else total // kept
    if not graph.is_named(missing):
        return None
    return ir.Shape([missing if i in unnamed else dim for i, dim in enumerate(after)])


def _skip_choice(main: ir.Graph, node: ir.Node, names: set[str]) -> bool:
    """Where(dims == -1, ones, dims) -> dims, 1 where it is -1: how torch's exporter writes a broadcast's shape."""
    test = graph.producer(node.inputs[0], "Equal")
    dims, ones = node.inputs[2], graph.constant(node.inputs[1])
    if test is None or dims is None or dims not in test.inputs or node.outputs[0].is_graph_output():
        return False
    other = test.inputs[1] if test.inputs[0] is dims else test.inputs[0]
    number = graph.constant(other)
    if number is None or number.size == 0 or not np.all(number == -1):
        return False
    if dims.shape is None or not _alike(dims.shape, node.outputs[0].shape):
        return False
    if natural(dims):
        ir.convenience.replace_all_uses_with(node.outputs[0], dims)
        return True
    return ones is not None and bool(np.all(ones == 1)) and _choose(main, node, dims, names)


def _alike(one: ir.Shape, other: ir.Shape | None) -> bool:
    return other is not None and len(one) == len(other) and all(map(graph.same_size, one, other))


def _choose(main: ir.Graph, node: ir.Node, dims: ir.Value, names: set[str]) -> bool:
    """A Concat in the place of Where(dims == -1, 1, dims), if `dims` is one of sizes and of constants."""
    joined = graph.producer(dims, "Concat")
    if joined is None or dims.shape is None or len(dims.shape) != 1:
        return False
    again: list[ir.Value | None] = []
    for part in joined.inputs:
        array = graph.constant(part)
        if array is None and not natural(part):
            return False
        if array is not None and part is not None and np.any(array == -1):
            constant = ir.tensor(np.where(array == -1, 1, array))
            part = graph.add_initializer(main, constant, graph.fresh_name(f"{part.name}_positive", names))
        again.append(part)
    graph.replace_node(main, node, ir.Node("", "Concat", again, [ir.AttrInt64("axis", 0)]))
    return True


def _fold(model: ir.Model) -> None:
    """Fold what is small; weights were folded before."""
    with quiet("onnxscript.optimizer"):
        optimizer.fold_constants(model, input_size_limit=_SMALL, output_size_limit=_SMALL, should_fold=_should_fold)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        source = node.inputs[0] if graph.is_standard(node, "Identity") else None
        if source is not None and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)


def _should_fold(node: ir.Node) -> bool | None:
    """The small constant shapes that the folder would leave alone; for the rest its own judgement."""
    count = graph.element_count(node.outputs[0]) if graph.is_standard(node, "ConstantOfShape") else None
    return None if count is None or count > _SMALL else True


def _infer(model: ir.Model) -> None:
    """Infer shapes; names that an earlier inference gave to what it did not know would else stay."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and any(str(dim).startswith(graph.UNKNOWN) for dim in value.shape):
                dims = [None if str(dim).startswith(graph.UNKNOWN) else dim for dim in value.shape]
                value.shape = ir.Shape(dims)
    infer_shapes(model)
