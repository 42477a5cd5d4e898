"""What is observed: the model's own values, in any order, batch and budget; errors that name the batch."""

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import calibration, observers
from qgraph.calibration import MEANS, OBSERVER, observe
from qgraph.errors import DataError, ExecutionError
from qgraph.observers import OBSERVERS
from qgraph.observers.channel_mean import ChannelMean

NAMES = ("x", "scaled", "shifted", "positive", "y")


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_observers_see_the_models_own_values(watched, states, frozen, dataset, feeds_of, chain, tiny_chain, observer):
    model, feeds = watched(tiny_chain(), observer), feeds_of()
    observe(model, dataset(model, feeds))
    expected = {name: observers.create(observer) for name in NAMES}
    for feed in feeds:
        for row in feed["x"]:
            for name, array in chain(row[None]).items():
                expected[name].update(array)
    found = states(model)
    for name in NAMES:
        assert found[name] == frozen(expected[name]), name


def test_only_watched_values_are_observed(values_of, watched, states, dataset, feeds_of, tiny_chain):
    model = watched(tiny_chain(), names=("shifted",))
    observe(model, dataset(model, feeds_of()))
    assert set(states(model)) == {"shifted"}
    assert values_of(model)["shifted"].meta[OBSERVER].count == 6 * 3 * 4


def test_nothing_but_meta_is_changed(watched, dataset, feeds_of, tiny_chain):
    model = watched(tiny_chain())
    before = ir.to_proto(model).SerializeToString()
    observe(model, dataset(model, feeds_of()), budget=1)
    assert ir.to_proto(model).SerializeToString() == before


def test_inputs_alone_need_no_session(values_of, watched, dataset, feeds_of, tiny_chain, monkeypatch):
    model = watched(tiny_chain(), names=("x",))
    monkeypatch.setattr(calibration, "Session", None)
    observe(model, dataset(model, feeds_of()))
    assert values_of(model)["x"].meta[OBSERVER].count == 6 * 3 * 4


@pytest.mark.parametrize("observer", ["histogram", "minmax", "moving-average"])
def test_order_batch_size_and_budget_change_no_bit(watched, states, dataset, tiny_chain, observer):
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


def test_a_fixed_batch_is_one_sample(values_of, watched, dataset, feeds_of, tiny_chain):
    model = watched(tiny_chain(batch=3), "moving-average")
    observe(model, dataset(model, feeds_of(count=5, rows=3)))
    assert values_of(model)["y"].meta[OBSERVER].count == 5


def test_channel_means_are_observed_beside_or_without_an_observer(
    values_of, watched, dataset, feeds_of, chain, tiny_chain
):
    model, feeds = watched(tiny_chain(), names=("scaled",)), feeds_of()
    for name in ("x", "scaled", "y"):
        values_of(model)[name].meta[MEANS] = {1: ChannelMean(1), -1: ChannelMean(-1)}
    observe(model, dataset(model, feeds), budget=1)
    for name in ("x", "scaled", "y"):
        expected = np.mean([chain(feed["x"])[name].astype(np.float64).mean(0) for feed in feeds], axis=0)
        for mean in values_of(model)[name].meta[MEANS].values():
            np.testing.assert_allclose(mean.mean, expected, rtol=1e-6, atol=1e-7)
    assert OBSERVER not in values_of(model)["y"].meta


@pytest.mark.parametrize(("budget", "parts"), [(1 << 30, 1), (1, 4)])
@pytest.mark.parametrize("observer", ["minmax", "moving-average"])
def test_progress_ends_at_all(watched, dataset, feeds_of, tiny_chain, budget, parts, observer):
    model, seen = watched(tiny_chain(), observer), []
    observe(model, dataset(model, feeds_of(count=5)), budget=budget, progress=lambda *step: seen.append(step))
    assert seen[-1] == (5 * parts, 5 * parts)
    assert {total for _, total in seen} == {5 * parts}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("value", ["scaled", "y"])
def test_an_inner_value_that_is_not_finite_is_named_with_its_batch(watched, dataset, tiny_chain, observer, value):
    model = watched(tiny_chain(weight=3e38), observer, names=(value,))
    feeds = [{"x": np.zeros((1, 4), np.float32)}, {"x": np.zeros((1, 4), np.float32)}]
    feeds.append({"x": np.full((1, 4), 2.0, np.float32)})
    with pytest.raises(DataError, match=rf"Value '{value}' \(the output of \w+\) is NaN or infinite on 'batch 2'"):
        observe(model, dataset(model, feeds))


def test_nan_from_an_operator(watched, dataset, tiny_chain):
    model = tiny_chain()
    sqrt = model.graph[-1]
    sqrt.replace_input_with(0, model.graph.inputs[0])
    watched(model, names=("y",))
    with pytest.raises(DataError, match=r"'y' \(the output of sqrt\) is NaN or infinite on 'batch 0'"):
        observe(model, dataset(model, [{"x": np.full((1, 4), -1.0, np.float32)}]))


def test_an_operator_that_does_not_exist(watched, dataset, feeds_of, tiny_chain):
    model = watched(tiny_chain())
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(ExecutionError, match="NoSuchOperator"):
        observe(model, dataset(model, feeds_of()))


def test_no_data(watched, dataset, tiny_chain):
    model = watched(tiny_chain())
    with pytest.raises(DataError, match="no data"):
        observe(model, dataset(model, []))
