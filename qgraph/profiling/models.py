"""Small models to time kernels with: each is a chain of one operator, in float or in integers.

Weights are given by one row of theirs, which an Expand repeats: the runtime does that as it loads the model, so that a
file is small and the kernels still find constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["MICROSOFT", "Net"]

MICROSOFT = "com.microsoft"
_SCALE = 0.05
_WHOLE_BYTES = 4096
_OPSET, _IR_VERSION = 17, 9


class Net:
    """A model under construction; in integers, each value goes through a pair of QuantizeLinear and DequantizeLinear.

    Args:
        codes: type of quantized activations, or None for the float model. Their zero point is the least code, so that
            a Relu is done by the quantizer.
    """

    def __init__(self, codes: type[np.integer[Any]] | None):
        self.codes = codes
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET, MICROSOFT: 1}, name="kernels")
        self._random = np.random.default_rng(0)
        self._count = 0

    def _name(self, base: str) -> str:
        self._count += 1
        return f"{base}{self._count}"

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """An initializer."""
        name = self._name("c")
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        self._graph.register_initializer(value)
        return value

    def filled(self, shape: Sequence[int], make: Callable[[Sequence[int]], NDArray[Any]]) -> ir.Value:
        """A constant of that shape; a large one repeats what `make` gives for one step along the first axis."""
        whole = math.prod(shape) * make([1]).itemsize <= _WHOLE_BYTES
        if whole:
            return self.constant(make(shape))
        return self.node("Expand", [self.constant(make([1, *shape[1:]])), self.constant(np.asarray(shape, np.int64))])

    def node(self, operator: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """The first output of a new node, as the operator gives it."""
        return self.nodes(operator, inputs, 1, domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """All outputs of a new node."""
        name = self._name("n")
        made = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for number, value in enumerate(made.outputs):
            value.name = f"{name}_{number}"
        self._graph.append(made)
        return made.outputs

    def _parameters(self) -> tuple[ir.Value, ir.Value]:
        assert self.codes is not None, "the float model has no codes"
        scale, zero = np.float32(_SCALE), self.codes(np.iinfo(self.codes).min)
        return self.constant(np.asarray(scale)), self.constant(np.asarray(zero))

    def quantized(self, value: ir.Value) -> ir.Value:
        """The value after a pair of QuantizeLinear and DequantizeLinear; in the float model, itself."""
        if self.codes is None:
            return value
        parameters = self._parameters()
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *parameters]), *parameters])

    def input(self, *shape: int) -> ir.Value:
        """An input: floats, or codes and their DequantizeLinear."""
        kind = ir.DataType.FLOAT if self.codes is None else ir.DataType.from_numpy(np.dtype(self.codes))
        value = ir.val(self._name("x"), kind, list(shape))
        self._graph.inputs.append(value)
        return value if self.codes is None else self.node("DequantizeLinear", [value, *self._parameters()])

    def op(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """An operator in the model's form."""
        return self.quantized(self.node(operator, inputs, **attributes))

    def normal(self, shape: Sequence[int], inner: int) -> ir.Value:
        """Random float weights that keep the size of what they multiply."""

        def make(part: Sequence[int]) -> NDArray[Any]:
            return (self._random.standard_normal(part) / math.sqrt(inner)).astype(np.float32)

        return self.filled(shape, make)

    def bytes(self, shape: Sequence[int], dtype: type[np.integer[Any]]) -> ir.Value:
        """Random codes of a weight."""
        info = np.iinfo(dtype)

        def make(part: Sequence[int]) -> NDArray[Any]:
            return self._random.integers(max(info.min, -127), info.max, part, dtype=dtype, endpoint=True)

        return self.filled(shape, make)

    def weight(self, shape: Sequence[int], axis: int) -> tuple[ir.Value, NDArray[np.float32]]:
        """A weight in the model's form, and its scales along `axis`."""
        inner = math.prod(shape) // shape[axis]
        scales = np.full(shape[axis], 1 / (64 * math.sqrt(inner)), np.float32)
        if self.codes is None:
            return self.normal(shape, inner), scales
        zeros = self.constant(np.zeros(shape[axis], np.int8))
        codes = self.bytes(shape, np.int8)
        return self.node("DequantizeLinear", [codes, self.constant(scales), zeros], axis=axis), scales

    def conv(self, x: ir.Value, sizes: tuple[int, int, int], stride: int = 1, groups: int = 1) -> ir.Value:
        """Convolution of (in, out, kernel) with bias and Relu, which in integers is the quantizer's."""
        inside, outside, kernel = sizes
        weight, scales = self.weight((outside, inside // groups, kernel, kernel), 0)
        bias = self.constant(np.zeros(outside, np.float32 if self.codes is None else np.int32))
        if self.codes is not None:
            scale = self.constant(scales * np.float32(_SCALE))
            bias = self.node("DequantizeLinear", [bias, scale, self.constant(np.zeros(outside, np.int32))], axis=0)
        around = (kernel - 1) // 2
        y = self.op(
            "Conv",
            *(x, weight, bias),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[around] * 4,
            group=groups,
        )
        return self.node("Relu", [y]) if self.codes is None else y

    def model(self, *outputs: ir.Value) -> ir.Model:
        """The model; outputs that were just dequantized leave as codes."""
        kind = ir.DataType.FLOAT if self.codes is None else ir.DataType.from_numpy(np.dtype(self.codes))
        for value in outputs:
            maker = value.producer()
            if maker is not None and maker.op_type == "DequantizeLinear":
                codes = maker.inputs[0]
                assert codes is not None, "it reads codes"
                self._graph.remove(maker, safe=True)
                codes.type = ir.TensorType(kind)
                self._graph.outputs.append(codes)
            else:
                if value.type is None:
                    value.type = ir.TensorType(ir.DataType.FLOAT)
                self._graph.outputs.append(value)
        return ir.Model(self._graph, ir_version=_IR_VERSION)
