"""qgraph beside onnxruntime's own quantizers, on one model in one run: `versus_peers.py` without the other peers.

python tools/versus_onnxruntime.py MODEL CALIBRATION.npz EVALUATION.npz [--methods ...] [--samples N]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison import Comparison, table

METHODS = ("ort-default", "ort-u8s8", "ort-u8s8-matmul", "ort-percentile", "qgraph")
_FILE = click.Path(path_type=Path, exists=True)


@click.command()
@click.argument("model", type=_FILE)
@click.argument("calibration", type=_FILE)
@click.argument("evaluation", type=_FILE)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--samples", default=16, show_default=True, help="Calibration runs given to each tool.")
@click.option("--seconds", default=12.0, show_default=True, help="Timing of each result and thread count; 0: none.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder in which the results stay.")
@click.option("--clean", type=_FILE, help="Another float model to time against, instead of MODEL.")
def main(model: Path, calibration: Path, evaluation: Path, methods: str, samples: int, seconds: float,
         keep: Path | None, clean: Path | None) -> None:  # fmt: skip
    """Compare the tools on MODEL."""
    folder = keep or Path(tempfile.mkdtemp(prefix="versus-"))
    comparison = Comparison(model, calibration, evaluation, folder, samples=samples, seconds=seconds, reference=clean)
    Console().print(table(comparison.rows(methods.split(",")), model.name))


if __name__ == "__main__":
    main()
