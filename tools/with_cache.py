"""A trained language model of train_language_model.py -> a decoder with a cache of keys and values, same weights.

    python tools/with_cache.py OUT/plain/model.onnx OUT/plain/decoder.onnx
    python tools/with_cache.py OUT/plain/model.onnx OUT/plain/fused.onnx --style fused

The graph is one of `tools/decoder.py`: in primitives as optimum exports decoders (`input_ids`, `attention_mask`,
`position_ids`, `past_key_values.N.key`/`value` in; `logits`, `present.N.key`/`value` out), or in the runtime's own
operators. It is written only if its logits, on the evaluation data beside the model, are those of the model: a prompt
at once, and the same tokens one by one through the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoder import STYLES, Decoder, build

from qgraph import graph
from qgraph.decoding import Decoder as Inputs
from qgraph.feeds import inputs_of
from qgraph.session import Session

__all__ = ["SIZES", "converted", "difference"]

Floats = npt.NDArray[np.float32]

# What train_language_model.py trains; it needs torch, which this does not. Its head is a product of its own.
SIZES = Decoder(layers=4, width=256, heads=8, kv_heads=8, hidden=688, vocabulary=256, epsilon=1e-5, positions=256)
_PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_TOLERANCE = 2e-3
_CHECKED = 4


def converted(model: ir.Model, style: str = "plain", sizes: Decoder = SIZES) -> ir.Model:
    """The decoder with a cache that has the weights of `model`.

    Args:
        model: as train_language_model.py writes it: its products stand in the order in which a layer has them.
        style: "plain" or "fused".
        sizes: what was trained.

    Raises:
        ClickException: its weights are not those of such a model.
    """
    names = [f"model.layers.{i}.{name}.weight" for i in range(sizes.layers) for name in _PRODUCTS] + ["lm_head.weight"]
    products = [
        node.inputs[1] for node in model.graph if node.op_type == "MatMul" and graph.has_constant(node.inputs[1])
    ]
    if len(products) != len(names):
        raise click.ClickException(f"The model has {len(products)} products with weights, and {len(names)} are known.")
    found = dict(zip(names, products, strict=True))
    initializers = model.graph.initializers
    wanted = {"embedding.weight": "model.embed_tokens.weight", "norm.gain": "model.norm.weight"}
    for i in range(sizes.layers):
        wanted[f"layers.{i}.attention_norm.gain"] = f"model.layers.{i}.input_layernorm.weight"
        wanted[f"layers.{i}.hidden_norm.gain"] = f"model.layers.{i}.post_attention_layernorm.weight"
    if missing := wanted.keys() - initializers.keys():
        raise click.ClickException(f"The model has no weights {', '.join(sorted(missing))}.")
    found.update({new: initializers[old] for old, new in wanted.items()})
    made = build(sizes, style)
    for name, value in found.items():
        array, place = graph.constant(value), made.graph.initializers[name]
        if array is None or place.shape is None or tuple(place.shape.numpy()) != array.shape:
            raise click.ClickException(f"The weight of {name} has another shape than {place.shape}.")
        place.const_value = ir.Tensor(np.array(array, np.float32), name=name)
    return made


def difference(model: Path, decoder: Path, tokens: npt.NDArray[np.int64]) -> float:
    """Largest difference of the logits of `tokens` [sequences, length] by a model and by its decoder with a cache."""
    worst = 0.0
    inputs = Inputs.of(inputs_of(ir.load(decoder)))
    assert inputs is not None
    with Session(model) as session:
        expected = [session.run({"input_ids": row[None]})["logits"][0] for row in tokens]
    with Session(decoder) as session:
        for row, wanted in zip(tokens, expected, strict=True):
            whole = session.run(inputs.complete({"input_ids": row[None]}))["logits"][0]
            # Half of it as a prompt, then token by token.
            start = len(row) // 2
            outputs = session.run(inputs.complete({"input_ids": row[None, :start]}))
            steps: list[Floats] = [outputs["logits"][0]]
            for token in row[start:]:
                cache = {
                    f"past_key_values.{k.removeprefix('present.')}": v for k, v in outputs.items() if k != "logits"
                }
                outputs = session.run(inputs.complete({"input_ids": np.array([[token]]), **cache}))
                steps.append(outputs["logits"][0])
            worst = max(worst, *(float(np.abs(one - wanted).max()) for one in (whole, np.concatenate(steps))))
    return worst


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--style", type=click.Choice(list(STYLES)), default="plain", show_default=True)
def main(model: Path, output: Path, style: str) -> None:
    """Write the decoder, once it has been compared."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}")
    ir.save(converted(ir.load(model), style), staged)
    with np.load(model.with_name("model_evaluation.npz")) as stored:
        tokens = stored["input_ids"][:_CHECKED]
    try:
        found = difference(model, staged, tokens)
        if not found < _TOLERANCE:
            raise click.ClickException(f"Its logits differ by {found:.2e}: it is not the same model.")
        staged.replace(output)
    finally:
        staged.unlink(missing_ok=True)
    click.echo(f"{output}: logits differ by {found:.1e} from {model}, through the cache, too")


if __name__ == "__main__":
    main()
