"""What the numbers mean for the task: top-1, bits per byte, nearest neighbours, or agreement of a detector's anchors.

    python tools/accuracy.py top1 MODEL... --data evaluation.npz --labels labels.npz
    python tools/accuracy.py bits MODEL... --data evaluation.npz
    python tools/accuracy.py neighbours ORIGINAL OTHER... --data evaluation.npz
    python tools/accuracy.py anchors ORIGINAL OTHER --data evaluation.npz

`top1` counts samples whose largest output is the label (labels below zero are left out). `bits` takes a byte-level
language model with output [N, length, 256]. `neighbours` takes an encoder with an input `attention_mask` and output
[N, length, width]: the mean cosine of its mean-pooled embeddings to the original's, and the share of samples with the
same nearest other sample. `anchors` takes a detector with outputs `scores` [N, anchors, 2] and `boxes` [N, anchors, 4]
(x1, y1, x2, y2): the intersection over union of the sets of anchors whose score exceeds the threshold, and the mean
intersection over union of their boxes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison import METRICS, Arrays, joined, outputs

from qgraph import data, modelio
from qgraph.data import Dataset

_FILE = click.Path(path_type=Path, exists=True)


def dataset(model: Path, source: Path) -> Dataset:
    """The evaluation data, checked against the model's inputs."""
    return data.load(source, data.inputs_of(modelio.read(model)))


@click.group()
def main() -> None:
    """Accuracy of models on a task."""


@main.command()
@click.argument("models", nargs=-1, type=_FILE, required=True)
@click.option("--data", "source", required=True, type=_FILE)
@click.option("--labels", required=True, type=_FILE)
def top1(models: tuple[Path, ...], source: Path, labels: Path) -> None:
    """Share of samples whose largest output is the label."""
    with np.load(labels) as stored:
        _say("top1", models, source, stored[stored.files[0]])


@main.command()
@click.argument("models", nargs=-1, type=_FILE, required=True)
@click.option("--data", "source", required=True, type=_FILE)
def bits(models: tuple[Path, ...], source: Path) -> None:
    """Bits per byte of a language model."""
    _say("bits", models, source)


@main.command()
@click.argument("original", type=_FILE)
@click.argument("others", nargs=-1, type=_FILE, required=True)
@click.option("--data", "source", required=True, type=_FILE)
def neighbours(original: Path, others: tuple[Path, ...], source: Path) -> None:
    """Likeness of sentence embeddings to the original's."""
    _say("neighbours", (original, *others), source)


def _say(task: str, models: tuple[Path, ...], source: Path, labels: np.ndarray | None = None) -> None:
    """A task's metric for each model, the first of which is the original where the metric needs one."""
    samples = dataset(models[0], source)
    feeds = joined(batch.feeds for batch in samples)
    original: Arrays | None = None
    for model in models:
        found = outputs(model, samples)
        original = found if original is None else original
        click.echo(f"{model.name}: {METRICS[task](feeds, labels, original, found)}")


@main.command()
@click.argument("original", type=_FILE)
@click.argument("other", type=_FILE)
@click.option("--data", "source", required=True, type=_FILE)
@click.option("--threshold", default=0.7, show_default=True)
def anchors(original: Path, other: Path, source: Path, threshold: float) -> None:
    """Agreement of a detector's anchors."""
    samples = dataset(original, source)
    a, b = outputs(original, samples), outputs(other, samples)
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
