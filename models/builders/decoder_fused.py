"""The decoders of `decoder.py` in the runtime's own operators, as onnxruntime-genai builds them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from models.builders.decoder import Decoder, DecoderWriter

__all__ = ["fused"]

_CONTRIB = "com.microsoft"


def fused(shape: Decoder, dtype: ir.DataType = ir.DataType.FLOAT, seed: int = 0) -> ir.Model:
    """A decoder of GroupQueryAttention, which rotates, and SkipSimplifiedLayerNormalization.

    Inputs `input_ids`, `attention_mask` (int64) and `past_key_values.N.key`/`value`; outputs `logits` and
    `present.N.key`/`value`. The same seed gives the same weights as `plain`. A tied head is a copy.
    """
    g = DecoderWriter(shape, dtype, seed)
    ids = g.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    pasts = [g.past(layer) for layer in range(shape.layers)]
    angles = np.outer(np.arange(shape.positions), shape.frequencies.astype(np.float64))
    kind = dtype.numpy()
    tables = [g.weight("cos_cache", np.cos(angles).astype(kind)), g.weight("sin_cache", np.sin(angles).astype(kind))]
    lengths = [*_lengths(g, mask), *tables]
    x = g.op("Gather", [g.embedding(), ids], "/model/embed_tokens")
    y = g.op(
        "SimplifiedLayerNormalization",
        [x, g.gain("/model/layers.0/input_layernorm")],
        "/model/layers.0/input_layernorm",
        axis=-1,
        epsilon=shape.epsilon,
    )
    for layer, past in enumerate(pasts):
        scope = f"/model/layers.{layer}"
        added = _attention(g, y, past, lengths, layer)
        y, x = _skip(g, x, added, f"{scope}/post_attention_layernorm")
        gate = g.product(y, shape.hidden, shape.width, f"{scope}/mlp/gate_proj")
        up = g.product(y, shape.hidden, shape.width, f"{scope}/mlp/up_proj")
        gate = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{scope}/mlp/act_fn")], f"{scope}/mlp/act_fn")
        added = g.product(g.op("Mul", [gate, up], f"{scope}/mlp"), shape.width, shape.hidden, f"{scope}/mlp/down_proj")
        last = layer + 1 == shape.layers
        y, x = _skip(g, x, added, "/model/norm" if last else f"/model/layers.{layer + 1}/input_layernorm")
    return g.finished(g.head(y, "copy"))


def _lengths(g: DecoderWriter, mask: ir.Value) -> list[ir.Value]:
    """Positions of each sequence less one, [batch], and of the longest, []; int32."""
    s = "/model/attn_mask_reformat"
    count = g.op("ReduceSum", [mask, g.constant([1], s, dtype=np.int64)], s, keepdims=0)
    count = g.op("Sub", [count, g.constant(1, s, dtype=np.int64)], s)
    total = g.op("Gather", [g.op("Shape", [mask], s), g.constant(1, s, dtype=np.int64)], s, axis=0)
    return [g.op("Cast", [value], s, to=int(ir.DataType.INT32)) for value in (count, total)]


def _skip(g: DecoderWriter, x: ir.Value, added: ir.Value, scope: str) -> tuple[ir.Value, ir.Value]:
    """(normalized sum, sum)."""
    found = g.many(
        "SkipSimplifiedLayerNormalization", [x, added, g.gain(scope)], 4, scope, _CONTRIB, epsilon=g.shape.epsilon
    )
    # The mean and deviation are not computed.
    found[1].name = found[2].name = ""
    return found[0], found[3]


def _attention(g: DecoderWriter, x: ir.Value, past: list[ir.Value], lengths: list[ir.Value], layer: int) -> ir.Value:
    shape, scope = g.shape, f"/model/layers.{layer}/self_attn"
    parts = [
        g.product(x, count * shape.head_size, shape.width, f"{scope}/{what}_proj", shape.bias)
        for what, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    ]
    mixed, key, value = g.many(
        "GroupQueryAttention",
        [*parts, *past, *lengths],
        3,
        scope,
        _CONTRIB,
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
    )
    g.present(layer, [key, value])
    return g.product(mixed, shape.width, shape.heads * shape.head_size, f"{scope}/o_proj")
