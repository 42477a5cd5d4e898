"""The CPU provider's kernels with float inputs and outputs: dynamic int8, and weights in blocks of few bits.

They need no calibration, and stand alone: nothing about their neighbours changes.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qgraph import graph, ternary, weights
from qgraph.formats import INT8
from qgraph.spec import PerAxis, PerBlock, QuantSpec, Scheme
from qgraph.targets import cpu_checks, cpu_costs
from qgraph.targets.base import Form, Kernel, Output, Refusal
from qgraph.targets.cpu_costs import Costs

__all__ = ["HERE", "find"]

HERE = "onnxruntime's CPU provider"

# u8 x s8 products of this many terms may leave int32.
_LONGEST_SUM = (2**31 - 1) // (255 * 127)

# Seconds that a byte less on disk and in memory is worth: a table of 10 MB may cost 5 us.
_BYTE = 5e-13
_PICKED = 50_000


def find(node: ir.Node, scheme: Scheme, costs: Costs, provider: str = HERE) -> Kernel | Refusal:
    """The kernel for `node` in a dynamic or weight-only scheme, or why `provider`, in words, has none."""
    if weights.is_product(node):
        return _product(node, scheme, costs)
    if node.op_type == "LSTM":
        return _lstm(node, scheme, costs, provider)
    if node.op_type == "Gather":
        return _embedding(node, scheme, costs)
    if node.op_type == "Conv":
        if scheme.dynamic:
            return Refusal("onnxruntime's dynamic integer convolution is slower than the float one")
        return Refusal(f"{provider} has no convolution with quantized weights and float activations")
    if node.op_type == "GRU":
        return Refusal(f"{provider} has no integer GRU")
    if scheme.dynamic:
        return Refusal(f"{provider} has no dynamic integer {node.op_type}")
    if not any(value is not None and graph.has_constant(value) and graph.is_float(value) for value in node.inputs):
        return Refusal("it has no weights, and the scheme is about weights alone")
    return Refusal(f"{provider} has no {node.op_type} with quantized weights and float activations")


def _product(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    form = cpu_checks.product(node, "a product of two activations has no weight")
    if isinstance(form, Refusal):
        return form
    inner, columns, transposed = form
    rows = cpu_checks.rows(node.inputs[0], inner)
    plain = costs.seconds(cpu_costs.matmul(rows, inner, columns).in_float)
    if not scheme.dynamic:
        # What is ternary already needs no more than two bits, in whatever scheme.
        grid = ternary.grid_of(node.inputs[1])
        spec = scheme.weight if grid is None else grid.spec(1 if transposed else 0)
        return _blocks(scheme, spec, (rows, inner, columns), transposed, costs)
    if node.op_type == "FusedMatMul":
        return Refusal("its weight is read transposed; the dynamic integer product takes it as it lies")
    if inner > _LONGEST_SUM:
        return Refusal(f"a sum of {inner} products may leave int32")
    return Kernel(
        ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
        {},
        weight=(1, replace(scheme.weight, granularity=PerAxis(0 if transposed else 1))),
        bias=2 if len(node.inputs) > 2 else None,
        output=Output.FLOAT,
        form=Form.DYNAMIC,
        scheme=scheme.name,
        float_seconds=plain,
        integer_seconds=costs.seconds(cpu_costs.dynamic(rows, inner, columns)),
    )


def _blocks(
    scheme: Scheme, weight: QuantSpec, sizes: tuple[int, int, int], transposed: bool, costs: Costs
) -> Kernel | Refusal:
    rows, inner, columns = sizes
    granularity = weight.granularity
    assert isinstance(granularity, PerBlock), "weight-only kernels take blocks"
    if inner < granularity.size:
        return Refusal(f"its {inner} rows are less than one block of {granularity.size}")
    bits = weight.format.storage.bitwidth
    saved = _BYTE * inner * columns * (4 - bits / 8)
    return Kernel(
        ("MatMulNBits",),
        {},
        weight=(1, replace(weight, granularity=PerBlock(1 if transposed else 0, granularity.size))),
        output=Output.FLOAT,
        form=Form.WEIGHTS,
        scheme=scheme.name,
        float_seconds=costs.seconds(cpu_costs.matmul(rows, inner, columns).in_float),
        integer_seconds=costs.seconds(cpu_costs.blocks(rows, inner, columns, bits, granularity.size)) - saved,
    )


def _embedding(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    table = node.inputs[0]
    if scheme.activation is not None:
        return Refusal("a table has no product; only its weights can be quantized (int8-weights)")
    refusal = cpu_checks.weight(table, "the table")
    if refusal is not None or table is None:
        return refusal or Refusal("an input is missing")
    shape = graph.run_shape(table) or ()
    if node.attributes.get_int("axis", 0) or len(shape) != 2:
        return Refusal("only rows of a table with two dimensions are picked from int8")
    # A language model picks one row at a time, however long the prompts in the data are.
    picked = min(cpu_costs.elements(node.outputs[0]), _PICKED)
    cost = costs.of(cpu_costs.picked_rows(picked))
    seconds = cost.in_integers - _BYTE * 3 * shape[0] * shape[1]
    # A product that reads the table brings it into blocks; a copy in float would be kept for this node alone.
    shared = any(weights.is_product(reader) for reader in table.consumers())
    return Kernel(
        ("Gather",),
        {},
        weight=(0, QuantSpec(INT8, PerAxis(0), symmetric=True, observer="minmax")),
        output=Output.FLOAT,
        form=Form.WEIGHTS,
        scheme=scheme.name,
        float_seconds=cost.in_float,
        integer_seconds=min(seconds, 0.0) if shared else seconds,
    )


def _lstm(node: ir.Node, scheme: Scheme, costs: Costs, provider: str) -> Kernel | Refusal:
    if not scheme.dynamic:
        return Refusal(f"{provider} has no LSTM with quantized weights and float activations")
    source, weight, recurrence = node.inputs[0], node.inputs[1], node.inputs[2]
    refusal = (
        cpu_checks.float_activation(source)
        or cpu_checks.weight(weight, "the input weight")
        or cpu_checks.weight(recurrence, "the recurrence weight")
    )
    if refusal is not None:
        return refusal
    if node.attributes.get_int("layout", 0):
        return Refusal("onnxruntime's LSTM takes no batch-first layout")
    shape, size = graph.run_shape(weight) or (1, 1, 1), (graph.run_shape(recurrence) or (1, 1, 1))[-1]
    seen = graph.run_shape(source)
    steps, batch = (seen[0], seen[1]) if seen is not None and len(seen) == 3 else (32, 1)
    cost = costs.of(cpu_costs.lstm(shape[0] * shape[1] * (shape[2] + size) * steps * batch))
    return Kernel(
        ("DynamicQuantizeLSTM",),
        {},
        weight=(1, replace(scheme.weight, granularity=PerAxis(1))),
        output=Output.FLOAT,
        form=Form.DYNAMIC,
        scheme=scheme.name,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )
