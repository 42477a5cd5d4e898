"""Scaling: factors spread over a graph leave its numbers as they are, and stop at what cannot carry them."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from qgraph import graph, scaling
from qgraph.layouts import reshaped
from qgraph.spread import Spread


def normal(*shape, seed=0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def numbers(*values):
    return np.array(values, np.int64)


def apply(model, seed):
    """Scale every group of a copy by random factors of up to e^3; (copy, channels that were free)."""
    after = model.clone()
    rng = np.random.default_rng(seed)
    taken = graph.value_names(after.graph)
    free = 0
    for group in scaling.find(after.graph):
        scale = np.where(group.free, np.exp(rng.uniform(-3, 3, group.free.size)), 1.0)
        scaling.absorb(after.graph, group.edits, scale, lambda name: graph.fresh_name(name, taken))
        free += int(group.free.sum())
    return after, free


@pytest.fixture(scope="session")
def text(model_kit):
    """A model with the shapes of its inner values."""

    def build(body, opset=21, **weights):
        model = model_kit.text(body, opset=opset, **weights)
        common.ShapeInferencePass()(model)
        return model

    return build


IMAGE = "g (float[2,4,6,6] x) => (float[a,b,c,d] y)"
ROWS = "g (float[2,5,8] x) => (float[a,b,c] y)"

# name -> (head, body, weights, channels that can be scaled)
EXACT = {
    "relu": (
        IMAGE,
        "a = Conv (x, V, b) r = Relu (a) y = Conv (r, W)",
        {"V": normal(6, 4, 3, 3), "b": normal(6), "W": normal(5, 6, 3, 3)},
        6,
    ),
    "grouped": (
        IMAGE,
        "a = Conv (x, V) r = LeakyRelu (a) y = Conv <group=2> (r, W)",
        {"W": normal(4, 3, 3, 3)},
        6,
    ),
    "depthwise": (
        IMAGE,
        "a = Conv (x, V, b) r = Relu (a) e = Conv <group=6, pads=[1,1,1,1]> (r, D, c) s = Relu (e) y = Conv (s, W)",
        {"V": normal(6, 4, 1, 1), "b": normal(6), "D": normal(6, 1, 3, 3), "c": normal(6), "W": normal(3, 6, 1, 1)},
        12,
    ),
    "transposed": (
        IMAGE,
        "a = ConvTranspose <group=2> (x, V, b) r = Relu (a) y = ConvTranspose <group=3> (r, W)",
        {"V": normal(4, 3, 2, 2), "b": normal(6), "W": normal(6, 2, 2, 2)},
        6,
    ),
    "pools and flatten": (
        "g (float[2,4,6,6] x) => (float[a,b] y)",
        """a = Conv (x, V) p = MaxPool <kernel_shape=[2,2]> (a) q = AveragePool <kernel_shape=[2,2]> (p)
        f = Flatten (q) y = Gemm (f, W, c)""",
        {"V": normal(6, 4, 1, 1), "W": normal(6 * 16, 3), "c": normal(3)},
        6,
    ),
    "global pool": (
        "g (float[2,4,6,6] x) => (float[a,b] y)",
        "a = Conv (x, V) p = GlobalAveragePool (a) f = Reshape (p, to) y = Gemm <transB=1> (f, W)",
        {"V": normal(6, 4, 1, 1), "to": numbers(2, -1), "W": normal(3, 6)},
        6,
    ),
    "residual": (
        IMAGE,
        "a = Conv (x, V) e = Relu (a) h = Conv (e, U) s = Add (h, e) y = Conv (s, W)",
        {"V": normal(6, 4, 1, 1), "U": normal(6, 6, 1, 1), "W": normal(3, 6, 1, 1)},
        6,
    ),
    "joined": (
        IMAGE,
        "a = Conv (x, V) e = Conv (x, U) j = Concat <axis=1> (a, e, k) y = Conv (j, W)",
        {"V": normal(3, 4, 1, 1), "U": normal(2, 4, 1, 1), "k": normal(2, 1, 6, 6), "W": normal(3, 6, 1, 1)},
        6,
    ),
    "pad, slope, slice": (
        IMAGE,
        "a = Conv (x, V) p = Pad (a, at) r = PRelu (p, slope) s = Slice (r, from, till, axis) y = Conv (s, W)",
        {
            "at": numbers(0, 0, 1, 1, 0, 0, 1, 1), "slope": normal(6, 1, 1),
            "from": numbers(1), "till": numbers(4), "axis": numbers(1), "W": normal(3, 3, 1, 1),
        },
        6,
    ),
    "bounds": (
        IMAGE,
        "a = Conv (x, V) r = Clip (a, zero) s = Max (r, low) t = Sub (s, c) y = Conv (t, W)",
        {"zero": np.float32(0), "low": np.float32(0.2), "c": normal(1, 6, 1, 1)},
        6,
    ),
    "mean": (
        "g (float[2,4,6,6] x) => (float[a,b] y)",
        "a = Conv (x, V) m = ReduceMean <keepdims=0> (a, over) y = MatMul (m, W)",
        {"V": normal(6, 4, 1, 1), "over": numbers(2, 3), "W": normal(6, 3)},
        6,
    ),
    "norm": (
        ROWS,
        "n = LayerNormalization (x, g, b) q = MatMul (n, V) k = MatMul (n, U) y = Mul (q, k)",
        {"g": normal(8), "b": normal(8), "V": normal(8, 6), "U": normal(8, 6, seed=1)},
        8,
    ),
    "norm in primitives": (
        ROWS,
        """s = Mul (x, x) m = ReduceMean <keepdims=1> (s, last) r = Sqrt (m) d = Div (x, r)
        n = Mul (d, g) y = MatMul (n, V)""",
        {"last": numbers(-1), "g": normal(8), "V": normal(8, 6)},
        8,
    ),
    "gate": (
        ROWS,
        "h = MatMul (x, G) i = Sigmoid (h) u = MatMul (x, U) c = Add (u, b) m = Mul (i, c) y = MatMul (m, W)",
        {"G": normal(8, 7), "U": normal(8, 7, seed=1), "b": normal(7), "W": normal(7, 6)},
        7,
    ),
    "attention": (
        ROWS,
        """q = MatMul (x, Q) q4 = Reshape (q, to) q5 = Transpose <perm=[0,2,1,3]> (q4)
        k = MatMul (x, K) k4 = Reshape (k, to) k5 = Transpose <perm=[0,2,3,1]> (k4)
        v = MatMul (x, V) v4 = Reshape (v, to) v5 = Transpose <perm=[0,2,1,3]> (v4)
        s = MatMul (q5, k5) p = Softmax (s) o = MatMul (p, v5)
        o4 = Transpose <perm=[0,2,1,3]> (o) o3 = Reshape (o4, back) y = MatMul (o3, W)""",
        {
            "Q": normal(8, 8), "K": normal(8, 8, seed=1), "V": normal(8, 8, seed=2), "W": normal(8, 4),
            "to": numbers(0, 0, 2, 4), "back": numbers(0, 0, -1),
        },
        8,
    ),
    "joined projection, shared heads": (
        ROWS,
        """j = MatMul (x, J) q, k, v = Split <axis=2> (j, parts)
        q4 = Reshape (q, four) q5 = Transpose <perm=[0,2,1,3]> (q4)
        k4 = Reshape (k, two) k5 = Transpose <perm=[0,2,1,3]> (k4) k6 = Unsqueeze (k5, axis) k7 = Expand (k6, more)
        k8 = Reshape (k7, all) k9 = Transpose <perm=[0,1,3,2]> (k8)
        v4 = Reshape (v, two) v5 = Transpose <perm=[0,2,1,3]> (v4) v6 = Unsqueeze (v5, axis) v7 = Expand (v6, more)
        v8 = Reshape (v7, all)
        s = MatMul (q5, k9) p = Softmax (s) o = MatMul (p, v8)
        o4 = Transpose <perm=[0,2,1,3]> (o) o3 = Reshape (o4, back) y = MatMul (o3, W)""",
        {
            "J": normal(8, 16), "W": normal(8, 4), "parts": numbers(8, 4, 4), "axis": numbers(2),
            "four": numbers(2, 5, 4, 2), "two": numbers(2, 5, 2, 2), "more": numbers(2, 2, 2, 5, 2),
            "all": numbers(2, 4, 5, 2), "back": numbers(2, 5, 8),
        },
        4,
    ),
    "picked from one projection": (
        "g (float[2,5,8] x) => (float[a,b] y)",
        """j = MatMul (x, J) r = Reshape (j, to) t = Transpose <perm=[2,0,1,3]> (r)
        v = Gather <axis=0> (t, one) l = Gather <axis=1> (v, zero) y = MatMul (l, W)""",
        {"J": normal(8, 12), "to": numbers(2, 5, 3, 4), "one": np.int64(1), "zero": np.int64(0), "W": normal(4, 6)},
        12,
    ),
}  # fmt: skip


def chosen(body, weights):
    """The weights that a body reads, with two of common shape."""
    known = {"V": normal(6, 4, 1, 1), "W": normal(3, 6, 1, 1), **weights}
    return {name: array for name, array in known.items() if re.search(rf"\b{name}\b", body)}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_the_numbers_stay(text, model_kit, name, seed):
    head, body, weights, expected = EXACT[name]
    model = text(f"{head} {{ {body} }}", **chosen(body, weights))
    after, free = apply(model, seed)
    assert free == expected
    assert model_kit.ops(after) == model_kit.ops(model)
    model_kit.same(model, after, model_kit.feeds(model, 1, seed=seed), tolerance=2e-5)


@pytest.mark.parametrize(
    "attention",
    [
        "o = com.microsoft.MultiHeadAttention <num_heads=2> (q, k, v, b)",
        "o = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)",
        """qh = Reshape (q, S) qt = Transpose <perm = [0, 2, 1, 3]> (qh) kh = Reshape (k, S)
        kt = Transpose <perm = [0, 2, 1, 3]> (kh) vh = Reshape (v, S) vt = Transpose <perm = [0, 2, 1, 3]> (vh)
        h = Attention (qt, kt, vt) t = Transpose <perm = [0, 2, 1, 3]> (h) o = Reshape (t, J)""",
    ],
)
def test_attention_as_one_operator(model_kit, text, attention):
    head = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n' + ROWS
    body = f"q = MatMul (x, Q) k = MatMul (x, K) v = MatMul (x, V) {attention} y = MatMul (o, W)"
    sizes = {"qh": (2, 5, 2, 4), "kh": (2, 5, 2, 4), "vh": (2, 5, 2, 4), "t": (2, 5, 2, 4), "y": (2, 5, 4)}
    sizes.update(dict.fromkeys(("qt", "kt", "vt", "h"), (2, 2, 5, 4)))
    weights = {
        "Q": normal(8, 8),
        "K": normal(8, 8, seed=1),
        "V": normal(8, 8, seed=2),
        "b": normal(24),
        "W": normal(8, 4),
        "S": np.array([0, 0, 2, 4]),
        "J": np.array([0, 0, 8]),
    }
    model = text(f"{head} {{ {body} }}", **chosen(body, weights))
    for value in (node.outputs[0] for node in model.graph):
        # The operator has no shape inference here; a run would have measured it.
        value.meta.setdefault(graph.RUN_SHAPE, sizes.get(value.name, (2, 5, 8)))
        value.dtype = ir.DataType.FLOAT
    after, free = apply(model, 3)
    assert free == 8
    model_kit.same(model, after, tolerance=2e-5)


SQUARE = {"V": normal(4, 4, 1, 1), "W": normal(3, 4, 1, 1)}
AROUND = numbers(0, 0, 1, 1, 0, 0, 1, 1)
MORE = numbers(0, 1, 0, 0, 0, 1, 0, 0)
ONES = {"at": AROUND, "one": np.float32(1)}
SIX = {"low": np.float32(0), "high": np.float32(6)}

# name -> (head, body, weights, words of the reason)
REFUSED = {
    "a bound": (IMAGE, "a = Conv (x, V) r = Clip (a, low, high) y = Conv (r, W)", SIX, "bound"),
    "a curve": (IMAGE, "a = Conv (x, V) r = Gelu (a) y = Conv (r, W)", {}, "Gelu"),
    "a square": (IMAGE, "a = Conv (x, V) r = Mul (a, a) y = Conv (r, W)", {}, "product"),
    "a divisor": (IMAGE, "a = Conv (x, V) r = Div (x, a) s = Mul (r, a) y = Conv (a, W)", SQUARE, "product"),
    "an input": (IMAGE, "a = Conv (x, V) r = Add (a, x) y = Conv (r, W)", SQUARE, "input or output"),
    "a pad": (IMAGE, "a = Conv (x, V) r = Pad (a, at, one) y = Conv (r, W)", ONES, "Pad"),
    "new channels": (
        IMAGE,
        "a = Conv (x, V) r = Pad (a, at) y = Conv (r, W)",
        {"at": MORE, "W": normal(3, 8, 1, 1)},
        "Pad",
    ),
    "a run-time weight": (IMAGE, "a = Conv (x, V) U = Neg (W) y = Conv (a, U)", {}, "run time|constant"),
    "a norm": (
        "g (float[2,5,8] x) => (float[a,b,c] y)",
        "a = MatMul (x, V) y = LayerNormalization (a, g, b)",
        {"V": normal(8, 8), "g": normal(8), "b": normal(8)},
        "LayerNormalization",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_carries_no_factor_freezes(text, model_kit, name):
    head, body, weights, reason = REFUSED[name]
    model = text(f"{head} {{ {body} }}", **chosen(body, weights))
    first = scaling.find(model.graph)[0]
    assert not first.free.any()
    assert re.search(reason, " ".join(first.reasons))
    after, _ = apply(model, 1)
    model_kit.same(model, after)


def test_a_graph_output_freezes(text):
    model = text(
        "g (float[2,4,6,6] x) => (float[2,6,6,6] a, float[2,3,6,6] y) { a = Conv (x, V) y = Conv (a, W) }",
        V=normal(6, 4, 1, 1),
        W=normal(3, 6, 1, 1),
    )
    assert not any(group.free.any() for group in scaling.find(model.graph))


def test_what_a_body_reads_freezes(text, model_kit):
    model = text(
        """g (float[2,4,6,6] x, bool c) => (float[2,3,6,6] y) {
            a = Conv (x, V)  y = Conv (a, W)
            z = If (c) <then_branch = t () => (float[2,6,6,6] o) { o = Relu (a) },
                        else_branch = e () => (float[2,6,6,6] p) { p = Neg (a) }>
        }""",
        V=normal(6, 4, 1, 1),
        W=normal(3, 6, 1, 1),
    )
    group = scaling.find(model.graph)[0]
    assert not group.free.any()
    assert "body" in " ".join(group.reasons)


def test_only_the_channels_that_meet_a_hurdle_freeze(text, model_kit):
    model = text(
        """g (float[2,5,8] x) => (float[2,5,3] y, float[2,5,4] z) {
            j = MatMul (x, J)  a, e = Split <axis=2, num_outputs=2> (j)  y = MatMul (a, W)  z = Exp (e) }""",
        J=normal(8, 8) / 8,
        W=normal(4, 3),
    )
    (group, *_) = scaling.find(model.graph)
    assert group.free.tolist() == [True] * 4 + [False] * 4
    after, _ = apply(model, 5)
    model_kit.same(model, after)


def test_a_shared_weight_becomes_two(text, model_kit):
    model = text(
        """g (float[2,5,8] x) => (float[2,5,8] y, float[2,5,8] z) {
            n = LayerNormalization (x, g, b)  y = MatMul (n, W)
            m = LayerNormalization (x, h, c)  k = MatMul (m, W)  z = Exp (k) }""",
        g=normal(8), b=normal(8), h=normal(8, seed=1) / 9, c=normal(8, seed=1) / 9, W=normal(8, 8) / 9,
    )  # fmt: skip
    after, free = apply(model, 7)
    assert free == 16
    weights = {node.inputs[1].name for node in after.graph if node.op_type == "MatMul"}
    assert len(weights) == 2 and "W" not in weights
    model_kit.same(model, after)


def test_readers_with_one_factor_share_one_weight(text, model_kit):
    model = text(
        """g (float[2,5,8] x) => (float[2,5,8] y, float[2,5,8] z) {
            n = LayerNormalization (x, g, b)  y = MatMul (n, W)  k = MatMul (n, W)  z = Neg (k) }""",
        g=normal(8), b=normal(8), W=normal(8, 8),
    )  # fmt: skip
    after, _ = apply(model, 7)
    assert len({node.inputs[1].name for node in after.graph if node.op_type == "MatMul"}) == 1


def test_a_weight_on_disk_is_scaled_when_read(text, model_kit, tmp_path):
    model = text(
        f"{ROWS} {{ n = LayerNormalization (x, g, b)  y = MatMul (n, W) }}", g=normal(8), b=normal(8), W=normal(8, 4096)
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=1024)
    stored = ir.load(tmp_path / "m.onnx")
    common.ShapeInferencePass()(stored)
    after, _ = apply(stored, 2)
    weight = after.graph[1].inputs[1].const_value
    assert isinstance(weight, ir.LazyTensor)
    ir.save(after, tmp_path / "n.onnx")
    model_kit.same(model, ir.load(tmp_path / "n.onnx"))
    # The original is still what it was.
    np.testing.assert_array_equal(stored.graph[1].inputs[1].const_value.numpy(), normal(8, 4096))


def test_cost_is_linear(text, monkeypatch):
    def asked(blocks):
        lines, before = [], "x"
        for i in range(blocks):
            lines.append(
                f"a{i} = Conv ({before}, V) r{i} = Relu (a{i}) e{i} = Conv (r{i}, W) "
                f"s{i} = Add ({before if i else 'q'}, e{i})"
            )
            before = f"s{i}"
        body = " ".join(["q = Conv (x, W)", *lines, f"y = Conv ({before}, W)"])
        model = text(
            f"g (float[1,4,2,2] x) => (float[1,4,2,2] y) {{ {body} }}", V=normal(4, 4, 1, 1), W=normal(4, 4, 1, 1)
        )
        calls = []
        need = Spread.need
        monkeypatch.setattr(Spread, "need", lambda *a: (calls.append(1), need(*a)))
        groups = scaling.find(model.graph)
        monkeypatch.setattr(Spread, "need", need)
        assert sum(group.free.any() for group in groups) == blocks + 1
        return len(calls)

    assert asked(80) < 2.2 * asked(40)


@given(data=st.data())
def test_layouts_are_reshaped_as_values_are(data):
    dims = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    size = int(np.prod(dims))
    after, left = [], size
    while left > 1:
        step = data.draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
        after.append(step)
        left //= step
    axis = data.draw(st.integers(0, len(dims) - 1))
    layout = np.arange(dims[axis]).reshape([-1 if i == axis else 1 for i in range(len(dims))])
    found = reshaped(layout, tuple(dims), tuple(after))
    np.testing.assert_array_equal(np.broadcast_to(found, after), np.broadcast_to(layout, dims).reshape(after))
