"""Language models of stated shapes with seeded weights and a cache of keys and values, written tensor by tensor.

    python tools/decoder.py qwen2-0.5b out/model.onnx --style plain
    python tools/decoder.py llama2-7b out/model.onnx --style fused --dtype float16

`plain` is in primitives, as torch and optimum export decoders; `fused` in the runtime's own operators, as
onnxruntime-genai builds them. Both have the same weights and give the same logits. Weights go to `model.onnx.data`;
no more than one of them is in memory. They are random: good for size, memory and speed, and for nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.builders.decoder import Decoder, plain
from models.builders.decoder_fused import fused

__all__ = ["SHAPES", "STYLES", "Decoder", "build", "feeds", "next_feeds", "write"]

Feeds: TypeAlias = dict[str, npt.NDArray[Any]]

SHAPES: dict[str, Decoder] = {
    "tiny": Decoder(2, 64, 4, 2, 160, 512, tied=True, bias=True, positions=256),
    "qwen2-0.5b": Decoder(24, 896, 14, 2, 4864, 151936, tied=True, bias=True, theta=1e6),
    "llama2-7b": Decoder(32, 4096, 32, 32, 11008, 32000, epsilon=1e-5),
}
STYLES = {"plain": plain, "fused": fused}
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def build(shape: Decoder | str, style: str = "plain", dtype: str = "float32", seed: int = 0) -> ir.Model:
    """The decoder with lazy weights, drawn each time they are read."""
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    return STYLES[style](sizes, DTYPES[dtype], seed)


def write(
    path: str | Path, shape: Decoder | str = "tiny", style: str = "plain", dtype: str = "float32", seed: int = 0
) -> Path:
    """Write the decoder to `path`, its weights to `<name>.data` beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(build(shape, style, dtype, seed), path, external_data=f"{path.name}.data", max_workers=1)
    return path


def feeds(
    shape: Decoder | str,
    tokens: npt.NDArray[np.integer] | Sequence[Sequence[int]],
    style: str = "plain",
    past: int = 0,
    dtype: str = "float32",
    seed: int = 0,
) -> Feeds:
    """Feeds for `tokens` [batch, sequence] after `past` positions whose keys and values are random."""
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    ids = np.asarray(tokens, np.int64)
    batch, length = ids.shape
    rng = np.random.default_rng(seed)
    found: Feeds = {"input_ids": ids, "attention_mask": np.ones((batch, past + length), np.int64)}
    if style == "plain":
        found["position_ids"] = np.broadcast_to(np.arange(past, past + length), ids.shape).copy()
    for layer in range(sizes.layers):
        for what in ("key", "value"):
            cache = rng.standard_normal((batch, sizes.kv_heads, past, sizes.head_size), dtype=np.float32)
            # Sessions take float32 for bfloat16.
            found[f"past_key_values.{layer}.{what}"] = cache.astype(np.float32 if dtype == "bfloat16" else dtype)
    return found


def next_feeds(before: Feeds, outputs: Mapping[str, npt.NDArray[Any]], tokens: npt.NDArray[np.integer]) -> Feeds:
    """Feeds of the step after `before`, whose `outputs` by name are at hand: `tokens` [batch, sequence] come next."""
    ids = np.asarray(tokens, np.int64)
    mask = np.concatenate([before["attention_mask"], np.ones_like(ids)], axis=1)
    found: Feeds = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in before:
        found["position_ids"] = before["position_ids"][:, -1:] + 1 + np.arange(ids.shape[1])
    found.update({f"past_key_values.{k.removeprefix('present.')}": v for k, v in outputs.items() if k != "logits"})
    return found


@click.command(help=__doc__.splitlines()[0])
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--style", type=click.Choice(list(STYLES)), default="plain", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(shape: str, output: Path, style: str, dtype: str, seed: int) -> None:
    """Write one decoder."""
    click.echo(f"wrote {write(output, shape, style, dtype, seed)}")


if __name__ == "__main__":
    main()
