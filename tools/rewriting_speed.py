"""Time of the whole rewriting (all passes but the run of the calibration data) on chains of 100 to 800 layers.

    python tools/rewriting_speed.py [--ort]

Each layer is Conv + BatchNormalization + Relu. Costs must grow linearly; `--ort` also
times onnxruntime's quantize_static.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import qgraph
from qgraph import data, registry
from qgraph.pipeline import Context

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import shapes

_RUNS_THE_MODEL = ("Calibrate", "MeasureShapes")


def ours(layers: int, feeds: list[dict[str, Any]]) -> tuple[float, float, dict[str, float]]:
    """(seconds of rewriting, seconds of running the data, seconds by pass)."""
    model = shapes.conv_chain(layers, channels=32)
    target = registry.target("cpu")
    dataset = data.load(feeds, data.inputs_of(model))
    pipeline = registry.pipeline("static")(Context(target, target.scheme("int8"), dataset))
    pipeline(model)
    steps = {step.name: step.seconds for step in pipeline.steps}
    running = sum(steps.get(name, 0.0) for name in _RUNS_THE_MODEL)
    return sum(steps.values()) - running, running, steps


def theirs(layers: int, feeds: list[dict[str, Any]]) -> float:
    """Seconds of onnxruntime's quantize_static, calibration included."""
    from onnxruntime import quantization as ortq

    class Reader(ortq.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        shapes.save(shapes.conv_chain(layers, channels=32, folded=True), path)
        start = time.perf_counter()
        ortq.quantize_static(str(path), str(Path(folder) / "out.onnx"), Reader())
        return time.perf_counter() - start


@click.command()
@click.option("--layers", default="100,200,400,800", show_default=True)
@click.option("--repeat", default=3, show_default=True)
@click.option("--ort", is_flag=True, help="Time onnxruntime's tool, too.")
def main(layers: str, repeat: int, ort: bool) -> None:
    """Print the table."""
    feeds = [{"image": np.random.default_rng(0).normal(size=(1, 32, 16, 16)).astype(np.float32)}]
    table = Table("layers", "rewriting s", "ms a layer", "running s", "slowest passes", "onnxruntime s")
    ours(10, feeds)
    for count in map(int, layers.split(",")):
        runs = sorted((ours(count, feeds) for _ in range(repeat)), key=lambda run: run[0])
        rewriting, running, steps = runs[len(runs) // 2]
        slow = sorted(((s, n) for n, s in steps.items() if n not in _RUNS_THE_MODEL), reverse=True)[:4]
        words = ", ".join(f"{name} {seconds:.2f}" for seconds, name in slow)
        other = f"{theirs(count, feeds):.1f}" if ort else ""
        table.add_row(str(count), f"{rewriting:.2f}", f"{rewriting / count * 1e3:.2f}", f"{running:.2f}", words, other)
    Console().print(table)
    print(f"qgraph {qgraph.__version__}")


if __name__ == "__main__":
    main()
