"""Center: what norms make lies around zero, and all that reads it makes up for that."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common
from qgraph.passes import Center, Survey

from qgraph.apart import APART
from qgraph.calibration import CHANNELS, RUNS, SAMPLE
from qgraph.data import inputs_of, load

WIDTH = 16
POST = """n = LayerNormalization (x, g, b)
    q0 = MatMul (n, Q) q = Add (q0, bq) k0 = MatMul (n, K) k = Add (bk, k0)
    t = Relu (q) u0 = MatMul (t, U) u = Add (u0, bu) s = Add (n, u) y = LayerNormalization (s, g, b)"""
"""As in BERT: products of a norm, and a sum with what comes of them."""


def numbers(kit, away=5.0):
    bias = kit.normal(WIDTH)
    bias[3] += away
    bias[9] -= away
    shapes = {"Q": (WIDTH, 32), "K": (WIDTH, 8), "U": (32, WIDTH), "bq": (32,), "bk": (8,), "bu": (WIDTH,)}
    others = {name: kit.normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    return {"g": np.abs(kit.normal(WIDTH, seed=9)) / 4, "b": bias, **others}


def surveyed(kit, body, outputs="float[1,6,16] y, float[1,6,8] k", count=12, given=None, **weights):
    used = {name: array for name, array in weights.items() if name in body}
    model = kit.text(f"g (float[1,6,{WIDTH}] x) => ({outputs}) {{ {body} }}", **used)
    return model, ready(kit, model, count, given)


def ready(kit, model, count=12, given=None):
    """Survey a model, in place; the data."""
    common.ShapeInferencePass()(model)
    data = kit.feeds(model, count) if given is None else given
    Survey(load(data, inputs_of(model)))(model)
    return data


def norm_range(kit, model, feeds):
    """The mean range of a run of the first norm, zero in it."""
    copy = model.clone()
    node = next(n for n in copy.graph if n.op_type == "LayerNormalization")
    if not node.outputs[0].is_graph_output():
        copy.graph.outputs.append(node.outputs[0])
    name = node.outputs[0].name
    results = [kit.run(copy, feed)[name] for feed in feeds]
    return np.mean([max(a.max(), 0) - min(a.min(), 0) for a in results])


@pytest.mark.parametrize("away", [2.0, 5.0])
def test_a_norm_that_is_also_added(model_kit, away):
    """The same numbers, by a smaller range."""
    model, feeds = surveyed(model_kit, POST, **numbers(model_kit, away))
    after = model.clone()
    one = Center()
    assert one(after).modified
    assert [change.gain > 1 for change in one.changes] == [True] and not one.refused
    model_kit.same(model, after, feeds, tolerance=2e-6)
    assert model_kit.ops(after) == model_kit.ops(model)
    found, before = norm_range(model_kit, after, feeds), norm_range(model_kit, model, feeds)
    assert found < 0.9 * before
    # What it said of the gain is what new runs say, more or less.
    new = model_kit.feeds(model, 20, seed=7)
    gain = 20 * np.log10(norm_range(model_kit, model, new) / norm_range(model_kit, after, new))
    assert gain == pytest.approx(one.changes[0].gain, abs=1.0)


@pytest.mark.parametrize(
    "body",
    [
        "n = LayerNormalization (x, g) q0 = MatMul (n, Q) y = Add (q0, bq)",
        "m = Relu (x) n = LayerNormalization (m, g, b) q0 = MatMul (n, Q) y = Add (q0, bq)",
        "n = LayerNormalization (x, g, b) z = Shape (n) q0 = MatMul (n, Q) y = Add (q0, bq)",
    ],
)
def test_norms_before_products(model_kit, body):
    """Without a bias of its own a norm gets one."""
    weights = numbers(model_kit)
    rng = np.random.default_rng(0)
    away = np.zeros(WIDTH, np.float32)
    away[2] = 6
    feeds = [{"x": (rng.standard_normal((1, 6, WIDTH)) + away).astype(np.float32)} for _ in range(12)]
    model, _ = surveyed(model_kit, body, "float[1,6,32] y", given=feeds, **weights)
    after = model.clone()
    assert Center()(after).modified
    model_kit.same(model, after, feeds, tolerance=2e-6)
    assert norm_range(model_kit, after, feeds) < norm_range(model_kit, model, feeds)


def test_gemm(model_kit):
    """Its bias may be its own, its weight turned, and nothing else may be asked of it."""
    weights = {**numbers(model_kit), "Q": model_kit.normal(32, WIDTH)}
    text = """g (float[6,16] x) => (float[6,32] y)
        {{ n = LayerNormalization (x, g, b) y = Gemm <transB = 1{more}> (n, Q, bq) }}"""
    for more, centered in (("", True), (", alpha = 0.5", False), (", beta = 2.0", False)):
        used = {name: weights[name] for name in ("g", "b", "Q", "bq")}
        model = model_kit.text(text.format(more=more), **used)
        feeds = ready(model_kit, model)
        after = model.clone()
        assert Center()(after).modified == centered
        model_kit.same(model, after, feeds, tolerance=2e-6)


def test_what_is_known_of_the_inputs_stays_right(model_kit):
    """Samples, bounds, runs and halves are those that a survey of the centered model would find."""
    model, feeds = surveyed(model_kit, POST, count=300, **numbers(model_kit))
    Center()(model)
    again = model.clone()
    for node in again.graph:
        for key in (SAMPLE, CHANNELS, RUNS, APART):
            node.meta.pop(key, None)
    Survey(load(feeds, inputs_of(model)))(again)
    names = [node.outputs[0].name for node in model.graph if SAMPLE in node.meta][:2]
    assert len(names) == 2
    for node, other in zip(model.graph, again.graph, strict=True):
        if node.outputs[0].name not in names:
            continue
        for bound, found in zip(node.meta[CHANNELS], other.meta[CHANNELS], strict=True):
            np.testing.assert_allclose(bound, found, atol=1e-5)
        for key in (SAMPLE, RUNS):
            # Which rows are kept goes by their bytes.
            assert node.meta[key].mean() == pytest.approx(other.meta[key].mean(), abs=0.05)
            assert node.meta[key].std() == pytest.approx(other.meta[key].std(), rel=0.2)
        one, two = node.meta[APART], other.meta[APART]
        for part in ("low", "high", "under", "over"):
            np.testing.assert_allclose(getattr(one, part), getattr(two, part), atol=1e-5)


@pytest.mark.parametrize(
    "body, outputs, why",
    [
        (POST, "float[1,6,16] y, float[1,6,16] n", "output of the model"),
        (
            "n = LayerNormalization (x, g, b) q0 = MatMul (n, Q) y = Relu (q0)",
            "float[1,6,32] y",
            "no bias",
        ),
        (
            "n = LayerNormalization (x, g, b) q0 = MatMul (n, Q) y = Add (q0, bq) z = Relu (n)",
            "float[1,6,32] y, float[1,6,16] z",
            "cannot make up",
        ),
        (
            "n = LayerNormalization (x, g, b) q0 = MatMul (n, Q) y = Add (q0, bq) z = Add (n, x)",
            "float[1,6,32] y, float[1,6,16] z",
            "nothing that it adds",
        ),
        (POST + " w = Relu (u)", "float[1,6,16] y, float[1,6,16] w", "nothing that it adds"),
    ],
)
def test_refusals(model_kit, body, outputs, why):
    """What reads the middles without a bias to make up for them; what a bias would be seen by."""
    model, _ = surveyed(model_kit, body, outputs, **numbers(model_kit))
    one = Center()
    assert not one(model).modified
    assert [why in reason for reason in one.refused.values()] == [True]


@pytest.mark.parametrize("more, centered", [("", True), ("<beta = 2.0>", False), ("<beta = 0.0>", False)])
def test_a_residual_by_a_gemm(model_kit, more, centered):
    """Its row makes up for the middles where it is added as it is."""
    text = f"""g (float[6,16] x) => (float[6,16] y, float[6,32] q)
        {{ n = LayerNormalization (x, g, b) q = Gemm (n, Q, bq) u = Gemm {more} (x, V, bu) y = Add (n, u) }}"""
    weights = {**numbers(model_kit), "V": model_kit.normal(WIDTH, WIDTH)}
    model = model_kit.text(text, **{name: weights[name] for name in ("g", "b", "Q", "bq", "V", "bu")})
    feeds = ready(model_kit, model)
    after = model.clone()
    assert Center()(after).modified == centered
    model_kit.same(model, after, feeds, tolerance=2e-6)


@pytest.mark.parametrize("shape", [(1,), (), (6, 16)])
def test_biases_of_norms_that_are_broadcast(model_kit, shape):
    """They are not seen to be rows."""
    body = "n = LayerNormalization (x, g, p) q0 = MatMul (n, Q) y = Add (q0, bq)"
    weights = {**numbers(model_kit), "p": np.ones(shape, np.float32)}
    model, _ = surveyed(model_kit, body, "float[1,6,32] y", **weights)
    one = Center()
    assert not one(model).modified
    assert ["not a constant row" in why for why in one.refused.values()] == [True]


def test_one_output_with_a_number_for_a_bias(model_kit):
    model = model_kit.text(
        "g (float[6,16] x) => (float[6,1] y) { n = LayerNormalization (x, g, b) y = Gemm (n, P, c) }",
        g=np.ones(WIDTH, np.float32),
        b=model_kit.normal(WIDTH),
        P=model_kit.normal(WIDTH, 1),
        c=np.array(1, np.float32),
    )
    ready(model_kit, model)
    assert not Center()(model).modified


def test_few_runs_and_little_gain(model_kit):
    """Middles are tested on runs that had no say in them."""
    model, _ = surveyed(model_kit, POST, count=3, **numbers(model_kit))
    few = Center()
    assert not few(model).modified and "too few" in "".join(few.refused.values())
    weights = {**numbers(model_kit), "b": np.zeros(WIDTH, np.float32)}
    model, _ = surveyed(model_kit, POST, count=40, **weights)
    none = Center(least=0.5)
    assert not none(model).modified and "would shrink by" in "".join(none.refused.values())


def test_a_bias_that_others_have_keeps_its_numbers(model_kit):
    """One initializer for several layers, as exporters write equal rows."""
    weights = numbers(model_kit)
    body = POST.replace("bu)", "b)")
    model, feeds = surveyed(model_kit, body, **weights)
    after = model.clone()
    assert Center()(after).modified
    assert after.graph[0].inputs[2].name == "b_centered" and after.graph[-1].inputs[2].name == "b"
    np.testing.assert_array_equal(after.graph.initializers["b"].const_value.numpy(), weights["b"])
    model_kit.same(model, after, feeds, tolerance=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=WIDTH, max_size=WIDTH))
def test_any_bias(model_kit, bias):
    """The float model computes the same, wherever the channels lie."""
    weights = {**numbers(model_kit), "b": np.array(bias, np.float32)}
    model, feeds = surveyed(model_kit, POST, count=6, **weights)
    after = model.clone()
    Center()(after)
    model_kit.same(model, after, feeds, tolerance=2e-5)


def test_ranges_of_runs_are_those_of_hidden_positions_too(model_kit):
    """What the runtime finds is the range of a whole tensor; errors there mean nothing, so samples leave them out."""
    model = model_kit.text(
        """g (float[2,6,16] x, int64[2,6] attention_mask) => (float[2,6,32] y, float[2,6] m)
        { n = Relu (x) y = MatMul (n, Q) m = Cast <to = 1> (attention_mask) }""",
        Q=model_kit.normal(16, 32),
    )
    common.ShapeInferencePass()(model)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    feeds = []
    for feed in model_kit.feeds(model, 8):
        loud = feed["x"].copy()
        loud[..., 5] += np.where(mask == 0, 40, 0)
        feeds.append({"x": loud, "attention_mask": mask})
    Survey(load(feeds, inputs_of(model)))(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert product.meta[RUNS][:, 1, 5].min() > 30 and product.meta[RUNS][:, 1, 4].max() < 10
    assert len(product.meta[RUNS]) <= 8, "a batch is a run, whatever is hidden in it"
    assert product.meta[CHANNELS][1].max() < 10 and product.meta[SAMPLE].max() < 10
