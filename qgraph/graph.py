"""The few IR idioms that onnx_ir does not have itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph import widened

__all__ = [
    "JOINED",
    "ORIGINS",
    "RUN_SHAPE",
    "add_initializer",
    "all_graphs",
    "channel_axis",
    "clip_bounds",
    "constant",
    "constant_scalar",
    "drop_cast",
    "element_count",
    "fresh_name",
    "has_constant",
    "insert_behind",
    "is_float",
    "is_named",
    "is_standard",
    "label",
    "merge_origins",
    "only_reader",
    "planned_names",
    "producer",
    "release",
    "replace_node",
    "run_shape",
    "same_size",
    "value_names",
]

JOINED = "qgraph.joined"
"""Key in `Node.meta`: names of all the planned nodes that this one computes, in order of its output's parts."""
ORIGINS = "qgraph.origins"
"""Key in `Node.meta`: (name, operator) of each node that was merged into this one."""
RUN_SHAPE = "qgraph.shape"
"""Key in `Value.meta`: the value's shape in a real run, a tuple of int."""
UNKNOWN = "unk__"
"""How onnx's inference begins the names of dimensions that it does not know."""


def label(node: ir.Node) -> str:
    """How a node is called in reports: its name, or its operator and first output when it has none."""
    return node.name or f"{node.op_type}({node.outputs[0].name if node.outputs else ''})"


def planned_names(node: ir.Node) -> tuple[str, ...]:
    """Names under which `node` was planned: its own, or those of the nodes that were joined in it."""
    names: tuple[str, ...] = node.meta.get(JOINED, (node.name or "",))
    return names


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the default ONNX domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard operator of one of these types that makes `value`, or None."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_standard(node, *op_types) else None


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """What alone reads `value`, once, in the same graph, when it is one of these standard operators, any for none."""
    users = [user for user, _ in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].graph is not value.graph:
        return None
    return users[0] if not op_types or is_standard(users[0], *op_types) else None


def has_constant(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer that no caller can override, without reading it."""
    return value is not None and value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of a constant, or None when it is not constant. Memory-mapped where the tensor is."""
    if value is None or not has_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def constant_scalar(value: ir.Value | None) -> float | None:
    """The number of a constant of one element, or None."""
    tensor = value.const_value if value is not None and has_constant(value) else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def release(value: ir.Value | None) -> None:
    """Give a memory-mapped constant's pages back; it is mapped again when next read."""
    widened.release(value.const_value if value is not None else None)


def is_float(value: ir.Value | None) -> bool:
    """Whether `value` is known to hold float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def run_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape seen in a run if one was measured, else the static shape, else None."""
    if value is None:
        return None
    seen: tuple[int, ...] | None = value.meta.get(RUN_SHAPE)
    if seen is not None:
        return seen
    if value.const_value is not None:
        return tuple(int(d) for d in value.const_value.shape.numpy())
    if value.shape is not None and value.shape.is_static():
        return tuple(int(d) for d in value.shape.numpy())
    return None


def same_size(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are seen to be equal: one number, or one symbol with a name."""
    return one == other and (isinstance(one, int) or one.value is not None)


def is_named(dim: int | ir.SymbolicDim) -> bool:
    """Whether a dimension is a number, or has a name that no inference made up."""
    return isinstance(dim, int) or (dim.value is not None and not str(dim.value).startswith(UNKNOWN))


def element_count(value: ir.Value | None) -> int | None:
    """Number of elements in a run, or None when unknown."""
    shape = run_shape(value)
    return None if shape is None else int(np.prod(shape, dtype=np.int64))


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """`graph` and every graph inside the attributes of its nodes."""
    yield graph
    yield from graph.subgraphs()


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Relu or Clip; infinite where absent, None where computed at run time."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds: list[float | None] = []
    for position, missing in ((1, float("-inf")), (2, float("inf"))):
        value = node.inputs[position] if len(node.inputs) > position else None
        bounds.append(missing if value is None else constant_scalar(value))
    return bounds[0], bounds[1]


def channel_axis(node: ir.Node) -> int:
    """Axis of the channels in a layer's input: 1 for convolutions, the last one for products."""
    return 1 if node.op_type == "Conv" else -1


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """A new constant of `graph`; `name` must be free."""
    tensor.name = name
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    graph.register_initializer(value)
    return value


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, its first output under the old one's name; unnamed nodes take the old name."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    new.name = new.name or old.name
    new.metadata_props.update(old.metadata_props)
    merge_origins(new, old)
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    before.name = None
    graph.remove(old, safe=True)


def insert_behind(graph: ir.Graph, maker: ir.Node | None, node: ir.Node) -> None:
    """Put `node` right behind what makes its input; first of all where that is an input or a constant of `graph`."""
    if maker is not None:
        graph.insert_after(maker, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def drop_cast(node: ir.Node) -> bool:
    """Take a Cast to the type that its input has away; not where the two are outputs, or inputs, of a graph."""
    source, result, home = node.inputs[0], node.outputs[0], node.graph
    if source is None or not isinstance(home, ir.Graph) or source.dtype is None or source.dtype != result.dtype:
        return False
    if result.is_graph_output():
        if source.producer() is None or source.is_graph_output() or source.graph is not home:
            return False
        name, result.name = result.name, None
        source.name = name
    if source.shape is None:
        source.shape = result.shape
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    home.remove(node, safe=True)
    return True


def value_names(graph: ir.Graph) -> set[str]:
    """The names that a new value or node of `graph` must not have: those of all values and nodes, bodies included."""
    names: set[str] = set()
    for one in all_graphs(graph):
        names.update(v.name for v in one.inputs if v.name)
        names.update(one.initializers)
        names.update(v.name for node in one for v in node.outputs if v.name)
        names.update(node.name for node in one if node.name)
    return names


def merge_origins(into: ir.Node, *nodes: ir.Node) -> None:
    """Remember on `into` which nodes it stands for."""
    known = [origin for node in nodes for origin in ((node.name or "", node.op_type), *node.meta.get(ORIGINS, ()))]
    into.meta[ORIGINS] = (*into.meta.get(ORIGINS, ()), *known)


def fresh_name(base: str, taken: set[str]) -> str:
    """`base`, or `base_1`, `base_2`... whichever is free; marks it as taken."""
    name, suffix = base, 0
    while name in taken:
        suffix += 1
        name = f"{base}_{suffix}"
    taken.add(name)
    return name
