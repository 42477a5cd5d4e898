"""A result that is slower than its input is not written; one that was timed tells its speed."""

import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph import bench
from qgraph.errors import SlowerError


def test_a_slower_result_is_not_written(model_kit, untouched, standing, mlp, model_free_cpu, monkeypatch):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    model_kit.node_times(monkeypatch)
    job = {"data": model_kit.feeds(mlp)}
    with pytest.raises(SlowerError, match=r"0\.50x"):
        qgraph.optimize(standing / "in.onnx", standing / "out.onnx", **job)
    untouched(standing)
    result = qgraph.optimize(standing / "in.onnx", standing / "out.onnx", **job, options=qgraph.Options(force=True))
    assert result.report.speed[0].ratio == 0.5
    onnx.load(standing / "out.onnx")


def test_a_slower_result_none_of_whose_nodes_could_be_timed(model_kit, mlp, model_free_cpu, monkeypatch):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    monkeypatch.setattr(bench, "node_times", lambda *_, **__: {})
    with pytest.raises(SlowerError, match=r"0\.50x"):
        qgraph.optimize(mlp, data=model_kit.feeds(mlp))


def test_a_slower_result_where_by_its_measured_times_nothing_pays(
    model_kit, untouched, standing, model_free_cpu, monkeypatch
):
    slow = qgraph.report.Latency(1.0, 1.0, 1.0)
    speed = qgraph.report.Speed(1, slow, slow, 0.5, 0.5, 0.5, 3)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: speed)
    times = [1.0, 2.0]
    monkeypatch.setattr(bench, "node_times", lambda *_: dict.fromkeys(("h_Gemm", "k_Gemm", "y_Gemm"), times.pop(0)))
    source = standing / "in.onnx"
    with pytest.raises(SlowerError, match=r"fp32 loses 0 of cosine.*0\.50x.*fastest.* loses.*0\.50x"):
        qgraph.optimize(source, standing / "out.onnx", data=model_kit.feeds(ir.load(source)))
    untouched(standing)


def test_timed_result_tells_its_speed(model_kit, mlp, model_free_cpu):
    options = qgraph.Options(bench_seconds=0.2, force=True)
    report = qgraph.optimize(mlp, data=model_kit.feeds(mlp, 6, free=8), options=options).report
    assert report.speed[0].threads == 1 and report.speed[0].ratio > 0
    assert not any("not timed" in note for note in report.notes)
