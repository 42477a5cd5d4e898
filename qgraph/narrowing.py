"""Weights that are float32 views of 16-bit floats -> what they are views of, and a Cast.

The runtime's constant folding runs the Cast once, as it loads the model. So the weight is exact, and no larger than it
was on disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qgraph import graph, widened
from qgraph.widened import Widened

__all__ = ["narrow", "narrowed"]


def narrow(model: ir.Model) -> list[ir.Node]:
    """Put each such weight behind a Cast of what it is a view of, in place; the Casts, in order."""
    made: list[ir.Node] = []
    taken: set[str] | None = None
    for home, value, tensor in list(_views(model)):
        if taken is None:
            taken = graph.value_names(model.graph)
        kind = tensor.source.dtype
        label = graph.fresh_name(f"{value.name}_{kind.name.lower()}", taken)
        stored = ir.Value(
            name=label,
            const_value=_renamed(tensor.source, label),
            type=ir.TensorType(kind),
            shape=ir.Shape(tensor.shape.numpy()),
        )
        cast = ir.Node(
            "",
            "Cast",
            [stored],
            [ir.AttrInt64("to", int(ir.DataType.FLOAT))],
            name=graph.fresh_name(f"{label}_Cast", taken),
        )
        result, name = cast.outputs[0], str(value.name)
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(tensor.shape.numpy())
        result.meta.update(value.meta)
        ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
        del home.initializers[name]
        result.name = name
        home.register_initializer(stored)
        graph.insert_behind(home, None, cast)
        made.append(cast)
    return made


def narrowed(model: ir.Model) -> ir.Model:
    """`model` as `narrow` leaves it: a copy, or itself where there is nothing to do."""
    if next(_views(model), None) is None:
        return model
    copy = model.clone()
    narrow(copy)
    return copy


def _views(model: ir.Model) -> Iterator[tuple[ir.Graph, ir.Value, Widened]]:
    for home in graph.all_graphs(model.graph):
        for value in home.initializers.values():
            if isinstance(value.const_value, Widened):
                yield home, value, value.const_value


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The same tensor under another name; others hold `tensor` under its own."""
    if isinstance(tensor, ir.ExternalTensor):
        return widened.window(tensor, 0, tensor.length, tensor.shape, name)
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)
