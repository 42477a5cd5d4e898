"""What a review found about learned roundings, and was mended: their time, and statistics that saw the data twice."""

import time

import pytest

import qgraph
from qgraph import learning, registry
from qgraph.calibration import MEANS, SAMPLE, STATISTICS, observe
from qgraph.data import inputs_of, load
from qgraph.errors import QuantizationError
from qgraph.observers.channel_mean import ChannelMean
from qgraph.observers.second_moment import SecondMoment
from qgraph.pipeline import Context
from qgraph.search import Search
from qgraph.trials import Trial, Trials

QUIET = {"bench_seconds": 0.0, "time_limit": 10.0}


def test_filled_statistics_are_not_filled_again(model_kit):
    """Roundings are learned on second moments, while the means that biases are corrected by lie there, full."""
    model = model_kit.text("g (float[n, 4] x) => (float[n, 4] y) { h = Relu (x) y = Abs (h) }")
    data = load(model_kit.feeds(model, 5), inputs_of(model))
    value = model.graph[0].outputs[0]
    value.meta[MEANS] = {-1: ChannelMean(-1)}
    observe(model, data)
    before = {key: array.tobytes() for key, array in value.meta[MEANS][-1].state().items()}

    class Count:
        seen = 0

        def update(self, array):
            self.seen += 1

    value.meta[STATISTICS] = {"count": Count()}
    model.graph[1].outputs[0].meta[MEANS] = {-1: ChannelMean(-1)}
    observe(model, data, kinds=(STATISTICS,))
    assert value.meta[STATISTICS]["count"].seen == 5
    assert {key: array.tobytes() for key, array in value.meta[MEANS][-1].state().items()} == before
    assert model.graph[1].outputs[0].meta[MEANS][-1].mean is None, "nor those of values that nothing else is asked of"


def test_learning_sees_means_no_second_time(model_kit, monkeypatch):
    n, calls = model_kit.normal, []
    model = model_kit.text(
        "g (float[N, 64] x) => (float[N, 8] y) { a = MatMul (x, A) b = Add (a, c) r = Relu (b) y = MatMul (r, B) }",
        A=n(64, 64, scale=0.1),
        B=n(64, 8, scale=0.1),
        c=n(64),
    )
    update, add = ChannelMean.update, SecondMoment.update
    monkeypatch.setattr(ChannelMean, "update", lambda self, array: (calls.append("mean"), update(self, array)))
    monkeypatch.setattr(SecondMoment, "update", lambda self, array: (calls.append("moment"), add(self, array)))
    model_kit.static(model, learn=True)
    assert "moment" in calls and "mean" in calls
    assert "mean" not in calls[calls.index("moment") :]


# -- what learning takes ----------------------------------------------------------------------------------------------


@pytest.fixture
def surveyed(model_kit):
    """Maker of a surveyed model's layers."""

    def build(text, rows, **weights):
        model = model_kit.text(text, **weights)
        target = model_kit.free()
        feeds = [{"x": rows(seed)} for seed in range(2)]
        context = Context(target, target.scheme("int8"), load(feeds, inputs_of(model)))
        model = registry.pipeline("survey")(context)(model).model
        return [node for node in model.graph if SAMPLE in node.meta]

    return build


def test_learning_takes_longer_on_more_data(surveyed, model_kit):
    n = model_kit.normal
    text = "g (float[N, {0}] x) => (float[N, {1}] y) {{ {2} }}"
    conv = surveyed(
        text.format("4, 28, 28", "4, 28, 28", "y = Conv <pads = [1, 1, 1, 1]> (x, W)"),
        lambda seed: n(2, 4, 28, 28, seed=seed),
        W=n(4, 4, 3, 3),
    )
    few, more, most = (learning.seconds(conv, runs, 1 << 30) for runs in (0, 100, 200))
    assert few > 0 and most - more == pytest.approx(more - few) and more > 10 * few
    per_row = 2 * 28 * 28 * 36 * 36
    assert more - few == pytest.approx(100 * per_row * learning._CUT / learning._SUMMED_PER_SECOND)
    large = surveyed(
        text.format("4, 112, 112", "4, 112, 112", "y = Conv <pads = [1, 1, 1, 1]> (x, W)"),
        lambda seed: n(2, 4, 112, 112, seed=seed),
        W=n(4, 4, 3, 3),
    )
    assert learning.seconds(large, 100, 1 << 30) < more, "of 16 times as many patches no more are taken"


def test_readers_of_one_value_share_its_moment_and_what_cannot_be_learned_takes_no_time(surveyed, model_kit):
    n = model_kit.normal
    both = "a = MatMul (x, A) b = MatMul (x, {}) y = Add (a, b)"
    text = "g (float[N, 16] x) => (float[N, 16] y) {{ {} }}"
    one = surveyed(text.format("y = MatMul (x, A)"), lambda seed: n(8, 16, seed=seed), A=n(16, 16))
    two = surveyed(text.format(both.format("B")), lambda seed: n(8, 16, seed=seed), A=n(16, 16), B=n(16, 16))
    solved = learning.seconds(one, 0, 1 << 30)
    assert learning.seconds(two, 0, 1 << 30) == pytest.approx(2 * solved)
    data = learning.seconds(one, 100, 1 << 30) - solved
    assert learning.seconds(two, 100, 1 << 30) == pytest.approx(2 * solved + data)
    assert learning.seconds(two, 100, 8 * 16 * 16 - 1) == 0.0, "a moment beyond the memory"
    chain = surveyed(text.format("a = MatMul (x, A) y = MatMul (a, A)"), lambda seed: n(8, 16, seed=seed), A=n(16, 16))
    assert learning.seconds(chain, 100, 1 << 30) == 0.0, "a weight that layers with other inputs share"


@pytest.mark.parametrize("left, begun", [(20.0, False), (45.0, True)])
def test_learning_that_the_time_left_does_not_hold_is_not_begun(left, begun):
    """Half of the whole limit may be more than what is left of it."""
    first = Trial("fastest", {"a": "int8"}, 0.02, 2.0, 20.0, 1.0)
    tried = []

    class Builder:
        fixed = learns = calibrated = False
        variant = "none"

        def savings(self):
            return {("a", "int8"): 1.0}

        def assignment(self, prices=None):
            return {"a": "int8"}

        def learning_seconds(self, assignment):
            return 30.0

        def build(self, *_, **__):
            tried.append(1)
            raise QuantizationError("begun")

    search = Search(Builder(), None, list, Trials(None, ""), time.monotonic() + 100, lambda *_: None)
    search.deadline = time.monotonic() + left
    assert not search._learn(first) and bool(tried) == begun


def test_where_no_layer_can_be_learned_nothing_is_called_learned(model_kit, model_free_cpu):
    model = model_kit.text(
        "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, A) r = Relu (a) y = MatMul (r, A) }",
        A=model_kit.normal(64, 64, scale=0.1),
    )
    other = model_kit.text(
        "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, A) r = Relu (a) y = MatMul (r, B) }",
        A=model_kit.normal(64, 64, scale=0.1),
        B=model_kit.normal(64, 64, scale=0.1, seed=1),
    )
    for one, learned in ((model, False), (other, True)):
        found = qgraph.optimize(one, None, data=model_kit.feeds(one, 12), scheme="int8", **QUIET).report.candidates
        assert any("learned" in candidate.name for candidate in found) == learned
