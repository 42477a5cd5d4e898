"""Decoders of language models with a cache of keys and values, in primitives and in the runtime's own operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from models.builders.graph import Attribute, GraphWriter, generator

__all__ = ["Decoder", "DecoderWriter", "plain"]

FLOAT_MIN = {
    ir.DataType.FLOAT: -3.4028234663852886e38,
    ir.DataType.FLOAT16: -65504.0,
    ir.DataType.BFLOAT16: -3.3895313892515355e38,
}


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama-like decoder.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        heads: query heads, each of `width / heads` numbers.
        kv_heads: key and value heads; each serves `heads / kv_heads` query heads.
        hidden: of the gated feed-forward part.
        vocabulary: rows of the embedding.
        tied: whether the embedding is the output head, too.
        bias: whether the query, key and value products have biases.
        theta: base of the rotation's wavelengths.
        epsilon: of the normalizations.
        positions: longest sequence that the fused style's tables of cosines hold.
        head: how the plain style writes a tied head: "transpose" (Transpose node and MatMul), "gemm" (transB), or
            "copy" (MatMul on a transposed copy of its own, as the fused style always does).
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tied: bool = False
    bias: bool = False
    theta: float = 10000.0
    epsilon: float = 1e-6
    positions: int = 4096
    head: str = "transpose"

    @property
    def head_size(self) -> int:
        """Numbers in a head."""
        return self.width // self.heads

    @property
    def frequencies(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Radians per position of each pair of numbers in a head."""
        steps = np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size
        return (self.theta**-steps).astype(np.float32)


class DecoderWriter(GraphWriter):
    """A graph writer of one decoder, whose weights are drawn as they are written."""

    def __init__(self, shape: Decoder, dtype: ir.DataType, seed: int):
        super().__init__("decoder", seed=seed)
        self.shape, self.dtype = shape, dtype

    def draw(self, name: str, size: tuple[int, ...], std: float, mean: float = 0.0, source: str = "") -> ir.Value:
        """The weight `name`, drawn from N(mean, std); with a `source`, that weight transposed."""

        def evaluate() -> ir.TensorProtocol:
            rng = generator(self.seed, source or name)
            sample = rng.standard_normal(size[::-1] if source else size, dtype=np.float32)
            sample *= np.float32(std)
            sample += np.float32(mean)
            kind = self.dtype.numpy()
            return ir.Tensor(np.ascontiguousarray((sample.T if source else sample).astype(kind, copy=False)), name=name)

        return self.weight(name, ir.LazyTensor(evaluate, self.dtype, ir.Shape(size), name=name))

    def product(self, x: ir.Value, columns: int, inner: int, scope: str, bias: bool = False) -> ir.Value:
        """MatMul with a weight [inner, columns], and Add where there is a bias."""
        prefix = scope.strip("/").replace("/", ".")
        y = self.op("MatMul", [x, self.draw(f"{prefix}.weight", (inner, columns), inner**-0.5)], scope)
        return self.op("Add", [y, self.draw(f"{prefix}.bias", (columns,), 0.1)], scope) if bias else y

    def gain(self, scope: str) -> ir.Value:
        """Gains of a normalization over the width."""
        return self.draw(f"{scope.strip('/').replace('/', '.')}.weight", (self.shape.width,), 0.1, 1.0)

    def embedding(self) -> ir.Value:
        """The table [vocabulary, width]."""
        return self.draw("model.embed_tokens.weight", (self.shape.vocabulary, self.shape.width), 0.02)

    def head(self, x: ir.Value, how: str) -> ir.Value:
        """Logits [batch, sequence, vocabulary] of the last normalization."""
        shape, scope = self.shape, "/lm_head"
        if not shape.tied:
            return self.product(x, shape.vocabulary, shape.width, scope)
        if how == "copy":
            size = (shape.width, shape.vocabulary)
            return self.op(
                "MatMul", [x, self.draw("lm_head.weight", size, 0.02, 0.0, "model.embed_tokens.weight")], scope
            )
        if how == "transpose":
            return self.op("MatMul", [x, self.op("Transpose", [self.embedding()], scope, perm=[1, 0])], scope)
        if how != "gemm":
            raise ValueError(f"There is no head {how!r}: transpose, gemm and copy are.")
        flat = self.op("Reshape", [x, self.constant([-1, shape.width], scope, dtype=np.int64)], scope)
        made = self.op("Gemm", [flat, self.embedding()], scope, transB=1)
        lead = self.op("Shape", [x], scope, start=0, end=2)
        size = self.op("Concat", [lead, self.constant([shape.vocabulary], scope, dtype=np.int64)], scope, axis=0)
        return self.op("Reshape", [made, size], scope)

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        scope: str,
        domain: str = "",
        **kw: Attribute,
    ) -> Sequence[ir.Value]:
        """Append a node of any domain with several outputs."""
        attributes = ir.convenience.convert_attributes(kw)
        node = ir.Node(
            domain, op_type, inputs, attributes, num_outputs=outputs, name=self._unique(f"{scope}/{op_type}")
        )
        self._append(node)
        for number, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{number}"
        return node.outputs

    def past(self, layer: int) -> list[ir.Value]:
        """Cached keys and values of a layer, [batch, kv heads, past, head size]."""
        size = ["batch_size", self.shape.kv_heads, "past_sequence_length", self.shape.head_size]
        return [self.input(f"past_key_values.{layer}.{what}", self.dtype, size) for what in ("key", "value")]

    def present(self, layer: int, values: Sequence[ir.Value]) -> None:
        """The cache with the new positions."""
        size = ["batch_size", self.shape.kv_heads, "total_sequence_length", self.shape.head_size]
        for what, value in zip(("key", "value"), values, strict=True):
            self.output(value, f"present.{layer}.{what}", self.dtype, size)

    def finished(self, logits: ir.Value) -> ir.Model:
        """The model, its logits the first output."""
        self.output(logits, "logits", self.dtype, ["batch_size", "sequence_length", self.shape.vocabulary])
        self._outputs.insert(0, self._outputs.pop())
        model = self.model()
        model.graph.opset_imports["com.microsoft"] = 1
        return model


def plain(shape: Decoder, dtype: ir.DataType = ir.DataType.FLOAT, seed: int = 0) -> ir.Model:
    """A decoder in primitives, as torch and optimum export it.

    Inputs `input_ids`, `attention_mask`, `position_ids` (int64) and `past_key_values.N.key`/`value`; outputs `logits`
    and `present.N.key`/`value`. Normalization, rotation, causal mask and repeated heads are spelled out.
    """
    g = DecoderWriter(shape, dtype, seed)
    ids = g.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    places = g.input("position_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    pasts = [g.past(layer) for layer in range(shape.layers)]
    x = g.op("Gather", [g.embedding(), ids], "/model/embed_tokens")
    seen = _seen(g, ids, mask, pasts[0][0])
    rotation = _rotation(g, places)
    for layer, past in enumerate(pasts):
        scope = f"/model/layers.{layer}"
        y = _norm(g, x, f"{scope}/input_layernorm")
        x = g.op("Add", [x, _attention(g, y, past, seen, rotation, layer)], scope)
        y = _norm(g, x, f"{scope}/post_attention_layernorm")
        x = g.op("Add", [x, _gated(g, y, f"{scope}/mlp")], scope)
    return g.finished(g.head(_norm(g, x, "/model/norm"), shape.head))


def _numbers(g: DecoderWriter, values: Sequence[int], scope: str) -> ir.Value:
    return g.constant(list(values), scope, dtype=np.int64)


def _seen(g: DecoderWriter, ids: ir.Value, mask: ir.Value, past: ir.Value) -> ir.Value:
    """What is added to the scores [batch, 1, sequence, total]: 0 where a position is seen."""
    s = "/model/mask"
    before, new = g.op("Shape", [past], s, start=2, end=3), g.op("Shape", [ids], s, start=1, end=2)
    empty = _numbers(g, [], s)
    before, total = g.op("Reshape", [before, empty], s), g.op("Reshape", [g.op("Add", [before, new], s), empty], s)
    one = g.constant(1, s, dtype=np.int64)
    rows, columns = (
        g.op("Range", [before, total, one], s),
        g.op("Range", [g.constant(0, s, dtype=np.int64), total, one], s),
    )
    causal = g.op("LessOrEqual", [columns, g.op("Unsqueeze", [rows, _numbers(g, [1], s)], s)], s)
    real = g.op("Unsqueeze", [g.op("Cast", [mask], s, to=int(ir.DataType.BOOL)), _numbers(g, [1, 2], s)], s)
    kind = g.dtype.numpy()
    choices = [g.constant(number, s, dtype=kind) for number in (0.0, FLOAT_MIN[g.dtype])]
    return g.op("Where", [g.op("And", [real, causal], s), *choices], s)


def _rotation(g: DecoderWriter, places: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines [batch, 1, sequence, head size]."""
    s = "/model/rotary_emb"
    where = g.op("Cast", [g.op("Unsqueeze", [places, _numbers(g, [1], s)], s)], s, to=int(ir.DataType.FLOAT))
    angles = g.op("MatMul", [g.constant(g.shape.frequencies[None, :, None], s), where], s)
    angles = g.op("Transpose", [angles], s, perm=[0, 2, 1])
    both = g.op("Concat", [angles, angles], s, axis=-1)
    parts = [g.op("Cast", [g.op(what, [both], s)], s, to=int(g.dtype)) for what in ("Cos", "Sin")]
    cosines, sines = (g.op("Unsqueeze", [part, _numbers(g, [1], s)], s) for part in parts)
    return cosines, sines


def _norm(g: DecoderWriter, x: ir.Value, scope: str) -> ir.Value:
    """Root-mean-square normalization, in float32 whatever the weights are."""
    wide = x if g.dtype == ir.DataType.FLOAT else g.op("Cast", [x], scope, to=int(ir.DataType.FLOAT))
    power = g.op("Pow", [wide, g.constant(2.0, scope)], scope)
    mean = g.op("ReduceMean", [power], scope, axes=[-1], keepdims=1)
    root = g.op("Sqrt", [g.op("Add", [mean, g.constant(g.shape.epsilon, scope)], scope)], scope)
    y = g.op("Mul", [wide, g.op("Div", [g.constant(1.0, scope), root], scope)], scope)
    y = y if g.dtype == ir.DataType.FLOAT else g.op("Cast", [y], scope, to=int(g.dtype))
    return g.op("Mul", [g.gain(scope), y], scope)


def _gated(g: DecoderWriter, x: ir.Value, scope: str) -> ir.Value:
    width, hidden = g.shape.width, g.shape.hidden
    gate = g.product(x, hidden, width, f"{scope}/gate_proj")
    gate = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{scope}/act_fn")], f"{scope}/act_fn")
    both = g.op("Mul", [gate, g.product(x, hidden, width, f"{scope}/up_proj")], scope)
    return g.product(both, width, hidden, f"{scope}/down_proj")


def _attention(
    g: DecoderWriter, x: ir.Value, past: list[ir.Value], seen: ir.Value, rotation: tuple[ir.Value, ir.Value], layer: int
) -> ir.Value:
    shape, scope = g.shape, f"/model/layers.{layer}/self_attn"
    size = shape.head_size

    def heads(what: str, count: int) -> ir.Value:
        made = g.product(x, count * size, shape.width, f"{scope}/{what}_proj", shape.bias)
        return g.op("Transpose", [g.op("Reshape", [made, _numbers(g, [0, 0, count, size], scope)], scope)], scope,
                    perm=[0, 2, 1, 3])  # fmt: skip

    def rotated(y: ir.Value) -> ir.Value:
        ends = [_numbers(g, [end], scope) for end in (0, size // 2, np.iinfo(np.int64).max)]
        axis = _numbers(g, [3], scope)
        low, high = (g.op("Slice", [y, ends[i], ends[i + 1], axis], scope) for i in (0, 1))
        turned = g.op("Concat", [g.op("Neg", [high], scope), low], scope, axis=-1)
        return g.op("Add", [g.op("Mul", [y, rotation[0]], scope), g.op("Mul", [turned, rotation[1]], scope)], scope)

    query, key, value = heads("q", shape.heads), heads("k", shape.kv_heads), heads("v", shape.kv_heads)
    key = g.op("Concat", [past[0], rotated(key)], scope, axis=2)
    value = g.op("Concat", [past[1], value], scope, axis=2)
    g.present(layer, [key, value])
    key, value = (_repeated(g, one, scope) for one in (key, value))
    scores = g.op("MatMul", [rotated(query), g.op("Transpose", [key], scope, perm=[0, 1, 3, 2])], scope)
    scores = g.op("Mul", [scores, g.constant(1 / math.sqrt(size), scope, dtype=g.dtype.numpy())], scope)
    weights = g.op("Softmax", [g.op("Add", [scores, seen], scope)], scope, axis=-1)
    mixed = g.op("Transpose", [g.op("MatMul", [weights, value], scope)], scope, perm=[0, 2, 1, 3])
    flat = g.op("Reshape", [mixed, _numbers(g, [0, 0, shape.heads * size], scope)], scope)
    return g.product(flat, shape.width, shape.heads * size, f"{scope}/o_proj")


def _repeated(g: DecoderWriter, x: ir.Value, scope: str) -> ir.Value:
    """[batch, kv heads, total, size] -> [batch, heads, total, size], each head repeated for its group."""
    shape = g.shape
    group = shape.heads // shape.kv_heads
    if group == 1:
        return x
    lead, tail = g.op("Shape", [x], scope, start=0, end=2), g.op("Shape", [x], scope, start=2, end=4)
    wide = g.op("Concat", [lead, _numbers(g, [group], scope), tail], scope, axis=0)
    spread = g.op("Expand", [g.op("Unsqueeze", [x, _numbers(g, [2], scope)], scope), wide], scope)
    batch = g.op("Shape", [x], scope, start=0, end=1)
    final = g.op("Concat", [batch, _numbers(g, [shape.heads], scope), tail], scope, axis=0)
    return g.op("Reshape", [spread, final], scope)
