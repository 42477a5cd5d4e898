"""qgraph beside its peers, on one model in one run: accuracy, task, speed, tool time, peak memory.

    python tools/versus_peers.py MODEL --task neighbours --venvs FOLDER [--methods ort-dynamic,nncf,qgraph]

MODEL has its data beside it, as `tools/minilm.py`, `tools/train_language_model.py`, `tools/train_wide_cnn.py` and
`models/shapes.py` write it: MODEL_calibration.npz, MODEL_evaluation.npz and, for `--task top1`, MODEL_labels.npz.

A method is a tool, or a tool and its variant, see `tools/quantizers.py`; `qgraph-X` uses the scheme or the observer X.
Tools that clash with qgraph's dependencies get a virtual environment in FOLDER, made when it is not there; one that
cannot be installed is listed with the reason.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison import METRICS, Comparison, Row, table

METHODS = (
    "ort-u8s8-tensor", "ort-u8s8", "ort-u8s8-matmul", "ort-percentile", "ort-dynamic",
    "nncf", "nncf-transformer", "inc-static", "inc-smooth", "inc-smooth-matmul", "quark", "quark-transformer", "qgraph",
)  # fmt: skip
# What each peer needs in an environment of its own.
REQUIREMENTS = {
    "nncf": ("nncf", "onnx", "onnxruntime"),
    # The rest of what it imports, which it does not declare.
    "inc": ("onnx-neural-compressor", "prettytable", "psutil", "scipy"),
    "hqq": ("onnxruntime", "onnx", "onnx_ir", "torch"),
    "gptq": ("onnxruntime", "onnx", "onnx_ir", "torch"),
    # The newest runtime that it says it knows.
    "quark": ("amd-quark", "torch", "onnxruntime<=1.28.0"),
}
_FILE = click.Path(path_type=Path, exists=True)


def environment(tool: str, folder: Path) -> tuple[Path, str]:
    """The interpreter of a tool's environment in `folder`, and why it could not be made, if so."""
    python = folder / tool / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / tool)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[tool]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            python.unlink()
            return python, f"cannot be installed: {(errors or ['pip failed'])[-1][:160]}"
    return python, ""


def beside(model: Path, what: str) -> Path:
    """The file of that kind beside a model."""
    return model.with_name(f"{model.stem}_{what}.npz")


@click.command()
@click.argument("model", type=_FILE)
@click.option("--task", type=click.Choice(list(METRICS)), help="Metric of the task, besides SQNR and cosine.")
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--calibration", type=_FILE, help="Default: MODEL_calibration.npz")
@click.option("--evaluation", type=_FILE, help="Default: MODEL_evaluation.npz")
@click.option("--labels", type=_FILE, help="Default: MODEL_labels.npz, if there is one.")
@click.option("--samples", default=64, show_default=True, help="Calibration runs given to each tool.")
@click.option("--seconds", default=6.0, show_default=True, help="Timing of each result and thread count; 0: none.")
@click.option("--venvs", type=click.Path(path_type=Path), help="Folder for the peers' environments; default: this one.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder in which the results stay.")
@click.option("--reuse", is_flag=True, help="Take results that are in --keep already.")
def main(model: Path, task: str | None, methods: str, calibration: Path | None, evaluation: Path | None,
         labels: Path | None, venvs: Path | None, keep: Path | None, **options: float) -> None:  # fmt: skip
    """Compare the tools on MODEL."""
    labels = labels or beside(model, "labels")
    truth: np.ndarray | None = None
    if labels.exists():
        with np.load(labels) as stored:
            truth = stored[stored.files[0]]
    chosen = methods.split(",")
    tools = {method.partition("-")[0] for method in chosen} & REQUIREMENTS.keys() if venvs else set()
    made = {tool: environment(tool, venvs.absolute()) for tool in sorted(tools)} if venvs else {}
    comparison = Comparison(
        model,
        calibration or beside(model, "calibration"),
        evaluation or beside(model, "evaluation"),
        keep or Path(tempfile.mkdtemp(prefix="versus-")),
        METRICS[task] if task else None,
        truth,
        pythons={tool: python for tool, (python, _) in made.items()},
        **options,  # type: ignore[arg-type]
    )
    reasons = {tool: reason for tool, (_, reason) in made.items() if reason}
    missing = [Row(m, failure=reasons[m.partition("-")[0]]) for m in chosen if m.partition("-")[0] in reasons]
    able = [method for method in chosen if method.partition("-")[0] not in reasons]
    rows = [comparison.original(), *comparison.rows(able), *missing]
    Console(width=150).print(table(rows, f"{model.parent.name}/{model.name}"))


if __name__ == "__main__":
    main()
