"""Errors in data: each names the batch and the input."""

import numpy as np
import onnx
import pytest

from qgraph.data import InputSpec, load
from qgraph.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
ONE = [InputSpec("x", F32, (None, 3))]
TWO = [InputSpec("ids", I64, (None, None)), InputSpec("mask", F32, (None, None))]
GOOD = {"x": np.ones((1, 3), np.float32)}


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.float32([[1, np.nan, 2]])}, r"Input 'x' of 'batch 1' holds NaN values"),
        ({"x": np.float32([[1, np.inf, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": np.float32([[1, -np.inf, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": np.float64([[1, 1e300, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": np.ones((1, 4), np.float32)}, r"Input 'x' of 'batch 1' has shape 1x4, but the model takes \?x3"),
        ({"x": np.ones((3,), np.float32)}, r"Input 'x' of 'batch 1' has shape 3, but the model takes \?x3"),
        ({"x": np.ones((1, 1, 3), np.float32)}, r"Input 'x' of 'batch 1' has shape 1x1x3, but the model takes \?x3"),
        ({"x": np.float32(1)}, r"Input 'x' of 'batch 1' has shape a scalar, but the model takes \?x3"),
        ({"x": np.ones((1, 3), np.int64)}, r"Input 'x' of 'batch 1' is int64, but the model takes float32"),
        ({"x": np.ones((1, 3), bool)}, r"Input 'x' of 'batch 1' is bool, but the model takes float32"),
        ({"x": np.ones((1, 3), complex)}, r"Input 'x' of 'batch 1' is complex128"),
        ({"x": np.array([["a", "b", "c"]])}, r"Input 'x' of 'batch 1' is <U1"),
        ({"x": None}, r"Input 'x' of 'batch 1' is object"),
        ({"x": [[1.0, 2.0], [3.0]]}, r"'batch 1' holds what is no array"),
        ({}, r"'batch 1' lacks the input 'x'"),
        ({"y": np.ones((1, 3), np.float32)}, r"'batch 1' holds 'y', which the model does not take. It takes: x"),
        ([1, 2, 3], r"Item 1 of batch is list, not a dict"),
    ],
)
def test_wrong_feeds(feed, message):
    for source in ([GOOD, feed], iter([GOOD, feed])):
        data = load(source, ONE)
        with pytest.raises(DataError, match=message):
            list(data)


def test_an_unknown_input_names_the_nearest(feeds_of):
    inputs = [InputSpec("input_ids", I64, (None, None)), InputSpec("attention_mask", I64, (None, None))]
    ids = np.zeros((1, 4), np.int64)
    with pytest.raises(DataError, match=r"holds 'input_id', which the model does not take. Did you mean 'input_ids'\?"):
        feeds_of([{"input_id": ids, "attention_mask": ids}], inputs)
    with pytest.raises(DataError, match=r"lacks the input 'attention_mask'"):
        feeds_of([{"input_ids": ids}], inputs)


def test_an_integer_that_does_not_fit(feeds_of):
    with pytest.raises(DataError, match="is int64, but the model takes int32"):
        feeds_of([{"x": np.array([2**31])}], [InputSpec("x", np.dtype(np.int32), (None,))])
    with pytest.raises(DataError, match="is int64, but the model takes uint8"):
        feeds_of([{"x": np.array([-1])}], [InputSpec("x", np.dtype(np.uint8), (None,))])


@pytest.mark.parametrize("source", [[], (), lambda: iter(()), iter(())], ids=["list", "tuple", "function", "iterator"])
def test_no_batch(source):
    with pytest.raises(DataError, match=r"There is no data in .*: at least one sample is needed"):
        list(load(source, ONE))


def test_no_sample_in_a_file(feeds_of, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match=r"There is no data in '.*a.npy'"):
        feeds_of(tmp_path / "a.npy")


def test_errors_in_files_name_the_sample(array, feeds_of, tmp_path):
    rows = array(4, 3)
    rows[2, 1] = np.nan
    np.savez(tmp_path / "a.npz", x=rows)
    with pytest.raises(DataError, match=r"Input 'x' of 'a.npz\[2\]' holds NaN"):
        feeds_of(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00v\x00{'descr"])
def test_unreadable_files(feeds_of, tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Cannot read '.*a.np"):
        feeds_of(path)


def test_damaged_archives(array, feeds_of, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(DataError, match="Cannot read"):
        feeds_of(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "a.npz", x=array(100, 3))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:-50])
    with pytest.raises(DataError, match="Cannot read"):
        feeds_of(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[:100] + bytes(400) + content[500:])
    with pytest.raises(DataError, match="Cannot read"):
        feeds_of(tmp_path / "a.npz")


def test_pickles_are_not_loaded(feeds_of, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"Cannot read .*Python objects instead of numbers"):
        feeds_of(tmp_path / "a.npz")


def test_files_with_the_wrong_arrays(array, feeds_of, tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.zeros((2, 3), np.int64), maks=array(2, 3))
    with pytest.raises(DataError, match=r"'a.npz' holds 'maks', which the model does not take. Did you mean 'mask'\?"):
        feeds_of(tmp_path / "a.npz", TWO)
    np.savez(tmp_path / "b.npz", ids=np.zeros((2, 3), np.int64))
    with pytest.raises(DataError, match=r"'b.npz' lacks the input 'mask'"):
        feeds_of(tmp_path / "b.npz", TWO)
    np.savez(tmp_path / "c.npz", ids=np.zeros((2, 3), np.int64), mask=array(4, 3))
    with pytest.raises(DataError, match=r"'c.npz' differ in their number of samples: ids has 2, mask has 4"):
        feeds_of(tmp_path / "c.npz", TWO)
    np.save(tmp_path / "d.npy", array(2, 3))
    with pytest.raises(DataError, match=r"'d.npy' holds one array, but the model takes 2 inputs: ids, mask"):
        feeds_of(tmp_path / "d.npy", TWO)


def test_a_number_of_samples_that_the_batch_does_not_divide(array, feeds_of, tmp_path):
    np.savez(tmp_path / "a.npz", x=array(5, 3))
    with pytest.raises(DataError, match=r"'a.npz' holds 5 samples, but the model's batch is fixed at 2"):
        feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (2, 3))])


def test_wrong_protos(array, feeds_of, protos, tmp_path):
    protos(tmp_path / "a" / "test_data_set_0", array(1, 3), array(1, 3))
    with pytest.raises(DataError, match="holds 2 inputs, but the model takes 1"):
        feeds_of(tmp_path / "a")
    (tmp_path / "b" / "test_data_set_0").mkdir(parents=True)
    with pytest.raises(DataError, match="'test_data_set_0' lacks the input 'x'"):
        feeds_of(tmp_path / "b")
    (tmp_path / "b" / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff not a tensor")
    with pytest.raises(DataError, match=r"input_0.pb' is not an ONNX tensor"):
        feeds_of(tmp_path / "b")
    (tmp_path / "b" / "test_data_set_0" / "input_x.pb").write_bytes(onnx.TensorProto().SerializeToString())
    with pytest.raises(DataError, match=r"input_x.pb' is not named input_<number>.pb"):
        feeds_of(tmp_path / "b")


def test_paths_without_data(feeds_of, tmp_path):
    (tmp_path / "calibration.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"There is no data at .*calibratoin.npz'. Did you mean 'calibration.npz'\?"):
        load(tmp_path / "calibratoin.npz", ONE)
    with pytest.raises(DataError, match="There is no data at"):
        load(tmp_path / "none" / "data.npz", ONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no .npz or .npy file and no test_data_set"):
        feeds_of(tmp_path / "empty")
    (tmp_path / "data.csv").write_text("1,2,3")
    with pytest.raises(DataError, match=r"data.csv' is none of .npz"):
        feeds_of(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qgraph_test_two.feeds:smaples", "Cannot import 'qgraph_test_two.feeds:smaples'"),
        ("qgraph_test_two.fedes:samples", "Cannot import 'qgraph_test_two.fedes:samples': ModuleNotFoundError"),
        ("qgraph_test_two.feeds:constant", "is not a function that returns feeds"),
        ("qgraph_test_two.feeds:wrong", "wrong returned int, not an iterable of feeds"),
    ],
)
def test_wrong_functions(feeds_of, module, text, message):
    module("qgraph_test_two")
    with pytest.raises(DataError, match=message):
        feeds_of(text)
