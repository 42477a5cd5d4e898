"""Loud channels in float beside the codes of all others: the same function, where it pays, and what it gains."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes import common
from qgraph.passes.drop_factors import DropFactors
from qgraph.passes.set_aside import SetAside
from qgraph.passes.smooth import Smooth
from qgraph.passes.survey import Survey

from qgraph import audit, registry
from qgraph.calibration import CHANNELS, RUNS, SAMPLE
from qgraph.data import inputs_of, load
from qgraph.formats import INT8, UINT8
from qgraph.observers.run_ranges import RunRanges
from qgraph.pipeline import Context
from qgraph.qparams import fake_quantize, from_range
from qgraph.readers import Reader, in_runs
from qgraph.sensitivity import noise_of
from qgraph.sides import BESIDE, SIDE, loudest
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets import KERNEL, Form

WIDTH = 24
HEAD = "(float[1,16,24] x) => (float[1,16,24] y)"
BODY = {
    "product": "[q] q0 = MatMul (n, Q) q1 = Add (q0, b)",
    "bare": "[q] q1 = MatMul (n, Q)",
    "high": "[q] q0 = MatMul (n, Q) h = Add (q0, high) q1 = Reshape (h, to)",
    "gemm": "f = Reshape (n, flat) [q] q0 = Gemm <transB = 1> (f, Q, b) q1 = Reshape (q0, to)",
}


def loud(feeds):
    """Two channels speak in the first row alone, a hundred times as loud as all others."""
    for feed in feeds:
        feed["x"][:, 0, [3, 11]] = np.float32(400.0)
    return feeds


@pytest.fixture
def build(model_kit):
    """(a surveyed model whose product's input also goes elsewhere, its feeds); the kind is one of BODY."""

    def make(kind="product", quiet=False):
        n = model_kit.normal
        tail = " s = Tanh (q1) y = Add (s, n)"
        sizes = {"flat": np.array([16, WIDTH]), "to": np.array([1, 16, WIDTH])}
        weights = {"Q": n(WIDTH, WIDTH) / 9, "b": n(WIDTH), "high": n(1, 1, 1, WIDTH), **sizes}
        # Gelu hands no factor through.
        model = model_kit.text(f"g {HEAD} {{ n = Gelu (x) {BODY[kind]}{tail} }}", **weights)
        common.ShapeInferencePass()(model)
        feeds = model_kit.feeds(model, 24)
        feeds = feeds if quiet else loud(feeds)
        Survey(load(feeds, inputs_of(model)))(model)
        return model, feeds

    return make


@pytest.fixture
def planned(model_kit):
    """(a copy after Smooth, its target); what is set aside takes some share of a product's time."""

    def apply(model, share=0.0, **options):
        after, target = model.clone(), model_kit.free()
        target.quantize_cost, usual = (lambda value: share / 2), target.kernel
        target.kernel = lambda node, scheme: dataclasses.replace(usual(node, scheme), integer_seconds=1.0)
        Smooth(target, target.scheme("int8"), aside=True, **options)(after)
        return after, target

    return apply


@pytest.mark.parametrize("kind", BODY)
def test_the_same_function(model_kit, build, planned, kind):
    model, feeds = build(kind)
    after, target = planned(model)
    model_kit.same(model, after, feeds[:2])
    product = next(node for node in after.graph if node.name == "q")
    assert {3, 11} <= set(product.meta[SIDE].channels)
    assert 0.5 < product.meta[SIDE].left < 0.9, "rows count alike, and they speak in one of many"
    product.meta[KERNEL] = target.kernel(product, target.scheme("int8"))
    DropFactors()(after)
    before = [value.name for value in after.graph.outputs]
    assert SetAside(target)(after).modified
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    model_kit.same(model, after, feeds[:2])
    assert [value.name for value in after.graph.outputs] == before
    beside = [node for node in after.graph if BESIDE in node.meta]
    assert [node.op_type for node in beside] == ["Gather", "MatMul", "Add"]
    # What the codes are made of is zero there, and so is what it meets.
    factor = next(node for node in after.graph if node.op_type == "Mul")
    channels = beside[0].inputs[1].const_value.numpy()
    assert (factor.inputs[1].const_value.numpy()[channels] == 0).all()
    weight = product.inputs[1].const_value.numpy()
    rows = weight[:, channels] if kind == "gemm" else weight[channels]
    assert (rows == 0).all() and beside[1].inputs[1].shape.numpy() == (len(channels), WIDTH)
    assert not SetAside(target)(after).modified


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("kind", ["product", "bare", "gemm"])
def test_it_loses_less_and_runs_in_the_same_kernel(model_kit, build, tmp_path, kind, scheme):
    model, feeds = build(kind)
    target, data, found = model_kit.free(), load(feeds, inputs_of(model)), {}
    for smoothing in ("explicit", "aside"):
        one = model.clone()
        options = {"smoothing": smoothing, "choices": {"*": "float", "q": scheme}, "dynamic": {"q"}}
        context = Context(target, target.scheme("auto"), data, **options)
        for name in ("scale", "write"):
            registry.pipeline("assign")(context)(one) if name == "write" else None
            registry.pipeline(name)(context)(one)
        path = tmp_path / f"{smoothing}.onnx"
        ir.save(one, path)
        seen = audit.audit(path, audit.plan_of(one), target)
        assert seen.clean, seen.summary
        found[smoothing] = model_kit.sqnr(model, one, feeds)
        assert ("Gather" in model_kit.ops(one)) == (smoothing == "aside")
    assert found["aside"] > found["explicit"] + 6


def test_products_that_stay_in_float_read_what_they_read(model_kit, build, planned):
    model, _ = build()
    after, target = planned(model)
    DropFactors()(after)
    assert not SetAside(target)(after).modified
    assert model_kit.ops(after) == model_kit.ops(model)
    (weight,) = [value for value in after.graph.initializers.values() if "restored" in value.name]
    np.testing.assert_allclose(weight.const_value.numpy(), model_kit.tensors(model)["Q"], rtol=1e-6)


def test_two_products_of_which_one_stays_in_float(model_kit, planned):
    n = model_kit.normal
    text = """g (float[N,16,24] x) => (float[N,16,24] q1, float[N,16,24] y) {
        n = Gelu (x) [q] q1 = MatMul (n, Q) [k] k1 = MatMul (n, K) t = Tanh (k1) y = Add (t, n) }"""
    model = model_kit.text(text, Q=n(WIDTH, WIDTH) / 9, K=n(WIDTH, WIDTH, seed=1) / 9)
    common.ShapeInferencePass()(model)
    feeds = loud([{"x": n(1, 16, WIDTH, seed=i)} for i in range(24)])
    Survey(load(feeds, inputs_of(model)))(model)
    for names in (("q", "k"), ("q",), ("k",)):
        after, target = planned(model)
        for node in after.graph:
            if node.name in names:
                node.meta[KERNEL] = target.kernel(node, target.scheme("int8"))
        DropFactors()(after)
        SetAside(target)(after)
        assert model_kit.ops(after).count("Gather") == 1 and model_kit.ops(after).count("MatMul") == 2 + len(names)
        assert [value.name for value in after.graph.outputs] == ["q1", "y"]
        model_kit.same(model, after, feeds[:2])


@pytest.mark.parametrize("smoothing", ["explicit", "aside"])
def test_kernels_that_read_the_input_as_it_was_are_estimated_so(model_kit, build, smoothing):
    model, feeds = build()
    target = model_kit.free()
    context = Context(target, target.scheme("auto"), load(feeds, inputs_of(model)), smoothing=smoothing)
    before = next(node for node in model.graph if node.name == "q")
    usual = target.kernel(before, target.scheme("int8"))
    wanted = dataclasses.replace(usual, form=Form.WEIGHTS, activations={})
    expected = noise_of(before, wanted)
    registry.pipeline("scale")(context)(model)
    after = next(node for node in model.graph if node.name == "q")
    assert (SIDE in after.meta) == (smoothing == "aside")
    assert noise_of(after, wanted) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "scheme"), [("x86-vnni", "a8w4"), ("qnn", "int8"), ("wasm", "int8")])
def test_nothing_is_set_aside_where_weights_are_shrunk_or_the_target_does_not_say_so(build, name, scheme):
    model, feeds = build()
    target = registry.target(name)
    context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)), smoothing="aside")
    registry.pipeline("scale")(context)(model)
    assert not any(SIDE in node.meta for node in model.graph)


@pytest.mark.parametrize("width", [8, 9])
def test_a_few_of_a_few_channels_are_not_a_few(width):
    assert len(loudest(np.arange(width))) == (0 if width == 8 else 4)


def test_what_is_known_of_the_input_is_that_of_the_others(build, planned):
    after, _ = planned(build()[0])
    (node,) = [node for node in after.graph if SAMPLE in node.meta]
    channels = node.meta[SIDE].channels
    low, high = node.meta[CHANNELS]
    for known in (node.meta[SAMPLE], low, high, node.meta[RUNS]):
        assert (known[..., channels] == 0).all() and known.any()


def test_quiet_channels_stay(build, planned):
    after, _ = planned(build(quiet=True)[0], share=0.05)
    assert not any(SIDE in node.meta for node in after.graph)


def test_it_has_to_be_worth_its_time(build, planned):
    for share, taken in ((0.05, True), (5.0, False)):
        after, _ = planned(build()[0], share)
        assert any(node.op_type == "Mul" for node in after.graph)
        assert any(SIDE in node.meta for node in after.graph) == taken


def test_one_output_of_hundreds_that_has_the_error_is_seen(model_kit):
    weight = model_kit.normal(24, 385)
    weight[5, 201] = 90.0  # No regular choice of outputs meets it.
    model = model_kit.text("g (float[8, 24] x) => (float[8, 385] y) { [q] y = MatMul (x, W) }", W=weight)
    sample = model_kit.normal(128, 24)
    bounds = sample.min(axis=0), sample.max(axis=0)
    spec = QuantSpec(INT8, PerAxis(1), symmetric=True)
    errors = []
    for rest in (weight, np.where(np.arange(385) == 201, 0, weight).astype(np.float32)):
        model.graph.initializers["W"].const_value = ir.tensor(rest)
        reader = Reader(model.graph.node(0), sample, bounds, np.arange(24), None, spec, relative=False)
        errors.append(reader.error(np.ones(24)) * np.square(sample @ rest).sum())
        whole = np.square(sample @ (fake_quantize(rest, from_range(rest.min(0), rest.max(0), spec)) - rest)).sum()
        assert errors[-1] == pytest.approx(whole, rel=0.15), "as all of the outputs have it"
    assert errors[0] > 2 * errors[1]


# -- ranges that each run finds anew -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(0, 60))
def test_ranges_of_runs_do_not_depend_on_their_order(seeds, random, cut):
    runs = [np.random.default_rng(seed).standard_normal((1, 5, 3)).astype(np.float32) for seed in seeds]
    whole = RunRanges()
    for run in runs:
        whole.update(run)
    random.shuffle(runs)
    first, second = RunRanges(), RunRanges()
    for run in runs[:cut]:
        first.update(run)
    for run in runs[cut:]:
        second.update(run)
    first.merge(second)
    np.testing.assert_array_equal(first.ranges, whole.ranges)
    assert whole.ranges.shape[1:] == (2, 3) and len(whole.ranges) <= 28
    seen = {np.concatenate([run[0].min(axis=0), run[0].max(axis=0)]).tobytes() for run in runs}
    assert {one.tobytes() for one in whole.ranges} <= seen


def test_ranges_of_nothing_and_of_what_is_not_finite():
    found = RunRanges()
    found.update(np.zeros((0, 3), np.float32))
    found.update(np.full((4, 3), np.nan, np.float32))
    assert found.ranges is None


def test_rows_in_runs_are_as_the_runtime_rounds_them(model_kit):
    text = """g (float[4, 6] x) => (float[4, 6] y) {
        c, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (c, s, z) }"""
    model = model_kit.text(text)
    runs = [model_kit.normal(4, 6, seed=i, scale=2.0**i) for i in range(3)]
    wanted = np.stack([model_kit.run(model, {"x": run})["y"] for run in runs], axis=1).reshape(12, 6)
    lows, highs = (np.array([f(run) for run in runs]) for f in (np.min, np.max))
    found = in_runs(np.stack(runs, axis=1).reshape(12, 6), lows, highs, QuantSpec(UINT8))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert from_range(lows[0], highs[0], QuantSpec(UINT8)).scale < np.ptp(runs[0]) / 254
