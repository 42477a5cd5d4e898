"""Metrics, the limits that are stated in them, and the judge that holds candidates to both."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import metrics
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import DataError, ExecutionError, OptionError
from qgraph.feeds import Batch
from qgraph.judge import Judge
from qgraph.metrics import METRICS, Limit, loss_limit, metric
from qgraph.options import Options
from qgraph.report import Fidelity, OutputError
from qgraph.session import SessionOptions


def fidelity(*outputs):
    """Of (sqnr, cosine, agreement) for each output."""
    return Fidelity(4, True, {f"y{i}": OutputError(s, c, 0.1, a) for i, (s, c, a) in enumerate(outputs)})


def batches(*pairs, name="scores"):
    """(labels, scores) of each batch."""
    for number, (labels, scores) in enumerate(pairs):
        yield Batch(f"b{number}", {}, None if labels is None else np.array(labels)), {name: np.asarray(scores)}


# -- metrics --------------------------------------------------------------------------------------------------------


def test_comparisons_take_the_worst_output():
    found = fidelity((30, 0.99, 0.5), (20, 0.995, None), (40, 0.98, 0.75))
    assert METRICS["cosine"].value(found, ()) == 0.98
    assert METRICS["agreement"].value(found, ()) == 0.5
    assert METRICS["sqnr"].value(found, ()) == 20
    assert METRICS["sqnr"].value(fidelity((math.inf, 1, 1)), ()) == math.inf


def test_agreement_needs_classes():
    with pytest.raises(DataError, match="looks like class scores"):
        METRICS["agreement"].value(fidelity((30, 0.99, None)), ())


@pytest.mark.parametrize("name", ["cosine", "sqnr", "agreement"])
def test_what_is_no_number_is_an_error(name):
    with pytest.raises(DataError, match=f"'{name}' is nan"):
        METRICS[name].value(fidelity((math.nan, math.nan, math.nan)), ())


def test_top1_and_top5():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 40)
    ranks = np.argsort(-scores, axis=1)
    for name, count in (("top1", 1), ("top5", 5)):
        expected = 100 * np.mean([label in rank[:count] for label, rank in zip(labels, ranks, strict=True)])
        found = METRICS[name].value(fidelity(), batches((labels[:15], scores[:15]), (labels[15:, None], scores[15:])))
        assert found == pytest.approx(expected)
    assert METRICS["top5"].value(fidelity(), batches(([2], [[0.5, 0.1, 0.2]]))) == 100, "fewer classes than five"


def test_top1_passes_over_outputs_that_are_no_scores():
    outputs = {"features": np.zeros((2, 3, 4), np.float32), "ids": np.zeros((2, 3), np.int64),
               "one": np.zeros((2, 1), np.float32), "scores": np.array([[0, 1], [1, 0]], np.float32)}  # fmt: skip
    assert METRICS["top1"].value(fidelity(), [(Batch("b", {}, np.array([1, 1])), outputs)]) == 50


@pytest.mark.parametrize(
    "pair, words",
    [
        ((None, [[0.0, 1.0]]), "array 'labels'"),
        (([1, 0], [[0.0, 1.0]]), "class scores"),
        (([1], [0.0]), "class scores"),
        (([1], [[1]]), "class scores"),
    ],
)
def test_top1_on_data_that_does_not_suit(pair, words):
    with pytest.raises(DataError, match=words):
        METRICS["top1"].value(fidelity(), batches(pair))


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    def mine(outputs):
        return sum(float(found["scores"].sum()) for _, found in outputs)

    one = metric(mine)
    assert one.value(fidelity(), batches(([0], [[1.0, 2.0]]), ([0], [[3.0, 4.0]]))) == 10
    assert one.needs_labels and one.perfect is None and one.name.endswith("mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_qgraph_test.py").write_text(
        "class Deep:\n    @staticmethod\n    def f(outputs):\n        return 7\n"
    )
    found = metric("mine_qgraph_test:Deep.f")
    assert found.name == "mine_qgraph_test:Deep.f" and found.value(fidelity(), ()) == 7


@pytest.mark.parametrize("result", [math.nan, math.inf, -math.inf])
def test_a_function_that_gives_no_number(result):
    with pytest.raises(DataError, match="cannot be held to a budget"):
        metric(lambda _: result).value(fidelity(), ())


@pytest.mark.parametrize("result", [None, "much", [1, 2]])
def test_a_function_that_gives_something_else(result):
    with pytest.raises(DataError, match=r"function failed: (TypeError|ValueError)"):
        metric(lambda _: result).value(fidelity(), ())


def test_a_function_that_fails_says_how():
    def broken(outputs):
        return {}["no such key"]

    with pytest.raises(DataError, match="metric's function failed: KeyError: 'no such key'"):
        metric(broken).value(fidelity(), ())

    def refuses(outputs):
        raise DataError("these are no words")

    with pytest.raises(DataError, match=r"^these are no words$"):
        metric(refuses).value(fidelity(), ())


@pytest.mark.parametrize(
    "name, words",
    [
        ("cosin", "Did you mean 'cosine'"),
        ("top2", "Did you mean 'top[15]'"),
        ("", "metric"),
        ("no_such_module:f", "Cannot import metric 'no_such_module:f': ModuleNotFoundError"),
        ("math:no_such_function", "AttributeError"),
    ],
)
def test_unknown_metrics(name, words):
    with pytest.raises(OptionError, match=words):
        metric(name)


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, limit, relative",
    [("1%", 0.01, True), ("0.5", 0.5, False), (" 2.5 % ", 0.025, True), (0.25, 0.25, False), ("1e-3", 1e-3, False),
     ("0", 0.0, False), ("100%", 1.0, True), (1, 1.0, False), (".5%", 0.005, True)],
)  # fmt: skip
def test_limits(text, limit, relative):
    found = loss_limit(text, METRICS["top1"])
    assert (found.limit, found.relative, found.metric.name) == (pytest.approx(limit), relative, "top1")
    assert found.text.startswith("loss of top1 at most ") and found.text.endswith("%") == relative


@pytest.mark.parametrize(
    "text", ["abc", "-1", "-1%", "nan", "inf", math.nan, math.inf, -0.5, "", "%", "1 2", "1%%", "1.2.3", "1e999", None]
)
def test_what_is_no_limit(text):
    with pytest.raises(OptionError, match="A loss is a number of at least 0"):
        loss_limit(text, METRICS["cosine"])


def test_sqnr_has_a_floor_and_no_loss():
    with pytest.raises(OptionError, match="--min-sqnr"):
        loss_limit("1%", METRICS["sqnr"])
    (limit,) = Options(min_sqnr=20).limits()
    # A share of noise: 20 dB are 1 %, and 17 dB twice that.
    assert limit.limit == pytest.approx(0.01) and limit.loss(math.inf, 17) == pytest.approx(0.02, rel=0.01)
    assert limit.loss(math.inf, math.inf) == 0


@given(original=st.floats(-100, 100), value=st.floats(-100, 100))
def test_losses_are_what_was_lost(original, value):
    absolute = Limit(METRICS["top1"], 1.0, False, "")
    assert absolute.loss(original, value) == original - value
    relative = Limit(METRICS["top1"], 0.01, True, "")
    if original == 0:
        with pytest.raises(DataError, match="is 0 for the original"):
            relative.loss(original, value)
    else:
        loss = relative.loss(original, value)
        assert loss == pytest.approx((original - value) / abs(original))
        assert (loss > 0) == (value < original), "a gain is no loss, of negative values as of others"


def test_the_budget_of_options():
    assert [(one.metric.name, one.limit, one.relative) for one in Options().limits()] == [("cosine", 0.01, True)]
    assert [one.metric.name for one in Options(min_sqnr=20).limits()] == ["sqnr"]
    found = Options(max_loss=0.5, metric="top1", min_cosine=0.9, min_agreement=1.0, min_sqnr=10).limits()
    assert [one.metric.name for one in found] == ["top1", "sqnr", "cosine", "agreement"]
    assert [one.limit for one in found] == [0.5, pytest.approx(0.1), pytest.approx(0.1), 0.0]
    assert [one.metric.name for one in Options(metric="agreement", min_sqnr=10).limits()] == ["agreement", "sqnr"]


# -- the judge ------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(model_kit, tmp_path):
    """A judge of y = x, labels included; candidates are y = x * factors."""
    text = "g (float[n, 4] x) => (float[n, 4] y) { y = Mul (x, k) }"
    original = model_kit.text(text, k=np.ones(4, np.float32))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 4)).astype(np.float32)
    data = load(_labelled(tmp_path, x), inputs_of(original))

    def build(*limits, held_back=True):
        made = Judge(Runnable(original), data, list(limits), SessionOptions(threads=1), tmp_path / "judge", held_back)
        return made, lambda *factors: Runnable(model_kit.text(text, k=np.array(factors, np.float32)))

    return build


def _labelled(folder, x):
    np.savez(folder / "data.npz", x=x, labels=x.argmax(axis=1))
    return str(folder / "data.npz")


def test_a_verdict_is_the_largest_share_of_a_limit(judge):
    limits = [loss_limit("1%", METRICS["cosine"]), *Options(min_sqnr=20, min_agreement=0.5).limits()]
    made, candidate = judge(*limits)
    same = made.judge(candidate(1, 1, 1, 1))
    assert (same.within, same.strain) == (True, 0.0)
    assert same.losses == {"cosine": 0.0, "sqnr": 0.0, "agreement": 0.0}
    # All numbers 0.9 of what they were: 20 dB of noise exactly, and no cosine lost.
    scaled = made.judge(candidate(0.9, 0.9, 0.9, 0.9))
    assert scaled.losses["sqnr"] == pytest.approx(0.01, rel=1e-5)
    assert scaled.strain == pytest.approx(made.margin(scaled.fidelity), rel=1e-5)
    assert scaled.losses["cosine"] == pytest.approx(0, abs=1e-9)
    # One channel turned round: the cosine counts.
    turned = made.judge(candidate(1, 1, 1, -1))
    assert not turned.within
    shares = [turned.losses["cosine"] / 0.01, turned.losses["sqnr"] / 0.01, turned.losses["agreement"] / 0.5]
    assert (
        turned.strain
        == max(shares) * made.margin(turned.fidelity)
        == pytest.approx(made.margin(turned.fidelity) * turned.losses["sqnr"] / 0.01)
    )
    assert turned.fidelity.held_back and turned.fidelity.samples == 32


def test_a_limit_of_nothing_allows_nothing(judge):
    made, candidate = judge(loss_limit(0, METRICS["agreement"]))
    assert made.judge(candidate(1, 1, 1, 1)).strain == 0
    assert made.judge(candidate(2, 2, 2, 2)).strain == 0, "the largest element is the same"
    assert made.judge(candidate(1, 1, 1, -1)).strain == math.inf


def test_metrics_of_labels_are_those_of_the_original_and_the_candidate(judge):
    made, candidate = judge(loss_limit("20%", METRICS["top1"]))
    assert made.judge(candidate(3, 3, 3, 3)).strain == 0
    turned = made.judge(candidate(1, 1, 1, -1))
    right = 100 * (1 - turned.losses["top1"])
    agreement = 100 * turned.fidelity.worst.agreement
    assert right == pytest.approx(agreement), "the original is always right here"
    assert turned.strain == pytest.approx(made.margin(turned.fidelity) * turned.losses["top1"] / 0.2)


def test_a_candidate_that_is_not_a_number_is_outside_any_budget(judge):
    for limit in (loss_limit("100%", METRICS["cosine"]), loss_limit("100%", METRICS["top1"])):
        made, candidate = judge(limit)
        found = made.judge(candidate(1, 1, math.nan, 1))
        assert found.strain == math.inf and not found.within
        assert made.judge(candidate(1, 1, 1, 1)).within, "and the next one is judged as ever"


def test_a_candidate_with_other_outputs_is_an_error(judge, model_kit):
    made, _ = judge(loss_limit("1%", METRICS["cosine"]))
    other = model_kit.text("g (float[n, 4] x) => (float[n, 4] z) { z = Neg (x) }")
    with pytest.raises(DataError, match="outputs differ"):
        made.judge(Runnable(other))
    with pytest.raises(ExecutionError):
        made.judge(Runnable(model_kit.text("g (float[n, 3] x) => (float[n, 3] y) { y = Neg (x) }")))


def test_functions_see_inputs_labels_and_outputs(judge):
    seen = []

    def error(outputs):
        pairs = [(batch.feeds["x"], batch.labels, found["y"]) for batch, found in outputs]
        seen.append(len(pairs))
        assert all(labels.shape == (1,) for _, labels, _ in pairs)
        return -float(np.mean([np.abs(x - y).mean() for x, _, y in pairs]))

    made, candidate = judge(loss_limit(0.5, metric(error)))
    found = made.judge(candidate(2, 2, 2, 2))
    made.judge(candidate(2, 2, 2, 2))
    assert found.losses.popitem()[1] > 0.5 and found.strain > 1
    assert seen == [32] * 3, "the original once, each candidate once"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.METRICS["cosine"].name = "other"
