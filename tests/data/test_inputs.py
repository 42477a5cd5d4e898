"""What a model takes, and arrays that fit it: batches, lengths, scalars, types that lose nothing."""

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.data import InputSpec, inputs_of, load
from qgraph.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
ONE = [InputSpec("x", F32, (None, 3))]
TWO = [InputSpec("ids", I64, (None, None)), InputSpec("mask", F32, (None, None))]


def test_inputs_of_a_model(model_kit):
    model = model_kit.text(
        "g (float[N, 3] x, int64[2] ids, float s, bool[] any) => (float[N, 3] y) { y = Add(x, w) }",
        w=np.ones(3, np.float32),
    )
    found = inputs_of(model)
    assert found[:2] == [InputSpec("x", F32, (None, 3)), InputSpec("ids", I64, (2,))]
    assert (found[2].name, found[2].dtype, found[3].dtype) == ("s", F32, np.dtype(bool))
    assert [spec.batch for spec in found[:2]] == [None, 2]


def test_inputs_with_a_default_need_not_be_given():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3] x, float[3] w) => (float[N, 3] y) <float[3] w = {1, 2, 3}> { y = Mul(x, w) }"""
    assert [spec.name for spec in inputs_of(ir.from_onnx_text(text))] == ["x"]


def test_an_input_that_is_no_tensor_is_refused():
    x = ir.Value(name="x", type=None)
    node = ir.node("Identity", [x])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}), ir_version=8)
    with pytest.raises(DataError, match="Input 'x' is not a tensor"):
        inputs_of(model)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize(("batch", "count", "runs"), [(None, 6, 6), (1, 6, 6), (2, 6, 3), (6, 6, 1)])
def test_files_are_cut_to_the_models_batch(array, feeds_of, same, tmp_path, suffix, batch, count, runs):
    rows, path = array(count, 3), tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    else:
        np.savez(path, x=rows)
    found = feeds_of(path, [InputSpec("x", F32, (batch, 3))])
    same(found, [{"x": part} for part in np.split(rows, runs)])


def test_an_array_of_whole_inputs_is_taken_apart(array, feeds_of, same, tmp_path):
    stack = array(5, 3, 4)
    np.savez(tmp_path / "a.npz", x=stack)
    expected = [{"x": one} for one in stack]
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (3, 4))]), expected)
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (None, 4))]), expected)
    np.savez(tmp_path / "b.npz", x=stack[:, None])
    same(feeds_of(tmp_path / "b.npz", [InputSpec("x", F32, (1, 3, 4))]), [{"x": one[None]} for one in stack])


def test_sequences_of_different_lengths(array, feeds_of, same, tmp_path):
    lengths = (5, 9, 2)
    for number, length in enumerate(lengths):
        np.savez(tmp_path / f"{number}.npz", ids=np.arange(2 * length).reshape(2, length), mask=array(2, length))
    assert [feed["ids"].shape for feed in feeds_of(tmp_path, TWO)] == [(1, n) for n in lengths for _ in range(2)]
    ragged = [{"ids": np.zeros((1, n), np.int64), "mask": array(1, n)} for n in lengths]
    same(feeds_of(ragged, TWO), ragged)


def test_scalars_go_with_every_sample(array, feeds_of, same, tmp_path):
    inputs = [*ONE, InputSpec("scale", F32, ())]
    np.savez(tmp_path / "a.npz", x=array(2, 3), scale=np.float32(0.5))
    same(feeds_of(tmp_path / "a.npz", inputs), [{"x": row[None], "scale": np.float32(0.5)} for row in array(2, 3)])
    np.savez(tmp_path / "b.npz", scale=np.float32(0.5))
    same(feeds_of(tmp_path / "b.npz", inputs[1:]), [{"scale": np.float32(0.5)}])


@pytest.mark.parametrize("suffix", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layout_and_compression_change_nothing(feeds_of, same, tmp_path, suffix, order):
    rows = np.asarray(np.arange(6 * 3 * 4).reshape(6, 3, 4), np.float32, order=order)
    path = tmp_path / ("a.npy" if suffix == "npy" else "a.npz")
    if suffix == "npy":
        np.save(path, rows)
    else:
        (np.savez if suffix == "npz" else np.savez_compressed)(path, x=rows)
    found = feeds_of(path, [InputSpec("x", F32, (None, 3, 4))])
    same(found, [{"x": np.ascontiguousarray(rows[i : i + 1])} for i in range(6)])


@pytest.mark.parametrize("suffix", ["npy", "npz", "compressed"])
def test_files_are_read_in_memory_that_does_not_grow_with_them(tmp_path, suffix):
    def peak(count):
        rows = np.lib.format.open_memmap(tmp_path / f"{count}.npy", "w+", np.float32, (count, 64, 256))
        for start in range(0, count, 64):
            rows[start : start + 64] = start
        rows.flush()
        path = tmp_path / f"{count}.{suffix[:3]}"
        if suffix != "npy":
            path = tmp_path / f"{count}.npz"
            (np.savez if suffix == "npz" else np.savez_compressed)(path, x=rows)
        del rows
        data = load(path, [InputSpec("x", F32, (None, 64, 256))])
        tracemalloc.start()
        assert sum(1 for _ in data) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, path.stat().st_size

    (few, _), (many, size) = peak(16), peak(480)
    assert size > 30e6 or suffix == "compressed"
    assert many < few + 300_000 and many < 2_000_000


def test_any_rank(array, feeds_of, same, tmp_path):
    np.savez(tmp_path / "a.npz", x=array(2, 3, 4))
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, None)]), [{"x": one[None]} for one in array(2, 3, 4)])


@pytest.mark.parametrize(
    ("given_type", "wanted"),
    [("float64", "float32"), ("float16", "float32"), ("int32", "int64"), ("int64", "int32"), ("uint8", "int64")],
)
def test_types_that_lose_nothing_are_converted(feeds_of, given_type, wanted):
    given_array = np.arange(6).reshape(2, 3).astype(given_type)
    (feed,) = feeds_of([{"x": given_array}], [InputSpec("x", np.dtype(wanted), (None, 3))])
    assert feed["x"].dtype == wanted
    np.testing.assert_array_equal(feed["x"], given_array)
