"""The accuracy budget: what is written is within it, and what is not is told with its trade-offs."""

import dataclasses

import numpy as np
import onnx
import pytest

import qgraph
from qgraph import compare
from qgraph.errors import AccuracyError, NothingQuantizedError

QUIET = qgraph.Options(bench_seconds=0)


def outlier(model_kit, reach):
    """Calibration data with one value so large that little of a range is left for the others."""
    feeds = [{"x": np.clip(model_kit.normal(4, 128, seed=i), -2, 2)} for i in range(4)]
    feeds[0]["x"][0, 0] = reach
    return {"data": feeds, "evaluation": [{"x": model_kit.normal(4, 128, seed=9)}]}


@pytest.fixture
def product(model_kit):
    return model_kit.text(
        "g (float[4, 128] x) => (float[4, 16] y) { y = MatMul (x, W) }", W=model_kit.normal(128, 16, scale=0.1)
    )


def test_what_is_outside_the_budget_is_not_written(model_kit, model_free_cpu, product, tmp_path):
    """The float graph always stands; what it keeps out is a budget that even rounding in float exceeds."""
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    job = {"bench_seconds": 0, "scheme": "int8", "observer": "minmax", **outlier(model_kit, 30000)}
    words = r"nothing is within the budget.*\(loss of cosine at most 1% \(losses on 4 .*fastest loses 0\.\d+ of cosine"
    with pytest.raises(NothingQuantizedError, match=words):
        qgraph.optimize(product, tmp_path / "out.onnx", max_loss="1%", **job)
    assert (tmp_path / "out.onnx").read_bytes() == b"the old one"
    # With --force the fastest is taken, whatever it loses.
    report = qgraph.optimize(product, tmp_path / "out.onnx", max_loss="1%", force=True, **job).report
    assert report.fidelity.worst.sqnr < 20 and report.quantized
    assert {one.name: one.verdict for one in report.candidates} == {"fp32": "within", "fastest": "chosen"}
    onnx.load(tmp_path / "out.onnx")


def worse(monkeypatch, loss):
    """Every candidate loses this much of its cosine more than it does."""
    real = compare.Reference.compare

    def compared(*args, **more):
        found = real(*args, **more)
        outputs = {n: dataclasses.replace(o, cosine=o.cosine - loss) for n, o in found.outputs.items()}
        return dataclasses.replace(found, outputs=outputs)

    monkeypatch.setattr(compare.Reference, "compare", compared)


def test_nothing_within_the_budget_lists_the_trade_offs(model_kit, model_free_cpu, product, tmp_path, monkeypatch):
    (tmp_path / "out.onnx").write_bytes(b"the old one")
    worse(monkeypatch, 0.1)
    feeds = model_kit.feeds(product)
    with pytest.raises(AccuracyError) as caught:
        qgraph.optimize(product, tmp_path / "out.onnx", data=feeds, options=QUIET)
    words = str(caught.value)
    assert "Nothing is within the budget (loss of cosine at most 1% (losses on 4 samples" in words
    assert words.count("loses 0.1 of cosine") == 4 and "fastest loses 0.1 of cosine" in words
    assert "--time-limit" in words and "--force" in words
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"the old one"
    report = qgraph.optimize(product, tmp_path / "out.onnx", data=feeds, options=QUIET, force=True).report
    assert report.quantized and report.fidelity.worst.cosine < 0.91
    onnx.load(tmp_path / "out.onnx")


@pytest.mark.parametrize("budget, least", [({"max_loss": "1%"}, 12), ({"min_sqnr": 25}, 25), ({"min_sqnr": 60}, 60),
                                           ({"min_cosine": 0.9999}, 30), ({"max_loss": 0.0}, 60)])  # fmt: skip
def test_the_result_is_within_the_budget(model_kit, model_free_cpu, mlp, budget, least):
    """On the data it was judged by, whatever the budget: the noisier the nodes, the fewer are quantized."""
    scale = np.exp(2 * model_kit.normal(128, seed=8))
    feeds = [{"x": feed["x"] * scale} for feed in model_kit.feeds(mlp, 12, free=8)]
    result = qgraph.optimize(mlp, data=feeds, evaluation=feeds[:3], bench_seconds=0, **budget)
    assert result.report.fidelity.worst.sqnr >= least
    assert model_kit.sqnr(mlp, result.model, feeds[:3]) >= least
    # A budget of nothing is met by rounding in float if it is by none.
    chosen = [one for one in result.report.candidates if one.verdict == "chosen"]
    assert len(chosen) == 1 and sum(chosen[0].nodes.values()) == len(result.report.quantized)


def test_a_candidate_that_failed_on_the_evaluation_data_gives_way(model_kit, model_free_cpu, product):
    """It held the budget on what was held back of the calibration data, but not on data of another kind."""
    feeds = [{"x": np.clip(model_kit.normal(4, 128, seed=i), -2, 2)} for i in range(12)]
    far = [{"x": 100 * model_kit.normal(4, 128, seed=20 + i)} for i in range(3)]
    job = {"bench_seconds": 0, "scheme": "int8", "data": feeds}
    assert qgraph.optimize(product, **job).report.quantized
    with pytest.raises(NothingQuantizedError, match="nothing is within the budget"):
        qgraph.optimize(product, evaluation=far, **job)
    # Nobody asked for a scheme by name: the float graph is an answer.
    report = qgraph.optimize(product, evaluation=far, **{**job, "scheme": "auto"}).report
    assert report.fidelity.worst.sqnr > 30
    assert any("not on the evaluation data" in note for note in report.notes)
    verdicts = {one.name: one.verdict for one in report.candidates}
    assert "loses too much on the evaluation data" in verdicts.values()


def test_an_output_that_is_all_zeros_is_no_noise(model_kit, model_free_cpu):
    model = model_kit.text(
        """g (float[4, 16] x) => (float[4, 16] y, float[4, 16] z) {
            y = MatMul (x, W)
            n = Abs (y)
            m = Neg (n)
            z = Relu (m)
        }""",
        W=model_kit.normal(16, 16),
    )
    report = qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET).report
    assert not any("SQNR" in note for note in report.notes)
