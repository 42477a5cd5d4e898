"""Peak resident memory of calibration, for every observer and two amounts of data; it must not grow with the data.

    python tools/calibration_memory.py MODEL CALIBRATION.npz [--batches 8,128]

Each measurement is a process of its own that reads, prepares and calibrates the model. Samples are used again and again
until there are enough batches.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qgraph import data, modelio, observers, registry
from qgraph.pipeline import Context, Pipeline


def _worker(model_path: Path, source: Path, observer: str, count: int) -> None:
    import resource

    model = modelio.read(model_path)
    inputs = data.inputs_of(model)
    samples = [dict(batch.feeds) for batch in data.load(source, inputs)]

    def feeds() -> Iterator[dict[str, Any]]:
        return islice(cycle(samples), count)

    target = registry.target("cpu")
    start = time.perf_counter()
    with modelio.Workspace() as workspace:
        dataset = data.load(feeds, inputs)
        context = Context(target, target.scheme("int8"), dataset, workspace.spill(model), observer)
        steps = list(registry.pipeline("static")(context).passes)
        until = [type(step).__name__ for step in steps].index("Calibrate") + 1
        Pipeline(*steps[:until])(model)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": seconds}))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("calibration", type=click.Path(path_type=Path, exists=True))
@click.option("--batches", default="8,128", show_default=True)
@click.option("--names", default=",".join(observers.OBSERVERS), show_default=True, help="Observers.")
def main(model: Path, calibration: Path, batches: str, names: str) -> None:
    """Print the table."""
    counts = [int(count) for count in batches.split(",")]
    table = Table("observer", *(f"peak MB, {count} batches" for count in counts), "growth", "seconds")
    for name in names.split(","):
        found = []
        for count in counts:
            command = [sys.executable, __file__, "--worker", str(model), str(calibration), name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        peaks = [one["peak"] / 1e6 for one in found]
        seconds = ", ".join(f"{one['seconds']:.1f}" for one in found)
        table.add_row(name, *(f"{peak:.0f}" for peak in peaks), f"{peaks[-1] / peaks[0] - 1:+.1%}", seconds)
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
