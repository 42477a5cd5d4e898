"""Measure the operators between a transformer's products: each fused operator of ONNX Runtime against its parts.

A fused operator is not always a faster one, so a target's `fast_operators` names those that are, and this tool finds
them. Each form of a piece is written several times in a row, so that what is timed is the piece and not the call; the
parts and the fused form run in alternating blocks, each in a session of its own, and the runtime optimizes both as it
would in a real model. Gain is time of the parts over time of the fused form (median and range over pairs of blocks).

    python tools/measure_glue.py --only attention --threads 1
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from glue import REPEATS
from glue import SECTIONS as PIECES
from glue_flattened import flattened

from qgraph.bench import alternate
from qgraph.compare import Runnable
from qgraph.session import SessionOptions

SECTIONS = {**PIECES, "flattened": flattened}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Sections to run, by default all.")
@click.option("--threads", multiple=True, default=(1, 2), show_default=True, help="Intra-op threads.")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each comparison.")
def main(only: tuple[str, ...], threads: tuple[int, ...], seconds: float) -> None:
    """Time fused operators of ONNX Runtime against their parts on this machine."""
    table = Table("piece", "size", "threads", "parts", "us", "fused", "us", "gain", "range", "difference")
    for case in (case for name, make in SECTIONS.items() if name in (only or SECTIONS) for case in make()):
        feeds, (parts, *others) = case.feeds(), case.forms
        before = Runnable(case.model(parts))
        for form in others:
            after = Runnable(case.model(form))
            wrong = _difference(before, after, feeds)
            for count in threads:
                speed = alternate(before, after, feeds, SessionOptions(), count, seconds)
                us = [f"{1e6 * t.median / REPEATS:.0f}" for t in (speed.before, speed.after)]
                spread = f"{speed.ratio_low:.2f}-{speed.ratio_high:.2f}"
                row = (case.piece, case.size, str(count), parts, us[0], form, us[1], f"{speed.ratio:.2f}", spread)
                table.add_row(*row, f"{wrong:.0e}")
    Console(width=200).print(table)


def _difference(before: Runnable, after: Runnable, feeds: dict[str, np.ndarray]) -> float:
    """Largest difference relative to the largest number."""
    results: list[Any] = []
    for one in (before, after):
        with one.session(SessionOptions(threads=1)) as session:
            results.extend(session.run(feeds).values())
    return float(np.abs(results[0] - results[1]).max() / np.abs(results[0]).max())


if __name__ == "__main__":
    main()
