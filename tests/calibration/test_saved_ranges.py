"""Ranges saved and restored: of the same model only, whatever its names, and the same bytes again."""

import numpy as np
import pytest

from qgraph import observers
from qgraph.calibration import MEANS, OBSERVER, observe, restore, save
from qgraph.errors import DataError, ModelError
from qgraph.observers.channel_mean import ChannelMean


@pytest.fixture
def saved(values_of, watched, dataset, feeds_of, tiny_chain, tmp_path):
    """(a calibrated model, the file of its ranges)."""
    model = watched(tiny_chain(), "percentile")
    values_of(model)["positive"].meta[OBSERVER] = observers.create("moving-average")
    values_of(model)["x"].meta[MEANS] = {1: ChannelMean(1)}
    observe(model, dataset(model, feeds_of()))
    path = tmp_path / "ranges.npz"
    save(model, path, "key")
    return model, path


def test_ranges_round_trip(values_of, watched, states, saved, tiny_chain):
    model, path = saved
    # The kinds of the file are taken, whatever the model asks for.
    restored = watched(tiny_chain(), "minmax")
    values_of(restored)["x"].meta[MEANS] = {1: ChannelMean(1)}
    restore(restored, path, "key")
    assert states(restored) == states(model)
    for name, value in values_of(restored).items():
        assert type(value.meta[OBSERVER]) is type(values_of(model)[name].meta[OBSERVER])
    mean = values_of(restored)["x"].meta[MEANS][1].mean
    np.testing.assert_array_equal(mean, values_of(model)["x"].meta[MEANS][1].mean)


def test_fewer_values_than_were_saved_may_be_restored(watched, states, saved, tiny_chain):
    model, path = saved
    restored = watched(tiny_chain(), names=("y",))
    restore(restored, path, "key")
    assert states(restored) == {"y": states(model)["y"]}


def test_the_same_ranges_give_the_same_bytes(saved, tmp_path):
    model, path = saved
    save(model, tmp_path / "again.npz", "key")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["/layer.0/conv/Conv_output_0", "model", "qgraph", "file", "a\nb", "0.x", "ä", ".."])
def test_any_name_of_a_value_can_be_saved(watched, states, dataset, feeds_of, tiny_chain, tmp_path, name):
    def build():
        model = tiny_chain()
        model.graph[1].outputs[0].name = name
        return watched(model, names=("x", name))

    model, restored = build(), build()
    observe(model, dataset(model, feeds_of()))
    save(model, tmp_path / "ranges.npz", "key")
    restore(restored, tmp_path / "ranges.npz", "key")
    assert states(restored) == states(model)


def test_ranges_of_another_model_are_refused(watched, saved, tiny_chain):
    with pytest.raises(DataError, match="observed on another model"):
        restore(watched(tiny_chain()), saved[1], "other key")


def test_a_missing_value_is_named(values_of, watched, saved, tiny_chain):
    model = tiny_chain()
    values_of(model)["shifted"].name = "newcomer"
    with pytest.raises(DataError, match="lacks the range of 'newcomer'"):
        restore(watched(model, names=("x", "newcomer")), saved[1], "key")


def test_missing_means_are_named(values_of, watched, saved, tiny_chain):
    model = watched(tiny_chain())
    values_of(model)["shifted"].meta[MEANS] = {1: ChannelMean(1)}
    with pytest.raises(DataError, match="'shifted'"):
        restore(model, saved[1], "key")


def write(path, what):
    match what:
        case "nothing":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a file of ranges")
        case "no zip":
            path.write_bytes(b"PK\x03\x04 and so on")
        case "array":
            with path.open("wb") as file:
                np.save(file, np.ones(3))
        case "pickle":
            np.savez(path, model=np.array([{}], dtype=object), allow_pickle=True)
        case "other arrays":
            np.savez(path, x=np.ones(3))
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "damaged":
            content = bytearray(path.read_bytes())
            content[200:600] = bytes(400)
            path.write_bytes(content)
        case "newer":
            with np.load(path) as stored:
                arrays = dict(stored)
            arrays["qgraph"] = arrays["qgraph"] + 1
            np.savez(path, **arrays)


@pytest.mark.parametrize(
    "what", ["nothing", "text", "no zip", "array", "pickle", "other arrays", "cut", "damaged", "newer"]
)
def test_a_file_that_holds_no_ranges_is_refused(watched, saved, tiny_chain, what):
    _, path = saved
    write(path, what)
    with pytest.raises(DataError, match="ranges"):
        restore(watched(tiny_chain()), path, "key")


def test_no_file_of_ranges(watched, tiny_chain, tmp_path):
    with pytest.raises(DataError, match="Cannot read ranges"):
        restore(watched(tiny_chain()), tmp_path / "none.npz", "key")


def test_ranges_that_cannot_be_written(saved, tmp_path, monkeypatch):
    model, path = saved
    with pytest.raises(ModelError, match="Cannot write the ranges"):
        save(model, tmp_path / "no such folder" / "ranges.npz", "key")
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(ModelError, match="No space left"):
        save(model, path, "key")
    assert path.read_bytes() == before
