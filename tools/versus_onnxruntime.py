"""qgraph beside onnxruntime's `quantize_static`, on one model in one run: accuracy, speed, tool time, peak memory.

    python tools/versus_onnxruntime.py MODEL CALIBRATION.npz EVALUATION.npz [--methods ...] [--samples N]

Each tool runs in a process of its own, whose peak resident memory is read afterwards. Speed is the median over pairs of
neighbouring blocks against the model as given, one live session at a time; accuracy is SQNR and cosine on EVALUATION.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import qgraph
from qgraph import bench, data, modelio
from qgraph.compare import Runnable, compare
from qgraph.session import SessionOptions

METHODS = ("ort-default", "ort-u8s8", "ort-u8s8-matmul", "ort-percentile", "qgraph")


def run_tool(method: str, model: Path, calibration: Path, output: Path, samples: int) -> None:
    """Quantize with one tool, in this process."""
    batches = list(_batches(model, calibration, samples))
    if method.startswith("qgraph"):
        observer = method.partition("-")[2] or None
        options = qgraph.Options(bench_seconds=0, observer=observer)
        qgraph.optimize(model, output, data=batches, evaluation=batches[:1], options=options)
        return
    from onnxruntime import quantization as ortq

    class Reader(ortq.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        options_: dict[str, Any] = {}
        if method != "ort-default":
            options_ = {
                "activation_type": ortq.QuantType.QUInt8,
                "weight_type": ortq.QuantType.QInt8,
                "per_channel": True,
            }
        if method == "ort-percentile":
            options_["calibrate_method"] = ortq.CalibrationMethod.Percentile
        if method == "ort-u8s8-matmul":
            options_["op_types_to_quantize"] = ["MatMul", "Gemm"]
        ortq.quantize_static(str(prepared), str(output), Reader(), **options_)


def _batches(model: Path, source: Path, samples: int) -> Iterator[dict[str, Any]]:
    loaded = data.load(source, data.inputs_of(modelio.read(model)))
    for number, batch in enumerate(loaded):
        if number == samples:
            return
        yield dict(batch.feeds)


def _worker(arguments: list[str]) -> None:
    import resource

    method, model, calibration, output, samples = arguments
    start = time.perf_counter()
    run_tool(method, Path(model), Path(calibration), Path(output), int(samples))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("calibration", type=click.Path(path_type=Path, exists=True))
@click.argument("evaluation", type=click.Path(path_type=Path, exists=True))
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--samples", default=16, show_default=True, help="Calibration runs given to each tool.")
@click.option("--eval-samples", default=16, show_default=True)
@click.option(
    "--seconds", default=12.0, show_default=True, help="Timing of each result for each thread count; 0: none."
)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder in which the results stay.")
@click.option("--clean", type=click.Path(path_type=Path, exists=True), help="Another float model to time against, too.")
def main(model: Path, calibration: Path, evaluation: Path, methods: str, samples: int, eval_samples: int,
         seconds: float, keep: Path | None, clean: Path | None) -> None:  # fmt: skip
    """Compare the tools on MODEL."""
    console = Console()
    table = Table(
        "tool", "output: SQNR, cosine, same top-1", "threads: speed (lowest to highest)", "tool s", "peak MB", "MB"
    )
    inputs = data.inputs_of(modelio.read(model))
    held = [dict(b.feeds) for _, b in zip(range(eval_samples), data.load(evaluation, inputs), strict=False)]
    dataset = data.load(held, inputs)
    folder = keep or Path(tempfile.mkdtemp(prefix="versus-"))
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods.split(","):
        output = folder / f"{method}.onnx"
        command = [
            sys.executable,
            __file__,
            "--worker",
            method,
            str(model),
            str(calibration),
            str(output),
            str(samples),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            table.add_row(method, f"failed: {done.stderr.strip().splitlines()[-1][:120]}")
            continue
        cost = json.loads(done.stdout.splitlines()[-1])
        try:
            found = compare(Runnable(model), Runnable(output), dataset, SessionOptions())
        except qgraph.QGraphError as error:
            table.add_row(method, f"fails: {str(error)[:120]}")
            continue
        words = "\n".join(
            f"{k}: {e.sqnr:.1f} dB, {e.cosine:.5f}" + ("" if e.agreement is None else f", {e.agreement:.3f}")
            for k, e in found.outputs.items()
        )
        speeds: list[str] = []
        for reference in [model, *([clean] if clean else [])] if seconds else []:
            for threads in sorted({1, bench.all_threads()}):
                s = bench.alternate(Runnable(reference), Runnable(output), held[0], SessionOptions(), threads, seconds)
                name = "" if reference is model else " (clean)"
                speeds.append(f"{threads}: {s.ratio:.2f}x ({s.ratio_low:.2f} to {s.ratio_high:.2f}){name}")
        size = np.round(modelio.size_on_disk(output) / 1e6, 1)
        table.add_row(
            method, words, "\n".join(speeds), f"{cost['seconds']:.1f}", f"{cost['peak'] / 1e6:.0f}", str(size)
        )
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2:])
    else:
        main()
