"""How faithful: outputs on data, and inner values that point at the culprit."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import compare, registry
from qgraph.compare import Runnable, decibels
from qgraph.data import inputs_of, load
from qgraph.errors import DataError, ExecutionError
from qgraph.pipeline import Context
from qgraph.session import SessionOptions

OPTIONS = SessionOptions(threads=1)


@pytest.fixture
def pair(model_kit):
    """Builds (original, other, data) where the other adds a constant to the original's output."""

    def build(shape="2, 4", offset=0.0, scale=1.0, operators="y = Identity (p)", outputs="float[{}] y", count=3):
        text = f"g (float[{shape}] x) => ({outputs.format(shape)}) {{{{ p = {{}} {operators} }}}}"
        original = model_kit.text(text.format("Mul (x, one)"), one=np.array(1, np.float32))
        other = model_kit.text(
            text.format("Add (q, off)").replace("p =", "q = Mul (x, k)  p ="),
            k=np.array(scale, np.float32),
            off=np.array(offset, np.float32),
        )
        return original, other, load(model_kit.feeds(original, count), inputs_of(original))

    return build


def test_decibels():
    assert decibels(100.0, 1.0) == 20.0
    assert decibels(1.0, 0.0) == np.inf
    assert decibels(0.0, 0.0) == np.inf
    assert decibels(0.0, 1.0) == -np.inf


def test_equal_models(pair):
    original, _, data = pair()
    found = compare.compare(Runnable(original), Runnable(original), data, OPTIONS)
    error = found.outputs["y"]
    assert (error.sqnr, error.cosine, error.max_error, error.agreement) == (np.inf, 1.0, 0.0, 1.0)
    assert found.samples == 3 and found.worst is error


def test_known_error(pair):
    original, other, data = pair(offset=0.5)
    error = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs["y"]
    signal = sum(float(np.square(batch.feeds["x"], dtype=np.float64).sum()) for batch in data)
    count = sum(batch.feeds["x"].size for batch in data)
    assert error.sqnr == pytest.approx(10 * np.log10(signal / (0.25 * count)), abs=1e-4)
    assert error.max_error == pytest.approx(0.5, abs=1e-6)
    assert error.agreement == 1.0


def test_scaling_has_cosine_one(pair):
    original, other, data = pair(scale=2.0)
    error = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs["y"]
    assert error.cosine == pytest.approx(1.0, abs=1e-6)
    assert error.sqnr == pytest.approx(0.0, abs=1e-5)


def test_opposite_sign_disagrees(pair):
    original, other, data = pair(scale=-1.0)
    error = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs["y"]
    assert error.cosine == pytest.approx(-1.0, abs=1e-6)
    assert error.agreement < 0.5


@pytest.mark.parametrize("shape, classes", [("2, 4", True), ("2, 1", False), ("2, 4, 3", False), ("4", False)])
def test_agreement_is_for_class_scores_only(pair, shape, classes):
    original, other, data = pair(shape, offset=0.1)
    error = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs["y"]
    assert (error.agreement is not None) == classes


def test_scalar_integer_and_boolean_outputs(pair):
    operators = "y = ReduceSum <keepdims = 0> (p)  i = ArgMax (p)  b = IsNaN (p)"
    outputs = "float y, int64[1, 4] i, bool[2, 4] b"
    original, other, data = pair(operators=operators, outputs=outputs, offset=0.25)
    found = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs
    assert set(found) == {"y", "i", "b"}
    assert found["y"].max_error == pytest.approx(2.0, abs=1e-4)
    assert found["i"].sqnr == np.inf and found["b"].sqnr == np.inf


def test_nan_in_the_result_is_not_a_good_result(pair):
    original, other, data = pair(offset=np.nan)
    error = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).outputs["y"]
    assert np.isnan(error.sqnr) and np.isnan(error.max_error) and np.isnan(error.cosine)


def test_other_outputs_are_an_error(pair):
    original, other, data = pair()
    other.graph.outputs[0].name = "z"
    with pytest.raises(DataError, match="outputs differ: y against z"):
        compare.compare(Runnable(original), Runnable(other), data, OPTIONS)


def test_other_shapes_are_an_error(model_kit, pair):
    original, _, data = pair()
    other = model_kit.text("g (float[2, 4] x) => (float[4, 2] y) { y = Transpose (x) }")
    with pytest.raises(DataError, match=r"No output .*'y' has shape \[4, 2\] instead of \[2, 4\] on 'batch 0'"):
        compare.compare(Runnable(original), Runnable(other), data, OPTIONS)


def test_an_output_whose_shape_differs_is_lost_and_listed(pair):
    # NonZero finds more where a constant is added.
    operators = "y = Relu (p)  z = NonZero (y)"
    original, other, data = pair(operators=operators, outputs="float[2, 4] y, int64[2, k] z", offset=0.5)
    found = compare.compare(Runnable(original), Runnable(other), data, OPTIONS)
    assert set(found.outputs) == {"y", "z"} and set(found.skipped) == {"z"}
    assert "instead of [2," in found.skipped["z"] and "'batch 0'" in found.skipped["z"]
    assert found.outputs["z"].cosine == 0.0 and found.outputs["y"].cosine > 0.5


def test_an_output_whose_shape_differs_once_counts_on_the_rest(model_kit):
    text = "g (float[n, 4] x) => (float[n, 4] y, int64[2, k] z) {{ y = {} (x)  z = NonZero (y) }}"
    original, other = model_kit.text(text.format("Relu")), model_kit.text(text.format("Neg"))
    rows = [np.full((1, 4), value, np.float32) for value in (1, 1, -1, 1)]
    data = load([{"x": row} for row in rows], inputs_of(original))
    found = compare.compare(Runnable(original), Runnable(other), data, OPTIONS)
    assert set(found.skipped) == {"z"} and "'batch 2'" in found.skipped["z"]
    # Indices are two rows a batch, and the one where nothing was found is a loss of its own two.
    assert found.outputs["z"].cosine == 3 / 4 and found.outputs["y"].cosine == -3 / 4


def test_zero_rows(model_kit):
    model = model_kit.text("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }")
    for sizes in ((0, 3, 0), (0,)):
        data = load([{"x": model_kit.normal(n, 4)} for n in sizes], inputs_of(model))
        error = compare.compare(Runnable(model), Runnable(model), data, OPTIONS).outputs["y"]
        assert (error.sqnr, error.max_error) == (np.inf, 0.0)


def test_other_inputs_are_an_error(model_kit, pair):
    original, _, data = pair()
    other = model_kit.text("g (float[2, 4] z) => (float[2, 4] y) { y = Relu (z) }")
    with pytest.raises(ExecutionError):
        compare.compare(Runnable(original), Runnable(other), data, OPTIONS)


def test_no_file_stays_behind(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    original, other, data = pair()
    compare.compare(Runnable(original), Runnable(other), data, OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_layer_errors_name_the_culprit(model_kit):
    n = model_kit.normal
    model = model_kit.text(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, W)
            r = Relu (a)
            b = Conv <pads = [1, 1, 1, 1]> (r, V)
            y = Conv <pads = [1, 1, 1, 1]> (b, V)
        }""",
        W=n(4, 3, 3, 3),
        V=n(4, 4, 3, 3),
    )
    feeds = model_kit.feeds(model)
    data = load(feeds, inputs_of(model))
    context = Context(model_kit.free(), model_kit.free().scheme("int8"), data)
    # Channels are scaled before anything is quantized: values of one name are in the units of the prepared graph.
    model = registry.pipeline("prepare")(context)(model).model
    after = registry.pipeline("write")(context)(model.clone()).model
    found = compare.layer_errors(Runnable(model), after, None, data, OPTIONS)
    assert [layer.value for layer in found] == ["r", "b", "y"]
    assert [layer.op_type for layer in found] == ["Conv"] * 3
    assert all(25 < layer.sqnr < 60 for layer in found)
    # Four codes for b: everything from there on is bad, and what is before is as good as it was.
    scale = after.graph.initializers["b_scale"]
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(64), name="b_scale")
    broken = {layer.value: layer.sqnr for layer in compare.layer_errors(Runnable(model), after, None, data, OPTIONS)}
    assert broken["r"] == found[0].sqnr
    assert broken["b"] < 15 and broken["y"] < 15


@pytest.mark.parametrize("value, same", [(np.inf, True), (-np.inf, True), (np.nan, False)])
def test_infinities_that_both_have_are_no_error(model_kit, value, same):
    text = "g (float[2, 4] x) => (float[2, 4] y) { n = Add (x, m)  y = Mul (n, k) }"
    mask = np.array([0, 0, 1, 1], np.float32)
    mask[2:] = value
    original = model_kit.text(text, m=mask, k=np.array(1, np.float32))
    other = model_kit.text(text, m=mask, k=np.array(1.125, np.float32))
    data = load(model_kit.feeds(original), inputs_of(original))
    if not same:
        with pytest.raises(DataError, match=r"Output 'y' of the original is NaN on 'batch 0'"):
            compare.compare(Runnable(original), Runnable(other), data, OPTIONS)
        return
    found = compare.compare(Runnable(original), Runnable(other), data, OPTIONS).worst
    assert found.sqnr == pytest.approx(20 * np.log10(8), abs=1e-3), "of the finite ones alone"
    assert found.cosine == pytest.approx(1) and np.isfinite(found.max_error)
    finite = model_kit.text(text, m=np.zeros(4, np.float32), k=np.array(1, np.float32))
    # Infinite in one only: beyond measure, which is told as not a number.
    for pair in ((original, finite), (finite, original)):
        assert np.isnan(compare.compare(*map(Runnable, pair), data, OPTIONS).worst.sqnr)


def test_layer_errors_of_a_model_without_quantized_values(model_kit):
    model = model_kit.text("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }")
    data = load(model_kit.feeds(model), inputs_of(model))
    assert compare.layer_errors(Runnable(model), model, None, data, OPTIONS) == []


def test_models_in_files(pair, tmp_path):
    original, other, data = pair(offset=0.5)
    ir.save(original, tmp_path / "a.onnx")
    ir.save(other, tmp_path / "b.onnx")
    found = compare.compare(Runnable(tmp_path / "a.onnx"), Runnable(tmp_path / "b.onnx"), data, OPTIONS)
    assert found.outputs["y"].max_error == pytest.approx(0.5, abs=1e-6)
