"""What a review found about weights and reasons, and was mended: NaN, overflow, searches in squares, false words."""

import warnings

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import Annotate

import qgraph
from qgraph import ranking, registry, scaling
from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.data import inputs_of, load
from qgraph.errors import QuantizationError
from qgraph.feeds import Batch
from qgraph.pipeline import Context
from qgraph.rebalance import Rebalance
from qgraph.rounding import round_together
from qgraph.sensitivity import noise_of
from qgraph.tally import Tally
from qgraph.unfit import refusals

QUIET = {"bench_seconds": 0.0, "time_limit": 10.0}


# -- weights that are no numbers --------------------------------------------------------------------------------------


@pytest.fixture
def broken(model_kit):
    """Three products, the weight of the second with a NaN whose effect the model hides; and data."""
    n = model_kit.normal
    bad = n(128, 128, scale=0.1, seed=1)
    bad[3, 3] = np.nan
    model = model_kit.text(
        """g (float[N, 8, 128] x) => (float[N, 8, 8] y) {
            a = MatMul (x, A)
            r = Relu (a)
            s = MatMul (r, B)
            i = IsNaN (s)
            t = Where (i, z, s)
            y = MatMul (t, C)
        }""",
        A=n(128, 128, scale=0.1),
        B=bad,
        C=n(128, 8, scale=0.1),
        z=np.float32(0),
    )
    return model, [{"x": n(1, 8, 128, seed=seed)} for seed in range(8)]


@pytest.mark.parametrize("scheme", ["auto", "int8", "int8-dynamic", "int8-weights"])
@pytest.mark.parametrize("kept", [(), ("s_MatMul",)])
def test_a_weight_with_nan_keeps_its_layer_in_float_and_no_other(broken, model_free_cpu, scheme, kept):
    model, feeds = broken
    report = qgraph.optimize(model, None, data=feeds, scheme=scheme, keep_float=kept, max_loss="9%", **QUIET).report
    nodes = {node.name: node for node in report.nodes}
    assert nodes["a_MatMul"].kernel is not None and nodes["y_MatMul"].kernel is not None
    assert nodes["s_MatMul"].kernel is None
    assert nodes["s_MatMul"].reason == (
        "left in float by the option 's_MatMul'" if kept else "its weight holds NaN or infinity"
    )


def test_all_of_a_layer_without_a_scale_is_noise(broken, model_kit):
    model, feeds = broken
    target = model_kit.free()
    context = Context(target, target.scheme("auto"), load(feeds, inputs_of(model)))
    surveyed = registry.pipeline("survey")(context)(model).model
    annotate = Annotate(target, target.scheme("auto"))
    node = next(node for node in surveyed.graph if node.name == "s_MatMul")
    kernels = annotate.rules.kernels(node)[0]
    assert len(kernels) > 2 and {noise_of(node, kernel) for kernel in kernels.values()} == {1.0}
    assert refusals(surveyed, annotate.rules).keys() == {("s_MatMul", scheme) for scheme in kernels}
    work = Rebalance(surveyed.graph, target, target.scheme("int8"), (SAMPLE, CHANNELS))
    for group, readers in work.groups():
        work.fold(group, readers, 0.0)
    assert "NaN" in work.refused["s_MatMul"]


def test_infinite_bounds_are_refused_without_a_warning(model_kit):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[N, 64] x) => (float[N, 8] y) { a = MatMul (x, A) r = Relu (a) y = MatMul (r, B) }",
        A=n(64, 64, scale=0.1),
        B=n(64, 8, scale=0.1),
    )
    target = model_kit.free()
    context = Context(target, target.scheme("int8"), load(model_kit.feeds(model, 8), inputs_of(model)))
    main = registry.pipeline("survey")(context)(model).model.graph
    node = main[-1]
    low, high = node.meta[CHANNELS]
    high[0] = np.inf
    node.meta[CHANNELS] = low, high
    work = Rebalance(main, target, target.scheme("int8"), (SAMPLE, CHANNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group, readers in work.groups():
            assert not work.fold(group, readers, 0.0)
    assert "infinity" in work.refused[node.name]


# -- roundings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 130, -120])
def test_the_size_of_the_inputs_changes_no_code_and_overflows_nowhere(power):
    """Of inputs around 1e19 squares exceed float32."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 12)) @ rng.standard_normal((12, 12))
    moment = (rows.T @ rows)[None]
    weights = rng.standard_normal((1, 12, 5)) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = round_together(weights, np.ldexp(moment, power), -8, 7)
    np.testing.assert_array_equal(found, round_together(weights, moment, -8, 7))


# -- reasons ----------------------------------------------------------------------------------------------------------


def test_a_hurdle_is_looked_for_once_and_not_by_every_layer(model_kit, monkeypatch):
    count, w = 30, model_kit.normal(4, 4, 1, 1)
    body = "r0 = Conv (x, w) " + "".join(f"c{i} = Conv (r{i}, w) r{i + 1} = Add (r{i}, c{i}) " for i in range(count))
    text = f"g (float[1, 4, 2, 2] x) => (float[1, 4, 2, 2] y) {{ {body} y = Sigmoid (r{count}) }}"
    model = model_kit.text(text, w=w)
    target = model_kit.free()
    context = Context(target, target.scheme("int8"), load(model_kit.feeds(model, 2), inputs_of(model)))
    main = registry.pipeline("survey")(context)(model).model.graph
    layers = [node for node in main if node.op_type == "Conv"]
    expected = {node.name: scaling.hurdle(node) for node in layers}
    calls, hurdle = [], scaling.hurdle
    monkeypatch.setattr(scaling, "hurdle", lambda node: calls.append(node) or hurdle(node))
    work = Rebalance(main, target, target.scheme("int8"), (SAMPLE, CHANNELS))
    work.explain(layers)
    assert (
        len(calls) <= 1
        and work.refused == expected
        and set(expected.values()) > {"Sigmoid does not carry a factor through"}
    )


@pytest.mark.parametrize("price, reason", [(0.0, "gains only"), (3e-6, "loss of accuracy"), (2e-5, "more accuracy")])
def test_a_price_is_no_crossing(model_kit, price, reason):
    """What is left in float for its price must not be said to gain less than the way in and out costs."""
    model = model_kit.text("g (float[4, 64] x) => (float[4, 8] y) { y = MatMul (x, A) }", A=model_kit.normal(64, 8))
    annotate = Annotate(registry.target("cpu"), registry.target("cpu").scheme("int8"))
    kernel = annotate.rules.kernels(model.graph[0])[0]["int8"]
    kernel = type(kernel)(**{**vars(kernel), "float_seconds": 1e-5, "integer_seconds": 2e-6 + price, "price": price})
    found = annotate._worth(kernel)
    assert reason in found and ("way in and out costs" in found) == (price == 0)


def test_a_node_that_cannot_be_built_is_named(model_kit, model_free_cpu, tmp_path, monkeypatch):
    model = model_kit.text(
        "g (float[N, 64] x) => (float[N, 8] y) { [a] a = MatMul (x, A) [e] e = Erf (a) [y] y = MatMul (e, B) }",
        A=model_kit.normal(64, 64, scale=0.1),
        B=model_kit.normal(64, 8, scale=0.1),
    )
    ir.save(model, tmp_path / "m.onnx")
    from qgraph.builder import Builder

    build = Builder.build

    def failing(self, prices=None, **more):
        if prices is not None and prices.get(("a", "int8")) == -1.0:
            raise QuantizationError("no such kernel\nand more")
        return build(self, prices, **more)

    monkeypatch.setattr(Builder, "build", failing)
    found = {one.node: one for one in ranking.rank(tmp_path / "m.onnx", model_kit.feeds(model, 8), scheme="int8")}
    assert (found["a"].exact, found["a"].failed) == (False, "no such kernel")
    assert (found["y"].exact, found["y"].failed) == (True, "")


@pytest.mark.parametrize(("dtype", "shape", "near"), [("uint8", (1, 3, 8, 8), True), ("int64", (1, 8, 8), False)])
def test_pictures_are_measures_and_labels_are_not(dtype, shape, near):
    rng = np.random.default_rng(0)
    first = rng.integers(100, 200, shape).astype(dtype)
    tally = Tally()
    tally.add(first, first + first.dtype.type(1), Batch("run", {"x": np.zeros(1)}))
    assert (tally.result().cosine > 0.99) == near
