"""Recognize: GELU and SiLU in primitives become one operator, whatever their spelling; lookalikes do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.recognize import Recognize


@pytest.fixture
def recognized(model_kit):
    """Applies the pass to a copy and checks the numbers."""

    def apply(model, feeds=None):
        after = model.clone()
        Canonicalize(model.graph.opset_imports[""])(after)
        before = model_kit.ops(after)
        modified = Recognize()(after).modified
        assert modified == (model_kit.ops(after) != before)
        model_kit.same(model, after, feeds, tolerance=1e-4)
        return after

    return apply


ROOT = float(np.sqrt(2))
ORDERS = {
    "(x cdf) half": "p = Mul (x, c)  y = Mul (p, half)",
    "half (x cdf)": "p = Mul (c, x)  y = Mul (half, p)",
    "x (cdf half)": "p = Mul (c, half)  y = Mul (x, p)",
    "(x half) cdf": "p = Mul (x, half)  y = Mul (p, c)",
    "cdf (half x)": "p = Mul (half, x)  y = Mul (c, p)",
}


def gelu(
    kit, tail, start="s = Div (x, root)", root=ROOT, one=1.0, half=0.5, kind="float", opset=21, outputs="", **more
):
    values = {"root": root, "one": one, "half": half, **more}
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    return kit.text(
        f"g ({kind}[2, 8] x) => ({kind}[2, 8] y{outputs}) {{ {start}  e = Erf (s)  c = Add (e, one)  {tail} }}",
        opset=opset,
        **{name: np.array(value, dtype) for name, value in values.items()},
    )


@pytest.mark.parametrize("tail", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(
    "start, root",
    [("s = Div (x, root)", ROOT), ("s = Mul (x, root)", 1 / ROOT), ("s = Mul (root, x)", 1 / ROOT)],
)
def test_gelu(model_kit, recognized, tail, start, root):
    after = recognized(gelu(model_kit, tail, start, root))
    assert model_kit.ops(after) == ["Gelu"]
    assert not after.graph.initializers or all(v.uses() for v in after.graph.initializers.values())


def test_one_plus_erf_in_the_other_order(model_kit, recognized):
    model = gelu(model_kit, ORDERS["(x cdf) half"])
    model.graph[2].replace_input_with(0, model.graph.initializers["one"])
    model.graph[2].replace_input_with(1, model.graph[1].outputs[0])
    assert model_kit.ops(recognized(model)) == ["Gelu"]


@pytest.mark.parametrize(
    "change",
    [
        {"root": 1 / ROOT},
        {"root": 1.5},
        {"start": "s = Mul (x, root)", "root": ROOT},
        {"one": 1.1},
        {"half": 0.4},
    ],
    ids=str,
)
def test_gelu_with_other_constants_stays(model_kit, recognized, change):
    model = gelu(model_kit, ORDERS["(x cdf) half"], **change)
    assert "Erf" in model_kit.ops(recognized(model))


@pytest.mark.parametrize("opset, domain", [(17, "com.microsoft"), (19, "com.microsoft"), (20, ""), (21, "")])
@pytest.mark.parametrize("tail", ORDERS.values(), ids=ORDERS)
def test_gelu_is_the_runtimes_own_before_opset_20(model_kit, recognized, tail, opset, domain):
    after = recognized(gelu(model_kit, tail, opset=opset))
    assert [(node.domain, node.op_type) for node in after.graph] == [(domain, "Gelu")]
    assert ("com.microsoft" in after.graph.opset_imports) == bool(domain)


def test_gelu_of_two_different_values_stays(model_kit, recognized):
    model = model_kit.text(
        """g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y) {
            s = Div (x, root)  e = Erf (s)  c = Add (e, one)  p = Mul (z, c)  y = Mul (p, half)
        }""",
        root=np.array(ROOT, np.float32),
        one=np.array(1, np.float32),
        half=np.array(0.5, np.float32),
    )
    assert "Erf" in model_kit.ops(recognized(model))


@pytest.mark.parametrize("middle", ["s", "e", "c", "p"])
def test_gelu_whose_middle_is_an_output_stays(model_kit, recognized, middle):
    model = gelu(model_kit, ORDERS["(x cdf) half"], outputs=f", float[2, 8] {middle}")
    after = recognized(model)
    assert "Erf" in model_kit.ops(after)


def test_gelu_whose_middle_is_read_elsewhere_stays_right(model_kit, recognized):
    model = gelu(model_kit, ORDERS["(x cdf) half"] + "  z = Neg (c)", outputs=", float[2, 8] z")
    recognized(model)


def test_gelu_where_a_constant_is_shared_with_a_division(model_kit, recognized):
    # The same root of 2 divides here and multiplies there.
    model = gelu(
        model_kit,
        ORDERS["(x cdf) half"] + "  z = Div (x, root)",
        start="s = Mul (x, root)",
        root=1 / ROOT,
        outputs=", float[2, 8] z",
    )
    recognized(model)


def test_lookalike_whose_root_is_divided_by_elsewhere(model_kit, recognized):
    model = gelu(
        model_kit,
        ORDERS["(x cdf) half"] + "  z = Div (x, two)  w = Div (z, root)",
        start="s = Mul (x, root)",
        root=ROOT,
        two=2.0,
        outputs=", float[2, 8] w",
    )
    assert "Erf" in model_kit.ops(recognized(model))


def test_two_gelus_with_shared_constants(model_kit, recognized):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            s = Div (x, root)  e = Erf (s)  c = Add (e, one)  p = Mul (x, c)  h = Mul (p, half)
            s2 = Div (h, root)  e2 = Erf (s2)  c2 = Add (e2, one)  p2 = Mul (h, c2)  y = Mul (p2, half)
        }""",
        root=np.array(ROOT, np.float32),
        one=np.array(1, np.float32),
        half=np.array([0.5], np.float32),
    )
    after = recognized(model)
    assert model_kit.ops(after) == ["Gelu", "Gelu"]


@pytest.mark.parametrize("product", ["Mul (x, s)", "Mul (s, x)"])
def test_silu(model_kit, recognized, product):
    model = model_kit.text(f"g (float[2, 8] x) => (float[2, 8] y) {{ s = Sigmoid (x)  y = {product} }}")
    after = recognized(model)
    assert model_kit.ops(after) == ["QuickGelu"]
    assert after.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y) { s = Sigmoid (x)  y = Mul (z, s) }",
        "g (float[2, 8] x) => (float[2, 8] y, float[2, 8] s) { s = Sigmoid (x)  y = Mul (x, s) }",
        "g (float16[2, 8] x) => (float16[2, 8] y) { s = Sigmoid (x)  y = Mul (x, s) }",
    ],
)
def test_sigmoid_products_that_are_no_silu(model_kit, recognized, text):
    model = model_kit.text(text)
    after = model.clone()
    Recognize()(after)
    assert model_kit.ops(after) == ["Sigmoid", "Mul"]


TANH = {
    "torch": """half_x = Mul (half, x)  p = Pow (x, three)  c = Mul (cubic, p)  s = Add (x, c)  i = Mul (k, s)
        t = Tanh (i)  d = Add (one, t)  y = Mul (half_x, d)""",
    "cube by products": """q = Mul (x, x)  p = Mul (q, x)  c = Mul (p, cubic)  s = Add (c, x)  i = Mul (s, k)
        t = Tanh (i)  d = Add (t, one)  g = Mul (x, d)  y = Mul (half, g)""",
    "x taken out": """q = Mul (x, x)  c = Mul (cubic, q)  s = Add (c, one)  kx = Mul (x, k)  i = Mul (kx, s)
        t = Tanh (i)  d = Add (t, one)  g = Mul (d, half)  y = Mul (x, g)""",
    "keras": """p = Pow (x, three)  c = Mul (p, cubic)  s = Add (x, c)  i = Mul (s, k)
        t = Tanh (i)  d = Add (t, one)  g = Mul (half, d)  y = Mul (g, x)""",
}


def tanh_gelu(kit, form="torch", opset=17, **change):
    numbers = {"half": 0.5, "three": 3.0, "cubic": 0.044715, "k": np.sqrt(2 / np.pi), "one": 1.0, **change}
    used = {n: np.array(v, np.float32) for n, v in numbers.items() if f"{n}," in TANH[form] or f"{n})" in TANH[form]}
    return kit.text(f"g (float[2, 8] x) => (float[2, 8] y) {{ {TANH[form]} }}", opset=opset, **used)


@pytest.mark.parametrize("form", TANH)
@pytest.mark.parametrize("opset, operator", [(17, "FastGelu"), (19, "FastGelu"), (20, "Gelu"), (21, "Gelu")])
def test_gelu_by_tanh(model_kit, recognized, form, opset, operator):
    after = recognized(tanh_gelu(model_kit, form, opset), [{"x": model_kit.normal(2, 8, scale=4.0)}])
    assert model_kit.ops(after) == [operator]
    assert not after.graph.initializers


@pytest.mark.parametrize("change", [{"cubic": 0.0447}, {"k": 0.7980}, {"three": 2.0}, {"half": 0.51}], ids=str)
def test_gelu_by_tanh_with_other_constants_stays(model_kit, recognized, change):
    assert "Tanh" in model_kit.ops(recognized(tanh_gelu(model_kit, **change)))


def test_a_constant_of_many_numbers_is_no_number(model_kit, recognized):
    model = tanh_gelu(model_kit, k=np.full(8, np.sqrt(2 / np.pi)))
    assert "Tanh" in model_kit.ops(recognized(model))


def test_a_constant_that_widens_x_stays(model_kit, recognized):
    model = model_kit.text(
        "g (float[8] x) => (float[1, 8] y) { a = Mul (x, one)  s = Sigmoid (a)  y = Mul (x, s) }",
        one=np.ones((1, 1), np.float32),
    )
    assert "Sigmoid" in model_kit.ops(recognized(model))


@settings(max_examples=20)
@given(alpha=st.floats(0.25, 4.0))
def test_sigmoid_of_a_multiple(model_kit, alpha):
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { a = Mul (x, alpha)  s = Sigmoid (a)  y = Mul (x, s) }",
        alpha=np.array(alpha, np.float32),
    )
    after = model.clone()
    Recognize()(after)
    assert model_kit.ops(after) == ["QuickGelu"]
    model_kit.same(model, after)


def test_two_gelus_in_a_row(model_kit, recognized):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            a = Sigmoid (x)  b = Mul (x, a)  c = Sigmoid (b)  y = Mul (b, c)
        }"""
    )
    assert model_kit.ops(recognized(model)) == ["QuickGelu", "QuickGelu"]


def test_gate_times_up_is_left_beside_the_activation(model_kit, recognized):
    model = model_kit.text(
        "g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y) { s = Sigmoid (x)  a = Mul (x, s)  y = Mul (a, z) }"
    )
    assert model_kit.ops(recognized(model)) == ["QuickGelu", "Mul"]


def test_only_operators_that_are_fast_on_the_target(model_kit):
    target = model_kit.free()
    target.fast_operators = frozenset({"Gelu"})
    model = tanh_gelu(model_kit)
    Recognize(target)(model)
    assert "Tanh" in model_kit.ops(model)
    target.fast_operators = frozenset({"FastGelu"})
    Recognize(target)(model)
    assert model_kit.ops(model) == ["FastGelu"]


def test_the_activation_remembers_what_it_was(model_kit):
    model = tanh_gelu(model_kit)
    Canonicalize(17)(model)
    before = {node.name for node in model.graph}
    Recognize()(model)
    (node,) = model.graph
    assert {node.name, *(name for name, _ in node.meta["qgraph.origins"])} == before
