"""Conv/ConvTranspose/Gemm + BatchNormalization -> one layer; Pad + Conv -> Conv; chains of Relu and Clip -> one.

The rules are onnxscript's; a layer fused here is one integer kernel later.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.rewriter.rules import common as rules

from qgraph import graph

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

# One after the other: a rule does not see what another has made in the same sweep.
_STAGES = (("Dropout", "Pad"), ("BatchNormalization",), ("Relu", "Clip", "Transpose"))
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
        before = len(model.graph)
        for stage in _STAGES:
            chosen = [rule for op_type in stage if op_type in present for rule in _RULES[op_type]]
            if chosen:
                _apply(model, chosen)
        # The rules leave the old weights behind.
        common.RemoveUnusedNodesPass()(model)
        common.NameFixPass()(model)
        return ir.passes.PassResult(model, len(model.graph) != before)


def _apply(model: ir.Model, chosen: list[rewriter.RewriteRule]) -> None:
    """Rewrite, and let each layer keep its name and the memory of what went into it."""
    layers = {name: node for node in model.graph if (name := _weight_name(node)) is not None}
    neighbours = {name: _neighbours(node) for name, node in layers.items()}
    rewriter.RewritePass(rewriter.RewriteRuleSet(chosen))(model)
    for node in model.graph:
        name = _weight_name(node)
        if name is not None and name in layers and layers[name] is not node:
            old = layers[name]
            node.name = old.name
            node.metadata_props.update(old.metadata_props)
            node.meta[graph.ORIGINS] = old.meta.get(graph.ORIGINS, ())
            graph.merge_origins(node, *(n for n in neighbours[name] if n.graph is None))


def _typed(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype is not None


def _weight_name(node: ir.Node) -> str | None:
    """Name of a layer's weight, which the rules keep; None for other nodes and for weights that layers share."""
    if node.op_type not in _LAYERS or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    return weight.name if weight is not None and len(weight.consumers()) == 1 else None


def _neighbours(node: ir.Node) -> list[ir.Node]:
    """The Pad before and the BatchNormalization after a layer, which may be merged into it."""
    around = [node.inputs[0].producer() if node.inputs[0] is not None else None, *node.outputs[0].consumers()]
    return [n for n in around if n is not None and n.op_type in ("Pad", "BatchNormalization")]
