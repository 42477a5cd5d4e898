"""Train a depthwise-separable CNN whose channels differ in range by more than two decades, and export it.

    pip install torch onnxscript scikit-learn && python tools/train_wide_cnn.py OUT      # a few minutes

Writes OUT/model.onnx (input `image` [batch, 1, 32, 32], output `logits` [batch, 10]), OUT/model_calibration.npz (128
training images), OUT/model_evaluation.npz and OUT/model_labels.npz (1080 held-out ones). The images are scikit-learn's
digits, enlarged, turned, shifted, dimmed and noisy. `tools/accuracy.py top1` measures.

The network is MobileNet in small (A. Howard et al., MobileNets, 2017, arXiv:1704.04861, section 3). After training,
each hidden channel is multiplied by a factor of its own, and its reader's weights are divided by it, which ReLU lets
pass: the same function, but with the ranges that M. Nagel et al. found in MobileNetV2 and put right (Data-Free
Quantization Through Weight Equalization and Bias Correction, 2019, arXiv:1906.04721, section 4.1, run backwards).
"""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from metrics import top1

SEED = 0
SIDE = 32
HELD, VIEWS, CALIBRATION = 360, 3, 128
EPOCHS, BATCH, PEAK_RATE = 24, 64, 6e-3
STEM = 32
# (inputs, outputs, stride) of a depthwise 3x3 and a pointwise convolution.
BLOCKS = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
DECADES = 2.5
Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Conv + BatchNorm + ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class WideNet(nn.Module):
    """Images [batch, 1, 32, 32] to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        units = [unit(1, STEM, 3, stride=2)]
        for inputs, outputs, stride in BLOCKS:
            units += [unit(inputs, inputs, 3, stride, groups=inputs), unit(inputs, outputs, 1)]
        self.units = nn.ModuleList(units)
        self.head = nn.Linear(BLOCKS[-1][1], 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = image
        for module in self.units:
            x = module(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def distorted(digits: Tensor, random: torch.Generator) -> Tensor:
    """Digits [batch, 1, 8, 8] as images [batch, 1, 32, 32], each one turned, scaled, shifted, dimmed and noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), generator=random)

    angle, zoom = uniform(-0.45, 0.45), uniform(0.8, 1.3)
    rows = torch.stack((angle.cos() * zoom, -angle.sin() * zoom, uniform(-0.25, 0.25)), 1)
    columns = torch.stack((angle.sin() * zoom, angle.cos() * zoom, uniform(-0.25, 0.25)), 1)
    grid = nn.functional.affine_grid(torch.stack((rows, columns), 1), [len(digits), 1, SIDE, SIDE], align_corners=False)
    images = nn.functional.grid_sample(digits, grid, mode="bilinear", align_corners=False)
    images = images * uniform(0.4, 1.0)[:, None, None, None]
    return images + 0.3 * torch.randn(images.shape, generator=random)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training digits and labels, held-out digits and labels."""
    bunch: Any = load_digits()
    digits, labels = (bunch.images[:, None] / 16.0).astype(np.float32), bunch.target.astype(np.int64)
    parts: Any = train_test_split(digits, labels, test_size=HELD, random_state=SEED, stratify=labels)
    training, held, training_labels, held_labels = map(torch.from_numpy, parts)
    return training, training_labels, held, held_labels


def train(digits: Tensor, labels: Tensor) -> WideNet:
    """Train on ever new distortions, with a one-cycle rate."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    model = WideNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    steps = EPOCHS * -(-len(digits) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(digits), generator=random), BATCH):
            logits = model(distorted(digits[chosen], random))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 4 == 3:
            click.echo(f"epoch {epoch + 1:2d}: loss {total / len(digits):.4f}")
    return model.eval()


def widened(model: WideNet, decades: float) -> WideNet:
    """The same function with each hidden channel, but the last unit's, scaled by a factor of its own."""
    model = copy.deepcopy(model)
    random = torch.Generator().manual_seed(SEED)
    units: list[Any] = list(model.units)
    with torch.no_grad():
        for (_, norm, _), (reader, _, _) in itertools.pairwise(units):
            factors = 10 ** (decades * (torch.rand(norm.num_features, generator=random) - 0.5))
            norm.weight *= factors
            norm.bias *= factors
            # A depthwise kernel is [channels, 1, 3, 3], a pointwise one [outputs, channels, 1, 1].
            reader.weight /= factors.view(-1, 1, 1, 1) if reader.groups > 1 else factors.view(1, -1, 1, 1)
    return model


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--decades", default=DECADES, show_default=True, help="Spread of the channels' factors.")
def main(out: Path, decades: float) -> None:
    """Train, widen, export, and compare ONNX Runtime with the network as trained."""
    digits, digit_labels, held, held_labels = data()
    trained = train(digits, digit_labels)
    model = widened(trained, decades)
    random = torch.Generator().manual_seed(SEED + 1)
    chosen = torch.randperm(len(digits), generator=random)[:CALIBRATION]
    calibration = distorted(digits[chosen], random).numpy()
    evaluation, labels = distorted(held.repeat(VIEWS, 1, 1, 1), random), held_labels.repeat(VIEWS).numpy()

    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.onnx"
    program: Any = torch.onnx.export(
        model, (evaluation[:4],), dynamo=True, input_names=["image"], output_names=["logits"],
        dynamic_shapes=[{0: torch.export.Dim("batch")}], verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=False)
    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"image": evaluation.numpy()})[0]
    with torch.no_grad():
        expected = trained(evaluation).numpy()
    difference = float(np.abs(logits - expected).max())
    if difference > 1e-2:
        raise click.ClickException(f"ONNX Runtime differs from the trained network by {difference:.2e}")
    np.savez_compressed(out / "model_calibration.npz", image=calibration)
    np.savez_compressed(out / "model_evaluation.npz", image=evaluation.numpy())
    np.savez_compressed(out / "model_labels.npz", labels=labels)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB; differs from the trained network by {difference:.1e}")
    click.echo(f"held-out top-1: {top1(logits, labels):.2%} as exported, {top1(expected, labels):.2%} as trained")


if __name__ == "__main__":
    main()
