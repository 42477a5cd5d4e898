"""A model for every target that can be run here: how much its provider took, and how far its numbers are.

    python tools/prove_targets.py model.onnx calibration.npz evaluation.npz --targets xnnpack,qnn --scheme int8

Targets are those of `qgraph targets`; one that cannot be run here is listed with what is missing. `audit` counts the
nodes that went back to float since the provider did not run them in the kernel that was planned, `left` names the
operators that another provider ran.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import qgraph
from qgraph import proof, registry
from qgraph.errors import QGraphError
from qgraph.words import decibels, percent, size

_WIDTH = 200
"""Characters of a line where no terminal says how many."""
_HEADS = (
    "target", "scheme", "quantized", "audit", "nodes there", "work there", "error", "SQNR", "cosine", "runs", "size",
    "left", "s",
)  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("calibration")
@click.argument("evaluation")
@click.option("--targets", "names", help="Commas between.  [default: all]")
@click.option("--scheme", multiple=True, default=["auto"], help="Repeatable.")
@click.option("--time-limit", default=10.0, show_default=True, help="Seconds of search for each.")
@click.option("--force", is_flag=True, help="Whatever the result loses, and whether it is right or not.")
@click.option("--reports", type=click.Path(path_type=Path, file_okay=False), help="Keep each report there, as JSON.")
def main(
    model: Path,
    calibration: str,
    evaluation: str,
    names: str | None,
    scheme: tuple[str, ...],
    time_limit: float,
    force: bool,
    reports: Path | None,
) -> None:
    """Prove MODEL on each target."""
    if reports is not None:
        reports.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(*_HEADS)
    for name in names.split(",") if names else registry.targets():
        target = registry.target(name)
        for one in scheme:
            if one not in target.schemes:
                continue
            if proof.how(target) is None:
                table.add_row(name, one, f"[dim]{proof.missing(target)}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "out.onnx"
                kept = None if reports is None else reports / f"{model.stem}-{name}-{one}.json"
                table.add_row(
                    name, one, *_row(model, output, (calibration, evaluation), name, one, time_limit, force, kept)
                )
        console.print(f"{name} done")
    console.print(table)


def _row(
    model: Path,
    output: Path,
    data: tuple[str, str],
    target: str,
    scheme: str,
    limit: float,
    force: bool,
    kept: Path | None,
) -> list[str]:
    start = time.perf_counter()
    try:
        found = qgraph.optimize(
            model, output, data=data[0], evaluation=data[1], target=target, scheme=scheme, bench_seconds=0,
            time_limit=limit, force=force,
        ).report  # fmt: skip
    except QGraphError as error:
        return [f"[red]{type(error).__name__}: {error}"]
    if kept is not None:
        found.save(kept)
    layers = sum(node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") for node in found.quantized)
    what = f"{len(found.quantized)} nodes, {layers} layers"
    # How `qgraph.outcome.not_chosen` begins its reasons.
    missed = str(sum((one.reason or "").startswith("the runtime ") for one in found.refused))
    seconds = f"{time.perf_counter() - start:.0f}"
    placed = found.placement
    if placed is None:
        told = next((note for note in found.notes if "does not run there" in note), "in this process")
        fidelity = decibels(found.fidelity.worst.sqnr) if found.fidelity else ""
        return [what, missed, told, "", "", fidelity, "", "", "", "", seconds]
    left = ", ".join(sorted({one.op_type for one in placed.left}))
    error = f"{placed.error:.1e}" if placed.right else f"[red]{placed.error:.1e} > {placed.allowed:.1e}"
    work = "" if placed.work is None else percent(placed.work)
    disk = size(sum(file.stat().st_size for file in output.parent.iterdir()))
    faithful = decibels(placed.sqnr), f"{placed.cosine:.5f}"
    runs = str(placed.samples)
    return [what, missed, percent(placed.share), work, error, *faithful, runs, disk, left, seconds]


if __name__ == "__main__":
    main()
