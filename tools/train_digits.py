"""Train the digit classifier of `models/` and export it: needs torch and scikit-learn, which qgraph itself does not.

    python tools/train_digits.py            # a few minutes on two cores

The network is a small stand-in for MobileNetV3 (arXiv:1905.02244) and ResNet (arXiv:1512.03385): depthwise and
pointwise convolutions, HardSwish and ReLU, residual sums and batch normalization, wide enough that int8 pays. It is
exported node by node, because torch's exporter folds BatchNormalization, which a quantizer must be able to meet.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.builders.graph import FloatArray, GraphWriter
from models.shapes import save

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
EVALUATION, CALIBRATION = 360, 128
EPOCHS, BATCH, PEAK_RATE = 20, 64, 4e-3
SIDE = 8
EPSILON = 1e-5


@dataclass(frozen=True)
class Unit:
    """Conv + BatchNormalization + activation; [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    activation: Literal["Relu", "HardSwish", ""] = "Relu"


@dataclass(frozen=True)
class Block:
    """Units in a row; with `activation` set, the block's input is added to their result, and that is activated."""

    units: tuple[Unit, ...]
    activation: Literal["Relu", "HardSwish", ""] = ""


ARCHITECTURE = (
    Block((Unit("stem", 1, 32, 3, activation="HardSwish"),)),
    Block((Unit("depthwise1", 32, 32, 3, groups=32), Unit("pointwise1", 32, 64, 1))),
    Block((Unit("residual1a", 64, 64, 3), Unit("residual1b", 64, 64, 3, activation="")), "Relu"),
    Block((Unit("depthwise2", 64, 64, 3, stride=2, groups=64), Unit("pointwise2", 64, 96, 1, activation="HardSwish"))),
    Block((Unit("residual2a", 96, 96, 3), Unit("residual2b", 96, 96, 1, activation="")), "HardSwish"),
)
UNITS = tuple(unit for block in ARCHITECTURE for unit in block.units)
FEATURES, CLASSES = 96, 10
ACTIVATIONS: dict[str, type[nn.Module]] = {"Relu": nn.ReLU, "HardSwish": nn.Hardswish, "": nn.Identity}


class DigitNet(nn.Module):
    """`ARCHITECTURE` in torch: images [N, 1, 8, 8] in 0..1, enlarged to 16x16, to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {
                u.name: nn.Conv2d(
                    u.inputs, u.outputs, u.kernel, u.stride, padding=u.kernel // 2, groups=u.groups, bias=False
                )
                for u in UNITS
            }
        )
        self.norms = nn.ModuleDict({u.name: nn.BatchNorm2d(u.outputs, eps=EPSILON) for u in UNITS})
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = nn.functional.interpolate(image, scale_factor=2.0, mode="bilinear", align_corners=False)
        for block in ARCHITECTURE:
            y = x
            for unit in block.units:
                y = ACTIVATIONS[unit.activation]()(self.norms[unit.name](self.convs[unit.name](y)))
            x = ACTIVATIONS[block.activation]()(x + y) if block.activation else y
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """The data, split: images float32 [N, 1, 8, 8] in 0..1 and labels int64 [N]."""

    train: FloatArray
    train_labels: npt.NDArray[np.int64]
    evaluation: FloatArray
    evaluation_labels: npt.NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        """scikit-learn's 1797 digits, with 360 held out in equal shares of each class."""
        bunch: Any = load_digits()
        images = (bunch.images[:, None] / 16.0).astype(np.float32)
        labels = bunch.target.astype(np.int64)
        every = np.arange(len(labels))
        parts: Any = train_test_split(every, test_size=EVALUATION, random_state=SEED, stratify=labels)
        train, held = parts
        return cls(images[train], labels[train], images[held], labels[held])

    def calibration(self) -> FloatArray:
        """Images of the training part only, as every calibration should use."""
        chosen = np.random.default_rng(SEED).permutation(len(self.train))[:CALIBRATION]
        sample: FloatArray = self.train[chosen]
        return sample


def train(digits: Digits) -> DigitNet:
    """Train on every image of the training part, each shifted by at most one pixel, with a one-cycle rate."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = DigitNet()
    images, labels = torch.from_numpy(digits.train), torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_RATE, total_steps=steps)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            loss = loss_function(model(shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 5 == 4:
            click.echo(f"epoch {epoch + 1:2d}: loss {total / len(images):.4f}")
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """Each image [N, 1, 8, 8] moved by -1, 0 or 1 pixels in both directions, zeros moving in."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    rows = torch.arange(SIDE) + torch.randint(0, 3, (len(images), 1))
    columns = torch.arange(SIDE) + torch.randint(0, 3, (len(images), 1))
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def export(model: DigitNet) -> ir.Model:
    """The network as ONNX, opset 17: input `image` [N, 1, 8, 8], output `logits` [N, 10], normalization unfused."""
    g = GraphWriter("digits")
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def unit(x: ir.Value, u: Unit) -> ir.Value:
        geometry = {
            "kernel_shape": [u.kernel] * 2,
            "strides": [u.stride] * 2,
            "pads": [u.kernel // 2] * 4,
            "dilations": [1, 1],
        }
        kernel = g.weight(f"{u.name}.conv.weight", weights[f"convs.{u.name}.weight"])
        x = g.op("Conv", [x, kernel], f"/{u.name}", group=u.groups, **geometry)
        norm = [
            g.weight(f"{u.name}.bn.{part}", weights[f"norms.{u.name}.{part}"])
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        x = g.op("BatchNormalization", [x, *norm], f"/{u.name}", epsilon=EPSILON)
        return g.op(u.activation, [x], f"/{u.name}") if u.activation else x

    image = g.input("image", ir.DataType.FLOAT, ["N", 1, SIDE, SIDE])
    scales = g.weight("scales", np.array([1, 1, 2, 2], np.float32))
    x = g.op("Resize", [image, None, scales], "/upsample", mode="linear", coordinate_transformation_mode="half_pixel")
    for index, block in enumerate(ARCHITECTURE):
        y = x
        for u in block.units:
            y = unit(y, u)
        x = g.op(block.activation, [g.op("Add", [x, y], f"/block{index}")], f"/block{index}") if block.activation else y
    x = g.op("Flatten", [g.op("GlobalAveragePool", [x], "/pool")], "/pool", axis=1)
    head = [g.weight("head.weight", weights["head.weight"]), g.weight("head.bias", weights["head.bias"])]
    g.output(g.op("Gemm", [x, *head], "/head", transB=1), "logits", ir.DataType.FLOAT, ["N", CLASSES])
    return g.model()


def accuracy(session: Any, images: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """Share of `images` that the ONNX model classifies as `labels` say."""
    logits: FloatArray = session.run(None, {"image": images})[0]
    return float((logits.argmax(axis=1) == labels).mean())


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "models", help="Target folder.")
def main(out: Path) -> None:
    """Train, export, compare torch with ONNX Runtime, and write the model with its data to the folder OUT."""
    digits = Digits.load()
    model = train(digits)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "digits.onnx"
    save(export(model), path)
    onnx.checker.check_model(str(path), full_check=True)

    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected: FloatArray = model(torch.from_numpy(digits.evaluation)).numpy()
    difference = float(np.abs(session.run(None, {"image": digits.evaluation})[0] - expected).max())
    if difference > 1e-3:
        raise click.ClickException(f"ONNX Runtime differs from torch by {difference:.2e}: the export is wrong")

    np.savez_compressed(out / "digits_calibration.npz", image=digits.calibration())
    np.savez_compressed(out / "digits_evaluation.npz", image=digits.evaluation)
    np.savez_compressed(out / "digits_labels.npz", labels=digits.evaluation_labels)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    top1 = accuracy(session, digits.evaluation, digits.evaluation_labels)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {parameters} parameters")
    click.echo(f"ONNX Runtime against torch: {difference:.1e}; held-out top-1: {100 * top1:.2f} %")


if __name__ == "__main__":
    main()
