"""Equalize: convolutions whose channels differ widely in range come out of eight bits whole."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from qgraph.passes.equalize import Equalize
from qgraph.passes.survey import Survey

from qgraph.calibration import CHANNELS, SAMPLE
from qgraph.data import inputs_of, load

BODY = """a = Conv (x, V, b) r = Relu (a) e = Conv <group=8, pads=[1,1,1,1]> (r, D, c) s = Relu (e)
    h = Conv (s, W, d) t = Add (h, k) f = GlobalAveragePool (t) g = Flatten (f) y = Gemm (g, F)"""


@pytest.fixture
def wide(model_kit):
    """A depthwise network whose hidden channels are 10^-u to 10^u times as large as they need be."""

    def build(spread=1.5, body=BODY):
        n, rng = model_kit.normal, np.random.default_rng(5)
        one, two = (10 ** rng.uniform(-spread, spread, 8).astype(np.float32) for _ in range(2))
        model = model_kit.text(
            f"g (float[N,4,8,8] x) => (float[N,p] y) {{ {body} }}",
            V=n(8, 4, 1, 1) * one[:, None, None, None], b=n(8) * one,
            D=n(8, 1, 3, 3) * (two / one)[:, None, None, None], c=n(8) * two,
            W=n(6, 8, 1, 1) / two[None, :, None, None], d=n(6), k=n(6, 1, 1), F=n(6, 3),
        )  # fmt: skip
        common.ShapeInferencePass()(model)
        return model

    return build


@pytest.fixture
def surveyed(model_kit):
    """A copy with the samples of its layers, and the feeds."""

    def build(model, count=24):
        feeds = model_kit.feeds(model, count, free=1)
        for value in model.graph.inputs:
            value.shape = ir.Shape([1, *value.shape[1:]])
        common.ShapeInferencePass()(model)
        copy = model.clone()
        Survey(load(feeds, inputs_of(copy)))(copy)
        return copy, feeds

    return build


@pytest.fixture
def equalized(model_kit, surveyed):
    """(the surveyed original, the same after the pass, the pass, feeds)."""

    def build(model, **options):
        before, feeds = surveyed(model)
        after = before.clone()
        target = model_kit.free()
        one = Equalize(target, target.scheme("int8"), **options)
        one(after)
        return before, after, one, feeds

    return build


def test_a_depthwise_network_is_rescued(model_kit, wide, equalized, model_eight_bits):
    before, after, one, feeds = equalized(wide())
    model_kit.same(before, after, feeds[:2])
    assert model_kit.ops(after) == model_kit.ops(before)
    assert len(one.changes) == 2
    assert all(change.after > change.before + 10 and not change.explicit for change in one.changes)
    plain = model_kit.sqnr(before, model_eight_bits(before), feeds)
    assert plain < 25
    assert model_kit.sqnr(before, model_eight_bits(after), feeds) > plain + 10


def test_what_is_even_already_stays(model_kit, wide, equalized):
    _, after, one, _ = equalized(wide(0.0), least=8.0)
    assert one.changes == []
    assert {n.inputs[1].name for n in after.graph if n.op_type == "Conv"} == {"V", "D", "W"}
    assert any("dB" in reason for reason in one.refused.values())


def test_bounds_and_samples_are_those_of_the_new_graph(model_kit, wide, equalized, surveyed):
    before, after, _, _ = equalized(wide())
    fresh, _ = surveyed(after.clone())
    layers = [[node for node in model.graph if SAMPLE in node.meta] for model in (before, after, fresh)]
    assert len(layers[0]) == len(layers[1]) == len(layers[2]) == 4
    for old, new, seen in zip(*layers, strict=True):
        for mine, expected in zip(new.meta[CHANNELS], seen.meta[CHANNELS], strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)
        # Another survey takes other rows: that its channels were scaled as the bounds were is seen on the old ones.
        reach, was = (np.maximum(-one.meta[CHANNELS][0], one.meta[CHANNELS][1]) for one in (new, old))
        factor = (reach / was).reshape(1, -1, *(1,) * (new.meta[SAMPLE].ndim - 2))
        np.testing.assert_allclose(new.meta[SAMPLE], old.meta[SAMPLE] * factor, rtol=1e-4)


def test_old_samples_are_not_written_to(model_kit, wide, surveyed):
    before, _ = surveyed(wide())
    kept = {n.name or i: n.meta[SAMPLE].copy() for i, n in enumerate(before.graph) if SAMPLE in n.meta}
    held = {n.name or i: n.meta[SAMPLE] for i, n in enumerate(before.graph) if SAMPLE in n.meta}
    target = model_kit.free()
    assert Equalize(target, target.scheme("int8"))(before).modified
    for name, array in kept.items():
        np.testing.assert_array_equal(held[name], array)


def test_a_bound_is_a_reason(model_kit, wide, equalized):
    body = BODY.replace("r = Relu (a)", "r = Clip (a, zero, six)")
    model = wide(body="zero = Constant <value_float=0.0> () six = Constant <value_float=6.0> () " + body)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for number, node in enumerate(model.graph):
        node.name = f"n{number}_{node.op_type}"
    before, after, one, feeds = equalized(model)
    model_kit.same(before, after, feeds[:2])
    assert len(one.changes) == 1
    assert "bound" in " ".join(one.refused.values())


def test_the_same_every_time(model_kit, wide, equalized):
    first, second = (model_kit.tensors(equalized(wide())[1]) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_without_a_survey_nothing_happens(model_kit, wide):
    target = model_kit.free()
    assert not Equalize(target, target.scheme("int8"))(wide()).modified
