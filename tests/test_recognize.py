"""Recognize: GELU, SiLU and layer normalization in primitives become one operator; lookalikes do not."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import Canonicalize, Recognize

from qgraph.session import runtime_version

# Up to 1.23 the runtime's own fusion makes a LayerNormalization with a scale of one number, and then refuses it.
OLD_FUSION = pytest.mark.skipif(
    tuple(int(part) for part in runtime_version().split(".")[:2]) < (1, 24),
    reason="onnxruntime before 1.24 cannot run the original",
)


@pytest.fixture
def recognized(model_kit):
    """Applies the pass to a copy and checks the numbers."""

    def apply(model, feeds=None):
        after = model.clone()
        Canonicalize(model.graph.opset_imports[""])(after)
        before = model_kit.ops(after)
        result = Recognize()(after)
        assert result.modified == (model_kit.ops(after) != before)
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


NORMS = {
    "Pow, Div": ("q = Pow (d, two)", "n = Div (d, r)"),
    "Mul, Div": ("q = Mul (d, d)", "n = Div (d, r)"),
    "Pow, Reciprocal": ("q = Pow (d, two)", "i = Reciprocal (r)  n = Mul (d, i)"),
    "Mul, Reciprocal": ("q = Mul (d, d)", "i = Reciprocal (r)  n = Mul (i, d)"),
}


def layer_norm(kit, form="Pow, Div", axis=-1, axis2=None, width=8, shape=None, opset=21, outputs="", **constants):
    square, normal = NORMS[form]
    given = {
        "axes": np.array([axis]),
        "axes2": np.array([axis if axis2 is None else axis2]),
        "eps": np.array(1e-5, np.float32),
        "scale": 1 + kit.normal(*(shape or (width,)), scale=0.2),
        "bias": kit.normal(*(shape or (width,)), seed=1),
        **({"two": np.array(2, np.float32)} if "Pow" in form else {}),
        **constants,
    }
    return kit.text(
        f"""g (float[2, 3, {width}] x) => (float[2, 3, {width}] y{outputs}) {{
            m = ReduceMean <keepdims = 1> (x, axes)
            d = Sub (x, m)
            {square}
            v = ReduceMean <keepdims = 1> (q, axes2)
            w = Add (v, eps)
            r = Sqrt (w)
            {normal}
            s = Mul (n, scale)
            y = Add (s, bias)
        }}""",
        opset=opset,
        **given,
    )


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("axis", [-1, 2])
def test_layer_norm(model_kit, recognized, form, axis):
    after = recognized(layer_norm(model_kit, form, axis))
    assert model_kit.ops(after) == ["LayerNormalization"]
    assert after.graph[0].attributes["epsilon"].as_float() == pytest.approx(1e-5)


def old_layer_norm(kit, axes="[-1]", opset=17, **more):
    """Before opset 18 the axes of ReduceMean are an attribute."""
    model = layer_norm(kit, opset=opset, **more)
    for node in model.graph:
        if node.op_type == "ReduceMean":
            node.resize_inputs(1)
            node.attributes.add(ir.AttrInt64s("axes", axes))
    for name in ("axes", "axes2"):
        del model.graph.initializers[name]
    return model


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("axes, found", [([-1], True), ([2], True), ([1], False), ([1, 2], False)])
def test_layer_norm_at_opset_17(model_kit, recognized, form, axes, found):
    model = old_layer_norm(model_kit, axes, form=form, **({} if found else {"shape": (1,)}))
    after = recognized(model)
    assert (model_kit.ops(after) == ["LayerNormalization"]) == found


def test_layer_norm_before_opset_17_stays(model_kit, recognized):
    assert "LayerNormalization" not in model_kit.ops(recognized(old_layer_norm(model_kit, [-1], opset=13)))


def test_layer_norm_at_opset_18(model_kit, recognized):
    assert model_kit.ops(recognized(layer_norm(model_kit, opset=18))) == ["LayerNormalization"]


@pytest.mark.parametrize(
    "change",
    [
        {"axis": 1, "shape": (1,)},
        {"axis": -1, "axis2": 1, "shape": (1,)},
        {"two": np.array(4, np.float32)},
        {"eps": np.full(8, 1e-5, np.float32)},
        {"shape": (3, 8)},
        pytest.param({"shape": (1,)}, marks=OLD_FUSION),
    ],
    ids=str,
)
def test_lookalikes_of_layer_norm_stay(model_kit, recognized, change):
    model = layer_norm(model_kit, **change)
    assert "LayerNormalization" not in model_kit.ops(recognized(model))


@pytest.mark.parametrize("middle", ["m", "d", "q", "v", "w", "r", "n", "s"])
def test_layer_norm_whose_middle_is_an_output_stays(model_kit, recognized, middle):
    model = layer_norm(model_kit)
    value = next(v for node in model.graph for v in node.outputs if v.name == middle)
    value.type = model.graph.outputs[0].type
    model.graph.outputs.append(value)
    after = recognized(model)
    assert "LayerNormalization" not in model_kit.ops(after)


@OLD_FUSION
def test_layer_norm_on_dynamic_width(model_kit, recognized):
    model = layer_norm(model_kit, shape=(1,))
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([2, 3, "width"])
    model.graph.outputs[0].shape = model.graph.inputs[0].shape
    recognized(model, [{"x": model_kit.normal(2, 3, 8)}])


def test_names_of_the_outputs_stay(model_kit, recognized):
    after = recognized(layer_norm(model_kit))
    assert [v.name for v in after.graph.outputs] == ["y"]
