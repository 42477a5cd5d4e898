"""Split(MatMul(x, [A, B])) -> MatMul(x, A), MatMul(x, B), through the reshapes and transposes in between.

Queries, keys and values are often one product whose result is taken apart by Split, Gather or Slice. With many rows,
these copies take more time than calls of smaller products, and in integers all parts would share one range, rounding
once more what a product in float leaves as it is (onnxruntime 1.31.1: tools/divided_products.py).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qgraph import graph, weights

__all__ = ["DivideProducts"]

_COPIED, _CALLED = 0.25, 10_000.0
"""Nanoseconds that an element of a part takes to be copied, and those that one call more takes."""

Columns = NDArray[np.intp]


@dataclasses.dataclass
class _Part:
    """What one node takes out of a product: its output, and the columns, in the order in which it has them."""

    output: ir.Value
    columns: Columns
    taken: int | None


@dataclasses.dataclass
class _Division:
    """A product, what stands behind it up to where it is taken apart, and the parts.

    Attributes:
        chain: Add of a constant row, Reshape, Transpose, in this order; any may be missing.
        pickers: the nodes that take it apart.
        parts: what they take.
        axis: along which they do, in the last of the chain.
        factor: number of that axis among those that the columns were reshaped to.
        factors: lengths of those.
        order: of the axes behind the transpose.
    """

    product: ir.Node
    chain: list[ir.Node]
    pickers: list[ir.Node]
    parts: list[_Part]
    axis: int
    factor: int
    factors: tuple[int, ...]
    order: list[int]


class DivideProducts(ir.passes.InPlacePass):
    """Products of many rows whose parts alone are read become a product for each part.

    Refused, silently since nothing is lost: sizes that are not known, few rows, results that are also read whole, parts
    that overlap, and weights that are shared with other products.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        found = [division for node in main if (division := _division(node)) is not None and _pays(division)]
        names = graph.value_names(main) if found else set[str]()
        for division in found:
            _divide(main, division, names)
        if found:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _division(node: ir.Node) -> _Division | None:
    weight = node.inputs[1] if graph.is_standard(node, "MatMul") else None
    shape = graph.run_shape(weight)
    if weight is None or shape is None or len(shape) != 2 or not graph.has_constant(weight) or len(weight.uses()) > 1:
        return None
    chain: list[ir.Node] = []
    value, factors, order = node.outputs[0], tuple(shape[1:]), list[int]()
    for kind in ("Add", "Reshape", "Transpose"):
        step = graph.only_reader(value)
        if step is None or not graph.is_standard(step, kind):
            continue
        before, after = graph.run_shape(value), graph.run_shape(step.outputs[0])
        if before is None or after is None:
            return None
        if kind == "Add" and not _is_row(step, value, shape[1]):
            return None
        if kind == "Reshape":
            lead = len(before) - 1
            target = graph.constant(step.inputs[1])
            if target is None or step.inputs[0] is not value or after[:lead] != before[:lead]:
                return None
            if math.prod(after[lead:]) != shape[1] or step.attributes.get_int("allowzero", 0) != 0:
                return None
            factors = after[lead:]
        if kind == "Transpose":
            order = list(step.attributes.get_ints("perm", list(range(len(after)))[::-1]))
        chain.append(step)
        value = step.outputs[0]
    final = graph.run_shape(value)
    if final is None:
        return None
    lead = len(final) - len(factors)
    return _taken_apart(node, chain, value, factors, lead, order or list(range(len(final))))


def _is_row(step: ir.Node, value: ir.Value, columns: int) -> bool:
    row = step.inputs[1 - list(step.inputs).index(value)]
    shape = graph.run_shape(row)
    return graph.has_constant(row) and shape is not None and shape[-1:] == (columns,) == (math.prod(shape),)


def _taken_apart(
    product: ir.Node, chain: list[ir.Node], value: ir.Value, factors: tuple[int, ...], lead: int, order: list[int]
) -> _Division | None:
    """The division, when every reader of `value` takes a part along one axis that is made of columns."""
    pickers = list(value.consumers())
    if value.is_graph_output() or not pickers or any(node.graph is not product.graph for node in pickers):
        return None
    rank = len(order)
    axes = {_axis(node, rank) for node in pickers}
    axis = axes.pop()
    if axes or axis is None or order[axis] < lead:
        return None
    factor = order[axis] - lead
    index = np.moveaxis(np.arange(math.prod(factors)).reshape(factors), factor, 0)
    parts: list[_Part] = []
    for node in pickers:
        if node.inputs[0] is not value:
            return None
        picked = _picked(node, axis, factors[factor])
        if picked is None:
            return None
        for output, places in zip(node.outputs, picked, strict=True):
            taken = None if places.ndim == 0 else places.size
            # Columns of a part stand in the order of the factors, this one cut down.
            columns = np.moveaxis(index[places.reshape(-1)], 0, factor).reshape(-1)
            parts.append(_Part(output, columns, taken))
    every = np.concatenate([part.columns for part in parts])
    if len(parts) < 2 or len(np.unique(every)) != every.size or any(part.columns.size == 0 for part in parts):
        return None
    if any(part.taken is None for part in parts) and not any(step.op_type == "Reshape" for step in chain):
        return None
    return _Division(product, chain, pickers, parts, axis, factor, factors, order)


def _axis(node: ir.Node, rank: int) -> int | None:
    if graph.is_standard(node, "Split", "Gather"):
        return node.attributes.get_int("axis", 0) % rank
    if graph.is_standard(node, "Slice") and len(node.inputs) > 3:
        axes = graph.constant(node.inputs[3])
        return int(axes[0]) % rank if axes is not None and axes.size == 1 else None
    return None


def _picked(node: ir.Node, axis: int, size: int) -> list[Columns] | None:
    """Which of `size` places along the axis each output takes; a scalar where the axis goes away."""
    constants = [graph.constant(value) for value in node.inputs[1:] if value is not None]
    if any(array is None for array in constants):
        return None
    arrays = [array for array in constants if array is not None]
    every = np.arange(size)
    if node.op_type == "Split":
        shapes = [graph.run_shape(output) for output in node.outputs]
        ends = np.cumsum([shape[axis] for shape in shapes if shape is not None])
        return list(np.split(every, ends[:-1])) if None not in shapes else None
    if node.op_type == "Gather":
        places = np.asarray(arrays[0], np.intp)
        return [np.where(places < 0, places + size, places)] if places.ndim < 2 else None
    start, end, step = (int(array[0]) for array in (arrays[0], arrays[1], arrays[3] if len(arrays) > 3 else np.ones(1)))
    return [every[start:end:step]] if step > 0 else None


def _pays(division: _Division) -> bool:
    count = graph.element_count(division.product.outputs[0])
    rows = (count or 0) // max(1, math.prod(division.factors))
    copied = sum(part.columns.size for part in division.parts) * rows * _COPIED
    return copied > (len(division.parts) - 1) * _CALLED


def _divide(main: ir.Graph, division: _Division, names: set[str]) -> None:
    """Put a product and a chain of its own in the place of each part."""
    product, chain = division.product, division.chain
    for number, part in enumerate(division.parts):
        made: list[ir.Node] = []
        value = product.inputs[0]
        for step in (product, *chain):
            end = f"part{number}"
            node = ir.Node(
                step.domain,
                step.op_type,
                _inputs(main, division, step, value, part, end, names),
                [ir.AttrInt64s("perm", _order(division, part))] if step.op_type == "Transpose" else [],
                name=graph.fresh_name(f"{step.name}_{end}", names),
                metadata_props=dict(step.metadata_props),
            )
            graph.merge_origins(node, step)
            made.append(node)
            value = node.outputs[0]
            value.name = graph.fresh_name(f"{step.outputs[0].name}_{end}", names)
            value.type = part.output.type
            sizes = _sizes(division, step, part)
            value.meta[graph.RUN_SHAPE] = sizes
            whole = step.outputs[0].shape
            if step.op_type != "Transpose" and whole is not None:
                # What is in front of the columns stays as it was, of any size.
                lead = len(whole) - (len(division.factors) if step.op_type == "Reshape" else 1)
                value.shape = ir.Shape([*whole[:lead], *sizes[lead:]])
        old, new = part.output, made[-1].outputs[0]
        new.name, new.shape = old.name, old.shape
        main.insert_before(product, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = None
    main.remove([*division.pickers, *chain[::-1], product], safe=True)


def _inputs(
    main: ir.Graph,
    division: _Division,
    step: ir.Node,
    value: ir.Value | None,
    part: _Part,
    end: str,
    names: set[str],
) -> list[ir.Value | None]:
    """Of the copy of `step` for a part, which reads `value`."""
    if step.op_type == "Transpose":
        return [value]
    if step.op_type == "Reshape":
        old = step.inputs[1]
        target = graph.constant(old)
        assert old is not None and target is not None
        sizes = [*target[: target.size - len(division.factors)], *_factors(division, part)]
        name = graph.fresh_name(f"{old.name}_{end}", names)
        return [value, graph.add_initializer(main, ir.tensor(np.array(sizes, np.int64)), name)]
    behind = step is not division.product
    position = [source is None or graph.has_constant(source) for source in step.inputs].index(True) if behind else 1
    old = step.inputs[position]
    shape = graph.run_shape(old)
    assert old is not None and old.dtype is not None and shape is not None
    columns = part.columns
    row = weights.derived(
        main,
        old,
        lambda array: np.ascontiguousarray(array[..., columns]),
        old.dtype,
        (*shape[:-1], columns.size),
        graph.fresh_name(f"{old.name}_{end}", names),
    )
    return [row, value] if position == 0 else [value, row]


def _factors(division: _Division, part: _Part) -> list[int]:
    """What the columns of a part are reshaped to."""
    sizes = list(division.factors)
    sizes[division.factor : division.factor + 1] = [] if part.taken is None else [part.taken]
    return sizes


def _order(division: _Division, part: _Part) -> list[int]:
    """The order of axes, without the one that goes away."""
    if part.taken is not None:
        return division.order
    gone = division.order[division.axis]
    return [axis - (axis > gone) for axis in division.order if axis != gone]


def _sizes(division: _Division, step: ir.Node, part: _Part) -> tuple[int, ...]:
    """Of the output of a copy of `step`, in a run."""
    before = graph.run_shape(step.outputs[0]) or ()
    if step.op_type == "Reshape":
        return (*before[: len(before) - len(division.factors)], *_factors(division, part))
    if step.op_type == "Transpose":
        return graph.run_shape(part.output) or ()
    return (*before[:-1], part.columns.size)
