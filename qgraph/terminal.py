"""What a person sees in a terminal: summaries of reports, drawn with rich."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qgraph import elsewhere, labels, proof
from qgraph.inspection import Inspection
from qgraph.placement import Placement
from qgraph.report import Candidate, Fidelity, Footprint, NodeReport, Report, Sensitivity, Speed
from qgraph.targets import Target
from qgraph.words import decibels, milliseconds, runs, size, smaller

__all__ = [
    "progress",
    "show_fidelity",
    "show_inspection",
    "show_placement",
    "show_report",
    "show_sensitivity",
    "show_speed",
    "size",
]

_MOST_REASONS = 8
_MOST_NODES = 20
_QUIET_SECONDS = 2.0


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(justify="right" if side == "r" else "left")
    return table


def _ratio(ratio: float) -> Text:
    word = "faster" if ratio >= 1 else "slower"
    return Text(f"{ratio:.2f}x {word}", style="bold green" if ratio >= 1 else "bold red")


def show_report(console: Console, report: Report) -> None:
    """The summary after `optimize`."""
    head = Text.assemble((str(report.output or "the result"), "bold"), f"  from {report.source}")
    console.print(head)
    console.print(
        f"target {report.target}, scheme {report.scheme}, {report.runtime}, "
        f"{report.calibration_samples} calibration runs, {report.seconds:.1f} s",
        style="dim",
    )
    console.print()
    table = _grid("l", "r", "r", "l")
    table.add_row("", Text("before", style="dim"), Text("after", style="dim"), "")
    if report.before is not None and report.after is not None:
        _add_footprints(table, report.before, report.after)
    for speed in report.speed:
        table.add_row(*_speed_row(speed))
    if table.row_count > 1:
        console.print(table)
        console.print()
    if report.fidelity is not None:
        show_fidelity(console, report.fidelity)
        console.print()
    if len(report.candidates) > 1:
        _show_candidates(console, report)
        console.print()
    _show_nodes(console, report.nodes, "see the report (--report FILE)")
    if report.placement is not None:
        show_placement(console, report.placement)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _add_footprints(table: Table, before: Footprint, after: Footprint) -> None:
    table.add_row("size", size(before.disk), size(after.disk), smaller(before.disk, after.disk))
    if before.resident is not None and after.resident is not None:
        table.add_row("memory", size(before.resident), size(after.resident), "resident, to load and run")
    if before.load_seconds is not None and after.load_seconds is not None:
        table.add_row("load", milliseconds(before.load_seconds), milliseconds(after.load_seconds), "")


def show_placement(console: Console, found: Placement) -> None:
    """What a target's own provider made of a model."""
    console.print(Text(elsewhere.told(found), style="" if found.right else "bold red"))
    console.print(
        f"there against the float model here: {decibels(found.sqnr)}, cosine {found.cosine:.6f}, {runs(found.samples)}",
        style="dim",
    )


def _show_candidates(console: Console, report: Report) -> None:
    """What the search tried, the most faithful first."""
    budget = report.budget.text if report.budget is not None else "no budget"
    console.print(Text.assemble((f"{len(report.candidates)} candidates, ", "bold"), f"budget: {budget}"))
    # A loss of SQNR is a share of noise, which the SQNR itself says better; nor is there a column for what none has.
    timed = any(one.speed for one in report.candidates)
    hidden = {"loss"} if report.budget is not None and report.budget.decibels is not None else set[str]()
    hidden |= set() if timed else {"speed"}
    heads = ("", "loss", "SQNR", "size", "speed", "nodes", "verdict")
    shown = [place for place, head in enumerate(heads) if head not in hidden]
    table = _grid(*("lrrrlll"[place] for place in shown))
    table.add_row(*(Text(heads[place], style="dim") for place in shown))
    for one in sorted(report.candidates, key=lambda c: (c.loss is None, c.loss or 0.0)):
        row = _candidate_row(one)
        table.add_row(*(row[place] for place in shown))
    console.print(table)


def _candidate_row(one: Candidate) -> tuple[RenderableType, ...]:
    styles = {"chosen": "bold green", "within": "", "loses too much": "red", "slower": "red"}
    nodes = ", ".join(f"{count} {scheme}" for scheme, count in one.nodes.items()) or "all in float"
    return (
        Text(one.name, style="bold" if one.verdict == "chosen" else ""),
        "" if one.loss is None else f"{one.loss:.3g}",
        "" if one.sqnr is None else decibels(one.sqnr),
        "" if one.disk is None else size(one.disk),
        " / ".join(f"{ratio:.2f}x" for ratio in one.speed.values()),
        nodes,
        Text(one.verdict, style=styles.get(one.verdict, "yellow")),
    )


def show_sensitivity(console: Console, found: list[Sensitivity], every: bool) -> None:
    """The ranking of `sensitivity`, worst first."""
    shown = found if every else found[:_MOST_NODES]
    table = _grid("l", "l", "l", "r", "r", "l")
    heads = ("node", "operator", "scheme", "SQNR alone", "saves", "")
    table.add_row(*(Text(head, style="dim") for head in heads))
    for one in shown:
        alone = decibels(-10 * math.log10(one.noise)) if one.noise > 0 else "identical"
        how = "measured" if one.exact else Text("estimated", style="dim")
        if one.failed:
            how = Text(f"estimated, since it cannot be built: {one.failed}", style="yellow")
        table.add_row(
            Text(one.node), one.op_type, one.scheme, alone, "" if one.saved is None else milliseconds(one.saved), how
        )
    console.print(table)
    if len(found) > len(shown):
        console.print(f"and {len(found) - len(shown)} more (--all)", style="dim")
    words = "SQNR alone: of the worst output when only this node is quantized; saves: "
    told = "on one thread, by the target's costs"
    if all(one.saved is None for one in found):
        told = "not known, since this target's costs are an order of preference"
    console.print(words + told, style="dim")


def _speed_row(speed: Speed) -> tuple[RenderableType, ...]:
    spread = f"  {speed.ratio_low:.2f} to {speed.ratio_high:.2f} in {speed.blocks} measurements"
    if speed.ratio_low < 1 < speed.ratio_high:
        spread += ", within noise of 1x"
    return (
        f"{speed.threads} thread{'s' * (speed.threads > 1)}",
        milliseconds(speed.before.median),
        milliseconds(speed.after.median),
        Text.assemble(_ratio(speed.ratio), (spread, "dim")),
    )


def show_speed(console: Console, speeds: list[Speed]) -> None:
    """The table of `bench`."""
    table = _grid("l", "r", "r", "l")
    table.add_row("", Text("first", style="dim"), Text("second", style="dim"), "")
    for speed in speeds:
        table.add_row(*_speed_row(speed))
    console.print(table)


def show_fidelity(console: Console, fidelity: Fidelity) -> None:
    """The table of `validate`."""
    table = _grid("l", "r", "r", "r", "r")
    heads = ("output", "SQNR", "cosine", "max error", "same top-1")
    table.add_row(*(Text(head, style="dim") for head in heads))
    for name, error in fidelity.outputs.items():
        same = "" if error.agreement is None else f"{error.agreement:.2%}"
        table.add_row(Text(name), decibels(error.sqnr), f"{error.cosine:.6f}", f"{error.max_error:.3g}", same)
    console.print(table)
    for name, what in fidelity.skipped.items():
        console.print(Text(f"{name} has {what}", style="yellow"))
    apart = "" if fidelity.held_back else ", which calibration has seen"
    console.print(
        f"on {runs(fidelity.samples)}{apart}; SQNR: signal over error, 20 dB is an error of 10 %, 40 dB of 1 %",
        style="dim",
    )
    if fidelity.layers:
        worst = sorted(fidelity.layers, key=lambda layer: layer.sqnr)[:3]
        listing = ", ".join(f"{layer.value} ({layer.op_type}, {decibels(layer.sqnr)})" for layer in worst)
        console.print(Text(f"least faithful inside: {listing}", style="dim"))


def _show_nodes(console: Console, nodes: list[NodeReport], more: str) -> None:
    integer = Counter(labels.kernel(n.op_type, n.kernel) for n in nodes if n.kernel)
    listing = ", ".join(f"{count} {what}" for what, count in integer.most_common())
    console.print(Text.assemble((f"{sum(integer.values())} nodes quantized: ", "bold"), listing or "none"))
    reasons = Counter((n.op_type, n.reason or "") for n in nodes if n.kernel is None)
    console.print(Text(f"{sum(reasons.values())} nodes in float:", style="bold"))
    table = _grid("r", "l", "l")
    for (op_type, reason), count in reasons.most_common(_MOST_REASONS):
        table.add_row(str(count), op_type, Text(reason))
    rest = sum(count for _, count in reasons.most_common()[_MOST_REASONS:])
    if rest:
        table.add_row(str(rest), "others", Text(more, style="dim"))
    console.print(table)


def show_inspection(console: Console, path: Path, found: Inspection, every: bool) -> None:
    """The summary of `inspect`; with `every`, each node on a line."""
    console.print(Text(str(path), style="bold"))
    console.print(
        f"opset {found.opset}, IR {found.ir_version}, {size(found.disk)} on disk, {size(found.weights)} of weights",
        style="dim",
    )
    console.print(f"planned for target {found.target}, scheme {found.scheme}", style="dim")
    table = _grid("l", "l", "l")
    for kind, values in (("input", found.inputs), ("output", found.outputs)):
        for name, words in values.items():
            table.add_row(Text(kind, style="dim"), Text(name), Text(words))
    listing = ", ".join(f"{count} {op}" for op, count in found.operators.items())
    console.print(Group(table, Text(""), Text(listing), Text("")))
    if every:
        table = _grid("l", "l", "l")
        for node in found.nodes:
            table.add_row(Text(node.name), node.op_type, Text(f"as {node.kernel}" if node.kernel else str(node.reason)))
        console.print(table)
    else:
        _show_nodes(console, found.nodes, "see them all with --nodes")
    if not found.measured:
        console.print("Give --data to plan with measured shapes instead of declared ones.", style="dim")


def show_targets(console: Console, targets: Mapping[str, Target]) -> None:
    """The list of `targets`; one that stands for another here says so."""
    table = _grid("l", "l")
    for name, target in targets.items():
        same = f" (here: {target.name})" if target.name != name else ""
        table.add_row(Text(name, style="bold"), Text(target.description + same))
        table.add_row("", Text(f"{target.provider}; schemes: {', '.join(target.schemes)}", style="dim"))
        where = proof.how(target)
        if where is not None:
            table.add_row("", Text.assemble(("proved here on: ", "green"), (where, "dim")))
        else:
            missing = proof.missing(target)
            table.add_row("", Text.assemble(("not proved here: ", "yellow"), (missing, "dim")))
        if target.evidence:
            table.add_row("", Text(f"known from: {target.evidence}", style="dim"))
    console.print(table)


def show_passes(console: Console, passes: Mapping[str, str], pipelines: list[str]) -> None:
    """The list of `passes`."""
    table = _grid("l", "l")
    for name, line in passes.items():
        table.add_row(Text(name, style="bold"), Text(line))
    console.print(table)
    console.print(f"pipelines: {', '.join(pipelines)}", style="dim")


@contextlib.contextmanager
def progress(console: Console) -> Generator[Callable[[str, int, int], None]]:
    """A progress bar that shows itself once the work has lasted two seconds; quiet where there is no terminal."""
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    start = time.monotonic()
    task: TaskID | None = None

    def update(what: str, done: int, total: int) -> None:
        nonlocal task
        if task is None:
            if time.monotonic() - start < _QUIET_SECONDS:
                return
            bar.start()
            task = bar.add_task(what, total=None)
        bar.update(task, description=what, completed=done, total=total or None)

    try:
        yield update
    finally:
        bar.stop()
