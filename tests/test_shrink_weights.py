"""ShrinkWeights and StoreBlocks: weights stored in few bits, computed in int8 or float, unpacked once at load."""

import numpy as np
import onnx_ir as ir
import pytest
from qgraph.passes import InferTypes, InsertBlocks, InsertRows, RoundBlocks, ShrinkWeights, StoreBlocks

import qgraph
from qgraph import registry
from qgraph.data import inputs_of, load
from qgraph.held import HELD
from qgraph.pipeline import Context
from qgraph.targets import KERNEL

ROWS, WIDTH, INNER = 96, 320, 528


@pytest.fixture
def model(model_kit):
    """Two products of many rows, the second a Gemm with its weight turned over, and 528 is no whole number of 64s."""
    return model_kit.text(
        f"""
        g (float[{ROWS},{WIDTH}] x) => (float[{ROWS},{WIDTH}] y) {{
            h = MatMul(x, a)
            r = Relu(h)
            y = Gemm<transB=1>(r, b, c)
        }}""",
        a=model_kit.normal(WIDTH, INNER, scale=0.1),
        b=model_kit.normal(WIDTH, INNER, seed=1, scale=0.1),
        c=model_kit.normal(WIDTH),
    )


def _context(model, feeds, scheme="a8w4", target="x86-vnni", size=64, **changes):
    target = registry.target(target).in_blocks(size)
    data = load(feeds, inputs_of(model)) if feeds is not None else None
    return Context(target, target.scheme(scheme), data, **changes)


def _shrunk(model, feeds, size=64, scheme="int4"):
    context = _context(model, feeds, size=size)
    learn = None if feeds is None else RoundBlocks(context.data, (InsertBlocks(), InsertRows()))
    shrink = ShrinkWeights(context.target, context.target.scheme(scheme), learn)
    return shrink(InferTypes()(model.clone()).model).model


@pytest.mark.parametrize("scheme", ["int4", "int2", "int8-weights"])
@pytest.mark.parametrize("size", [32, 128])
def test_what_is_stored_computes_the_same_bits(model_kit, model, scheme, size):
    shrunk = _shrunk(model, model_kit.feeds(model), size, scheme)
    stored = StoreBlocks()(shrunk.clone()).model
    feeds = model_kit.feeds(model, 2, seed=5)
    for feed in feeds:
        np.testing.assert_array_equal(model_kit.run(stored, feed)["y"], model_kit.run(shrunk, feed)["y"])
    assert all(value.dtype != ir.DataType.FLOAT or value.size < 6000 for value in _arrays(stored).values())


def _arrays(model):
    return {name: value.const_value for name, value in model.graph.initializers.items()}


def test_eight_bits_of_few_bits_have_the_same_bits(model_kit, model):
    feeds = model_kit.feeds(model, 6)
    written = registry.pipeline("quantize")(_context(model, feeds))(model.clone())
    steps = [
        one for one in registry.pipeline("quantize")(_context(model, feeds)).passes if not isinstance(one, StoreBlocks)
    ]
    plain = model.clone()
    for step in steps:
        plain = step(plain).model
    assert {str(a.dtype) for a in _arrays(plain).values() if a.size > 50_000} == {"INT8"}
    assert {str(a.dtype) for a in _arrays(written.model).values() if a.size > 50_000} == {"UINT8"}
    for feed in feeds:
        np.testing.assert_array_equal(model_kit.run(written.model, feed)["y"], model_kit.run(plain, feed)["y"])


def test_the_file_is_as_small_as_in_blocks_and_computed_in_int8(model_kit, model, tmp_path):
    feeds = model_kit.feeds(model, 40)
    result = {
        scheme: qgraph.optimize(
            model, tmp_path / f"{scheme}.onnx", data=feeds, scheme=scheme, block_size=size, force=True, bench_seconds=0
        )
        for scheme, size in (("a8w4", 32), ("int8", None), ("int4", 32))
    }
    sizes = {scheme: (tmp_path / f"{scheme}.onnx").stat().st_size for scheme in result}
    assert sizes["a8w4"] < 0.7 * sizes["int8"]
    # Nodes that unpack take ten kilobytes a weight; halves for scales save as many.
    assert sizes["a8w4"] < 1.05 * sizes["int4"]
    products = ("MatMul", "Gemm", "MatMulInteger")  # Static or dynamic: both are as fast, and nearly as faithful.
    kernels = {node.kernel for node in result["a8w4"].report.nodes if node.op_type in products and node.kernel}
    assert kernels and not any("NBits" in kernel for kernel in kernels)
    sqnr = {scheme: one.report.fidelity.worst.sqnr for scheme, one in result.items()}
    assert sqnr["int4"] - 1.5 < sqnr["a8w4"] < sqnr["int8"]


def test_learned_codes_lose_less_than_the_nearest(model_kit, model):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((12, WIDTH)).astype(np.float32)
    feeds = [{"x": (rng.standard_normal((ROWS, 12)) @ mixing).astype(np.float32)} for _ in range(8)]
    learned, nearest = _shrunk(model, feeds[:6]), _shrunk(model, None)
    assert model_kit.sqnr(model, learned, feeds[6:]) > model_kit.sqnr(model, nearest, feeds[6:]) + 3


def test_without_data_products_are_dynamic(model_kit, model):
    written = registry.pipeline("quantize")(_context(model, None))(model.clone()).model
    assert model_kit.ops(written).count("MatMulInteger") == 2
    assert model_kit.sqnr(model, written, model_kit.feeds(model, 4)) > 15


def test_what_stays_in_float_keeps_its_weight_or_has_it_stored(model_kit, model):
    feeds = model_kit.feeds(model, 6)
    kept = registry.pipeline("quantize")(_context(model, feeds, keep_float=("MatMul",)))(model.clone()).model
    whole = [a for a in _arrays(kept).values() if a.size > 50_000 and str(a.dtype) == "FLOAT"]
    assert [len(np.unique(a.numpy())) > 50_000 for a in whole] == [True]
    gemm = next(node.name for node in registry.pipeline("plan")(_context(model, feeds))(model.clone()).model.graph)
    prices = {(gemm, "int8"): np.inf, (gemm, "int8-dynamic"): np.inf, (gemm, "int4"): np.inf}
    left = registry.pipeline("quantize")(_context(model, feeds, prices=prices))(model.clone()).model
    assert not [a for a in _arrays(left).values() if a.size > 50_000 and str(a.dtype) == "FLOAT"]
    assert model_kit.sqnr(model, left, feeds) > 15


def test_a_shared_weight_is_stored_once(model_kit):
    model = model_kit.text(
        """
        g (float[64,96] x) => (float[64,96] y) {
            h = MatMul(x, w)
            t = Tanh(h)
            y = MatMul(t, w)
        }""",
        w=model_kit.normal(96, 96, scale=0.2),
    )
    stored = StoreBlocks()(_shrunk(model, model_kit.feeds(model), 32)).model
    assert sum(array.nbytes for array in _arrays(stored).values() if array.size > 4000) == 96 * 96 // 2
    model_kit.same(_shrunk(model, model_kit.feeds(model), 32), stored, tolerance=0)


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_scales_are_halves_where_halves_hold_them(model_kit, model, size):
    model.graph.initializers["a"].const_value = ir.Tensor(model_kit.normal(WIDTH, INNER, scale=0.1 * size), name="a")
    shrunk = _shrunk(model, None)
    assert sum(HELD in value.meta for value in shrunk.graph.initializers.values()) == 2
    stored = StoreBlocks()(shrunk.clone()).model
    scales = [a for name, a in _arrays(stored).items() if name.startswith("a_") and name.endswith("_scales")]
    assert [str(a.dtype) for a in scales] == ["FLOAT" if size < 1 else "FLOAT16"]
    model_kit.same(shrunk, stored, tolerance=0)


def test_single_rows_stay_in_blocks(model_kit):
    """For one row the bytes of the weight are what takes time, and four bits are half of eight."""
    model = model_kit.text(
        "g (float[1,1024] x) => (float[1,2048] y) { y = MatMul(x, w) }", w=model_kit.normal(1024, 2048, scale=0.05)
    )
    feeds = model_kit.feeds(model, 70)
    shrunk = _shrunk(model, feeds, size=128)
    written = registry.pipeline("quantize")(_context(model, feeds, size=128))(model.clone()).model
    assert model_kit.ops(written) == ["MatMulNBits"]
    # Its codes are those that were learned, not those nearest to what they stand for.
    model_kit.same(shrunk, written, feeds[:2], tolerance=0.03)
    held = next(value.meta[HELD] for value in shrunk.graph.initializers.values())
    node = written.graph[0]
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), held.blocks.codes)
    assert node.meta[KERNEL].scheme == "int4"


def test_targets_that_take_other_forms_do_not_have_it():
    assert "a8w4" in registry.target("arm64").schemes
    assert not any("a8w4" in registry.target(name).schemes for name in ("qnn", "webgpu", "cuda", "coreml"))
