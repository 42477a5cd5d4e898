"""Whole graphs in float16 and bfloat16: types that fit together, numbers on the runtime, and what stays in float32."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.to_half import ToHalf

from qgraph.data import inputs_of, load
from qgraph.errors import ModelError, OptionError

HALF, BF16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def converted(model, feeds=None, **options):
    """(the canonical model, it in 16 bits, the pass)."""
    Canonicalize(17)(model)
    half = model.clone()
    data = None if feeds is None else load(feeds, inputs_of(model))
    one = ToHalf(data=data, **options)
    one(half)
    # Types that do not fit together are found by ONNX's own checker.
    onnx.checker.check_model(ir.to_proto(half), full_check=True)
    return model, half, one


def step_by_step(model, feed):
    """Each operator in its own type. The CPU provider keeps float32 between operators, which hides infinities."""
    names = [value.name for value in model.graph.outputs]
    with np.errstate(all="ignore"):
        return dict(zip(names, ReferenceEvaluator(ir.to_proto(model)).run(None, feed), strict=True))


def kinds(model):
    return {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}


MLP = "g (float[n, 32] x) => (float[n, 8] y) { h = Gemm (x, A, b)  r = Relu (h)  y = MatMul (r, B) }"


def mlp(kit, **changes):
    constants = {"A": kit.normal(32, 16), "b": kit.normal(16), "B": kit.normal(16, 8), **changes}
    return kit.text(MLP, **constants)


@pytest.mark.parametrize("keep_io", [True, False])
def test_all_of_a_network(model_kit, keep_io):
    model, half, one = converted(mlp(model_kit), keep_io=keep_io)
    assert one.refused == {}
    expected = FLOAT if keep_io else HALF
    assert kinds(half) == {"x": expected, "y": expected}
    assert model_kit.ops(half) == ["Cast"] * keep_io + ["Gemm", "Relu", "MatMul"] + ["Cast"] * keep_io
    assert {a.dtype for a in model_kit.tensors(half).values()} == {np.dtype(np.float16)}
    for feed in model_kit.feeds(model, 4):
        found = model_kit.run(half, {k: v.astype(expected.numpy()) for k, v in feed.items()})["y"]
        assert found.dtype == expected.numpy()
        wanted = model_kit.run(model, feed)["y"]
        assert np.abs(found - wanted).max() < 3e-3 * np.abs(wanted).max()


def test_a_whole_model_of_images(model_kit):
    from pathlib import Path

    model = ir.load(Path(__file__).parent.parent / "models" / "digits.onnx")
    model, half, one = converted(model)
    assert not one.refused and one.subnormal > 0
    assert model_kit.sqnr(model, half, model_kit.feeds(model, 4)) > 50
    resize = next(node for node in half.graph if node.op_type == "Resize")
    assert [v.dtype for v in resize.inputs if v is not None and v.dtype in (FLOAT, HALF)] == [HALF, FLOAT], "its scales"


def test_bfloat16_has_the_types(model_kit):
    """The CPU provider computes nothing in bfloat16, so the numbers are only checked as far as ONNX's own evaluator."""
    model, half, one = converted(mlp(model_kit), form="bf16")
    assert one.refused == {} and {v.dtype for v in half.graph.initializers.values()} == {BF16}
    feed = model_kit.feeds(model, 1)[0]
    found = step_by_step(half, feed)["y"]
    wanted = model_kit.run(model, feed)["y"]
    assert found.dtype == np.float32 and np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


# -- what stays -----------------------------------------------------------------------------------------------------


def test_what_overflows_on_the_data_stays_with_the_reason(model_kit):
    text = (
        "g (float[n, 32] x) => (float[n, 32] y) { s = Mul (x, big)  q = Mul (s, s)  r = Sqrt (q)  y = MatMul (r, W) }"
    )
    model = model_kit.text(text, big=np.float32(300), W=model_kit.normal(32, 32) / 100)
    feeds = model_kit.feeds(model, 4)
    _, blind, _ = converted(model.clone())
    assert not np.isfinite(step_by_step(blind, feeds[0])["y"]).all(), "so data is worth having"
    model, half, one = converted(model, feeds)
    assert list(one.refused) == ["q_Mul", "r_Sqrt"]
    assert all("reaches" in why and "on the data, and fp16 only 65504" in why for why in one.refused.values())
    assert model_kit.sqnr(model, half, feeds) > 50
    # In bfloat16 the same fits.
    assert converted(model, feeds, form="bf16")[2].refused == {}


def test_weights_beyond_the_range_stay(model_kit):
    weight = model_kit.normal(32, 16)
    weight[3, 3] = 1e5
    model, half, one = converted(mlp(model_kit, A=weight))
    assert one.refused == {"h_Gemm": "the constant 'A' reaches 1e+05"}
    assert half.graph.initializers["A"].dtype == FLOAT
    assert model_kit.sqnr(model, half, model_kit.feeds(model, 4)) > 50


@pytest.mark.parametrize("key", ["MatMul", "y_MatMul"])
def test_what_the_target_would_rather_not(model_kit, key):
    model, half, one = converted(mlp(model_kit), keep={key: "no such kernel"})
    assert one.refused == {"y_MatMul": "no such kernel"}
    assert model_kit.ops(half) == ["Cast", "Gemm", "Relu", "Cast", "MatMul"], "and no Cast to float32 twice"
    assert model_kit.sqnr(model, half, model_kit.feeds(model, 4)) > 50


def test_operators_without_such_a_type_stay(model_kit):
    text = """g (float[4] x, float n) => (float[4] y, float[m] z) {
        e = Erf (x)  y = Add (e, x)  z = Range (zero, n, one) }"""
    model, half, one = converted(model_kit.text(text, zero=np.float32(0), one=np.float32(1)))
    assert one.refused == {"z_Range": "Range of opset 21 has no float16 form"}
    feed = {"x": model_kit.normal(4), "n": np.array(3, np.float32)}
    model_kit.same(model, half, [feed], tolerance=2e-3)


# -- masks ----------------------------------------------------------------------------------------------------------

MASKED = {
    "chosen": "s = Where (m, x, low)",
    "added": "f = Cast <to = 1> (m)  g = Sub (one, f)  k = Mul (g, low)  s = Add (x, k)",
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("form", MASKED)
@pytest.mark.parametrize("low", [-3.4028235e38, -1e32])
def test_masks_become_low_and_finite(model_kit, form, low, with_data):
    """Also where all of a row is masked, whose scores are large and negative: infinities there would make NaN."""
    text = f"g (float[2, 4, 4] x, bool[2, 1, 4] m) => (float[2, 4, 4] y) {{ {MASKED[form]}  y = Softmax (s) }}"
    model = model_kit.text(text, low=np.float32(low), one=np.float32(1))
    x = model_kit.normal(2, 4, 4)
    x[1] -= 60
    feed = {"x": x, "m": np.array([[[True, False, True, True]], [[False] * 4]])}
    model, half, one = converted(model, [feed] if with_data else None)
    assert one.refused == {}, "a mask is no overflow"
    found, expected = step_by_step(half, feed)["y"], model_kit.run(model, feed)["y"]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(found[1].sum(axis=-1), 1, atol=1e-2)


def test_masks_that_are_computed_in_float32_stay_finite_on_the_way(model_kit):
    text = "g (float[1, 4] x, float[1, 4] m) => (float[1, 4] y) { k = Mul (m, low)  s = Add (x, k)  y = Softmax (s) }"
    model = model_kit.text(text, low=np.float32(-3.4e38))
    feed = {"x": np.float32([[1, 2, 3, 4]]) - 100, "m": np.ones((1, 4), np.float32)}
    _, half, one = converted(model, [feed], keep={"Mul": "kept here"})
    assert one.refused == {"k_Mul": "kept here"} and "Clip" in model_kit.ops(half)
    assert np.isfinite(step_by_step(half, feed)["y"]).all()


# -- bodies and attributes ------------------------------------------------------------------------------------------


def test_bodies_of_if_and_loop(model_kit):
    text = """g (float[3] x, bool c, int64 trips) => (float[3] y) {
        h = If (c) <
            then_branch = one () => (float[3] a) { k = Constant <value = float[3] {0.5, 1.5, 2.5}> ()  a = Mul (x, k) },
            else_branch = two () => (float[3] d) { d = Erf (x) }
        >
        y = Loop (trips, c, h) <body = step (int64 i, bool on, float[3] v) => (bool go, float[3] w) {
            go = Identity (on)  w = Add (v, x) }>
    }"""
    model, half, one = converted(model_kit.text(text))
    assert one.refused == {}
    for c in (True, False):
        feed = {"x": np.float32([0.25, -1, 3]), "c": np.array(c), "trips": np.array(3)}
        model_kit.same(model, half, [feed], tolerance=2e-3)


def test_attributes_that_name_a_type(model_kit):
    text = """g (float[2, 3] x, int64[2] s) => (float[2, 3] y) {
        z = ConstantOfShape (s)  o = ConstantOfShape <value = float[1] {0.1}> (s)  i = Shape (x)
        f = Cast <to = 1> (i)  t = Slice (f, a, b)  u = Mul (x, t)  v = Add (u, z)  y = Add (v, o) }"""
    model = model_kit.text(text, a=np.array([0]), b=np.array([1]))
    model, half, _ = converted(model)
    model_kit.same(model, half, [{"x": model_kit.normal(2, 3), "s": np.array([2, 3])}], tolerance=2e-3)


def test_the_runtimes_own_operators(model_kit):
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[2, 16] x) => (float[2, 16] y) { h = com.microsoft.FastGelu (x)  y = MatMul (h, W) }"""
    model = model_kit.text(text, W=model_kit.normal(16, 16))
    Canonicalize(17)(model)
    half = model.clone()
    one = ToHalf()
    one(half)
    assert one.refused == {}
    assert model_kit.sqnr(model, half, model_kit.feeds(model)) > 50


def test_what_is_not_known_is_refused(model_kit):
    with pytest.raises(OptionError, match="to fp16 or bf16, and not to 'fp8'"):
        ToHalf("fp8")
    text = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
        g (float[2, 16] x) => (float[2, 16] y) { h = other.Thing (x)  y = Relu (h) }"""
    with pytest.raises(ModelError, match="The type of 'h' is not known"):
        ToHalf()(model_kit.text(text))
