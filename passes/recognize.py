"""GELU, SiLU and layer normalization spelled in primitives -> the one operator that they are.

x * 0.5 * (1 + erf(x / sqrt 2)) -> Gelu(x), the runtime's own before opset 20 (Hendrycks and Gimpel 2016)
x * sigmoid(x) -> QuickGelu(x, alpha=1)                          (Elfwing et al. 2018)
(x - mean) / sqrt(var + eps) * scale + bias -> LayerNormalization (Ba, Kiros and Hinton 2016)

They stay in float as a whole; in pieces, each would look like an operator worth quantizing.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.rewriter.pattern import MatchResult, OrValue, RewriteRuleClassBase

from qgraph import graph

__all__ = ["Recognize"]


def _is(value: ir.Value, number: float) -> bool:
    found = graph.constant_scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-4)


def _axes(node: ir.Node | None) -> list[int] | None:
    """Constant axes of a reduction, in whichever form it has them."""
    if node is None:
        return None
    if len(node.inputs) > 1:
        array = graph.constant(node.inputs[1])
        return None if array is None else [int(axis) for axis in array.reshape(-1)]
    return list(node.attributes.get_ints("axes", []))


class _Gelu(RewriteRuleClassBase):
    """One of the orders in which exporters multiply x, 1 + erf and one half."""

    def __init__(self, order: int, standard: bool):
        super().__init__(name=f"Gelu{order}")
        self._order = order
        self._standard = standard

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        cdf = op.Add(op.Erf(OrValue([op.Div(x, root), op.Mul(x, root)])), one)
        if self._order == 0:
            return op.Mul(op.Mul(x, cdf), half)
        return op.Mul(x, op.Mul(cdf, half)) if self._order == 1 else op.Mul(op.Mul(x, half), cdf)

    def check(self, context: Any, x: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value) -> MatchResult:
        result = MatchResult()
        # The root may be shared: only what is done with it to x, on the way to Erf, counts.
        ways = {node.op_type for node in root.consumers() if x in node.inputs and node.op_type in ("Div", "Mul")}
        divided = ways == {"Div"}
        if len(ways) != 1 or not _is(root, math.sqrt(2) if divided else 1 / math.sqrt(2)):
            return result.fail("not divided by the root of 2", root)
        if not (_is(one, 1.0) and _is(half, 0.5)):
            return result.fail("other constants", one)
        return result if x.dtype == ir.DataType.FLOAT else result.fail("not float32", x)

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x) if self._standard else op.Gelu(x, _domain="com.microsoft")


class _Silu(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def check(self, context: Any, x: ir.Value) -> MatchResult:
        result = MatchResult()
        return result if x.dtype == ir.DataType.FLOAT else result.fail("not float32", x)

    def rewrite(self, op: Any, x: ir.Value) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")


class _LayerNorm(RewriteRuleClassBase):
    """The axes are an attribute of ReduceMean before opset 18 and an input since."""

    def __init__(self, axes_as_input: bool):
        super().__init__(name=f"LayerNorm{18 if axes_as_input else 17}")
        self._axes_as_input = axes_as_input

    def _mean(self, op: Any, x: Any, axes: Any, name: str) -> Any:
        inputs = [x, axes] if self._axes_as_input else [x]
        return op.ReduceMean(*inputs, keepdims=1, _allow_other_attributes=True, _outputs=[name])

    def pattern(self, op: Any, x: Any, axes: Any, axes2: Any, eps: Any, scale: Any, bias: Any, two: Any) -> Any:
        deviation = op.Sub(x, self._mean(op, x, axes, "mean"))
        square = OrValue([op.Mul(deviation, deviation), op.Pow(deviation, two)])
        root = op.Sqrt(op.Add(self._mean(op, square, axes2, "variance"), eps))
        normal = OrValue([op.Div(deviation, root), op.Mul(deviation, op.Reciprocal(root))])
        return op.Add(op.Mul(normal, scale), bias)

    def check(  # type: ignore[override]
        self,
        context: Any,
        x: ir.Value,
        mean: ir.Value,
        variance: ir.Value,
        eps: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        two: ir.Value | None = None,
        **_: Any,
    ) -> MatchResult:
        result = MatchResult()
        if x.dtype != ir.DataType.FLOAT or x.shape is None:
            return result.fail("not float32 of known rank", x)
        for value in (mean, variance):
            if _axes(value.producer()) not in ([-1], [len(x.shape) - 1]):
                return result.fail("not over the last axis", value)
        if graph.constant_scalar(eps) is None or (two is not None and not _is(two, 2.0)):
            return result.fail("other constants", eps)
        width = x.shape[-1]
        for value in (scale, bias):
            shape = graph.run_shape(value) if graph.has_constant(value) else None
            if shape is None or len(shape) != 1 or (isinstance(width, int) and shape[0] != width):
                return result.fail("scale or bias is not a constant of the last axis", value)
        return result

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value, scale: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=graph.constant_scalar(eps))


class Recognize(ir.passes.InPlacePass):
    """Activations and norms in primitives become operators.

    Refused: other types than float32, other constants, a norm not over the last axis, opsets that lack the operator.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        opset = model.graph.opset_imports.get("", 0)
        present = {node.op_type for node in model.graph.all_nodes()}
        rules: list[Any] = []
        # A rule whose characteristic operator is absent would only cost time.
        if "Sigmoid" in present:
            rules.append(_Silu.rule())  # type: ignore[no-untyped-call]
        if opset >= 17 and "ReduceMean" in present:
            rules.append(_LayerNorm.rule(opset >= 18))  # type: ignore[no-untyped-call]
        if "Erf" in present:
            rules.extend(_Gelu.rule(order, opset >= 20) for order in range(3))  # type: ignore[no-untyped-call]
        if not rules:
            return ir.passes.PassResult(model, False)
        before = len(model.graph)
        rewriter.RewritePass(rewriter.RewriteRuleSet(rules, commute=True))(model)
        changed = len(model.graph) != before
        if changed:
            if any(node.domain == "com.microsoft" for node in model.graph.all_nodes()):
                model.graph.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, changed)
