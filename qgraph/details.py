"""What a report shows beyond the verdict: errors of inner values, histograms of the worst, time by operator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph import bench, caches, compare
from qgraph.builder import Builder, Built
from qgraph.compare import Runnable
from qgraph.data import Dataset
from qgraph.modelio import size_on_disk
from qgraph.observers.counts import Bins
from qgraph.observers.histogram import Histogram
from qgraph.report import Fidelity, Footprint, OperatorTime, Report, ValueHistogram
from qgraph.session import Feeds
from qgraph.targets import QPARAMS, Target

__all__ = ["fill", "measured_times", "operator_times", "weigh"]

_HISTOGRAMS = 6
_BINS = 96


def fill(
    report: Report, original: Runnable, built: Built, builder: Builder, data: Dataset, feeds: Feeds, timed: bool
) -> None:
    """Complete `report`, whose fidelity is known, with what was seen inside."""
    target = builder.context.target
    fidelity = report.fidelity
    if fidelity is not None:
        stored = ir.load(built.staged.path)
        # Smoothing scales channels: values of one name are to be compared in the same units.
        twin = Runnable(builder.prepared, builder.variant_context.folder) if built.assignment else original
        layers = compare.layer_errors(twin, stored, built.staged.path.parent, data, target.options())
        report.fidelity = dataclasses.replace(fidelity, layers=layers)
        report.histograms = _histograms(report.fidelity, built, builder)
    if timed:
        report.operators = operator_times(original, built.runnable, feeds, target)


def weigh(report: Report, before: Path | None, after: Path, run: tuple[Feeds, Target] | None) -> None:
    """Complete `report` with what the two files take on disk; and in memory, if they are to `run`."""
    if before is None:
        return
    report.before, report.after = Footprint(size_on_disk(before)), Footprint(size_on_disk(after))
    if run is not None:
        feeds, target = run
        report.before = bench.footprint(before, feeds, target.options())
        report.after = bench.footprint(after, caches.given(after, feeds), target.options())


def operator_times(before: Runnable, after: Runnable, feeds: Feeds, target: Target) -> list[OperatorTime]:
    """Seconds per run of all nodes of each operator in the runtime's profiles, the costliest first."""
    options = target.options(threads=1)
    first, second = bench.operator_times(before, feeds, options), bench.operator_times(after, feeds, options)
    names = sorted(first.keys() | second.keys(), key=lambda op: (-max(first.get(op, 0), second.get(op, 0)), op))
    return [OperatorTime(op, first.get(op, 0.0), second.get(op, 0.0)) for op in names]


def _histograms(fidelity: Fidelity, built: Built, builder: Builder) -> list[ValueHistogram]:
    """Of the values with the largest error, where their distribution was kept."""
    store = builder.variant_context.store or {}
    values = {v.name: v for v in built.model.graph.inputs}
    values.update({v.name: v for node in built.model.graph for v in node.outputs})
    found: list[ValueHistogram] = []
    for layer in sorted(fidelity.layers, key=lambda layer: layer.sqnr):
        observer = store.get((layer.value, "histogram"))
        value = values.get(layer.value)
        params = value.meta.get(QPARAMS) if value is not None else None
        if not isinstance(observer, Histogram) or params is None:
            continue
        low, high = params.range
        edges, counts = _equal_bins(observer.bins())
        found.append(ValueHistogram(layer.value, edges, counts, float(np.min(low)), float(np.max(high)), layer.sqnr))
        if len(found) == _HISTOGRAMS:
            break
    return found


def _equal_bins(bins: Bins) -> tuple[list[float], list[int]]:
    """(edges, counts) of equally wide bins; the values of an observed bin lie evenly between its ends."""
    edges = np.linspace(float(bins.low[0]), float(bins.high[-1]), _BINS + 1)
    # Bins of one value get a width, so that the distribution function is one.
    ends = np.concatenate([bins.low, np.nextafter(bins.high, np.inf)])
    order = np.argsort(ends, kind="stable")
    below = np.concatenate([np.cumsum(bins.counts) - bins.counts, np.cumsum(bins.counts)])
    reached = np.interp(edges, ends[order], below[order])
    reached[0], reached[-1] = 0.0, float(bins.counts.sum())
    counts = np.diff(np.rint(reached)).astype(np.int64)
    return edges.tolist(), counts.tolist()


def measured_times(builder: Builder, built: Built, feeds: Feeds) -> dict[tuple[str, str], tuple[float, float]]:
    """(node, scheme) -> seconds in float and in the scheme, from the runtime's profiles of both graphs."""
    options = builder.context.target.options(threads=1)
    in_float = bench.node_times(Runnable(builder.prepared, builder.variant_context.folder), feeds, options)
    in_scheme = bench.node_times(built.runnable, feeds, options)
    return {
        (node, scheme): (in_float[node], in_scheme[node])
        for node, scheme in built.assignment.items()
        if node in in_float and node in in_scheme
    }
