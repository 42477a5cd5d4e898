"""Reshape(rows -> heads), + mask, Softmax, Reshape(heads -> rows) -> + the mask repeated for each head of a group.

Behind `GroupHeads` the heads of a group are rows of one product; only the mask, the same for all heads, made the scores
return to [batch, heads, positions, keys]. Repeated once for all layers, it can be added to the rows. Two Reshapes a
layer fall away, and a scale that stood between them is taken into the product by the runtime: 1 % of a small decoder's
step (tools/measure_decode.py).
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph

__all__ = ["MaskRows"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class _Scores:
    """Softmax(heads of `rows` * scale + mask) as rows again.

    Attributes:
        rows: [batch, groups, heads of a group * positions, keys].
        queries: [batch, heads, positions, size], from which the rows are made.
        between: the node that scales, if there is one, the Add and the Softmax.
        mask: what is added, one for all heads.
        back: the Reshape to rows.
        times: heads of a group.
    """

    rows: ir.Value
    queries: ir.Value
    between: list[ir.Node]
    mask: ir.Value
    back: ir.Node
    times: int


class MaskRows(ir.passes.InPlacePass):
    """Masked scores of grouped heads stay in rows.

    Refused: masks that may differ between heads, scores that anything else reads, too. Reasons go to the debug log.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        repeated: dict[tuple[ir.Value, int], ir.Value] = {}
        names: set[str] = set()
        for node in list(main):
            found = _match(node) if graph.is_standard(node, "Softmax") else None
            if isinstance(found, str):
                _LOG.debug("%s: the mask stays with the heads: %s", graph.label(node), found)
            if not isinstance(found, _Scores):
                continue
            names = names or graph.value_names(main)
            key = (found.mask, found.times)
            if key not in repeated:
                repeated[key] = _repeat(main, found, names)
            _rewire(found, repeated[key])
        if repeated:
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, bool(repeated))


def _match(softmax: ir.Node) -> _Scores | str | None:
    add = graph.producer(softmax.inputs[0], "Add")
    back = _only_reader(softmax)
    if add is None or back is None or not graph.is_standard(back, "Reshape"):
        return None
    for at in (0, 1):
        scale = graph.producer(add.inputs[at], "Mul", "Div")
        one = None if scale is None else graph.constant_scalar(scale.inputs[1])
        heads = graph.producer(scale.inputs[0] if scale is not None and one is not None else add.inputs[at], "Reshape")
        mask = add.inputs[1 - at]
        if heads is None or mask is None:
            continue
        to, again = graph.constant(heads.inputs[1]), graph.constant(back.inputs[1])
        rows = heads.inputs[0]
        product = graph.producer(rows, "MatMul")
        turn = graph.producer(product.inputs[0], "Reshape") if product is not None else None
        queries = turn.inputs[0] if turn is not None else None
        if to is None or again is None or turn is None or queries is None or rows is None:
            continue
        (count, groups), first = (a.tolist()[1] for a in (to, again)), graph.constant(turn.inputs[1])
        if to.tolist() != [0, count, -1, 0] or again.tolist() != [0, groups, -1, 0] or count % groups:
            continue
        if first is None or first.tolist() != again.tolist() or queries.shape is None or len(queries.shape) != 4:
            continue
        between = [node for node in (scale if one is not None else None, add, softmax) if node is not None]
        if softmax.attributes.get_int("axis", -1) not in (-1, 3):
            return "the Softmax is not along the keys"
        if any(_only_reader(node) is None for node in (heads, *between)):
            return "the scores are also read elsewhere"
        if mask.shape is None or not 2 <= len(mask.shape) <= 4 or (len(mask.shape) > 2 and mask.shape[-3] != 1):
            return "the mask may differ between heads"
        if queries.shape[1] != count:
            return "the queries are not those of the heads"
        return _Scores(rows, queries, between, mask, back, count // groups)
    return None


def _only_reader(node: ir.Node) -> ir.Node | None:
    users = list(node.outputs[0].uses())
    return users[0].node if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _repeat(main: ir.Graph, found: _Scores, names: set[str]) -> ir.Value:
    """The mask with its positions repeated `times` over; one that is the same for all positions fits as it is."""
    mask = found.mask
    assert mask.shape is not None
    if mask.shape[-2] == 1:
        return mask
    rank = len(mask.shape)
    base = f"{mask.name}_rows"

    def constant(numbers: list[int], name: str) -> ir.Value:
        return graph.add_initializer(main, ir.Tensor(np.array(numbers, np.int64)), graph.fresh_name(name, names))

    def add(op_type: str, inputs: list[ir.Value], name: str, kind: ir.DataType | None, **numbers: int) -> ir.Value:
        attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
        node = ir.Node("", op_type, inputs, attributes, name=graph.fresh_name(name, names))
        node.outputs[0].name = node.name
        node.outputs[0].type = None if kind is None else ir.TensorType(kind)
        main.append(node)
        return node.outputs[0]

    # A size that is not known may be one, for all positions: then it is not theirs yet.
    count = add("Shape", [found.queries], f"{base}_count", ir.DataType.INT64, start=2, end=3)
    one = constant([1], f"{base}_one")
    shape = add("Concat", [*[one] * (rank - 2), count, one], f"{base}_shape", ir.DataType.INT64, axis=0)
    full = add("Expand", [mask, shape], f"{base}_full", mask.dtype)
    times = constant([*[1] * (rank - 2), found.times, 1], f"{base}_times")
    return add("Tile", [full, times], base, mask.dtype)


def _rewire(found: _Scores, mask: ir.Value) -> None:
    first, add = found.between[0], found.between[-2]
    for position, value in enumerate(add.inputs):
        if value is found.mask:
            add.replace_input_with(position, mask)
    heads = next(v for v in first.inputs if (node := graph.producer(v, "Reshape")) and node.inputs[0] is found.rows)
    first.replace_input_with(list(first.inputs).index(heads), found.rows)
    for node in found.between:
        node.outputs[0].shape = None
    ir.convenience.replace_all_uses_with(found.back.outputs[0], found.between[-1].outputs[0])
