"""The table of the CPU provider's integer kernels: operator -> the form it must be written in, and its cost.

Each entry is a function of the node, returning a Kernel or a Refusal with its reason. Measured times per element, in
nanoseconds on one thread, stand beside each elementwise operator as (float, integer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from qgraph import graph, stored, weights
from qgraph.spec import PerAxis, QuantSpec, Scheme
from qgraph.targets import cpu_checks, cpu_products, cpu_stored
from qgraph.targets import cpu_costs as costs
from qgraph.targets.base import Kernel, Output, Refusal

__all__ = ["find"]

_Entry = Callable[[ir.Node, Scheme], "Kernel | Refusal"]

_TWO_ACTIVATIONS = "a product of two activations gains too little for what it loses in accuracy"
_NO_KERNEL = "onnxruntime's CPU provider has no integer kernel for {}"


def find(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    """The kernel for `node` in one scheme, or why it has none."""
    if node.domain not in ("", "ai.onnx") and not weights.is_product(node):
        return Refusal(f"operator of domain {node.domain!r}")
    if stored.is_stored(scheme.weight.format):
        return cpu_stored.find(node, scheme)
    if not scheme.static:
        return cpu_products.find(node, scheme)
    entry = _TABLE.get(node.op_type)
    if entry is None:
        return Refusal(_NO_KERNEL.format(node.op_type))
    kernel = entry(node, scheme)
    return kernel if isinstance(kernel, Refusal) else replace(kernel, scheme=scheme.name)


def _codes(scheme: Scheme) -> QuantSpec:
    """Spec of activations of a static scheme."""
    assert scheme.activation is not None, "a static scheme has one"
    return scheme.activation


def _conv(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
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
    cost = costs.conv(node.outputs[0], shape, node.attributes.get_int("group", 1))
    return Kernel(
        ("QLinearConv",),
        {0: _codes(scheme)},
        weight=(1, replace(scheme.weight, granularity=PerAxis(0))),
        bias=2 if bias is not None else None,
        result=_codes(scheme),
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _matmul(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    form = cpu_checks.product(node, _TWO_ACTIVATIONS)
    if isinstance(form, Refusal):
        return form
    inner, columns, _ = form
    cost = costs.matmul(cpu_checks.rows(node.inputs[0], inner), inner, columns)
    return Kernel(
        ("MatMulIntegerToFloat", "QLinearMatMul"),
        {0: _codes(scheme)},
        weight=(1, replace(scheme.weight, granularity=PerAxis(1))),
        output=Output.FLOAT,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _gemm(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    form = cpu_checks.product(node, _TWO_ACTIVATIONS)
    if isinstance(form, Refusal):
        return form
    inner, columns, transposed = form
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    cost = costs.matmul(cpu_checks.rows(node.inputs[0], inner), inner, columns)
    return Kernel(
        ("QGemm",),
        {0: _codes(scheme)},
        weight=(1, replace(scheme.weight, granularity=PerAxis(0 if transposed else 1))),
        bias=2 if bias is not None else None,
        output=Output.FLOAT,
        float_seconds=cost.in_float,
        integer_seconds=cost.in_integers,
    )


def _binary(kernel: str, float_ns: float, integer_ns: float) -> _Entry:
    """Two activations, each with parameters of its own, quantized output."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        for value in node.inputs:
            if graph.has_constant(value):
                return Refusal("one side is a constant; the integer kernel was measured on two activations only")
            refusal = cpu_checks.float_activation(value)
            if refusal is not None:
                return refusal
        cost = costs.elementwise(node.outputs[0], float_ns, integer_ns)
        spec = _codes(scheme)
        return Kernel(
            (kernel,), {0: spec, 1: spec}, result=spec, float_seconds=cost.in_float, integer_seconds=cost.in_integers
        )

    return entry


def _unary(kernel: str, float_ns: float, integer_ns: float, per_input: bool = False) -> _Entry:
    """One activation, output with parameters of its own."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        refusal = cpu_checks.float_activation(node.inputs[0])
        if refusal is not None:
            return refusal
        sized = node.inputs[0] if per_input and node.inputs[0] is not None else node.outputs[0]
        cost = costs.elementwise(sized, float_ns, integer_ns)
        spec = _codes(scheme)
        return Kernel((kernel,), {0: spec}, result=spec, float_seconds=cost.in_float, integer_seconds=cost.in_integers)

    return entry


def _moves(
    float_ns: float, integer_ns: float, *operators: str, condition: Callable[[ir.Node], str | None] | None = None
) -> _Entry:
    """An operator that only moves codes: input and output share their parameters."""

    def entry(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
        refusal = cpu_checks.float_activation(node.inputs[0])
        if refusal is not None:
            return refusal
        why = condition(node) if condition is not None else None
        if why is not None:
            return Refusal(why)
        if len(node.outputs) > 1 and node.op_type != "Split":
            return Refusal("the integer kernel has one output")
        cost = costs.elementwise(node.outputs[0], float_ns, integer_ns)
        return Kernel(
            operators or (node.op_type,),
            {0: _codes(scheme)},
            result=_codes(scheme),
            shares=True,
            float_seconds=cost.in_float,
            integer_seconds=cost.in_integers,
        )

    return entry


def _concat(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    for value in node.inputs:
        refusal = cpu_checks.float_activation(value)
        if refusal is None and value is not None and value.is_initializer():
            refusal = Refusal("joins a constant")
        if refusal is not None:
            return refusal
    cost = costs.elementwise(node.outputs[0], 0.10, 0.04)
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


def _resize(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    # With rounding down the runtime has a fast float copy; the other modes are slow in both.
    rounding = node.attributes.get("nearest_mode")
    fast = rounding is not None and rounding.as_string() == "floor"
    return _moves(0.08 if fast else 0.72, 0.85, condition=_resize_condition)(node, scheme)


def _softmax(node: ir.Node, scheme: Scheme) -> Kernel | Refusal:
    return Refusal("the integer Softmax is several times slower, and eight bits are too few for its output")


_TABLE: dict[str, _Entry] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Add": _binary("QLinearAdd", 0.15, 0.14),
    "Mul": _binary("QLinearMul", 0.16, 0.21),
    "Concat": _concat,
    "Sigmoid": _unary("QLinearSigmoid", 0.29, 0.24),
    "LeakyRelu": _unary("QLinearLeakyRelu", 0.40, 0.24),
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool", 0.06, 0.04, per_input=True),
    "AveragePool": _unary("QLinearAveragePool", 0.24, 4.5),
    "Softmax": _softmax,
    "MaxPool": _moves(0.27, 0.24, "MaxPool", "NhwcMaxPool", condition=_image_pool),
    "Resize": _resize,
    "Transpose": _moves(0.40, 0.11),
    "Reshape": _moves(0.02, 0.01),
    "Flatten": _moves(0.02, 0.01, "Flatten", "Reshape"),
    "Squeeze": _moves(0.02, 0.01, "Squeeze", "Reshape"),
    "Unsqueeze": _moves(0.02, 0.01, "Unsqueeze", "Reshape"),
    "Slice": _moves(0.20, 0.09, "Slice", "Split"),
    "Split": _moves(0.25, 0.11, condition=_split_condition),
    "DepthToSpace": _moves(2.5, 1.7),
}
