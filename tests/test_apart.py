"""Ranges and factors are tested on the half of the data that they were not made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes import common
from qgraph.passes import pipelines
from qgraph.passes.fit_ranges import FitRanges
from qgraph.passes.smooth import Smooth
from qgraph.passes.survey import Survey

import qgraph
from qgraph import passes, pricing, sensitivity
from qgraph.apart import APART, LEAST, Apart
from qgraph.calibration import CHANNELS
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.qparams import fake_quantize
from qgraph.rules import Rules
from qgraph.targets import QPARAMS

WIDTH = 64
TEXT = f"g (float[1, 32, {WIDTH}] x) => (float[1, 32, 16] y) {{ n = Mul (x, g) y = MatMul (n, W) }}"


def samples(count, seed):
    """Rows of one sample are alike, and of another sample different: the mean of a sample's tokens, as attention's."""
    rng = np.random.default_rng(seed)
    each = rng.standard_t(4, (count, 1, WIDTH)) + 0.1 * rng.standard_normal((count, 32, WIDTH))
    return [{"x": one[None].astype(np.float32)} for one in each]


@pytest.fixture
def surveyed(model_kit):
    def make(feeds, text=TEXT):
        weights = {"g": np.ones(WIDTH, np.float32), "W": model_kit.normal(WIDTH, 16)}
        model = model_kit.text(text, **weights)
        data = load(feeds, inputs_of(model))
        target = model_kit.free()
        pipelines.plan(Context(target, target.scheme("int8"), data))(model)
        Survey(data)(model)
        return model, data, target

    return make


def product(model):
    return next(node for node in model.graph if node.op_type == "MatMul")


def test_halves_are_of_different_samples_and_together_all_the_data(surveyed):
    model, _, _ = surveyed(samples(16, 0))
    node = product(model)
    half: Apart = node.meta[APART]
    low, high = node.meta[CHANNELS]
    np.testing.assert_array_equal(np.minimum(half.low, half.under), low)
    np.testing.assert_array_equal(np.maximum(half.high, half.over), high)
    assert (half.rows >= half.under).all() and (half.rows <= half.over).all()
    assert not (half.rows <= half.high).all(), "the other half goes beyond what the first has shown"
    assert half.share == len(half.rows) / (8 * 32)


@given(order=st.permutations(range(16)))
def test_the_order_of_the_data_changes_no_half(model_kit, order):
    feeds = samples(16, 0)
    found = []
    for one in (feeds, [feeds[i] for i in order]):
        model = model_kit.text(TEXT, g=np.ones(WIDTH, np.float32), W=model_kit.normal(WIDTH, 16))
        common.ShapeInferencePass()(model)
        Survey(load(one, inputs_of(model)))(model)
        half = product(model).meta[APART]
        found.append([array.tobytes() for array in (half.low, half.over, half.rows)])
    assert found[0] == found[1]


@pytest.mark.parametrize("count, rows", [(3, 32), (16, 2)])
def test_too_little_data_is_not_halved(model_kit, count, rows):
    text = TEXT.replace("32,", f"{rows},")
    model = model_kit.text(text, g=np.ones(WIDTH, np.float32), W=model_kit.normal(WIDTH, 16))
    common.ShapeInferencePass()(model)
    feeds = [{"x": one["x"][:, :rows]} for one in samples(count, 0)]
    Survey(load(feeds, inputs_of(model)))(model)
    assert APART not in product(model).meta and CHANNELS in product(model).meta
    assert count < 4 or count / 2 * rows < LEAST


def loss(model, data, target, fresh, gain):
    """Of the product on data that nothing was chosen by, in dB: power of what rounding its input adds."""
    Smooth(target, target.scheme("int8"))(model)
    for one in (passes.InsertObservers("minmax"), passes.Calibrate(data), FitRanges()):
        one(model)
    node = product(model)
    params = node.inputs[0].meta[QPARAMS]
    scale, weight = (model.graph.initializers[v.name].const_value.numpy() for v in (gain(model), node.inputs[1]))
    rows = np.concatenate([feed["x"].reshape(-1, WIDTH) for feed in fresh]) * scale
    exact = rows @ weight
    noise = (fake_quantize(rows, params) - rows) @ weight
    return 10 * np.log10(np.square(noise, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum())


def test_what_holds_for_the_other_half_holds_for_new_data(surveyed):
    """Fitted to all samples at once, every channel's largest value is just within, and new ones are cut."""
    fresh = samples(200, 1)
    found = {}
    for halved in (True, False):
        model, data, target = surveyed(samples(16, 0))
        if not halved:
            del product(model).meta[APART]
        found[halved] = loss(model, data, target, fresh, lambda m: m.graph[0].inputs[1])
    assert found[True] < found[False] - 2.0, found


def test_factors_scale_both_halves():
    rng = np.random.default_rng(0)
    one = Apart(*(rng.standard_normal(4).astype(np.float32) for _ in range(4)), np.ones((5, 4), np.float32), 0.5)
    factor = np.array([1.0, 2.0, 4.0, 0.5])
    after = one.scaled(factor)
    np.testing.assert_allclose(after.low * factor, one.low, rtol=1e-6)
    np.testing.assert_allclose(after.rows * factor, one.rows)
    assert after.share == 0.5


def test_estimates_tell_what_is_rounded_only_to_be_moved(model_kit):
    text = """g (float[1, 32, 64] x) => (float[1, 16, 32] y) {
        m = MatMul (x, W) t = Transpose <perm = [0, 2, 1]> (m) r = Relu (t) y = Sum (r) }"""
    model = model_kit.text(text, W=model_kit.normal(64, 16))
    target = model_kit.free()
    data = load(samples(16, 0), inputs_of(model))
    pipelines.plan(Context(target, target.scheme("int8"), data))(model)
    Survey(data)(model)
    rules = Rules(target, target.scheme("int8"), {}, {}, {}, calibrated=True)
    (noise,) = [one.noise for one in sensitivity.estimates(model, rules) if one.op_type == "Transpose"]
    node = product(model)
    output = np.concatenate([feed.feeds["x"].reshape(-1, 64) for feed in data]) @ node.inputs[1].const_value.numpy()
    step = (output.max() - output.min()) / 255
    assert 0.3 < noise / (step**2 / 12 / np.square(output).mean()) < 1.2, "of the sample, which lacks extremes"
    learned = {one.node: one.noise for one in sensitivity.estimates(model, rules, learned=True)}
    plain = {one.node: one.noise for one in sensitivity.estimates(model, rules)}
    assert all(learned[node] <= plain[node] for node in plain) and learned != plain


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.001, 1)), min_size=1, max_size=8),
    st.floats(0.1, 1.0),
)
def test_the_highest_price_keeps_what_must_be_saved(pairs, share):
    saved = {(f"n{i}", "int8"): gain for i, (gain, _) in enumerate(pairs)}
    noise = {(f"n{i}", "int8"): lost for i, (_, lost) in enumerate(pairs)}

    def best(prices):
        return {node: scheme for (node, scheme), gain in saved.items() if gain > prices.get((node, scheme), 0.0)}

    def total(assignment):
        return sum(saved[pair] for pair in assignment.items())

    tariff = pricing.Tariff(best, lambda: noise, total)
    everything = sum(saved.values())
    price = pricing.highest(share * everything, everything / sum(noise.values()), tariff.saved_at)
    assert price is None or tariff.saved_at(price) >= share * everything
    assert price is None or tariff.noise_at(price) <= tariff.noise_at(0.0)


def test_ranges_that_are_saved_give_the_same_file_when_given_back(model_kit, model_free_cpu, tmp_path):
    """The data has enough rows in each half that ranges would be fitted to them."""
    model = model_kit.text(
        f"g (float[1, 32, {WIDTH}] x) => (float[1, 32, 64] y) {{ y = MatMul (x, W) }}", W=model_kit.normal(WIDTH, 64)
    )
    job = {"data": samples(16, 0), "scheme": "int8", "bench_seconds": 0, "force": True}
    qgraph.optimize(model, tmp_path / "a", save_ranges=tmp_path / "ranges.npz", **job)
    qgraph.optimize(model, tmp_path / "b", ranges=tmp_path / "ranges.npz", **job)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    qgraph.optimize(model, tmp_path / "c", **job)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
