"""FitRanges: ranges by the error behind the weights; nothing that others see is touched."""

import numpy as np
import pytest
from qgraph.passes import pipelines
from qgraph.passes.fit_ranges import FitRanges
from qgraph.passes.survey import Survey

from qgraph import passes
from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.qparams import fake_quantize
from qgraph.targets import QPARAMS
from qgraph.targets.qnn import qnn
from qgraph.targets.tensorrt import tensorrt


def fitted(kit, model, feeds, observer=None, convolutions=True, target=None, scheme="int8"):
    """{value: (QParams before, after)} of the planned model; the model."""
    target = target or kit.free()
    data = load(feeds, inputs_of(model))
    pipelines.plan(Context(target, target.scheme(scheme), data))(model)
    for one in (Survey(data), passes.InsertObservers(observer), passes.Calibrate(data)):
        one(model)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    before = {value: value.meta[QPARAMS] for value in values if QPARAMS in value.meta}
    assert not FitRanges(convolutions)(model).modified
    return {str(value.name): (params, value.meta[QPARAMS]) for value, params in before.items()}


def outliers(count, *shape, channel=3, size=60.0, seed=0, share=1.0):
    rng = np.random.default_rng(seed)
    feeds = []
    for number in range(count):
        x = rng.standard_normal(shape).astype(np.float32)
        place = (slice(None), channel) if len(shape) == 4 else (..., channel)
        if number < share * count:
            x[place] *= size
        feeds.append({"x": x})
    return feeds


def error(kit, text, feeds, params, **weights):
    """Share of the output's power that quantizing the input costs on the runtime; of rows, the mean of each one's."""
    model = kit.text(text, **weights)
    signals, noises = [], []
    for feed in feeds:
        exact = kit.run(model, feed)["y"].astype(np.float64)
        found = kit.run(model, {"x": fake_quantize(feed["x"], params)})["y"]
        signals.append(np.square(exact).sum(axis=-1))
        noises.append(np.square(exact - found).sum(axis=-1))
    signal, noise = np.concatenate(signals), np.concatenate(noises)
    return noise.sum() / signal.sum() if exact.ndim == 4 else (noise / signal).mean()


PRODUCT = "g (float[4, 16] x) => (float[4, 8] y) { y = MatMul (x, W) }"
CONV = "g (float[1, 6, 8, 8] x) => (float[1, 4, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1]> (x, W) }"


@pytest.mark.parametrize("text, shape, size", [(PRODUCT, (16, 8), (4, 16)), (CONV, (4, 6, 3, 3), (1, 6, 8, 8))])
@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_a_wide_channel_that_meets_small_weights_gets_clipped(model_kit, text, shape, size, observer):
    weight = model_kit.normal(*shape)
    if len(shape) == 2:
        weight[3] *= 1e-4
    else:
        weight[:, 3] *= 1e-4
    feeds = outliers(40, *size)
    before, after = fitted(model_kit, model_kit.text(text, W=weight), feeds, observer)["x"]
    assert after.range[1] < 0.5 * before.range[1]
    assert error(model_kit, text, feeds, after, W=weight) < 0.3 * error(model_kit, text, feeds, before, W=weight)


@pytest.mark.parametrize("text, shape, size", [(PRODUCT, (16, 8), (4, 16)), (CONV, (4, 6, 3, 3), (1, 6, 8, 8))])
def test_a_wide_channel_that_meets_large_weights_is_kept(model_kit, text, shape, size):
    weight = model_kit.normal(*shape)
    feeds = outliers(40, *size)
    before, after = fitted(model_kit, model_kit.text(text, W=weight), feeds, "minmax")["x"]
    assert after.range[1] > 0.6 * before.range[1]
    # A range is chosen for what is to come: it may be wider than these rows need, by what two halves of them differ.
    assert error(model_kit, text, feeds, after, W=weight) <= error(model_kit, text, feeds, before, W=weight) * 1.35
    fresh = outliers(400, *size, seed=1)
    assert error(model_kit, text, fresh, after, W=weight) <= error(model_kit, text, fresh, before, W=weight) * 1.25


def test_rare_large_values_outside_the_sample_are_not_forgotten(model_kit):
    """One value in ten thousand rows, which no sample of 256 need hold."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2500, 4, 16)).astype(np.float32)
    weight = model_kit.normal(16, 8)
    model = model_kit.text(PRODUCT, W=weight)
    plain = fitted(model_kit, model, [{"x": row} for row in rows[:200]], "minmax")["x"][1]
    rows[77, 2, 5] = 40.0
    model = model_kit.text(PRODUCT, W=weight)
    found = fitted(model_kit, model, [{"x": row} for row in rows[:200]], "minmax")["x"][1]
    (node,) = [node for node in model.graph if SAMPLE in node.meta]
    node.meta[SAMPLE] = node.meta[SAMPLE][np.abs(node.meta[SAMPLE]).max(axis=1) < 10]
    assert node.meta[CHANNELS][1][5] == 40.0
    FitRanges()(model)
    without = node.inputs[0].meta[QPARAMS]
    assert plain.range[1] < 6
    assert found.range[1] > 15 and without.range[1] > 15


def test_the_range_keeps_zero_where_a_relu_ends(model_kit):
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (r, V)
        }""",
        W=model_kit.normal(4, 4, 3, 3),
        V=model_kit.normal(4, 4, 3, 3) * np.float32([1, 1, 1e-4, 1]).reshape(1, 4, 1, 1),
    )
    for before, after in (fitted(model_kit, model, outliers(20, 1, 4, 8, 8, channel=2, size=9.0))["r"],):
        assert after.range[0] == before.range[0] == 0.0


def test_what_others_read_in_integers_stays(model_kit):
    n = model_kit.normal
    wide = n(4, 4, 3, 3)
    wide[:, 3] *= 1e-4
    model = model_kit.text(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 64] z) {
            a = Conv <pads = [1, 1, 1, 1]> (x, W)
            b = Conv <pads = [1, 1, 1, 1]> (a, W)
            s = Add (a, b)
            t = Conv <pads = [1, 1, 1, 1]> (s, W)
            y = Add (s, t)
            h = Reshape (x, shape)
            z = Sqrt (h)
        }""",
        W=wide,
        shape=np.int64([1, 4, 64]),
    )
    found = fitted(model_kit, model, outliers(20, 1, 4, 8, 8), "minmax")
    for name in ("a", "s", "y"):
        before, after = found[name]
        assert after is before, name


def test_the_order_of_the_data_changes_nothing(model_kit):
    weight = model_kit.normal(16, 8)
    weight[3] *= 1e-4
    feeds = outliers(30, 4, 16)
    ranges = [
        fitted(model_kit, model_kit.text(PRODUCT, W=weight), order)["x"][1].range for order in (feeds, feeds[::-1])
    ]
    assert ranges[0] == ranges[1]


def test_without_a_sample_nothing_changes(model_kit):
    model = model_kit.text(PRODUCT, W=model_kit.normal(16, 8))
    feeds = outliers(20, 4, 16)
    target = model_kit.free()
    data = load(feeds, inputs_of(model))
    pipelines.plan(Context(target, target.scheme("int8"), data))(model)
    for one in (passes.InsertObservers(), passes.Calibrate(data)):
        one(model)
    before = model.graph.inputs[0].meta[QPARAMS]
    FitRanges()(model)
    assert model.graph.inputs[0].meta[QPARAMS] is before


def test_convolutions_are_left_alone_by_default(model_kit):
    weight = model_kit.normal(4, 6, 3, 3)
    weight[:, 3] *= 1e-4
    feeds = outliers(20, 1, 6, 8, 8)
    before, after = fitted(model_kit, model_kit.text(CONV, W=weight), feeds, convolutions=False)["x"]
    assert after is before


@pytest.mark.parametrize("target, scheme", [(qnn(), "a16w8"), (tensorrt(), "fp8")])
def test_steps_that_are_fine_already_are_not_made_finer(model_kit, target, scheme):
    """Of 16 bits and of floats a narrower range would only clip; that of 8 bits is fitted."""
    text = "g (float[32, 32] x) => (float[32, 32] y) { a = MatMul (x, W)  y = Relu (a) }"
    model = model_kit.text(text, W=model_kit.normal(32, 32))
    feeds = outliers(8, 32, 32)
    found = fitted(model_kit, model.clone(), feeds, target=target, scheme=scheme)
    assert found and all(before is after for before, after in found.values())
    eight = fitted(model_kit, model.clone(), feeds, target=target)
    assert any(before is not after for before, after in eight.values())
