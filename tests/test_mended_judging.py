"""What a review found about judging, and was mended: lost shapes, samples and batches, data that serves twice."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph import division, oddities
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import NothingQuantizedError
from qgraph.feeds import Batch
from qgraph.judge import Judge
from qgraph.metrics import loss_limit, metric
from qgraph.session import SessionOptions
from qgraph.tally import Tally, samples_of
from qgraph.trials import Trial

OPTIONS = SessionOptions(threads=1)
QUIET = {"bench_seconds": 0.0, "time_limit": 10.0}


def batch(rows=1, name="x"):
    return Batch("batch", {name: np.zeros((rows, 3), np.float32)})


# -- outputs whose shape depends on their values ----------------------------------------------------------------------

PICK = """g (float[1, 8] x) => (float[K] f, float[1, 8] y) {{
    y = Mul (x, k)
    s = Add (y, off)
    v = Squeeze (s, zero)
    b = Greater (v, th)
    f = Compress (v, b)
}}"""


@pytest.fixture
def picks(model_kit):
    """Maker of a model that picks what exceeds a threshold, of numbers that are a little off."""

    def build(scale=1.0, off=0.0):
        numbers = {"k": scale, "off": off, "th": 0.5}
        arrays = {name: np.array(number, np.float32) for name, number in numbers.items()}
        return model_kit.text(PICK.format(), zero=np.array([0], np.int64), **arrays)

    return build


@pytest.fixture
def judge(tmp_path):
    """Maker of a judge of models on feeds, by cosine."""

    def build(original, feeds, limit="1%", name="judge"):
        limits = [loss_limit(limit, metric("cosine"))]
        return Judge(Runnable(original), load(feeds, inputs_of(original)), limits, OPTIONS, tmp_path / name)

    return build


@pytest.fixture
def rows(model_kit):
    """Eight samples, of which the last alone has a number just below the threshold."""
    found = [model_kit.normal(1, 8, seed=seed) for seed in range(8)]
    for row in found:
        row[np.abs(row - 0.5) < 0.05] = 0.7
    found[-1][0, 0] = 0.495
    return [{"x": row} for row in found]


def test_an_output_that_loses_its_shape_once_is_never_better_than_one_that_keeps_it(picks, judge, rows):
    made = judge(picks(), rows)
    kept, lost = made.judge(Runnable(picks(scale=1.001))), made.judge(Runnable(picks(off=0.01)))
    assert not kept.fidelity.skipped and kept.within
    assert set(lost.fidelity.skipped) == {"f"} and set(lost.fidelity.outputs) == {"f", "y"}
    assert lost.fidelity.outputs["f"].cosine == pytest.approx(7 / 8, abs=0.01) and not lost.within
    assert lost.fidelity.worst is lost.fidelity.outputs["f"], "all of the signal of that batch is noise"
    assert lost.fidelity.skipped["f"].endswith("'batch 7': counted as lost")


def test_what_float_models_do_not_agree_on_is_left_out_and_told(picks, judge, rows):
    made, asked = judge(picks(), rows), []

    @contextlib.contextmanager
    def rewritten():
        asked.append(1)
        yield Runnable(picks(off=0.006))

    made.rewritten = rewritten
    for _ in range(2):
        found = made.judge(Runnable(picks(off=0.01)))
        assert found.within and set(found.fidelity.outputs) == {"y"}
        assert "before anything is quantized: not compared" in found.fidelity.skipped["f"]
    assert made.judge(Runnable(picks(scale=1.0001))).fidelity.outputs.keys() == {"y"}, "for all candidates alike"
    assert len(asked) == 1


def test_the_float_graph_is_not_asked_for_what_it_keeps(picks, judge, rows):
    made = judge(picks(), rows)
    made.rewritten = lambda: contextlib.nullcontext(Runnable(picks(off=1e-4)))
    assert not made.judge(Runnable(picks(off=0.01))).within
    made.rewritten = None
    assert not made.judge(Runnable(picks(off=0.01))).within, "and it is known from now on"


def test_a_search_does_not_take_what_loses_the_shape(model_kit, model_free_cpu):
    """The other output is right whatever is quantized, and was all that counted."""
    model = model_kit.text(
        """g (float[N, 64] x) => (float[K] f, int64[2] k) {
            y = MatMul (x, A)
            k = Shape (y)
            v = Reshape (y, all)
            b = Greater (v, th)
            f = Compress (v, b)
        }""",
        A=model_kit.normal(64, 64, scale=0.1),
        th=np.float32(0.5),
        all=np.array([-1], np.int64),
    )
    feeds = [{"x": model_kit.normal(4, 64, seed=seed)} for seed in range(20)]
    with pytest.raises(NothingQuantizedError, match="nothing is within the budget"):
        qgraph.optimize(model, None, data=feeds, scheme="int8", min_sqnr=60, **QUIET)
    report = qgraph.optimize(model, None, data=feeds, scheme="int8", min_sqnr=60, force=True, **QUIET).report
    assert "f" in report.fidelity.skipped and report.fidelity.outputs["f"].sqnr < 60


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 99))
def test_a_lost_batch_counts_whole(kept, seed):
    rng = np.random.default_rng(seed)
    whole, half = Tally(), Tally()
    for one in kept:
        x = rng.standard_normal((1, 5)).astype(np.float32)
        whole.add(x, x + np.float32(0.01), batch())
        if one:
            half.add(x, x + np.float32(0.01), batch())
        else:
            half.lose(x, x[:, :4], batch())
    better, worse = whole.result(), half.result()
    assert worse.cosine <= better.cosine and worse.sqnr <= better.sqnr and worse.agreement <= better.agreement
    assert half.samples == len(kept) and worse.agreement == sum(kept) / len(kept)


# -- what counts as a sample ------------------------------------------------------------------------------------------


def test_whole_numbers_are_equal_or_not():
    """The cosine of labels is near one whatever they are."""
    for kind in (np.int64, np.uint8, np.int32):
        tally = Tally()
        tally.add(np.array([[5, 6, 7, 8]], kind), np.array([[5, 6, 8, 8]], kind), batch())
        assert tally.result().cosine == 0.75 and tally.result().agreement is None
    tally = Tally()
    tally.add(np.array([[True, False]] * 2), np.array([[True, True], [True, False]]), batch(2))
    assert tally.result().cosine == 0.75


def test_a_vector_is_one_sample_unless_it_has_a_number_for_each():
    scores = np.array([3.0, 1.0, 0.01], np.float32)
    assert samples_of(scores, batch(1)) == 1 and samples_of(scores, batch(3)) == 3
    other = np.array([3.0, 1.0, -0.01], np.float32)
    alone, each = Tally(), Tally()
    alone.add(scores, other, batch(1))
    each.add(scores, other, batch(3))
    assert alone.result().cosine > 0.9999 and each.result().cosine == pytest.approx((1 + 1 - 1) / 3, abs=1e-6)


def test_the_margin_counts_samples_and_not_batches(model_kit, judge):
    original, other = (model_kit.text("g (float[n, 4] x) => (float[n, 4] y) { y = Mul (x, k) }", k=k) for k in (
        np.array([1, 1, 1, 1], np.float32), np.array([1, 1, 1.1, 1], np.float32)))  # fmt: skip
    rows = model_kit.normal(32, 4)
    margins = []
    for size in (1, 8):
        made = judge(original, [{"x": rows[i : i + size]} for i in range(0, 32, size)], name=f"by {size}")
        assert made.samples == 32
        margins.append(made.margin(made.judge(Runnable(other)).fidelity))
    assert margins[0] == margins[1] and 1 < margins[0] < 1 + 1 / math.sqrt(32)


# -- data that is not what it seems -----------------------------------------------------------------------------------


@pytest.fixture
def layer(model_kit):
    """A layer that is worth int8, and data for it."""
    model = model_kit.text("g (float[n, 64] x) => (float[n, 8] y) { y = MatMul (x, A) }", A=model_kit.normal(64, 8) / 8)
    return model, [{"x": model_kit.normal(1, 64, seed=seed)} for seed in range(24)]


def test_evaluation_data_that_calibration_has_seen_is_told(layer, model_free_cpu):
    model, feeds = layer
    for evaluation, count in (
        (feeds, 24),
        ([*feeds[:1], {"x": feeds[0]["x"] + 1}], 1),
        ([{"x": feeds[0]["x"] + 1}], 0),
    ):
        report = qgraph.optimize(model, None, data=feeds, evaluation=evaluation, scheme="int8", **QUIET).report
        told = [note for note in report.notes if "are calibration data, too" in note]
        assert report.fidelity.held_back == (count == 0) and len(told) == (count > 0)
        assert not count or told[0].startswith(f"{count} of the {len(evaluation)} runs")


def test_a_constant_input_is_named(model_kit):
    text = "g (float[n, 8] x, float[n, 8] z, float[1] t, int64[n, 8] i) => (float[n, 8] y) { y = Add (x, z) }"
    model = model_kit.text(text)
    fixed = {"t": np.zeros(1, np.float32), "i": np.zeros((2, 8), np.int64)}

    def told(*arrays):
        feeds = [{"x": model_kit.normal(2, 8, seed=n), "z": array, **fixed} for n, array in enumerate(arrays)]
        return oddities.constant(load(feeds, inputs_of(model)))

    zeros, ones = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    assert [note[:30] for note in told(zeros, zeros)] == ["Input 'z' is 0 throughout the "]
    assert "Input 'z' is 1 throughout" in told(ones, ones)[0]
    assert told(zeros, ones) == [] and told(ones, model_kit.normal(2, 8)) == []


def test_a_metric_that_needs_labels_is_searched_on_the_evaluation_data_and_it_is_told(layer):
    model, feeds = layer
    labelled = [{"x": feed["x"] + 1, "labels": np.array([1])} for feed in feeds]
    parts = division.divide(model, feeds, labelled, [loss_limit("1%", metric("top1"))])
    assert (
        parts.search.count() == 24
        and parts.final is None
        and "'top1' can be measured on the evaluation" in parts.told[0]
    )


def test_a_function_that_does_without_labels_is_searched_on_data_held_back(layer):
    model, feeds = layer
    evaluation = [{"x": feed["x"] + 1} for feed in feeds]

    def size(outputs):
        return float(np.mean([np.abs(found["y"]).mean() for _, found in outputs]))

    def right(outputs):
        return float(np.mean([found["y"].argmax() == batch.labels[0] for batch, found in outputs]))

    def session():
        return Runnable(model).session(OPTIONS)

    for function, held in ((size, True), (right, False)):
        parts = division.divide(model, feeds, evaluation, [loss_limit("1%", metric(function))], original=session)
        assert (parts.final is not None) == held and (parts.search.count() < 24) == held
        assert any(function.__name__ in note for note in parts.told) == (not held)


# -- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "speed, twin, slowest",
    [
        (0.97, {}, 0.97),
        (0.97, {"1": 1.02}, 1.02),
        (0.97, {"1": 0.99}, 0.99),
        (0.85, {"1": 0.9}, 0.9),
        (0.7, {"1": 1.0}, 0.7),
    ],
)
def test_what_is_stored_is_as_fast_as_the_float_graph_and_no_faster(speed, twin, slowest):
    trial = Trial("fp16", {"a": "fp16"}, 0.0, 0.0, 60.0, 0.0, speed={"1": speed}, stored=True, twin=twin)
    assert trial.slowest == slowest and trial.candidate(False).verdict == ("within" if slowest >= 1 else "slower")
    trial.stored = False
    assert trial.slowest == speed, "of other kernels the clock speaks for itself"
