"""Conv/ConvTranspose/Gemm + BatchNormalization -> one layer; Pad + Conv -> Conv; chains of Relu and Clip -> one.

The rules are onnxscript's; a layer fused here is one integer kernel later.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.rewriter.rules import common as rules

__all__ = ["FuseLayers"]

_RULES = {
    "Dropout": (rules.dropout_inference_rule, rules.dropout_zero_rule),
    "BatchNormalization": (
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
    ),
    "Pad": (rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule),
    "Relu": (rules.successive_relu_rule, rules.successive_clip_relu_rule, rules.successive_relu_clip_rule),
    "Clip": (rules.successive_clip_rule,),
    "Transpose": (rules.no_op_transpose_rule, rules.transpose_transpose_rule),
}
"""Rules by the operator without which they cannot match."""

_LAYERS = ("Conv", "ConvTranspose", "Gemm")


class FuseLayers(ir.passes.InPlacePass):
    """Linear layers and their affine neighbours become one layer each.

    Refused, by the rules: weights shared by several layers, outputs that are also read elsewhere, parameters computed
    at run time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply in place."""
        present = {node.op_type for node in model.graph.all_nodes()}
        if any(node.op_type in ("Relu", "Clip") and not _typed(node) for node in model.graph.all_nodes()):
            # The rules for chains read the type of every value without asking whether it is known.
            present -= {"Relu", "Clip"}
        chosen = [rule for op_type, group in _RULES.items() if op_type in present for rule in group]
        if not chosen:
            return ir.passes.PassResult(model, False)
        if not chosen:
            return ir.passes.PassResult(model, False)
        before = len(model.graph)
        layers = {_weight_name(node): node for node in model.graph if node.op_type in _LAYERS}
        rewriter.RewritePass(rewriter.RewriteRuleSet(chosen))(model)
        for node in model.graph:
            # A fused layer is still the layer that it was: its name is how users know it.
            old = layers.get(_weight_name(node)) if node.op_type in _LAYERS else None
            if old is not None and old is not node:
                node.name = old.name
                node.metadata_props.update(old.metadata_props)
        # The rules leave the old weights behind.
        common.RemoveUnusedNodesPass()(model)
        common.NameFixPass()(model)
        return ir.passes.PassResult(model, len(model.graph) != before)


def _typed(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype is not None


def _weight_name(node: ir.Node) -> str | None:
    """The rules keep the name of the weight, which only one layer has if they apply."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return weight.name if weight is not None else None
