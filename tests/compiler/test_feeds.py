"""Calibration and evaluation data: what is held back, and errors that name the batch or the value."""

import dataclasses

import numpy as np
import pytest

import qgraph
from qgraph.errors import DataError

QUIET = qgraph.Options(bench_seconds=0)


def test_failures_of_the_users_function_are_data_errors(mlp, tmp_path):
    def feeds():
        yield {"x": np.zeros((1, 128), np.float32)}
        raise FileNotFoundError("image 7 is gone")

    with pytest.raises(DataError, match="FileNotFoundError: image 7 is gone"):
        qgraph.optimize(mlp, tmp_path / "out.onnx", data=feeds, options=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_separate_evaluation_data(model_kit, model_free_cpu, mlp):
    feeds = model_kit.feeds(mlp, 3)
    result = qgraph.optimize(mlp, data=feeds, evaluation=model_kit.feeds(mlp, 5, seed=3), options=QUIET)
    assert result.report.calibration_samples == 3
    assert (result.report.fidelity.samples, result.report.fidelity.held_back) == (5, True)


def test_too_few_samples_to_hold_back_is_said(model_kit, model_free_cpu, mlp):
    result = qgraph.optimize(mlp, data=model_kit.feeds(mlp, 2), options=QUIET)
    assert not result.report.fidelity.held_back
    assert any("too few samples" in note for note in result.report.notes)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda feeds: feeds[3]["x"].__setitem__((0, 0), np.nan), "batch 3.*NaN"),
        (lambda feeds: feeds[3]["x"].__setitem__((0, 0), np.inf), "batch 3.*infinite"),
        (lambda feeds: feeds.clear(), "no data"),
        (lambda feeds: feeds[2].update(x=np.zeros((2, 127), np.float32)), "batch 2.*2x127"),
        (lambda feeds: feeds[2].update(x=np.zeros((2, 128), np.int64)), "batch 2.*int64"),
        (lambda feeds: feeds[1].pop("x"), "batch 1.*lacks the input 'x'"),
        (lambda feeds: feeds[1].update(z=feeds[1].pop("x")), "batch 1.*'z'"),
    ],
)
def test_wrong_data(model_kit, untouched, standing, mlp, model_free_cpu, harm, words):
    feeds = model_kit.feeds(mlp)
    harm(feeds)
    with pytest.raises(DataError, match=words):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=feeds, options=QUIET)
    untouched(standing)


@pytest.mark.parametrize("scheme", ["auto", "int8"])
def test_overflow_inside_the_model_names_the_value(model_kit, model_free_cpu, scheme):
    model = model_kit.text(
        """g (float[2, 8] x) => (float[2, 8] y) {
            h = MatMul (x, W)
            e = Exp (h)
            s = MatMul (e, V)
            y = Sigmoid (s)
        }""",
        W=model_kit.normal(8, 8, scale=100),
        V=np.abs(model_kit.normal(8, 8)),
    )
    with pytest.raises(DataError, match=r"'e' \(the output of e_Exp\).*batch"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=dataclasses.replace(QUIET, scheme=scheme))


@pytest.mark.parametrize("scheme", ["auto", "int8", "int8-dynamic", "fp32"])
def test_an_original_that_overflows_names_the_output(model_kit, model_free_cpu, scheme):
    n = model_kit.normal
    model = model_kit.text(
        "g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  e = Exp (h)  y = MatMul (e, W) }",
        W=n(8, 8, scale=100),
    )
    with pytest.raises(DataError, match=r"Output 'y' of the original is NaN on 'batch \d'"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=dataclasses.replace(QUIET, scheme=scheme))
