"""Timing in alternating blocks, with one live session at a time."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import bench
from qgraph.compare import Runnable
from qgraph.errors import ExecutionError
from qgraph.session import Session, SessionOptions

OPTIONS = SessionOptions()


@pytest.fixture
def models(model_kit):
    """A small product and one 64 times as large, on the same input."""
    text = "g (float[64, 64] x) => (float[64, 64] y) {{ {}y = Relu (h) }}"
    small = model_kit.text(text.format("h = MatMul (x, W)  "), W=model_kit.normal(64, 64))
    steps = "".join(f"h{i + 1} = MatMul (h{i}, W)  " for i in range(63))
    large = model_kit.text(
        text.format("h0 = MatMul (x, W)  " + steps + "h = Relu (h63)  "), W=model_kit.normal(64, 64, scale=0.1)
    )
    return Runnable(small), Runnable(large), {"x": model_kit.normal(64, 64)}


def test_faster_is_above_one(models):
    small, large, feeds = models
    found = bench.alternate(large, small, feeds, OPTIONS, 1, 0.3)
    assert found.ratio > 3
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.before.median > found.after.median
    assert found.after.low <= found.after.median <= found.after.high
    assert found.threads == 1
    assert found.blocks >= 3 and found.blocks % 2 == 1
    slower = bench.alternate(small, large, feeds, OPTIONS, 1, 0.3)
    assert slower.ratio < 1 / 3


def test_same_model_is_about_one(models):
    small, _, feeds = models
    other = Runnable(small.model.clone())
    assert 0.4 < bench.alternate(small, other, feeds, OPTIONS, 1, 0.5).ratio < 2.5


def test_blocks_alternate_and_only_one_session_lives(models, monkeypatch):
    small, large, feeds = models
    live, order, times = [], [], itertools.cycle([2.0, 1.0, 1.0, 2.0])

    class Counted(Session):
        def __init__(self, model, *rest):
            assert not live, "two sessions at a time"
            super().__init__(model, *rest)
            live.append(model)
            order.append("small" if model is small.model else "large")

        def close(self):
            live.clear()
            super().close()

    monkeypatch.setattr("qgraph.compare.Session", Counted)
    real = bench._block
    monkeypatch.setattr(bench, "_block", lambda *a: (real(*a[:3], 0.001), next(times))[1])
    found = bench.alternate(large, small, feeds, OPTIONS, 1, 0.01)
    assert order[:6] == ["large", "small", "small", "large", "large", "small"]
    assert found.ratio == found.ratio_low == found.ratio_high == 2.0


def test_progress_ends_at_its_total(models):
    small, large, feeds = models
    seen = []
    found = bench.alternate(small, large, feeds, OPTIONS, 1, 0.1, lambda *event: seen.append(event))
    assert [done for done, _ in seen] == list(range(1, found.blocks + 1))
    assert seen[-1][0] == seen[-1][1]


def test_wrong_feeds_are_an_error_of_qgraph(models):
    small, large, _ = models
    with pytest.raises(ExecutionError):
        bench.alternate(small, large, {"z": np.zeros((64, 64), np.float32)}, OPTIONS, 1, 0.1)


def test_all_threads_is_what_this_process_may_use():
    assert bench.all_threads() >= 1


def test_node_times_are_by_the_original_names(models):
    _, large, feeds = models
    for number, node in enumerate(large.model.graph):
        node.name = f"/layer{number}/{node.op_type}"
    found = bench.node_times(large, feeds, SessionOptions(threads=1))
    assert {f"/layer{i}/MatMul" for i in range(64)} <= set(found)
    assert all(0 <= seconds < 1 for seconds in found.values())


def test_footprint(models, tmp_path):
    small, _, feeds = models
    ir.save(small.model, tmp_path / "m.onnx")
    found = bench.footprint(tmp_path / "m.onnx", feeds, OPTIONS)
    assert found.disk == (tmp_path / "m.onnx").stat().st_size
    assert 0 < found.load_seconds < 30
    assert 0 < found.resident < 1 << 30


def test_footprint_counts_external_data(models, tmp_path):
    small, _, feeds = models
    ir.save(small.model, tmp_path / "m.onnx", external_data="w", size_threshold_bytes=0)
    found = bench.footprint(tmp_path / "m.onnx", feeds, OPTIONS)
    assert found.disk == sum(p.stat().st_size for p in tmp_path.iterdir()) > 64 * 64 * 4


def test_footprint_of_what_does_not_load(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExecutionError, match=r"m\.onnx"):
        bench.footprint(tmp_path / "m.onnx", {}, OPTIONS)
