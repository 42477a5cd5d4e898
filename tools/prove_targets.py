"""A model for every target that can be run here: how much its provider took, and how far its numbers are.

    python tools/prove_targets.py model.onnx calibration.npz evaluation.npz --targets xnnpack,qnn --scheme int8

Targets are those of `qgraph targets`; one that cannot be run here is listed with what is missing.
"""

from __future__ import annotations

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

_HEADS = ("target", "scheme", "quantized", "nodes there", "work there", "error", "SQNR", "cosine", "size", "left", "s")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("calibration")
@click.argument("evaluation")
@click.option("--targets", "names", help="Commas between.  [default: all]")
@click.option("--scheme", multiple=True, default=["auto"], help="Repeatable.")
@click.option("--time-limit", default=10.0, show_default=True, help="Seconds of search for each.")
def main(
    model: Path, calibration: str, evaluation: str, names: str | None, scheme: tuple[str, ...], time_limit: float
) -> None:
    """Prove MODEL on each target."""
    console = Console()
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
                table.add_row(name, one, *_row(model, output, (calibration, evaluation), name, one, time_limit))
        console.print(f"{name} done")
    console.print(table)


def _row(model: Path, output: Path, data: tuple[str, str], target: str, scheme: str, limit: float) -> list[str]:
    start = time.perf_counter()
    try:
        found = qgraph.optimize(
            model, output, data=data[0], evaluation=data[1], target=target, scheme=scheme, force=True,
            bench_seconds=0, time_limit=limit,
        ).report  # fmt: skip
    except QGraphError as error:
        return [f"[red]{type(error).__name__}: {error}"]
    layers = sum(node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") for node in found.quantized)
    what = f"{len(found.quantized)} nodes, {layers} layers"
    seconds = f"{time.perf_counter() - start:.0f}"
    placed = found.placement
    if placed is None:
        told = next((note for note in found.notes if "does not run there" in note), "in this process")
        return [what, told, "", "", decibels(found.fidelity.worst.sqnr) if found.fidelity else "", "", "", "", seconds]
    left = ", ".join(sorted({one.op_type for one in placed.left}))
    error = f"{placed.error:.1e}" if placed.right else f"[red]{placed.error:.1e} > {placed.allowed:.1e}"
    work = "" if placed.work is None else percent(placed.work)
    disk = size(sum(file.stat().st_size for file in output.parent.iterdir()))
    faithful = decibels(placed.sqnr), f"{placed.cosine:.5f}"
    return [what, percent(placed.share), work, error, *faithful, disk, left, seconds]


if __name__ == "__main__":
    main()
