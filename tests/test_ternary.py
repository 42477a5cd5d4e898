"""Weights of three and of two values: found, packed without loss, made by rounding, and packed further on disk."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import audit, modelio, registry, ternary
from qgraph.formats import BINARY, TERNARY
from qgraph.pipeline import Context
from qgraph.spec import PerBlock, QuantSpec
from qgraph.targets import FOLDED, KERNEL


def three(*shape, seed=0):
    """Seeded -1, 0 and 1."""
    return np.random.default_rng([seed, *shape]).integers(-1, 2, shape).astype(np.float32)


def two(*shape, seed=0):
    """Seeded -1 and 1."""
    return np.random.default_rng([seed, *shape]).choice(np.float32([-1, 1]), shape)


def column_scales(count):
    return np.geomspace(0.003, 5, count, dtype=np.float32)


# -- found ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([0, 1]), st.integers(128, 300), st.integers(1, 9), st.sampled_from(["all", "column", "block"]))
def test_what_is_ternary_is_found_and_kept_exactly(axis, inner, columns, granularity):
    codes = three(inner, columns)
    scale = {
        "all": np.float32([[0.37]]),
        "column": column_scales(columns)[None],
        "block": np.repeat(column_scales(columns * 3).reshape(3, columns), 128, axis=0)[:inner],
    }[granularity]
    weight = np.ascontiguousarray((codes * scale).T if axis else codes * scale)
    grid = ternary.detect(weight, axis)
    assert grid is not None and (grid.format, grid.size) == (TERNARY, 128)
    found = ternary.blocks_of(weight, grid.spec(axis))
    np.testing.assert_array_equal(found.real, weight if axis else weight.T)
    # Equal scales can be stored once; one column, or one block, makes them so in more ways than it was drawn.
    least = {"all": 2, "column": 1, "block": 0}[granularity]
    assert grid.shared >= least
    if grid.shared == 2:
        assert len(np.unique(found.scale)) == 1
    if grid.shared == 1:
        assert (found.scale == found.scale[:, :1]).all()


def test_blocks_of_zeros_and_columns_of_zeros():
    weight = three(256, 6) * column_scales(6)
    weight[:128, 2] = 0
    weight[:, 4] = 0
    grid = ternary.detect(weight, 0)
    assert grid.shared == 1
    found = ternary.blocks_of(weight, grid.spec(0))
    np.testing.assert_array_equal(found.real, weight.T)
    assert (found.scale == found.scale[:, :1]).all() and (found.scale > 0).all()


def test_smaller_blocks_are_found_where_larger_ones_are_not():
    for size in (64, 32):
        weight = three(256, 5) * np.repeat(column_scales(256 // size), size)[:, None]
        assert ternary.detect(weight, 0).size == size
    assert ternary.detect(three(256, 5) * np.repeat(column_scales(16), 16)[:, None], 0) is None


def test_two_values_are_told_from_three_and_rounding_is_forgiven():
    weight = two(130, 7) * np.float32(0.02)
    assert ternary.detect(weight, 0).format == BINARY, "what fills the last block up is no zero"
    noisy = weight * (1 + 1e-6 * np.random.default_rng(0).standard_normal(weight.shape)).astype(np.float32)
    grid = ternary.detect(noisy, 0)
    assert grid.format == BINARY
    np.testing.assert_allclose(ternary.blocks_of(noisy, grid.spec(0)).real, noisy.T, rtol=2e-5)


def test_what_is_not_ternary_is_not_found(model_kit):
    weight = three(256, 8) * np.float32(0.5)
    for change in (0.4999, 0.25, 1.0, np.nan, np.inf):
        other = weight.copy()
        other[255, 7] = change
        other[254, 7] = 0.5
        assert ternary.detect(other, 0) is None, change
    assert ternary.detect(model_kit.normal(256, 8), 0) is None
    assert ternary.detect(np.zeros((256, 8), np.float32), 0) is None, "nothing to scale"
    assert ternary.detect(weight[:31], 0) is None, "less than the smallest block"
    assert ternary.detect(weight[None], 0) is None


# -- made -----------------------------------------------------------------------------------------------------------


def spec_of(observer, axis=0, size=128):
    return QuantSpec(TERNARY, PerBlock(axis, size), symmetric=True, observer=observer)


@pytest.mark.parametrize("axis", [0, 1])
def test_absmean_is_that_of_the_paper(model_kit, axis):
    weight = model_kit.normal(300, 40, seed=3)
    gamma = np.abs(weight.astype(np.float64)).mean()
    expected = np.clip(np.rint(weight / gamma), -1, 1) * gamma
    found = ternary.blocks_of(weight.T if axis else weight, spec_of(ternary.ABSMEAN, axis))
    np.testing.assert_allclose(found.real.T, expected, rtol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([32, 64, 128]))
def test_fitted_scales_lose_no_more_than_those_they_start_from(seed, size):
    weight = np.random.default_rng(seed).standard_t(4, (200, 6)).astype(np.float32)
    found = ternary.blocks_of(weight, spec_of(ternary.FITTED, 0, size)).real.T
    for start in range(0, 200, size):
        part = weight[start : start + size]
        gamma = np.abs(part).mean(axis=0)
        plain = np.clip(np.rint(part / gamma), -1, 1) * gamma
        better = np.square(part - found[start : start + size]).sum(axis=0)
        assert (better <= np.square(part - plain).sum(axis=0) * (1 + 1e-5)).all()


def test_chunks_change_nothing(monkeypatch, model_kit):
    weight = model_kit.normal(260, 50)
    whole = ternary.blocks_of(weight, spec_of(ternary.FITTED))
    mean = ternary.blocks_of(weight, spec_of(ternary.ABSMEAN))
    exact = three(260, 50)
    grid = ternary.detect(exact, 0)
    monkeypatch.setattr(ternary, "_CHUNK", 700)
    np.testing.assert_array_equal(ternary.blocks_of(weight, spec_of(ternary.FITTED)).real, whole.real)
    np.testing.assert_allclose(ternary.blocks_of(weight, spec_of(ternary.ABSMEAN)).real, mean.real, rtol=1e-6)
    assert ternary.detect(exact, 0) == ternary.detect(exact.T.copy(), 1) == grid


# -- on the runtime -------------------------------------------------------------------------------------------------


@pytest.fixture
def written(model_kit, tmp_path):
    """Brings a model (changed in place) into a scheme; returns what each planned node runs as, and the file's size."""

    def write(model, scheme="int2", **options):
        target = model_kit.free()
        context = Context(target, target.scheme(scheme), None, **options)
        registry.pipeline("quantize")(context)(model)
        path = tmp_path / "ternary.onnx"
        with modelio.Workspace() as workspace:
            modelio.stage(model, path, workspace).commit()
        found = audit.audit(path, audit.plan_of(model), target)
        assert found.clean, found.summary
        return found.kernels, path.stat().st_size

    return write


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("make", [three, two])
@pytest.mark.parametrize("inner, transposed", [(256, 0), (256, 1), (200, 0), (300, 1)])
def test_a_ternary_weight_runs_in_two_bits_without_loss(model_kit, written, inner, transposed, make, pack):
    weight = make(inner, 24) * column_scales(24)
    text = f"Gemm <transB = {transposed}> (x, W, b)"
    model = model_kit.text(
        f"g (float[n, {inner}] x) => (float[n, 24] y) {{ y = {text} }}",
        W=weight.T.copy() if transposed else weight,
        b=model_kit.normal(24),
    )
    original = model.clone()
    kernels, _ = written(model, pack=pack)
    assert kernels == {"y_Gemm": "MatMulNBits"}
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    assert node.attributes.get_int("bits") == 2 and node.meta[KERNEL].weight[1].observer == ternary.EXACT
    # Whole numbers up to 127 in every block of a row are what its eight bits hold exactly: then all of it is.
    x = np.random.default_rng(1).integers(-127, 128, (3, inner)).astype(np.float32)
    x[:, ::32] = 127
    expected, found = model_kit.run(original, {"x": x})["y"], model_kit.run(model, {"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", ["int2", "int4", "int8-weights", "weights", "ternary", "ternary-blocks"])
def test_every_weight_only_scheme_knows_what_is_ternary(model_kit, written, scheme):
    weight = three(256, 8) * np.float32(0.03)
    model = model_kit.text("g (float[2, 256] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=weight)
    original = model.clone()
    written(model, scheme)
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 38, "that of activations in eight bits"


@pytest.mark.parametrize("make, bits", [(three, 1.6), (two, 1.0)])
def test_packed_weights_take_the_bits_that_they_need(model_kit, written, make, bits):
    count = 1280 * 640
    model = model_kit.text(
        "g (float[2, 1280] x) => (float[2, 640] y) { y = MatMul (x, W) }", W=make(1280, 640) * np.float32(0.1)
    )
    plain, packed = model.clone(), model
    _, before = written(plain)
    _, after = written(packed, pack=True)
    assert before > 2 * count / 8
    assert bits * count / 8 < after < bits * count / 8 + 12_000, "tables and nodes are all that is added"
    assert model_kit.sqnr(plain, packed, model_kit.feeds(plain)) == np.inf, "the same codes, the same kernel"
    assert {node.op_type for node in packed.graph if FOLDED not in node.meta} == {"MatMulNBits"}


def test_a_shared_ternary_weight_is_packed_once(model_kit, written):
    model = model_kit.text(
        "g (float[2, 256] x) => (float[2, 256] y) { h = MatMul (x, W)  e = Erf (h)  y = MatMul (e, W) }",
        W=three(256, 256),
    )
    original = model.clone()
    kernels, size = written(model, pack=True)
    assert len(kernels) == 2 and size < 256 * 256 * 1.6 / 8 + 12_000
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


def test_only_ternary_weights_are_packed(model_kit, written):
    model = model_kit.text(
        "g (float[2, 256] x) => (float[2, 128] y) { h = MatMul (x, W)  y = MatMul (h, V) }",
        W=three(256, 256),
        V=model_kit.normal(256, 128),
    )
    original = model.clone()
    kernels, _ = written(model, "int4", pack=True)
    assert kernels == {"h_MatMul": "MatMulNBits", "y_MatMul": "MatMulNBits"}
    assert {node.meta[FOLDED] for node in model.graph if FOLDED in node.meta} == {"h_MatMul"}
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 15


def test_the_audit_sees_what_is_not_folded(model_kit, tmp_path):
    """An unpacking that depends on an input runs at every run, and that is a problem."""
    model = model_kit.text(
        "g (float[2, 128] x, float[1] s) => (float[2, 8] y) { V = Mul (W, s)  y = MatMul (x, V) }",
        W=model_kit.normal(128, 8),
    )
    mul, product = model.graph
    mul.name, product.name = "brings_back", "product"
    mul.meta[FOLDED] = "product"
    target = model_kit.free()
    ir.save(model, tmp_path / "m.onnx")
    found = audit.audit(tmp_path / "m.onnx", audit.plan_of(model), target)
    assert found.problems == {"product": "its weight is not brought back at load, but by Mul at every run"}


def test_the_main_job_finds_packs_and_says_so(model_kit, model_free_cpu, tmp_path):
    model = model_kit.text(
        "g (float[n, 256] x) => (float[n, 256] y) { y = MatMul (x, W) }", W=three(256, 256) * np.float32(0.02)
    )
    options = qgraph.Options(scheme="int4", pack=True, bench_seconds=0)
    result = qgraph.optimize(model, tmp_path / "out.onnx", data={"x": model_kit.normal(8, 256)}, options=options)
    assert any("1 weights are ternary already" in note for note in result.report.notes)
    assert [(n.kernel, n.scheme) for n in result.report.nodes] == [("MatMulNBits", "int4")], "and no unpacking"
    assert (tmp_path / "out.onnx").stat().st_size < 256 * 256 * 1.6 / 8 + 12_000


def test_scaling_channels_leaves_ternary_weights_ternary(model_kit):
    """A layer before and a layer after, as Equalize likes them; factors between them would end it."""
    weight = three(128, 128) * np.float32(0.1)
    for first, second in ((weight, model_kit.normal(128, 128)), (model_kit.normal(128, 128), weight)):
        model = model_kit.text(
            "g (float[8, 128] x) => (float[8, 128] y) { h = MatMul (x, A)  r = Relu (h)  y = MatMul (r, B) }",
            A=first * column_scales(128) if first is not weight else first,
            B=second,
        )
        target = model_kit.free()
        feeds = model_kit.feeds(model, 4)
        data = qgraph.data.load(feeds, qgraph.data.inputs_of(model))
        context = Context(target, target.scheme("auto"), data, smoothing="explicit")
        registry.pipeline("prepare")(context)(model)
        kept = [v.const_value.numpy() for v in model.graph.initializers.values() if ternary.GRID in v.meta]
        assert len(kept) == 1 and len(np.unique(np.abs(kept[0]))) == 2


def test_grids_are_values():
    grid = ternary.Grid(TERNARY, 128, 1)
    assert dataclasses.replace(grid, shared=1) == grid
    assert grid.spec(1) == QuantSpec(TERNARY, PerBlock(1, 128), symmetric=True, observer="exact")
