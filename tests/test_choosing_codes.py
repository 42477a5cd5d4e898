"""Constants of nodes that only choose: codes in the output's scale, which choose the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import registry
from qgraph.data import inputs_of, load
from qgraph.formats import INT8, UINT8, UINT16
from qgraph.pipeline import Context
from qgraph.qparams import fake_quantize, from_range
from qgraph.spec import QuantSpec
from qgraph.targets.qnn import qnn

Q, DQ = "QuantizeLinear", "DequantizeLinear"
PICKED = "g (int64[1, 6] i) => (float[1, 6, 4] y) { e = Gather (T, i)  y = MatMul (e, W) }"
NUMBERS = st.floats(-50, 50, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=8), NUMBERS, NUMBERS, NUMBERS, st.sampled_from([INT8, UINT8, UINT16]))
def test_rounding_keeps_an_order(values, constant, low, high, fmt):
    params = from_range(min(low, high), max(low, high), QuantSpec(fmt))
    x, c = np.array(values, np.float32), np.array(constant, np.float32)
    for choose in (np.maximum, np.minimum):
        expected = fake_quantize(choose(x, c), params)
        np.testing.assert_array_equal(choose(fake_quantize(x, params), fake_quantize(c, params)), expected)


def written(model, feeds, scheme):
    target = qnn()
    context = Context(target, target.scheme(scheme), load(feeds, inputs_of(model)))
    return registry.pipeline("quantize")(context)(model.clone()).model


def rows(first, end):
    """Feeds of places in a table."""
    return [{"i": np.random.default_rng(seed).integers(first, end, (1, 6))} for seed in range(8)]


def scales(node):
    """Of what it reads and of what it writes."""
    read = [v.producer().inputs[1] for v in node.inputs if v.producer() is not None]
    return [float(v.const_value.numpy()) for v in (*read, node.outputs[0].consumers()[0].inputs[1])]


@pytest.mark.parametrize("scheme", ["int8", "a16w8"])
@pytest.mark.parametrize("op, constant", [("Max", 0.0), ("Min", 1e9), ("Max", -0.25)])
def test_a_bound_far_from_the_numbers(model_kit, op, constant, scheme):
    """In a scale of its own, 0 and 1e9 are codes that QNN's HTP takes for something else beside 16 bits."""
    model = model_kit.text(
        f"g (float[4, 8] x) => (float[4, 8] y) {{ a = Neg (x)  m = {op} (a, c)  y = Sqrt (m) }}",
        c=np.float32(constant),
    )
    feeds = [{"x": -np.abs(model_kit.normal(4, 8, seed=i)) / 1000} for i in range(8)]
    done = written(model, feeds, scheme)
    node = next(one for one in done.graph if one.op_type == op)
    constant_scale = scales(node)[1]
    assert constant_scale == scales(node)[-1] < 1e-4
    assert model_kit.sqnr(model, done, feeds) > (25 if scheme == "int8" else 55)


def test_a_table_covers_rows_that_were_not_seen(model_kit):
    table = model_kit.normal(50, 8)
    table[40:] *= 20
    model = model_kit.text(PICKED, T=table, W=model_kit.normal(8, 4))
    feeds = rows(0, 40)
    done = written(model, feeds, "a16w8")
    assert not [
        v for v in done.graph.initializers.values() if v.const_value.size == table.size and v.dtype.is_floating_point()
    ]
    gather = next(node for node in done.graph if node.op_type == "Gather")
    assert scales(gather)[0] == scales(gather)[-1] == pytest.approx((table.max() - table.min()) / 65535)
    assert model_kit.sqnr(model, done, feeds) > 38


def test_a_table_with_what_is_no_number_stays(model_kit):
    table = model_kit.normal(50, 8)
    table[3, 3] = np.inf
    model = model_kit.text(PICKED, T=table, W=model_kit.normal(8, 4))
    feeds = rows(10, 40)
    done = written(model, feeds, "int8")
    gather = next(node for node in done.graph if node.op_type == "Gather")
    assert gather.inputs[0].producer() is None
    assert model_kit.sqnr(model, done, feeds) > 25


@pytest.mark.parametrize("scheme", ["int8", "a16w8"])
def test_one_constant_of_two_outputs(model_kit, scheme):
    """Their scales are equal, and their zero points are not."""
    model = model_kit.text(
        """g (float[1, 64] u, float[1, 64] v) => (float[1, 64] y, float[1, 64] z) {
            a = Neg (u)  b = Neg (a)  d = Neg (v)  e = Neg (d)  p = Max (b, c)  q = Min (e, c)  y = Neg (p)  z = Neg (q)
        }""",
        c=np.array([-5, 1] * 32, np.float32).reshape(1, 64),
    )
    rising, falling = (np.linspace(*ends, 64, dtype=np.float32).reshape(1, 64) for ends in ((0, 11), (2, -10)))
    feeds = [{"u": rising, "v": falling}] * 4
    assert model_kit.sqnr(model, written(model, feeds, scheme), feeds) > (40 if scheme == "int8" else 80)


@pytest.mark.parametrize("scheme", ["int8", "a16w8"])
@pytest.mark.parametrize("other", ["a = Neg (d)", "h = Gather (U, j)  a = Flatten (h)"])
def test_a_table_is_not_joined_by_way_of_a_mover(model_kit, scheme, other):
    n = model_kit.normal
    model = model_kit.text(
        f"""g (int64[4, 2] i, int64[4, 2] j, float[4, 8] d) => (float[4, 4] y) {{
            e = Gather (T, i)  f = Flatten (e)  {other}  c = Concat <axis = 1> (f, a)  y = MatMul (c, W)
        }}""",
        T=n(50, 4) / 20,
        U=n(50, 4, seed=2),
        W=n(16, 4),
    )
    feeds = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        rows = {"i": random.integers(0, 50, (4, 2)), "j": random.integers(0, 50, (4, 2))}
        feeds.append({**rows, "d": n(4, 8, seed=seed) * 3})
    assert model_kit.sqnr(model, written(model, feeds, scheme), feeds) > 30


@pytest.mark.parametrize("bounds", ["Relu (m)", "Clip (m, low, high)"])
def test_a_bound_before_another(model_kit, bounds):
    model = model_kit.text(
        f"g (float[4, 8] x) => (float[4, 4] y) {{ a = Neg (x)  m = Max (a, c)  r = {bounds}  y = MatMul (r, W) }}",
        c=np.float32(-1e9),
        low=np.float32(0),
        high=np.float32(6),
        W=model_kit.normal(8, 4),
    )
    feeds = [{"x": model_kit.normal(4, 8, seed=i)} for i in range(8)]
    done = written(model, feeds, "a16w8")
    node = next(one for one in done.graph if one.op_type == "Max")
    quantizer = next(one for one in done.graph if one.op_type == "QuantizeLinear" and one.inputs[0] is node.outputs[0])
    assert scales(node)[1] == float(quantizer.inputs[1].const_value.numpy()) < 1
    assert model_kit.sqnr(model, done, feeds) > 40


def test_a_relu_behind_a_table_has_codes_of_its_own(model_kit):
    """The scale of a table is that of all its rows, and does not end at 0."""
    model = model_kit.text(
        "g (int64[1, 6] i) => (float[1, 6, 4] y) { e = Gather (T, i)  r = Relu (e)  y = MatMul (r, W) }",
        T=model_kit.normal(50, 8),
        W=model_kit.normal(8, 4),
    )
    feeds = rows(0, 50)
    done = written(model, feeds, "int8")
    assert model_kit.ops(done)[:3] == [DQ, "Gather", Q]
    assert model_kit.sqnr(model, done, feeds) > 30
