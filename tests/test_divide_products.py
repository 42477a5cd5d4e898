"""DivideProducts: what takes a product apart reads products of its own, and computes the same."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes import DivideProducts, InferTypes, MeasureShapes

from qgraph import registry
from qgraph.data import inputs_of, load
from qgraph.pipeline import Context
from qgraph.targets.cpu import Cpu

ROWS = 1024


def _measured(model, feeds):
    return MeasureShapes(load(feeds, inputs_of(model)))(InferTypes()(model.clone()).model).model


def _divided(model_kit, model, feeds):
    result = DivideProducts()(_measured(model, feeds))
    ir.passes.common.CheckerPass()(result.model)
    model_kit.same(model, result.model, feeds)
    return result


def _feeds(model_kit, batch, width, count=2):
    return [{"x": model_kit.normal(batch, ROWS, width, seed=seed)} for seed in range(count)]


def _vision(model_kit, weights=("w",), whole=""):
    """Queries, keys and values as vision transformers export them."""
    return model_kit.text(
        f"""
        g (float[N,{ROWS},48] x) => (float[N,3,{ROWS},16] q, float[N,3,{ROWS},16] k, float[N,3,{ROWS},16] v{whole})
        <int64[5] s = {{0,{ROWS},3,3,16}}, int64 zero = {{0}}, int64 one = {{1}}, int64 minus = {{-1}}> {{
            p = MatMul(x, w)
            a = Add(b, p)
            r = Reshape(a, s)
            t = Transpose<perm=[2,0,3,1,4]>(r)
            q = Gather<axis=0>(t, zero)
            k = Gather<axis=0>(t, one)
            v = Gather<axis=0>(t, minus)
        }}""",
        w=model_kit.normal(48, 144, scale=0.1),
        b=model_kit.normal(144),
    )


def test_queries_keys_and_values_of_a_vision_transformer(model_kit):
    result = _divided(model_kit, _vision(model_kit), _feeds(model_kit, 2, 48))
    assert result.modified
    assert model_kit.ops(result.model) == ["MatMul", "Add", "Reshape", "Transpose"] * 3
    assert "w" not in result.model.graph.initializers


def test_another_batch_than_the_measured_one(model_kit):
    model = _vision(model_kit)
    measured = _measured(model, _feeds(model_kit, 1, 48))
    assert DivideProducts()(measured).modified
    model_kit.same(model, measured, _feeds(model_kit, 5, 48))


def test_a_split_of_columns(model_kit):
    model = model_kit.text(
        f"""
        g (float[1,{ROWS},32] x) => (float[1,{ROWS},96] y, float[1,{ROWS},96] z) <int64[2] s = {{96,96}}> {{
            p = MatMul(x, w)
            y, z = Split<axis=-1>(p, s)
        }}""",
        w=model_kit.normal(32, 192),
    )
    result = _divided(model_kit, model, _feeds(model_kit, 1, 32))
    assert model_kit.ops(result.model) == ["MatMul", "MatMul"]


def test_heads_that_hold_their_queries_keys_and_values_side_by_side(model_kit):
    model = model_kit.text(
        f"""
        g (float[1,{ROWS},24] x) => (float[1,{ROWS},4,12] q, float[1,{ROWS},4,12] k, float[1,{ROWS},4,12] v)
        <int64[4] s = {{1,-1,4,36}}, int64[3] parts = {{12,12,12}}> {{
            p = MatMul(x, w)
            r = Reshape(p, s)
            q, k, v = Split<axis=3>(r, parts)
        }}""",
        w=model_kit.normal(24, 144),
    )
    result = _divided(model_kit, model, _feeds(model_kit, 1, 24))
    assert model_kit.ops(result.model) == ["MatMul", "Reshape"] * 3


def test_slices_that_leave_some_columns_out(model_kit):
    model = model_kit.text(
        f"""
        g (float[1,{ROWS},24] x) => (float[1,{ROWS},60] a, float[1,{ROWS},70] b)
        <int64[1] i = {{0}}, int64[1] j = {{60}}, int64[1] k = {{-70}}, int64[1] end = {{999}}, int64[1] axis = {{2}}>
        {{
            p = MatMul(x, w)
            a = Slice(p, i, j, axis)
            b = Slice(p, k, end, axis)
        }}""",
        w=model_kit.normal(24, 150),
    )
    result = _divided(model_kit, model, _feeds(model_kit, 1, 24))
    assert [n.inputs[1].shape[1] for n in result.model.graph] == [60, 70]


def _also(text, expression):
    return text.replace("=> (", "=> (float[L,M,N] o, ").replace("q = Gather", f"o = {expression}\n q = Gather")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("few rows", lambda text: text.replace(str(ROWS), "3")),
        ("read whole as well", lambda text: _also(text, "Relu(p)")),
        ("overlapping parts", lambda text: text.replace("int64 one = {1}", "int64 one = {0}")),
        ("a shared weight", lambda text: _also(text, "MatMul(x, w)")),
        ("an axis of rows", lambda text: text.replace("Gather<axis=0>", "Gather<axis=2>")),
    ],
)
def test_left_alone(model_kit, what, change):
    text = f"""
        g (float[1,{ROWS},32] x) => (float[A,B,C] q, float[D,E,F] k)
        <int64[4] s = {{1,{ROWS},3,32}}, int64 zero = {{0}}, int64 one = {{1}}> {{
            p = MatMul(x, w)
            r = Reshape(p, s)
            t = Transpose<perm=[2,0,1,3]>(r)
            q = Gather<axis=0>(t, zero)
            k = Gather<axis=0>(t, one)
        }}"""
    rows = 3 if what == "few rows" else ROWS
    model = model_kit.text(change(text), w=model_kit.normal(32, 96))
    feeds = [{"x": model_kit.normal(1, rows, 32)}]
    before = model_kit.ops(model)
    result = _divided(model_kit, model, feeds)
    assert not result.modified
    assert model_kit.ops(result.model) == before


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_factors_and_any_order(model_kit, data):
    factors = data.draw(st.lists(st.integers(2, 5), min_size=2, max_size=3), label="factors")
    order = data.draw(st.permutations(range(2 + len(factors))), label="order")
    axis = data.draw(st.sampled_from([a for a, old in enumerate(order) if old >= 2]), label="axis")
    size = factors[order[axis] - 2]
    cut = data.draw(st.integers(1, size - 1), label="cut")
    width = int(np.prod(factors))
    rank = len(order)
    model = model_kit.text(
        f"""
        g (float[2,512,8] x) => (float[{",".join("ABCDE"[:rank])}] y, float[{",".join("FGHIJ"[:rank])}] z)
        <int64[{rank}] s = {{0,0,{",".join(map(str, factors))}}}, int64[2] parts = {{{cut},{size - cut}}}> {{
            p = MatMul(x, w)
            a = Add(p, b)
            r = Reshape(a, s)
            t = Transpose<perm={list(order)}>(r)
            y, z = Split<axis={axis}>(t, parts)
        }}""",
        w=model_kit.normal(8, width),
        b=model_kit.normal(width),
    )
    result = _divided(model_kit, model, [{"x": model_kit.normal(2, 512, 8)}])
    # One element costs 0.25 ns, one call 10 us.
    assert result.modified == (1024 * width * 0.25 > 10_000)


def test_codes_of_the_parts_have_scales_of_their_own(model_kit):
    """In integers from end to end; joined, the three would have shared one range."""
    model = _vision(model_kit)
    feeds = _feeds(model_kit, 1, 48, count=6)
    target = registry.target("x86-vnni")
    context = Context(target, target.scheme("int8"), load(feeds, inputs_of(model)))
    result = registry.pipeline("quantize")(context)(model.clone())
    assert model_kit.ops(result.model).count("MatMulIntegerToFloat") == 3
    assert model_kit.sqnr(model, result.model, feeds) > 25


def test_targets_that_start_kernels_slowly_keep_one_product():
    assert Cpu.divides
    assert not registry.target("cuda").divides
    assert not registry.target("qnn").divides
