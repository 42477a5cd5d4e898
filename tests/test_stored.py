"""Weights stored as 16-, 8- and 4-bit floats: the numbers they come back with, the file, and that the runtime folds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import audit, modelio, registry, stored
from qgraph.errors import NothingQuantizedError, OptionError, SlowerError
from qgraph.float_formats import BF16, E2M1, E4M3, E5M2, FP16, NF4
from qgraph.pipeline import Context
from qgraph.spec import PerBlock, QuantSpec
from qgraph.stored import REACH
from qgraph.targets import FOLDED

SCHEMES = {"fp16": 16, "bf16": 16, "fp8": 8, "fp8-e5m2": 8, "fp4": 4.5, "nf4": 4.5}


@pytest.fixture
def written(tmp_path):
    """Brings a model (changed in place) into a scheme, and audits that the runtime folds all that is new."""

    def write(model, scheme):
        target = registry.target("x86-vnni")
        registry.pipeline("quantize")(Context(target, target.scheme(scheme), None))(model)
        path = tmp_path / "stored.onnx"
        with modelio.Workspace() as workspace:
            modelio.stage(model, path, workspace).commit()
        found = audit.audit(path, audit.plan_of(model), target)
        assert found.clean, found.summary
        return path.stat().st_size

    return write


def scale_and_round(weight, axis, size, project, highest):
    """In blocks of `size` along `axis`, each scaled so that its largest number is the highest, by a plain loop."""
    moved = np.moveaxis(weight.astype(np.float32), axis, 0).copy()
    for start in range(0, len(moved), size):
        part = moved[start : start + size]
        scale = np.abs(part).max(axis=0, keepdims=True) / np.float32(highest)
        scale[scale == 0] = 1
        moved[start : start + size] = project(part / scale) * scale
    return np.moveaxis(moved, 0, axis)


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt, size", [(E4M3, None), (E5M2, None), (E2M1, 64), (NF4, 64), (NF4, 32)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_scaled_formats_round_by_column_or_block(model_kit, fmt, size, transposed):
    weight = model_kit.normal(150, 20) * np.geomspace(1e-6, 1e6, 20, dtype=np.float32)
    weight[:, 3] = 0
    model = model_kit.text(
        f"g (float[2, 150] x) => (float[2, 20] y) {{ y = Gemm <transB = {transposed}> (x, W) }}",
        W=weight.T.copy() if transposed else weight,
    )
    node = model.graph[0]
    given_weight = weight.T if transposed else weight
    spec = QuantSpec(fmt, PerBlock(-1, size)) if size else QuantSpec(fmt)
    view = stored.view_of(node, given_weight.shape)
    found = stored.decode(given_weight, view, spec)
    expected = scale_and_round(weight, 0, size or 150, fmt.project, fmt.highest)
    np.testing.assert_array_equal(found.T if transposed else found, expected)


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 4), st.sampled_from([E4M3, E5M2, E2M1, NF4]))
def test_bytes_and_table_give_what_decode_gives(inner, outer, rest, fmt):
    weight = np.random.default_rng([inner, outer, rest]).standard_normal((outer, inner, rest)).astype(np.float32)
    spec = QuantSpec(fmt, PerBlock(-1, 32))
    view = weight.shape
    blocks, size = stored.blocks_in(view, spec)
    numbers = stored.table_of(fmt)[stored.encode(weight, view, spec)].reshape(-1)[: outer * blocks * size * rest]
    real = numbers.reshape(outer, blocks, size, rest) * stored.scales_of(weight, view, spec)
    found = real.reshape(outer, -1, rest)[:, :inner]
    np.testing.assert_array_equal(found, stored.decode(weight, view, spec))


@given(st.sampled_from([FP16, BF16]), st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_halves_are_rounded_without_scales(fmt, numbers):
    weight = np.float32([numbers])
    found = stored.decode(weight, (1, 1, weight.size), QuantSpec(fmt))
    np.testing.assert_array_equal(found, weight.astype(fmt.storage.numpy()).astype(np.float32))


def test_noise_is_what_is_lost(model_kit):
    weight = model_kit.normal(256, 64)
    model = model_kit.text("g (float[2, 256] x) => (float[2, 64] y) { y = MatMul (x, W) }", W=weight)
    for fmt, size in ((FP16, None), (E4M3, None), (NF4, 64)):
        spec = QuantSpec(fmt, PerBlock(-1, size)) if size else QuantSpec(fmt)
        lost = np.square(weight - stored.decode(weight, (1, 256, 64), spec)).sum() / np.square(weight).sum()
        assert stored.noise(model.graph[0], spec) == pytest.approx(lost, rel=1e-5)


# -- on the runtime -------------------------------------------------------------------------------------------------

MODELS = {
    "MatMul": ("float[2, 130] x", "y = MatMul (x, W)", {"W": (130, 40)}),
    "batched": ("float[3, 2, 40] x", "y = MatMul (x, W)", {"W": (3, 40, 33)}),
    "Gemm": ("float[2, 130] x", "y = Gemm <transB = 1> (x, W, b)", {"W": (40, 130), "b": (40,)}),
    "Conv": ("float[1, 6, 8, 8] x", "y = Conv (x, W, b)", {"W": (24, 6, 3, 3), "b": (24,)}),
    "transposed": ("float[1, 6, 8, 8] x", "y = ConvTranspose (x, W)", {"W": (6, 24, 3, 3)}),
    "Gather": ("int64[5] x", "y = Gather (W, x)", {"W": (50, 33)}),
    "LSTM": (
        "float[4, 1, 20] x",
        "y, h, c = LSTM <hidden_size = 16> (x, W, R)",
        {"W": (1, 64, 20), "R": (1, 64, 16)},
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
def test_operators_find_the_weight_that_they_are_to_find(model_kit, written, kind, scheme):
    """The result is that of the float model whose weights were rounded beforehand: the same kernels on both sides."""
    source, text, shapes = MODELS[kind]
    constants = {name: model_kit.normal(*shape, seed=7, scale=0.2) for name, shape in shapes.items()}
    model = model_kit.text(f"g ({source}) => (y) {{ {text} }}", **constants)
    spec = registry.target("x86-vnni").scheme(scheme).weight
    rounded = dict(constants)
    for position in stored.positions(model.graph[0]):
        name = model.graph[0].inputs[position].name
        view = stored.view_of(model.graph[0], constants[name].shape)
        rounded[name] = stored.decode(constants[name], view, spec)
        assert not np.array_equal(rounded[name], constants[name])
    expected = model_kit.text(f"g ({source}) => (y) {{ {text} }}", **rounded)
    size = written(model, scheme)
    feeds = [{"x": np.array([0, 49, 3, 3, 7])}] if kind == "Gather" else None
    model_kit.same(expected, model, feeds, tolerance=1e-6)
    count = sum(int(np.prod(shapes[name])) for name in shapes if name != "b")
    assert size < count * SCHEMES[scheme] / 8 + 7000


def test_what_does_not_fit_stays(model_kit, written):
    weight = model_kit.normal(64, 64)
    weight[5, 5] = 7e4
    text = "g (float[2, 64] x) => (float[2, 64] y) { h = MatMul (x, A)  y = MatMul (h, B) }"
    model = model_kit.text(text, A=weight, B=model_kit.normal(64, 64))
    original = model.clone()
    written(model, "fp16")
    reasons = model_kit.reasons(model)
    assert reasons["h_MatMul"] == "its weight reaches 7e+04, and fp16 only 65504"
    assert "y_MatMul" not in reasons
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 60
    other = original.clone()
    written(other, "bf16")
    assert not [reason for name, reason in model_kit.reasons(other).items() if "MatMul" in name]


def test_weights_that_lose_digits_are_counted(model_kit, written):
    weight = model_kit.normal(64, 64)
    weight[:, :3] = 1e-6
    weight[:, 4] = 0
    model = model_kit.text("g (float[2, 64] x) => (float[2, 64] y) { y = MatMul (x, A) }", A=weight)
    written(model, "fp16")
    reach = next(node.meta[REACH] for node in model.graph if REACH in node.meta)
    assert reach.subnormal == 3 * 64 + np.count_nonzero(np.abs(weight[:, 5:]) < 2.0**-14) and reach.count == 64 * 64


def test_a_weight_that_another_node_reads_is_not_stored_twice(model_kit, written):
    text = "g (float[64, 64] x) => (float[64, 64] y) { h = MatMul (x, A)  y = Add (h, A) }"
    model = model_kit.text(text, A=model_kit.normal(64, 64))
    original = model.clone()
    written(model, "fp16")
    assert "is read by y_Add, too" in model_kit.reasons(model)["h_MatMul"]
    model_kit.same(original, model)


def test_a_weight_that_two_read_is_stored_once(model_kit, written):
    text = "g (float[2, 64] x) => (float[2, 64] y) { h = MatMul (x, A)  e = Erf (h)  y = MatMul (e, A) }"
    model = model_kit.text(text, A=model_kit.normal(64, 64))
    assert written(model, "fp16") < 64 * 64 * 2 + 4000
    assert sum(node.op_type == "Cast" and FOLDED in node.meta for node in model.graph) == 1


def test_small_models_are_refused_with_the_reason(model_kit):
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { y = MatMul (x, A) }", A=model_kit.normal(4, 4))
    target = registry.target("x86-vnni")
    with pytest.raises(NothingQuantizedError, match="its weight has only 16 numbers"):
        registry.pipeline("quantize")(Context(target, target.scheme("nf4"), None))(model)


@pytest.mark.parametrize("scheme", ["fp16-compute", "bf16-compute", "fp8-compute"])
def test_what_this_provider_cannot_compute_in_is_refused_with_the_reason(scheme):
    with pytest.raises(OptionError, match=rf"has no scheme '{scheme}': onnxruntime's CPU provider .*; take"):
        registry.target("x86").scheme(scheme)


def test_the_main_job_stores_and_is_not_stopped_by_the_clock(model_kit, monkeypatch, tmp_path):
    """The float graph runs in the same kernels: a few percent between the two are noise, and more are not."""
    from qgraph import bench
    from qgraph.report import Latency, Speed

    model = model_kit.text(
        "g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, A) }", A=model_kit.normal(64, 64) / 50
    )
    data = {"x": model_kit.normal(8, 64)}
    latency = Latency(1.0, 1.0, 1.0)
    cases = (0.97, 1.0, None), (0.5, 1.0, NothingQuantizedError), (0.5, 0.5, SlowerError), (0.97, 0.98, SlowerError)
    for ratio, plain, error in cases:

        def timed(original, candidate, *_, ratio=ratio, plain=plain, **__):
            found = plain if candidate.model.stat().st_size > 12000 else ratio
            return Speed(1, latency, latency, found, found, found, 3)

        monkeypatch.setattr(bench, "alternate", timed)
        options = qgraph.Options(scheme="fp16", bench_seconds=0.1)
        if error is not None:
            with pytest.raises(error):
                qgraph.optimize(model, tmp_path / "out.onnx", data=data, options=options)
            continue
        report = qgraph.optimize(model, tmp_path / "out.onnx", data=data, options=options).report
        assert [(node.kernel, node.scheme) for node in report.nodes] == [("MatMul (float)", "fp16")]
        assert any("1 weights are stored in fp16" in note and "smaller than 6.1e-05" in note for note in report.notes)
