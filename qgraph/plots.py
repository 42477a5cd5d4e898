"""The report's plots. Drawn for two widths, since text that is scaled down with a plot cannot be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator

from qgraph.report import Budget, Candidate, Layer, ValueHistogram
from qgraph.svg import COLOURS, Sheet, drawn, ticks
from qgraph.words import decibels

__all__ = ["front", "histogram", "layers", "tradeoff"]

# Shape tells a verdict apart as well as colour does.
_MARKS = {
    "chosen": ("*", "main", 17), "within": ("o", "good", 8),
    "loses too much": ("X", "warn", 9), "slower": ("v", "warn", 9),
}  # fmt: skip
_OTHER_MARK = ("D", "other", 7)
_MOST_MARKS = 240
_NOTHING = 1e-7
_MOST_BINS = 128
_FARTHEST = 300.0


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (speed, loss) that no other beats in both, by ascending speed."""
    found: list[int] = []
    for position in sorted(range(len(points)), key=lambda p: (-points[p][0], points[p][1])):
        if not found or points[position][1] < points[found[-1]][1]:
            found.append(position)
    return found[::-1]


def tradeoff(budget: Budget | None, candidates: Sequence[Candidate]) -> str | None:
    """Speed against loss of all candidates, numbered from 1 in this order; a panel for each number of threads.

    Returns:
        SVG; None where no candidate has both numbers.
    """
    panels: dict[str, list[tuple[int, float, float]]] = {}
    for number, candidate in enumerate(candidates, 1):
        if candidate.loss is not None and math.isfinite(candidate.loss):
            for threads, speed in candidate.speed.items():
                if math.isfinite(speed):
                    panels.setdefault(threads, []).append((number, speed, candidate.loss))
    if not panels:
        return None
    limit = budget.limit if budget is not None else math.nan
    losses = [loss for points in panels.values() for _, _, loss in points] + ([limit] if math.isfinite(limit) else [])
    noisy = budget is not None and budget.decibels is not None
    words_of = _decibels if noisy else _points
    metric = "SQNR" if noisy else f"loss ({budget.metric})" if budget is not None else "loss"
    chosen = [f"{c.name} is chosen" for c in candidates if c.verdict == "chosen"]
    words = f"Speed against {metric} of {len(candidates)} candidates; {', '.join(chosen) or 'none is chosen'}."
    words += f" The budget is {budget.text}." if budget is not None else ""

    def draw(sheet: Sheet, kind: str) -> None:
        shape = (1, len(panels)) if kind == "wide" else (len(panels), 1)
        grid: Any = sheet.figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        for axes, (threads, points) in zip(grid.flat, panels.items(), strict=True):
            sheet.title(axes, f"{threads} thread{'s' * (threads != '1')}")
            _panel(sheet, axes, candidates, points, "" if noisy else "loss ", words_of)
            _scale(axes, losses, words_of)
        for axes in grid.flat if math.isfinite(limit) else ():
            _line(sheet, axes, limit)
        sheet.figure.supxlabel("times faster than the original", fontsize=12, color=COLOURS["quiet"])
        # The metric is the user's word, and so the caption's.
        sheet.figure.supylabel("SQNR" if noisy else "loss", fontsize=12, color=COLOURS["quiet"])

    sizes = {"wide": (860, 380), "narrow": (360, 60 + 280 * len(panels))}
    return drawn("tradeoff", words, sizes, draw)


def _points(loss: float) -> str:
    return f"{loss:.4g}"


def _decibels(loss: float) -> str:
    """A share of noise as the SQNR that it is."""
    return decibels(-10 * math.log10(loss)) if loss > 0 else decibels(math.inf)


def _scale(axes: Axes, losses: list[float], words: Callable[[float], str]) -> None:
    # What rounding of float32 leaves is nothing: decades down to it would hide the rest.
    positive = [loss for loss in losses if loss > _NOTHING * max(losses)]
    wide = min(losses) >= 0 and bool(positive) and max(positive) > 30 * min(positive)
    if wide:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=0.4)
    axes.yaxis.set_major_formatter(ticks(words))
    axes.xaxis.set_major_formatter(ticks(lambda value: f"{value:.3g}x"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.axvline(1.0, color=COLOURS["other"], linewidth=1.2, linestyle=(0, (2, 2)))
    if not wide:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.update_datalim([(1.0, min(0.0, *losses)), (1.0, max(losses))])
    axes.margins(0.12)
    axes.autoscale_view()
    if wide:
        axes.set_ylim(bottom=-0.6 * min(positive))


def _line(sheet: Sheet, axes: Axes, limit: float) -> None:
    (left, right), ends = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=ends)
    axes.axhline(limit, color=COLOURS["warn"], linewidth=1.4, linestyle=(0, (5, 3)))
    axes.fill_between([left, right], limit, max(ends), color=COLOURS["warn"], alpha=0.08, linewidth=0)
    sheet.text(axes, left, limit, "budget", xytext=(4, 4), fontsize=11, color=COLOURS["warn"])


def _panel(
    sheet: Sheet, axes: Axes, candidates: Sequence[Candidate], points: list[tuple[int, float, float]], what: str,
    words: Callable[[float], str],
) -> None:  # fmt: skip
    best = front([(speed, loss) for _, speed, loss in points])
    axes.plot(
        [points[p][1] for p in best], [points[p][2] for p in best], color=COLOURS["good"], linewidth=1.6,
        drawstyle="steps-pre", alpha=0.8,
    )  # fmt: skip
    numbered = {points[p][0] for p in best} if len(points) > 20 else {number for number, _, _ in points}
    for verdict in dict.fromkeys(candidates[number - 1].verdict for number, _, _ in points):
        shape, colour, big = _MARKS.get(verdict, _OTHER_MARK)
        own = [point for point in points if candidates[point[0] - 1].verdict == verdict]
        titles = [f"{n}. {candidates[n - 1].name}: {s:.2f}x, {what}{words(loss)}, {verdict}" for n, s, loss in own]
        sheet.marks(
            axes, [speed for _, speed, _ in own], [loss for _, _, loss in own], titles, marker=shape, markersize=big,
            color=COLOURS[colour], markeredgecolor=COLOURS["paper"], markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
        for number, speed, loss in own:
            if number in numbered or verdict == "chosen":
                sheet.text(axes, speed, loss, str(number), xytext=(6, 6), fontsize=11, zorder=5)


def layers(found: Sequence[Layer], numbers: dict[str, int]) -> str | None:
    """Error of inner values in order of execution; `numbers` labels some of them, by value.

    Returns:
        SVG; None where there is nothing to draw. Past 240 values a mark stands for the worst of a run of neighbours.
    """
    run = math.ceil(len(found) / _MOST_MARKS)
    known = [(place, layer) for place, layer in enumerate(found, 1) if not math.isnan(layer.sqnr)]
    if not any(math.isfinite(layer.sqnr) for _, layer in known):
        return None
    shown = [min(known[k : k + run], key=lambda item: item[1].sqnr) for k in range(0, len(known), run)]
    finite = [min(max(layer.sqnr, -_FARTHEST), _FARTHEST) for _, layer in shown if math.isfinite(layer.sqnr)]
    step = 10 if max(finite) - min(finite) <= 60 else 20
    floor, roof = (math.floor(-max(finite) / step) - 0.4) * step, math.ceil(-min(finite) / step) * step
    worst = min((layer for _, layer in shown), key=lambda layer: layer.sqnr)
    words = f"Error of {len(found)} inner values in order of execution; worst: {worst.value}, {decibels(worst.sqnr)}."

    def draw(sheet: Sheet, kind: str) -> None:
        axes = sheet.figure.subplots()
        places = [place for place, _ in shown]
        heights = [min(max(-layer.sqnr, floor), roof) for _, layer in shown]
        bars = np.array([[floor, height, np.nan] for height in heights]).ravel()
        axes.plot(np.repeat(places, 3), bars, color=COLOURS["main"], linewidth=2 if len(shown) < 100 else 1, alpha=0.45)
        for colour, marked in (("main", False), ("warn", True)):
            own = [k for k, (_, layer) in enumerate(shown) if (layer.value in numbers) == marked]
            titles = [f"{shown[k][1].value} ({shown[k][1].op_type}): {decibels(shown[k][1].sqnr)}" for k in own]
            sheet.marks(
                axes, [places[k] for k in own], [heights[k] for k in own], titles, marker="o",
                markersize=5.5 if kind == "wide" else 4, color=COLOURS[colour], markeredgewidth=0,
            )  # fmt: skip
            crowded = 0.04 * len(found)
            for before, k in zip([None, *own], own, strict=False) if marked else ():
                high = before is not None and places[k] - places[before] < crowded
                label = str(numbers[shown[k][1].value])
                sheet.text(axes, places[k], heights[k], label, xytext=(0, 14 if high else 4), ha="center", fontsize=11)
        axes.margins(x=0.02)
        axes.set_ylim(floor, roof + 0.4 * step)
        axes.yaxis.set_major_locator(MultipleLocator(step))
        axes.yaxis.set_major_formatter(ticks(lambda value: f"{0 - value:.0f} dB"))
        error = axes.secondary_yaxis("right")
        error.yaxis.set_major_locator(MultipleLocator(step))
        error.yaxis.set_major_formatter(ticks(lambda value: _percent(100 * 10 ** (value / 20))))
        error.grid(visible=False)
        error.set_ylabel("error")
        error.spines["right"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8 if kind == "wide" else 5, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="place in the order of execution", ylabel="SQNR")

    return drawn("layers", words, {"wide": (860, 300), "narrow": (360, 260)}, draw)


def _percent(value: float) -> str:
    return f"{value:.2g} %" if value < 99 else f"{value:.0f} %"


def histogram(found: ValueHistogram, number: int) -> str | None:
    """Distribution of one value (density, logarithmic), with the range that its codes reach; `number` tells it apart.

    Returns:
        SVG; None where it has no counts, or bins without a finite width.
    """
    edges, counts = np.asarray(found.edges, float), np.asarray(found.counts, float)
    if not np.isfinite(edges).all() or not (np.diff(edges) > 0).all() or counts.sum() <= 0:
        return None
    run = math.ceil(len(counts) / _MOST_BINS)
    starts = np.arange(0, len(counts), run)
    counts, edges = np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])
    density = counts / (np.diff(edges) / (edges[-1] - edges[0]))
    least = density[density > 0].min() / 2
    words = (
        f"Distribution from {edges[0]:.4g} to {edges[-1]:.4g}; codes reach from {found.low:.4g} to {found.high:.4g}."
    )

    def draw(sheet: Sheet, kind: str) -> None:
        axes = sheet.figure.subplots()
        axes.stairs(np.maximum(density, least), edges, baseline=least, fill=True, color=COLOURS["main"], alpha=0.75)
        axes.set_yscale("log")
        axes.yaxis.set_ticks([])
        axes.yaxis.minorticks_off()
        ends = [end for end in (found.low, found.high) if math.isfinite(end)]
        left, right = min([edges[0], *ends]), max([edges[-1], *ends])
        pad = 0.03 * (right - left)
        axes.set_xlim(left - pad, right + pad)
        for end, outside in zip((found.low, found.high), (left - pad, right + pad), strict=True):
            if math.isfinite(end):
                axes.axvline(end, color=COLOURS["warn"], linewidth=1.4)
                axes.axvspan(outside, end, color=COLOURS["warn"], alpha=0.1, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(ticks(lambda value: f"{value:.4g}"))
        axes.grid(axis="y", visible=False)

    return drawn(f"histogram {number}", words, {"both": (340, 150)}, draw)
