import tracemalloc
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import calibration, data, modelio, observers
from qgraph.calibration import MEANS, OBSERVER, observe, restore, save
from qgraph.errors import DataError, ExecutionError, ModelError
from qgraph.graph import RUN_SHAPE
from qgraph.observers import OBSERVERS
from qgraph.observers.channel_mean import ChannelMean
from qgraph.session import Session

NAMES = ("x", "scaled", "shifted", "positive", "y")


def values_of(model):
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name: value for value in values}


def watched(model, observer="histogram", names=NAMES):
    for name in names:
        values_of(model)[name].meta[OBSERVER] = observers.create(observer)
    return model


def states(model):
    """Every observer's state, to be compared bit for bit."""
    return {
        name: {part: array.tobytes() for part, array in value.meta[OBSERVER].state().items()}
        for name, value in values_of(model).items()
        if OBSERVER in value.meta
    }


def dataset(model, feeds):
    return data.load(feeds, data.inputs_of(model))


def feeds_of(count=6, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((rows, 4)).astype(np.float32)} for _ in range(count)]


def chain(x):
    """What `tiny_chain` computes, value by value."""
    scaled = x * np.float32(2)
    shifted = scaled + np.arange(4, dtype=np.float32)
    positive = np.maximum(shifted, 0)
    return {"x": x, "scaled": scaled, "shifted": shifted, "positive": positive, "y": np.sqrt(positive)}


# -- what is observed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_observers_see_the_models_own_values(tiny_chain, observer):
    model, feeds = watched(tiny_chain(), observer), feeds_of()
    observe(model, dataset(model, feeds))
    expected = {name: observers.create(observer) for name in NAMES}
    for feed in feeds:
        for row in feed["x"]:
            for name, array in chain(row[None]).items():
                expected[name].update(array)
    found = states(model)
    for name in NAMES:
        assert found[name] == {part: array.tobytes() for part, array in expected[name].state().items()}, name


def test_only_watched_values_are_observed(tiny_chain):
    model = watched(tiny_chain(), names=("shifted",))
    observe(model, dataset(model, feeds_of()))
    assert set(states(model)) == {"shifted"}
    assert values_of(model)["shifted"].meta[OBSERVER].count == 6 * 3 * 4


def test_nothing_but_meta_is_changed(tiny_chain):
    model = watched(tiny_chain())
    before = ir.to_proto(model).SerializeToString()
    observe(model, dataset(model, feeds_of()), budget=1)
    assert ir.to_proto(model).SerializeToString() == before


def test_inputs_alone_need_no_session(tiny_chain, monkeypatch):
    model = watched(tiny_chain(), names=("x",))
    monkeypatch.setattr(calibration, "Session", None)
    observe(model, dataset(model, feeds_of()))
    assert values_of(model)["x"].meta[OBSERVER].count == 6 * 3 * 4


@pytest.mark.parametrize("observer", ["histogram", "minmax", "moving-average"])
def test_order_batch_size_and_budget_change_no_bit(tiny_chain, observer):
    rows = np.random.default_rng(1).standard_normal((12, 4)).astype(np.float32)
    found = []
    for sizes in ([12], [1] * 12, [5, 7], [3, 1, 8]):
        feeds = [{"x": part} for part in np.split(rows, np.cumsum(sizes)[:-1])]
        for order in (feeds, feeds[::-1]):
            for budget in (1, 16 * 12, 1 << 30):
                model = watched(tiny_chain(), observer)
                observe(model, dataset(model, order), budget=budget)
                found.append(states(model))
    assert all(state == found[0] for state in found)


def test_a_fixed_batch_is_one_sample(tiny_chain):
    model = watched(tiny_chain(batch=3), "moving-average")
    observe(model, dataset(model, feeds_of(count=5, rows=3)))
    assert values_of(model)["y"].meta[OBSERVER].count == 5


def test_channel_means_are_observed_beside_or_without_an_observer(tiny_chain):
    model, feeds = watched(tiny_chain(), names=("scaled",)), feeds_of()
    for name in ("x", "scaled", "y"):
        values_of(model)[name].meta[MEANS] = {1: ChannelMean(1), -1: ChannelMean(-1)}
    observe(model, dataset(model, feeds), budget=1)
    for name in ("x", "scaled", "y"):
        expected = np.mean([chain(feed["x"])[name].astype(np.float64).mean(0) for feed in feeds], axis=0)
        for mean in values_of(model)[name].meta[MEANS].values():
            np.testing.assert_allclose(mean.mean, expected, rtol=1e-6, atol=1e-7)
    assert OBSERVER not in values_of(model)["y"].meta


# -- memory ------------------------------------------------------------------------------------------------------------


class Sessions:
    """Counts the sessions of `observe`, the values each gives, and how many are alive."""

    def __init__(self, monkeypatch):
        self.outputs, self.alive, self.most = [], 0, 0
        monkeypatch.setattr(calibration, "Session", self.open)

    def open(self, *arguments):
        session = Session(*arguments)
        self.outputs.append(session.outputs)
        self.alive += 1
        self.most = max(self.most, self.alive)
        close = session.close

        def closed():
            self.alive -= 1
            close()

        session.close = closed
        return session


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1 << 30, [["scaled", "shifted", "positive", "y"]]),
        (4 * 3 * 4 * 4, [["scaled", "shifted", "positive", "y"]]),
        (3 * 3 * 4 * 4, [["scaled", "shifted", "positive"], ["y"]]),
        (2 * 3 * 4 * 4, [["scaled", "shifted"], ["positive", "y"]]),
        (1, [["scaled"], ["shifted"], ["positive"], ["y"]]),
    ],
)
def test_values_are_split_by_the_budget(tiny_chain, monkeypatch, budget, expected):
    model = watched(tiny_chain(batch=3))
    sessions = Sessions(monkeypatch)
    observe(model, dataset(model, feeds_of()), budget=budget)
    assert sessions.outputs == expected
    assert (sessions.alive, sessions.most) == (0, 1)


def test_values_of_unknown_size_count_as_seen_or_as_large(tiny_chain, monkeypatch):
    model = watched(tiny_chain())
    sessions = Sessions(monkeypatch)
    observe(model, dataset(model, feeds_of()), budget=32 << 20)
    assert [len(outputs) for outputs in sessions.outputs] == [2, 2]
    for value in values_of(model).values():
        value.meta[RUN_SHAPE] = (3, 4)
    sessions.outputs.clear()
    observe(model, dataset(model, feeds_of()), budget=32 << 20)
    assert [len(outputs) for outputs in sessions.outputs] == [4]


def test_what_lies_behind_the_observed_values_is_not_run(tiny_chain):
    """The square root of a negative number would be an error; but nobody looks."""
    model = watched(tiny_chain(), names=("scaled",))
    behind = next(node for node in model.graph if node.op_type == "Relu")
    behind.op_type = "NoSuchOperator"
    observe(model, dataset(model, feeds_of()))
    assert values_of(model)["scaled"].meta[OBSERVER].count == 72


def test_no_more_than_a_few_batches_are_alive_at_once(tiny_chain, monkeypatch):
    """Neither of those that the function gives, nor of those that are read back from disk for every further graph."""
    model, given, read, most = watched(tiny_chain()), [], [], []

    def alive(refs):
        return sum(ref() is not None for ref in refs)

    def generate():
        for number in range(30):
            array = np.full((3, 4), number + 1, np.float32)
            given.append(weakref.ref(array))
            yield {"x": array}
            del array
            most.append(alive(given))

    update = calibration._update

    def watching(value, array, batch):
        if not read or read[-1]() is not batch:
            read.append(weakref.ref(batch))
        most.append(alive(read))
        update(value, array, batch)

    monkeypatch.setattr(calibration, "_update", watching)
    observe(model, dataset(model, generate), budget=1)
    assert len(given) == 30, "the function is called once"
    assert len(read) >= 4 * 30, "each of the four graphs sees all"
    assert max(most) <= 4


def test_memory_is_flat_in_the_number_of_batches(tiny_chain):
    def peak(count):
        model = watched(tiny_chain(width=4096), "minmax")

        def generate():
            for number in range(count):
                yield {"x": np.full((8, 4096), number + 1, np.float32)}

        tracemalloc.start()
        observe(model, dataset(model, generate), budget=1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    few, many = peak(4), peak(40)
    assert many < few + 4 * 8 * 4096, "36 batches more, none of them kept"


def test_sessions_are_closed_when_a_batch_fails(tiny_chain, monkeypatch):
    model = watched(tiny_chain())
    sessions = Sessions(monkeypatch)
    with pytest.raises(DataError):
        observe(model, dataset(model, [*feeds_of(), {"x": np.full((1, 4), np.nan, np.float32)}]))
    assert sessions.alive == 0


def test_external_weights_stay_where_they_are(tiny_chain, tmp_path):
    model = tiny_chain(width=4096)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=10)
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)}]
    stored = watched(modelio.read(tmp_path / "m.onnx"))
    observe(stored, dataset(stored, feeds), tmp_path, budget=1)
    inline = watched(model)
    observe(inline, dataset(inline, feeds))
    assert states(stored) == states(inline)
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in stored.graph.initializers.values())


# -- progress and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "parts"), [(1 << 30, 1), (1, 4)])
@pytest.mark.parametrize("observer", ["minmax", "moving-average"])
def test_progress_ends_at_all(tiny_chain, budget, parts, observer):
    model, seen = watched(tiny_chain(), observer), []
    observe(model, dataset(model, feeds_of(count=5)), budget=budget, progress=lambda *step: seen.append(step))
    assert seen[-1] == (5 * parts, 5 * parts)
    assert {total for _, total in seen} == {5 * parts}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("value", ["scaled", "y"])
def test_an_inner_value_that_is_not_finite_is_named_with_its_batch(tiny_chain, observer, value):
    model = watched(tiny_chain(weight=3e38), observer, names=(value,))
    feeds = [{"x": np.zeros((1, 4), np.float32)}, {"x": np.zeros((1, 4), np.float32)}]
    feeds.append({"x": np.full((1, 4), 2.0, np.float32)})
    with pytest.raises(DataError, match=rf"Value '{value}' \(the output of \w+\) is NaN or infinite on 'batch 2'"):
        observe(model, dataset(model, feeds))


def test_nan_from_an_operator(tiny_chain):
    model = tiny_chain()
    sqrt = model.graph[-1]
    sqrt.replace_input_with(0, model.graph.inputs[0])
    watched(model, names=("y",))
    with pytest.raises(DataError, match=r"'y' \(the output of sqrt\) is NaN or infinite on 'batch 0'"):
        observe(model, dataset(model, [{"x": np.full((1, 4), -1.0, np.float32)}]))


def test_an_operator_that_does_not_exist(tiny_chain):
    model = watched(tiny_chain())
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(ExecutionError, match="NoSuchOperator"):
        observe(model, dataset(model, feeds_of()))


def test_no_data(tiny_chain):
    model = watched(tiny_chain())
    with pytest.raises(DataError, match="no data"):
        observe(model, dataset(model, []))


# -- saved ranges ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_chain, tmp_path):
    """(a calibrated model, the file of its ranges)."""
    model = watched(tiny_chain(), "percentile")
    values_of(model)["positive"].meta[OBSERVER] = observers.create("moving-average")
    values_of(model)["x"].meta[MEANS] = {1: ChannelMean(1)}
    observe(model, dataset(model, feeds_of()))
    path = tmp_path / "ranges.npz"
    save(model, path, "key")
    return model, path


def test_ranges_round_trip(saved, tiny_chain):
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


def test_fewer_values_than_were_saved_may_be_restored(saved, tiny_chain):
    model, path = saved
    restored = watched(tiny_chain(), names=("y",))
    restore(restored, path, "key")
    assert states(restored) == {"y": states(model)["y"]}


def test_the_same_ranges_give_the_same_bytes(saved, tmp_path):
    model, path = saved
    save(model, tmp_path / "again.npz", "key")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["/layer.0/conv/Conv_output_0", "model", "qgraph", "file", "a\nb", "0.x", "ä", ".."])
def test_any_name_of_a_value_can_be_saved(tiny_chain, tmp_path, name):
    def build():
        model = tiny_chain()
        model.graph[1].outputs[0].name = name
        return watched(model, names=("x", name))

    model, restored = build(), build()
    observe(model, dataset(model, feeds_of()))
    save(model, tmp_path / "ranges.npz", "key")
    restore(restored, tmp_path / "ranges.npz", "key")
    assert states(restored) == states(model)


def test_ranges_of_another_model_are_refused(saved, tiny_chain):
    with pytest.raises(DataError, match="observed on another model"):
        restore(watched(tiny_chain()), saved[1], "other key")


def test_a_missing_value_is_named(saved, tiny_chain):
    model = tiny_chain()
    values_of(model)["shifted"].name = "newcomer"
    with pytest.raises(DataError, match="lacks the range of 'newcomer'"):
        restore(watched(model, names=("x", "newcomer")), saved[1], "key")


def test_missing_means_are_named(saved, tiny_chain):
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
def test_a_file_that_holds_no_ranges_is_refused(saved, tiny_chain, what):
    _, path = saved
    write(path, what)
    with pytest.raises(DataError, match="ranges"):
        restore(watched(tiny_chain()), path, "key")


def test_no_file_of_ranges(tiny_chain, tmp_path):
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
