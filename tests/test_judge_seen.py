"""The judge asks calibration data, too, where few samples were held back and a candidate comes near a limit."""

import numpy as np
import pytest

import qgraph
from qgraph.compare import Runnable
from qgraph.data import inputs_of, load
from qgraph.judge import Judge
from qgraph.metrics import METRICS, loss_limit
from qgraph.options import Options
from qgraph.session import SessionOptions

TEXT = "g (float[n, 4] x) => (float[n, 4] y) { y = Mul (x, k) }"


@pytest.fixture
def judged(model_kit, tmp_path):
    """The verdict on y = x * [1, 1, 1, factor], which loses as much as a sample's last number says."""
    original = model_kit.text(TEXT, k=np.ones(4, np.float32))

    def judge(factor, held, seen, *limits, count=5, learned=False):
        datasets = []
        for name, last, many in (("held", held, count), ("seen", seen, 40)):
            x = np.ones((many, 4), np.float32)
            x[:, 3] = last
            labels = {"labels": x.argmax(axis=1)} if name == "held" else {}
            np.savez(tmp_path / f"{name}.npz", x=x + np.arange(many, dtype=np.float32)[:, None] * 1e-6, **labels)
            datasets.append(load(str(tmp_path / f"{name}.npz"), inputs_of(original)))
        made = Judge(
            Runnable(original),
            datasets[0],
            list(limits),
            SessionOptions(threads=1),
            tmp_path / "judge",
            True,
            datasets[1],
        )
        candidate = Runnable(model_kit.text(TEXT, k=np.array([1, 1, 1, factor], np.float32)))
        return made.judge(candidate, learned), made

    return judge


SQNR = Options(min_sqnr=20).limits()


def test_easy_samples_are_not_believed(judged):
    # Of the power, 0.01 * last**2 / (3 + last**2) is lost: 0.005 where last is 1.73, and 0.0094 where it is 4.
    easy, made = judged(0.9, 1.73, 1.73, *SQNR)
    hard, _ = judged(0.9, 1.73, 5.0, *SQNR)
    assert easy.within and "calibration data" in made.told
    assert easy.losses["sqnr"] == pytest.approx(0.01 * 3 / 6, rel=0.01)
    assert hard.losses["sqnr"] == pytest.approx(0.01 * 25 / 28, rel=0.01)
    assert hard.strain > easy.strain and hard.fidelity.outputs["y"].sqnr == easy.fidelity.outputs["y"].sqnr
    far, _ = judged(0.85, 1.2, 5.0, *SQNR)
    assert not far.within, "0.0073 held back, and 0.02 on what calibration saw"


def test_nobody_asks_far_from_a_limit_or_beyond_it(judged):
    little, _ = judged(0.95, 1.0, 50.0, *SQNR)
    assert little.losses["sqnr"] == pytest.approx(0.0025 / 4, rel=0.01), "a sixteenth of the limit"
    beyond, _ = judged(0.5, 1.73, 50.0, *SQNR)
    assert beyond.losses["sqnr"] == pytest.approx(0.25 / 2, rel=0.01)


def test_many_samples_are_enough(judged):
    verdict, made = judged(0.9, 1.73, 5.0, *SQNR, count=32)
    assert verdict.losses["sqnr"] == pytest.approx(0.005, rel=0.01) and "calibration" not in made.told


def test_without_labels_there_is_nothing_to_ask(judged):
    verdict, made = judged(0.9, 1.73, 5.0, *SQNR, loss_limit("50", METRICS["top1"]))
    assert verdict.within and verdict.losses["sqnr"] == pytest.approx(0.005, rel=0.01)
    assert "calibration" not in made.told


def test_the_report_says_how_losses_count(model_kit):
    model = model_kit.text("g (float[8, 64] x) => (float[8, 48] y) { y = MatMul (x, W) }", W=model_kit.normal(64, 48))
    found = qgraph.optimize(model, None, data=model_kit.feeds(model), scheme="int8", bench_seconds=0, force=True)
    assert "and those on calibration data where they are worse" in found.report.budget.text


def test_what_was_learned_on_samples_flatters_there(judged):
    """On calibration data the margin of a learned candidate is twice as wide."""
    plain, learned = (judged(0.9, 1.73, 5.0, *SQNR, learned=learned) for learned in (False, True))
    for (verdict, made), errors in ((plain, 1), (learned, 2)):
        assert made._second.margin() == pytest.approx(1 + errors / 32**0.5)
        assert made.margin() == pytest.approx(1 + 1 / 5**0.5)
        assert verdict.losses == plain[0].losses
    assert learned[0].strain >= plain[0].strain
