"""Where a model comes from and where its result goes: what was there is whole, before and after a failure."""

import gc
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import ModelError, OptionError, QGraphError

QUIET = qgraph.Options(bench_seconds=0)


def test_in_memory_in_and_out(model_kit, model_free_cpu, mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = ir.to_proto(mlp).SerializeToString()
    feeds = model_kit.feeds(mlp, 6)
    result = qgraph.optimize(mlp, data=feeds, options=QUIET)
    assert isinstance(result.model, ir.Model)
    assert model_kit.sqnr(mlp, result.model, feeds) > 25
    assert ir.to_proto(mlp).SerializeToString() == before, "the caller's model was changed"
    assert not any(value.meta for value in mlp.graph.initializers.values())
    assert list(tmp_path.iterdir()) == []
    assert result.report.output is None


def test_string_paths_and_a_relative_output(model_kit, model_free_cpu, mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ir.save(mlp, "in.onnx")
    qgraph.optimize("in.onnx", "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_the_folder_of_a_result_goes_with_it(model_kit, model_free_cpu, mlp, tmp_path):
    ir.save(mlp, tmp_path / "in.onnx", external_data="w", size_threshold_bytes=64)
    feeds = model_kit.feeds(mlp)
    result = qgraph.optimize(tmp_path / "in.onnx", data=feeds, options=QUIET)
    places = {Path(v.const_value.path) for v in result.model.graph.initializers.values()
              if isinstance(v.const_value, ir.ExternalTensor)}  # fmt: skip
    assert places and all(place.is_file() for place in places)
    del result
    gc.collect()
    assert not any(place.exists() or place.parent.exists() for place in places)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "w"]


def test_progress_is_told(model_kit, model_free_cpu, mlp):
    seen = []
    qgraph.optimize(mlp, data=model_kit.feeds(mlp), options=QUIET, progress=lambda *event: seen.append(event))
    words = [what for what, _, _ in seen]
    assert {"reading", "Canonicalize", "calibrating", "auditing", "comparing"} <= set(words)
    assert all(0 <= done <= total for _, done, total in seen if total)


def test_output_equals_input(model_kit, mlp, tmp_path, monkeypatch):
    ir.save(mlp, tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").read_bytes()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    for output in (tmp_path / "in.onnx", "in.onnx", "./in.onnx", "link.onnx"):
        with pytest.raises(OptionError, match="replace the input"):
            qgraph.optimize(tmp_path / "in.onnx", output, data=model_kit.feeds(mlp), options=QUIET)
    assert (tmp_path / "in.onnx").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "link.onnx"]


def test_missing_folder(model_kit, mlp, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        qgraph.optimize(mlp, tmp_path / "no" / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)


def test_output_is_a_folder(model_kit, mlp, tmp_path, model_free_cpu):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(QGraphError):
        qgraph.optimize(mlp, tmp_path / "out", data=model_kit.feeds(mlp), options=QUIET)
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_an_interrupt_leaves_nothing(model_kit, untouched, standing, mlp, model_free_cpu):
    def stop(what, *_):
        if what == "comparing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgraph.optimize(
            standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET, progress=stop
        )
    untouched(standing)


def test_overwriting_an_old_output(model_kit, standing, mlp, model_free_cpu):
    qgraph.optimize(standing / "in.onnx", standing / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    assert sorted(p.name for p in standing.iterdir()) == ["in.onnx", "out.onnx"]
    onnx.checker.check_model(onnx.load(standing / "out.onnx"))


def test_an_ir_whose_nodes_are_unsorted_says_what_to_do(model_kit, model_free_cpu):
    n = model_kit.normal
    model = model_kit.text("g (float[2, 8] x) => (float[2, 8] y) { h = MatMul (x, W)  y = Relu (h) }", W=n(8, 8))
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    with pytest.raises(ModelError, match="TopologicalSortPass"):
        qgraph.optimize(model, data=model_kit.feeds(model), options=QUIET)


def test_output_whose_data_file_is_the_weights_of_the_input(model_kit, model_free_cpu, mlp, tmp_path):
    # "model.onnx" was renamed, its weights were not; the result takes the old name.
    ir.save(mlp, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=64)
    (tmp_path / "model.onnx").rename(tmp_path / "model_fp32.onnx")
    weights = (tmp_path / "model.onnx.data").read_bytes()
    source, output, feeds = tmp_path / "model_fp32.onnx", tmp_path / "model.onnx", model_kit.feeds(mlp)
    for _ in range(2):
        qgraph.optimize(source, output, data=feeds, options=QUIET)
        assert (tmp_path / "model.onnx.data").read_bytes() == weights
        names = {"model_fp32.onnx", "model.onnx", "model.onnx.data", "model.onnx.1.data"}
        assert {p.name for p in tmp_path.iterdir()} == names
        assert model_kit.sqnr(source, output, feeds) > 25


def test_output_that_is_a_link_is_replaced(model_kit, model_free_cpu, mlp, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "kept.onnx").write_bytes(b"the old one")
    (tmp_path / "out.onnx").symlink_to(tmp_path / "far" / "kept.onnx")
    qgraph.optimize(mlp, tmp_path / "out.onnx", data=model_kit.feeds(mlp), options=QUIET)
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["kept.onnx"]
