"""x -> QuantizeLinear -> DequantizeLinear -> kernel, around every node that is planned for integers.

Scales and zero points are scalars (the runtime's kernels refuse [1]); every integer reader gets a DequantizeLinear of
its own, as the runtime's fusions want; a Relu or Clip whose bounds the codes already have is taken out, since between a
layer and its QuantizeLinear it would keep the layer in float. Weights get QuantizeLinear too, for `FoldWeights` to
fold; biases become int32 at once, at a scale whose accumulator provably cannot overflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from qgraph.passes.calibrate_weights import CONSTANTS, INPUT, WEIGHT
from qgraph.passes.round_weights import CODES

from qgraph import graph
from qgraph.qparams import QParams, bias_scale, quantize
from qgraph.targets import ABSORBED, KERNEL, QPARAMS, REASON, Form, Kernel, Output, Target

__all__ = ["InsertQDQ"]


class InsertQDQ(ir.passes.InPlacePass):
    """Writes the quantization that annotation planned and calibration measured into the graph.

    Args:
        target: names the operators that the runtime would pull into integers although they are planned in float; a
            Sum of one value is put behind them, which the runtime leaves alone.
    """

    def __init__(self, target: Target | None = None):
        super().__init__()
        self.greedy: frozenset[str] = frozenset() if target is None else target.greedy_fusions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        writer = _Writer(model.graph)
        nodes = [node for node in model.graph if KERNEL in node.meta and node.meta[KERNEL].form is Form.QDQ]
        for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
            if QPARAMS in value.meta:
                writer.activation(value)
        for node in nodes:
            writer.parameters(node)
        for node in list(model.graph):
            if KERNEL not in node.meta and graph.is_standard(node, *self.greedy):
                writer.shield(node)
        return ir.passes.PassResult(model, bool(nodes))


class _Writer:
    def __init__(self, main: ir.Graph):
        self.main = main
        self.names = graph.value_names(main)
        self.weights: dict[tuple[object, ...], ir.Value] = {}

    # -- pieces ---------------------------------------------------------------------------------------------------

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        return graph.add_initializer(self.main, ir.Tensor(array), graph.fresh_name(name, self.names))

    def constants(self, base: str, params: QParams) -> tuple[ir.Value, ir.Value]:
        zero = params.zero_point.astype(params.format.storage.numpy())
        return self.initializer(f"{base}_scale", params.scale), self.initializer(f"{base}_zero_point", zero)

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        base: str,
        kind: ir.DataType,
        like: ir.Value,
        axis: int | None = None,
    ) -> ir.Node:
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        name = graph.fresh_name(f"{base}_{op_type}", self.names)
        made = ir.Node("", op_type, inputs, attributes=attributes, name=name)
        suffix = "quantized" if op_type == "QuantizeLinear" else "dequantized"
        made.outputs[0].name = graph.fresh_name(f"{base}_{suffix}", self.names)
        made.outputs[0].type = ir.TensorType(kind)
        made.outputs[0].shape = like.shape
        return made

    # -- activations ----------------------------------------------------------------------------------------------

    def activation(self, value: ir.Value) -> None:
        """Quantize `value` for its integer readers, and for all when its maker writes integers."""
        params: QParams = value.meta[QPARAMS]
        base = str(value.name)
        integer: list[tuple[ir.Node, int]] = []
        others: list[tuple[ir.Node, int]] = []
        for node, position in value.uses():
            kernel: Kernel | None = node.meta.get(KERNEL)
            ours = kernel is not None and position in kernel.activations and node.graph is self.main
            (integer if ours else others).append((node, position))
        whole = self._made_in_integers(value)
        source = self._without_activation(value, params, whole or (not others and not value.is_graph_output()))
        scale, zero = self.constants(base, params)
        quantize_node = self.node("QuantizeLinear", [source, scale, zero], base, params.format.storage, value)
        quantized = quantize_node.outputs[0]
        start = source.producer()
        if start is None:
            self._insert_first(quantize_node)
        else:
            self.main.insert_after(start, quantize_node)
        for node, position in integer:
            reader = self.node("DequantizeLinear", [quantized, scale, zero], base, ir.DataType.FLOAT, value)
            self.main.insert_before(node, reader)
            node.replace_input_with(position, reader.outputs[0])
        if whole and (others or value.is_graph_output()):
            back = self.node("DequantizeLinear", [quantized, scale, zero], base, ir.DataType.FLOAT, value)
            self.main.insert_after(quantize_node, back)
            for node, position in others:
                node.replace_input_with(position, back.outputs[0])
            if value.is_graph_output():
                self._take_over_output(value, back.outputs[0])

    def _made_in_integers(self, value: ir.Value) -> bool:
        """Whether the float form of `value` exists only for the kernel to be recognized."""
        maker = value.producer()
        if maker is None:
            return False
        kernel: Kernel | None = maker.meta.get(KERNEL)
        if ABSORBED in maker.meta and maker.inputs[0] is not None:
            before = maker.inputs[0].producer()
            kernel = before.meta.get(KERNEL) if before is not None else None
        return kernel is not None and kernel.output is Output.QUANTIZED

    def _without_activation(self, value: ir.Value, params: QParams, allowed: bool) -> ir.Value:
        """What to quantize instead of `value`: the input of its Relu or Clip if the codes clip just so."""
        maker = value.producer()
        if not allowed or maker is None or ABSORBED not in maker.meta:
            return value
        before = maker.inputs[0]
        if before is None or len(before.consumers()) != 1 or before.is_graph_output():
            return value
        low, high = graph.clip_bounds(maker)
        bottom, top = params.saturated
        step = float(np.max(params.scale))
        # Rounding the zero point may move the ends by half a step, as much as any value is rounded.
        if low is None or high is None or bottom < low - 0.51 * step or top > high + 0.51 * step:
            return value
        before.meta.update({k: v for k, v in value.meta.items() if k.startswith("qgraph.")})
        return before

    def _insert_first(self, node: ir.Node) -> None:
        first = next(iter(self.main), None)
        if first is None:
            self.main.append(node)
        else:
            self.main.insert_before(first, node)

    def _take_over_output(self, value: ir.Value, replacement: ir.Value) -> None:
        """The caller sees the dequantized value under the name it always had."""
        name = value.name
        value.name = graph.fresh_name(f"{name}_float", self.names)
        replacement.name, replacement.type, replacement.shape = name, value.type, value.shape
        for index, output in enumerate(self.main.outputs):
            if output is value:
                self.main.outputs[index] = replacement

    def shield(self, node: ir.Node) -> None:
        """Keep a float node between integers from being fused into a kernel that nobody chose."""
        floats = [v for v in node.inputs if v is not None and not v.is_initializer() and graph.is_float(v)]
        read = [value.producer() for value in floats]
        if not read or any(maker is None or maker.op_type != "DequantizeLinear" for maker in read):
            return
        value = node.outputs[0]
        users = value.consumers()
        if len(users) == 1 and graph.is_standard(users[0], "Relu", "Clip"):
            # The runtime may drop it for the range of the codes, and then see the two face to face.
            value = users[0].outputs[0]
        # A product of two activations is fused by its inputs alone; all else needs a QuantizeLinear behind it.
        if node.op_type == "MatMul":
            source = node.inputs[0]
            if source is not None:
                node.replace_input_with(0, self._sum(source, node))
        elif any(user.op_type == "QuantizeLinear" for user in value.consumers()):
            uses = [use for use in value.uses() if use.node.op_type == "QuantizeLinear"]
            summed = self._sum(value, uses[0].node)
            for user, position in uses:
                user.replace_input_with(position, summed)

    def _sum(self, value: ir.Value, before: ir.Node) -> ir.Value:
        base = str(value.name)
        made = ir.Node("", "Sum", [value], name=graph.fresh_name(f"{base}_Sum", self.names))
        made.outputs[0].name = graph.fresh_name(f"{base}_float", self.names)
        made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
        made.meta[REASON] = "keeps the runtime from fusing its input into an integer kernel that was not chosen"
        self.main.insert_before(before, made)
        return made.outputs[0]

    # -- weights and biases ---------------------------------------------------------------------------------------

    def parameters(self, node: ir.Node) -> None:
        """Quantize the weight, the bias and further constants of `node`."""
        kernel: Kernel = node.meta[KERNEL]
        constants: dict[int, QParams] = node.meta.get(CONSTANTS, {})
        for position, found in constants.items():
            value = node.inputs[position]
            if value is not None:
                node.replace_input_with(position, self._weight(node, value, found))
        if kernel.weight is None:
            return
        position, _ = kernel.weight
        weight = node.inputs[position]
        params: QParams = node.meta[WEIGHT]
        if weight is None:
            return
        node.replace_input_with(position, self._weight(node, weight, params, node.meta.get(CODES)))
        bias = node.inputs[kernel.bias] if kernel.bias is not None and len(node.inputs) > kernel.bias else None
        if bias is not None and kernel.bias is not None:
            array = np.asarray(graph.constant(bias), np.float64).reshape(-1)
            activation: QParams = node.meta[INPUT]
            node.replace_input_with(kernel.bias, self._bias(node, array, bias_scale(activation, params)))

    def _weight(self, node: ir.Node, weight: ir.Value, params: QParams, codes: NDArray[Any] | None = None) -> ir.Value:
        """A DequantizeLinear for this reader; the QuantizeLinear is shared by all readers with the same parameters."""
        base = str(weight.name)
        numbers = params.scale.tobytes(), params.zero_point.tobytes()
        key = (weight, params.format, params.axis, *numbers, id(codes))
        if key not in self.weights:
            scale, zero = self.constants(base, params)
            made = self.node("QuantizeLinear", [weight, scale, zero], base, params.format.storage, weight, params.axis)
            made.meta[WEIGHT] = params
            if codes is not None:
                made.meta[CODES] = codes
            self._insert_first(made)
            self.weights[key] = made.outputs[0]
        quantized = self.weights[key]
        maker = quantized.producer()
        assert maker is not None
        reader = self.node("DequantizeLinear", [quantized, *_tail(maker)], base, ir.DataType.FLOAT, weight, params.axis)
        self.main.insert_before(node, reader)
        return reader.outputs[0]

    def _bias(self, node: ir.Node, array: NDArray[np.float64], params: QParams) -> ir.Value:
        base = f"{node.name}_bias"
        codes = self.initializer(f"{base}_quantized", quantize(array, params))
        scale_value, zero = self.constants(base, params)
        reader = self.node("DequantizeLinear", [codes, scale_value, zero], base, ir.DataType.FLOAT, codes, params.axis)
        self.main.insert_before(node, reader)
        return reader.outputs[0]


def _tail(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[1:] if value is not None]
