import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import qgraph
from qgraph import observers, registry
from qgraph.errors import OptionError
from qgraph.formats import INT8, UINT8, UInt
from qgraph.observers import cells, torch_histogram
from qgraph.qconfigs import QCONFIGS, with_qconfig
from qgraph.qparams import from_range
from qgraph.spec import PerAxis, QuantSpec
from qgraph.targets.cpu import arm64, x86, x86_vnni

FULL, REDUCED = QuantSpec(UINT8, torch=True), QuantSpec(UInt(7), torch=True)


def _rng(seed):
    return np.random.default_rng(seed)


DATA = {
    "normal": _rng(1).standard_normal(20000) * 3,
    "uniform": _rng(2).uniform(-0.25, 1, 20000),
    "relu": np.maximum(_rng(3).standard_normal(20000), 0),
    "student": _rng(4).standard_t(3, 20000),
    "outliers": np.append(_rng(5).standard_normal(20000), [1e3, -1e3]),
    "tiny": _rng(6).standard_normal(20000) * 1e-9,
    "one side": _rng(7).gamma(2, 1, 20000) + 0.5,
    "negative": -np.abs(_rng(8).standard_normal(20000)),
    "constant": np.full(100, 3.7),
    "zero": np.zeros(100),
}
# PyTorch 2.13 on DATA[name].astype(float32): calculate_qparams of HistogramObserver(), HistogramObserver(
# reduce_range=True), MinMaxObserver(), MinMaxObserver(reduce_range=True), each (scale, zero point).
TORCH = {
    "normal": (("0x1.764eda0p-4", 126), ("0x1.77c81c0p-3", 63), ("0x1.767daa0p-4", 126), ("0x1.77f71a0p-3", 63)),
    "uniform": (("0x1.4112060p-8", 51), ("0x1.4255a00p-7", 25), ("0x1.413a2e0p-8", 51), ("0x1.427df00p-7", 25)),
    "relu": (("0x1.f33db80p-7", 0), ("0x1.f534e40p-6", 0), ("0x1.035f520p-6", 0), ("0x1.0464bc0p-5", 0)),
    "student": (("0x1.2e5d6e0p-3", 144), ("0x1.2f8e2c0p-2", 72), ("0x1.3c6cc20p-3", 137), ("0x1.3dabae0p-2", 68)),
    "outliers": (("0x1.f5b7380p+2", 128), ("0x1.f7b0e20p+3", 64), ("0x1.f5f5f60p+2", 128), ("0x1.f7efe00p+3", 64)),
    "tiny": (("0x1p-23", 0), ("0x1p-23", 0), ("0x1p-23", 0), ("0x1p-23", 0)),
    "one side": (("0x1.8371540p-5", 0), ("0x1.84f7d20p-4", 0), ("0x1.839fb80p-5", 0), ("0x1.8526640p-4", 0)),
    "negative": (("0x1.161e940p-6", 255), ("0x1.1736e40p-5", 127), ("0x1.161e940p-6", 255), ("0x1.1736e40p-5", 127)),
    "constant": (("0x1.db75100p-7", 0), ("0x1.dd54420p-6", 0), ("0x1.db75100p-7", 0), ("0x1.dd54420p-6", 0)),
    "zero": (("0x1p-23", 0), ("0x1p-23", 0), ("0x1p-23", 0), ("0x1p-23", 0)),
}


def params(name, spec, *arrays):
    observer = observers.create(name)
    for array in arrays:
        observer.update(array)
    found = observer.qparams(spec)
    return float(found.scale), int(found.zero_point)


# -- PyTorch's numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DATA))
def test_activations_have_the_bits_of_pytorch(name):
    data = DATA[name].astype(np.float32)
    kinds = (("torch-histogram", FULL), ("torch-histogram", REDUCED), ("minmax", FULL), ("minmax", REDUCED))
    for (observer, spec), (scale, zero) in zip(kinds, TORCH[name], strict=True):
        assert params(observer, spec, data) == (float.fromhex(scale), zero), observer
        # And in whatever batches.
        assert params(observer, spec, *np.array_split(data, 7)[::-1]) == (float.fromhex(scale), zero), observer


def test_weights_have_the_bits_of_pytorch():
    # PerChannelMinMaxObserver(dtype=qint8, qscheme=per_channel_symmetric) and MinMaxObserver(dtype=qint8,
    # qscheme=per_tensor_symmetric) of PyTorch 2.13 on this weight.
    sizes = np.reshape([0.1, 1, 0, 1e-9], (4, 1, 1, 1))
    weight = (_rng(9).standard_normal((4, 3, 3, 3)) * sizes).astype(np.float32)
    expected = [float.fromhex(s) for s in ("0x1.034c98p-9", "0x1.e35472p-7", "0x1p-23", "0x1p-23")]
    channels = QuantSpec(INT8, PerAxis(0), symmetric=True, torch=True)
    found = from_range(weight.min(axis=(1, 2, 3)), weight.max(axis=(1, 2, 3)), channels)
    assert found.scale.tolist() == expected and not found.zero_point.any()
    whole = from_range(weight.min(), weight.max(), QuantSpec(INT8, symmetric=True, torch=True))
    assert whole.scale == expected[1] and whole.zero_point == 0


def test_the_moving_average_is_pytorchs_where_no_sample_stands_out():
    # MovingAverageMinMaxObserver on five times the same sample; it weighs by order otherwise, and this one does not.
    sample = DATA["normal"].astype(np.float32)[:1000]
    assert params("moving-average", FULL, *[sample] * 5) == (float.fromhex("0x1.5fcb9ap-4"), 124)


def test_a_range_beyond_float32_is_refused():
    with pytest.raises(qgraph.QGraphError, match="wider than float32"):
        from_range(-3e38, 3e38, FULL)


# -- laws --------------------------------------------------------------------------------------------------------------

VALUES = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))


@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_joined_cells_do_not_depend_on_order_or_workers(samples, random):
    def seen(parts):
        observer = observers.create("torch-histogram")
        for part in parts:
            observer.update(part)
        return observer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_CELLS", 8)
        whole = seen(samples)
        random.shuffle(samples)
        cut = random.randrange(len(samples) + 1)
        left, right = seen(samples[:cut]), seen(samples[cut:])
        right.merge(left)
        for one in (seen(samples), right):
            assert {k: a.tolist() for k, a in one.state().items()} == {k: a.tolist() for k, a in whole.state().items()}
        first, last, counts = whole.cells()
        values = np.concatenate(samples)
        assert counts.size <= 8
        for low, high, count in zip(first, last, counts, strict=True):
            assert np.count_nonzero((values >= low) & (values <= high)) == count


@given(VALUES)
def test_the_histogram_of_few_values_is_exact(values):
    observer = observers.create("torch-histogram")
    observer.update(values)
    low, high = values.min() + np.float32(0), values.max() + np.float32(0)
    if low < high and np.isfinite(np.float32(2048) / (high - low)) and high - low > 1e-30:
        places = ((values - low) * np.float32(2048) / (high - low)).astype(int).clip(0, 2047)
        assert np.array_equal(observer.histogram(), np.bincount(places, minlength=2048))
    found = observer.range(FULL)
    assert low <= found.low <= found.high <= high + 4 * np.spacing(max(abs(low), abs(high)))


BOUNDS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(BOUNDS, BOUNDS, st.booleans())
def test_both_arithmetics_are_one_but_for_rounding(first, second, reduced):
    low, high = min(first, second), max(first, second)
    spec = REDUCED if reduced else FULL
    torch, plain = from_range(low, high, spec), from_range(low, high, dataclasses.replace(spec, torch=False))
    if plain.scale > 2.0**-22 and max(-low, high) > 2.0**-14:
        np.testing.assert_allclose(torch.scale, plain.scale, rtol=3e-7)
        assert abs(torch.zero_point - plain.zero_point) <= 1
    assert torch.scale >= 2.0**-23 and spec.format.lowest <= torch.zero_point <= spec.format.highest


def test_many_values_are_counted_nearly_exactly():
    data = _rng(11).standard_normal(400_000).astype(np.float32)
    observer = observers.create("torch-histogram")
    observer.update(data)
    exact = np.bincount(torch_histogram._bin_of(data, data.min(), data.max()), minlength=2048)
    found = observer.histogram()
    assert observer.cells()[2].size <= 1 << 16 < np.unique(data).size
    assert found.sum() == exact.sum() == data.size
    # Some of the values in a cell at an edge are on the other side of it: a tenth of a bin's own at most.
    assert np.abs(found - exact).max() <= 0.1 * exact.max()


# -- which target can have which ---------------------------------------------------------------------------------------


def test_schemes():
    for name, qconfig in QCONFIGS.items():
        target = with_qconfig(x86_vnni(), name)
        for scheme in (target.scheme("int8"), target.scheme("auto").parts[0]):
            assert scheme.torch and scheme.activation.observer == "torch-histogram"
            assert scheme.activation.format.highest == (127 if qconfig.reduced else 255)
            assert isinstance(scheme.weight.granularity, PerAxis) == qconfig.per_channel
            assert scheme.weight.format == INT8 and scheme.weight.symmetric
        assert target.scheme("int8-weights") == x86_vnni().scheme("int8-weights")
        assert not target.scheme("int8-dynamic").torch and target.scheme("auto").torch
    assert not x86_vnni().scheme("auto").torch


@pytest.mark.parametrize(
    ("target", "name", "works"),
    [(arm64, "fbgemm", "onednn or qnnpack"), (arm64, "x86", "onednn or qnnpack"), (x86, "qnnpack", "fbgemm or x86")],
)
def test_what_does_not_fit_is_an_error_that_names_what_does(target, name, works):
    with pytest.raises(OptionError, match=f"Take {works}"):
        with_qconfig(target(), name)
    with_qconfig(target(), works.split()[0])


def test_signed_codes_have_the_same_scales():
    spec = with_qconfig(arm64(), "qnnpack").scheme("int8").activation
    data = DATA["normal"].astype(np.float32)
    scale, zero = params("torch-histogram", FULL, data)
    assert params("torch-histogram", spec, data) == (scale, zero - 128)


def test_targets_without_static_ranges_say_so():
    for name in ("cuda", "tensorrt"):
        with pytest.raises(OptionError, match="cannot have the ranges"):
            with_qconfig(registry.target(name), "qnnpack")


def test_options():
    with pytest.raises(OptionError, match=r"Unknown qconfig 'qnpack'\. Did you mean 'qnnpack'"):
        qgraph.Options(qconfig="qnpack")
    assert qgraph.Options(qconfig="x86").identity != qgraph.Options(qconfig="onednn").identity


# -- models ------------------------------------------------------------------------------------------------------------

TEXT = """
net (float[n, 16, 12, 12] x) => (float[n, 10] y)
{
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(r, w2, b2)
    s = Add(c, r)
    f = Flatten<axis = 1>(s)
    y = Gemm(f, w3, b3)
}
"""
SHAPES = {"w1": (32, 16, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,), "w3": (4608, 10), "b3": (10,)}


def network(kit):
    return kit.text(TEXT, **{name: kit.normal(*shape, scale=0.2) for name, shape in SHAPES.items()})


def quantizers(model):
    """(what is quantized, its scale, its zero point) of every QuantizeLinear."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            yield node.inputs[0], node.inputs[1].const_value.numpy(), node.inputs[2].const_value.numpy()


def stored(model):
    """(codes, scale) of every weight in integers."""
    for node in model.graph:
        codes = node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.dtype.numpy() == np.int8:
            yield codes.numpy(), node.inputs[1].const_value.numpy()


@pytest.mark.parametrize("name", list(QCONFIGS))
def test_a_whole_model(model_kit, name):
    model = network(model_kit)
    feeds = model_kit.feeds(model, 16)
    result = qgraph.optimize(
        model, data=feeds, evaluation=feeds[:4], target="x86-vnni", scheme="int8", qconfig=name, bench_seconds=0.0,
        max_loss="50%", force=True,
    )  # fmt: skip
    assert any(f"qconfig '{name}'" in note for note in result.report.notes)
    weights = list(stored(result.model))
    assert weights and all((scale.ndim == 1) == QCONFIGS[name].per_channel for _, scale in weights)
    by_shape = {shape: key for key, shape in SHAPES.items()}
    for codes, scale in weights:
        weight = model.graph.initializers[by_shape[codes.shape]].const_value.numpy()
        axis = 1 if weight.ndim == 2 else 0
        others = tuple(i for i in range(weight.ndim) if i != axis) if scale.ndim else None
        reach = np.abs(weight).max(axis=others)
        assert np.array_equal(scale, reach / np.float32(127.5))
        steps = weight / (np.expand_dims(scale, others) if scale.ndim else scale)
        assert np.array_equal(codes, np.rint(steps).clip(-128, 127))
    (first,) = [(scale, zero) for value, scale, zero in quantizers(result.model) if value.name == "x"]
    seen = np.concatenate([feed["x"] for feed in feeds])
    spec = REDUCED if QCONFIGS[name].reduced else FULL
    assert (float(first[0]), int(first[1])) == params("torch-histogram", spec, seen)
    # What was observed is coded in the half or in the whole.
    codes = np.rint(seen / first[0]) + first[1]
    assert QCONFIGS[name].reduced == (np.quantile(codes, 0.999) <= 127)


def test_an_observer_may_be_another_one(model_kit):
    model = network(model_kit)
    feeds = model_kit.feeds(model, 8)
    target = with_qconfig(model_kit.free(), "fbgemm")
    made = model_kit.static(model, feeds, target, observer="minmax")
    (first,) = [(scale, zero) for value, scale, zero in quantizers(made) if value.name == "x"]
    seen = np.concatenate([feed["x"] for feed in feeds])
    assert (float(first[0]), int(first[1])) == params("minmax", REDUCED, seen)


@pytest.mark.parametrize("name", ["fbgemm", "qnnpack"])
def test_nothing_learned_changes_a_scale(model_kit, name):
    feeds = model_kit.feeds(network(model_kit), 8)
    target = with_qconfig(model_kit.free(), name)
    plain, learned = (model_kit.static(network(model_kit), feeds, target, learn=learn) for learn in (False, True))
    for (_, *first), (_, *second) in zip(quantizers(plain), quantizers(learned), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for first, second in zip(stored(plain), stored(learned), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_overflow_goes_before_pytorchs_scale(model_kit):
    model = model_kit.text(
        "net (float[1, 4] x) => (float[1, 4] y) { y = Gemm(x, w, b) }",
        w=np.full((4, 4), 1e-9, np.float32),
        b=np.full(4, 1e6, np.float32),
    )
    target = with_qconfig(model_kit.free(), "onednn")
    made = model_kit.static(model, model_kit.feeds(model, 8), target)
    ((_, scale),) = stored(made)
    assert np.all(scale > 2.0**-23)
    feed = {"x": np.zeros((1, 4), np.float32)}
    np.testing.assert_allclose(model_kit.run(made, feed)["y"], 1e6, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["int8-weights", "int8-dynamic", "fp32"])
def test_schemes_without_static_ranges_are_an_error(model_kit, scheme):
    model = network(model_kit)
    with pytest.raises(OptionError, match="take scheme int8 or auto, and calibration data"):
        qgraph.optimize(model, data=model_kit.feeds(model, 8), target="x86-vnni", scheme=scheme, qconfig="x86")


def test_without_data_there_are_no_ranges(model_kit):
    with pytest.raises(OptionError, match="calibration data"):
        qgraph.optimize(network(model_kit), target="x86-vnni", qconfig="x86", bench_seconds=0.0)
