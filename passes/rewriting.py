"""What each pipeline begins with: the passes that rewrite the graph in float, before anything is measured."""

from __future__ import annotations

import onnx_ir as ir

from qgraph import passes
from qgraph.pipeline import Context
from qgraph.rules import FLOAT

__all__ = ["rewrite"]


def rewrite(context: Context) -> list[ir.passes.PassBase]:
    """The same numbers in the graph that the target likes."""
    fixed = [passes.FixShapes(context.target, context.data)] if context.target.limits.static_shapes else []
    return [
        *fixed,
        passes.Canonicalize(_opset(context), context.target.attention is not None),
        passes.InferTypes(),
        *_widen(context),
        passes.FuseLayers(),
        passes.FoldShapes(),
        passes.UnpackWeights(),
        passes.MeanSums(),
        passes.Recognize(context.target),
        passes.RecognizeNorm(context.target),
        passes.PlainReciprocal(context.target),
        passes.FuseRotary(context.target),
        passes.NanGuard(),
        passes.PlainTranspose(),
        passes.FuseTranspose(context.target),
        passes.TieHead(context.target),
        passes.FoldShapes(),
        passes.GroupHeads(),
        passes.LiftHeads(context.target),
        passes.PlainHeads(context.target),
        passes.CancelSwaps(),
        passes.MaskRows(),
        passes.BoundMasks(context.target),
        passes.BiasForm(),
        passes.ResidualNorm(context.target),
        passes.RaiseLevel(context.target),
        *_experts(context),
        passes.FindTernary(),
    ]


def _opset(context: Context) -> int:
    """What the target needs; 19 at least, where quantizers write floats, in the schemes of single nodes, too."""
    schemes = [context.scheme, *(context.target.schemes[name] for name in context.choices.values() if name != FLOAT)]
    activations = [part.activation for scheme in schemes for part in scheme.parts if part.activation is not None]
    floats = any(not one.format.whole for one in activations)
    return max(context.target.min_opset, 19 if floats else 0)


def _widen(context: Context) -> list[ir.passes.PassBase]:
    """Floats of 16 bits to float32; where the target computes in them, only while there are numbers to decide about."""
    # Caches that will be codes are none in 16 bits.
    needed = context.target.half is None or context.scheme.parts
    return [passes.ToFloat(context.cache is None, context.target)] if needed else []


def _experts(context: Context) -> list[ir.passes.PassBase]:
    """A product for each expert, where weights may go into blocks."""
    if not context.scheme.parts:
        return []
    return [
        passes.PlainEinsum(context.target),
        passes.SplitExperts(context.target, context.scheme, context.keep_float, context.choices),
    ]
