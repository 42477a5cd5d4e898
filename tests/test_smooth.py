"""Smooth: outlier channels of a product's input move into its weights, for nothing or by a Mul."""

import numpy as np
import pytest
from onnx_ir.passes import common
from qgraph.passes.drop_factors import DropFactors
from qgraph.passes.smooth import Smooth
from qgraph.passes.survey import Survey

from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.data import inputs_of, load
from qgraph.targets import KERNEL, Refusal

WIDTH = 24


def outliers(rng, count, factor=60.0):
    """A gain with a few channels many times as large."""
    gain = np.ones(count, np.float32)
    gain[rng.choice(count, 3, replace=False)] = factor
    return gain


@pytest.fixture
def build(model_kit):
    """A model of rows with named nodes, surveyed; (model, feeds)."""

    def make(body, head="(float[1,16,24] x) => (float[1,16,p] y)", **weights):
        model = model_kit.text(f"g {head} {{ {body} }}", **weights)
        common.ShapeInferencePass()(model)
        feeds = model_kit.feeds(model, 12)
        Survey(load(feeds, inputs_of(model)))(model)
        return model, feeds

    return make


@pytest.fixture
def smoothed(model_kit):
    """(a copy after the pass, the pass)."""

    def apply(model, **options):
        after = model.clone()
        target = model_kit.free()
        one = Smooth(target, target.scheme("int8"), **options)
        one(after)
        return after, one

    return apply


@pytest.fixture
def norm(model_kit, build):
    """Three products of one norm with outlier gains; behind each, what carries no factor."""
    n, gain = model_kit.normal, outliers(np.random.default_rng(1), WIDTH)
    return build(
        """n = LayerNormalization (x, g, b)
        [q] q0 = MatMul (n, Q) [k] k0 = MatMul (n, K) [v] v0 = MatMul (n, V)
        q1 = Tanh (q0) k1 = Tanh (k0) v1 = Tanh (v0) y = Sum (q1, k1, v1)""",
        g=gain, b=n(WIDTH) * gain, Q=n(WIDTH, 32) / gain[:, None] / 9, K=n(WIDTH, 32, seed=1) / gain[:, None] / 9,
        V=n(WIDTH, 32, seed=2) / gain[:, None] / 9,
    )  # fmt: skip


def test_a_norm_takes_the_factors_in(model_kit, norm, smoothed, model_eight_bits):
    model, feeds = norm
    after, one = smoothed(model)
    model_kit.same(model, after, feeds[:2])
    assert model_kit.ops(after) == model_kit.ops(model)
    (change,) = one.changes
    assert change.readers == ("q", "k", "v") and not change.explicit and change.after > change.before + 10
    assert one.refused == {}
    plain = model_kit.sqnr(model, model_eight_bits(model), feeds)
    assert model_kit.sqnr(model, model_eight_bits(after), feeds) > plain + 10


def test_samples_stay_shared_and_right(norm, smoothed):
    model, _ = norm
    first, *others = (node for node in model.graph if SAMPLE in node.meta)
    for node in others:
        node.meta[SAMPLE] = first.meta[SAMPLE]
    after, _ = smoothed(model)
    layers = [node for node in after.graph if SAMPLE in node.meta]
    assert len({id(node.meta[SAMPLE]) for node in layers}) == 1
    olds = [node for node in model.graph if SAMPLE in node.meta]
    for node, old in zip(layers, olds, strict=True):
        product = node.meta[SAMPLE] @ node.inputs[1].const_value.numpy()
        expected = old.meta[SAMPLE] @ old.inputs[1].const_value.numpy()
        np.testing.assert_allclose(product, expected, rtol=1e-3, atol=1e-3)
        low, high = node.meta[CHANNELS]
        assert (node.meta[SAMPLE] >= low - 1e-5).all() and (node.meta[SAMPLE] <= high + 1e-5).all()


@pytest.fixture
def post_norm(model_kit, build):
    """As in BERT: the norm's output is also added to what comes after it."""
    n, gain = model_kit.normal, outliers(np.random.default_rng(2), WIDTH)
    return build(
        """n = LayerNormalization (x, g, b) [q] q0 = MatMul (n, Q) q1 = Tanh (q0) f = Reshape (q1, flat)
        [o] o0 = Gemm (f, O, c) r = Reshape (o0, to) s = Sum (r, n) y = LayerNormalization (s, h, c)""",
        g=gain, b=n(WIDTH) * gain, Q=n(WIDTH, WIDTH) / gain[:, None] / 9, O=n(WIDTH, WIDTH), c=n(WIDTH),
        h=np.where(gain > 1, 0, 1).astype(np.float32), flat=np.array([16, WIDTH]), to=np.array([1, 16, WIDTH]),
    )  # fmt: skip


def test_a_mul_where_nothing_takes_them_in(model_kit, post_norm, smoothed, model_eight_bits):
    model, feeds = post_norm
    after, one = smoothed(model)
    model_kit.same(model, after, feeds[:2])
    assert [change.readers for change in one.changes] == [("q",)] and one.changes[0].explicit
    assert model_kit.ops(after).count("Mul") == 1
    mul = next(node for node in after.graph if node.op_type == "Mul")
    assert [node.name for node in mul.outputs[0].consumers()] == ["q"]
    plain = model_kit.sqnr(model, model_eight_bits(model), feeds)
    assert model_kit.sqnr(model, model_eight_bits(after), feeds) > plain + 3


def test_no_mul_unless_wanted(model_kit, post_norm, smoothed):
    model, _ = post_norm
    after, one = smoothed(model, explicit=False)
    assert one.changes == [] and model_kit.ops(after) == model_kit.ops(model)
    assert one.refused["q"]
    assert smoothed(model, explicit=["o"])[1].changes == []
    assert [change.readers for change in smoothed(model, explicit=["q"])[1].changes] == [("q",)]


def test_no_mul_for_little(post_norm, smoothed):
    model, _ = post_norm
    _, one = smoothed(model, worthy=60.0)
    assert one.changes == [] and "dB" in one.refused["q"]


def test_the_up_projection_takes_the_factors_of_the_down_projection(model_kit, build, smoothed, model_eight_bits):
    n, gain = model_kit.normal, outliers(np.random.default_rng(3), 40)
    model, feeds = build(
        "[gate] g0 = MatMul (x, G) s = Sigmoid (g0) [up] u = MatMul (x, U) m = Mul (s, u) [down] y = MatMul (m, D)",
        G=n(WIDTH, 40), U=n(WIDTH, 40, seed=1) * gain, D=n(40, 32) / gain[:, None],
    )  # fmt: skip
    after, one = smoothed(model)
    model_kit.same(model, after, feeds[:2])
    assert model_kit.ops(after) == model_kit.ops(model)
    assert ("down",) in [change.readers for change in one.changes]
    plain = model_kit.sqnr(model, model_eight_bits(model), feeds)
    assert model_kit.sqnr(model, model_eight_bits(after), feeds) > plain + 6


def test_layers_without_a_kernel_are_left(model_kit, norm):
    model, _ = norm
    target = model_kit.free()
    target.kernel = lambda node, scheme: Refusal("none")
    one = Smooth(target, target.scheme("int8"))
    assert not one(model).modified
    assert set(one.refused) == {"q", "k", "v"}


def test_products_that_stay_in_float_lose_their_mul(smoothed, build, model_kit):
    n, gain = model_kit.normal, outliers(np.random.default_rng(1), WIDTH)
    model, feeds = build(
        """n = LayerNormalization (x, g, b)
        [q] q0 = MatMul (n, Q) [k] k0 = MatMul (n, K) [v] v0 = MatMul (n, V)
        q1 = Tanh (q0) k1 = Tanh (k0) v1 = Tanh (v0) y = Sum (q1, k1, v1) z = Abs (n)""",
        head="(float[1,16,24] x) => (float[1,16,p] y, float[1,16,24] z)",
        g=gain, b=n(WIDTH) * gain, Q=n(WIDTH, 32) / gain[:, None] / 9, K=n(WIDTH, 32, seed=1) / gain[:, None] / 9,
        V=n(WIDTH, 32, seed=2) / gain[:, None] / 9,
    )  # fmt: skip
    after, _ = smoothed(model)
    assert model_kit.ops(after).count("Mul") == 1
    products = [node for node in after.graph if node.op_type == "MatMul"]
    target = model_kit.free()
    for node in products[1:]:
        node.meta[KERNEL] = target.kernel(node, target.scheme("int8"))
    # One of the three stays in float, and the Mul stays for the others.
    some = DropFactors()(after.clone()).model
    assert model_kit.ops(some).count("Mul") == 1
    assert [node.inputs[0].name for node in some.graph if node.op_type == "MatMul"].count("n") == 1
    model_kit.same(model, some, feeds[:2])
    for node in products:
        node.meta.pop(KERNEL, None)
    none = DropFactors()(after).model
    assert "Mul" not in model_kit.ops(none)
    assert "Q_scaled" not in none.graph.initializers
    model_kit.same(model, none, feeds[:2])
