"""FuseRotary: rotated halves become RotaryEmbedding, with the tables that the model has; lookalikes do not."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fuse_rotary import FuseRotary

HALVES = {
    "slices": "x1 = Slice (x, zero, half, last)  x2 = Slice (x, half, end, last)",
    "negative": "x1 = Slice (x, zero, minus, last)  x2 = Slice (x, minus, end, last)",
    "split": "x1, x2 = Split <axis = -1> (x, halves)",
}
SUMS = {
    "plain first": "a = Mul (x, cos)  b = Mul (turned, sin)  y = Add (a, b)",
    "turned first": "a = Mul (cos, x)  b = Mul (sin, turned)  y = Add (b, a)",
}
ANGLES = """p = Cast <to = 1> (ids)  col = Unsqueeze (p, two)  f = Mul (col, frequency)  ff = Concat <axis = -1> (f, f)
    c = Cos (ff)  s = Sin (ff)  cs = Mul (c, scale)  cos = Unsqueeze (cs, one)  sin = Unsqueeze (s, one)"""
TABLES = """c = Gather (cosines, ids)  s = Gather (sines, ids)  cos = Unsqueeze (c, one)  sin = Unsqueeze (s, one)"""


def rope(kit, angles=ANGLES, halves="slices", total="plain first", size=8, batch="N", heads="2", end="", **change):
    text = f"""g (float[N, {heads}, S, {size}] x, int64[{batch}, S] ids) => (float[N, {heads}, S, {size}] y) {{
        {angles} {HALVES[halves]} n = Neg (x2)  turned = Concat <axis = -1> (n, x1)  {SUMS[total]} {end}
    }}"""
    half = size // 2
    frequency = (100.0 ** -(np.arange(half) / half)).astype(np.float32)
    table = np.tile(np.arange(16)[:, None] * frequency, 2)
    numbers = {"zero": [0], "half": [half], "minus": [-half], "end": [2**62], "last": [-1], "halves": [half, half],
               "one": [1], "two": [2]}  # fmt: skip
    constants = {name: np.array(n) for name, n in numbers.items()} | {
        "frequency": frequency,
        "scale": np.array(1.25, np.float32),
        "cosines": np.cos(table).astype(np.float32),
        "sines": np.sin(table).astype(np.float32),
        **change,
    }
    return kit.text(
        text, **{n: a for n, a in constants.items() if f" {n})" in text or f", {n}," in text or f"({n}," in text}
    )


def feeds(kit, n=2, s=3, heads=2, size=8, batch=None):
    rng = np.random.default_rng(0)
    return [{"x": kit.normal(n, heads, s, size), "ids": rng.integers(0, 16, (batch or n, s))}]


def fused(model):
    after = model.clone()
    Canonicalize(17)(after)
    FuseRotary()(after)
    return after


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("angles", [ANGLES, TABLES], ids=["computed", "tables"])
def test_positions_of_each_batch(model_kit, halves, total, angles):
    model = rope(model_kit, angles, halves, total)
    after = fused(model)
    assert model_kit.ops(after).count("RotaryEmbedding") == 1
    assert not {"Neg", "Split"} & set(model_kit.ops(after))
    model_kit.same(model, after, feeds(model_kit) + feeds(model_kit, n=1, s=1))


@settings(max_examples=15)
@given(n=st.integers(1, 3), s=st.integers(1, 6), heads=st.integers(1, 3), size=st.sampled_from([2, 8, 16, 32]))
def test_positions_of_all_batches(model_kit, n, s, heads, size):
    model = rope(model_kit, batch=1, heads=heads, size=size)
    after = fused(model)
    assert "RotaryEmbedding" in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit, n, s, heads, size, batch=1))


def test_the_tables_of_all_layers_are_made_once(model_kit):
    more = """y1 = Slice (y, zero, half, last)  y2 = Slice (y, half, end, last)  m = Neg (y2)
        again = Concat <axis = -1> (m, y1)  cos2 = Unsqueeze (cs, one)  d = Mul (y, cos2)  e = Mul (again, sin)
        z = Add (d, e)"""
    model = rope(model_kit, end=more)
    model.graph.outputs[0] = model.graph[-1].outputs[0]
    model.graph.outputs[0].type, model.graph.outputs[0].shape = model.graph.inputs[0].type, model.graph.inputs[0].shape
    after = fused(model)
    assert model_kit.ops(after).count("RotaryEmbedding") == 2
    first, second = (node for node in after.graph if node.op_type == "RotaryEmbedding")
    assert list(first.inputs[1:]) == list(second.inputs[1:])
    model_kit.same(model, after, feeds(model_kit))


@pytest.mark.parametrize("shape", [(3, 8), (1, 3, 8), (1, 1, 3, 8)])
def test_constant_angles(model_kit, shape):
    angles = np.tile(np.linspace(0, 3, 12).reshape(3, 4), 2).reshape(shape)
    model = rope(model_kit, "", cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32))
    after = fused(model)
    assert "RotaryEmbedding" in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit))


UNEQUAL = np.cos(np.arange(128).reshape(16, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"angles": TABLES, "cosines": UNEQUAL}, "the halves of cos may differ"),
        ({"batch": "M"}, "the batch of cos may not be that of x"),
    ],
    ids=["unequal halves", "another batch"],
)
def test_refusals_say_why(model_kit, change, reason, caplog):
    model = rope(model_kit, **change)
    with caplog.at_level(logging.DEBUG, "qgraph.passes.fuse_rotary"):
        after = fused(model)
    assert "RotaryEmbedding" not in model_kit.ops(after)
    assert reason in caplog.text
    model_kit.same(model, after, feeds(model_kit))


@pytest.mark.parametrize(
    "old, new",
    [
        ("n = Neg (x2)  turned = Concat <axis = -1> (n, x1)", "n = Neg (x1)  turned = Concat <axis = -1> (n, x2)"),
        ("turned = Concat <axis = -1> (n, x1)", "turned = Concat <axis = -1> (x1, n)"),
        ("x1 = Slice (x, zero, half, last)", "x1 = Slice (x, half, end, last)"),
        ("y = Add (a, b)", "y = Sub (a, b)"),
    ],
    ids=["other half", "other order", "one half twice", "difference"],
)
def test_lookalikes_stay(model_kit, monkeypatch, old, new):
    text = model_kit.text
    kit = type("Kit", (model_kit,), {"text": staticmethod(lambda body, **more: text(body.replace(old, new), **more))})
    model = rope(kit)
    after = fused(model)
    assert "RotaryEmbedding" not in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit))


def test_only_where_the_target_finds_it_fast(model_kit):
    target = model_kit.free()
    target.fast_operators = frozenset()
    model = rope(model_kit)
    assert not FuseRotary(target)(model).modified
