import sys
import tempfile
import tracemalloc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from qgraph.data import Batch, Dataset, InputSpec, inputs_of, load
from qgraph.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
ONE = [InputSpec("x", F32, (None, 3))]
TWO = [InputSpec("ids", I64, (None, None)), InputSpec("mask", F32, (None, None))]


def array(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def feeds_of(source, inputs=ONE):
    return [batch.feeds for batch in load(source, inputs)]


def same(found, expected):
    assert [set(feed) for feed in found] == [set(feed) for feed in expected]
    for one, other in zip(found, expected, strict=True):
        for name in other:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


# -- what a model takes ------------------------------------------------------------------------------------------------


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


# -- sources -----------------------------------------------------------------------------------------------------------


def test_npz(tmp_path):
    ids, mask = np.arange(20).reshape(4, 5), array(4, 5)
    np.savez(tmp_path / "a.npz", ids=ids, mask=mask)
    expected = [{"ids": ids[i : i + 1], "mask": mask[i : i + 1]} for i in range(4)]
    same(feeds_of(tmp_path / "a.npz", TWO), expected)
    same(feeds_of(str(tmp_path / "a.npz"), TWO), expected)
    np.savez_compressed(tmp_path / "b.npz", ids=ids, mask=mask)
    same(feeds_of(tmp_path / "b.npz", TWO), expected)


def test_npy(tmp_path):
    rows = array(4, 3)
    np.save(tmp_path / "a.npy", rows)
    same(feeds_of(tmp_path / "a.npy"), [{"x": row[None]} for row in rows])


def test_a_folder_of_npz_in_order_of_names(tmp_path):
    rows = array(6, 3)
    for number, name in enumerate(["b.npz", "a.npz", "c.npz"]):
        np.savez(tmp_path / name, x=rows[2 * number : 2 * number + 2])
    (tmp_path / "README.txt").write_text("not data")
    same(feeds_of(tmp_path), [{"x": rows[i : i + 1]} for i in (2, 3, 0, 1, 4, 5)])
    names = [batch.name for batch in load(tmp_path, ONE)]
    assert names == ["a.npz[0]", "a.npz[1]", "b.npz[0]", "b.npz[1]", "c.npz[0]", "c.npz[1]"]


def protos(folder, *arrays, names=None):
    folder.mkdir(parents=True)
    for number, one in enumerate(arrays):
        tensor = numpy_helper.from_array(one, None if names is None else names[number])
        (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())


def test_folders_of_protos(tmp_path):
    ids, mask = np.arange(10).reshape(1, 10), array(1, 10)
    protos(tmp_path / "test_data_set_0", ids, mask)
    protos(tmp_path / "test_data_set_1", mask, ids + 1, names=["mask", "ids"])
    expected = [{"ids": ids, "mask": mask}, {"ids": ids + 1, "mask": mask}]
    same(feeds_of(tmp_path, TWO), expected)
    same(feeds_of(tmp_path / "test_data_set_1", TWO), expected[1:])
    assert [batch.name for batch in load(tmp_path, TWO)] == ["test_data_set_0", "test_data_set_1"]


def test_protos_are_counted_not_spelled(tmp_path):
    inputs = [InputSpec(f"i{n}", F32, (1,)) for n in range(12)]
    protos(tmp_path / "test_data_set_0", *(np.float32([n]) for n in range(12)))
    (feed,) = feeds_of(tmp_path / "test_data_set_0", inputs)
    assert [float(feed[f"i{n}"][0]) for n in range(12)] == list(range(12))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Maker of a package `name` with a module `feeds` on the path."""

    def make(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "feeds.py").write_text("import numpy as np\n" + content)
        monkeypatch.syspath_prepend(tmp_path)
        for key in (name, f"{name}.feeds"):
            monkeypatch.delitem(sys.modules, key, raising=False)

    yield make
    for key in [key for key in sys.modules if key.split(".")[0].startswith("qgraph_test_")]:
        del sys.modules[key]


GENERATOR = """
def samples():
    for number in range(3):
        yield {"x": np.full((1, 3), number, np.float32)}

class Holder:
    samples = staticmethod(samples)

constant = 5

def wrong():
    return 7

def broken():
    import no_such_module_at_all
"""


def test_a_function_in_a_module(module):
    module("qgraph_test_one", GENERATOR)
    expected = [{"x": np.full((1, 3), n, np.float32)} for n in range(3)]
    same(feeds_of("qgraph_test_one.feeds:samples"), expected)
    same(feeds_of("qgraph_test_one.feeds:Holder.samples"), expected)
    data = load("qgraph_test_one.feeds:samples", ONE)
    assert data.count() == data.count() == 3


def test_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "qgraph_test_here.py").write_text("import numpy as np\n" + GENERATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert load("qgraph_test_here:samples", ONE).count() == 3
    finally:
        sys.modules.pop("qgraph_test_here", None)


def test_callables_lists_and_datasets():
    expected = [{"x": array(1, 3, seed=n)} for n in range(3)]
    same(feeds_of(lambda: iter(expected)), expected)
    same(feeds_of(expected), expected)
    same(feeds_of(tuple(expected)), expected)
    data = load(expected, ONE)
    assert isinstance(data, Dataset) and load(data, ONE) is data


def test_lists_of_numbers_are_arrays():
    same(feeds_of([{"x": [[1.0, 2.0, 3.0]]}]), [{"x": np.float32([[1, 2, 3]])}])


@pytest.mark.parametrize("reads", [(10, 10), (2, 10, 1, 10), (0, 10), (3, 1, 2, 10, 10)])
def test_a_generator_can_be_read_again(reads):
    """However far it was read before."""
    expected = [{"x": array(1, 3, seed=n)} for n in range(5)]
    data = load((dict(feed) for feed in expected), ONE)
    for count in reads:
        found = [batch for batch, _ in zip(data, range(count), strict=False)]
        same([batch.feeds for batch in found], expected[:count])
        assert [batch.name for batch in found] == [f"batch {n}" for n in range(min(count, 5))]


def test_a_generator_can_be_read_twice_at_once():
    expected = [{"x": array(1, 3, seed=n)} for n in range(5)]
    data = load(iter(expected), ONE)
    for one, other, feed in zip(data, data, expected, strict=True):
        same([one.feeds, other.feeds], [feed, feed])


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "a/b:0", "x.npy", "ä"])
def test_any_name_of_an_input_survives_a_generator(name):
    inputs = [InputSpec(name, F32, (None, 3))]
    data = load(iter([{name: array(1, 3)}]), inputs)
    for _ in range(2):
        same([batch.feeds for batch in data], [{name: array(1, 3)}])


def test_nothing_of_a_generator_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = load(iter([{"x": array(1, 3)}]), ONE)
    rest, held = data.split(0.5)
    assert held is None and rest.count() == 1
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    del data, rest
    assert list(tmp_path.iterdir()) == []


def test_a_generator_is_not_kept_in_memory():
    alive = []

    def generate():
        for number in range(20):
            one = np.full((1, 3), number, np.float32)
            alive.append(weakref.ref(one))
            yield {"x": one}

    for _ in load(generate(), ONE):
        assert sum(ref() is not None for ref in alive) <= 2
    assert len(alive) == 20


class Shuffling:
    """A loader that gives its samples in another order, and augmented, whenever it is gone through."""

    def __init__(self):
        self.random, self.passes = np.random.default_rng(0), 0

    def __iter__(self):
        self.passes += 1
        for number in self.random.permutation(6):
            yield {"x": self.random.standard_normal((1, 3)).astype(np.float32) + np.float32(number)}


@pytest.mark.parametrize("make", [lambda loader: loader, lambda loader: loader.__iter__], ids=["loader", "function"])
def test_loaders_that_shuffle_give_the_same_in_every_pass(make):
    loader = Shuffling()
    data = load(make(loader), ONE)
    one = [batch.feeds for batch in data]
    for _ in range(3):
        same([batch.feeds for batch in data], one)
    rest, held = data.split(0.3)
    assert sorted(contents(rest) + contents(held)) == sorted(feed["x"].tobytes() for feed in one)
    assert loader.passes == 1


def test_a_function_is_called_once():
    calls = []

    def feeds():
        calls.append(1)
        return [{"x": array(1, 3, seed=n)} for n in range(3)]

    data = load(feeds, ONE)
    assert not calls, "not before it is needed"
    assert data.count() == 3 and len(list(data)) == 3 and data.first() and data.largest == 12
    assert calls == [1]


def test_lists_are_not_copied_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert load([{"x": array(1, 3)}], ONE).count() == 1
    assert list(tmp_path.iterdir()) == []


def test_one_dict_is_one_feed():
    same(feeds_of({"x": array(2, 3)}), [{"x": array(2, 3)}])
    with pytest.raises(DataError, match="'y', which the model does not take"):
        feeds_of({"y": array(2, 3)})


def raises():
    raise ZeroDivisionError("in the user's code")


def raises_later():
    yield {"x": array(1, 3)}
    raises()


@pytest.mark.parametrize("source", [raises, raises_later, raises_later()], ids=["call", "generator", "iterator"])
def test_failures_of_the_users_code_are_told_as_such(source):
    with pytest.raises(DataError, match="ZeroDivisionError: in the user's code") as caught:
        list(load(source, ONE))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_interrupts_in_the_users_code_come_through():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(load(stop, ONE))


def test_summary_of_a_dataset(monkeypatch):
    rows = [{"x": array(n, 3, seed=n)} for n in (1, 5, 2)]
    data = load(rows, ONE)
    assert (data.count(), data.largest) == (3, 5 * 3 * 4)
    digests = [batch.digest for batch in data]
    assert data.first().digest == min(digests)
    monkeypatch.setattr(data, "_source", None)
    assert data.first() is data.first() and data.count() == 3, "found once, and remembered"
    assert not hasattr(data, "__len__")


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize(("batch", "count", "runs"), [(None, 6, 6), (1, 6, 6), (2, 6, 3), (6, 6, 1)])
def test_files_are_cut_to_the_models_batch(tmp_path, suffix, batch, count, runs):
    rows, path = array(count, 3), tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    else:
        np.savez(path, x=rows)
    found = feeds_of(path, [InputSpec("x", F32, (batch, 3))])
    same(found, [{"x": part} for part in np.split(rows, runs)])


def test_an_array_of_whole_inputs_is_taken_apart(tmp_path):
    stack = array(5, 3, 4)
    np.savez(tmp_path / "a.npz", x=stack)
    expected = [{"x": one} for one in stack]
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (3, 4))]), expected)
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (None, 4))]), expected)
    np.savez(tmp_path / "b.npz", x=stack[:, None])
    same(feeds_of(tmp_path / "b.npz", [InputSpec("x", F32, (1, 3, 4))]), [{"x": one[None]} for one in stack])


def test_sequences_of_different_lengths(tmp_path):
    lengths = (5, 9, 2)
    for number, length in enumerate(lengths):
        np.savez(tmp_path / f"{number}.npz", ids=np.arange(2 * length).reshape(2, length), mask=array(2, length))
    assert [feed["ids"].shape for feed in feeds_of(tmp_path, TWO)] == [(1, n) for n in lengths for _ in range(2)]
    ragged = [{"ids": np.zeros((1, n), np.int64), "mask": array(1, n)} for n in lengths]
    same(feeds_of(ragged, TWO), ragged)


def test_scalars_go_with_every_sample(tmp_path):
    inputs = [*ONE, InputSpec("scale", F32, ())]
    np.savez(tmp_path / "a.npz", x=array(2, 3), scale=np.float32(0.5))
    same(feeds_of(tmp_path / "a.npz", inputs), [{"x": row[None], "scale": np.float32(0.5)} for row in array(2, 3)])
    np.savez(tmp_path / "b.npz", scale=np.float32(0.5))
    same(feeds_of(tmp_path / "b.npz", inputs[1:]), [{"scale": np.float32(0.5)}])


@pytest.mark.parametrize("suffix", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layout_and_compression_change_nothing(tmp_path, suffix, order):
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


def test_any_rank(tmp_path):
    np.savez(tmp_path / "a.npz", x=array(2, 3, 4))
    same(feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, None)]), [{"x": one[None]} for one in array(2, 3, 4)])


@pytest.mark.parametrize(
    ("given_type", "wanted"),
    [("float64", "float32"), ("float16", "float32"), ("int32", "int64"), ("int64", "int32"), ("uint8", "int64")],
)
def test_types_that_lose_nothing_are_converted(given_type, wanted):
    given_array = np.arange(6).reshape(2, 3).astype(given_type)
    (feed,) = feeds_of([{"x": given_array}], [InputSpec("x", np.dtype(wanted), (None, 3))])
    assert feed["x"].dtype == wanted
    np.testing.assert_array_equal(feed["x"], given_array)


# -- errors: each names the batch and the input ------------------------------------------------------------------------

GOOD = {"x": np.ones((1, 3), np.float32)}


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.float32([[1, np.nan, 2]])}, r"Input 'x' of 'batch 1' holds NaN values"),
        ({"x": np.float32([[1, np.inf, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": np.float32([[1, -np.inf, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": np.float64([[1, 1e300, 2]])}, r"Input 'x' of 'batch 1' holds infinite values"),
        ({"x": array(1, 4)}, r"Input 'x' of 'batch 1' has shape 1x4, but the model takes \?x3"),
        ({"x": array(3)}, r"Input 'x' of 'batch 1' has shape 3, but the model takes \?x3"),
        ({"x": array(1, 1, 3)}, r"Input 'x' of 'batch 1' has shape 1x1x3, but the model takes \?x3"),
        ({"x": np.float32(1)}, r"Input 'x' of 'batch 1' has shape a scalar, but the model takes \?x3"),
        ({"x": np.ones((1, 3), np.int64)}, r"Input 'x' of 'batch 1' is int64, but the model takes float32"),
        ({"x": np.ones((1, 3), bool)}, r"Input 'x' of 'batch 1' is bool, but the model takes float32"),
        ({"x": np.ones((1, 3), complex)}, r"Input 'x' of 'batch 1' is complex128"),
        ({"x": np.array([["a", "b", "c"]])}, r"Input 'x' of 'batch 1' is <U1"),
        ({"x": None}, r"Input 'x' of 'batch 1' is object"),
        ({"x": [[1.0, 2.0], [3.0]]}, r"'batch 1' holds what is no array"),
        ({}, r"'batch 1' lacks the input 'x'"),
        ({"y": array(1, 3)}, r"'batch 1' holds 'y', which the model does not take. It takes: x"),
        ([1, 2, 3], r"Item 1 of batch is list, not a dict"),
    ],
)
def test_wrong_feeds(feed, message):
    for source in ([GOOD, feed], iter([GOOD, feed])):
        data = load(source, ONE)
        with pytest.raises(DataError, match=message):
            list(data)


def test_an_unknown_input_names_the_nearest():
    inputs = [InputSpec("input_ids", I64, (None, None)), InputSpec("attention_mask", I64, (None, None))]
    ids = np.zeros((1, 4), np.int64)
    with pytest.raises(DataError, match=r"holds 'input_id', which the model does not take. Did you mean 'input_ids'\?"):
        feeds_of([{"input_id": ids, "attention_mask": ids}], inputs)
    with pytest.raises(DataError, match=r"lacks the input 'attention_mask'"):
        feeds_of([{"input_ids": ids}], inputs)


def test_an_integer_that_does_not_fit():
    with pytest.raises(DataError, match="is int64, but the model takes int32"):
        feeds_of([{"x": np.array([2**31])}], [InputSpec("x", np.dtype(np.int32), (None,))])
    with pytest.raises(DataError, match="is int64, but the model takes uint8"):
        feeds_of([{"x": np.array([-1])}], [InputSpec("x", np.dtype(np.uint8), (None,))])


@pytest.mark.parametrize("source", [[], (), lambda: iter(()), iter(())], ids=["list", "tuple", "function", "iterator"])
def test_no_batch(source):
    with pytest.raises(DataError, match=r"There is no data in .*: at least one sample is needed"):
        list(load(source, ONE))


def test_no_sample_in_a_file(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match=r"There is no data in '.*a.npy'"):
        feeds_of(tmp_path / "a.npy")


def test_errors_in_files_name_the_sample(tmp_path):
    rows = array(4, 3)
    rows[2, 1] = np.nan
    np.savez(tmp_path / "a.npz", x=rows)
    with pytest.raises(DataError, match=r"Input 'x' of 'a.npz\[2\]' holds NaN"):
        feeds_of(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00v\x00{'descr"])
def test_unreadable_files(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Cannot read '.*a.np"):
        feeds_of(path)


def test_damaged_archives(tmp_path):
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


def test_pickles_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"Cannot read .*Python objects instead of numbers"):
        feeds_of(tmp_path / "a.npz")


def test_files_with_the_wrong_arrays(tmp_path):
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


def test_a_number_of_samples_that_the_batch_does_not_divide(tmp_path):
    np.savez(tmp_path / "a.npz", x=array(5, 3))
    with pytest.raises(DataError, match=r"'a.npz' holds 5 samples, but the model's batch is fixed at 2"):
        feeds_of(tmp_path / "a.npz", [InputSpec("x", F32, (2, 3))])


def test_wrong_protos(tmp_path):
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


def test_paths_without_data(tmp_path):
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
def test_wrong_functions(module, text, message):
    module("qgraph_test_two", GENERATOR)
    with pytest.raises(DataError, match=message):
        feeds_of(text)


# -- splitting ---------------------------------------------------------------------------------------------------------


def contents(data):
    return [batch.feeds["x"].tobytes() for batch in data]


@settings(max_examples=40)
@given(
    st.integers(4, 30),
    st.integers(0, 5),
    st.floats(0.01, 0.6),
    st.sampled_from([np.float32, np.float64]),
    st.randoms(use_true_random=False),
)
def test_a_split_is_disjoint_complete_and_independent_of_order(count, twins, share, kind, random):
    rows = [{"x": array(1, 3, seed=n).astype(kind)} for n in range(count)]
    rows += [dict(rows[n % count]) for n in range(twins)]
    rest, held = load(rows, ONE).split(share)
    assert held is not None
    one, other = contents(rest), contents(held)
    assert not set(one) & set(other)
    assert sorted(one + other) == sorted(contents(load(rows, ONE)))
    assert len(set(other)) == max(1, round(share * count))
    random.shuffle(rows)
    again, held_again = load(rows, ONE).split(share)
    assert sorted(contents(again)) == sorted(one) and sorted(contents(held_again)) == sorted(other)
    assert load(rows, ONE).first().digest == load(rows[::-1], ONE).first().digest


def test_too_few_batches_are_not_split():
    rows = [{"x": array(1, 3, seed=n)} for n in range(3)]
    data = load(rows * 3, ONE)
    rest, held = data.split(0.3)
    assert rest is data and held is None
    assert load([*rows, {"x": array(1, 3, seed=9)}], ONE).split(0.3)[1] is not None


def test_a_part_can_be_split_again():
    data = load([{"x": array(1, 3, seed=n)} for n in range(20)], ONE)
    rest, held = data.split(0.5)
    parts = [*rest.split(0.3), *held.split(0.3)]
    found = [key for part in parts for key in contents(part)]
    assert sorted(found) == sorted(contents(data))


def test_parts_of_a_generator():
    rows = [{"x": array(1, 3, seed=n)} for n in range(8)]
    rest, held = load(iter(rows), ONE).split(0.25)
    assert (rest.count(), held.count()) == (6, 2)
    assert sorted(contents(rest) + contents(held)) == sorted(row["x"].tobytes() for row in rows)


def test_the_digest_is_of_contents_alone():
    one = Batch("a", {"x": array(1, 4), "y": array(2, 2)})
    assert one.digest == Batch("b", {"y": array(2, 2), "x": array(1, 4)}).digest
    assert one.digest != Batch("a", {"x": array(1, 4), "y": array(2, 2) + 1}).digest
    assert Batch("a", {"x": array(2, 2)}).digest != Batch("a", {"x": array(2, 2).reshape(4, 1)}).digest
    assert Batch("a", {"x": array(2, 2)}).digest != Batch("a", {"z": array(2, 2)}).digest
