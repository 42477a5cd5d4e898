"""The table of the CPU provider's integer kernels: operator -> the form it must be written in, and its cost.

Each entry is a function of the node, returning a Kernel or a Refusal with its reason; what its work takes, the costs
say that the target carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from qgraph import graph, stored, weights
from qgraph.spec import QuantSpec, Scheme
from qgraph.targets import cpu_checks, cpu_costs, cpu_products, cpu_stored
from qgraph.targets.base import Kernel, Output, Refusal
from qgraph.targets.cpu_costs import Costs

__all__ = ["find"]

_Entry = Callable[[ir.Node, Scheme, Costs], "Kernel | Refusal"]

_TWO_ACTIVATIONS = "a product of two activations gains too little for what it loses in accuracy"
_NO_KERNEL = "onnxruntime's CPU provider has no integer kernel for {}"


def find(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    """The kernel for `node` in one scheme, or why it has none."""
    if node.domain not in ("", "ai.onnx") and not weights.is_product(node):
        return Refusal(f"operator of domain {node.domain!r}")
    if stored.is_stored(scheme.weight.format):
        return cpu_stored.find(node, scheme)
    if not scheme.static:
        return cpu_products.find(node, scheme, costs)
    entry = _TABLE.get(node.op_type)
    if entry is None:
        return Refusal(_NO_KERNEL.format(node.op_type))
    kernel = entry(node, scheme, costs)
    return kernel if isinstance(kernel, Refusal) else replace(kernel, scheme=scheme.name)


def _codes(scheme: Scheme) -> QuantSpec:
    """Spec of activations of a static scheme."""
    assert scheme.activation is not None, "a static scheme has one"
    return scheme.activation


def _conv(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    weight = node.inputs[1]
    refusal = cpu_checks.float_activation(node.inputs[0]) or cpu_checks.weight(weight, "the weight")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if refusal is None and bias is not None:
        refusal = cpu_checks.weight(bias, "the bias")
    if refusal is not None or weight is None:
        return refusal or Refusal("no weight")
    shape = graph.run_shape(weight) or ()
    if len(shape) not in (3, 4):
        return Refusal(f"integer convolution is not known to pay in {len(shape) - 2} dimensions")
    cost = costs.of(cpu_costs.conv(cpu_costs.positions(node.outputs[0]), shape, node.attributes.get_int("group", 1)))
    return Kernel(
        ("QLinearConv",),
        {0: _codes(scheme)},
        weight=(1, scheme.weight_along(0)),
        bias=2 if bias is not None else None,
        result=_codes(scheme),
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _matmul(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    form = cpu_checks.product(node, _TWO_ACTIVATIONS)
    if isinstance(form, Refusal):
        return form
    inner, columns, _ = form
    cost = costs.of(cpu_costs.matmul(cpu_checks.rows(node.inputs[0], inner), inner, columns))
    return Kernel(
        ("MatMulIntegerToFloat", "QLinearMatMul"),
        {0: _codes(scheme)},
        weight=(1, scheme.weight_along(1)),
        output=Output.FLOAT,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _gemm(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    form = cpu_checks.product(node, _TWO_ACTIVATIONS)
    if isinstance(form, Refusal):
        return form
    inner, columns, transposed = form
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    cost = costs.of(cpu_costs.matmul(cpu_checks.rows(node.inputs[0], inner), inner, columns))
    return Kernel(
        ("QGemm",),
        {0: _codes(scheme)},
        weight=(1, scheme.weight_along(0 if transposed else 1)),
        bias=2 if bias is not None else None,
        output=Output.FLOAT,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _binary(kernel: str) -> _Entry:
    """Two activations, each with parameters of its own, quantized output."""

    def entry(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
        for value in node.inputs:
            if graph.has_constant(value):
                return Refusal("one side is a constant; the integer kernel was measured on two activations only")
            refusal = cpu_checks.float_activation(value)
            if refusal is not None:
                return refusal
        cost = costs.of(cpu_costs.elementwise(node.op_type, cpu_costs.elements(node.outputs[0])))
        spec = _codes(scheme)
        return Kernel(
            (kernel,), {0: spec, 1: spec}, result=spec, float_seconds=cost.in_float, integer_seconds=cost.in_integers
        )

    return entry


def _unary(kernel: str, per_input: bool = False) -> _Entry:
    """One activation, output with parameters of its own."""

    def entry(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
        refusal = cpu_checks.float_activation(node.inputs[0])
        if refusal is not None:
            return refusal
        sized = node.inputs[0] if per_input and node.inputs[0] is not None else node.outputs[0]
        cost = costs.of(cpu_costs.elementwise(node.op_type, cpu_costs.elements(sized)))
        spec = _codes(scheme)
        return Kernel((kernel,), {0: spec}, result=spec, float_seconds=cost.in_float, integer_seconds=cost.in_integers)

    return entry


def _moves(
    *operators: str, condition: Callable[[ir.Node], str | None] | None = None, like: str | None = None
) -> _Entry:
    """An operator that only moves codes: input and output share their parameters; it costs what `like` does."""

    def entry(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
        refusal = cpu_checks.float_activation(node.inputs[0])
        if refusal is not None:
            return refusal
        why = condition(node) if condition is not None else None
        if why is not None:
            return Refusal(why)
        if len(node.outputs) > 1 and node.op_type != "Split":
            return Refusal("the integer kernel has one output")
        cost = costs.of(cpu_costs.elementwise(like or node.op_type, cpu_costs.elements(node.outputs[0])))
        return Kernel(
            operators or (node.op_type,),
            {0: _codes(scheme)},
            result=_codes(scheme),
            shares=True,
            float_seconds=cost.in_float,
            integer_seconds=cost.in_integers,
        )

    return entry


def _concat(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    for value in node.inputs:
        refusal = cpu_checks.float_activation(value)
        if refusal is None and value is not None and value.is_initializer():
            refusal = Refusal("joins a constant")
        if refusal is not None:
            return refusal
    cost = costs.of(cpu_costs.elementwise("Concat", cpu_costs.elements(node.outputs[0])))
    spec = _codes(scheme)
    return Kernel(
        ("QLinearConcat", "Concat"),
        dict.fromkeys(range(len(node.inputs)), spec),
        result=spec,
        joins=True,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _resize_condition(node: ir.Node) -> str | None:
    mode = node.attributes.get("mode")
    return None if mode is None or mode.as_string() == "nearest" else "only nearest-neighbour Resize moves codes"


def _split_condition(node: ir.Node) -> str | None:
    unread = any(not value.consumers() and not value.is_graph_output() for value in node.outputs)
    return "the runtime fuses a Split only when all its outputs are read" if unread else None


def _image_pool(node: ir.Node) -> str | None:
    shape = graph.run_shape(node.inputs[0])
    return None if shape is None or len(shape) == 4 else "the integer pool is known for images only"


def _resize(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    rounding = node.attributes.get("nearest_mode")
    fast = rounding is not None and rounding.as_string() == "floor"
    return _moves(condition=_resize_condition, like="ResizeDown" if fast else "Resize")(node, scheme, costs)


def _softmax(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    return Refusal("the integer Softmax is several times slower, and eight bits are too few for its output")


def _clip(node: ir.Node, scheme: Scheme, costs: Costs) -> Kernel | Refusal:
    if not _codes(scheme).torch:
        # The layer before it ends where it does.
        return Refusal(_NO_KERNEL.format(node.op_type))
    if None in graph.clip_bounds(node):
        return Refusal("its bounds are no constants")
    # On codes: 0.035 ns for each, which is what copying them takes.
    return _moves(like="Concat")(node, scheme, costs)


_TABLE: dict[str, _Entry] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Add": _binary("QLinearAdd"),
    "Mul": _binary("QLinearMul"),
    "Concat": _concat,
    "Sigmoid": _unary("QLinearSigmoid"),
    "LeakyRelu": _unary("QLinearLeakyRelu"),
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool", per_input=True),
    "AveragePool": _unary("QLinearAveragePool"),
    "Softmax": _softmax,
    "MaxPool": _moves("MaxPool", "NhwcMaxPool", condition=_image_pool),
    "Resize": _resize,
    "Transpose": _moves(),
    "Reshape": _moves(),
    "Flatten": _moves("Flatten", "Reshape", like="Reshape"),
    "Squeeze": _moves("Squeeze", "Reshape", like="Reshape"),
    "Unsqueeze": _moves("Unsqueeze", "Reshape", like="Reshape"),
    "Slice": _moves("Slice", "Split"),
    "Split": _moves(condition=_split_condition),
    "DepthToSpace": _moves(),
    "Clip": _clip,
}
