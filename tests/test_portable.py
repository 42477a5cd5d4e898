"""Portable: after it, sums, products and means of codes are the exact ones, on the runtime and in fixed point."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import pipelines
from qgraph.passes.annotate import GROUP
from qgraph.passes.portable import Portable, apart, product_error, sum_error

from qgraph import passes
from qgraph.data import inputs_of, load
from qgraph.formats import INT8, UINT8
from qgraph.pipeline import Context
from qgraph.qparams import QParams
from qgraph.runners import RUNNERS
from qgraph.spec import QuantSpec
from qgraph.targets import KERNEL, QPARAMS, SPEC, Kernel

SUM = "g (float[65536] a, float[65536] b) => (float[65536] c) { c = Add (a, b) }"
PRODUCT = SUM.replace("Add", "Mul")
FORMATS = {"s8": INT8, "u8": UINT8}


def planned(kit, text, **given):
    """A model whose values have (scale, zero point, format), as after calibration."""
    model = kit.text(text)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        scale, zero, form = given[value.name]
        value.meta[SPEC] = QuantSpec(form)
        value.meta[QPARAMS] = QParams(np.float32(scale).reshape(()), np.float64(zero).reshape(()), form)
    for node in model.graph:
        node.meta[KERNEL] = Kernel(("any",), {i: QuantSpec(INT8) for i in range(len(node.inputs))})
    return model, {value.name: value for value in values}


def pairs(form):
    """All pairs of codes."""
    codes = np.arange(form.lowest, form.highest + 1)
    return (grid.reshape(-1) for grid in np.meshgrid(codes, codes))


def kernel(operator, params, first, second):
    """The runtime's own kernel on codes."""
    (a, b, c), storage = params, params[0].format.storage
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="k"), ir_version=10)
    arrays = {"a": first, "b": second}
    ins = [ir.val(name, storage, [len(first)]) for name in arrays]
    model.graph.inputs.extend(ins)

    def constant(name, array, dtype):
        value = ir.val(name, const_value=ir.Tensor(np.asarray(array, dtype.numpy()), name=name))
        model.graph.register_initializer(value)
        return value

    tail = {}
    for name, one in zip("abc", (a, b, c), strict=True):
        scale = constant(f"{name}s", one.scale, ir.DataType.FLOAT)
        tail[name] = [scale, constant(f"{name}z", one.zero_point, storage)]
    node = ir.node(operator, [ins[0], *tail["a"], ins[1], *tail["b"], *tail["c"]], domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "c", ir.TensorType(storage)
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    return model, {name: np.asarray(array, storage.numpy()) for name, array in arrays.items()}


def fixed_point(params, first, second):
    """A sum as arm64's kernel has it: factors of 22 bits, ties away from zero."""
    a, b, c = params
    one, two = np.float32(a.scale / c.scale), np.float32(b.scale / c.scale)
    shift = 21 - int(np.floor(np.log2(max(one, two))))
    factors = [int(np.rint(np.float64(ratio) * 2.0**shift)) for ratio in (one, two)]
    total = (first - int(a.zero_point)) * factors[0] + (second - int(b.zero_point)) * factors[1]
    total = np.sign(total) * ((np.abs(total) + (1 << (shift - 1))) >> shift)
    return np.clip(total + int(c.zero_point), c.format.lowest, c.format.highest).astype(int)


def exact(numerators, denominator, c):
    """numerators / denominator rounded to the nearest code; none may lie in the middle of two."""
    assert denominator % 2 == 1
    nearest = (2 * numerators + denominator) // (2 * denominator)
    return np.clip(nearest + int(c.zero_point), c.format.lowest, c.format.highest)


def ratio(number, largest=1 << 16):
    """(p, q) with q odd, so small that no other could be meant."""
    for q in range(1, largest, 2):
        p = round(number * q)
        if abs(p / q - number) < 4e-7 * number:
            return p, q
    raise AssertionError(f"{number} is no fraction")


scales = st.floats(-8, 2).map(lambda x: float(np.float32(2.0**x)))
share = st.floats(0.1, 1.0)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(st.data(), st.sampled_from(list(FORMATS.values())), scales, share, st.floats(0.6, 2.0))
def test_sums_are_exact_on_either_machine(model_kit, data, form, scale, smaller, grown):
    zero = st.integers(int(form.lowest), int(form.highest))
    given = {"a": scale, "b": scale * smaller, "c": scale * grown}
    model, values = planned(model_kit, SUM, **{n: (s, data.draw(zero), form) for n, s in given.items()})
    found = Portable()
    assert not found(model).modified
    assert not found.refused
    a, b, c = params = [values[name].meta[QPARAMS] for name in "abc"]
    for name, before in given.items():
        assert float(values[name].meta[QPARAMS].scale) == pytest.approx(before, rel=0.04)
    first, second = pairs(form)
    # All three are multiples of one unit: find it by the ratios.
    (p, q), (r, s) = ratio(float(a.scale) / float(c.scale)), ratio(float(b.scale) / float(c.scale))
    common = np.lcm(q, s)
    terms = (first - int(a.zero_point)) * (p * common // q) + (second - int(b.zero_point)) * (r * common // s)
    wanted = exact(terms.astype(np.int64), int(common), c)
    np.testing.assert_array_equal(fixed_point(params, first.astype(int), second.astype(int)), wanted)
    np.testing.assert_array_equal(model_kit.run(*kernel("QLinearAdd", params, first, second))["c"], wanted)


def test_without_it_sums_do_differ(model_kit):
    """The fixed point of this file is not the runtime's floats: else the test above would prove nothing."""
    rng, differing = np.random.default_rng(0), 0
    first, second = pairs(INT8)
    for _ in range(20):
        made = [
            QParams(np.float32(s).reshape(()), np.float64(z).reshape(()), INT8)
            for s, z in zip(rng.uniform(0.01, 0.02, 3), rng.integers(-128, 128, 3), strict=True)
        ]
        floats = model_kit.run(*kernel("QLinearAdd", made, first, second))["c"]
        differing += int((fixed_point(made, first.astype(int), second.astype(int)) != floats).sum())
    assert differing > 0


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(st.data(), st.sampled_from(list(FORMATS.values())), scales, scales, st.floats(40, 250))
def test_products_are_exact(model_kit, data, form, one, two, steps):
    zero = st.integers(int(form.lowest), int(form.highest))
    given = {"a": one, "b": two, "c": one * two * steps}
    model, values = planned(model_kit, PRODUCT, **{n: (s, data.draw(zero), form) for n, s in given.items()})
    hypothesis.assume(values["c"].meta[QPARAMS].zero_point != 0)
    found = Portable()
    found(model)
    assert not found.refused
    a, b, c = params = [values[name].meta[QPARAMS] for name in "abc"]
    assert (float(a.scale), float(b.scale)) == pytest.approx((one, two), rel=1e-7)
    assert float(c.scale) == pytest.approx(given["c"], rel=1 / 256)
    p, q = ratio(float(a.scale) * float(b.scale) / float(c.scale))
    first, second = pairs(form)
    terms = ((first - int(a.zero_point)) * (second - int(b.zero_point))).astype(np.int64) * p
    found_codes = model_kit.run(*kernel("QLinearMul", params, first, second))["c"]
    np.testing.assert_array_equal(found_codes, exact(terms, q, c))


def test_the_products_that_are_rounded_once_stay(model_kit):
    given = {"a": (0.013, 5, INT8), "b": (0.017, -9, INT8), "c": (0.021, 0, INT8)}
    model, values = planned(model_kit, PRODUCT, **given)
    Portable()(model)
    assert [float(values[n].meta[QPARAMS].scale) for n in "abc"] == [np.float32(given[n][0]) for n in "abc"]


def test_a_mean_has_an_odd_denominator(model_kit):
    text = "g (float[1, 4, 6, 6] a) => (float[1, 4, 1, 1] c) { c = GlobalAveragePool (a) }"
    model, values = planned(model_kit, text, a=(0.05, 3, INT8), c=(0.0371, -20, INT8))
    Portable()(model)
    c = values["c"].meta[QPARAMS]
    p, q = ratio(0.05 / 36 / float(c.scale))
    assert q % 2 == 1
    assert apart(q, product_error(c))
    assert float(c.scale) == pytest.approx(0.0371, rel=1 / 256)
    assert p & (p - 1) == 0  # a power of two has no factor in common with q


def test_sums_in_a_chain_share_one_unit(model_kit):
    text = "g (float[8] a, float[8] b, float[8] d) => (float[8] e) { c = Add (a, b)\n e = Add (c, d) }"
    given = dict(zip("abcde", (0.011, 0.0071, 0.0133, 0.0057, 0.0213), strict=True))
    model, values = planned(model_kit, text, **{name: (scale, 0, INT8) for name, scale in given.items()})
    Portable()(model)
    params = {name: values[name].meta[QPARAMS] for name in given}
    for left, right, result in ("abc", "cde"):
        denominators = [ratio(float(params[one].scale) / float(params[result].scale))[1] for one in (left, right)]
        error = sum_error(params[left], params[right], params[result])
        assert apart(int(np.lcm(*denominators)), error)


def test_what_shares_a_range_changes_together(model_kit):
    text = "g (float[8] a, float[8] b) => (float[8] c, float[2, 4] d) { c = Add (a, b)\n d = Reshape (c, S) }"
    model = model_kit.text(text, S=np.array([2, 4]))
    for value, scale in zip([*model.graph.inputs, *(n.outputs[0] for n in model.graph)], (1, 2, 3.3, 3.3), strict=True):
        value.meta[SPEC] = QuantSpec(INT8)
        value.meta[QPARAMS] = QParams(np.float32(scale).reshape(()), np.float64(0).reshape(()), INT8)
        if value.name in "cd":
            value.meta[GROUP] = "c"
    for node in model.graph:
        node.meta[KERNEL] = Kernel(("any",), {0: QuantSpec(INT8)})
    Portable()(model)
    c, d = (node.outputs[0].meta[QPARAMS] for node in model.graph)
    assert float(c.scale) == float(d.scale) != np.float32(3.3)


def test_refusals_are_told(model_kit):
    far = {"a": (1.0, 0, INT8), "b": (1e-4, 0, INT8), "c": (1.0, 0, INT8)}
    model, values = planned(model_kit, SUM, **far)
    found = Portable()
    found(model)
    (reason,) = found.refused.values()
    assert "too far apart" in reason
    assert [float(values[n].meta[QPARAMS].scale) for n in "abc"] == [np.float32(far[n][0]) for n in "abc"]
    model, values = planned(model_kit, SUM, **dict.fromkeys("abc", (0.1, 0, INT8)))
    values["c"].meta[SPEC] = QuantSpec(INT8, range=(0.0, 1.0))
    found(model)
    (reason,) = found.refused.values()
    assert "fixed" in reason


BLOCK = (
    "g (float[2, 8, 9, 9] x) => (float[2, 8, 9, 9] y) "
    "{ h = Conv <pads = [1, 1, 1, 1]> (x, W)\n s = Add (x, h)\n "
    "k = Conv <pads = [1, 1, 1, 1]> (s, V)\n y = Add (s, k) }"
)


def block(kit, target, portable):
    """A residual block in integers."""
    rng = np.random.default_rng(3)
    weights = {name: (rng.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32) for name in "WV"}
    model = kit.text(BLOCK, **weights)
    data = load(kit.feeds(model, 4), inputs_of(model))
    pipelines.plan(Context(target, target.scheme("int8"), data))(model)
    steps = [passes.InsertObservers(), passes.Calibrate(data), *([Portable()] if portable else [])]
    for one in (*steps, passes.CalibrateWeights(), passes.InsertQDQ(target), passes.FoldWeights()):
        one(model)
    return kit.text(BLOCK, **weights), model


def test_it_costs_no_accuracy(model_kit):
    found = {}
    for portable in (False, True):
        original, model = block(model_kit, model_kit.free(), portable)
        found[portable] = model_kit.sqnr(original, model, model_kit.feeds(original, 4, seed=5))
    assert found[True] > 30
    assert found[True] == pytest.approx(found[False], abs=0.5)


@pytest.mark.skipif(RUNNERS["arm64"].missing is not None, reason="no arm64 here")
def test_the_same_bits_on_arm64(model_kit, tmp_path):
    original, model = block(model_kit, model_kit.free(), True)
    feeds = model_kit.feeds(original, 8, seed=6)
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    for feed, there in zip(feeds, RUNNERS["arm64"].run(path, feeds).outputs, strict=True):
        np.testing.assert_array_equal(model_kit.run(model, feed)["y"], there["y"])
