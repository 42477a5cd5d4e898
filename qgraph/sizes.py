"""What the arithmetic of shapes that exporters write into a graph can give, without running it."""

from __future__ import annotations

from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from qgraph import graph

__all__ = ["MOVES", "Factors", "Size", "elements", "factors", "natural"]

_ALONG = ("Concat", "Gather", "Slice")
"""They work along an axis, of which a vector has one."""
_WIDE = (ir.DataType.INT32, ir.DataType.INT64)
_SMALL = 64
_DIMENSIONS = ("Shape", "Size")
MOVES = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Concat")
"""Operators that move sizes about and make no others of them."""

Size: TypeAlias = "int | tuple[ir.Value, int]"
"""A number, or a dimension of a value, counted from its first."""
Factors: TypeAlias = tuple[Size, ...]
"""Numbers and dimensions to multiply; one number at most, and it comes first."""


def natural(value: ir.Value | None) -> bool:
    """Whether all numbers of `value` are dimensions of something, moved about at most, or constants from 0 on."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        one = pending.pop()
        if one is None or len(seen) > _SMALL:
            return False
        if one in seen:
            continue
        seen.add(one)
        array = graph.constant(one)
        if array is not None:
            if array.size > _SMALL or not np.all(array >= 0):
                return False
        elif graph.producer(one, *_DIMENSIONS) is None:
            node = graph.producer(one, *MOVES)
            if node is None:
                return False
            pending.extend(node.inputs if node.op_type == "Concat" else node.inputs[:1])
    return True


def elements(value: ir.Value | None) -> list[Size] | None:
    """Each number of a vector or scalar of sizes; None where not even their count is known, or one is a product."""
    found = factors(value)
    if found is None or any(len(one) > 1 for one in found):
        return None
    return [one[0] for one in found]


def factors(value: ir.Value | None, depth: int = 8) -> list[Factors] | None:
    """What each number of a vector or scalar of sizes is the product of; None where not even their count is known."""
    array = graph.constant(value)
    if array is not None:
        return [(int(n),) for n in array.reshape(-1)] if array.dtype.kind == "i" and array.size <= _SMALL else None
    node = graph.producer(value, "Shape", "Mul", *MOVES)
    if value is None or node is None or depth == 0:
        return None
    if node.op_type == "Shape":
        x = node.inputs[0]
        if x is None or x.shape is None:
            return None
        rank = len(x.shape)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
        return [((x, i),) for i in range(rank)[start:end]]
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) not in _WIDE:
        return None
    count = len(node.inputs) if node.op_type in ("Concat", "Mul") else 1
    if node.op_type in _ALONG and not all(_is_vector(source) for source in node.inputs[:count]):
        return None
    parts = [factors(part, depth - 1) for part in node.inputs[:count]]
    known = [part for part in parts if part is not None]
    if len(known) < count:
        return None
    if node.op_type == "Concat":
        return [one for part in known for one in part]
    if node.op_type == "Mul":
        return [_times(*known[0][0], *known[1][0])] if all(len(part) == 1 for part in known) else None
    return known[0] if node.op_type not in _ALONG else _picked(node, known[0])


def _times(*sizes: Size) -> Factors:
    """One product of all."""
    dims = [one for one in sizes if not isinstance(one, int)]
    number = prod(one for one in sizes if isinstance(one, int))
    return (number, *dims) if number != 1 or not dims else tuple(dims)


def _picked(node: ir.Node, found: list[Factors]) -> list[Factors] | None:
    """Those that a Gather or Slice takes."""
    numbers = [None if one is None else graph.constant(one) for one in node.inputs[1:]]
    if any(array is None for one, array in zip(node.inputs[1:], numbers, strict=True) if one is not None):
        return None
    picked = [None if array is None else [int(n) for n in array.reshape(-1)] for array in numbers]
    if node.op_type == "Gather":
        index = picked[0] or []
        return [found[i] for i in index] if all(-len(found) <= i < len(found) for i in index) else None
    first, last, _, step = [*picked, *[None] * (4 - len(picked))][:4]
    if not first or not last or (step is not None and step != [1]):
        return None
    return found[first[0] : last[0]]


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) <= 1
