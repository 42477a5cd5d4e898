"""Metrics of language models: numbers by hand, padding that does not count, and the judge that uses them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph import language
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.errors import DataError
from qgraph.feeds import Batch
from qgraph.judge import Judge
from qgraph.metrics import METRICS, loss_limit
from qgraph.options import Options
from qgraph.session import SessionOptions


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def batch(ids, mask=None):
    feeds = {"input_ids": np.asarray(ids)}
    if mask is not None:
        feeds["attention_mask"] = np.asarray(mask)
    return Batch("b", feeds)


def logits(*shape, seed=0):
    return (3 * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


@given(seed=st.integers(0, 50), rows=st.integers(1, 3), length=st.integers(1, 5))
def test_kl_is_the_mean_divergence(seed, rows, length):
    p, q = logits(rows, length, 7, seed=seed), logits(rows, length, 7, seed=seed + 100)
    ids = np.zeros((rows, length), np.int64)
    a, b = softmax(p.astype(np.float64)), softmax(q.astype(np.float64))
    expected = (a * np.log2(a / b)).sum(-1).mean()
    entropy = language.cross_entropy([(batch(ids), {"logits": p}, {"logits": p})])
    found = language.cross_entropy([(batch(ids), {"logits": p}, {"logits": q})])
    assert found - entropy == pytest.approx(expected, rel=1e-6)
    assert entropy == pytest.approx(-(a * np.log2(a)).sum(-1).mean(), rel=1e-6)
    assert found >= entropy - 1e-12, "nothing predicts better than the original itself"


def test_chunks_change_nothing(monkeypatch):
    p, q = logits(2, 5, 11), logits(2, 5, 11, seed=1)
    one = [(batch(np.zeros((2, 5), np.int64)), {"y": p}, {"y": q})]
    ids = np.random.default_rng(0).integers(0, 11, (2, 5))
    whole, bits = language.cross_entropy(one), language.bits([(batch(ids), {"y": p})])
    monkeypatch.setattr(language, "_CHUNK", 22)
    assert language.cross_entropy(one) == pytest.approx(whole, rel=1e-12)
    assert language.bits([(batch(ids), {"y": p})]) == pytest.approx(bits, rel=1e-12)


def test_bits_are_of_the_next_token():
    ids = np.array([[1, 2, 0, 3]])
    y = logits(1, 4, 4)
    p = softmax(y.astype(np.float64))
    expected = -np.mean([np.log2(p[0, t, ids[0, t + 1]]) for t in range(3)])
    assert language.bits([(batch(ids), {"y": y})]) == pytest.approx(expected, rel=1e-6)
    assert language.perplexity([(batch(ids), {"y": y})]) == pytest.approx(2**expected, rel=1e-6)
    # What is certain takes no bits, and what is even over four takes two.
    sure = np.where(np.eye(4)[np.roll(ids, -1, axis=1)] > 0, 500.0, 0.0).astype(np.float32)
    assert language.bits([(batch(ids), {"y": sure})]) == pytest.approx(0, abs=1e-9)
    assert language.bits([(batch(ids), {"y": np.zeros((1, 4, 4), np.float32)})]) == 2


def test_batches_count_by_their_tokens():
    y = [logits(1, 3, 5), logits(2, 6, 5)]
    ids = [np.zeros((1, 3), np.int64), np.ones((2, 6), np.int64)]
    parts = [language.bits([(batch(i), {"y": one})]) for i, one in zip(ids, y, strict=True)]
    whole = language.bits([(batch(i), {"y": one}) for i, one in zip(ids, y, strict=True)])
    assert whole == pytest.approx((2 * parts[0] + 10 * parts[1]) / 12, rel=1e-9)


def test_padding_does_not_count():
    ids = np.array([[9, 9, 1, 2, 3], [4, 5, 6, 9, 9]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    p, q = logits(2, 5, 10), logits(2, 5, 10, seed=1)
    seen = mask.astype(bool)
    broken = np.where(seen[..., None], q, np.float32(1e4) * logits(2, 5, 10, seed=2))
    for function, args in ((language.bits, ({"y": q}, {"y": broken})),):
        one, other = (function([(batch(ids, mask), found)]) for found in args)
        assert one == other
    same = [language.cross_entropy([(batch(ids, mask), {"y": p}, {"y": x})]) for x in (q, broken)]
    assert same[0] == same[1]
    rows = [
        language.bits([(batch(ids[:1, 2:]), {"y": q[:1, 2:]})]),
        language.bits([(batch(ids[1:, :3]), {"y": q[1:, :3]})]),
    ]
    assert language.bits([(batch(ids, mask), {"y": q})]) == pytest.approx(np.mean(rows), rel=1e-9)


def test_logits_are_found_among_caches():
    ids = np.zeros((1, 3), np.int64)
    y = logits(1, 3, 9)
    outputs = {"present": np.ones((1, 3, 2, 4), np.float32), "hidden": np.ones((1, 2, 9), np.float32), "logits": y}
    assert language.bits([(batch(ids), outputs)]) == language.bits([(batch(ids), {"y": y})])


@pytest.mark.parametrize(
    "ids, found",
    [
        (None, {"y": np.zeros((1, 3, 4), np.float32)}),
        ([[0, 1, 2]], {"y": np.zeros((1, 4), np.float32)}),
        ([[0, 1, 9]], {"y": np.zeros((1, 3, 4), np.float32)}),
        ([[0, 1, 2]], {"y": np.zeros((1, 2, 4), np.float32)}),
    ],
)
def test_what_is_no_language_model(ids, found):
    one = Batch("pictures", {"x": np.zeros((1, 3, 4), np.float32)}) if ids is None else batch(ids)
    with pytest.raises(DataError, match="language models"):
        language.bits([(one, found)])


def test_a_single_token_predicts_nothing_known():
    with pytest.raises(DataError, match="no token to predict"):
        language.bits([(batch([[1]]), {"y": logits(1, 1, 4)})])
    assert language.cross_entropy([(batch([[1]]), {"y": (y := logits(1, 1, 4))}, {"y": y})]) > 0, "but is a prediction"


def test_impossible_tokens_are_finite():
    y = np.array([[[0.0, -np.inf, 3.0]]], np.float32)
    assert math.isfinite(language.cross_entropy([(batch([[0]]), {"y": y}, {"y": y})]))


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(model_kit, tmp_path):
    """A judge of a model of bigrams on ids, and candidates whose logits are those times a factor."""
    text = "g (int64[b, s] input_ids) => (float[b, s, 11] y) { e = Gather (T, input_ids) y = Mul (e, k) }"
    table = 3 * model_kit.normal(11, 11)
    original = model_kit.text(text, T=table, k=np.float32(1))
    np.savez(tmp_path / "d.npz", input_ids=np.random.default_rng(0).integers(0, 11, (16, 7)))
    data = load(str(tmp_path / "d.npz"), inputs_of(original))

    def build(*limits):
        judge = Judge(Runnable(original), data, list(limits), SessionOptions(threads=1), tmp_path / "judge")
        return judge, lambda factor: Runnable(model_kit.text(text, T=table, k=np.float32(factor)))

    return build


@pytest.mark.parametrize("name", ["kl", "bits", "perplexity"])
def test_lower_is_better(judged, name):
    judge, candidate = judged(loss_limit("1%", METRICS[name]))
    same, worse = judge.judge(candidate(1)), judge.judge(candidate(2.5))
    assert same.losses[name] == pytest.approx(0, abs=1e-9) and same.within
    assert worse.losses[name] > 0.01 and not worse.within
    assert not METRICS[name].needs_labels and METRICS[name].needs_outputs


def test_a_relative_loss_of_kl_is_a_share_of_the_entropy(judged):
    judge, candidate = judged(loss_limit("1%", METRICS["kl"]), loss_limit(0.5, METRICS["kl"]))
    shares = []
    for limit in judge.limits:
        only, one = judged(limit)
        shares.append(only.judge(one(1.2)).losses["kl"])
    entropy = shares[1] / shares[0]
    assert 0.5 < entropy < math.log2(11) and judge.judge(candidate(1.2)).losses["kl"] == pytest.approx(shares[1])


def test_the_default_of_language_models_is_stated_in_its_unit():
    (limit,) = Options().limits(language=True)
    assert (limit.metric.name, limit.limit, limit.relative) == ("kl", 0.05, True)
    assert limit.text == "loss of kl at most 5% of the original's bits per token"
    (limit,) = Options(max_loss=0.05).limits(language=True)
    assert limit.text == "loss of kl at most 0.05 bits per token" and not limit.relative
    assert [one.metric.name for one in Options(metric="cosine").limits(language=True)] == ["cosine"]
    assert [one.metric.name for one in Options(min_cosine=0.9).limits(language=True)] == ["cosine"]
