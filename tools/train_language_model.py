"""Train a small byte-level language model on Python's own sources and export it, plain and with outlier channels.

    pip install torch onnxscript && python tools/train_language_model.py OUT      # about 0.4 s a step on two cores
    python tools/train_language_model.py OUT --steps 6000 --batch 32 --device cuda # a better one, minutes on a GPU
    python tools/with_cache.py OUT/plain/model.onnx OUT/plain/decoder.onnx          # with a cache, to generate with

Writes OUT/plain/ and OUT/outlier/, each with model.onnx (input `input_ids` int64 [batch, 256], output `logits`
[batch, 256, 256]), model_calibration.npz (32 sequences of the training files) and model_evaluation.npz (64 sequences
of files that training does not see). `tools/accuracy.py bits` measures bits per byte.

The network is Llama in small (H. Touvron et al., LLaMA, 2023, arXiv:2302.13971, section 2.2): RMSNorm before each
part, rotary embeddings, SwiGLU. The outlier variant is the same function with another scaling inside: a few channels
of each norm's gain and of each up-projection are 20 to 60 times larger, their readers' weights as much smaller. So its
activations have the few huge channels of large language models (G. Xiao et al., SmoothQuant, 2023, arXiv:2211.10438,
section 3), which a small model trained for minutes does not grow by itself.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from corpus import source_files
from metrics import bits_per_byte

SEED = 0
LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY, SEQUENCE = 4, 256, 8, 688, 256, 256
STEPS, BATCH, PEAK_RATE, WARM_UP = 500, 8, 2e-3, 60
CALIBRATION, EVALUATION = 32, 64
EVALUATION_SHARE = 10
NORM_OUTLIERS, HIDDEN_OUTLIERS, OUTLIER_RANGE = 4, 6, (20.0, 60.0)
Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) * gain over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain


class Layer(nn.Module):
    """Causal self-attention with rotary embeddings, then SwiGLU, each added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.hidden_norm = RMSNorm(), RMSNorm()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[batch, sequence, width] to the same."""
        y = self.attention_norm(x)

        def heads(z: Tensor) -> Tensor:
            return z.view(z.shape[0], SEQUENCE, HEADS, WIDTH // HEADS).transpose(1, 2)

        def rotated(z: Tensor) -> Tensor:
            first, second = z.chunk(2, dim=-1)
            return z * cosine + torch.cat((-second, first), dim=-1) * sine

        query, key, value = rotated(heads(self.query(y))), rotated(heads(self.key(y))), heads(self.value(y))
        z = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(z.transpose(1, 2).reshape(z.shape[0], SEQUENCE, WIDTH))
        y = self.hidden_norm(x)
        added: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return added


class LanguageModel(nn.Module):
    """Bytes [batch, 256] to the logits of each next byte [batch, 256, 256]."""

    cosine: Tensor
    sine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        size = WIDTH // HEADS
        angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of a batch of sequences."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        logits: Tensor = self.head(self.norm(x))
        return logits


def texts() -> tuple[Bytes, Bytes]:
    """Bytes of the training files and of the evaluation files (a tenth), each joined by a zero byte."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(source_files()):
        parts[number % EVALUATION_SHARE == 0].append(path.read_bytes())
    joined = [np.frombuffer(b"\0".join(part), np.uint8) for part in parts]
    return joined[0], joined[1]


def sequences(text: Bytes, count: int) -> Tokens:
    """Sequences [count, 256] from evenly spaced places of a text, so of as many files as can be."""
    starts = np.linspace(0, len(text) - SEQUENCE, count).astype(int)
    return np.stack([text[start : start + SEQUENCE] for start in starts]).astype(np.int64)


def train(text: Bytes, steps: int, batch: int = BATCH, device: str = "cpu") -> LanguageModel:
    """Train on random places of `text` with a warmed-up cosine rate; the result is on the CPU."""
    torch.manual_seed(SEED)
    model = LanguageModel().to(device)
    data = torch.from_numpy(text.copy())
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        places = torch.randint(0, len(data) - SEQUENCE, (batch, 1)) + torch.arange(SEQUENCE)
        tokens = data[places].long().to(device)
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            bits = loss.item() / math.log(2)
            click.echo(f"step {step}: {bits:.3f} bits per byte, {time.perf_counter() - start:.0f} s")
    return model.cpu().eval()


def with_outliers(model: LanguageModel) -> LanguageModel:
    """The same function, with a few channels of norms and of gated products many times larger."""
    model = copy.deepcopy(model)
    random = torch.Generator().manual_seed(SEED)

    def enlarge(producer: Tensor, readers: list[nn.Linear], count: int) -> None:
        """Scale rows of `producer` up and the columns of its readers down."""
        chosen = torch.randperm(producer.shape[0], generator=random)[:count]
        low, high = map(math.log, OUTLIER_RANGE)
        factors = torch.exp(low + (high - low) * torch.rand(count, generator=random))
        producer[chosen] *= factors.view(-1, *[1] * (producer.ndim - 1))
        for reader in readers:
            reader.weight[:, chosen] /= factors

    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, Layer)
            enlarge(layer.attention_norm.gain, [layer.query, layer.key, layer.value], NORM_OUTLIERS)
            enlarge(layer.hidden_norm.gain, [layer.gate, layer.up], NORM_OUTLIERS)
            enlarge(layer.up.weight, [layer.down], HIDDEN_OUTLIERS)
        enlarge(model.norm.gain, [model.head], NORM_OUTLIERS)
    return model


def ranges(model: LanguageModel, tokens: Tokens) -> dict[str, float]:
    """Largest and median over the channels of the greatest magnitude that enters the last layer's projections."""
    layer: Any = model.layers[-1]
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            peaks = arguments[0].abs().amax(dim=(0, 1))
            found[f"{name} largest"], found[f"{name} median"] = float(peaks.max()), float(peaks.median())

        return hook

    hooks = [getattr(layer, name).register_forward_pre_hook(watch(name)) for name in ("query", "gate", "down")]
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    return found


def export(model: LanguageModel, folder: Path, calibration: Tokens, evaluation: Tokens) -> None:
    """Write a model and its data, and say what it is worth."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    program: Any = torch.onnx.export(
        model, (torch.from_numpy(evaluation[:4]),), dynamo=True, input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=[{0: torch.export.Dim("batch")}], verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=False)
    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"input_ids": row[None]})[0] for row in evaluation])
    with torch.no_grad():
        difference = float(np.abs(model(torch.from_numpy(evaluation)).numpy() - logits).max())
    if difference > 1e-2:
        raise click.ClickException(f"ONNX Runtime differs from torch by {difference:.2e}: the export is wrong")
    np.savez_compressed(folder / "model_calibration.npz", input_ids=calibration)
    np.savez_compressed(folder / "model_evaluation.npz", input_ids=evaluation)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {bits_per_byte(logits, evaluation):.4f} bits per byte")
    click.echo(f"  differs from torch by {difference:.1e}; magnitudes of channels in the last layer:")
    click.echo("  " + ", ".join(f"{name} {value:.3g}" for name, value in ranges(model, calibration).items()))


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=STEPS, show_default=True, help="Steps of training.")
@click.option("--batch", default=BATCH, show_default=True, help="Sequences in a step.")
@click.option("--device", default="cpu", show_default=True, help="Where torch trains, as cuda.")
def main(out: Path, steps: int, batch: int, device: str) -> None:
    """Train, and export both variants to the folder OUT."""
    training, held = texts()
    model = train(training, steps, batch, device)
    calibration, evaluation = sequences(training, CALIBRATION), sequences(held, EVALUATION)
    export(model, out / "plain", calibration, evaluation)
    export(with_outliers(model), out / "outlier", calibration, evaluation)


if __name__ == "__main__":
    main()
