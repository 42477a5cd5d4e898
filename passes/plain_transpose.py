"""Reshape(Transpose(Reshape(x, [-1, c, d]), (0, 2, 1)), [a, b, d, c]) -> Transpose(x, (0, 1, 3, 2)).

How torch's exporter turns the keys of scaled-dot-product attention over. Two transposes in a row become one.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase
from onnxscript.rewriter.rules import common as rules

__all__ = ["PlainTranspose"]


class _Flattened(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, flat: Any, back: Any) -> Any:
        rows = op.Reshape(x, flat, _allow_other_attributes=True, _outputs=["rows"])
        turned = op.Transpose(rows, perm=[0, 2, 1])
        return op.Reshape(turned, back, _allow_other_attributes=True, _outputs=["result"])

    def check(  # type: ignore[override]
        self, context: Any, x: ir.Value, rows: ir.Value, result: ir.Value, **_: Any
    ) -> MatchResult:
        refusal = MatchResult()
        if x.shape is None or rows.shape is None or result.shape is None:
            return refusal.fail("shapes are not known", x)
        if len(x.shape) < 3 or len(rows.shape) != 3 or len(result.shape) != len(x.shape):
            return refusal.fail("ranks do not fit", x)
        if None in [_name(dim) for dim in x.shape]:
            return refusal.fail("a dimension has no name", x)
        # The number of elements is kept, so that these three tell the rest.
        *outer, rows_kept, columns = (_name(dim) for dim in x.shape)
        if [_name(dim) for dim in rows.shape][1:] != [rows_kept, columns]:
            return refusal.fail("the first Reshape does more than to join the outer dimensions", rows)
        if [_name(dim) for dim in result.shape] != [*outer, columns, rows_kept]:
            return refusal.fail("the last Reshape does not part the outer dimensions again", result)
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        rank = len(x.shape) if x.shape is not None else 0
        return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _name(dim: int | ir.SymbolicDim) -> int | str | None:
    """A dimension's number or symbol; None when it has neither."""
    return dim if isinstance(dim, int) else dim.value


class PlainTranspose(ir.passes.InPlacePass):
    """A transpose of the last two dimensions that went by three is one again.

    Refused: shapes that are not known, or not seen to be the same before and after.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        before = len(model.graph)
        for chosen in ([_Flattened.rule()], [rules.transpose_transpose_rule]):  # type: ignore[no-untyped-call]
            if any(node.op_type == "Transpose" for node in model.graph):
                rewriter.RewritePass(rewriter.RewriteRuleSet(chosen))(model)
        changed = len(model.graph) != before
        if changed:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, changed)
