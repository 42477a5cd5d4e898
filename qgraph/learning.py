"""About how long it takes to learn the roundings of a model, from the sizes of its layers and of the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import onnx_ir as ir

from qgraph import graph
from qgraph.calibration import SAMPLE
from qgraph.observers.sample import Patches
from qgraph.observers.second_moment import patches_of, stride_of

__all__ = ["seconds"]

_Key: TypeAlias = "tuple[ir.Value | None, Patches | None, int]"
_PER_SECOND = 6e9
"""Inputs squared times outputs, the solver's work, on two cores: 6e9 with 768 inputs, 2e10 with 3072."""
_SUMMED_PER_SECOND = 1.5e10
"""Rows times inputs squared, the work of second moments, on two cores."""
_CUT = 3.0
"""Times as long as rows that patches take, which are cut out of images first."""


def seconds(layers: Iterable[ir.Node], runs: int, memory: int) -> float:
    """Of layers of a surveyed model; 0 where none of them can be learned.

    Args:
        layers: those whose weights will be in codes with a scale per tensor or per axis.
        runs: of the data.
        memory: bytes that a second moment may take: layers with a larger one are not learned.
    """
    solved = summed = 0.0
    seen: set[_Key] = set()
    for node, key in _alone(layers):
        groups, inputs, outputs = _sizes(node)
        if 8 * groups * inputs * inputs > memory:
            continue
        solved += groups * inputs * inputs * (outputs + inputs)
        if key not in seen:
            seen.add(key)
            summed += runs * _rows(node) * groups * inputs * inputs * (_CUT if node.op_type == "Conv" else 1.0)
    return solved / _PER_SECOND + summed / _SUMMED_PER_SECOND


def _alone(layers: Iterable[ir.Node]) -> list[tuple[ir.Node, _Key]]:
    """Those with a sample, and what they read; not where layers that read something else share the weight."""
    found: list[tuple[ir.Node, _Key]] = []
    readers: dict[ir.Value | None, set[_Key]] = {}
    for node in layers:
        if SAMPLE in node.meta and graph.run_shape(node.inputs[1]):
            groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
            found.append((node, (node.inputs[0], patches_of(node), groups)))
            readers.setdefault(node.inputs[1], set()).add(found[-1][1])
    return [(node, key) for node, key in found if len(readers[node.inputs[1]]) == 1]


def _sizes(node: ir.Node) -> tuple[int, int, int]:
    """(groups, inputs of each, outputs of each)."""
    shape = list(graph.run_shape(node.inputs[1]) or ())
    rows = len(shape) > 2 or bool(node.attributes.get_int("transB", 0))
    outputs = shape[0] if rows else shape[-1]
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    return groups, math.prod(shape) // max(1, outputs), outputs // max(1, groups)


def _rows(node: ir.Node) -> int:
    """Rows, or patches, that one run adds to the layer's second moment."""
    if node.op_type == "Conv":
        image = graph.run_shape(node.outputs[0])
        return image[0] * math.prod(-(-size // stride_of(image[2:])) for size in image[2:]) if image else 0
    source = graph.run_shape(node.inputs[0])
    return math.prod(source[:-1]) if source else 0
