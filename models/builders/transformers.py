"""Transformer encoders in the primitives that torch's exporter writes at opset 17: BERT-base and DeiT-small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from models.builders.graph import Dim, FloatArray, GraphWriter
from models.builders.measured import Form, classifier, measured

FLOAT_MIN = -3.4028234663852886e38
OUTLIER_CHANNELS = 6
BERT_OUTLIER = 4.0


@dataclass(frozen=True)
class Encoder:
    """Writes the parts of an encoder of width `hidden`; activations are [batch, sequence, hidden]."""

    g: GraphWriter
    hidden: int
    heads: int
    epsilon: float

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def linear(self, x: ir.Value, sizes: tuple[int, int], scope: str, std: float) -> ir.Value:
        """MatMul and Add(bias, .) over the last axis: sizes = (in, out)."""
        prefix = scope.strip("/").replace("/", ".")
        weight = self.g.weight(f"{prefix}.weight", self.g.normal(f"{prefix}.weight", sizes, std))
        bias = self.g.weight(f"{prefix}.bias", self.g.normal(f"{prefix}.bias", (sizes[1],), 0.03))
        return self.g.op("Add", [bias, self.g.op("MatMul", [x, weight], scope)], scope)

    def norm(self, x: ir.Value, scope: str, gain: float, outlier: float) -> ir.Value:
        """LayerNormalization with gains around `gain` and a few channels `outlier` times as wide.

        Trained encoders keep the same few wide channels through their whole depth; per-tensor activation scales
        suffer from just these, so random weights without them would be too easy.
        """
        g, prefix = self.g, scope.strip("/").replace("/", ".")
        weight = g.normal(f"{prefix}.weight", (self.hidden,), 0.1 * gain, gain)
        bias = g.normal(f"{prefix}.bias", (self.hidden,), 0.05)
        channels = g.generator("outliers").permutation(self.hidden)[:OUTLIER_CHANNELS]
        weight[channels] *= np.float32(outlier)
        bias[channels] += (0.3 * outlier * g.normal(f"{prefix}.outlier", (len(channels),), 1.0)).astype(np.float32)
        inputs = [x, g.weight(f"{prefix}.weight", weight), g.weight(f"{prefix}.bias", bias)]
        return g.op("LayerNormalization", inputs, scope, axis=-1, epsilon=self.epsilon)

    def gelu(self, x: ir.Value, scope: str) -> ir.Value:
        """x * (1 + erf(x / sqrt 2)) / 2 in primitives, as torch writes it below opset 20."""
        g = self.g
        erf = g.op("Erf", [g.op("Div", [x, g.constant(math.sqrt(2.0), scope)], scope)], scope)
        product = g.op("Mul", [x, g.op("Add", [erf, g.constant(1.0, scope)], scope)], scope)
        return g.op("Mul", [product, g.constant(0.5, scope)], scope)

    def reshape(self, x: ir.Value, shape: list[int], scope: str) -> ir.Value:
        """Reshape; 0 keeps a dimension, so that batch and sequence stay dynamic."""
        return self.g.op("Reshape", [x, self.g.constant(shape, scope, dtype=np.int64)], scope)

    def scalar(self, value: int, scope: str) -> ir.Value:
        """An int64 constant of shape []."""
        return self.g.constant(value, scope, dtype=np.int64)

    def vector(self, value: int, scope: str) -> ir.Value:
        """An int64 constant of shape [1]."""
        return self.g.constant([value], scope, dtype=np.int64)

    def mlp(self, x: ir.Value, names: tuple[str, str], std: float) -> ir.Value:
        """The two-layer block of four times the width, with GELU; `names` are the scopes of its two layers."""
        inner, outer = names
        y = self.gelu(self.linear(x, (self.hidden, 4 * self.hidden), inner, std), inner)
        return self.linear(y, (4 * self.hidden, self.hidden), outer, std)


def bert_base(
    *,
    seed: int = 0,
    batch: Dim = "N",
    length: Dim = "S",
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    vocabulary: int = 30522,
) -> ir.Model:
    """BERT-base (Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805), uncased.

    Inputs `input_ids`, `attention_mask` and `token_type_ids` int64 [batch, length]; outputs `last_hidden_state`
    float32 [batch, length, hidden] and `pooler_output` float32 [batch, hidden]. 109 M seeded weights; the mask is
    (1 - attention_mask) * -3.4e38, as exported.
    """
    g = GraphWriter("bert_base", seed=seed)
    e = Encoder(g, hidden, heads, 1e-12)
    ids, mask, types = (
        g.input(name, ir.DataType.INT64, [batch, length]) for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    scope = "/mask"
    kept = g.op("Unsqueeze", [g.op("Unsqueeze", [mask, e.vector(1, scope)], scope), e.vector(2, scope)], scope)
    dropped = g.op("Sub", [g.constant(1.0, scope), g.op("Cast", [kept], scope, to=int(ir.DataType.FLOAT))], scope)
    bias = g.op("Mul", [dropped, g.constant(FLOAT_MIN, scope)], scope)

    x = _bert_embeddings(e, ids, types, vocabulary)
    for index in range(layers):
        scope = f"/encoder/layer.{index}"
        y = _bert_attention(e, x, bias, f"{scope}/attention")
        # The two norms of a layer undo each other's outliers: these would else grow with depth until they are all.
        x = e.norm(g.op("Add", [y, x], f"{scope}/attention"), f"{scope}/attention/norm", 0.9, 1 / BERT_OUTLIER)
        y = e.mlp(x, (f"{scope}/intermediate", f"{scope}/output"), 0.025)
        x = e.norm(g.op("Add", [y, x], f"{scope}/output"), f"{scope}/output/norm", 0.8, BERT_OUTLIER)

    first = g.op("Gather", [x, e.scalar(0, "/pooler")], "/pooler", axis=1)
    weight = g.weight("pooler.weight", g.normal("pooler.weight", (hidden, hidden), 0.03))
    pooler_bias = g.weight("pooler.bias", g.normal("pooler.bias", (hidden,), 0.03))
    pooled = g.op("Tanh", [g.op("Gemm", [first, weight, pooler_bias], "/pooler", transB=1)], "/pooler")
    g.output(x, "last_hidden_state", ir.DataType.FLOAT, [batch, length, hidden])
    g.output(pooled, "pooler_output", ir.DataType.FLOAT, [batch, hidden])
    return g.model()


def _bert_embeddings(e: Encoder, ids: ir.Value, types: ir.Value, vocabulary: int) -> ir.Value:
    g, scope = e.g, "/embeddings"

    def table(name: str, rows: int, std: float) -> ir.Value:
        return g.weight(f"embeddings.{name}.weight", g.normal(f"embeddings.{name}.weight", (rows, e.hidden), std))

    positions = g.weight("embeddings.position_ids", np.arange(512, dtype=np.int64)[None, :])
    length = g.op("Gather", [g.op("Shape", [ids], scope), e.scalar(1, scope)], scope, axis=0)
    end = g.op("Unsqueeze", [length, e.vector(0, scope)], scope)
    used = g.op("Slice", [positions, e.vector(0, scope), end, e.vector(1, scope), e.vector(1, scope)], scope)
    words = g.op("Gather", [table("word", vocabulary, 0.04), ids], f"{scope}/word")
    segments = g.op("Gather", [table("token_type", 2, 0.01), types], f"{scope}/token_type")
    places = g.op("Gather", [table("position", 512, 0.015), used], f"{scope}/position")
    total = g.op("Add", [g.op("Add", [words, segments], scope), places], scope)
    return e.norm(total, f"{scope}/norm", 0.85, BERT_OUTLIER)


def _bert_attention(e: Encoder, x: ir.Value, bias: ir.Value, scope: str) -> ir.Value:
    g, square = e.g, (e.hidden, e.hidden)

    def heads(name: str, std: float, perm: list[int]) -> ir.Value:
        part = f"{scope}/self/{name}"
        y = e.reshape(e.linear(x, square, part, std), [0, 0, e.heads, e.head_size], part)
        return g.op("Transpose", [y], part, perm=perm)

    inner = f"{scope}/self"
    # Wide query and key weights with narrow value ones keep tokens apart: random attention averages, and twelve layers
    # of averages make all tokens one.
    query, key = heads("query", 0.055, [0, 2, 1, 3]), heads("key", 0.055, [0, 2, 3, 1])
    value = heads("value", 0.024, [0, 2, 1, 3])
    root = g.constant(math.sqrt(e.head_size), inner)
    scores = g.op("Div", [g.op("MatMul", [query, key], inner), root], inner)
    weights = g.op("Softmax", [g.op("Add", [scores, bias], inner)], inner, axis=-1)
    context = g.op("Transpose", [g.op("MatMul", [weights, value], inner)], inner, perm=[0, 2, 1, 3])
    return e.linear(e.reshape(context, [0, 0, e.hidden], inner), square, f"{scope}/output", 0.02)


def deit_small(
    *,
    seed: int = 0,
    batch: Dim = "N",
    image_size: int = 224,
    layers: int = 12,
    hidden: int = 384,
    heads: int = 6,
    classes: int = 1000,
) -> ir.Model:
    """DeiT-small, patches of 16, no distillation token (Touvron et al., "Training data-efficient image transformers",
    arXiv:2012.12877).

    Input `image` float32 [batch, 3, image_size, image_size]; output `logits` float32 [batch, classes]. 22 M seeded
    weights; query, key and value come from one MatMul and are split by Gather.
    """
    write = partial(_deit, seed=seed, image_size=image_size, layers=layers, hidden=hidden, heads=heads, classes=classes)
    return measured(write, image_size, seed=seed, batch=batch)


def _deit(form: Form, *, seed: int, image_size: int, layers: int, hidden: int, heads: int, classes: int) -> ir.Model:
    g = GraphWriter("deit_small", seed=seed)
    e = Encoder(g, hidden, heads, 1e-6)
    image = g.input("image", ir.DataType.FLOAT, [form.batch, 3, image_size, image_size])
    x = _deit_patches(e, image, (image_size // 16) ** 2)
    for index in range(layers):
        scope = f"/blocks.{index}"
        y = _deit_attention(e, e.norm(x, f"{scope}/norm1", 0.9, 3.0), f"{scope}/attn")
        x = g.op("Add", [x, y], f"{scope}/attn")
        y = e.mlp(e.norm(x, f"{scope}/norm2", 0.9, 3.0), (f"{scope}/mlp/fc1", f"{scope}/mlp/fc2"), 0.04)
        x = g.op("Add", [x, y], f"{scope}/mlp")
    x = e.norm(x, "/norm", 1.0, 1.0)
    token = g.op("Gather", [x, e.scalar(0, "/head")], "/head", axis=1)
    classifier(g, token, (hidden, classes), form)
    return g.model()


def _deit_patches(e: Encoder, image: ir.Value, patches: int) -> ir.Value:
    g, scope = e.g, "/patch_embed"
    kernel = g.weight("patch_embed.weight", g.normal("patch_embed.weight", (e.hidden, 3, 16, 16), 0.02))
    bias = g.weight("patch_embed.bias", g.normal("patch_embed.bias", (e.hidden,), 0.03))
    x = g.op("Conv", [image, kernel, bias], scope, kernel_shape=[16, 16], strides=[16, 16], pads=[0, 0, 0, 0])
    x = g.op("Transpose", [e.reshape(x, [0, e.hidden, patches], scope)], scope, perm=[0, 2, 1])
    count = g.op("Gather", [g.op("Shape", [x], scope), e.vector(0, scope)], scope, axis=0)
    shape = g.op("Concat", [count, e.vector(1, scope), e.vector(e.hidden, scope)], scope, axis=0)
    token = g.op("Expand", [g.weight("cls_token", g.normal("cls_token", (1, 1, e.hidden), 0.5)), shape], scope)
    places: FloatArray = g.normal("pos_embed", (1, patches + 1, e.hidden), 0.2)
    joined = g.op("Concat", [token, x], scope, axis=1)
    return g.op("Add", [joined, g.weight("pos_embed", places)], scope)


def _deit_attention(e: Encoder, x: ir.Value, scope: str) -> ir.Value:
    g = e.g
    packed = e.linear(x, (e.hidden, 3 * e.hidden), f"{scope}/qkv", 0.05)
    packed = e.reshape(packed, [0, 0, 3, e.heads, e.head_size], scope)
    packed = g.op("Transpose", [packed], scope, perm=[2, 0, 3, 1, 4])
    query, key, value = (g.op("Gather", [packed, e.scalar(index, scope)], scope, axis=0) for index in range(3))
    query = g.op("Mul", [query, g.constant(e.head_size**-0.5, scope)], scope)
    scores = g.op("MatMul", [query, g.op("Transpose", [key], scope, perm=[0, 1, 3, 2])], scope)
    context = g.op("MatMul", [g.op("Softmax", [scores], scope, axis=-1), value], scope)
    merged = e.reshape(g.op("Transpose", [context], scope, perm=[0, 2, 1, 3]), [0, 0, e.hidden], scope)
    return e.linear(merged, (e.hidden, e.hidden), f"{scope}/proj", 0.05)
