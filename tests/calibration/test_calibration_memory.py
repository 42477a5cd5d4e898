"""Memory: values are split by the budget, and it does not grow with the data."""

import tracemalloc
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import calibration, modelio
from qgraph.calibration import OBSERVER, observe
from qgraph.errors import DataError
from qgraph.graph import RUN_SHAPE
from qgraph.session import Session


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
def test_values_are_split_by_the_budget(watched, dataset, feeds_of, tiny_chain, monkeypatch, budget, expected):
    model = watched(tiny_chain(batch=3))
    sessions = Sessions(monkeypatch)
    observe(model, dataset(model, feeds_of()), budget=budget)
    assert sessions.outputs == expected
    assert (sessions.alive, sessions.most) == (0, 1)


def test_values_of_unknown_size_count_as_seen_or_as_large(
    values_of, watched, dataset, feeds_of, tiny_chain, monkeypatch
):
    model = watched(tiny_chain())
    sessions = Sessions(monkeypatch)
    observe(model, dataset(model, feeds_of()), budget=32 << 20)
    assert [len(outputs) for outputs in sessions.outputs] == [2, 2]
    for value in values_of(model).values():
        value.meta[RUN_SHAPE] = (3, 4)
    sessions.outputs.clear()
    observe(model, dataset(model, feeds_of()), budget=32 << 20)
    assert [len(outputs) for outputs in sessions.outputs] == [4]


def test_what_lies_behind_the_observed_values_is_not_run(values_of, watched, dataset, feeds_of, tiny_chain):
    """The square root of a negative number would be an error; but nobody looks."""
    model = watched(tiny_chain(), names=("scaled",))
    behind = next(node for node in model.graph if node.op_type == "Relu")
    behind.op_type = "NoSuchOperator"
    observe(model, dataset(model, feeds_of()))
    assert values_of(model)["scaled"].meta[OBSERVER].count == 72


def test_no_more_than_a_few_batches_are_alive_at_once(watched, dataset, tiny_chain, monkeypatch):
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

    def watching(value, array, batch, kinds):
        if not read or read[-1]() is not batch:
            read.append(weakref.ref(batch))
        most.append(alive(read))
        update(value, array, batch, kinds)

    monkeypatch.setattr(calibration, "_update", watching)
    observe(model, dataset(model, generate), budget=1)
    assert len(given) == 30, "the function is called once"
    assert len(read) >= 4 * 30, "each of the four graphs sees all"
    assert max(most) <= 4


def test_memory_is_flat_in_the_number_of_batches(watched, dataset, tiny_chain):
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


def test_sessions_are_closed_when_a_batch_fails(watched, dataset, feeds_of, tiny_chain, monkeypatch):
    model = watched(tiny_chain())
    sessions = Sessions(monkeypatch)
    with pytest.raises(DataError):
        observe(model, dataset(model, [*feeds_of(), {"x": np.full((1, 4), np.nan, np.float32)}]))
    assert sessions.alive == 0


def test_external_weights_stay_where_they_are(watched, states, dataset, tiny_chain, tmp_path):
    model = tiny_chain(width=4096)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=10)
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)}]
    stored = watched(modelio.read(tmp_path / "m.onnx"))
    observe(stored, dataset(stored, feeds), tmp_path, budget=1)
    inline = watched(model)
    observe(inline, dataset(inline, feeds))
    assert states(stored) == states(inline)
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in stored.graph.initializers.values())
