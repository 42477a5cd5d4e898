"""ReLU6 with PyTorch's ranges: shared with what it reads, and clipped in codes. And the pass that does it alone."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qgraph.passes import ClipCodes

import qgraph
from qgraph import observers
from qgraph.formats import INT8, UINT8, UInt
from qgraph.qconfigs import QCONFIGS, with_qconfig
from qgraph.session import Session
from qgraph.spec import QuantSpec
from qgraph.targets import KERNEL, Kernel
from qgraph.targets.cpu import arm64, x86_vnni

NETWORK = """
net (float[n, 8, 12, 12] x) => (float[n, 8, 12, 12] y)
{
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    c = Clip(a, low, high)
    d = Conv<group = 8, pads = [1, 1, 1, 1]>(c, w2)
    e = Clip(d, low, high)
    f = Conv(e, w3)
    y = Relu(f)
}
"""


def network(kit):
    weights = {"w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1)}
    return kit.text(
        NETWORK,
        **{name: kit.normal(*shape, scale=0.7) for name, shape in weights.items()},
        low=np.float32(0),
        high=np.float32(6),
    )


def written(model):
    """Output of a layer -> (its codes' scale, zero point, the QuantizeLinear)."""
    found = {}
    for node in model.graph:
        maker = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
        if maker is not None and maker.op_type == "Conv":
            scale, zero = (value.const_value.numpy() for value in node.inputs[1:])
            found[node.inputs[0].name] = float(scale), int(zero), node
    return found


SEEN = (np.random.default_rng(21).standard_normal(20000) * 4).astype(np.float32)
# PyTorch 2.13: calculate_qparams of get_default_qconfig(name).activation() that saw SEEN and then SEEN clipped to 0..6,
# as prepare_fx has it see both sides of a ReLU6.
TORCH = {
    "fbgemm": ("0x1.fd1eac0p-3", 69),
    "x86": ("0x1.fd1eac0p-3", 69),
    "onednn": ("0x1.fb1f8e0p-4", 138),
    "qnnpack": ("0x1.fb1f8e0p-4", 138),
}


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_the_numbers_are_pytorchs(model_kit, name):
    model = model_kit.text(
        """net (float[n, 1, 10, 10] x) => (float[n, 1, 10, 10] y)
        {
            a = Conv(x, one)
            c = Clip(a, low, high)
            y = Conv(c, one)
        }""",
        one=np.ones((1, 1, 1, 1), np.float32),
        low=np.float32(0),
        high=np.float32(6),
    )
    made = model_kit.static(model, [{"x": SEEN.reshape(-1, 1, 10, 10)}], with_qconfig(model_kit.free(), name))
    scale, zero = TORCH[name]
    assert written(made)["a"][:2] == (float.fromhex(scale), zero)


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_one_observer_sees_what_comes_before_and_after(model_kit, name):
    model = network(model_kit)
    feeds = model_kit.feeds(model, 8)
    made = model_kit.static(network(model_kit), feeds, with_qconfig(model_kit.free(), name))
    taps = model.clone()
    taps.graph.outputs.extend(value for node in taps.graph for value in node.outputs if value.name in "acde")
    spec = QuantSpec(UInt(7) if QCONFIGS[name].reduced else UINT8, torch=True)
    seen = {key: observers.create("torch-histogram") for key in "ad"}
    alone = observers.create("torch-histogram")
    for feed in feeds:
        values = model_kit.run(taps, feed)
        for first, second in ("ac", "de"):
            seen[first].update(values[first])
            seen[first].update(values[second])
        alone.update(values["c"])
    found = written(made)
    for key, observer in seen.items():
        expected = observer.qparams(spec)
        assert found[key][:2] == (float(expected.scale), int(expected.zero_point)), key
    # Of what comes after it alone, it would be another.
    assert float(alone.qparams(spec).scale) < 0.8 * found["a"][0]


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_nothing_around_a_clip_is_in_floats(model_kit, name):
    model = network(model_kit)
    feeds = model_kit.feeds(model, 8)
    target = with_qconfig(model_kit.free(), name)
    made = model_kit.static(network(model_kit), feeds, target)
    for node in made.graph:
        if node.op_type == "Clip":
            assert node.inputs[0].producer().op_type == "QuantizeLinear"
            assert {user.op_type for user in node.outputs[0].consumers()} == {"DequantizeLinear"}
            bounds = [int(value.const_value.numpy()) for value in node.inputs[1:]]
            scale, zero, _ = written(made)["a" if node.outputs[0].name.startswith("c") else "d"]
            assert bounds == [zero, min(255, zero + round(6 / scale))]
    assert model_kit.ops(made).count("Clip") == 2
    with Session(made, target.options()) as session:
        session.run(feeds[0])
    assert model_kit.sqnr(model, made, feeds) > (15 if QCONFIGS[name].reduced else 20)


def test_the_runtime_computes_all_of_it_in_integers(model_kit, tmp_path):
    feeds = model_kit.feeds(network(model_kit), 8)
    target = with_qconfig(x86_vnni(), "fbgemm")
    made = model_kit.static(network(model_kit), feeds, with_qconfig(model_kit.free(), "fbgemm"))
    path = tmp_path / "optimized.onnx"
    with Session(made, dataclasses.replace(target.options(), optimized=path)):
        pass
    operators = model_kit.ops(ir.load(path))
    assert operators.count("QLinearConv") == 3 and operators.count("Clip") == 2
    # In and out of the whole, and nothing between.
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == 1


def test_the_whole_job_reports_the_clip_as_it_runs(model_kit):
    model = model_kit.text(
        """net (float[1, 32, 24, 24] x) => (float[1, 32, 24, 24] y)
        {
            a = Conv<pads = [1, 1, 1, 1]>(x, w)
            c = Clip(a, low, high)
            y = Conv<pads = [1, 1, 1, 1]>(c, w)
        }""",
        w=model_kit.normal(32, 32, 3, 3, scale=0.2),
        low=np.float32(0),
        high=np.float32(6),
    )
    feeds = model_kit.feeds(model, 6)
    result = qgraph.optimize(
        model, data=feeds, evaluation=feeds[:4], target="x86-vnni", scheme="int8", qconfig="fbgemm", bench_seconds=0.0,
        max_loss="50%", force=True,
    )  # fmt: skip
    assert [node.kernel for node in result.report.quantized] == ["QLinearConv", "Clip", "QLinearConv"]
    assert not result.report.refused


def test_without_a_qconfig_the_layer_ends_where_its_clip_does(model_kit):
    model = network(model_kit)
    made = model_kit.static(network(model_kit), model_kit.feeds(model, 8))
    assert "Clip" not in model_kit.ops(made)
    assert all(zero == 0 for _, zero, _ in written(made).values())


def test_the_signed_codes_of_arm64_are_clipped_too(model_kit):
    model = network(model_kit)
    feeds = model_kit.feeds(model, 8)
    assert with_qconfig(arm64(), "qnnpack").absorbed == ("Relu",) and arm64().absorbed == ("Relu", "Clip")
    free = type(model_kit.free())("free", "tests", INT8, INT8)
    made = model_kit.static(network(model_kit), feeds, with_qconfig(free, "qnnpack"))
    clips = [node for node in made.graph if node.op_type == "Clip"]
    assert len(clips) == 2 and all(node.outputs[0].dtype == ir.DataType.INT8 for node in clips)
    with Session(made, free.options()) as session:
        codes = session.run(feeds[0])["y"]
    assert np.isfinite(codes).all() and model_kit.sqnr(model, made, feeds) > 20


def test_bounds_that_are_computed_leave_the_clip_in_float(model_kit):
    model = model_kit.text(
        """net (float[1, 8, 6, 6] x, float high) => (float[1, 8, 6, 6] y)
        {
            a = Conv(x, w)
            c = Clip(a, low, high)
            y = Conv(c, w)
        }""",
        w=model_kit.normal(8, 8, 1, 1),
        low=np.float32(0),
    )
    target = with_qconfig(model_kit.free(), "onednn")
    clip = next(node for node in model.graph if node.op_type == "Clip")
    assert "no constants" in target.kernel(clip, target.scheme("int8")).reason


# -- the pass by itself ------------------------------------------------------------------------------------------------

KINDS = {"uint8": (np.uint8, 0, 255), "int8": (np.int8, -128, 127)}


def quantized(kit, kind, scale, zero, low, high, second=None, tail="y = DequantizeLinear(r, s, z)"):
    """x in codes, clipped between two quantizers."""
    dtype = KINDS[kind][0]
    model = kit.text(
        f"""net (float[64] x) => (float[64] y)
        {{
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            c = Clip(d, low, high)
            r = QuantizeLinear(c, t, z)
            {tail}
        }}""",
        s=np.float32(scale),
        t=np.float32(scale if second is None else second),
        z=np.asarray(zero, dtype),
        low=np.float32(low),
        high=np.float32(high),
    )
    clip = next(node for node in model.graph if node.op_type == "Clip")
    clip.name = "clip"
    clip.meta[KERNEL] = Kernel(("Clip",), {0: QuantSpec(UINT8)}, result=QuantSpec(UINT8), shares=True)
    return model


SCALES = st.floats(2.0**-10, 2.0, width=32)
BOUNDS = st.floats(-300, 300, width=32)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(KINDS)), SCALES, st.integers(-128, 255), BOUNDS, BOUNDS, st.integers(0, 1000))
def test_clipped_codes_are_the_codes_of_what_is_clipped(model_kit, kind, scale, zero, first, second, seed):
    kit, (_, lowest, highest) = model_kit, KINDS[kind]
    zero = int(np.clip(zero, lowest, highest))
    model = quantized(kit, kind, scale, zero, min(first, second), max(first, second))
    after = model.clone()
    for node, copy in zip(model.graph, after.graph, strict=True):
        copy.meta.update(node.meta)
    assert ClipCodes()(after).modified
    assert kit.ops(after) == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    x = (np.random.default_rng(seed).standard_normal(64) * 150).astype(np.float32)
    assert np.array_equal(kit.run(model, {"x": x})["y"], kit.run(after, {"x": x})["y"])


def test_other_parameters_behind_it_leave_it_alone(model_kit):
    model = quantized(model_kit, "uint8", 0.1, 10, 0, 6, second=0.2)
    done = ClipCodes()
    assert not done(model).modified
    assert done.refused == {"clip": "its codes have another scale than those that it reads"}


def test_what_reads_the_clipped_floats_leaves_it_alone(model_kit):
    model = quantized(model_kit, "uint8", 0.1, 10, 0, 6, tail="u = DequantizeLinear(r, s, z) y = Add(u, c)")
    done = ClipCodes()
    assert not done(model).modified and "floats" in done.refused["clip"]


def test_only_what_was_planned_is_touched(model_kit):
    model = quantized(model_kit, "uint8", 0.1, 10, 0, 6)
    next(node for node in model.graph if node.op_type == "Clip").meta.clear()
    assert not ClipCodes()(model).modified


def test_who_else_reads_the_codes_still_does(model_kit):
    model = quantized(model_kit, "uint8", 0.1, 10, 0, 6, tail="u = DequantizeLinear(r, s, z) y = Add(u, d)")
    feeds = [{"x": model_kit.normal(64, scale=9.0)}]
    before = model.clone()
    assert ClipCodes()(model).modified
    model_kit.same(before, model, feeds, tolerance=0)
