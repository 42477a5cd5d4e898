"""Where data comes from: files, folders, functions, loaders that shuffle, generators that end."""

import sys
import tempfile
import weakref

import numpy as np
import pytest

from qgraph.data import Dataset, InputSpec, load
from qgraph.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
ONE = [InputSpec("x", F32, (None, 3))]
TWO = [InputSpec("ids", I64, (None, None)), InputSpec("mask", F32, (None, None))]


def test_npz(array, feeds_of, same, tmp_path):
    ids, mask = np.arange(20).reshape(4, 5), array(4, 5)
    np.savez(tmp_path / "a.npz", ids=ids, mask=mask)
    expected = [{"ids": ids[i : i + 1], "mask": mask[i : i + 1]} for i in range(4)]
    same(feeds_of(tmp_path / "a.npz", TWO), expected)
    same(feeds_of(str(tmp_path / "a.npz"), TWO), expected)
    np.savez_compressed(tmp_path / "b.npz", ids=ids, mask=mask)
    same(feeds_of(tmp_path / "b.npz", TWO), expected)


def test_npy(array, feeds_of, same, tmp_path):
    rows = array(4, 3)
    np.save(tmp_path / "a.npy", rows)
    same(feeds_of(tmp_path / "a.npy"), [{"x": row[None]} for row in rows])


def test_a_folder_of_npz_in_order_of_names(array, feeds_of, same, tmp_path):
    rows = array(6, 3)
    for number, name in enumerate(["b.npz", "a.npz", "c.npz"]):
        np.savez(tmp_path / name, x=rows[2 * number : 2 * number + 2])
    (tmp_path / "README.txt").write_text("not data")
    same(feeds_of(tmp_path), [{"x": rows[i : i + 1]} for i in (2, 3, 0, 1, 4, 5)])
    names = [batch.name for batch in load(tmp_path, ONE)]
    assert names == ["a.npz[0]", "a.npz[1]", "b.npz[0]", "b.npz[1]", "c.npz[0]", "c.npz[1]"]


def test_folders_of_protos(array, feeds_of, same, protos, tmp_path):
    ids, mask = np.arange(10).reshape(1, 10), array(1, 10)
    protos(tmp_path / "test_data_set_0", ids, mask)
    protos(tmp_path / "test_data_set_1", mask, ids + 1, names=["mask", "ids"])
    expected = [{"ids": ids, "mask": mask}, {"ids": ids + 1, "mask": mask}]
    same(feeds_of(tmp_path, TWO), expected)
    same(feeds_of(tmp_path / "test_data_set_1", TWO), expected[1:])
    assert [batch.name for batch in load(tmp_path, TWO)] == ["test_data_set_0", "test_data_set_1"]


def test_protos_are_counted_not_spelled(feeds_of, protos, tmp_path):
    inputs = [InputSpec(f"i{n}", F32, (1,)) for n in range(12)]
    protos(tmp_path / "test_data_set_0", *(np.float32([n]) for n in range(12)))
    (feed,) = feeds_of(tmp_path / "test_data_set_0", inputs)
    assert [float(feed[f"i{n}"][0]) for n in range(12)] == list(range(12))


def test_a_function_in_a_module(feeds_of, same, module):
    module("qgraph_test_one")
    expected = [{"x": np.full((1, 3), n, np.float32)} for n in range(3)]
    same(feeds_of("qgraph_test_one.feeds:samples"), expected)
    same(feeds_of("qgraph_test_one.feeds:Holder.samples"), expected)
    data = load("qgraph_test_one.feeds:samples", ONE)
    assert data.count() == data.count() == 3


def test_a_module_in_the_working_directory(generator, tmp_path, monkeypatch):
    (tmp_path / "qgraph_test_here.py").write_text(generator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert load("qgraph_test_here:samples", ONE).count() == 3
    finally:
        sys.modules.pop("qgraph_test_here", None)


def test_callables_lists_and_datasets(array, feeds_of, same):
    expected = [{"x": array(1, 3, seed=n)} for n in range(3)]
    same(feeds_of(lambda: iter(expected)), expected)
    same(feeds_of(expected), expected)
    same(feeds_of(tuple(expected)), expected)
    data = load(expected, ONE)
    assert isinstance(data, Dataset) and load(data, ONE) is data


def test_lists_of_numbers_are_arrays(feeds_of, same):
    same(feeds_of([{"x": [[1.0, 2.0, 3.0]]}]), [{"x": np.float32([[1, 2, 3]])}])


@pytest.mark.parametrize("reads", [(10, 10), (2, 10, 1, 10), (0, 10), (3, 1, 2, 10, 10)])
def test_a_generator_can_be_read_again(array, same, reads):
    """However far it was read before."""
    expected = [{"x": array(1, 3, seed=n)} for n in range(5)]
    data = load((dict(feed) for feed in expected), ONE)
    for count in reads:
        found = [batch for batch, _ in zip(data, range(count), strict=False)]
        same([batch.feeds for batch in found], expected[:count])
        assert [batch.name for batch in found] == [f"batch {n}" for n in range(min(count, 5))]


def test_a_generator_can_be_read_twice_at_once(array, same):
    expected = [{"x": array(1, 3, seed=n)} for n in range(5)]
    data = load(iter(expected), ONE)
    for one, other, feed in zip(data, data, expected, strict=True):
        same([one.feeds, other.feeds], [feed, feed])


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "a/b:0", "x.npy", "ä"])
def test_any_name_of_an_input_survives_a_generator(array, same, name):
    inputs = [InputSpec(name, F32, (None, 3))]
    data = load(iter([{name: array(1, 3)}]), inputs)
    for _ in range(2):
        same([batch.feeds for batch in data], [{name: array(1, 3)}])


def test_nothing_of_a_generator_is_left_on_disk(array, tmp_path, monkeypatch):
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
def test_loaders_that_shuffle_give_the_same_in_every_pass(same, contents, make):
    loader = Shuffling()
    data = load(make(loader), ONE)
    one = [batch.feeds for batch in data]
    for _ in range(3):
        same([batch.feeds for batch in data], one)
    rest, held = data.split(0.3)
    assert sorted(contents(rest) + contents(held)) == sorted(feed["x"].tobytes() for feed in one)
    assert loader.passes == 1


def test_a_function_is_called_once(array):
    calls = []

    def feeds():
        calls.append(1)
        return [{"x": array(1, 3, seed=n)} for n in range(3)]

    data = load(feeds, ONE)
    assert not calls, "not before it is needed"
    assert data.count() == 3 and len(list(data)) == 3 and data.first() and data.largest == 12
    assert calls == [1]


def test_lists_are_not_copied_to_disk(array, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert load([{"x": array(1, 3)}], ONE).count() == 1
    assert list(tmp_path.iterdir()) == []


def test_one_dict_is_one_feed(array, feeds_of, same):
    same(feeds_of({"x": array(2, 3)}), [{"x": array(2, 3)}])
    with pytest.raises(DataError, match="'y', which the model does not take"):
        feeds_of({"y": array(2, 3)})


def raises():
    raise ZeroDivisionError("in the user's code")


def raises_later():
    yield {"x": np.zeros((1, 3), np.float32)}
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


def test_summary_of_a_dataset(array, monkeypatch):
    rows = [{"x": array(n, 3, seed=n)} for n in (1, 5, 2)]
    data = load(rows, ONE)
    assert (data.count(), data.largest) == (3, 5 * 3 * 4)
    digests = [batch.digest for batch in data]
    assert data.first().digest == min(digests)
    monkeypatch.setattr(data, "_source", None)
    assert data.first() is data.first() and data.count() == 3, "found once, and remembered"
    assert not hasattr(data, "__len__")
