"""GroupHeads: products with repeated keys and values read them as they are; the numbers stay at any size."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_shapes import FoldShapes
from qgraph.passes.group_heads import GroupHeads

REPEAT = """{0}n = Shape <start = 0, end = 1> ({0})  {0}l = Shape <start = 2, end = 3> ({0})
    {0}u = Unsqueeze ({0}, {axis})
    {0}s = Concat <axis = 0> ({0}n, groups, times, {0}l, size)  {0}e = Expand ({0}u, {0}s)
    {0}t = Concat <axis = 0> ({0}n, heads, {0}l, size)  {0}r = Reshape ({0}e, {0}t)"""


def attention(kit, groups=2, times=3, axis=2, scale="", more="", outputs="", size=4):
    keys, values = (REPEAT.format(name, axis="axis") for name in "kv")
    wide = f"float[N, {groups * times}, S, {size}]"
    text = f"""g ({wide} q, float[N, {groups}, T, {size}] k, float[N, {groups}, T, {size}] v, float[N, 1, S, T] mask)
        => ({wide} y{outputs}) {{
        {keys} {values} turned = Transpose <perm = [0, 1, 3, 2]> (kr)
        {scale or "a = Identity (q)  b = Identity (turned)"}  p = MatMul (a, b)  m = Add (p, mask)
        w = Softmax <axis = -1> (m)  y = MatMul (w, vr) {more}
    }}"""
    numbers = {"groups": groups, "times": times, "heads": groups * times, "size": size, "axis": axis}
    constants = {name: np.array([n]) for name, n in numbers.items()}
    return kit.text(text, **constants, **({"root": np.array(0.5, np.float32)} if "root" in text else {}))


def feeds(kit, n=2, s=3, t=5, groups=2, times=3, size=4):
    return [
        {
            "q": kit.normal(n, groups * times, s, size),
            "k": kit.normal(n, groups, t, size),
            "v": kit.normal(n, groups, t, size, seed=1),
            "mask": np.triu(np.full((n, 1, s, t), -3.4e38, np.float32), 1),
        }
    ]


def grouped(model):
    after = model.clone()
    Canonicalize(21)(after)
    FoldShapes()(after)
    GroupHeads()(after)
    return after


@settings(max_examples=15)
@given(n=st.integers(1, 3), s=st.integers(1, 4), t=st.integers(1, 6), groups=st.integers(1, 3), times=st.integers(2, 4))
def test_keys_and_values_are_not_repeated(model_kit, n, s, t, groups, times):
    model = attention(model_kit, groups, times)
    after = grouped(model)
    assert "Expand" not in model_kit.ops(after)
    model_kit.same(model, after, feeds(model_kit, n, s, t, groups, times))


@pytest.mark.parametrize(
    "scale",
    [
        "a = Mul (q, root)  b = Mul (root, turned)",
        "a = Mul (root, q)  b = Identity (turned)",
        "a = Div (q, root)  b = Div (turned, root)",
    ],
)
def test_scales_stay_beside_the_product(model_kit, scale):
    model = attention(model_kit, scale=scale)
    after = grouped(model)
    assert "Expand" not in model_kit.ops(after)
    product = next(node for node in after.graph if node.op_type == "MatMul")
    assert [v.producer().op_type for v in product.inputs] != ["Reshape", "Transpose"]
    model_kit.same(model, after, feeds(model_kit))


def test_the_product_keeps_its_name(model_kit):
    model = attention(model_kit)
    Canonicalize(21)(model)
    names = [node.name for node in model.graph if node.op_type == "MatMul"]
    after = grouped(model)
    assert [node.name for node in after.graph if node.op_type == "MatMul"] == names


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"more": "z = Neg (kr)", "outputs": ", float[N, 6, T, 4] z"}, "kr is also read elsewhere"),
        ({"axis": 1, "groups": 1, "times": 2}, "not the axis after the heads"),
    ],
    ids=str,
)
def test_refusals_say_why(model_kit, change, reason, caplog):
    model = attention(model_kit, **change)
    with caplog.at_level(logging.DEBUG, "qgraph.passes.group_heads"):
        after = grouped(model)
    assert "Expand" in model_kit.ops(after)
    assert reason in caplog.text
    model_kit.same(model, after, feeds(model_kit, groups=change.get("groups", 2), times=change.get("times", 3)))


def test_a_repetition_along_another_dimension_too_stays(model_kit, caplog):
    model = model_kit.text(
        """g (float[N, 4, S, 5] w, float[N, 2, 1, 3] v) => (float[N, 4, S, 3] y) {
            u = Unsqueeze (v, two)  e = Expand (u, shape)  r = Reshape (e, joined)  y = MatMul (w, r)
        }""",
        two=np.array([2]),
        shape=np.array([1, 1, 2, 5, 1]),
        joined=np.array([0, 4, 5, 3]),
    )
    with caplog.at_level(logging.DEBUG, "qgraph.passes.group_heads"):
        after = grouped(model)
    assert "may repeat other dimensions too" in caplog.text
    model_kit.same(model, after)


def test_plain_products_stay(model_kit):
    model = model_kit.text("g (float[N, 2, S, 4] x, float[4, 4] z) => (float[N, 2, S, 4] y) { y = MatMul (x, z) }")
    assert not GroupHeads()(model).modified
