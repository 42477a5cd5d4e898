"""Weight-only int8: products in blocks, and the rows of tables, with the numbers that they should have."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import audit, registry
from qgraph.pipeline import Context


@pytest.fixture
def written(model_kit, tmp_path):
    """Brings a model (changed in place) into weight-only int8; returns what each planned node runs as."""

    def write(model, **options):
        target = model_kit.free()
        context = Context(target, target.scheme("int8-weights"), None, **options)
        registry.pipeline("quantize")(context)(model)
        ir.save(model, tmp_path / "weights.onnx")
        found = audit.audit(tmp_path / "weights.onnx", audit.plan_of(model), target)
        assert found.clean, found.summary
        return found.kernels

    return write


def blocked(weight, size=128):
    """[K, N] after rounding each run of `size` along K to 8 symmetric bits."""
    found = weight.copy()
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        step = np.abs(part).max(axis=0, keepdims=True) / 127
        found[start : start + size] = np.rint(part / np.where(step > 0, step, 1)) * step
    return found


@pytest.mark.parametrize("inner", [128, 200, 256, 300])
@pytest.mark.parametrize("transposed, bias", [(0, None), (0, (24,)), (1, None), (1, (24,)), (1, (1, 24))])
def test_products_have_the_numbers_of_their_blocks(model_kit, written, inner, transposed, bias):
    """Also where K is no multiple of the block."""
    weight = model_kit.normal(inner, 24)
    weight[5:7] *= 20
    constants = {"W": weight.T.copy() if transposed else weight}
    text = f"Gemm <transB = {transposed}> (x, W{', b' if bias else ''})" if transposed or bias else "MatMul (x, W)"
    if bias:
        constants["b"] = model_kit.normal(*bias, scale=5)
    model = model_kit.text(f"g (float[n, {inner}] x) => (float[n, 24] y) {{ y = {text} }}", **constants)
    original = model.clone()
    assert list(written(model).values()) == ["MatMulNBits"]
    feeds = model_kit.feeds(original, 4, free=3)
    assert model_kit.sqnr(original, model, feeds) > 32
    # The rest of the error is that of the activations, which the kernel rounds in blocks, too.
    exact = blocked(weight)
    for feed in feeds:
        expected = feed["x"] @ exact + constants.get("b", 0)
        found = model_kit.run(model, feed)["y"]
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    codes = next(array for array in model_kit.tensors(model).values() if array.dtype == np.uint8)
    assert codes.shape == (24, -(-inner // 128), 128)
    scales = next(
        a for a in model_kit.tensors(model).values() if a.dtype == np.float32 and a.ndim == 2 and len(a) == 24
    )
    restored = ((codes.astype(np.float32) - 128) * scales[..., None]).reshape(24, -1)
    np.testing.assert_allclose(restored[:, :inner].T, exact, atol=1e-5)
    assert (restored[:, inner:] == 0).all(), "what fills the last block up"


def test_blocks_of_zeros(model_kit, written):
    weight = model_kit.normal(256, 8)
    weight[128:, 3] = 0
    weight[:, 4] = 0
    model = model_kit.text("g (float[2, 256] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=weight)
    original = model.clone()
    written(model)
    feeds = model_kit.feeds(original)
    assert model_kit.sqnr(original, model, feeds) > 35
    assert np.abs(model_kit.run(model, feeds[0])["y"][:, 4]).max() < 1e-3


def test_a_shared_weight_is_stored_once(model_kit, written):
    model = model_kit.text(
        "g (float[2, 128] x) => (float[2, 128] y) { h = MatMul (x, W)  e = Erf (h)  y = MatMul (e, W) }",
        W=model_kit.normal(128, 128),
    )
    original = model.clone()
    assert written(model) == {"h_MatMul": "MatMulNBits", "y_MatMul": "MatMulNBits"}
    assert [a.dtype for a in model_kit.tensors(model).values() if a.size == 128 * 128] == [np.uint8]
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


def test_a_weight_that_is_read_both_ways_round(model_kit, written):
    model = model_kit.text(
        "g (float[2, 128] x) => (float[2, 128] y) { h = MatMul (x, W)  e = Erf (h)  y = Gemm <transB = 1> (e, W) }",
        W=model_kit.normal(128, 128),
    )
    original = model.clone()
    assert len(written(model)) == 2
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


def test_batched_activations(model_kit, written):
    model = model_kit.text(
        "g (float[2, 3, 5, 128] x) => (float[2, 3, 5, 8] y) { y = MatMul (x, W) }", W=model_kit.normal(128, 8)
    )
    original = model.clone()
    assert written(model) == {"y_MatMul": "MatMulNBits"}
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 35


def test_fewer_rows_than_a_block_are_refused(model_kit):
    model = model_kit.text("g (float[2, 127] x) => (float[2, 8] y) { y = MatMul (x, W) }", W=model_kit.normal(127, 8))
    target = model_kit.free()
    found = target.kernel(model.graph[0], target.scheme("int8-weights"))
    assert found.reason == "its 127 rows are less than one block of 128"


# -- rows of tables -------------------------------------------------------------------------------------------------


def test_tables_keep_a_scale_for_each_row(model_kit, written):
    table = model_kit.normal(50, 16) * np.geomspace(0.01, 100, 50, dtype=np.float32)[:, None]
    model = model_kit.text("g (int64[a, b] i) => (float[a, b, 16] y) { y = Gather (T, i) }", T=table)
    original = model.clone()
    assert written(model) == {"y_Gather": "Gather"}
    rows = np.arange(50).reshape(5, 10)
    found = model_kit.run(model, {"i": rows})["y"].reshape(50, 16)
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - table) <= 0.51 * step).all()
    assert [a.dtype for a in model_kit.tensors(model).values() if a.size == table.size] == [np.int8]
    feeds = [{"i": np.array([[-1, 3]])}]
    assert model_kit.sqnr(original, model, feeds) > 30, "counted from the end, too"


def test_a_table_that_two_gathers_read_is_stored_once(model_kit, written):
    model = model_kit.text(
        "g (int64[4] i, int64[4] j) => (float[4, 16] y) { a = Gather (T, i)  b = Gather (T, j)  y = Add (a, b) }",
        T=model_kit.normal(9, 16),
    )
    original = model.clone()
    assert written(model) == {"a_Gather": "Gather", "b_Gather": "Gather"}
    assert [a.dtype for a in model_kit.tensors(model).values() if a.size == 9 * 16] == [np.int8]
    assert model_kit.sqnr(original, model, model_kit.feeds(original)) > 30


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Gather <axis = 1> (T, i)", "only rows of a table"),
        ("Gather (V, i)", "only rows of a table"),
        ("Gather (I, i)", "the table is not float32"),
    ],
)
def test_what_is_no_table_is_refused(model_kit, text, reason):
    model = model_kit.text(
        f"g (int64[4] i) => (y) {{ y = {text} }}",
        T=model_kit.normal(9, 16),
        V=model_kit.normal(9, 4, 4),
        I=np.arange(32).reshape(8, 4),
    )
    target = model_kit.free()
    assert reason in target.kernel(model.graph[0], target.scheme("int8-weights")).reason
