"""MatMul(x, W) -> DynamicQuantizeLinear(x), MatMulInteger with W in int8 per column, Mul by both scales.

The standard operators in the order in which the runtime fuses them to DynamicQuantizeMatMul; products of one x share
its DynamicQuantizeLinear and become MatMulIntegerToFloat. A Gemm becomes the same, with its bias added behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from qgraph.passes.calibrate_weights import WEIGHT
from qgraph.passes.round_weights import CODES

from qgraph import graph, held, weights
from qgraph.qparams import QParams, quantize
from qgraph.targets import KERNEL, REASON, Form, Kernel

__all__ = ["InsertDynamic"]


class InsertDynamic(ir.passes.InPlacePass):
    """Writes the products that annotation planned as dynamic; their weights need `CalibrateWeights` before.

    Refused: nothing; what cannot be written so was not planned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        main = model.graph
        planned = [node for node in main if _is_planned(node)]
        writer = _Writer(main)
        for node in planned:
            writer.product(node)
        if planned:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(planned))


def _is_planned(node: ir.Node) -> bool:
    kernel: Kernel | None = node.meta.get(KERNEL)
    return kernel is not None and kernel.form is Form.DYNAMIC and node.op_type in ("MatMul", "Gemm")


class _Writer:
    def __init__(self, main: ir.Graph):
        self.main = main
        self.names = graph.value_names(main)
        self.quantized: dict[ir.Value, ir.Node] = {}
        self.codes: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    def _node(self, op_type: str, inputs: list[ir.Value], base: str, before: ir.Node, **attributes: int) -> ir.Node:
        count = 3 if op_type == "DynamicQuantizeLinear" else 1
        found = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        made = ir.Node("", op_type, inputs, attributes=found, num_outputs=count)
        made.name = graph.fresh_name(f"{base}_{op_type}", self.names)
        made.meta[REASON] = f"part of the dynamic product {base}"
        for number, value in enumerate(made.outputs):
            value.name = graph.fresh_name(f"{made.name}_{number}", self.names)
        self.main.insert_before(before, made)
        return made

    def _activation(self, value: ir.Value, node: ir.Node) -> ir.Node:
        """The DynamicQuantizeLinear of `value`; it stands before its first reader, or the others would precede it."""
        if value not in self.quantized:
            base = str(value.name)
            made = self._node("DynamicQuantizeLinear", [value], base, node)
            kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            for output, kind in zip(made.outputs, kinds, strict=True):
                output.type = ir.TensorType(kind)
            made.outputs[0].shape = value.shape
            self.quantized[value] = made
        return self.quantized[value]

    def _weight(self, node: ir.Node, weight: ir.Value, transposed: bool) -> tuple[ir.Value, ir.Value]:
        """(codes [K, N], learned ones where there are, scales [N])."""
        params: QParams = node.meta[WEIGHT]
        learned: NDArray[Any] | None = node.meta.get(CODES)
        key = (weight, params.scale.tobytes(), transposed, id(learned))
        if key not in self.codes:
            shape = graph.run_shape(weight) or (0, 0)

            def codes(array: NDArray[Any]) -> NDArray[Any]:
                found = quantize(array, params) if learned is None else np.asarray(learned)
                return np.ascontiguousarray(found.T) if transposed else found

            name = graph.fresh_name(f"{weight.name}_quantized", self.names)
            made = weights.derived(
                self.main, weight, codes, params.format.storage, shape[::-1] if transposed else shape, name
            )
            held.keep(made, weight, params, turned=True)
            scale = graph.fresh_name(f"{weight.name}_scale", self.names)
            self.codes[key] = made, graph.add_initializer(self.main, ir.Tensor(params.scale.astype(np.float32)), scale)
        return self.codes[key]

    def product(self, node: ir.Node) -> None:
        """Write one product; its integer part carries its name and kernel."""
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None and weight is not None
        base = str(node.name)
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        codes, scale = self._weight(node, weight, transposed)
        quantized, step, zero = self._activation(source, node).outputs
        integer = self._node("MatMulInteger", [quantized, codes, zero], base, node)
        product = integer.outputs[0]
        product.type, product.shape = ir.TensorType(ir.DataType.INT32), node.outputs[0].shape
        real = self._node("Cast", [product], base, node, to=int(ir.DataType.FLOAT)).outputs[0]
        real.type, real.shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
        both = self._node("Mul", [step, scale], f"{base}_scales", node).outputs[0]
        both.type = ir.TensorType(ir.DataType.FLOAT)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            last = ir.Node("", "Mul", [real, both])
            self._flatten_bias_of(node)
        else:
            scaled = self._node("Mul", [real, both], base, node).outputs[0]
            scaled.type, scaled.shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
            last = ir.Node("", "Add", [scaled, weights.flat(self.main, bias, self.names)])
        last.name = graph.fresh_name(f"{base}_scaled", self.names)
        # The fused kernel takes the name of the integer product.
        integer.name, integer.meta[KERNEL] = base, node.meta[KERNEL]
        del integer.meta[REASON]
        integer.metadata_props.update(node.metadata_props)
        last.meta[REASON] = f"part of the dynamic product {base}"
        graph.replace_node(self.main, node, last)

    def _flatten_bias_of(self, node: ir.Node) -> None:
        """The fused kernel takes the bias of an Add behind it, of one dimension only."""
        product = node.outputs[0]
        users = product.consumers()
        if len(users) != 1 or product.is_graph_output() or not graph.is_standard(users[0], "Add"):
            return
        position = 1 - list(users[0].inputs).index(product)
        bias = users[0].inputs[position]
        shape = graph.run_shape(bias)
        rank = node.inputs[0].shape if node.inputs[0] is not None else None
        # A bias of more dimensions than the product would give it these, too.
        fits = rank is not None and shape is not None and len(shape) <= len(rank)
        if bias is not None and graph.has_constant(bias) and shape and fits and int(np.prod(shape)) == shape[-1]:
            users[0].replace_input_with(position, weights.flat(self.main, bias, self.names))
