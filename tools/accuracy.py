"""What the numbers mean for the task: top-1 on labels, or agreement of a detector's anchors.

    python tools/accuracy.py top1 MODEL... --data evaluation.npz --labels labels.npz
    python tools/accuracy.py anchors ORIGINAL OTHER --data evaluation.npz

`top1` counts samples whose largest output is the label (labels below zero are left out). `anchors` takes a detector
with outputs `scores` [N, anchors, 2] and `boxes` [N, anchors, 4] (x1, y1, x2, y2): the intersection over union of the
sets of anchors whose score exceeds the threshold, and the mean intersection over union of their boxes.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from qgraph import data, modelio
from qgraph.session import Session

_FILE = click.Path(path_type=Path, exists=True)


def outputs(model: Path, source: Path) -> dict[str, NDArray[np.float32]]:
    """All outputs on all samples, joined along axis 0."""
    loaded = data.load(source, data.inputs_of(modelio.read(model)))
    with Session(model) as session:
        runs = [session.run(batch.feeds) for batch in loaded]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


@click.group()
def main() -> None:
    """Accuracy of models on a task."""


@main.command()
@click.argument("models", nargs=-1, type=_FILE)
@click.option("--data", "source", required=True, type=_FILE)
@click.option("--labels", required=True, type=_FILE)
def top1(models: tuple[Path, ...], source: Path, labels: Path) -> None:
    """Share of samples whose largest output is the label."""
    with np.load(labels) as stored:
        truth = stored[stored.files[0]]
    for model in models:
        logits = next(iter(outputs(model, source).values()))
        known = truth >= 0
        hits = logits.argmax(axis=1)[known] == truth[known]
        click.echo(f"{model.name}: {hits.mean():.2%} ({hits.sum()} of {hits.size})")


@main.command()
@click.argument("original", type=_FILE)
@click.argument("other", type=_FILE)
@click.option("--data", "source", required=True, type=_FILE)
@click.option("--threshold", default=0.7, show_default=True)
def anchors(original: Path, other: Path, source: Path, threshold: float) -> None:
    """Agreement of a detector's anchors."""
    a, b = outputs(original, source), outputs(other, source)
    chosen, kept = a["scores"][..., 1] > threshold, b["scores"][..., 1] > threshold
    both = chosen & kept
    p, q = a["boxes"][both].astype(np.float64), b["boxes"][both].astype(np.float64)
    inner = np.clip(np.minimum(p[:, 2:], q[:, 2:]) - np.maximum(p[:, :2], q[:, :2]), 0, None).prod(axis=1)
    areas = (p[:, 2:] - p[:, :2]).prod(axis=1) + (q[:, 2:] - q[:, :2]).prod(axis=1)
    union = (chosen | kept).sum()
    click.echo(f"anchors above {threshold}: {chosen.sum()} and {kept.sum()}, IoU of the sets {both.sum() / union:.4f}")
    click.echo(f"mean IoU of the boxes of common anchors {(inner / (areas - inner)).mean():.4f}")


if __name__ == "__main__":
    main()
