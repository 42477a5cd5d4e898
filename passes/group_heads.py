"""MatMul(a, keys repeated for each group of heads) -> MatMul(a with the heads of a group as rows, keys), unrepeated.

Grouped-query attention (Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints", 2023, section 2.2) is exported with keys and values, the whole cache of them, copied once for every head
of a group. The heads of a group read the same keys, so their queries can be rows of one product, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph import graph

__all__ = ["GroupHeads"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class _Repeated:
    """`value` is x [batch, groups, positions, size] repeated to [batch, heads, positions, size], and then `steps`."""

    x: ir.Value
    groups: int
    heads: int
    steps: list[ir.Node]


class GroupHeads(ir.passes.InPlacePass):
    """Products with repeated keys or values read them unrepeated.

    Refused: repetitions whose shape is not seen to keep all other dimensions, and repeated values that are also read
    elsewhere. Reasons go to the debug log.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        shapes: dict[tuple[int, ...], ir.Value] = {}
        names = graph.value_names(model.graph)

        def constant(*dims: int) -> ir.Value:
            if dims not in shapes:
                name = graph.fresh_name("heads_" + "_".join("x" if d < 1 else str(d) for d in dims), names)
                shapes[dims] = graph.add_initializer(model.graph, ir.tensor(np.array(dims, np.int64)), name)
            return shapes[dims]

        changed = False
        for node in list(model.graph):
            if not graph.is_standard(node, "MatMul"):
                continue
            found = _repeated(node.inputs[1])
            if isinstance(found, str):
                _LOG.debug("%s: heads stay apart: %s", graph.label(node), found)
                continue
            a = node.inputs[0]
            if found is None or a is None or a.shape is None or len(a.shape) != 4 or a.shape[1] != found.heads:
                continue
            narrow = found.x
            for step in reversed(found.steps):
                inputs = [narrow if v is not None and v.producer() is not None else v for v in step.inputs]
                narrow = _insert(node, step.op_type, inputs, f"{step.name}_grouped", list(step.attributes.values()))
            # A scale next to the product is one that the runtime takes into it.
            scale = a.producer()
            if scale is None or not _scales(scale) or len(a.uses()) != 1:
                scale = None
            queries = a if scale is None else _activation(scale)
            rows = _insert(node, "Reshape", [queries, constant(0, found.groups, -1, 0)], f"{node.name}_rows")
            if scale is not None:
                inputs = [rows if v is queries else v for v in scale.inputs]
                rows = _insert(node, scale.op_type, inputs, f"{scale.name}_grouped")
            product = _insert(node, "MatMul", [rows, narrow], f"{node.name}_grouped")
            result = ir.Node("", "Reshape", [product, constant(0, found.heads, -1, 0)])
            maker = product.producer()
            graph.replace_node(model.graph, node, result)
            if maker is not None:
                # The product is what a report is about; the Reshape around it is not.
                maker.name, result.name = node.name, f"{node.name}_heads"
                graph.merge_origins(maker, *found.steps)
            changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, changed)


def _insert(
    before: ir.Node, op_type: str, inputs: list[ir.Value | None], name: str, attributes: list[ir.Attr] | None = None
) -> ir.Value:
    node = ir.Node("", op_type, inputs, attributes or [], name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    if before.graph is not None:
        before.graph.insert_before(before, node)
    return node.outputs[0]


def _repeated(value: ir.Value | None) -> _Repeated | str | None:
    """What `value` repeats; a reason when it repeats something in a way that is not understood, None when nothing."""
    steps: list[ir.Node] = []
    node = value.producer() if value is not None else None
    while node is not None and (_turns(node) or _scales(node)):
        steps.append(node)
        source = node.inputs[0] if _turns(node) else _activation(node)
        node = source.producer() if source is not None else None
    join = node if node is not None and graph.is_standard(node, "Reshape") else None
    expand = graph.producer(join.inputs[0], "Expand") if join is not None else None
    unsqueeze = graph.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    x = unsqueeze.inputs[0] if unsqueeze is not None else None
    if join is None or expand is None or unsqueeze is None or x is None or x.shape is None or len(x.shape) != 4:
        return None
    axes = graph.constant(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else None
    wide, joined = expand.outputs[0].shape, join.outputs[0].shape
    if axes is None or axes.reshape(-1).tolist() not in ([2], [-3]) or not graph.is_float(x):
        return "it is not the axis after the heads that is repeated"
    if wide is None or joined is None or len(wide) != 5 or len(joined) != 4:
        return "shapes are not known"
    groups, times, heads = wide[1], wide[2], joined[1]
    if not (isinstance(groups, int) and isinstance(times, int) and isinstance(heads, int)):
        return "the number of heads is not known"
    if heads != groups * times or groups != x.shape[1]:
        return "the heads are not those of the groups"
    if not all(graph.same_size(wide[i], x.shape[j]) for i, j in ((0, 0), (3, 2), (4, 3))):
        return "the repetition may repeat other dimensions too"
    if not (
        graph.same_size(joined[3], x.shape[3])
        and (graph.same_size(joined[0], x.shape[0]) or graph.same_size(joined[2], x.shape[2]))
    ):
        return "the heads are not seen to be joined with their repetitions only"
    for node in (*steps, join, expand):
        if len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output():
            return f"{node.outputs[0].name} is also read elsewhere"
    return _Repeated(x, groups, heads, steps)


def _turns(node: ir.Node) -> bool:
    return graph.is_standard(node, "Transpose") and list(node.attributes.get_ints("perm", [])) == [0, 1, 3, 2]


def _scales(node: ir.Node) -> bool:
    """Whether the node multiplies or divides by one number."""
    return graph.is_standard(node, "Mul", "Div") and _activation(node) is not None


def _activation(node: ir.Node) -> ir.Value | None:
    """The side of a product or quotient that is not one number, when the other is."""
    for at in (0, 1) if node.op_type == "Mul" else (0,):
        if graph.constant_scalar(node.inputs[1 - at]) is not None:
            return node.inputs[at]
    return None
