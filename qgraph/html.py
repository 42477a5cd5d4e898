"""The report as a page: one file without scripts that loads nothing, to open offline and to show to a colleague.

The plots are drawn by matplotlib, not by a library that runs in the page: those put their whole script into every file,
do nothing where scripts are off, and cannot be printed in other colours.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph import labels
from qgraph.errors import ModelError, OptionError
from qgraph.report import (
    Candidate,
    Fidelity,
    Layer,
    NodeReport,
    OutputError,
    Report,
    Sensitivity,
    ValueHistogram,
)
from qgraph.words import decibels, milliseconds, percent, size, smaller, times

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["is_page", "render", "require", "save"]

_WORST = 12
_LABELLED = 3
_MOST_ROWS = 24
_LIBRARIES = ("jinja2", "matplotlib")


def is_page(path: str | Path) -> bool:
    """Whether a file of this name is to be a page, by its ending."""
    return Path(path).suffix.lower() in (".html", ".htm")


def require() -> None:
    """Make sure that the libraries of pages are there.

    Raises:
        OptionError: one is missing; the message says how to install it.
    """
    try:
        for name in _LIBRARIES:
            importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f'A report as a page needs {error.name}: pip install "qgraph[report]". One that ends in .json does not.'
        ) from error


def save(report: Report, path: str | Path) -> None:
    """Write a report as a page, beside and moved into place.

    Raises:
        OptionError: a library of the `report` extra is missing.
        ModelError: the file cannot be written.
    """
    path = Path(path)
    text = render(report)
    temporary = path.with_name(f".{path.name}.part")
    try:
        # A name may hold what UTF-8 has no bytes for.
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"Cannot write the report to {str(path)!r}: {error.strerror}.") from error


def render(report: Report) -> str:
    """A report as HTML: the same bytes for the same report.

    Raises:
        OptionError: a library of the `report` extra is missing.
    """
    require()
    import jinja2

    from qgraph import plots

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qgraph", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        name=_breakable, size=_together(size), milliseconds=_together(milliseconds), decibels=_together(decibels),
        times=_together(times), share=_together(lambda value: f"{100 * value:.3g} %"), percent=_together(percent),
        number=lambda value: f"{value:.4g}", width=lambda value: f"{100 * value:.2f}%",
    )  # fmt: skip
    candidates = sorted(report.candidates, key=_rank)
    fidelity = report.fidelity
    worst = sorted(fidelity.layers, key=_faithful)[:_WORST] if fidelity is not None else []
    histograms = sorted(report.histograms, key=_faithful)
    marks = {layer.value: number for number, layer in enumerate(worst[:_LABELLED], 1)}
    return environment.get_template("report.html.jinja").render(
        report=report,
        title=Path(report.output or report.source).name or "qgraph",
        verdict=_verdict(report),
        output=_worst_output(fidelity),
        candidates=candidates,
        decibels=report.budget is not None and report.budget.decibels is not None,
        names=labels.candidates(candidate.name for candidate in candidates),
        smaller=smaller,
        threads=list(dict.fromkeys(threads for candidate in candidates for threads in candidate.speed)),
        tradeoff=_drawn(plots.tradeoff(report.budget, candidates)),
        worst=worst,
        layers=_drawn(plots.layers(fidelity.layers, marks) if fidelity is not None else None),
        sensitivity=_sensitivity(report.sensitivity),
        schemes=list(dict.fromkeys(found.scheme for found in report.sensitivity)),
        histograms=[(found, _drawn(plots.histogram(found, k)), _outside(found)) for k, found in enumerate(histograms)],
        operators=_operators(report),
        kernels=_grouped((labels.kernel(n.op_type, n.kernel), n) for n in report.quantized),
        reasons=_grouped((_pattern(node.reason or "no reason given"), node) for node in report.refused),
        most_rows=_MOST_ROWS,
    )


def _drawn(svg: str | None) -> Markup | None:
    from markupsafe import Markup

    return None if svg is None else Markup(svg)


def _breakable(text: str) -> Markup:
    """A name that may be broken over lines where its parts end."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[/._:])(?=[^/._:])", "<wbr>", str(escape(text))))


def _together(words: Callable[[Any], str]) -> Callable[[Any], str]:
    """A number on one line with its unit."""
    return lambda value: words(value).replace(" ", "\N{NO-BREAK SPACE}")


def _faithful(found: OutputError | Layer | ValueHistogram) -> float:
    """By SQNR; without a number is worst."""
    return float("-inf") if math.isnan(found.sqnr) else found.sqnr


def _rank(candidate: Candidate) -> tuple[bool, float, float, str]:
    """The chosen one first, then the fastest."""
    speed = next(iter(candidate.speed.values()), 0.0)
    loss = math.inf if candidate.loss is None or math.isnan(candidate.loss) else candidate.loss
    return (candidate.verdict != "chosen", math.inf if math.isnan(speed) else -speed, loss, candidate.name)


def _worst_output(fidelity: Fidelity | None) -> tuple[str, OutputError] | None:
    return min(fidelity.outputs.items(), key=lambda item: _faithful(item[1])) if fidelity and fidelity.outputs else None


def _verdict(report: Report) -> tuple[bool | None, str]:
    """Whether the result is within the budget (None: not known) in words; no words without a budget."""
    budget = report.budget
    if budget is None:
        return None, ""
    if not report.candidates:
        return None, f"Budget: {budget.text}"
    chosen = next((candidate for candidate in report.candidates if candidate.verdict == "chosen"), None)
    if chosen is None:
        return False, f"No candidate is faster and within the budget: {budget.text}"
    if chosen.loss is None:
        return None, f"Budget: {budget.text}"
    kept = chosen.loss <= budget.limit
    if budget.decibels is not None and chosen.sqnr is not None:
        return kept, f"{'Within' if kept else 'Beyond'} the budget: {budget.text}; it has {decibels(chosen.sqnr)}"
    measured = f"{chosen.loss:.3g} lost of the {budget.limit:.3g} allowed ({budget.metric})"
    return kept, f"{'Within' if kept else 'Beyond'} the budget: {budget.text}; {measured}"


@dataclasses.dataclass(frozen=True)
class _Bar:
    """A row of a table with a bar as long as `share` of the longest."""

    found: Sensitivity
    share: float


def _sensitivity(found: Sequence[Sensitivity]) -> list[_Bar]:
    """The noisiest node first, its schemes together; without a number is worst."""
    noise = {id(one): math.inf if math.isnan(one.noise) else one.noise for one in found}
    nodes: dict[str, float] = {}
    for one in found:
        nodes[one.node] = max(nodes.get(one.node, 0.0), noise[id(one)])
    most = max((_amount(one.noise) for one in found), default=0.0) or 1.0
    ordered = sorted(found, key=lambda one: (-nodes[one.node], one.node, -noise[id(one)], one.scheme))
    return [_Bar(one, min(1.0, max(0.0, noise[id(one)] / most))) for one in ordered]


def _amount(value: float) -> float:
    """What a bar can show; nothing where there is no number."""
    return max(value, 0.0) if math.isfinite(value) else 0.0


@dataclasses.dataclass(frozen=True)
class _Times:
    """Seconds of an operator (or of all), and its bars' lengths."""

    op_type: str
    before: float
    after: float
    long_before: float
    long_after: float


def _operators(report: Report) -> list[_Times]:
    found = sorted(report.operators, key=lambda one: (-max(_amount(one.before), _amount(one.after)), one.op_type))
    longest = max((max(_amount(one.before), _amount(one.after)) for one in found), default=0.0) or 1.0
    return [
        _Times(one.op_type, one.before, one.after, _amount(one.before) / longest, _amount(one.after) / longest)
        for one in found
    ]


def _outside(found: ValueHistogram) -> float:
    """Share of the values in bins that lie wholly outside the range."""
    cut = sum(
        count
        for count, low, high in zip(found.counts, found.edges, found.edges[1:], strict=False)
        if high <= found.low or low >= found.high
    )
    return cut / max(1, sum(found.counts))


def _pattern(reason: str) -> str:
    """A reason without the numbers and names that tell one node's from another's."""
    return re.sub(r"'[^']*'", "'…'", re.sub(r"(?<![\w.])\d[\d.]*", "…", reason))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Nodes that share a heading."""

    heading: str
    operators: list[tuple[str, int]]
    nodes: list[NodeReport]
    alike: bool


def _grouped(found: Iterable[tuple[str, NodeReport]]) -> list[_Group]:
    """Largest group first; a heading that all nodes' reasons fit is their reason itself."""
    groups: dict[str, list[NodeReport]] = {}
    for heading, node in found:
        groups.setdefault(heading, []).append(node)
    listing: list[_Group] = []
    for heading, nodes in sorted(groups.items(), key=lambda item: -len(item[1])):
        reasons = {node.reason for node in nodes}
        alike = len(reasons) == 1
        words = next(iter(reasons)) if alike else None
        operators = Counter(node.op_type for node in nodes).most_common()
        listing.append(_Group(words or heading, operators, nodes, alike))
    return listing
