"""The pipelines, each a flat list of passes, read top to bottom."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from qgraph.passes.rewriting import rewrite

from qgraph import passes
from qgraph.data import Dataset
from qgraph.errors import OptionError
from qgraph.pipeline import Context, Pipeline
from qgraph.rules import FLOAT
from qgraph.spec import Mixture, Scheme

__all__ = [
    "assign",
    "float_only",
    "plan",
    "prepare",
    "quantize",
    "scale",
    "shrink",
    "static",
    "survey",
    "widen",
    "write",
]


def float_only(context: Context) -> Pipeline:
    """The float graph as the target runs it fastest; no number is quantized."""
    cache = [] if context.cache is None else [*_sizes(context), *_cache(context)]
    fused = passes.FuseAttention(context.target)
    return Pipeline(*rewrite(context), *cache, fused, passes.NarrowWeights(), progress=context.progress)


def plan(context: Context) -> Pipeline:
    """Everything up to the decision what to quantize; nothing is calibrated or changed in its numbers."""
    return Pipeline(*rewrite(context), *_measure(context), *_annotate(context), progress=context.progress)


def prepare(context: Context) -> Pipeline:
    """The first half of `quantize`: all that does not depend on which nodes are quantized, and to what."""
    first = [*rewrite(context), *_measure(context), *_survey(context), *_scale(context), *_shrink(context)]
    return Pipeline(*first, progress=context.progress)


def survey(context: Context) -> Pipeline:
    """The start of `prepare`: up to where channels would be scaled."""
    return Pipeline(*rewrite(context), *_measure(context), *_survey(context), progress=context.progress)


def scale(context: Context) -> Pipeline:
    """The rest of `prepare`: channels scaled as the context's smoothing says."""
    return Pipeline(*_scale(context), progress=context.progress)


def shrink(context: Context) -> Pipeline:
    """Behind `scale`: what the scheme does with the weights before any of them is quantized."""
    return Pipeline(*_shrink(context), progress=context.progress)


def assign(context: Context) -> Pipeline:
    """The decision alone, on a prepared model."""
    return Pipeline(*_annotate(context), progress=context.progress)


def write(context: Context) -> Pipeline:
    """The second half of `quantize`: decide, calibrate, write."""
    return Pipeline(*_annotate(context), *_write(context), progress=context.progress)


def quantize(context: Context) -> Pipeline:
    """Post-training quantization: static, dynamic, weight-only, or mixed, as the scheme says."""
    return Pipeline(
        *rewrite(context),
        *_measure(context),
        *_survey(context),
        *_scale(context),
        *_shrink(context),
        *_annotate(context),
        *_write(context),
        progress=context.progress,
    )


def widen(context: Context) -> Pipeline:
    """The model itself where the runtime cannot run it as it is: in float32, and nothing else about it changed."""
    return Pipeline(passes.ToFloat(), passes.NarrowWeights(), progress=context.progress)


def static(context: Context) -> Pipeline:
    """`quantize` for schemes whose activations have ranges fixed from calibration data."""
    if context.data is None:
        raise OptionError("Static quantization needs calibration data: a few dozen typical inputs (--data).")
    return quantize(context)


def _measure(context: Context) -> list[ir.passes.PassBase]:
    """Sizes, by which kernels are priced; and what depends on sizes, or on what was done by them."""
    return [*_sizes(context), passes.FuseAttention(context.target)]


def _sizes(context: Context) -> list[ir.passes.PassBase]:
    if context.data is None:
        return []
    shapes: list[ir.passes.PassBase] = [passes.MeasureShapes(context.data, context.folder), *_divide(context)]
    return (
        shapes if context.cache is None else [*shapes, passes.SurveyCache(context.data, context.folder, context.budget)]
    )


def _divide(context: Context) -> list[ir.passes.PassBase]:
    """Products whose parts alone are read, where that was measured to pay."""
    return [passes.DivideProducts()] if context.target.divides else []


def _survey(context: Context) -> list[ir.passes.PassBase]:
    """What layers read, to choose by the error behind them."""
    if context.data is None or not context.scheme.parts:
        return []
    return [passes.Survey(context.data, context.folder, context.budget, context.progress)]


def _only_weights(context: Context) -> bool:
    """Whether activations stay in float, whatever is chosen."""
    parts = context.scheme.parts
    return bool(parts) and all(part.activation is None for part in parts)


def _fewest(context: Context) -> Scheme:
    """The scheme with the fewest bits, which leaves the largest errors."""
    return min(context.scheme.parts, key=lambda part: part.bits)


def _scale(context: Context) -> list[ir.passes.PassBase]:
    """Numbers that are easier to quantize; in float they stay equal. Nothing goes aside of weights that will shrink."""
    if context.data is not None and _only_weights(context) and context.smoothing != "none":
        return [passes.Smooth(context.target, _fewest(context), explicit=False, least=0.5)]
    static = next((part for part in context.scheme.parts if part.static), None)
    # Ranges that are saved are those of the model itself.
    saved = context.ranges is not None or context.save_ranges is not None
    if context.data is None or saved or context.smoothing == "none" or context.scheme.torch:
        return []
    if static is None:
        return [passes.Center()] if any(part.dynamic for part in context.scheme.parts) else []
    aside = context.smoothing == "aside" and context.scheme.held is None and context.target.sets_aside
    smooth = passes.Smooth(context.target, static, context.smoothing != "folded", aside=aside, dynamic=context.dynamic)
    return [passes.Center(), passes.Equalize(context.target, static), smooth]


def _shrink(context: Context) -> list[ir.passes.PassBase]:
    """Weights that fit the few bits in which they are stored."""
    if context.scheme.held is None:
        return []
    choices = {**context.choices, **dict.fromkeys(context.keep_float, FLOAT)}
    learn = None if context.data is None else _blocks(context, context.data)
    return [passes.ShrinkWeights(context.target, context.scheme.held, learn, choices)]


def _blocks(context: Context, data: Dataset) -> passes.RoundBlocks:
    """Codes of weights in blocks, chosen by what the layers read."""
    write = (passes.InsertBlocks(), passes.InsertRows())
    return passes.RoundBlocks(
        data, write, context.folder, context.budget, context.progress, context.blocks, deadline=context.deadline
    )


def _cache(context: Context) -> list[ir.passes.PassBase]:
    """Caches of keys and values in integers."""
    return [] if context.cache is None else [passes.QuantizeCache(context.cache)]


def _annotate(context: Context) -> list[ir.passes.PassBase]:
    """A kernel on each node that pays, a reason on the others."""
    scheme = context.scheme
    if context.data is None and isinstance(scheme, Mixture):
        scheme = dataclasses.replace(scheme, parts=tuple(part for part in scheme.parts if not part.static))
    return [
        passes.Annotate(
            context.target,
            scheme,
            context.keep_float,
            context.refused,
            context.measured,
            context.choices,
            context.prices,
            calibrated=context.data is not None,
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
        calibrate = passes.Calibrate(*data, context.ranges, context.save_ranges, context.progress, context.store)
        exact = [passes.Portable()] if context.target.rounds_apart else []
        # Ranges that somebody asked for are not chosen anew; what is saved gives the same file when it is given back.
        saved = context.ranges is not None or context.save_ranges is not None
        asked = context.scheme.torch or context.observer is not None or saved
        fit = [] if asked and not learned else [passes.FitRanges(store=context.fits)]
        observe = [passes.InsertObservers(context.observer), calibrate, *fit, *exact]
        learn = [passes.RoundWeights(*data, context.progress, context.codes)] if learned else []
        if context.scheme.held is None and (context.learn or _only_weights(context)):
            learn.append(_blocks(context, context.data))
    return [
        passes.DropFactors(),
        passes.SetAside(context.target),
        *observe,
        passes.CalibrateWeights(),
        *learn,
        passes.CorrectBias(),
        passes.InsertQDQ(context.target),
        passes.ClipCodes(),
        passes.InsertDynamic(),
        passes.InsertDynamicLSTM(),
        passes.InsertBlocks(),
        *([passes.PackTernary()] if context.pack else []),
        passes.InsertRows(),
        passes.InsertStored(),
        passes.FoldWeights(),
        passes.JoinBias(context.target),
        passes.BlockBias(),
        passes.JoinProducts(),
        passes.StoreBlocks(),
        *_cache(context),
        *_half(context),
        passes.NarrowWeights(),
    ]


def _half(context: Context) -> list[ir.passes.PassBase]:
    """Floats of 16 bits where the target computes in them, but for what was planned to stay as it is."""
    if context.target.half is None or not context.scheme.parts:
        return []
    # Caches in codes are no floats that the data could be run with.
    data = (context.data if context.cache is None else None, context.folder, context.budget)
    return [passes.ToHalf(context.target.half, None, True, *data, planned=True), passes.DropCasts()]
