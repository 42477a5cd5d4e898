"""Architecture shapes with seeded weights and inputs: what speed, memory and SQNR are measured on without downloads.

    python models/shapes.py resnet50 out/resnet50.onnx --seed 0 --calibration 32 --evaluation 32

The weights are random, so these models show the error and the speed of a quantizer, never its effect on a task.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.builders.cnn import conv_chain, mobilenet_v2, resnet50
from models.builders.inputs import images, tokens
from models.builders.mlp import big_mlp
from models.builders.transformers import bert_base, deit_small

__all__ = [
    "BUILDERS",
    "bert_base",
    "big_mlp",
    "conv_chain",
    "deit_small",
    "images",
    "mobilenet_v2",
    "resnet50",
    "sample_inputs",
    "save",
    "tokens",
]

Feeds: TypeAlias = Mapping[str, npt.NDArray[np.generic]]

BUILDERS: dict[str, Callable[..., ir.Model]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "bert_base": bert_base,
    "deit_small": deit_small,
}
EVALUATION_OFFSET = 104729


def sample_inputs(name: str, count: int, *, seed: int = 0, size: int | None = None, vocabulary: int = 30522) -> Feeds:
    """`count` seeded samples for the model `name` of `BUILDERS`, stacked along axis 0 of each input.

    `size` is the side of an image (default 224) or the length of a token sequence (default 128), whose ids lie below
    `vocabulary`.
    """
    if name == "bert_base":
        return tokens(count, length=size or 128, vocabulary=vocabulary, seed=seed)
    return {"image": images(count, size=size or 224, seed=seed)}


def save(model: ir.Model, path: Path | str) -> None:
    """Save `model` below 2 GB without value_info, as exporters leave it: types are for the reader to infer.

    onnx_ir states the shapes of initializers there, and a tool that transposes a weight in place contradicts them.
    """
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    onnx.save_model(proto, str(path))


@click.command()
@click.argument("name", type=click.Choice(sorted(BUILDERS)))
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of the weights and of the inputs.")
@click.option("--batch", default="N", show_default=True, help="Batch dimension: a symbol or a number.")
@click.option("--size", type=int, help="Side of the image [224], or length of the token sequences [128].")
@click.option("--folded", is_flag=True, help="Fold BatchNormalization into its convolution.")
@click.option("--calibration", default=32, show_default=True, help="Samples in PATH's *_calibration.npz; 0 for none.")
@click.option("--evaluation", default=32, show_default=True, help="Samples in PATH's *_evaluation.npz; 0 for none.")
def main(
    name: str, path: Path, seed: int, batch: str, size: int | None, folded: bool, calibration: int, evaluation: int
) -> None:
    """Write the model NAME to PATH, and its seeded inputs beside it."""
    builder = BUILDERS[name]
    accepted = inspect.signature(builder).parameters
    options: dict[str, object] = {"seed": seed, "batch": int(batch) if batch.isdecimal() else batch}
    if folded:
        if "folded" not in accepted:
            raise click.UsageError(f"{name} has no BatchNormalization to fold")
        options["folded"] = True
    if size is not None and "image_size" in accepted:
        options["image_size"] = size
    path.parent.mkdir(parents=True, exist_ok=True)
    save(builder(**options), path)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    parts = (("calibration", calibration, seed + 1), ("evaluation", evaluation, seed + EVALUATION_OFFSET))
    for part, count, part_seed in parts:
        if count > 0:
            target = path.with_name(f"{path.stem}_{part}.npz")
            feeds: dict[str, Any] = dict(sample_inputs(name, count, seed=part_seed, size=size))
            np.savez(target, **feeds)
            click.echo(f"{target}: {count} samples")


if __name__ == "__main__":
    main()
