"""A small graph writer with named, seeded weights, shared by every builder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

OPSET = 17
IR_VERSION = 8

Array: TypeAlias = npt.NDArray[np.generic]
FloatArray: TypeAlias = npt.NDArray[np.float32]
Attribute: TypeAlias = int | float | str | Sequence[int] | Sequence[float]
Dim: TypeAlias = int | str


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator of its own for each `name`, so that adding a layer leaves every other weight as it was."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


class GraphWriter:
    """Appends nodes in topological order and names node and value as torch's exporter does (`/scope/Op`)."""

    def __init__(self, name: str, *, seed: int = 0) -> None:
        self.name = name
        self.seed = seed
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._weights: dict[str, ir.Value] = {}
        self._taken: dict[str, int] = {}

    def generator(self, name: str) -> np.random.Generator:
        """The random generator that belongs to the weight `name`."""
        return generator(self.seed, name)

    def normal(self, name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> FloatArray:
        """A seeded float32 array drawn from N(mean, std), the same for the same seed and name."""
        sample = self.generator(name).standard_normal(tuple(shape), dtype=np.float32)
        sample *= np.float32(std)
        sample += np.float32(mean)
        return sample

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Declare a graph input; a string is a symbolic dimension."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim | None]) -> None:
        """Declare `value` a graph output under `name`."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, array: npt.NDArray[np.generic] | ir.LazyTensor) -> ir.Value:
        """Register an initializer, or return the one already registered under `name`."""
        known = self._weights.get(name)
        if known is not None:
            return known
        shape = array.shape if isinstance(array, ir.LazyTensor) else ir.Shape(array.shape)
        tensor = array if isinstance(array, ir.LazyTensor) else ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._weights[name] = value
        return value

    def constant(self, array: npt.ArrayLike, scope: str, *, dtype: npt.DTypeLike = np.float32) -> ir.Value:
        """Append a Constant node: torch exports scalars and shapes so, and a compiler must see through it."""
        name = self._unique(f"{scope}/Constant")
        tensor = ir.tensor(np.asarray(array, dtype=dtype), name=name)
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1, name=name)
        return self._append(node)

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], scope: str, **attributes: Attribute) -> ir.Value:
        """Append a node with one output and return that output; None leaves an optional input out."""
        attrs = [_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, num_outputs=1, name=self._unique(f"{scope}/{op_type}"))
        return self._append(node)

    def model(self) -> ir.Model:
        """The finished model, at opset 17."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._weights.values()),
            opset_imports={"": OPSET},
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qgraph.models")

    def _append(self, node: ir.Node) -> ir.Value:
        node.outputs[0].name = f"{node.name}_output_0"
        self._nodes.append(node)
        return node.outputs[0]

    def _unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def _attribute(key: str, value: Attribute) -> ir.Attr:
    if isinstance(value, str):
        return ir.AttrString(key, value)
    if isinstance(value, int):
        return ir.AttrInt64(key, value)
    if isinstance(value, float):
        return ir.AttrFloat32(key, value)
    integers = [item for item in value if isinstance(item, int)]
    if len(integers) == len(value):
        return ir.AttrInt64s(key, integers)
    return ir.AttrFloat32s(key, [float(item) for item in value])


def lognormal(writer: GraphWriter, name: str, size: int, *, median: float, spread: float) -> FloatArray:
    """`size` positive float32 factors around `median`; `spread` is the standard deviation of their logarithm."""
    return np.exp(writer.normal(name, (size,), spread, math.log(median))).astype(np.float32)
