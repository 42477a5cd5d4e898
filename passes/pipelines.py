"""The pipelines, each a flat list of passes, read top to bottom."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from qgraph.passes.annotate import Annotate
from qgraph.passes.bias_form import BiasForm
from qgraph.passes.block_bias import BlockBias
from qgraph.passes.bound_masks import BoundMasks
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.calibrate_weights import CalibrateWeights
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.correct_bias import CorrectBias
from qgraph.passes.drop_casts import DropCasts
from qgraph.passes.equalize import Equalize
from qgraph.passes.find_ternary import FindTernary
from qgraph.passes.fit_ranges import FitRanges
from qgraph.passes.fix_shapes import FixShapes
from qgraph.passes.fold_shapes import FoldShapes
from qgraph.passes.fold_weights import FoldWeights
from qgraph.passes.fuse_layers import FuseLayers
from qgraph.passes.fuse_rotary import FuseRotary
from qgraph.passes.fuse_transpose import FuseTranspose
from qgraph.passes.group_heads import GroupHeads
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.insert_blocks import InsertBlocks
from qgraph.passes.insert_dynamic import InsertDynamic
from qgraph.passes.insert_dynamic_lstm import InsertDynamicLSTM
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.insert_rows import InsertRows
from qgraph.passes.insert_stored import InsertStored
from qgraph.passes.join_bias import JoinBias
from qgraph.passes.join_products import JoinProducts
from qgraph.passes.mask_rows import MaskRows
from qgraph.passes.measure_shapes import MeasureShapes
from qgraph.passes.nan_guard import NanGuard
from qgraph.passes.narrow_weights import NarrowWeights
from qgraph.passes.pack_ternary import PackTernary
from qgraph.passes.plain_einsum import PlainEinsum
from qgraph.passes.plain_transpose import PlainTranspose
from qgraph.passes.portable import Portable
from qgraph.passes.quantize_cache import QuantizeCache
from qgraph.passes.raise_level import RaiseLevel
from qgraph.passes.recognize import Recognize
from qgraph.passes.recognize_norm import RecognizeNorm
from qgraph.passes.residual_norm import ResidualNorm
from qgraph.passes.round_blocks import RoundBlocks
from qgraph.passes.round_weights import RoundWeights
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_experts import SplitExperts
from qgraph.passes.survey import Survey
from qgraph.passes.survey_cache import SurveyCache
from qgraph.passes.tie_head import TieHead
from qgraph.passes.to_float import ToFloat
from qgraph.passes.to_half import ToHalf

from qgraph.errors import OptionError
from qgraph.pipeline import Context, Pipeline
from qgraph.spec import Mixture, Scheme

__all__ = ["assign", "float_only", "plan", "prepare", "quantize", "scale", "static", "survey", "widen", "write"]


def float_only(context: Context) -> Pipeline:
    """The float graph as the target runs it fastest; no number is quantized."""
    cache = [] if context.cache is None else [*_measure(context), *_cache(context)]
    return Pipeline(*_rewrite(context), *cache, NarrowWeights(), progress=context.progress)


def plan(context: Context) -> Pipeline:
    """Everything up to the decision what to quantize; nothing is calibrated or changed in its numbers."""
    return Pipeline(*_rewrite(context), *_measure(context), *_annotate(context), progress=context.progress)


def prepare(context: Context) -> Pipeline:
    """The first half of `quantize`: all that does not depend on which nodes are quantized, and to what."""
    passes = [*_rewrite(context), *_measure(context), *_survey(context), *_scale(context)]
    return Pipeline(*passes, progress=context.progress)


def survey(context: Context) -> Pipeline:
    """The start of `prepare`: up to where channels would be scaled."""
    return Pipeline(*_rewrite(context), *_measure(context), *_survey(context), progress=context.progress)


def scale(context: Context) -> Pipeline:
    """The rest of `prepare`: channels scaled as the context's smoothing says."""
    return Pipeline(*_scale(context), progress=context.progress)


def assign(context: Context) -> Pipeline:
    """The decision alone, on a prepared model."""
    return Pipeline(*_annotate(context), progress=context.progress)


def write(context: Context) -> Pipeline:
    """The second half of `quantize`: decide, calibrate, write."""
    return Pipeline(*_annotate(context), *_write(context), progress=context.progress)


def quantize(context: Context) -> Pipeline:
    """Post-training quantization: static, dynamic, weight-only, or mixed, as the scheme says."""
    return Pipeline(
        *_rewrite(context),
        *_measure(context),
        *_survey(context),
        *_scale(context),
        *_annotate(context),
        *_write(context),
        progress=context.progress,
    )


def widen(context: Context) -> Pipeline:
    """The model itself where the runtime cannot run it as it is: in float32, and nothing else about it changed."""
    return Pipeline(ToFloat(), NarrowWeights(), progress=context.progress)


def static(context: Context) -> Pipeline:
    """`quantize` for schemes whose activations have ranges fixed from calibration data."""
    if context.data is None:
        raise OptionError("Static quantization needs calibration data: a few dozen typical inputs (--data).")
    return quantize(context)


def _rewrite(context: Context) -> list[ir.passes.PassBase]:
    """The same numbers in the graph that the target likes."""
    fixed = [FixShapes(context.target, context.data)] if context.target.limits.static_shapes else []
    return [
        *fixed,
        Canonicalize(context.target.min_opset),
        InferTypes(),
        *_widen(context),
        FuseLayers(),
        FoldShapes(),
        Recognize(context.target),
        RecognizeNorm(context.target),
        FuseRotary(context.target),
        NanGuard(),
        PlainTranspose(),
        FuseTranspose(context.target),
        TieHead(context.target),
        FoldShapes(),
        GroupHeads(),
        MaskRows(),
        *([BoundMasks(context.target)] if context.target.mask is not None else []),
        BiasForm(),
        ResidualNorm(context.target),
        RaiseLevel(context.target),
        *_experts(context),
        FindTernary(),
    ]


def _widen(context: Context) -> list[ir.passes.PassBase]:
    """Floats of 16 bits to float32; where the target computes in them, only while there are numbers to decide about."""
    # Caches that will be codes are none in 16 bits.
    return [ToFloat(context.cache is None)] if context.target.half is None or context.scheme.parts else []


def _experts(context: Context) -> list[ir.passes.PassBase]:
    """A product for each expert, where weights may go into blocks."""
    if not context.scheme.parts:
        return []
    return [
        PlainEinsum(context.target),
        SplitExperts(context.target, context.scheme, context.keep_float, context.choices),
    ]


def _measure(context: Context) -> list[ir.passes.PassBase]:
    """Sizes, by which kernels are priced."""
    if context.data is None:
        return []
    shapes = MeasureShapes(context.data, context.folder)
    return [shapes] if context.cache is None else [shapes, SurveyCache(context.data, context.folder, context.budget)]


def _survey(context: Context) -> list[ir.passes.PassBase]:
    """What layers read, to choose by the error behind them."""
    if context.data is None or not context.scheme.parts:
        return []
    return [Survey(context.data, context.folder, context.budget, context.progress)]


def _only_weights(context: Context) -> bool:
    """Whether activations stay in float, whatever is chosen."""
    parts = context.scheme.parts
    return bool(parts) and all(part.activation is None for part in parts)


def _fewest(context: Context) -> Scheme:
    """The scheme with the fewest bits, which leaves the largest errors."""
    return min(context.scheme.parts, key=lambda part: part.bits)


def _scale(context: Context) -> list[ir.passes.PassBase]:
    """Numbers that are easier to quantize; in float they stay equal."""
    if context.data is not None and _only_weights(context) and context.smoothing != "none":
        return [Smooth(context.target, _fewest(context), explicit=False, least=0.5)]
    static = next((part for part in context.scheme.parts if part.static), None)
    # Ranges that are saved are those of the model itself.
    saved = context.ranges is not None or context.save_ranges is not None
    if context.data is None or static is None or saved or static.torch or context.smoothing == "none":
        return []
    explicit = context.smoothing == "explicit"
    return [Equalize(context.target, static), Smooth(context.target, static, explicit)]


def _cache(context: Context) -> list[ir.passes.PassBase]:
    """Caches of keys and values in integers."""
    return [] if context.cache is None else [QuantizeCache(context.cache)]


def _annotate(context: Context) -> list[ir.passes.PassBase]:
    """A kernel on each node that pays, a reason on the others."""
    scheme = context.scheme
    if context.data is None and isinstance(scheme, Mixture):
        scheme = dataclasses.replace(scheme, parts=tuple(part for part in scheme.parts if not part.static))
    return [
        Annotate(
            context.target,
            scheme,
            context.keep_float,
            context.refused,
            context.measured,
            context.choices,
            context.prices,
            context.data is not None,
        )
    ]


def _write(context: Context) -> list[ir.passes.PassBase]:
    """Ranges, roundings, and the graph in the form of the kernels."""
    if context.data is None and not isinstance(context.scheme, Mixture) and context.scheme.static:
        raise OptionError(f"Scheme {context.scheme.name!r} needs calibration data: a few dozen typical inputs.")
    observe: list[ir.passes.PassBase] = []
    learn: list[ir.passes.PassBase] = []
    # PyTorch's ranges stay as they are observed, and codes the nearest ones.
    learned = context.learn and not context.scheme.torch
    if context.data is not None:
        data = (context.data, context.folder, context.budget)
        calibrate = Calibrate(*data, context.ranges, context.save_ranges, context.progress, context.store)
        exact = [Portable()] if context.target.rounds_apart else []
        # Ranges that somebody asked for are not chosen anew; what is saved gives the same file when it is given back.
        saved = context.ranges is not None or context.save_ranges is not None
        asked = context.scheme.torch or context.observer is not None or saved
        fit = [] if asked and not learned else [FitRanges(store=context.fits)]
        observe = [InsertObservers(context.observer), calibrate, *fit, *exact]
        learn = [RoundWeights(*data, context.progress, context.codes)] if learned else []
        if context.learn or _only_weights(context):
            learn += [
                RoundBlocks(
                    context.data,
                    (InsertBlocks(), InsertRows()),
                    *data[1:],
                    context.progress,
                    context.blocks,
                    deadline=context.deadline,
                )
            ]
    return [
        *observe,
        CalibrateWeights(),
        *learn,
        CorrectBias(),
        InsertQDQ(context.target),
        InsertDynamic(),
        InsertDynamicLSTM(),
        InsertBlocks(),
        *([PackTernary()] if context.pack else []),
        InsertRows(),
        InsertStored(),
        FoldWeights(),
        JoinBias(context.target),
        BlockBias(),
        JoinProducts(),
        *_cache(context),
        *_half(context),
        NarrowWeights(),
    ]


def _half(context: Context) -> list[ir.passes.PassBase]:
    """Floats of 16 bits where the target computes in them, but for what was planned to stay as it is."""
    if context.target.half is None or not context.scheme.parts:
        return []
    # Caches in codes are no floats that the data could be run with.
    data = (context.data if context.cache is None else None, context.folder, context.budget)
    return [ToHalf(context.target.half, None, True, *data, planned=True), DropCasts()]
