"""RecognizeNorm: normalizations of the last axis in primitives become one operator; lookalikes do not."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.recognize_norm import RecognizeNorm

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
        result = RecognizeNorm()(after)
        assert result.modified == (model_kit.ops(after) != before)
        model_kit.same(model, after, feeds, tolerance=1e-4)
        return after

    return apply


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


TENSORFLOW = """g (float[2, 3, 8] x) => (float[2, 3, 8] y{outputs}) {{
    m = ReduceMean <keepdims = 1> (x, axes)  d = Sub (x, m)  q = Mul (d, d)
    v = ReduceMean <keepdims = 1> (q, axes)  w = Add (v, eps)  r = Sqrt (w)  i = Reciprocal (r)
    f = Mul (i, scale)  a = Mul (x, f)  b = Mul ({shifted}, f)  c = Sub ({difference})  y = Add (a, c)
}}"""


def tensorflow(kit, shifted="m", difference="bias, b", outputs=""):
    return kit.text(
        TENSORFLOW.format(shifted=shifted, difference=difference, outputs=outputs),
        axes=np.array([2]),
        eps=np.array(1e-3, np.float32),
        scale=kit.normal(8),
        bias=kit.normal(8, seed=1),
    )


def test_layer_norm_of_tensorflow(model_kit, recognized):
    after = recognized(tensorflow(model_kit))
    assert model_kit.ops(after) == ["LayerNormalization"]


@pytest.mark.parametrize(
    "change",
    [{"shifted": "d"}, {"difference": "b, bias"}, {"outputs": ", float[2, 3, 8] f"}, {"outputs": ", float[2, 3, 1] m"}],
    ids=str,
)
def test_lookalikes_of_tensorflows_layer_norm_stay(model_kit, recognized, change):
    assert "LayerNormalization" not in model_kit.ops(recognized(tensorflow(model_kit, **change)))


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


RMS = {
    "Pow, Reciprocal": ("q = Pow (x, two)", "i = Reciprocal (r)  n = Mul (x, i)", "y = Mul (g, n)"),
    "Pow, 1 / root": ("q = Pow (x, two)", "i = Div (one, r)  n = Mul (x, i)", "y = Mul (n, g)"),
    "Mul, Div": ("q = Mul (x, x)", "n = Div (x, r)", "y = Mul (g, n)"),
    "Mul, Reciprocal first": ("q = Mul (x, x)", "i = Reciprocal (r)  n = Mul (i, x)", "y = Mul (n, g)"),
}


def rms_norm(kit, form="Pow, Reciprocal", opset=18, axis=-1, width=8, more="", outputs="", shape=None, **constants):
    square, normal, last = RMS[form]
    text = f"{square} {normal} {last}"
    axes = ", axes" if opset >= 18 else ""
    attribute = "" if axes else f", axes = [{axis}]"
    given = {
        "eps": np.array(1e-6, np.float32),
        "g": 1 + kit.normal(width, scale=0.2),
        **({"axes": np.array([axis])} if axes else {}),
        **({"two": np.array(2, np.float32)} if "two" in text else {}),
        **({"one": np.array(1, np.float32)} if "one" in text else {}),
        **constants,
    }
    rank = shape or f"2, 3, {width}"
    return kit.text(
        f"""g (float[{rank}] x) => (float[{rank}] y{outputs}) {{
            {square}  m = ReduceMean <keepdims = 1{attribute}> (q{axes})
            v = Add (m, eps)  r = Sqrt (v)  {normal}  {last} {more}
        }}""",
        opset=opset,
        **given,
    )


@pytest.mark.parametrize("form", RMS)
@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23])
def test_rms_norm(model_kit, recognized, form, opset):
    after = recognized(rms_norm(model_kit, form, opset))
    assert model_kit.ops(after) == ["RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"]
    assert list(after.graph.initializers) == ["g"]


def test_rms_norm_by_a_power_of_minus_one_half(model_kit, recognized):
    model = model_kit.text(
        """g (float[N, S, 8] x) => (float[N, S, 8] y) {
            q = Mul (x, x)  m = ReduceMean <keepdims = 1> (q, axes)  v = Add (m, eps)
            i = Pow (v, minus)  n = Mul (x, i)  y = Mul (n, g)
        }""",
        axes=np.array([2]),
        eps=np.array(1e-6, np.float32),
        minus=np.array(-0.5, np.float32),
        g=model_kit.normal(8),
    )
    assert model_kit.ops(recognized(model)) == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize(
    "change",
    [
        {"axis": 1},
        {"two": np.array(3, np.float32)},
        {"eps": np.full(1, -1.0, np.float32)},
        {"g": np.ones((3, 8), np.float32)},
        {"g": np.ones(1, np.float32)},
        {"more": "z = Neg (n)", "outputs": ", float[2, 3, 8] z"},
        {"more": "z = Neg (v)", "outputs": ", float[2, 3, 1] z"},
        {"outputs": ", float[2, 3, 8] n"},
    ],
    ids=str,
)
def test_lookalikes_of_rms_norm_stay(model_kit, change):
    model = rms_norm(model_kit, **change)
    before = model_kit.ops(model)
    assert not RecognizeNorm()(model).modified
    assert model_kit.ops(model) == before


def test_rms_norm_of_dynamic_shape(model_kit, recognized):
    model = rms_norm(model_kit, shape="N, S, 8")
    feeds = [{"x": model_kit.normal(n, s, 8)} for n, s in ((1, 1), (2, 5))]
    assert model_kit.ops(recognized(model, feeds)) == ["SimplifiedLayerNormalization"]


def test_a_layer_norm_without_bias_is_an_rms_norm_of_deviations(model_kit, recognized):
    model = layer_norm(model_kit)
    add = model.graph[-1]
    ir.convenience.replace_all_uses_with(add.outputs[0], add.inputs[0], replace_graph_outputs=True)
    model.graph.remove(add, safe=True)
    model.graph.outputs[0].name = "y"
    del model.graph.initializers["bias"]
    assert model_kit.ops(recognized(model)) == ["ReduceMean", "Sub", "SimplifiedLayerNormalization"]


def test_only_operators_that_are_fast_on_the_target(model_kit):
    target = model_kit.free()
    target.fast_operators = frozenset()
    for opset, found in ((21, "ReduceMean"), (23, "RMSNormalization")):
        model = rms_norm(model_kit, opset=opset)
        RecognizeNorm(target)(model)
        assert found in model_kit.ops(model)
