"""RoundWeights: codes with a smaller error behind the layer than the nearest ones, on the runtime."""

import numpy as np
import pytest
from qgraph.passes import pipelines
from qgraph.passes.calibrate_weights import WEIGHT
from qgraph.passes.round_weights import CODES, RoundWeights

from qgraph import passes, registry
from qgraph.calibration import STATISTICS
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.qparams import dequantize, fake_quantize
from qgraph.targets import QPARAMS


def related(count, *shape, seed=0):
    """Feeds whose channels (axis 1 of images, the last one of rows) go together."""
    rng = np.random.default_rng(seed)
    axis = 1 if len(shape) == 4 else -1
    mixer = np.eye(shape[axis]) + 0.7 * rng.standard_normal((shape[axis], shape[axis]))
    samples = [np.moveaxis(rng.standard_normal(shape), axis, -1) @ mixer for _ in range(count)]
    return [{"x": np.moveaxis(sample, -1, axis).astype(np.float32) + np.float32(0.5)} for sample in samples]


def rounded(kit, model, feeds, target=None, **options):
    """The model, calibrated and rounded; the pass."""
    target = target or kit.free()
    data = load(feeds, inputs_of(model))
    context = Context(target, target.scheme("int8"), data)
    pipelines.plan(context)(model)
    for one in (passes.InsertObservers(), passes.Calibrate(data), passes.CalibrateWeights()):
        one(model)
    rounding = RoundWeights(data, **options)
    rounding(model)
    return rounding


def behind(kit, text, feeds, params, weights):
    """Squared error of the outputs on quantized inputs, of each of the `weights` against the first."""
    inputs = [{"x": fake_quantize(feed["x"], params)} for feed in feeds]
    outputs = [[kit.run(kit.text(text, W=weight), feed)["y"] for feed in inputs] for weight in weights]
    return [
        sum(np.square(a - b, dtype=np.float64).sum() for a, b in zip(outputs[0], o, strict=True)) for o in outputs[1:]
    ]


LAYERS = {
    "product": ("g (float[4, 24] x) => (float[4, 10] y) { y = MatMul (x, W) }", (24, 10), (4, 24)),
    "gemm": ("g (float[4, 24] x) => (float[4, 10] y) { y = Gemm <transB = 1> (x, W) }", (10, 24), (4, 24)),
    "rows": ("g (float[1, 5, 24] x) => (float[1, 5, 10] y) { y = MatMul (x, W) }", (24, 10), (1, 5, 24)),
    "conv": (
        "g (float[1, 6, 9, 8] x) => (float[1, 4, 5, 8] y) { y = Conv <pads = [1, 0, 1, 2], strides = [2, 1]> (x, W) }",
        (4, 6, 3, 3),
        (1, 6, 9, 8),
    ),
    "groups": (
        "g (float[1, 6, 8, 8] x) => (float[1, 4, 6, 6] y) { y = Conv <group = 2> (x, W) }",
        (4, 3, 3, 3),
        (1, 6, 8, 8),
    ),
    "depthwise": (
        "g (float[1, 6, 8, 8] x) => (float[1, 6, 8, 8] y) { y = Conv <group = 6, pads = [1, 1, 1, 1]> (x, W) }",
        (6, 1, 3, 3),
        (1, 6, 8, 8),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_error_behind_the_layer_is_smaller(model_kit, name):
    text, shape, size = LAYERS[name]
    weight, data = model_kit.normal(*shape), related(48, *size)
    feeds, unseen = data[:24], data[24:]
    model = model_kit.text(text, W=weight)
    rounded(model_kit, model, feeds)
    (node,) = [node for node in model.graph if WEIGHT in node.meta]
    codes, params = node.meta[CODES], node.meta[WEIGHT]
    assert codes.dtype == np.int8 and codes.shape == shape
    found = dequantize(codes, params)
    scale = params.scale.reshape([-1 if i == params.axis else 1 for i in range(len(shape))])
    assert np.all(np.abs(found - weight) <= scale * 1.001), "one of the two codes next to the weight"
    assert np.any(found != fake_quantize(weight, params))
    inputs = node.inputs[0].meta[QPARAMS]
    weights = [weight, found, fake_quantize(weight, params)]
    for part in (feeds, unseen):
        new, nearest = behind(model_kit, text, part, inputs, weights)
        # The fewer inputs meet, the less there is to gain.
        assert new < {"depthwise": 0.98, "groups": 0.93}.get(name, 0.8) * nearest


def test_nothing_but_meta_is_changed(model_kit):
    text, shape, size = LAYERS["conv"]
    model = model_kit.text(text, W=model_kit.normal(*shape))
    rounded(model_kit, model, related(4, *size))
    model_kit.same(model_kit.text(text, W=model_kit.normal(*shape)), model)
    assert not [
        value for node in model.graph for value in (*node.inputs, *node.outputs) if value and STATISTICS in value.meta
    ]


TWO = """g (float[2, 16] x) => (float[2, 8] y, float[2, 12] z) {
    y = MatMul (x, V)
    z = MatMul (x, W)
}"""


def test_order_and_budget_change_no_code(model_kit):
    feeds = related(10, 2, 16)
    found = []
    for order, options in ((feeds, {}), (feeds[::-1], {}), (feeds, {"budget": 8 * 16 * 16})):
        model = model_kit.text(TWO, V=model_kit.normal(16, 8), W=model_kit.normal(16, 12))
        assert rounded(model_kit, model, order, **options).refused == {}
        found.append([node.meta[CODES].tobytes() for node in model.graph if CODES in node.meta])
    assert len(found[0]) == 2 and found[0] == found[1] == found[2]


def test_readers_of_one_value_share_a_pass_over_the_data(model_kit):
    runs = []
    model = model_kit.text(TWO, V=model_kit.normal(16, 8), W=model_kit.normal(16, 12))
    rounded(model_kit, model, related(10, 2, 16), progress=lambda *event: runs.append(event), budget=8 * 16 * 16)
    assert runs == [("rounding", i + 1, 10) for i in range(10)]


def test_a_layer_beyond_the_memory_is_left_with_a_reason(model_kit):
    model = model_kit.text(TWO, V=model_kit.normal(16, 8), W=model_kit.normal(16, 12))
    rounding = rounded(model_kit, model, related(4, 2, 16), budget=8 * 16 * 16 - 1)
    assert len(rounding.refused) == 2 and all("16 inputs" in why for why in rounding.refused.values())
    assert not [node for node in model.graph if CODES in node.meta]


def test_a_weight_shared_by_layers_with_other_inputs_stays_one(model_kit):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            a = MatMul (x, W)
            r = Relu (a)
            y = MatMul (r, W)
        }""",
        W=model_kit.normal(8, 8),
    )
    rounding = rounded(model_kit, model, related(4, 2, 8))
    assert len(rounding.refused) == 2
    assert not [node for node in model.graph if CODES in node.meta]


def test_seven_bits_stay_seven_bits(model_kit):
    from qgraph.formats import UINT8, Int

    target = type(model_kit.free())("free", "tests: seven bits", UINT8, Int(7))
    text, shape, size = LAYERS["product"]
    model = model_kit.text(text, W=model_kit.normal(*shape))
    rounded(model_kit, model, related(8, *size), target)
    (node,) = [node for node in model.graph if CODES in node.meta]
    assert node.meta[CODES].min() >= -64 and node.meta[CODES].max() <= 63


def test_nothing_to_round(model_kit):
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { y = Erf (x) }")
    assert not RoundWeights(load(model_kit.feeds(model), inputs_of(model)))(model).modified


def test_gains_with_codes_are_not_rounded_together(model_kit):
    """On targets that take whole graphs in integers a norm has a weight and ranges like a layer."""
    text = """g (float[8, 32] x) => (float[8, 16] y) {
        n = LayerNormalization (x, gain, offset) y = MatMul (n, W) }"""
    gain, offset = 1 + 0.1 * model_kit.normal(32), model_kit.normal(32, seed=1)
    model = model_kit.text(text, gain=gain, offset=offset, W=model_kit.normal(32, 16))
    feeds = [{"x": model_kit.normal(8, 32, seed=i)} for i in range(8)]
    target = registry.target("qnn")
    context = Context(target, target.scheme("int8"), load(feeds, inputs_of(model)), learn=True)
    after = registry.pipeline("quantize")(context)(model.clone()).model
    assert {"QuantizeLinear", "LayerNormalization", "MatMul"} <= {node.op_type for node in after.graph}
    for feed in feeds:
        exact, found = model_kit.run(model, feed)["y"], model_kit.run(after, feed)["y"]
        assert np.square(found - exact).sum() < 1e-2 * np.square(exact).sum()


def test_few_rows_leave_rows_that_are_still_to_come_better_than_the_nearest_codes(model_kit):
    text, inputs = "g (float[1, 5, 96] x) => (float[1, 5, 40] y) { p = MatMul (x, W) y = Add (p, B) }", 96
    weight, bias = model_kit.normal(inputs, 40), model_kit.normal(40, seed=1)
    feeds, unseen = (lambda data: (data[:16], data[16:]))(related(80, 1, 5, inputs))
    gains = []
    for about in (0.0, 3.0):  # Where the mean is large, codes need not care: the bias takes it.
        moved = [[{"x": feed["x"] + np.float32(about)} for feed in part] for part in (feeds, unseen)]
        model = model_kit.text(text, W=weight, B=bias)
        rounded(model_kit, model, moved[0])
        (node,) = [node for node in model.graph if WEIGHT in node.meta]
        errors = [dequantize(node.meta[CODES], node.meta[WEIGHT]), fake_quantize(weight, node.meta[WEIGHT])]
        mean = np.concatenate([feed["x"] for feed in moved[0]]).mean(axis=(0, 1))
        rows = np.concatenate([feed["x"] for feed in moved[1]]) - mean
        new, nearest = (np.square(rows @ (found - weight)).mean() for found in errors)
        gains.append(10 * np.log10(nearest / new))
    assert min(gains) > 1.5  # 80 rows of 96 inputs.
